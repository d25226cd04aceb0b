"""Starting a run: ``bash run_training.sh …`` = ``python -m base train …``.

Everything that can be found wrong without training is found here, before anything is loaded; then torchrun starts one
process a device.
"""

import argparse
import difflib
import json
import shlex
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from base.backends import DEFAULT_BACKEND, backend_folder, list_backends
from base.config import RECIPES, Config, Resolved, list_configs, meanings, parse_value, read_run, resolve, validate, with_layout
from base.errors import UserError
from base.tools import preflight
from base.tools.finished import write_report
from base.tools.supervise import supervise
from data_sets.index import AnnotationIndex
from data_sets.layout import LOOKED_FOR
from formats import tensorboard

ROOT = Path(__file__).resolve().parents[2]
DEMO_DATA = ROOT / "data" / "demo"
DEFAULT_CONFIG = "demo"
ALIASES = {"nproc": "devices", "nproc_per_node": "devices", "nnodes": "nodes", "pretrained_backbone": "backbone_path"}
# What may change when a run is resumed: nothing that alters the training so far.
RESUMABLE = {
    "workers", "epochs", "max_steps", "target", "log_every", "checkpoint_every", "keep_checkpoints", "data_dir", "timeout", "device",
    "bind_cores", "telemetry_seconds", "walltime", "max_restarts", "trials", "tensorboard", "report",
}  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; --help lists the flags")


def parser(command: str = "bash run_training.sh") -> argparse.ArgumentParser:
    """Flags of a run; every key of the configuration is a flag too, with _ or -."""
    result = _Parser(
        prog=command,
        usage=f"{command} [--name BACKEND] [--config CONFIG] [--data_dir DIR] [--backbone_path FILE] [--KEY VALUE …]",
        allow_abbrev=False,
    )
    result.add_argument("--name", default=None, help=f"backend (default {DEFAULT_BACKEND})")
    result.add_argument("--config", default=None, help=f"configuration of the backend (default {DEFAULT_CONFIG})")
    result.add_argument("--resume", metavar="RUN", default=None, help="go on with the run in this folder")
    result.add_argument("--run_name", default=None, help="name of the run's folder (default: time, backend, configuration)")
    result.add_argument("--save_path", metavar="RUN", default=None, help="the run's folder: --runs_dir and --run_name in one")
    result.add_argument("--sync_bn", action="store_true", help="batch norm over all ranks: --norm_ranks 0")
    result.add_argument("--list", action="store_true", help="show backends and configurations")
    result.add_argument("--dry_run", action="store_true", help="show what would run, and end")
    preflight.add_flags(result)
    config = result.add_argument_group("configuration", "each flag overrides a key of the configuration file: --batch_size 16, --decay-epochs 8 10")
    meaning = meanings()
    for key, field in Config.model_fields.items():
        names = [f"--{key}", *(f"--{alias}" for alias, name in ALIASES.items() if name == key)]
        kind: dict[str, Any] = {"nargs": None}
        if field.annotation is bool:
            kind = {"nargs": "?", "const": "true"}
        elif typing.get_origin(field.annotation) in (tuple, dict):
            kind = {"nargs": "*"}
        default = "null" if field.default is None else " ".join(map(str, field.default)) if "*" in kind.values() else field.default
        text = f"{meaning.get(key, '')} (default {str(default).lower() or 'none'})".replace("%", "%%")
        config.add_argument(*names, dest=key, default=argparse.SUPPRESS, metavar="V", help=text, **kind)
    return result


def parse(arguments: list[str], command: str = "bash run_training.sh") -> tuple[argparse.Namespace, dict[str, Any]]:
    """→ (flags of the launcher, configuration keys that flags set)."""
    known_flags = parser(command)
    flags, unknown = known_flags.parse_known_args([spelled(argument) for argument in arguments])
    if unknown:
        known = [option for action in known_flags._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=2, cutoff=0.5)
        raise UserError(f"unknown argument {unknown[0]!r}" + (f"; did you mean {' or '.join(close)}?" if close else "; --help lists the flags"))
    overrides = {key: flag_value(key, getattr(flags, key)) for key in Config.model_fields if hasattr(flags, key)}
    if flags.sync_bn:
        overrides["norm_ranks"] = 0
    if flags.save_path:
        overrides["runs_dir"], flags.run_name = str(Path(flags.save_path).parent), Path(flags.save_path).name
    return flags, overrides


