"""MLPerf's own checkers, run on a folder of results; what they find is said with file, rule and fix."""

import contextlib
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.package_checker.package_checker import check_systems, check_training_result_files
from mlperf_logging.package_checker.seed_checker import SeedChecker
from mlperf_logging.rcp_checker import rcp_checker
from mlperf_logging.system_desc_checker.system_desc_checker import check_system_desc

from submission.runs import RULESET, RUNS

USAGE = "training"
FIXES = {  # rules of the closed division that a configuration can break
    "opt_learning_rate_decay_boundary_epochs": "the second of decay_epochs has to be 50 and a multiple of 5 more or less, as in 44 55 or 48 60",
    "opt_learning_rate_warmup_steps": "a warm-up of at least one step is needed: warmup_steps 1",
    "max_samples": "max_samples has to be 1 or 50",
    "eval_accuracy": "train on COCO 2017 with target 0.23",
    "init_stop": "the start-up took over 30 minutes: build extensions and pack the data set before",
}
OPEN = "or submit to the open division, which is not held to the recipe"


@dataclass(frozen=True)
class Verdict:
    """What one checker says. ``passed`` None: it does not apply, and ``lines`` say why."""

    checker: str
    passed: bool | None
    lines: tuple[str, ...] = ()


@contextlib.contextmanager
def _listening() -> Iterator[list[str]]:
    """What MLPerf's checkers say of errors: they log it with the root logger, and return no more than True or False."""
    heard: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: heard.append(" ".join(record.getMessage().split()))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield heard
    finally:
        root.removeHandler(handler)


def missing_fields(description: Path) -> list[str]:
    """Fields that the system description has to have and does not."""
    with _listening() as heard:
        check_system_desc(str(description), USAGE, RULESET)
    return re.findall(r"Missing field ([\w-]+)", " ".join(heard))


def system_description(description: Path) -> Verdict:
    with _listening() as heard:
        passed = check_system_desc(str(description), USAGE, RULESET)[0]
    return Verdict("system_desc_checker", passed, tuple(heard))


def compliance(logs: Sequence[Path], reached: Sequence[bool]) -> Verdict:
    """Each log by itself. Of a run without the target, that rule may be broken: Olympic scoring drops the run."""
    lines, passed = [], True
    for path, had_target in zip(logs, reached, strict=True):
        checker = mlp_compliance.make_checker(USAGE, RULESET, quiet=False, werror=False)
        with _listening():
            checker.check_file(str(path), f"{USAGE}_{RULESET}/common.yaml")
        for key, message in [*checker.overwritable.items(), *((None, text) for text in checker.not_overwritable)]:
            first, *rest = message.splitlines()
            test = next((line for line in rest if line.startswith("failed test:")), rest[0] if rest else "")
            key = key or (re.findall(r"^Failed checks for (\w+)", first) or [""])[0]
            excused = not had_target and key == "eval_accuracy"
            fix = "none needed: Olympic scoring drops this run" if excused else f"fix: {FIXES.get(key, 'take the log as the run wrote it')}, {OPEN}"
            lines.append(f"{path.name}: {' '.join(f'{first} {test}'.split())}; {fix}")
            passed = passed and excused
    return Verdict("compliance_checker", passed, tuple(lines))


def seeds(logs: Sequence[Path], division: str) -> Verdict:
    if division != "closed":
        return Verdict("seed_checker", None, (f"does not apply: the {division} division may repeat seeds",))
    with _listening() as heard:
        passed = SeedChecker(RULESET).check_seeds([str(path) for path in logs])
    return Verdict("seed_checker", passed, tuple(f"{line}; fix: give each run another --seed" for line in heard))


def convergence(folder: Path, division: str, runs: int, global_batch: int, bypass: bool) -> tuple[Verdict, float]:
    """The reference convergence points (RCP). → what it says, and the factor by which MLPerf multiplies the result."""
    if division != "closed" or runs != RUNS:
        why = f"the {division} division need not converge as the reference" if division != "closed" else f"its test is for {RUNS} runs, not {runs}"
        return Verdict("rcp_checker", None, (f"does not apply: {why}",)), 1.0
    points = sorted(point["BS"] for point in rcp_checker.RCP_Checker(USAGE, RULESET, "ssd", False).rcp_data.values())
    with _listening():
        passed, message, factor = rcp_checker.check_directory(
            str(folder), USAGE, RULESET, verbose=False, bert_train_samples=False, rcp_pass="pruned_rcps", rcp_bypass=bypass
        )
    what = f"global batch {global_batch}, references at {', '.join(map(str, points))}: {message.strip()}"
    if not passed:
        return Verdict("rcp_checker", False, (
            f"{what}; it may not converge in fewer epochs than the reference. Fix: a global batch from {points[0]} to {points[-1]} and a recipe "
            "within MLPerf's rules, or a reference convergence point submitted to MLPerf, until when --rcp-bypass lets it pass",)), 1.0  # fmt: skip
    if "bypass" in message:
        return Verdict("rcp_checker", True, (what,)), 1.0
    if factor > 1:
        what += f"; converges faster than the reference, within the bounds: MLPerf multiplies the result by {factor:.4f}"
    return Verdict("rcp_checker", True, (what,)), float(factor)


def package(org: Path, runs: int, bypass: bool) -> Verdict:
    """MLPerf's check of the whole folder."""
    if runs != RUNS:
        return Verdict("package_checker", None, (f"does not apply: it wants {RUNS} results, and {runs} are here",))
    with _listening() as heard:
        described = check_systems(str(org), USAGE, RULESET)
        passed = check_training_result_files(str(org), USAGE, RULESET, quiet=False, werror=False, rcp_bypass=bypass,
                                             rcp_bert_train_samples=False, seed_checker_bypass=False)  # fmt: skip
    for scaling in org.glob("results/*/*/scaling.json"):  # MLPerf adds it, if its reviewers decide so
        scaling.unlink()
    return Verdict("package_checker", described and passed, tuple(f"{line.replace(f'{org.parent}/', '')}; see above" for line in heard))
