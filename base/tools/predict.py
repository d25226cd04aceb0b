"""``python -m base predict --checkpoint C IMAGES… --out DIR``: pictures with their detections, and the detections as JSON.

Images are files or folders (searched through). Each is read, resized and decoded as in evaluation, by the backend's own components.
``DIR`` gets a JPEG of each picture with boxes and names, and ``detections.json`` in COCO's results format (boxes left, top, width,
height in pixels of the upright picture; ``image_id`` counts the images, and ``file_name`` says which it is).
"""

import argparse
import colorsys
import json
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from base.backends.reference.images import TURNS, BadImage, orientation, read_rgb
from base.contracts import Detections
from base.errors import UserError
from base.tools.detector import Detector, flags_of_a_detector, open_checkpoint

ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}  # of the files that are taken from a folder
MOST_IN_MEMORY = 64  # pictures that wait to be drawn


def find(given: Sequence[Path]) -> dict[Path, Path]:
    """Image file → where its picture goes within the output folder. Raises UserError if there is none, or two would go to one place."""
    found: dict[Path, Path] = {}
    for path in given:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
            found |= {file.resolve(): file.relative_to(path).with_suffix(".jpg") for file in files}
        elif path.is_file():
            found[path.resolve()] = Path(path.name).with_suffix(".jpg")
        else:
            raise UserError(f"{path} does not exist")
    if not found:
        raise UserError(f"{' '.join(map(str, given))}: no image there ({', '.join(sorted(ENDINGS))})")
    places: dict[Path, Path] = {}
    for file, place in found.items():
        if place in places:
            raise UserError(f"{places[place]} and {file} would both become {place}; give them in two runs, or the folder above them")
        places[place] = file
    return found


def upright_size(file: Path) -> tuple[int, int]:
    """(width, height) of a picture as it is seen, from its head. Raises BadImage."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            return (height, width) if orientation(image) in TURNS and orientation(image) >= 5 else (width, height)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise BadImage(file, "cannot be read as an image") from error


def draw(file: Path, target: Path, boxes: list[list[float]], labels: list[int], scores: list[float], names: list[str]) -> None:
    """Writes the picture with its boxes (ltrb in [0, 1], cut off at its edges), the surest on top."""
    picture = read_rgb(file)
    brush, size = ImageDraw.Draw(picture), picture.size
    font = ImageFont.load_default(max(11, min(size) // 40))
    for box, label, score in reversed(list(zip(boxes, labels, scores, strict=True))):
        left, top, right, bottom = (min(max(value, 0.0), 1.0) * side for value, side in zip(box, (*size, *size), strict=True))
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 0.9))
        brush.rectangle((left, top, max(left, right), max(top, bottom)), outline=(red, green, blue), width=max(2, min(size) // 200))
        text = f"{names[label - 1]} {score:.2f}"
        place = brush.textbbox((left + 2, top), text, font=font)
        brush.rectangle((place[0] - 2, place[1] - 1, place[2] + 2, place[3] + 1), fill=(red, green, blue))
        brush.text((left + 2, top), text, font=font, fill="black" if red * 3 + green * 6 + blue > 1275 else "white")
    target.parent.mkdir(parents=True, exist_ok=True)
    picture.save(target, quality=90)


def as_results(number: int, file: Path, size: tuple[int, int], found: Detections, detector: Detector) -> list[dict]:
    """Detections of one image in COCO's results format."""
    width, height = size
    rows = []
    for (left, top, right, bottom), label, score in zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True):
        box = [round(value, 3) for value in (left * width, top * height, (right - left) * width, (bottom - top) * height)]
        category = detector.category_ids[label - 1]
        rows.append({"image_id": number, "file_name": str(file), "category_id": category, "bbox": box, "score": round(score, 5)})
    return rows


def predict(detector: Detector, files: dict[Path, Path], out: Path, score: float, quiet: bool = False) -> tuple[list[dict], dict[str, str]]:
    """Detects in all files and draws into ``out``: → rows for detections.json, and file → why it could not be read."""
    sizes, bad = {}, {}
    for file in files:
        try:
            sizes[file] = upright_size(file)
        except BadImage as error:
            bad[str(file)] = error.reason
    order, rows, waiting = list(sizes), [], []
    images = [{"id": n, "file_name": str(f.relative_to("/")), "width": w, "height": h} for n, (f, (w, h)) in enumerate(sizes.items(), 1)]
    config, backend = detector.config, detector.backend
    with tempfile.TemporaryDirectory(prefix="ssd-predict-") as scratch, ThreadPoolExecutor(max(1, config.workers)) as pool:
        listing = Path(scratch) / "images.json"
        categories = [{"id": number, "name": name} for number, name in zip(detector.category_ids, detector.names, strict=True)]
        listing.write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
        loader: Sequence = []
        if images:
            loader = backend.eval_loader(
                annotation_file=listing, image_dir=Path("/"), image_size=config.image_size, batch_size=config.eval_batch_size, workers=config.workers,
                skip_bad_images=True,
            )  # fmt: skip
        for batch in track(loader, "detecting", console=Console(stderr=True), disable=quiet):
            predictions = detector.step.predict(batch.images)
            found = backend.decoder(predictions, detector.model.default_boxes, score, config.iou_threshold, config.max_detections)
            for number, image in zip(batch.image_ids.tolist(), found, strict=True):
                file, image = order[number - 1], Detections(*(t.cpu() for t in image))
                rows += as_results(number, file, sizes[file], image, detector)
                waiting.append(pool.submit(draw, file, out / files[file], *(t.tolist() for t in image), detector.names))
            waiting = finished(waiting, MOST_IN_MEMORY)
        finished(waiting, 0)
        bad |= loader.bad_images if images else {}
    return rows, bad


def finished(waiting: list[Future], most: int) -> list[Future]:
    """Waits until ``most`` pictures at most are still to be drawn; what went wrong with one is raised."""
    while len(waiting) > most:
        waiting.pop(0).result()
    return waiting


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags_of_a_detector(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="files and folders")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures and detections.json")
    parser.add_argument("--score", type=float, default=0.3, help="lowest score of a detection (default: %(default)s)")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=32, help="images at a time (default: %(default)s)")
    flags = parser.parse_args(arguments)
    if not 0 <= flags.score <= 1:
        raise UserError(f"--score {flags.score} is not within 0 and 1")
    files = find(flags.images)
    detector = open_checkpoint(flags.checkpoint, flags.name, flags.device, workers=flags.workers, eval_batch_size=flags.batch_size)
    try:
        flags.out.mkdir(parents=True, exist_ok=True)
        rows, bad = predict(detector, files, flags.out, flags.score, quiet=not sys.stderr.isatty())
        (flags.out / "detections.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{error.filename or flags.out} cannot be written: {error.strerror}; choose another --out") from error
    for file, reason in bad.items():
        print(f"not read: {file}: {reason}", file=sys.stderr)
    print(f"{len(files) - len(bad)} images, {len(rows)} detections with a score above {flags.score}: {flags.out}/detections.json")
    return 1 if bad else 0