def spelled(argument: str) -> str:
    """A flag may be written with - or with _."""
    name, sign, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + sign + value if argument.startswith("--") else argument


def flag_value(key: str, text: str | list[str]) -> Any:
    """A flag's text as the schema's type wants it."""
    annotation = Config.model_fields[key].annotation
    if key == "use":
        pairs = [item.partition("=") for item in text]
        if wrong := [item for item, (slot, _, name) in zip(text, pairs, strict=True) if not (slot and name)]:
            raise UserError(f"--use {wrong[0]!r} is not COMPONENT=BACKEND, such as loader=reference")
        return {slot: name for slot, _, name in pairs}
    if isinstance(text, list):
        values = [parse_value(item) for item in text]
        return values[0] if len(values) == 1 and isinstance(values[0], list) else values  # --image_size=[96, 96]
    texts = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return text if str in texts and text != "null" else parse_value(text)


def main(arguments: list[str]) -> int:
    """Checks, then trains; returns the run's exit code. Raises UserError (exit code 2) for what a person must put right."""
    flags, overrides = parse(arguments)
    if flags.list:
        print(listing())
        return 0
    from torch.distributed.elastic.multiprocessing import SignalException

    if flags.resume:
        name, resolved, folder = resumed(flags, overrides)
    else:
        name, resolved = fresh(flags, overrides)
        label = flags.run_name or (
            flags.rdzv_id if resolved.config.nodes > 1 else time.strftime("%Y-%m-%d_%H%M%S") + f"-{name}-{flags.config or DEFAULT_CONFIG}"
        )
        folder = Path(resolved.config.runs_dir).absolute() / label
    if resolved.config.stages or resolved.config.trials > 1:
        from base.tools.series import train_series

        if not flags.resume:
            check_new(folder)
        return train_series(flags, name, resolved, folder)
    try:
        return start(flags, name, resolved, folder)
    except SignalException:  # while its report was written
        return 0


def start(flags: argparse.Namespace, name: str, resolved: Resolved, folder: Path, begin: Callable[[], None] = lambda: None, page: bool = True) -> int:
    """Checks one run, on all its nodes, calls ``begin``, trains it and, with ``page`` and as its configuration says, writes its report."""
    nodes = resolved.config.nodes
    preflight.check_flags(flags, nodes)
    try:
        resolved, backend = check(flags, name, resolved, folder)
    except UserError as error:
        if nodes > 1 and not flags.dry_run:
            print(f"this node cannot start ({error}); telling the others", file=sys.stderr, flush=True)
            preflight.meet(flags, nodes, {}, str(error))
        raise
    if flags.dry_run:
        from base.records import config_text

        command = shlex.join(torchrun_arguments(flags, resolved, name, folder, 0))
        print(f"\n{config_text(resolved, name)}\ncommand: torchrun {command}")
        return 0
    if nodes > 1:
        preflight.meet_nodes(flags, name, backend, resolved.config)
    begin()
    code = supervise(lambda attempt: torchrun_arguments(flags, resolved, name, folder, attempt), resolved.config, folder)
    if code == 0 and page and resolved.config.report and not flags.node_rank:
        write_report(folder, first_device(backend, resolved.config))
    return code


def first_device(backend: Any, config: Config) -> str:
    """That of the run's first rank, for what looks at its results."""
    from base.distributed import device_for

    return f"{device_for(backend, config.device)}:{config.device_ids[0]}" if config.device_ids else config.device


