"""A guard against parts that became slow: ratios of quick work, held to those stored in a file, with wide margins.

Ratios carry over between machines and their moods, seconds do not. Those to the reference depend on the processor's instructions,
those to the ceiling on its memory besides, so they get the wider margin.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from base.errors import UserError
from measuring import parts
from measuring.figures import Figure, Log, aligned, machine

GUARDED = ("matcher", "loss", "decoder", "loader", "step")
MARGINS = {"reference": 0.4, "ceiling": 0.2}  # what is left of a stored ratio at the bound
Ratios = dict[str, dict[str, dict[str, float]]]  # part → figure → "reference" or "ceiling" → ratio


def ratios(log: Log, name: str, wanted: Sequence[str] = GUARDED) -> Ratios:
    """Of a backend's quick figures."""
    found: Ratios = {}
    for part in wanted:
        log(part)
        mine = [figure for figure in getattr(parts, part)(lambda line: None, [name, "reference"], quick=True) if of(figure, name)]
        found[part] = {figure.name: {kind: round(getattr(figure, kind), 4) for kind in MARGINS} for figure in mine}
    return found


def of(figure: Figure, name: str) -> bool:
    return figure.name.split(",")[0] == name


def faults(found: Ratios, stored: Ratios) -> list[tuple[str, str, str, float, float, float]]:
    """(part, figure, kind, ratio, stored ratio, bound) of what fell below its bound."""
    out = []
    for part, figures in found.items():
        for figure, kinds in figures.items():
            for kind, ratio in kinds.items():
                before = stored[part][figure][kind]
                if ratio < MARGINS[kind] * before:
                    out.append((part, figure, kind, ratio, before, MARGINS[kind] * before))
    return out


def shape(found: Ratios) -> dict[str, list[str]]:
    return {part: sorted(figures) for part, figures in found.items()}


def read(file: Path) -> dict:
    """A stored baseline. Raises UserError if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--guard {file} cannot be read ({error.strerror}); python -m base bench --guard {file} --write writes it") from error
    except ValueError as error:
        raise UserError(f"--guard {file} is no JSON: {error}; {renew(file)}") from error
    numbers = [ratio for figures in content.get("ratios", {}).values() for kinds in figures.values() for ratio in kinds.values()]
    if not numbers or not all(isinstance(ratio, float | int) and ratio > 0 for ratio in numbers) or not isinstance(content.get("backend"), str):
        raise UserError(f"--guard {file} has no ratios of a backend; {renew(file)}")
    return content


def renew(file: Path) -> str:
    return f"python -m base bench --guard {file} --write renews it"


def write(file: Path, name: str, found: Ratios) -> None:
    content = {"backend": name, "machine": machine(), "ratios": found}
    try:
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--guard {file} cannot be written ({error.strerror}); name a file in a folder that can be") from error


def guard(log: Log, file: Path) -> int:
    """Exit code 0 if no ratio fell below its bound, 1 if one did, in a second measurement too."""
    content = read(file)
    name, stored = content["backend"], content["ratios"]
    found = ratios(log, name)
    if shape(found) != shape(stored):
        raise UserError(f"--guard {file} has ratios of other figures than are measured now; {renew(file)}")
    fallen = faults(found, stored)
    if fallen:
        again = list(dict.fromkeys(part for part, *_ in fallen))
        log(f"below the bound, so measured once more: {' '.join(again)}")
        fallen = faults(found := found | ratios(log, name, again), stored)
    rows = [("part", "figure", "ratio to", "ratio", "stored", "bound")]
    for part, figures in found.items():
        for figure, kinds in figures.items():
            for kind, ratio in kinds.items():
                before = stored[part][figure][kind]
                rows.append((part, figure, kind, f"{ratio:.3g}", f"{before:.3g}", f"{MARGINS[kind] * before:.3g}"))
    print(aligned(rows))
    for part, figure, kind, ratio, before, bound in fallen:
        print(f"SLOWER: {part}: {figure} / {kind} is {ratio:.3g}, stored {before:.3g}, bound {bound:.3g}")
    if fallen:
        print(f"if the change is meant, {renew(file)}, and the file is part of the change")
    return 1 if fallen else 0
