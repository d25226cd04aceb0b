"""``python -m base config --name B --config C``: the resolved configuration and where each value comes from."""

import os
import shlex
from pathlib import Path
from typing import Any

from base.config import Config, with_layout
from base.errors import UserError
from base.tools.launch import DEFAULT_CONFIG, fresh, parse

TRIALS = 5  # of a benchmark, as MLPerf asks for; $NEXP sets another number


def main(arguments: list[str]) -> int:
    """Prints YAML with sources, or with ``--shell`` export lines for job scripts. All flags of run_training.sh work."""
    shell = "--shell" in arguments
    command = "python -m base config [--shell]"
    flags, overrides = parse([argument for argument in arguments if argument != "--shell"], command)
    if flags.resume or flags.list:
        raise UserError("config takes --name, --config and keys; a finished run keeps its own in config.yaml")
    name, resolved = fresh(flags, overrides)
    if resolved.config.data_dir and Path(resolved.config.data_dir).is_dir():
        resolved = with_layout(resolved, lambda line: None)
    if not shell:
        from base.records import config_text  # which needs torch: seconds

        print(config_text(resolved, name), end="")
        return 0
    values = {f"SSD_{key.upper()}": _shell(value) for key, value in resolved.config.model_dump(mode="json").items()}
    for key, value in {**values, **job(name, flags.config or DEFAULT_CONFIG, resolved.config)}.items():
        print(f"export {key}={shlex.quote(value)}")
    return 0


def job(name: str, config_name: str, config: Config) -> dict[str, str]:
    """What run.sub and sbatch want to know, under the names that MLPerf's submissions have for it; WALLTIME (HH:MM:SS) is that of all trials."""
    given = os.environ.get("NEXP") or str(TRIALS)
    if not given.isdecimal() or not int(given):
        raise UserError(f"NEXP is {given!r}: a number of trials from 1 on")
    hours, minutes = divmod(config.walltime * int(given), 60)
    return {
        "NAME": name,
        "DGXSYSTEM": config_name,
        "DGXNNODES": str(config.nodes),
        "DGXNGPU": str(config.devices),
        "NEXP": given,
        "WALLTIME": f"{hours:02}:{minutes:02}:00",
    }


def _shell(value: Any) -> str:
    """A value as its flag takes it: null is empty, lists and mappings are words."""
    if isinstance(value, dict):
        value = [f"{slot}={backend}" for slot, backend in value.items()]
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
