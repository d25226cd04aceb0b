"""Calls timed in turn: every case in every round, so that what else the machine does meets all of them alike."""

import statistics
import time
from collections.abc import Callable

Cases = dict[str, Callable[[], object]]
Times = dict[str, list[float]]  # seconds of a call in each round


def interleaved(cases: Cases, rounds: int, warm_up: bool = True, least: float = 0.0) -> Times:
    """Seconds a call of each case, one case after the other in every round, after one round of warm-up.

    A case that takes less than ``least`` seconds is called repeatedly, for about as long, and the mean counts.
    """

    def once(case: Callable[[], object], times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            case()
        return (time.perf_counter() - began) / times

    repeats = dict.fromkeys(cases, 1)
    if warm_up:
        for name, case in cases.items():
            if once(case, 1) < 10 * least:  # the first call may do more than the others
                repeats[name] = max(1, min(10_000, round(least / max(once(case, 1), 1e-7))))
    seconds: Times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(once(case, repeats[name]))
    return seconds


def ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios: what both saw of a slow moment cancels out."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
