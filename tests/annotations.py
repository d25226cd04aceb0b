"""A small annotation file in COCO's format, clean or with one fault; for test_coco_json.py and test_index.py."""

import json
from pathlib import Path

from data_sets.index import AnnotationIndex


def coco(**changes) -> dict:
    """A small clean file: image 5 has two boxes, image 9 one, image 2 none."""
    content = {
        "images": [{"id": key, "file_name": f"{key}.jpg", "height": 100, "width": 200} for key in (9, 5, 2)],
        "annotations": [
            {"id": 11, "image_id": 5, "category_id": 7, "bbox": [10, 20, 30.5, 40.25], "area": 600.5, "iscrowd": 0, "segmentation": [[1]]},
            {"id": 12, "image_id": 9, "category_id": 3, "bbox": [0, 0, 200, 100], "area": 1, "iscrowd": 1},
            {"id": 13, "image_id": 5, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        ],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }
    return {**content, **changes}


def write(folder: Path, content: object, name: str = "annotations.json") -> Path:
    file = folder / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def changed(place: str, position: int, **fields) -> dict:
    """The clean file with fields of one entry replaced; a field set to `...` is removed."""
    content = coco()
    entry = content[place][position]
    entry.update(fields)
    for name in [name for name, value in entry.items() if value is ...]:
        del entry[name]
    return content


def opened(folder: Path, content: object) -> AnnotationIndex:
    return AnnotationIndex.open(write(folder, content))


def counts(index: AnnotationIndex) -> dict[str, int]:
    return {f"{kind}: {reason}": row["count"] for kind in ("dropped", "mended") for reason, row in index.report[kind].items()}