def check(flags: argparse.Namespace, name: str, resolved: Resolved, folder: Path) -> tuple[Resolved, Any]:
    """All checks of this machine; draws the demo's data if there is none yet. → the configuration with its data found, and the backend."""
    if not flags.resume:
        check_new(folder)
    draws = resolved.config.data_dir == str(DEMO_DATA) and not DEMO_DATA.exists()
    if not draws:
        resolved = found(resolved)
        check_data(resolved.config)
    backend = check_backend(name, resolved)
    print(components(name, backend, resolved), flush=True)
    if flags.dry_run:
        return resolved, backend
    if draws:
        from data_sets.demo_data import main as draw

        draw(["--data_dir", str(DEMO_DATA)])
        check_data(resolved.config)
    check_folder(folder)
    return resolved, backend


def fresh(flags: argparse.Namespace, overrides: dict[str, Any]) -> tuple[str, Resolved]:
    """Backend and configuration of a new run; the demo has its own data if none is named."""
    name, config_name = flags.name or DEFAULT_BACKEND, flags.config or DEFAULT_CONFIG
    if isinstance(ids := overrides.get("device_ids"), list):
        overrides = {"devices": len(ids), **overrides}
    resolved = resolve(backend_folder(name), config_name, overrides)
    if resolved.config.data_dir is None and config_name == DEFAULT_CONFIG:
        config = resolved.config.model_copy(update={"data_dir": str(DEMO_DATA)})
        resolved = Resolved(config, {**resolved.sources, "data_dir": "the demo's own"})
    return name, resolved


def resumed(flags: argparse.Namespace, overrides: dict[str, Any]) -> tuple[str, Resolved, Path]:
    """Backend and configuration of a run to go on with: as they were, but for what does not alter its training."""
    folder = Path(flags.resume).absolute()
    for file in ("config.yaml", "environment.json"):
        if not (folder / file).is_file():
            hint = "one whose run ended before it had begun can be removed"
            raise UserError(f"{folder} is no run folder: it has no {file}; --resume takes the folder that a run printed; {hint}")
    try:
        name = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["backend"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'environment.json'} does not name the run's backend ({error!r}); start a new run") from error
    stored = read_run(folder / "config.yaml")
    if flags.config or flags.run_name or flags.name not in (None, name):
        raise UserError(f"{folder} keeps its backend ({name}), configuration and name; leave out --name, --config and --run_name")
    values = stored.model_dump(mode="json")
    if fixed := [key for key, value in overrides.items() if key not in RESUMABLE and value != values[key]]:
        raise UserError(f"--{fixed[0]} cannot change when a run is resumed; what can: {', '.join(sorted(RESUMABLE))}")
    values |= overrides
    sources = {**dict.fromkeys(values, f"--resume {folder}"), **{key: f"--{key}" for key in overrides}}
    config = validate(values, sources)
    if (config.trials > 1) != (stored.trials > 1):
        raise UserError(f"--trials {config.trials}: {folder} is {'a folder of trials' if stored.trials > 1 else 'one run'} and stays so")
    return name, Resolved(config, sources), folder


def found(resolved: Resolved) -> Resolved:
    """The configuration with the four paths as they lie in the data folder."""
    if not resolved.config.data_dir:
        raise UserError(f"--data_dir is missing: a folder with {LOOKED_FOR}; prepare.py --download fetches COCO 2017")
    return with_layout(resolved, print)


def check_data(config: Config) -> None:
    """The annotations are packed and readable, and the images are where they should be."""
    for kind in ("train", "val"):
        index, images = AnnotationIndex.open(config.path(f"{kind}_annotations"), log=print), config.path(f"{kind}_images")
        if not len(index):
            raise UserError(f"{config.path(f'{kind}_annotations')} lists no images")
        if not any((images / index.file_name(number)).is_file() for number in range(min(100, len(index)))):
            raise UserError(
                f"{images} holds none of the first images of {config.path(f'{kind}_annotations')}, such as {index.file_name(0)}"
            )


