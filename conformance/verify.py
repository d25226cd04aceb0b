"""``python -m base verify --name B``: every component of a backend against the reference, on fresh inputs and the golden data.

Exit code 0 if everything passed, 1 if anything failed, 2 if it was called wrongly. The checks and their tolerances stand in
`parts` (what works on arrays), `model` (model, step, optimizer), `loaders` and `whole`.
"""

import argparse
import json
import math
import secrets
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from base.backend import ALIASES, SLOTS, Backend, backend_folder, load_backend, nearest
from base.backends import DEFAULT_BACKEND
from base.distributed import device_for
from base.errors import UserError
from base.tools.launch import flag_value
from conformance import loaders, model, parts, whole
from conformance.parts import Kit
from measuring.figures import machine
from measuring.timing import interleaved, ratio

CHECKS = {**parts.CHECKS, **model.CHECKS, **loaders.CHECKS, **whole.CHECKS}  # part → its checks
SPEEDS = {**parts.SPEEDS, **model.SPEEDS, **loaders.SPEEDS}  # part → what makes a timed call for a backend
PARTS = (*SLOTS, "run")  # run: all components together, which is no slot
ROUNDS = 5  # of timed calls, after one of warm-up


@dataclass(frozen=True)
class Row:
    """One check of one component: the worst error and what is tolerated (None: it raised, or was not made; ``note`` says why)."""

    component: str
    check: str
    supplied_by: str
    error: float | None
    tolerance: float | None
    passed: bool | None  # None: not checked
    note: str = ""


def rows_of(kit: Kit, part: str) -> Iterator[Row]:
    """All checks of a component. Whatever it raises is a failure of that check, and the rest goes on."""
    supplier = kit.backend.suppliers.get(part, kit.backend.name)
    for check in CHECKS[part]:
        if check.__name__.endswith("golden") and not parts.GOLDEN:
            continue
        try:
            for name, error, tolerance in check(kit):
                yield Row(part, name, supplier, float(error), float(tolerance), bool(error <= tolerance))  # not a number: not passed
        except parts.NotChecked as why:
            yield Row(part, check.__name__.replace("_", " "), supplier, None, None, None, str(why))
        except Exception as error:  # noqa: BLE001  a component may raise anything
            yield Row(part, check.__name__.replace("_", " "), supplier, None, None, False, reason(error))


def reason(error: Exception) -> str:
    """An error and where it was raised, in a line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({Path(where.filename).name}:{where.lineno})"


def speed(kit: Kit, part: str) -> float | None:
    """How many times as fast as the reference a component is: the median ratio of calls made in turn. None: not measured."""
    if part not in SPEEDS or getattr(kit.backend, part) is getattr(kit.reference, part):
        return None

    def waited(call: Callable) -> Callable:
        return call if kit.device.type == "cpu" else lambda: (call(), torch.accelerator.synchronize())

    own, plain = (waited(SPEEDS[part](kit, backend)) for backend in (kit.backend, kit.reference))
    seconds = interleaved({"own": own, "plain": plain}, ROUNDS)
    return ratio(seconds["plain"], seconds["own"])


def chosen(backend: Backend, only: list[str] | None, everything: bool) -> list[str]:
    """The parts to check: those asked for; else the components that are not the reference's (all, if all of them are), and ``run``."""
    for name in only or ():
        if name not in PARTS and name not in ALIASES:
            raise UserError(f"--only {name!r} is no component{nearest(name, [*ALIASES, *PARTS])}")
    if only:
        return [part for part in PARTS if part in {slot for name in only for slot in ALIASES.get(name, (name,))}]
    reference = load_backend("reference")
    own = [slot for slot in SLOTS if getattr(backend, slot) is not getattr(reference, slot)]
    return [*(SLOTS if everything or not own else own), "run"]


def verdict(row: Row) -> str:
    return " ".join([{True: "pass", False: "FAIL", None: "not checked:"}[row.passed], row.note]).strip()


def figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def table(rows: list[Row], speeds: dict[str, float | None]) -> list[tuple[str, ...]]:
    """The report's cells; a component's speed stands in its first row."""
    cells, seen = [("component", "check", "supplied by", "worst error", "tolerance", "speed / reference", "")], set()
    for row in rows:
        fast = "" if row.component in seen else "not measured" if speeds[row.component] is None else f"{speeds[row.component]:.2f} ×"
        seen.add(row.component)
        cells.append((row.component, row.check, row.supplied_by, figure(row.error), figure(row.tolerance), fast, verdict(row)))
    return cells


