"""The page of ``python -m base report``: sections of one run, or of several beside each other."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence

from base.clock import WARM_UP
from base.errors import UserError
from pages.charts import Line, line_chart
from pages.html import bar_chart, escape, page, table
from pages.text import shown
from report import compare
from report.batches import batch_section
from report.components import component_section
from report.detected import Detected, class_section, detected, example_section
from report.figures import NOT_MEASURED, PARTS, STRETCH, convergence, figures, parts_of_time, rates, state
from report.folder import RunFolder, flattened, is_number

MEASURED = ("memory_bytes", "joules", "power_watts", "utilisation", "clock_hz")  # of a line of telemetry
LOG_LINES = 80  # the last ones
# Figures that stand at the head
FIRST = ("mAP", "images/s", "images/s, raw", "time to target", "time to target by MLPerf's log", "images per joule", "memory")


class Sections:
    """Sections of a page in their order, for its contents."""

    def __init__(self) -> None:
        self.contents: list[tuple[str, str]] = []
        self.parts: list[str] = []

    def add(self, place: str, title: str, body: str) -> None:
        self.contents.append((place, title))
        self.parts.append(f'<section id="{place}" aria-labelledby="{place}-title"><h2 id="{place}-title">{escape(title)}</h2>{body}</section>')

    def page(self, title: str, head: str) -> str:
        return page(title, head + "\n".join(self.parts), self.contents)


def left_out(why: object) -> str:
    return f"<p>Left out: {escape(why)}</p>"


def one_run(run: RunFolder, flags: argparse.Namespace) -> str:
    """The page of a single run."""
    all_of_it, sections = figures(run), Sections()
    head = f'<p class="soft">{escape(run.folder.resolve())}</p><p>{escape(about(run))}</p><p><strong>{escape(state(run))}</strong></p>'
    order = [*FIRST, *(name for name in all_of_it if name not in FIRST)]
    sections.add("summary", "Summary", table(["figure", "value"], [(name, all_of_it[name].text) for name in order], words=True))
    if run.missing:
        sections.add("missing", "What is missing", f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in run.missing)}</ul>")
    sections.add("curves", "Curves", curve_section(run))
    sections.add("throughput", "Throughput", throughput_section(run))
    sections.add("convergence", "Epochs to target", convergence_section([run], [run.name]))
    sections.add("components", "Components", component_section(run))
    classes, examples = detection_sections(run, flags)
    sections.add("classes", "AP a class", classes)
    sections.add("detections", "Best and worst detections", examples)
    sections.add("batches", "First training batches", pictured(flags, lambda: batch_section(run, flags)))
    sections.add("environment", "Environment", words_table(["what", "value"], flattened(run.facts).items(), "environment.json"))
    rows = ((key, value, run.sources.get(key.partition(".")[0], "not known")) for key, value in flattened(run.values).items())
    sections.add("configuration", "Configuration", words_table(["key", "value", "from"], rows, "config.yaml"))
    sections.add("log", "Log", log_section(run))
    return sections.page(f"Run {shown(run.name, 80)}", head)


def several_runs(runs: Sequence[RunFolder]) -> str:
    """The page of several runs beside each other."""
    names, sections = compare.labels(runs), Sections()
    lines = [f"{name}: {about(run)}; {state(run)} ({run.folder.resolve()})" for name, run in zip(names, runs, strict=True)]
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    head = f"<ul>{listed}</ul><p>{compare.MARK} marks what differs; per cents are the distance from the first run.</p>"
    sections.add("figures", "Figures", compare.figure_table(names, [figures(run) for run in runs]))
    gaps = [f"<li>{escape(f'{name}: {text}')}</li>" for name, run in zip(names, runs, strict=True) for text in run.missing]
    if gaps:
        sections.add("missing", "What is missing", f"<ul>{''.join(gaps)}</ul>")
    sections.add("curves", "Curves", compare.curves(names, runs))
    sections.add("trials", "Repeated trials", compare.trial_charts(runs))
    sections.add("convergence", "Epochs to target", convergence_section(runs, names))
    for place, title, columns in (
        ("configuration", "Configuration", [flattened(run.values) for run in runs]),
        ("environment", "Environment", [flattened(run.facts) for run in runs]),
    ):
        sections.add(place, title, compare.difference_tables(names, columns))
    sections.add("pictures", "Pictures, components, log", left_out("they are on the page of a single run, python -m base report RUN"))
    return sections.page(f"{len(runs)} runs", head)


def about(run: RunFolder) -> str:
    """Backend, devices, model and batch in a line."""
    if run.config is None:
        return f"backend {run.backend or 'not known'}"
    config, device = run.config, run.facts.get("device", run.config.device)
    height, width = config.image_size
    return (
        f"backend {run.backend or 'not known'} on {config.nodes} × {config.devices} {device}; {config.backbone} at {height}×{width}, "
        f"global batch {config.global_batch}, seed {config.seed}"
    )


def curve_section(run: RunFolder) -> str:
    """Loss, learning rate and mAP."""
    train, evaluations, target = run.lines["train"], run.lines["evaluation"], run.values.get("target")
    scores = [Line(name, *compare.columns(evaluations, "epoch", name)) for name in ("AP", "AP50", "AP75")]
    charts = [
        line_chart("Loss, by step", [Line("loss", *compare.columns(train, "step", "loss"))]),
        line_chart("Learning rate, by step", [Line("learning rate", *compare.columns(train, "step", "learning_rate"))], within=[0.0]),
        line_chart("mAP, by epoch", scores, (target, f"target {target}") if is_number(target) else None, within=[0.0]),
    ]
    return f'<div class="beside">{"".join(charts)}</div>'


def throughput_section(run: RunFolder) -> str:
    """Images/s over the run, where the time went, and what the devices drew."""
    parts, steps = parts_of_time(run), rates(run)
    bars = [(name.removeprefix("  of it "), [figure.value], f"{figure.value:,.1f} s") for name, figure in parts if figure.value is not None]
    waits = Line("wait", *compare.columns(run.lines["train"], "step", "data_seconds"))
    waiting = Line(waits.name, waits.x, [1e3 * value for value in waits.y])
    kept = {part: [line for line in run.lines["parts"] if is_number(line.get(f"{part}_seconds"))] for part in PARTS}
    parted = [
        Line(PARTS[part], [line["step"] for line in some], [1e3 * line[f"{part}_seconds"] for line in some]) for part, some in kept.items() if some
    ]
    told = (
        f"Images/s are those of stretches of {STRETCH} steps or more within an epoch, without evaluation and checkpoints. Waiting for data is "
        "that of the first rank before a step; an accelerator may still work on the step before meanwhile. "
        f"The parts of a step are taken on the first rank's device, without waiting for it, and not in the first "
        f"{WARM_UP} steps after a start; a step in one captured graph tells them once between two checkpoints."
    )
    return (
        f'<p>{told}</p><div class="beside">{line_chart("Images/s, by step", [Line("images/s", *steps)], within=[0.0])}'
        f"{line_chart('Waiting for data before a step, ms, by step', [waiting], within=[0.0])}"
        f"{line_chart('Parts of a step, ms, by step', parted, within=[0.0]) if parted else ''}"
        f"<div>{table(['part', 'time'], [(name, figure.text) for name, figure in parts], words=True)}</div>"
        f"{bar_chart('Time by parts', bars) if bars else ''}</div>{telemetry_table(run)}"
    )


def telemetry_table(run: RunFolder) -> str:
    """What the devices drew in each phase: the records of a phase together."""
    rows = []
    for phase in dict.fromkeys(str(line.get("phase")) for line in run.lines["telemetry"]):
        some = [line for line in run.lines["telemetry"] if str(line.get("phase")) == phase]
        known = {name: [line[name] for line in some if is_number(line.get(name))] for name in MEASURED}
        spread = {name: statistics.median(values) if values else None for name, values in known.items()}
        rows.append((
            phase,
            f"{max(known['memory_bytes']) / 2**30:.2f} GiB" if known["memory_bytes"] else NOT_MEASURED,
            f"{sum(known['joules']):,.0f} J" if known["joules"] else NOT_MEASURED,
            f"{spread['power_watts']:,.1f} W" if known["power_watts"] else NOT_MEASURED,
            f"{spread['utilisation']:.0%}" if known["utilisation"] else NOT_MEASURED,
            f"{spread['clock_hz'] / 1e9:.2f} GHz" if known["clock_hz"] else NOT_MEASURED,
        ))  # fmt: skip
    head = ["phase", "most memory", "energy", "power, median", "utilisation, median", "clock, median"]
    return "<h3>Devices</h3>" + (table(head, rows, words=True) if rows else "<p>not measured: there is no telemetry in metrics.jsonl</p>")


def convergence_section(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Epochs to the target beside MLPerf's reference convergence points."""
    head = ["run", "global batch", "epochs to target", "MLPerf's reference points", "here"]
    return table(head, [(name, *convergence(run)) for name, run in zip(names, runs, strict=True)], words=True)


