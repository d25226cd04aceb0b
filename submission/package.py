"""``python -m base submission RUN… --org ORG --system SYSTEM --out DIR``: finished runs as a folder of results in MLPerf's layout.

The folder DIR/ORG holds results, system description, code and instructions. MLPerf's checkers of ruleset 1.0.0 are run on it, and it is
written only if they pass. Exit code 1: a checker failed. docs/submission.md has the layout and what each checker looks at.
"""

import argparse
import filecmp
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from base.config import NAME
from base.errors import UserError
from base.tools.finished import members_of
from submission import checks
from submission.implementation import write_code, write_instructions
from submission.runs import RUNS, Run, Score, check_together, read, score
from submission.system import CHOICES, describe

TOKEN = ":::MLLOG "


def main(arguments: list[str]) -> int:
    flags = parsed(arguments)
    runs = [read(run) for given in flags.runs for run in members_of(given, "trial") or [given]]
    check_together(runs, flags.incomplete)
    stated = {"submitter": flags.org, "division": flags.division, "status": flags.status}
    description, notes = describe(runs[0], stated, flags.system_description, flags.system)
    code = flags.implementation or runs[0].facts["backend"]
    check_name("--implementation", code)
    if code == flags.system:
        raise UserError(f"--implementation {code} and --system {code} would be one folder; name one of them otherwise")
    notes += [f"cache_clear is false in {run.folder}: MLPerf wants all caches cleared before a run." for run in runs if not run.cache_cleared]
    result = score(runs)
    print("\n".join(result_lines(runs, result)), flush=True)
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".submission-", dir=flags.out) as scratch:
            org = Path(scratch, flags.org)
            notes += build(org, runs, description, flags.system, code, result)
            verdicts, factor = check(org, runs, description, flags.system, flags.rcp_bypass)
            print("\n".join(verdict_lines(verdicts, notes)), flush=True)
            if factor > 1 and result.mean is not None:
                print(f"with MLPerf's factor: {result.mean * factor:.3f} minutes")
            if any(verdict.passed is False for verdict in verdicts):
                print(f"error: a checker failed; nothing is written to {flags.out / flags.org}", file=sys.stderr)
                return 1
            print(put(org, flags.out / flags.org))
    except OSError as error:
        raise UserError(f"{error.filename or flags.out} cannot be written ({error.strerror}); choose another --out") from error
    return 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m base submission", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help=f"folder of a finished run, or of trials; MLPerf wants {RUNS} runs, in their order"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the folder ORG is made")
    parser.add_argument("--org", required=True, help="the submitter: a folder's name")
    parser.add_argument("--system", required=True, help="the system: a folder's name, and system_name if the description has no other")
    parser.add_argument("--division", choices=CHOICES["division"], help="unless the description says it")
    parser.add_argument("--status", choices=CHOICES["status"], help="unless the description says it")
    parser.add_argument("--system-description", "--system_description", type=Path, metavar="FILE",
                        help="JSON or YAML with the fields of the system that the records of the runs do not tell")  # fmt: skip
    parser.add_argument("--implementation", metavar="NAME", help="folder of the code (default: the backend)")
    parser.add_argument("--incomplete", action="store_true", help=f"fewer than {RUNS} runs: an unofficial folder")
    parser.add_argument("--rcp-bypass", "--rcp_bypass", action="store_true", help="package_checker's flag: convergence without a reference passes")
    flags = parser.parse_args(arguments)
    check_name("--org", flags.org)
    check_name("--system", flags.system)
    return flags


def check_name(flag: str, name: str) -> None:
    if not NAME.fullmatch(name):
        raise UserError(f"{flag} {name!r} is no name for a folder of a submission (letters, digits, _ . -)")