def check_backend(name: str, resolved: Resolved):
    """Loads the backend, counts devices, builds the model and reads the backbone file into it: all that can fail early."""
    from base.backend import load_backend
    from base.checkpoint import carry_over, found_in
    from base.distributed import device_for, devices_here
    from base.weights import load_backbone

    config = resolved.config
    backend = load_backend(name, config.use)
    wanted = config.device if config.device != "auto" else backend.device
    kind = device_for(backend, config.device)
    here = devices_here(kind)
    by_flag = resolved.sources.get("devices", "").startswith("--")
    if kind == "cpu" and wanted == "auto" and config.devices > 1 and not by_flag:
        here = 1  # a configuration for several accelerators does not turn into as many CPU processes unasked
    if here is not None and here < config.devices:
        what = f"{here} {kind} device{'s' * (here != 1)}" if kind != "cpu" else "no accelerator"
        raise UserError(
            f"the configuration wants {config.devices} device{'s' * (config.devices != 1)} a node and this machine has {what}; "
            "choose a configuration that fits (--list), pass --nproc N, or --device cpu --nproc N for N processes on the CPU"
        )
    if here is not None and max(config.device_ids, default=0) >= here:
        raise UserError(f"device_ids {list(config.device_ids)}: this machine has {here} {kind} devices, 0…{here - 1}")
    if config.tensorboard:
        tensorboard.check()
    if config.telemetry_seconds and backend.telemetry:
        check_sensor(backend.telemetry, kind)
    model = backend.model(num_classes=2, image_size=config.image_size, strides=config.strides, backbone=config.backbone)
    if config.backbone_path:
        load_backbone(model, config.backbone_path)
    if config.checkpoint:
        carry_over(model, found_in(config.checkpoint), {})
    return backend


def check_sensor(make, kind: str) -> None:
    """Raises UserError if a sensor needs a package that is not installed. A run goes on without one that fails otherwise, and says so."""
    from torch import device

    try:
        make(device(kind) if kind == "cpu" else device(kind, 0), 0)
    except UserError:
        raise
    except Exception:  # noqa: BLE001 (the ranks' own will tell)
        return


def components(name: str, backend, resolved: Resolved) -> str:
    """Which folder supplies each component, and the run in a line."""
    from base.distributed import device_type

    config = resolved.config
    kind = device_type(config.device if config.device != "auto" else backend.device)
    rows = "\n".join(f"  {slot:<14}{supplier}" for slot, supplier in backend.suppliers.items())
    height, width = config.image_size
    return (
        f"backend {name} on {config.nodes} × {config.devices} {kind}; {config.backbone} at {height}×{width}, global batch {config.global_batch}\n"
        f"component     supplied by\n{rows}"
    )


def check_new(folder: Path) -> None:
    """Raises UserError if something lies where a new run's folder is to be."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"run folder {folder} exists already; go on with it by --resume {folder}, or choose another --run_name")


def check_folder(folder: Path) -> None:
    """Raises UserError if a run's folder cannot be made or written."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(f"run folder {folder}: {place} cannot be written ({error.strerror}); choose another with --runs_dir") from error


def torchrun_arguments(flags: argparse.Namespace, resolved: Resolved, name: str, folder: Path, attempt: int) -> list[str]:
    """torchrun's own arguments, then the rank's. ``attempt`` above 0: the run is started again by itself."""
    config = resolved.config
    given = {
        "config": config.model_dump(mode="json"),
        "sources": dict(resolved.sources),
        "backend": name,
        "folder": str(folder),
        "resume": bool(flags.resume or attempt),
    }
    return [*preflight.torchrun_place(flags, config.nodes, attempt), "--nproc-per-node", str(config.devices), "-m", "base.train", json.dumps(given)]


def listing() -> str:
    """Backends and their configurations."""
    lines = []
    for name in list_backends():
        folder = backend_folder(name)
        lines += [name] + [f"  {config:<28}{first_comment(folder, config)}" for config in list_configs(folder)]
    return "\n".join(lines)


def first_comment(folder: Path, config: str) -> str:
    """The first line of a configuration file, which says what it is."""
    own = folder / "config" / f"{config}.yaml"
    line = (own if own.is_file() else RECIPES / f"{config}.yaml").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    return line.lstrip("# ") if line.startswith("#") else ""
