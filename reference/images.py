"""Reading an image file of unknown origin into RGB.

| file | what happens |
| --- | --- |
| greyscale, palette, CMYK | converted to RGB |
| 16 bits a channel | the upper 8 bits are used |
| transparency | dropped |
| EXIF orientation | obeyed if the image then has the recorded size, or has it either way |
| another size than recorded, same aspect ratio | used: boxes are relative to the recorded size |
| another aspect ratio than recorded | refused: the boxes cannot belong to it |
| truncated, empty, missing, not an image, over 179 million pixels | refused |
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP")


class BadImage(Exception):
    """An image that cannot be used: ``path`` and ``reason``."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_rgb(path: str | Path, recorded_size: tuple[int, int] | None = None) -> Image.Image:
    """The picture as PIL RGB. ``recorded_size`` is (height, width) from the annotations. Raises BadImage."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            oriented = ImageOps.exif_transpose(file)
            fits = recorded_size is None or aspect_fits(oriented.size, recorded_size)
            picture = to_rgb(oriented if fits else file)
    except FileNotFoundError as error:
        raise BadImage(path, "the file is missing") from error
    except UnidentifiedImageError as error:
        empty = Path(path).stat().st_size == 0
        raise BadImage(path, "the file is empty" if empty else f"not a readable {', '.join(FORMATS)} image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's decoders raise all of these
        raise BadImage(path, f"cannot be decoded: {error}") from error
    if recorded_size is not None and not aspect_fits(picture.size, recorded_size):
        height, width = recorded_size
        raise BadImage(path, f"is {picture.width}×{picture.height}, but the annotations say {width}×{height}")
    return picture


def aspect_fits(size: tuple[int, int], recorded_size: tuple[int, int]) -> bool:
    """Whether (width, height) has the aspect ratio of the recorded (height, width), to a pixel."""
    (width, height), (recorded_height, recorded_width) = size, recorded_size
    return abs(width * recorded_height - height * recorded_width) < max(recorded_width, recorded_height, width, height)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode → RGB."""
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more: PIL's own conversion would clip to 255
        values = np.clip(np.asarray(image, dtype=np.float64), 0, 65535)
        return Image.fromarray((values / 256).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
