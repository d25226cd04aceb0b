"""The training loop, as one rank runs it: ``python -m base.train`` under torchrun; `base.tools.launch` starts it.

Read it from `run` down; `base.run` builds what it works with. Backends replace components, never this loop.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from base import checkpoint, clock, reach, telemetry
from base.backend import load_backend
from base.checkpoint import Progress
from base.config import Config, validate
from base.contracts import Batch
from base.distributed import AgreedError, Ranks
from base.errors import UserError
from base.evaluate import Background, check_bad_images, detect, figures
from base.records import Records, summary
from base.run import Run, StopRequest, set_up
from base.schedule import evaluates_after, learning_rate
from base.terminal import Display
from base.watchdog import Watchdog, note_error

STOPPED = 143  # exit code of a run that was asked to stop, as a shell gives for SIGTERM


def run(config: Config, sources: dict, name: str, folder: Path, resume: bool, ranks: Ranks, stopped: StopRequest) -> int:
    """Trains from the start or from the latest checkpoint to the target, and returns an exit code."""
    records = Records(folder if ranks.is_first else None, Display(silent=not ranks.is_first))
    try:
        state = set_up(config, name, folder, resume, ranks, stopped, records, sources)
        try:
            reached = train(state)
        finally:
            state.telemetry.close()
        if reached is None:
            records.log(f"stopped after step {state.progress.step}; go on with: bash run_training.sh --resume {folder}")
            return STOPPED
        records.mlperf.run_stop(reached)
        images = state.progress.step * config.global_batch
        ap = state.progress.best and state.progress.best["AP"]
        whole = clock.whole_run(state.progress, images, records.run_seconds(), reached) | telemetry.whole_run(state.progress, images)
        records.metric("end", reached=reached, steps=state.progress.step, seconds=round(state.progress.seconds, 3), AP=ap, **whole)
        records.check()
        records.display.close()
        device = config.model_copy(update={"device": ranks.device.type})
        records.log(summary(device, state.progress, state.images, folder, reached, name, whole, state.telemetry.missing))
        return 0
    finally:
        records.close()


def train(state: Run) -> bool | None:
    """All epochs, until the target: → whether it was reached, or None if the run was asked to stop."""
    config, progress = state.config, state.progress
    state.records.display.start(progress.step, state.total_steps)
    epoch, done = divmod(progress.step, state.steps_per_epoch)
    if done == 0 and epoch > 0 and evaluates_after(config, epoch) and not progress.evaluated(epoch):
        epoch, done = epoch - 1, state.steps_per_epoch  # it ended between an epoch's last step and its evaluation
    reached = target_reached(config, progress)
    while progress.step < state.total_steps and not reached or done:
        if done == 0:
            state.records.mlperf.epoch_start(epoch + 1)
        if done < state.steps_per_epoch:
            if not train_epoch(state, epoch, done):
                save(state)
                return None
            state.records.mlperf.epoch_stop(epoch + 1)
            save(state)
        reached, last = target_reached(config, progress), progress.step >= state.total_steps
        if not reached and (evaluates_after(config, epoch + 1) or last) and not progress.evaluated(epoch + 1):
            if not evaluate_epoch(state, epoch + 1):
                return None
            reached = target_reached(config, progress)
        epoch, done = epoch + 1, 0
    save(state)
    return target_reached(config, progress)


def train_epoch(state: Run, epoch: int, first: int) -> bool:
    """The steps of one epoch from ``first`` on, or to ``total_steps``; False if the run was asked to stop."""
    config, progress, ranks = state.config, state.progress, state.ranks
    began = time.monotonic()
    state.train_loader.set_epoch(epoch, first)
    state.telemetry.switch("training")
    batches = iter(state.train_loader)
    while progress.step < min(state.total_steps, (epoch + 1) * state.steps_per_epoch):
        batch, failure = next_batch(state, batches)
        waited = time.monotonic() - began
        progress.data_seconds += waited
        if exchange(state, failure):
            settle(state, leave=0)
            lap(progress, began)
            return False
        if target_reached(config, progress):  # an evaluation in the background came in
            break
        rate = learning_rate(config, progress.step, state.steps_per_epoch, state.images)
        state.clock.start()
        loss = state.step(batch, rate)
        state.clock.mark("rest")
        progress.step += 1
        state.launched.append((progress.step, rate, batch.image_ids, clock.Later(loss), waited, state.clock.marks))
        settle(state, leave=1)  # reading the loss before last leaves the device one step to work on
        began = lap(progress, began)
        if config.checkpoint_every and progress.step % config.checkpoint_every == 0 and progress.step % state.steps_per_epoch:
            settle(state, leave=0)
            lap(progress, began)
            save(state)
            began = time.monotonic()
    settle(state, leave=0)
    lap(progress, began)
    bad = {path: why for rank in ranks.gathered(state.train_loader.bad_images) for path, why in rank.items()}
    report_skipped(state, bad)
    check_bad_images(bad, state.images)
    return True


def lap(progress: Progress, began: float) -> float:
    """Counts the time since ``began`` as training, and returns the present."""
    now = time.monotonic()
    progress.seconds, progress.train_seconds = progress.seconds + now - began, progress.train_seconds + now - began
    return now


def next_batch(state: Run, batches) -> tuple[Batch | None, UserError | None]:
    """The next batch, or why there is none: an error waits until all ranks know of it."""
    try:
        batch = next(batches)
        check_bad_images(state.train_loader.bad_images, state.images)
    except UserError as error:
        return None, error
    return batch, None


def report_skipped(state: Run, bad: dict[str, str]) -> None:
    """Lists images that could not be read, each once."""
    for path in sorted(bad.keys() - state.skipped):
        state.records.log(f"skipped image {path}: {bad[path]}")
    state.skipped.update(bad)


def exchange(state: Run, failure: UserError | None) -> bool:
    """Agrees with the other ranks before a step: → whether to stop. One rank's failure ends all of them."""
    failure = failure or state.records.failure
    ready = state.evaluation is not None and state.evaluation.ready()
    stops, failures, results = state.ranks.sums([float(state.stopped()), float(failure is not None), float(ready)])
    if failures:
        first = next(filter(None, state.ranks.gathered(failure)))
        raise AgreedError(str(first), first.code)
    if results:
        state.progress.train_seconds -= collect(state)  # which the loop's lap counts as training
    return stops > 0


