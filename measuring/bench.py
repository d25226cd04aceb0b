"""``python -m base bench``: what the parts of the benchmark cost on this machine, beside each other and beside its limits.

Without --part, the components one after the other: loader, matcher, loss, decoder, evaluator, step, train. Each figure has its
ratio to the backend ``reference`` and to a ceiling of the machine, measured in the same rounds. docs/measuring.md explains them.

Exit code 0 when every bound is kept, 1 when one is missed. A part is a function of `measuring.parts`, or a module with ``PART`` (what
it times and where the clock starts and stops) and ``measure(log, names of backends) -> list[Figure]``.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from base.backends import DEFAULT_BACKEND
from base.errors import UserError
from measuring.figures import Figure, machine, table

COMPONENTS = ("loader", "matcher", "loss", "decoder", "evaluator", "step", "train")  # functions of measuring.parts
MODULES = ("index", "predict", "large_image")  # parts with a module of their own
GROWTH = Path("runs/growth")
QUICK = "QUICK: fewer rounds, smaller work, no peers and no bounds; not to be compared with full figures"


def log(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def chosen(part: str, names: list[str] | None, quick: bool) -> tuple[str, Callable[[], list[Figure]]]:
    """What a part times, and what measures it; only its module is imported."""
    if part in MODULES:
        if quick:
            raise UserError(f"--quick knows no smaller {part}; it is for {', '.join(COMPONENTS)}")
        module = importlib.import_module(f"measuring.{part}")
        return module.PART, lambda: module.measure(log, names or [DEFAULT_BACKEND])
    function = getattr(importlib.import_module("measuring.parts"), part)
    return f"{part}: {' '.join(function.__doc__.split())}", lambda: function(log, names or on_the_cpu(), quick)


def on_the_cpu() -> list[str]:
    """The backends whose components run on the CPU."""
    from base.backend import list_backends, load_backend

    return [name for name in list_backends() if load_backend(name).device in ("auto", "cpu")]


def rates(quick: bool) -> list[Figure]:
    """The machine's own."""
    from measuring.ceilings import machine_rates
    from measuring.parts import LEAST
    from measuring.work import WORKERS, Photographs

    with tempfile.TemporaryDirectory(prefix="ssd-bench-") as folder:
        return machine_rates(Photographs(Path(folder), 16 if quick else 64).files, WORKERS, 3 if quick else 7, LEAST)


def written(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); name another place") from error


def side_by_side(options: argparse.Namespace, about: dict[str, str]) -> int:
    """Measures the parts, a table for each as soon as it is there."""
    parts = options.part or COMPONENTS
    measures = {part: chosen(part, options.name, options.quick) for part in parts}
    content, figures = {"quick": options.quick, "machine": about, "rates": [], "parts": []}, []
    if any(part in COMPONENTS for part in parts):
        log("the machine's rates")
        own = rates(options.quick)
        content["rates"] = [asdict(figure) for figure in own]
        print(f"\nthe machine's rates\n{table(own)}", flush=True)
    for number, (part, (boundaries, measure)) in enumerate(measures.items(), 1):
        print(f"\n{boundaries}\n", flush=True)
        began = time.monotonic()
        log(f"{part}, {number} of {len(measures)}")
        found = measure()
        log(f"{part} took {time.monotonic() - began:.0f} s")
        print(table(found), flush=True)
        figures += found
        content["parts"].append({"part": part, "boundaries": boundaries, "figures": [{**asdict(f), "ok": f.ok} for f in found]})
        if options.json:
            written(options.json, json.dumps(content, indent=1) + "\n")
    return 0 if all(figure.ok for figure in figures) else 1


def growth(options: argparse.Namespace, about: dict[str, str]) -> int:
    """Measures how costs grow: a table, a page, and JSON."""
    from measuring.growth import AXES, measure
    from measuring.growth_page import growth_page, text

    able = list(dict.fromkeys(axis.part for axis in AXES))
    if unknown := [part for part in options.part or () if part not in able]:
        raise UserError(f"--growth knows no sizes of {unknown[0]}; it is for {', '.join(able)}")
    found = list(measure(log, options.name or on_the_cpu(), options.part or able, options.quick))
    print("\n" + text(found))
    folder = options.out or GROWTH
    page, data = folder / "index.html", options.json or folder / "growth.json"
    fits = [asdict(one) | {"fits": {name: asdict(fit) for name, fit in one.fits().items()}} for one in found]
    written(page, growth_page(found, about, options.quick))
    written(data, json.dumps({"quick": options.quick, "machine": about, "growth": fits}, indent=1) + "\n")
    print(f"page: {page}, figures: {data}")
    return 0


def guarded(options: argparse.Namespace) -> int:
    from measuring import guard

    if options.write:
        name, *others = options.name or [DEFAULT_BACKEND]
        if others or name == "reference":
            raise UserError(f"--guard holds one backend to the reference, not {' '.join(options.name)}; name that one")
        written(options.guard, guard.baseline(log, name))
        print(f"written: {options.guard}")
        return 0
    return guard.guard(log, options.guard)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=(*COMPONENTS, *MODULES), nargs="+", help="what to measure (default: all components)")
    who = "backends to compare (default: components of all that run on the CPU, else the default backend)"
    parser.add_argument("--name", nargs="+", metavar="BACKEND", default=None, help=who)
    parser.add_argument("--quick", action="store_true", help="smaller work and fewer rounds, to see that all works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    parser.add_argument("--growth", action="store_true", help="measure how the parts' costs grow, as a page too")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"of --growth's page (default: {GROWTH})")
    parser.add_argument("--guard", type=Path, metavar="FILE", help="hold the default work's ratios to those stored in FILE")
    parser.add_argument("--write", action="store_true", help="with --guard: store the ratios of now")
    options = parser.parse_args(arguments)
    if options.guard and (options.growth or options.part or options.json or options.quick or options.out or (options.name and not options.write)):
        raise UserError("--guard measures its own parts of the backend in its file; leave --part, --name, --growth, --out, --quick and --json out")
    if options.out and not options.growth:
        raise UserError("--out says nothing without --growth; --json FILE takes the figures")
    if options.write and not options.guard:
        raise UserError("--write says nothing without --guard FILE")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in training (base.tools.launch); torch is not loaded yet
    if options.guard:
        return guarded(options)
    about = machine()
    print("\n".join(f"{name:7} {value}" for name, value in about.items()) + (f"\n{QUICK}" if options.quick else ""), flush=True)
    return growth(options, about) if options.growth else side_by_side(options, about)