def pictured(flags: argparse.Namespace, make: Callable[[], str]) -> str:
    """A section that needs data, or why it is left out."""
    if not flags.pictures:
        return left_out("--no-pictures")
    try:
        return make()
    except UserError as error:
        return left_out(error)


def detection_sections(run: RunFolder, flags: argparse.Namespace) -> tuple[str, str]:
    """AP a class, and examples, both of one pass over the validation images."""
    found: list[Detected] = []

    def first() -> str:
        found.append(detected(run, flags))
        return class_section(found[0])

    classes = pictured(flags, first)
    return classes, pictured(flags, lambda: example_section(found[0])) if found else classes


def words_table(head: Sequence[str], rows: Iterable[Sequence[str]], file: str) -> str:
    rows = [(first, *(cell or "–" for cell in others)) for first, *others in rows]
    return table(head, rows, words=True) if rows else f"<p>not known: {file} cannot be read</p>"


def log_section(run: RunFolder) -> str:
    """The last lines of log.txt, folded."""
    lines = run.log[-LOG_LINES:]
    if not lines:
        return "<p>There is none.</p>"
    text = "\n".join(escape(shown(line, 500)) for line in lines)
    return (
        f"<details><summary>The last {len(lines)} lines of log.txt</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="log.txt"><pre>{text}</pre></div></details>'
    )
