"""Backends: folders found by name, each with a ``backend.py`` that defines ``BACKEND``.

Design after tinygrad's ``device.py`` (a backend is a file found by its name) and torchtitan's ``train_spec.py`` (a frozen
record of callables).
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType

from base import contracts
from base.backends import backend_folder, list_backends, nearest
from base.errors import UserError
from base.telemetry import MakeSensor

__all__ = ["Backend", "backend_folder", "list_backends", "load_backend", "nearest"]

CONTRACTS = {
    "train_loader": contracts.MakeTrainLoader,
    "eval_loader": contracts.MakeEvalLoader,
    "model": contracts.MakeModel,
    "matcher": contracts.Matcher,
    "loss": contracts.Loss,
    "step": contracts.MakeStep,
    "optimizer": contracts.MakeOptimizer,
    "decoder": contracts.Decoder,
    "evaluator": contracts.MakeEvaluator,
}
SLOTS = tuple(CONTRACTS)
DTYPES = ("float32", "bfloat16", "float16")
ALIASES = {"loader": ("train_loader", "eval_loader")}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one folder brings. A slot left out comes from the backend that it ``extends``.

    ``device`` is a torch device type, or ``auto``: the machine's accelerator if it has one, else the CPU.
    ``distributed`` is a torch.distributed backend, or ``auto``: the one that torch has for the device.
    ``cards`` is what the devices' names begin with, as a regular expression: for device types that several vendors' torch builds share.
    ``telemetry`` reads a device's power and memory. Both are also those of the backend that it extends, if that has the same device type.
    ``dtypes`` are those of predictions that its loss and decoder take; `verify` checks each.
    The folder's ``requirements.txt`` and ``build.py``, if there, are what ``prepare.py`` installs and builds.
    """

    name: str
    device: str = "auto"
    distributed: str = "auto"
    extends: str | None = "reference"
    cards: str | None = None
    telemetry: MakeSensor | None = None
    dtypes: tuple[str, ...] = ("float32",)
    train_loader: Callable[..., contracts.Loader] | None = None
    eval_loader: Callable[..., contracts.Loader] | None = None
    model: Callable | None = None
    matcher: Callable[..., contracts.Targets] | None = None
    loss: Callable | None = None
    step: Callable[..., contracts.Step] | None = None
    optimizer: Callable | None = None
    decoder: Callable[..., list[contracts.Detections]] | None = None
    evaluator: Callable[..., contracts.Evaluator] | None = None
    suppliers: Mapping[str, str] = field(default_factory=dict, repr=False)  # slot → backend; filled in by load_backend


def load_backend(name: str, use: Mapping[str, str] | None = None) -> Backend:
    """The backend ``name`` with every slot filled, and ``suppliers`` saying from which folder: the one whose code defines it.

    ``use`` swaps single slots, such as ``{"loss": "reference"}``; ``loader`` stands for both loaders.
    Raises UserError if a folder is missing or broken, naming file, line and fix.
    """
    own = _record(name, ())
    for slot, supplier in _spread(use or {}).items():
        other = _record(supplier, ())
        own = replace(own, **{slot: getattr(other, slot)}, suppliers={**own.suppliers, slot: other.suppliers[slot]})
    return replace(own, suppliers=MappingProxyType(dict(own.suppliers)))


def _spread(use: Mapping[str, str]) -> dict[str, str]:
    spread = {}
    for slot, supplier in use.items():
        if slot not in SLOTS and slot not in ALIASES:
            raise UserError(f"no component is called {slot!r}{nearest(slot, [*ALIASES, *SLOTS])}")
        spread.update(dict.fromkeys(ALIASES.get(slot, (slot,)), supplier))
    return spread


