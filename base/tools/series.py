"""Several runs in one folder, one after the other: the stages of a training, or trials that differ in their seed only."""

import argparse
from pathlib import Path

from base.config import Resolved, validate
from base.errors import UserError
from base.tools import launch
from base.tools.finished import ended, members_of, tool, write_report
from base.tools.supervise import STOPPED

Member = tuple[Resolved, Path, str]  # its configuration, its folder, what it is


def train_series(flags: argparse.Namespace, name: str, resolved: Resolved, folder: Path) -> int:
    """Trains what is not done yet; of trials the closing table's exit code."""
    from torch.distributed.elastic.multiprocessing import SignalException

    def begin() -> None:
        from base.records import keep_config

        keep_config(folder, resolved, name, changed=True)

    trials, again = resolved.config.trials > 1, f"go on with: bash run_training.sh --resume {folder}"
    try:
        members = trials_of(resolved, folder) if trials else stages_of(flags, name, resolved, folder)
        for run, place, what in members:
            print(f"\n{what}", flush=True)
            if not flags.dry_run and ended(place):
                print(f"{place} is done", flush=True)
                continue
            flags.resume = str(place) if place.exists() else None
            if code := launch.start(flags, name, run, place, begin, page=trials):
                print(f"{'stopped in' if code in STOPPED else 'not done:'} {place}; {again}", flush=True)
                return code
    except SignalException as asked:  # between two runs
        print(f"stopped; {again}", flush=True)
        return 128 + asked.sigval
    if flags.dry_run:
        return 0
    if resolved.config.report and not flags.node_rank:
        try:  # of stages only now: between two of them the other nodes would wait for the page
            for place in [*([] if trials else [place for _, place, _ in members]), folder]:
                write_report(place)
        except SignalException:  # which is said; all runs are done
            pass
    return tool("trials", str(folder)) if trials else 0


def trials_of(resolved: Resolved, folder: Path) -> list[Member]:
    """Runs of one configuration, each with the next seed."""
    config, members = resolved.config, []
    if (begun := len(members_of(folder, "trial"))) > config.trials:
        raise UserError(f"--trials {config.trials}: {folder} has {begun} of them already; --trials {begun} or more goes on with it")
    for number in range(1, config.trials + 1):
        own = {"trials": 1, "seed": config.seed + number - 1}
        sources = {**resolved.sources, **dict.fromkeys(own, f"trial {number} of {config.trials}")}
        run = Resolved(config.model_copy(update=own), sources)
        members.append((run, folder / f"trial-{number}", f"trial {number} of {config.trials}: seed {own['seed']}"))
    return members


def stages_of(flags: argparse.Namespace, name: str, resolved: Resolved, folder: Path) -> list[Member]:
    """The stages, all of them checked; each begins with the weights of the one before. Flags win over a file's stages.

    Each ends at its own ``epochs``, ``max_steps`` or ``target``.
    """
    common, source = resolved.config.model_dump(mode="json"), resolved.sources["stages"]
    flagged = [] if source.startswith("--") else [key for key, where in resolved.sources.items() if where.startswith("--")]
    members = []
    for number, stage in enumerate(resolved.config.stages, 1):
        own = {key: value for key, value in stage.items() if key not in flagged}
        sources = {**resolved.sources, **dict.fromkeys(own, f"stage {number} of {source}")}
        config = validate({**common, "stages": [], **own}, sources)
        launch.check_backend(name, Resolved(config, sources))
        if number > 1:
            before = None if flags.dry_run else str(folder / f"stage-{number - 1}")  # it is not there yet
            config = config.model_copy(update={"checkpoint": before, "backbone_path": None})
        height, width = config.image_size
        what = f"stage {number} of {len(resolved.config.stages)}: {height}×{width}, {config.epochs} epochs"
        members.append((Resolved(config, sources), folder / f"stage-{number}", what))
    return members
