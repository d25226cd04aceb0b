"""``python -m base config --name B --config C``: the resolved configuration and where each value comes from."""

import shlex
from pathlib import Path
from typing import Any

from base.config import with_layout
from base.errors import UserError
from base.records import config_text
from base.tools.launch import fresh, parse


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
        print(config_text(resolved, name), end="")
        return 0
    for key, value in resolved.config.model_dump(mode="json").items():
        print(f"export SSD_{key.upper()}={shlex.quote(_shell(value))}")
    return 0


def _shell(value: Any) -> str:
    """A value as its flag takes it: null is empty, lists and mappings are words."""
    if isinstance(value, dict):
        value = [f"{slot}={backend}" for slot, backend in value.items()]
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
