"""Reading an image file of unknown origin into RGB.

| file | what happens |
| --- | --- |
| greyscale, palette, CMYK | converted to RGB |
| 16 bits a channel | the upper 8 bits are used |
| transparency | dropped |
| EXIF orientation | obeyed if the image then has the recorded aspect ratio, or has it either way; damaged EXIF: none |
| another size than recorded, same aspect ratio | used: boxes are relative to the recorded size |
| another aspect ratio than recorded | refused: the boxes cannot belong to it |
| truncated, empty, missing, not an image, over 179 million pixels | refused |
"""

import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # PIL opens MPO, a JPEG with further pictures, as JPEG
DAMAGE = (OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error, Image.DecompressionBombError)  # PIL raises all of these
TURNS = {  # EXIF orientation → what shows the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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
            turn = TURNS.get(orientation(file))  # 1: none
            picture = to_rgb(file)
            turned = picture if turn is None else picture.transpose(turn)
            if recorded_size is None or aspect_fits(turned.size, recorded_size):
                picture = turned
    except FileNotFoundError as error:
        raise BadImage(path, "the file is missing") from error
    except UnidentifiedImageError as error:
        empty = Path(path).stat().st_size == 0
        raise BadImage(path, "the file is empty" if empty else f"not a readable {', '.join(FORMATS)} image") from error
    except DAMAGE as error:
        raise BadImage(path, f"cannot be decoded: {error}") from error
    if recorded_size is not None and not aspect_fits(picture.size, recorded_size):
        height, width = recorded_size
        raise BadImage(path, f"is {picture.width}×{picture.height}, but the annotations say {width}×{height}")
    return picture


def orientation(file: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1, as stored, if there is none or the EXIF data are damaged."""
    try:
        value = file.getexif().get(ExifTags.Base.Orientation, 1)
    except DAMAGE:
        return 1
    return value if value in TURNS else 1


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
