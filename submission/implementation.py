"""What a results folder holds beside the results: the code that ran, and how to set up and repeat a run."""

import json
import re
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from base.config import Config
from base.errors import UserError
from submission.runs import Run

ROOT = Path(__file__).resolve().parents[1]
HEAD = '#!/usr/bin/env bash\n# {what}\nset -euo pipefail\nproject=${{PROJECT:-$(cd "$(dirname "$0")/../{code}" && pwd)}}\n'
OF_A_RUN = {"data_dir": '"${DATADIR:?the folder of COCO 2017}"', "seed": '"${SEED:?another one for each run}"', "runs_dir": '"${LOGDIR:-results}"'}
WEIGHTS = ("backbone_path", "checkpoint")  # files of the machine that it ran on


def write_code(commit: str, folder: Path) -> str:
    """The project's files as of ``commit``, or a note on what to put there; → what was done, for people."""
    folder.mkdir(parents=True)
    why = "that is no commit, so it cannot be fetched from git"
    if re.fullmatch("[0-9a-f]{40,64}", commit):
        if archive := _archive(commit):
            done = subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, capture_output=True)
            if done.returncode:
                raise UserError(f"the code cannot be written to {folder}: {done.stderr.decode(errors='replace').strip()}; choose another --out")
            return f"The code is that of commit {commit}."
        why = "this project's folder does not have that commit"
    note = f"The runs were made with the code of commit {commit}. It is not here: {why}. Put it here before submitting.\n"
    (folder / "README.md").write_text(note, encoding="utf-8")
    return f"The code of commit {commit} is not included: {why}. Put it into {folder.parts[-2]}/{folder.name} before submitting."


def _archive(commit: str) -> bytes | None:
    """The project's files as of a commit, as tar; without names that begin with a dot, which MLPerf's repo_checker refuses."""
    try:
        command = ["git", "archive", "--format=tar", commit, "--", ".", ":(exclude,glob)**/.*", ":(exclude,glob)**/.*/**"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True)
    except FileNotFoundError:  # no git
        return None
    return done.stdout if done.returncode == 0 else None


def flags(config: Config) -> list[str]:
    """Every key as words of a shell script, in which data, seed, results and weights are variables of the environment."""
    lines = []
    for key, value in config.model_dump(mode="json").items():
        if key in OF_A_RUN:
            words = OF_A_RUN[key]
        elif key in WEIGHTS and value is not None:
            words = f'"${{{key.upper()}:?the file that the JSON beside this script names}}"'
        elif key != "stages":  # a run in stages has no log of its own, so there are none here
            words = _words(value)
        else:
            continue
        lines.append(f"--{key} {words}".rstrip())
    return lines


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(shlex.quote(f"{slot}={backend}") for slot, backend in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "null" if value is None else shlex.quote(str(value).lower() if isinstance(value, bool) else str(value))


def write_instructions(folder: Path, code: str, system: str, runs: Sequence[Run], about: Sequence[str]) -> None:
    """README.md, the three scripts and the metadata of system and implementation; ``about`` are paragraphs for the README."""
    folder.mkdir(parents=True)
    facts, config = runs[0].facts, runs[0].config
    backend = facts["backend"]
    named = f"--name {shlex.quote(backend)}"
    setup = f'exec python3 "$project/prepare.py" {named} "$@"\n'
    data = f'exec python3 "$project/prepare.py" {named} --data_dir {OF_A_RUN["data_dir"]} --download "$@"\n'
    train = " \\\n    ".join([f'exec bash "$project/run_training.sh" {named}', *flags(config), '"$@"']) + "\n"
    scripts = {
        "setup.sh": ("Installs and builds what the backend needs.", setup),
        "init_datasets.sh": ("Fetches COCO 2017 and the backbone's weights into $DATADIR, and packs the annotations.", data),
        "run_and_time.sh": ("One run, with seed $SEED; the result is the time from run_start to run_stop in its mlperf.log.", train),
    }
    for name, (what, text) in scripts.items():
        (folder / name).write_text(HEAD.format(what=what, code=code) + text, encoding="utf-8")
        (folder / name).chmod(0o755)
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in OF_A_RUN}
    settings |= {key: Path(settings[key]).name for key in WEIGHTS if settings[key] is not None}
    metadata = {"backend": backend, "components": facts["components"], "commit": facts["commit"],
                "seeds": [run.config.seed for run in runs], "configuration": settings}  # fmt: skip
    (folder / f"{system}_{code}.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    variables = ["DATADIR=… ", "SEED=1 ", *(f"{key.upper()}=… " for key in WEIGHTS if getattr(config, key))]
    nodes = "" if config.nodes == 1 else " --node-rank N --rdzv-endpoint HOST:PORT   # on each node"
    steps = f"bash setup.sh\nDATADIR=… bash init_datasets.sh\n{''.join(variables)}bash run_and_time.sh{nodes}"
    text = "\n\n".join([f"# SSD300-ResNet34 on {system}", *about, f"To repeat a run:\n\n```\n{steps}\n```"])
    (folder / "README.md").write_text(text + "\n", encoding="utf-8")
