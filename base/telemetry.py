"""What devices draw, read in the background and summed up by phase of the run; no fault of a sensor ends a run that has begun."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

LEAST_COVERED = 0.9  # of devices × training time: the rest is taken to be like it; with less known, no energy is stated


class Reading(NamedTuple):
    """One look at a device; None is what it does not tell."""

    memory_bytes: int | None = None  # in use
    power_watts: float | None = None  # at this moment
    joules: float | None = None  # of a counter that only rises: taken instead of the power, where there is one
    utilisation: float | None = None  # 0…1
    clock_hz: float | None = None


class Sensor(Protocol):
    """Reads one device. It is made and read in a thread of its own, and both raise what they like if they cannot: then a new one is tried."""

    missing: str  # after a reading: why it has no power and what would help; "" if it has, or another rank's sensor tells it

    def read(self) -> Reading: ...


# Of a rank's device and local rank. It is also called once before a run, which a UserError (a package is missing) keeps from starting.
MakeSensor = Callable[[torch.device, int], Sensor]


class Sampler:
    """Reads a rank's device every ``seconds`` from a thread; 0, or a backend without a sensor: never."""

    def __init__(self, make: MakeSensor | None, seconds: float, device: torch.device, local_rank: int):
        self.make, self.seconds, self.device, self.local_rank = make if seconds else None, seconds, device, local_rank
        self.missing = "" if self.make else "telemetry_seconds is 0" if make else "the backend has no sensor"  # the first reason
        self.tells = True  # whether its power is one of those that make up the run's, as far as is known
        self.lock, self.stopping, self.thread = threading.Lock(), threading.Event(), threading.Thread(target=self._run, daemon=True)
        self.phase, self.since, self.last = "set-up", time.monotonic(), Reading()
        self.spent: Counter[str] = Counter()  # phase → seconds since the last reading
        self.sums: dict[str, Counter[str]] = {}  # phase → what `record` has not fetched yet: value · seconds, and seconds
        if self.make:
            self.thread.start()

    def switch(self, phase: str) -> str:
        """From now on the time counts for ``phase``; returns the one before."""
        with self.lock:
            self._spend()
            before, self.phase = self.phase, phase
        return before

    def close(self, patience: float = 10) -> None:
        """Ends the thread; a reading that hangs for longer than ``patience`` seconds is left behind."""
        self.stopping.set()
        if self.thread.is_alive():
            self.thread.join(patience)

    def _run(self) -> None:
        sensor = None
        while not self.stopping.is_set():
            try:
                sensor = sensor or self.make(self.device, self.local_rank)
                reading, missing = sensor.read(), sensor.missing
                with self.lock:
                    self._add(reading)
                    self.tells = bool(missing) or (reading.power_watts, reading.joules) != (None, None)
            except Exception as error:  # noqa: BLE001 (a vendor's library may raise anything)
                sensor, missing = None, f"its sensor does not work: {error or type(error).__name__}"
                with self.lock:  # what was drawn since the last reading is not known
                    self._spend()
                    self.spent.clear()
                    self.last = Reading()
            self.missing = self.missing or missing
            self.stopping.wait(self.seconds)

    def _spend(self) -> None:
        now = time.monotonic()
        self.spent[self.phase] += now - self.since
        self.since = now

    def _add(self, now: Reading) -> None:
        """Shares out what came since the reading before among the phases, by their time."""
        self._spend()
        last, self.last, watts = self.last, now, None
        if None not in (last.joules, now.joules):
            watts = max(0.0, now.joules - last.joules) / self.spent.total()
        elif None not in (last.power_watts, now.power_watts):
            watts = (last.power_watts + now.power_watts) / 2
        for phase, seconds in self.spent.items():
            sums = self.sums.setdefault(phase, Counter())
            for name, value in (("watts", watts), ("utilisation", now.utilisation), ("clock_hz", now.clock_hz)):
                if value is not None:
                    sums.update({name: value * seconds, "s " + name: seconds})
            sums["memory_bytes"] = max(sums["memory_bytes"], now.memory_bytes or 0)
        self.spent.clear()


def record(sampler: Sampler, ranks, records, progress) -> None:
    """A ``telemetry`` line for each phase since the last call; ``progress`` keeps the whole run's. Every rank has to call it.

    Power and joules are those of all devices together, utilisation and clock means over them, memory the most that one had in use.
    """
    if sampler.make is None:
        return
    with sampler.lock:
        own, sampler.sums = (sampler.sums, sampler.missing, sampler.tells), {}
    gathered = ranks.gathered(own)
    missing = next((f"rank {rank}: {why}" for rank, (_, why, _) in enumerate(gathered) if why), "")
    if missing and not progress.unmeasured:
        records.log(f"power is not always known; {missing}")
    progress.unmeasured = progress.unmeasured or missing
    for phase in dict.fromkeys(phase for sums, *_ in gathered for phase in sums):
        each = [sums[phase] for sums, *_ in gathered if phase in sums]
        total, memory, known = sum(each, Counter()), max(sums["memory_bytes"] for sums in each), sum("watts" in sums for sums in each)
        mean = {name: total[name] / (total["s " + name] or 1) if any(name in sums for sums in each) else None for name in ("utilisation", "clock_hz")}
        power = {"power_watts": known * total["watts"] / total["s watts"], "joules": total["watts"]} if known else {}
        records.metric("telemetry", phase=phase, step=progress.step, memory_bytes=memory, **power, **mean)
        progress.memory_bytes = max(progress.memory_bytes, memory)
        if phase == "training" and known:
            progress.joules += total["watts"]
            progress.joules_seconds += total["s watts"] / max(known, sum(tells for *_, tells in gathered))


def whole_run(progress, images: int) -> dict[str, float | None]:
    """Most memory in use on a device; mean power of all devices in training, its energy, and ``images`` for each joule of it."""
    watts = joules = None
    if progress.joules > 0 and progress.joules_seconds >= LEAST_COVERED * progress.train_seconds:
        watts = progress.joules / progress.joules_seconds
        joules = watts * progress.train_seconds
    return {"memory_bytes": progress.memory_bytes or None, "power_watts": watts, "joules": joules, "images_per_joule": joules and images / joules}
