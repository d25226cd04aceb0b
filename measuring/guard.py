"""A guard against parts that became slow: ratios of quick work, held to those stored in a file, with wide margins.

Ratios carry over between machines and their moods, seconds do not. Those to the reference depend on the processor's instructions,
those to the ceiling on its memory besides, so they get the wider margin.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from base.errors import UserError
from measuring import parts
from measuring.figures import Log, aligned, machine, number

GUARDED = ("matcher", "loss", "decoder", "loader", "step")
MARGINS = {"reference": 0.4, "ceiling": 0.2}  # what is left of a stored ratio at the bound
Ratios = dict[str, dict[str, dict[str, float]]]  # part → figure → "reference" or "ceiling" → ratio


def ratios(log: Log, name: str, wanted: Sequence[str]) -> Ratios:
    """Of a backend's quick figures, with one thread of torch: several of them wait for each other on a busy machine."""
    found: Ratios = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for part in wanted:
            log(part)
            figures = getattr(parts, part)(lambda line: None, [name, "reference"], quick=True)
            mine = [figure for figure in figures if figure.name.split(",")[0] == name]
            found[part] = {figure.name: {kind: round(getattr(figure, kind), 4) for kind in MARGINS} for figure in mine}
    finally:
        torch.set_num_threads(threads)
    return found


@dataclass(frozen=True)
class Held:
    """One ratio beside the stored one."""

    part: str
    figure: str
    kind: str
    ratio: float
    stored: float

    @property
    def bound(self) -> float:
        return MARGINS[self.kind] * self.stored

    @property
    def ok(self) -> bool:
        return self.ratio >= self.bound


def held(found: Ratios, stored: Ratios) -> list[Held]:
    """Every ratio beside its stored one; both have the same parts and figures."""
    return [
        Held(part, figure, kind, ratio, stored[part][figure][kind])
        for part, figures in found.items()
        for figure, kinds in figures.items()
        for kind, ratio in kinds.items()
    ]


def shape(found: Ratios) -> dict[str, dict[str, list[str]]]:
    return {part: {figure: sorted(kinds) for figure, kinds in figures.items()} for part, figures in found.items()}


def read(file: Path) -> dict:
    """A stored baseline. Raises UserError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--guard {file} cannot be read ({error.strerror}); python -m base bench --guard {file} --write writes it") from error
    except ValueError as error:
        raise UserError(f"--guard {file} is no JSON: {error}; {renew(file)}") from error
    try:
        whole = isinstance(content["backend"], str) and all(one.stored > 0 for one in held(content["ratios"], content["ratios"]))
    except (LookupError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"--guard {file} has no ratios of a backend; {renew(file)}")
    return content


def renew(file: Path) -> str:
    return f"python -m base bench --guard {file} --write renews it"


def baseline(log: Log, name: str) -> str:
    """What to store of a backend."""
    return json.dumps({"backend": name, "machine": machine(), "ratios": ratios(log, name, GUARDED)}, indent=1) + "\n"


def guard(log: Log, file: Path) -> int:
    """Exit code 0 if no ratio fell below its bound, 1 if one did; a part with such a ratio is measured twice, and the better counts."""
    content = read(file)
    name, stored = content["backend"], content["ratios"]
    found = ratios(log, name, GUARDED)
    if shape(found) != shape(stored):
        raise UserError(f"--guard {file} has ratios of other figures than are measured now; {renew(file)}")
    rows = held(found, stored)
    if again := list(dict.fromkeys(one.part for one in rows if not one.ok)):
        log(f"below the bound, so measured once more: {' '.join(again)}")
        second = held(ratios(log, name, again), stored)
        better = {(one.part, one.figure, one.kind): one for one in second}
        rows = [max(one, better.get((one.part, one.figure, one.kind), one), key=lambda held: held.ratio) for one in rows]
    cells = [(one.part, one.figure, one.kind, *map(number, (one.ratio, one.stored, one.bound)), "ok" if one.ok else "SLOWER") for one in rows]
    print(aligned([("part", "figure", "ratio to", "now", "stored", "bound", ""), *cells]))
    fallen = [one for one in rows if not one.ok]
    for one in fallen:
        numbers = f"{number(one.ratio)}, stored {number(one.stored)}, bound {number(one.bound)}"
        print(f"SLOWER: {one.part}: {one.figure} / {one.kind} is {numbers}")
    if fallen:
        print(f"if the change is meant, {renew(file)}; commit the file with it")
    return 1 if fallen else 0