def settle(state: Run, leave: int) -> None:
    """Reads the losses of all but the last ``leave`` steps, records them, and refuses to go on from one that is not finite."""
    while len(state.launched) > leave:
        number, rate, image_ids, loss, waited, marks = state.launched.popleft()
        value = loss.item()
        state.progress.step_seconds += state.clock.add(marks, last=not state.launched)
        state.progress.timed_steps += bool(marks)
        finite = value == value and abs(value) != float("inf")
        total, broken = state.ranks.sums([value if finite else 0.0, float(not finite)])
        if broken:
            ids = [i for rank in state.ranks.gathered([] if finite else image_ids.tolist()) for i in rank]
            good = checkpoint.listed(state.folder)
            raise AgreedError(
                f"the loss is not finite at step {number} (learning rate {rate:.6g}, image ids {' '.join(map(str, ids))}); "
                + (f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet")
            )
        mean, images = total / state.ranks.world_size, number * state.config.global_batch
        if number % state.config.log_every == 0 or number == 1:
            speed = images / state.progress.train_seconds if state.progress.train_seconds else 0.0
            epoch = (number - 1) // state.steps_per_epoch + 1
            values = {"loss": mean, "learning_rate": rate, "images_per_second": round(speed, 2), "data_seconds": round(waited, 5)}
            state.records.metric("train", step=number, epoch=epoch, **values)
            state.records.display.update(number, epoch, mean, rate, speed)


def save(state: Run) -> None:
    """Writes a checkpoint of the present step on the first rank, and drops the oldest.

    It waits for an evaluation in the background, so that a checkpoint has the figures of all epochs before it.
    """
    began = time.monotonic()
    settle(state, leave=0)
    collect(state)
    before = state.telemetry.switch("checkpoint")
    telemetry.record(state.telemetry, state.ranks, state.records, state.progress)
    if parts := state.clock.told():
        state.records.metric("parts", step=state.progress.step, **parts)
    loaders = []
    if hasattr(state.train_loader, "state_dict"):
        loaders = state.ranks.gathered(state.train_loader.state_dict())

    def write() -> None:
        state.records.check()
        state.progress.record_bytes = state.records.sizes()
        content = checkpoint.pack(state.config, state.progress, state.categories, state.model, state.optimizer, state.step, loaders)
        checkpoint.write(checkpoint.step_path(state.folder, state.progress.step), content)
        checkpoint.prune(state.folder, state.config.keep_checkpoints)

    state.ranks.first(write)
    state.telemetry.switch(before)
    state.progress.seconds += time.monotonic() - began


def evaluate_epoch(state: Run, epoch: int) -> bool:
    """Evaluates after an epoch, here or in the background; False if the run was asked to stop."""
    collect(state)
    began = time.monotonic()
    config, ranks = state.config, state.ranks
    state.records.mlperf.eval_start(epoch)
    before = state.telemetry.switch("evaluation")
    arrays, bad = detect(state.backend, config, ranks, state.step, state.model.default_boxes, state.eval_loader, state.stopped)
    detected = time.monotonic() - began
    report_skipped(state, bad)
    if arrays is None:
        return False
    last = epoch == config.epochs or state.progress.step >= state.total_steps
    if config.evaluate_in_background and not last:

        def start() -> None:
            state.evaluation = Background(state.backend.name, config.use, config.path("val_annotations"), arrays, state.folder)

        ranks.first(start)
        state.evaluating = (epoch, state.progress.step, began, detected)
    else:
        found = ranks.first(lambda: figures(state.backend, config.path("val_annotations"), arrays))
        record_evaluation(state, epoch, state.progress.step, found, time.monotonic() - began, detected)
    state.telemetry.switch(before)
    state.progress.seconds += time.monotonic() - began
    return True


def collect(state: Run) -> float:
    """Waits for the evaluation in the background, if there is one, and records it: → seconds that this took."""
    if state.evaluating is None:
        return 0.0
    entered = time.monotonic()
    (epoch, step, began, detected), state.evaluating = state.evaluating, None
    evaluation, state.evaluation = state.evaluation, None
    record_evaluation(state, epoch, step, state.ranks.first(lambda: evaluation.result()), time.monotonic() - began, detected)
    return time.monotonic() - entered


def record_evaluation(state: Run, epoch: int, step: int, found: dict[str, float], seconds: float, detected: float) -> None:
    """Records the figures of the weights after ``step``, found in ``seconds``, and keeps their checkpoint if they are the best.

    After ``detected`` seconds all ranks' detections were there.
    """
    state.records.mlperf.eval_stop(epoch, found["AP"])
    best = state.progress.best
    state.progress.evaluations.append({"epoch": epoch, "step": step, **found})
    state.records.metric("evaluation", epoch=epoch, step=step, seconds=round(seconds, 3), detection_seconds=round(detected, 3), **found)
    state.records.log(f"epoch {epoch}: mAP {found['AP']:.4f}, AP50 {found['AP50']:.4f} ({seconds:.1f} s)")
    if best is None or found["AP"] > best["AP"]:
        state.ranks.first(lambda: checkpoint.keep_best(state.folder, step, state.progress.evaluations))


def target_reached(config: Config, progress: Progress) -> bool:
    return config.target is not None and progress.best is not None and progress.best["AP"] >= config.target


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base.train", description="one rank; use run_training.sh to start a run")
    parser.add_argument("run", help="what base.tools.launch resolved, as JSON")
    given = json.loads(parser.parse_args(arguments).run)
    stopped = StopRequest()
    config = validate(given["config"], given["sources"])
    watchdog, ranks = Watchdog(config.timeout), None
    try:
        backend = load_backend(given["backend"], config.use)
        wanted = config.device if config.device != "auto" else backend.device
        ranks = reach.join(wanted, backend.distributed, config.timeout, config.device_ids, watchdog)
        code = run(config, given["sources"], given["backend"], Path(given["folder"]), given["resume"], ranks, stopped)
    except UserError as error:
        code = error.code
        note_error(code, str(error))
        if ranks is not None and not isinstance(error, AgreedError):
            reach.tell(error, ranks)
        launched = "SSD_NOTES" in os.environ  # it prints what it may start again
        if (code == UserError.code or not launched) and (not isinstance(error, AgreedError) or os.environ["LOCAL_RANK"] == "0"):
            print(f"error: {error}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        if ranks is None or not (why := reach.lost(error, ranks, config.timeout)):
            raise
        reach.give_up(*why)
    reach.leave()  # not after any other error: its traceback holds what may still wait for other ranks, such as a captured graph
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