def plain(cells: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in cells)


def markdown(cells: list[tuple[str, ...]]) -> str:
    first, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([first, "| " + " | ".join(["---"] * len(cells[0])) + " |", *rest])


def progress(text: str) -> None:
    """What is being done: on a terminal one line that changes."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{text:<70}", end=end, file=sys.stderr, flush=True)


def verify(kit: Kit, wanted: list[str]) -> tuple[list[Row], dict[str, float | None]]:
    """Checks and times the parts, one after the other."""
    rows, speeds = [], {}
    for part in wanted:
        progress(f"{part}: checking")
        for row in rows_of(kit, part):
            rows.append(row)
            progress(f"{part}: {row.check}: {verdict(row)[:60]}")
        progress(f"{part}: timing")
        try:
            speeds[part] = speed(kit, part)
        except Exception as error:  # noqa: BLE001  as above
            speeds[part] = None
            rows.append(Row(part, "timed calls", kit.backend.suppliers[part], None, None, False, reason(error)))
    return rows, speeds


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base verify", description="Hold a backend's components to the reference.")
    parser.add_argument("--name", default=DEFAULT_BACKEND, help="backend (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="torch device type (default: what the backend asks for)")
    parser.add_argument("--use", nargs="*", default=[], metavar="SLOT=BACKEND", help="take components from another backend")
    parser.add_argument("--only", nargs="+", metavar="SLOT", help=f"check only these: {', '.join(PARTS)}")
    parser.add_argument("--all", action="store_true", help="also check what the reference supplies")
    parser.add_argument("--seed", type=int, help="of the random inputs (default: a fresh one, which is printed)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where verify.json and verify.md go (default: runs/verify-NAME)")
    flags = parser.parse_args(arguments)
    use = flag_value("use", flags.use)
    backend = load_backend(flags.name, use)
    wanted = chosen(backend, flags.only, flags.all)
    kind = device_for(backend, flags.device)
    if flags.seed is not None and not 0 <= flags.seed < 1 << 32:
        raise UserError(f"--seed {flags.seed} is not between 0 and {(1 << 32) - 1}")
    seed = secrets.randbelow(1 << 32) if flags.seed is None else flags.seed
    out = flags.out or Path("runs") / f"verify-{flags.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); name another folder") from error
    about = {**machine(), "torch": torch.__version__, "device": kind, "backend": f"{flags.name} in {backend_folder(flags.name)}"}
    about |= {"dtypes": ", ".join(backend.dtypes), "golden data": "tests/golden" if parts.GOLDEN else "not here, so not checked"}
    head = [f"{name}: {value}" for name, value in {**about, "seed": f"{seed} (--seed {seed} repeats the inputs)"}.items()]
    print("\n".join(head), flush=True)
    torch.backends.cudnn.allow_tf32 = False  # else accelerators round float32 products to 10 bits of mantissa, each layout in its own way
    with tempfile.TemporaryDirectory(prefix="ssd-verify-") as scratch:
        kit = Kit(backend, load_backend("reference"), torch.device(kind), seed, Path(scratch), use)
        rows, speeds = verify(kit, wanted)
    progress("")
    cells, (failed, left) = table(rows, speeds), (sum(row.passed is what for row in rows) for what in (False, None))
    end = f"{f'{failed} FAILED' if failed else 'all passed'}{f', {left} not checked' if left else ''}"
    end = f"{len(rows) - left} check{'s' * (len(rows) - left != 1)} of {len(wanted)} part{'s' * (len(wanted) != 1)}: {end}"
    kept = [asdict(row) | {"error": f"{row.error}"} if not math.isfinite(row.error or 0) else asdict(row) for row in rows]  # JSON knows no inf
    content = {"about": about, "seed": seed, "passed": not failed, "speeds": speeds, "rows": kept}
    (out / "verify.json").write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    title = f"# {flags.name}, held to the reference\n"
    (out / "verify.md").write_text("\n".join([title, *(f"- {line}" for line in head), "", markdown(cells), "", end, ""]), encoding="utf-8")
    print(f"\n{plain(cells)}\n\n{end}; {out}/verify.json, {out}/verify.md")
    return 1 if failed else 0