def build(org: Path, runs: Sequence[Run], description: dict[str, str], system: str, code: str, result: Score) -> list[str]:
    """Writes the whole folder; → notes. Raises UserError if the system description lacks fields."""
    described = org / "systems" / f"{system}.json"
    described.parent.mkdir(parents=True)
    described.write_text(json.dumps(description, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if missing := checks.missing_fields(described):
        raise UserError(f"the system description lacks {', '.join(missing)}; add them by --system-description FILE, an empty text included")
    identity = {"submission_org": description["submitter"], "submission_platform": description["system_name"],
                "submission_division": description["division"], "submission_status": description["status"]}  # fmt: skip
    results, changes = org / "results" / system / "ssd", {}
    results.mkdir(parents=True)
    for place, run in enumerate(runs):
        text, changed = with_identity(run.log, identity)
        changes |= changed
        (results / f"result_{place}.txt").write_bytes(text.encode())
    notes = [f"Changed in the copies of mlperf.log: {key} {old!r} → {identity[key]!r}." for key, old in changes.items()]
    implementations = org / "benchmarks" / "ssd" / "implementations"
    notes.append(write_code(runs[0].facts["commit"], implementations / code))
    about = ["\n".join(["```", *result_lines(runs, result, folders=False), "```"]), "\n".join(f"- {note}" for note in notes)]
    if len(runs) < RUNS:
        unofficial = f"Unofficial: {len(runs)} of the {RUNS} runs that MLPerf wants of ssd."
        (org / "UNOFFICIAL.txt").write_text(unofficial + "\n", encoding="utf-8")
        notes, about = [*notes, unofficial], [unofficial, *about]
    write_instructions(implementations / system, code, system, runs, about)
    return notes


def with_identity(log: str, identity: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The log with the values of these keys, every other byte as it was; → also key → what stood there, where that is another value."""
    lines, changed = log.splitlines(keepends=True), {}
    for number, line in enumerate(lines):
        before, token, event = line.partition(TOKEN)
        if not token or (values := json.loads(event))["key"] not in identity or values["value"] == identity[values["key"]]:
            continue
        changed[values["key"]] = values["value"]
        lines[number] = before + token + json.dumps({**values, "value": identity[values["key"]]}) + event[len(event.rstrip()) :]
    return "".join(lines), changed


def check(org: Path, runs: Sequence[Run], description: dict[str, str], system: str, bypass: bool) -> tuple[list[checks.Verdict], float]:
    """All of MLPerf's checkers; → what each says, and the factor of the result."""
    results, division = org / "results" / system / "ssd", description["division"]
    logs = [results / f"result_{place}.txt" for place in range(len(runs))]
    convergence, factor = checks.convergence(results, division, len(runs), runs[0].config.global_batch, bypass)
    return [
        checks.compliance(logs, [run.reached for run in runs]),
        checks.system_description(org / "systems" / f"{system}.json"),
        checks.seeds(logs, division),
        convergence,
        checks.package(org, len(runs), bypass),
    ], factor


def result_lines(runs: Sequence[Run], result: Score, folders: bool = True) -> list[str]:
    lines = []
    for place, run in enumerate(runs):
        dropped = ", dropped: the fastest" if place == result.fastest else ", dropped: the slowest" if place == result.slowest else ""
        reached = f"after epoch {run.epochs}" if run.reached else "target not reached"
        where = f"  {run.folder}" if folders else ""
        lines.append(f"result_{place}.txt  seed {run.config.seed}  {run.minutes:.3f} minutes, {reached}{dropped}{where}")
    mean = "not computed (of fewer than 3 runs)" if result.mean is None else f"{result.mean:.3f} minutes"
    spread = f"median {result.median:.3f}, from {result.least:.3f} to {result.most:.3f}"
    lines.append(f"Olympic mean: {mean}; {spread}, of the runs that reached the target")
    return lines


def verdict_lines(verdicts: Sequence[checks.Verdict], notes: Sequence[str]) -> list[str]:
    word = {True: "passed", False: "FAILED", None: "not run"}
    lines = []
    for verdict in verdicts:
        lines += [f"{verdict.checker}: {word[verdict.passed]}", *(f"  {line}" for line in verdict.lines)]
    return [*lines, *(f"note: {note}" for note in notes)]


def put(made: Path, target: Path) -> str:
    """Puts the finished folder in its place in one move; → a line about it. Raises UserError if another one is there."""
    if target.is_dir() and any(target.iterdir()):
        if same_files(made, target):
            return f"{target} is there already, the same"
        raise UserError(f"{target} exists already with other content; choose another --out, or remove it")
    os.rename(made, target)
    return f"written: {target}"


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) for folder in (one, other)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(one, other, names[0], shallow=False)[1:])