def _record(name: str, children: tuple[str, ...]) -> Backend:
    """``BACKEND`` of the folder, its empty slots filled from what it extends."""
    if name in children:
        ring = " → ".join((*children, name))
        where = _line_at(backend_folder(children[-1]), "extends")
        raise UserError(f"{where}: backends extend each other in a ring: {ring}; let one of them extend 'reference'")
    try:
        folder = backend_folder(name)
    except UserError as error:
        raise UserError(f"{_line_at(backend_folder(children[-1]), 'extends')}: {error}" if children else str(error)) from error
    own = _import(name, folder)
    if not isinstance(own, Backend) or own.name != name:
        has = f"the name {own.name!r}" if isinstance(own, Backend) else "none" if own is None else repr(own)
        where = _line_at(folder, "name")
        raise UserError(f"{where}: the file must define BACKEND = Backend(name={name!r}, …), as its folder is called, and has {has}")
    kinds = {"device": str, "distributed": str, "extends": str | None, "cards": str | None}
    if wrong := [key for key, kind in kinds.items() if not isinstance(getattr(own, key), kind)]:
        raise UserError(f"{_line_at(folder, wrong[0])}: {wrong[0]}={getattr(own, wrong[0])!r} must be a name, in quotes")
    if own.telemetry is not None and not callable(own.telemetry):
        raise UserError(f"{_line_at(folder, 'telemetry')}: telemetry={own.telemetry!r} cannot be called; state what makes a sensor")
    try:
        re.compile(own.cards or "")
    except re.error as error:
        raise UserError(f"{_line_at(folder, 'cards')}: cards={own.cards!r} is no regular expression: {error}") from error
    if not isinstance(own.dtypes, tuple) or not own.dtypes or not set(own.dtypes) <= set(DTYPES):
        raise UserError(f"{_line_at(folder, 'dtypes')}: dtypes={own.dtypes!r} must be a tuple of some of {', '.join(DTYPES)}")
    mine = {slot: getattr(own, slot) for slot in SLOTS if getattr(own, slot) is not None}
    for slot, component in mine.items():
        _check_signature(folder, slot, component)
    suppliers = {slot: _supplier(name, component) for slot, component in mine.items()}
    if own.extends is None:
        if missing := [slot for slot in SLOTS if slot not in mine]:
            where = _line_at(folder, "extends")
            raise UserError(f"{where}: backend {name!r} extends nothing and lacks {', '.join(missing)}; add them or extends='reference'")
        return replace(own, suppliers=suppliers)
    parent = _record(own.extends, (*children, name))
    merged = {slot: mine.get(slot, getattr(parent, slot)) for slot in SLOTS}
    if parent.device == own.device:
        merged |= {"cards": own.cards or parent.cards, "telemetry": own.telemetry or parent.telemetry}
    return replace(own, **merged, suppliers={**parent.suppliers, **suppliers})


def _supplier(name: str, component: Callable) -> str:
    """The folder that defines a component which backend ``name`` states; its own, if none does, as of a partial or of what it wraps."""
    module = str(getattr(component, "__module__", ""))
    folder = re.fullmatch(r"base\.backends\.(\w+)\..+", module)
    defined = getattr(sys.modules.get(module), getattr(component, "__name__", ""), None) is component
    return folder[1] if folder and defined else name


def _import(name: str, folder: Path):
    mend = f"; python3 prepare.py --name {name} builds its extensions" if (folder / "build.py").exists() else "; mend that line"
    try:
        return getattr(importlib.import_module(f"base.backends.{name}.backend"), "BACKEND", None)
    except ModuleNotFoundError as error:
        where = _line_in(folder, error)
        if error.name and error.name.partition(".")[0] == "base":
            raise UserError(f"{where}: there is no module {error.name}{mend}") from error
        raise UserError(
            f"{where}: backend {name!r} needs the package {error.name!r}, which is not installed: python3 prepare.py --name {name} "
            f"installs what {folder}/requirements.txt lists"
        ) from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a folder's code may raise anything; the line says where
        why = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}".removesuffix(": ")
        if field_name := re.search(r"Backend.__init__\(\) got an unexpected keyword argument '(\w+)'", why):
            mend = nearest(field_name[1], [f.name for f in fields(Backend) if f.name != "suppliers"])
        raise UserError(f"{_line_in(folder, error)}: backend {name!r} cannot be imported: {why}{mend}") from error


def _line_in(folder: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(folder)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else f"{folder}/backend.py"


def _line_at(folder: Path, key: str) -> str:
    """file:line of ``key=`` in the record that a backend.py states; of the record, or of the file's start, if it is not there."""
    path = folder / "backend.py"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    record = next((number for number, line in enumerate(lines) if line.startswith("BACKEND")), 0)
    stated = (number for number, line in enumerate(lines[record:], record) if re.search(rf"\b{key}\s*=", line))
    return f"{path}:{next(stated, record) + 1}"


def _check_signature(folder: Path, slot: str, component: Callable) -> None:
    """Refuses a component that cannot be called as the contract says, before a run starts."""
    if not callable(component):
        where = _line_at(folder, slot)
        raise UserError(f"{where}: component {slot!r} is {component!r}, which cannot be called; state a function, or leave it out")
    wanted = list(inspect.signature(CONTRACTS[slot].__call__).parameters.values())[1:]  # without self
    positional = [p.name for p in wanted if p.kind is not p.KEYWORD_ONLY and p.default is p.empty]
    keywords = [p.name for p in wanted if p.name not in positional]
    ordered = [p.name for p in wanted if p.kind is not p.KEYWORD_ONLY]  # may also be given without their names
    try:
        signature = inspect.signature(component)
    except (ValueError, TypeError):  # of a native function: it cannot be known
        return
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
        signature.bind(*ordered, **dict.fromkeys(set(keywords) - set(ordered)))
    except TypeError as error:
        form = ", ".join([*positional, *(f"{k}=…" for k in keywords)])
        code = getattr(inspect.unwrap(component), "__code__", None)
        where = f"{code.co_filename}:{code.co_firstlineno}" if code else _line_at(folder, slot)
        call = f"{slot}({form}), as base/contracts.py says"
        raise UserError(f"{where}: component {slot!r}{signature} cannot be called as {call}: {error}") from error
