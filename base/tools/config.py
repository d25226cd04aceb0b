"""``python -m base config --name B --config C``: the resolved configuration and where each value comes from."""

import shlex

from base.errors import UserError
from base.launch import fresh, parse
from base.records import config_text


def main(arguments: list[str]) -> int:
    """Prints YAML with sources, or with ``--shell`` export lines for job scripts. All flags of run_training.sh work."""
    shell = "--shell" in arguments
    flags, overrides = parse([argument for argument in arguments if argument != "--shell"])
    if flags.resume or flags.list:
        raise UserError("config takes --name, --config and keys; a finished run keeps its own in config.yaml")
    flags.dry_run = True
    name, resolved = fresh(flags, {"data_dir": "", **overrides})
    if not shell:
        print(config_text(resolved, name), end="")
        return 0
    for key, value in resolved.config.model_dump(mode="json").items():
        text = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
        print(f"export SSD_{key.upper()}={shlex.quote(text)}")
    return 0
