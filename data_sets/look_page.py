"""The page of ``python -m base data``: its tables as charts, and sample images with their boxes."""

import contextlib
from collections.abc import Sequence

import numpy as np
from base.backends.reference.images import BadImage, read_rgb

from data_sets.coco_json import EXAMPLES
from data_sets.coverage import BY_FORCE
from data_sets.survey import Part, class_table, ends, facts_table, fit_table
from pages.html import bar_chart, escape, folded, jpeg, line_key, page, table
from pages.pictures import Box, colour, drawn_over
from pages.text import shown

MOST_SAMPLES = 200
PICTURE_SIDE = 400  # pixels of a sample's longer side
PICTURE_BYTES = 3_500_000  # of all samples together: the page stays below 5 MB
BOXES_DRAWN = 20_000  # on all samples together, the largest of each
NAMES_DRAWN = 25  # on one sample, of its largest boxes
ROWS = 1000  # of the table of classes
BARS = 20  # of the chart of classes
TRIES = 16  # images among which the one with the most new classes is taken


def data_page(name: str, parts: Sequence[Part], image_size: tuple[int, int], about: str, samples: int, seed: int) -> str:
    """The whole page. ``about`` says what “fit” means."""
    first, (head, rows) = parts[0], class_table(parts)
    body = [
        f'<p class="soft">{escape(first.index.annotation_file.parent)}</p>',
        '<h2>What it holds</h2><div class="beside">',
        table(*facts_table(parts)),
        bar_chart(f"Images by their number of boxes, {first.name}", [(name, [n], f"{n:,}") for name, n in by_count(first.boxes_an_image)]),
        "</div><h2>Classes</h2><p>The commonest first. “fit”: the share of boxes that have a fitting default box, see below.</p>",
        f'<div class="beside">{table(head, ends(rows, ROWS))}',
        class_chart(first),
        f'</div><h2>Default boxes</h2><p>{escape(about)}. {escape(BY_FORCE)}</p><div class="beside">',
    ]
    for title, some in list(first.groups(image_size).items())[1:]:
        bars = [(group.name, [group.fit, group.boxes - group.fit], f"{group.boxes:,} boxes, {group.share} fit") for group in some if group.boxes]
        body.append(bar_chart(f"{first.name}, {title}", bars, ["fit", "matched only by force"]))
    body += [f"</div>{table(*fit_table(parts, image_size))}<h2>Not as they should be</h2>", *map(faults_of, parts)]
    if samples:
        shares = (samples - samples // 4, samples // 4)  # of train and val
        figures = [figure for part, share in zip(parts, shares, strict=True) for figure in sample_figures(part, share, samples, seed)]
        few = "" if len(figures) == samples else f" There are no {samples} that can be read and have boxes."
        body += [
            f"<h2>{len(figures)} samples</h2><p>Drawn so that many classes are seen, the rarest too.{few}</p>",
            f'<p class="legend">{line_key("mark", "a default box fits")}{line_key("mark forced", "matched only by force")}</p>',
            f'<div class="pictures">{"".join(figures)}</div>',
        ]
    return page(f"Data set {shown(name, 60)}", "\n".join(body))


def by_count(counts: np.ndarray) -> list[tuple[str, int]]:
    """Images by their number of boxes: 0, 1, then octaves."""
    names, edges = ["none", "1"], [1, 2]
    while edges[-1] <= counts.max():
        names.append(f"{edges[-1]} to {2 * edges[-1] - 1}")
        edges.append(2 * edges[-1])
    return list(zip(names, np.bincount(np.digitize(counts, edges), minlength=len(names)).tolist(), strict=True))


def class_chart(part: Part) -> str:
    """Boxes of the commonest and the rarest classes."""
    counts = part.boxes_a_class
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].tolist()
    some = order if len(order) <= BARS else [*order[: BARS // 2], *order[-BARS // 2 :]]
    title = f"Boxes a class, {part.name}" + ("" if len(order) <= BARS else f": the {BARS // 2} commonest, then the {BARS // 2} rarest")
    return bar_chart(title, [(shown(part.index.category_names[i], 30), [counts[i]], f"{counts[i]:,}") for i in some])


def faults_of(part: Part) -> str:
    """What was dropped or mended in the annotations, and image files that are not as recorded, with examples."""
    found = [
        folded(f"annotations {kind}: {row['count']:,} × {reason}", row["examples"])
        for kind in ("dropped", "mended")
        for reason, row in sorted(part.index.report[kind].items())
    ]
    found += [folded(f"image files: {len(files):,} × {kind}", files[:EXAMPLES]) for kind, files in sorted(part.bad.items())]
    read = f"{part.checked:,} of {len(part.index):,} image files were read."
    names = [name for name, count in zip(part.index.category_names, part.boxes_a_class, strict=True) if not count]
    if names:
        found.append(folded(f"classes without a box: {len(names):,}", [shown(name, 40) for name in names[:ROWS]]))
    return f'<h3>{part.name}</h3><p class="soft">{read}</p>{"".join(found) or "<p>Nothing found.</p>"}'


def sample_figures(part: Part, count: int, all_samples: int, seed: int) -> list[str]:
    """Up to ``count`` images with their boxes drawn: of each class not seen yet, the rarest first, one that shows the most new classes."""
    index, rng = part.index, np.random.default_rng(seed)
    image_of_box = part.image_of_box
    images_of = {label: image_of_box[index.labels == label] for label in np.unique(index.labels).tolist()}  # as often as it has boxes
    figures: dict[int, str] = {}
    seen: set[int] = set()

    def labels(image: int) -> set[int]:
        return set(index.ltrb(image)[1].tolist())

    def take(image: int) -> None:
        with contextlib.suppress(BadImage):  # `look` names those that it read
            figures[image] = figure_of(part, image, all_samples)
            seen.update(labels(image))

    for label in sorted(images_of, key=lambda label: len(images_of[label])):
        if label not in seen and len(figures) < count:
            some = rng.choice(images_of[label], TRIES).tolist()
            take(max(some, key=lambda image: len(labels(image) - seen)))
    for image in rng.permutation(np.flatnonzero(part.boxes_an_image)).tolist():
        if len(figures) == count:
            break
        if image not in figures:
            take(image)
    return list(figures.values())


def figure_of(part: Part, image: int, all_samples: int) -> str:
    """One image with its boxes and their names, drawn over it at every size. Raises BadImage."""
    index, some = part.index, slice(*part.index.first_box[image : image + 2].tolist())
    height, width = index.sizes[image].tolist()
    picture = read_rgb(part.images / index.file_name(image), (height, width))
    address, w, h = jpeg(picture, PICTURE_SIDE, PICTURE_BYTES // all_samples)
    boxes, labels, fit, crowd = part.boxes[some] * (w, h, w, h), index.labels[some], part.fit[some], index.crowd[some]
    order = np.argsort(-(boxes[:, 2:] - boxes[:, :2]).prod(1), kind="stable")[: max(20, BOXES_DRAWN // all_samples)]
    drawn = []
    for place, number in enumerate(order.tolist()):  # the small ones on top
        label = int(labels[number])
        name = shown(index.category_names[label - 1], 24) + " (crowd)" * bool(crowd[number]) if place < NAMES_DRAWN else ""
        drawn.append(Box(boxes[number].tolist(), colour(label), name, "" if fit[number] else "forced"))
    counted = [(shown(index.category_names[label - 1], 40), int((labels == label).sum())) for label in np.unique(labels).tolist()]
    listed = ", ".join(f"{n} {name}" for name, n in counted[:20]) + (f" and {len(counted) - 20} more classes" if len(counted) > 20 else "")
    forced = int((~fit).sum())
    notes = f"{width}×{height}, {part.name}; {listed}" + (f"; {forced} of {len(labels)} boxes matched only by force" if forced else "")
    notes += f"; the {len(order)} largest of {len(labels)} boxes are drawn" if len(order) < len(labels) else ""
    file = shown(index.file_name(image), 80)
    return (
        f"<figure>{drawn_over(address, w, h, f'{part.name} image {file}: {listed}', drawn)}"
        f"<figcaption>{escape(file)}: {escape(notes)}</figcaption></figure>\n"
    )
