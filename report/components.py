"""Who supplied each component of a run, and what `verify` found of it."""

import json
from pathlib import Path
from typing import Any

from base.backend import SLOTS
from pages.html import escape, table
from pages.text import shown
from report.folder import RunFolder

NOT_VERIFIED = "not verified"
PARTS = (*SLOTS, "run")  # as verify has them: with all components together at the end


def found_verify(run: RunFolder) -> tuple[Path | None, dict | None, str]:
    """The verify.json of the run's backend, beside the run or in runs/: its file, its content, and what is wrong with it."""
    if not run.backend or Path(run.backend).name != run.backend:
        return None, None, "the backend is not known"
    around = [*run.folder.resolve().parents[:2], Path("runs")]  # a stage lies one deeper
    places = [runs / f"verify-{run.backend}" / "verify.json" for runs in around]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None, None, f"there is no {places[0]}; python -m base verify --name {run.backend} writes one into runs/"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return file, None, f"{file} cannot be read: {error}"
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return file, None, f"{file} is not as verify writes it"
    return file, content, ""


def verdict(slot: str, supplier: str | None, rows: list[dict]) -> str:
    """What the checks of a slot came to, if they were of the component that the run had."""
    own = [row for row in rows if row.get("component") == slot]
    if supplier is not None and (others := {str(row.get("supplied_by")) for row in own} - {supplier}):
        return f"{NOT_VERIFIED} (it is of {', '.join(sorted(shown(other, 40) for other in others))}'s)"
    done = [row for row in own if row.get("passed") is not None]
    failed = [row for row in done if row["passed"] is not True]
    if failed:
        return f"FAILED {len(failed)} of {len(done)} checks: {shown(failed[0].get('check'), 60)}"
    left = f", {len(own) - len(done)} not checked" if len(done) < len(own) else ""
    if done:
        return f"passed {len(done)} checks{left}"
    return "the reference itself" if supplier == "reference" else f"{NOT_VERIFIED}{left}"


def component_section(run: RunFolder) -> str:
    """A table of the components with verify's verdict, and where that is from."""
    file, content, why = found_verify(run)
    rows = content["rows"] if content else []
    speeds: Any = content.get("speeds") if content else None
    suppliers = run.facts.get("components")
    suppliers = {slot: str(name) for slot, name in suppliers.items()} if isinstance(suppliers, dict) else {}
    cells = []
    for slot in PARTS:
        supplier = suppliers.get(slot)
        speed = speeds.get(slot) if isinstance(speeds, dict) else None
        fast = f"{speed:.2f} ×" if isinstance(speed, (int, float)) else "not measured"
        named = supplier if supplier is not None else "all of them together" if slot == "run" else "not known"
        cells.append((slot, named, verdict(slot, None if slot == "run" else supplier, rows), fast))
    about = content.get("about") if content else None
    told = f"<p>{escape(f'Verified: no; {why}')}.</p>" if content is None else f"<p>{escape(f'The verdicts are those of {file}')}.</p>"
    if isinstance(about, dict):
        words = ", ".join(f"{name} {shown(about[name], 80)}" for name in ("commit", "device", "cpu", "torch") if about.get(name))
        commit = run.facts.get("commit", "not known")
        told += f'<p class="soft">{escape(f"verify ran with: {words}; the run was of commit {commit}")}</p>'
    return told + table(["component", "supplied by", "verify", "speed / reference"], cells, words=True)
