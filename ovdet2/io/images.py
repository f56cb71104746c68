"""Decode image files. All of ovdet2 uses this module, so pixels and errors are the same everywhere.

It uses Pillow, not OpenCV: OpenCV returns an array for a truncated JPEG without an error, so that a detector would be
trained on images that are partly grey.
"""

import contextlib
import struct
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ovdet2.errors import DataError, OVDetError, UsageError
from ovdet2.io.members import open_member

# The deepest feature map of the backbones has stride 32: a smaller image would have no cell in it.
MIN_SIDE = 32

# Longer and narrower images would be resized to a side of no pixel, or of one.
MAX_RATIO = 100

# Pillow recognises a file by its content, whatever its name. Only these formats are decoded: for some of the others Pillow
# starts programs (Ghostscript for EPS) or has rarely used decoders.
FILE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")

_FORMATS = ("RGB", "BGR", "L")
# What Pillow's readers raise for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    MemoryError,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    TypeError,
)
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def read_image(path: str | Path, format: str = "RGB") -> np.ndarray:
    """Decode an image file, upright, in 8 bits per channel.

    The EXIF orientation is applied; a damaged EXIF block is ignored, since the pixels are intact. Grayscale is repeated
    over three channels, CMYK is converted, an alpha channel is dropped, 16-bit values are divided by 257 (Pillow would
    clip them to white), and of an animation the first frame is read.

    Args:
        path: the file, or the address of a member of a tar file (:mod:`ovdet2.io.members`).
        format: "RGB", "BGR", or "L" (one channel).

    Returns:
        (H, W, C) uint8 array, C-contiguous, H and W as they are shown (after the EXIF rotation), C = 3, or 1 for "L".

    Raises:
        DataError: the file is missing, empty, truncated, no image, above Pillow's pixel limit, of floating-point
            values, in another format than :data:`FILE_FORMATS`, has a side below :data:`MIN_SIDE` pixels, or sides that
            differ by more than a factor of :data:`MAX_RATIO`; the message names the path.
        UsageError: unknown ``format``.
    """
    member = open_member(path)
    if member is not None:
        return decode_image(member, path, format)
    _require_file(path)
    return decode_image(path, path, format)


def decode_image(file: str | Path | BinaryIO, name: str | Path, format: str = "RGB") -> np.ndarray:
    """:func:`read_image` of an open binary file, for example a member of an archive.

    Args:
        file: path, or binary file object at its start.
        name: name of the file in messages.
        format: as of :func:`read_image`.

    Raises:
        DataError, UsageError: as of :func:`read_image`.
    """
    if format not in _FORMATS:
        raise UsageError(f"image format {format!r} is unknown: set INPUT.FORMAT to one of {', '.join(_FORMATS)}.")
    with _explained(file, name), open_image(file) as image:
        return pixels_of(image, name, format)


def pixels_of(image: Image.Image, name: str | Path, format: str = "RGB") -> np.ndarray:
    """:func:`read_image` of an image that Pillow has opened: the same pixels and errors as of its file.

    Args:
        image: need not be loaded yet; of an animation, the current frame is read. Its pixels are not changed.
        name: of the image in messages.
        format: as of :func:`read_image`.

    Raises:
        DataError: as of :func:`read_image`.
    """
    with _explained(None, name):
        image.load()
        upright = _upright(_to_eight_bits(image, name))
    _require_side(name, upright.size)
    try:
        pixels = np.asarray(upright.convert("L" if format == "L" else "RGB"))
    except ValueError:
        raise DataError(
            f"{name} has colours of the mode {upright.mode}, which Pillow does not convert to RGB: convert it."
        ) from None
    if format == "L":
        pixels = pixels[:, :, None]
    elif format == "BGR":
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """``PIL.Image.open`` for :data:`FILE_FORMATS` only. Use it wherever a file is opened with Pillow.

    Raises:
        UnidentifiedImageError: another format.
    """
    Image.init()  # registers all formats, of which a build of Pillow may lack some
    return Image.open(file, formats=[name for name in FILE_FORMATS if name in Image.OPEN])


def image_size(path: str | Path) -> tuple[int, int]:
    """Size of an image file from its header, without decoding it; equal to the size that :func:`read_image` returns.

    Returns:
        (width, height) in pixels as they are shown, after the EXIF rotation.

    Raises:
        DataError: as :func:`read_image`, except for faults that only decoding reveals, such as truncation.
    """
    _require_file(path)
    with _explained(path, path), open_image(path) as image:
        if image.format == "TIFF":  # Pillow rotates TIFF itself, and some versions already the size of the header
            image.load()
        width, height = image.size[::-1] if _swaps_sides(image) else image.size
    _require_side(path, (width, height))
    return width, height


def require_annotated_size(record: MutableMapping[str, Any], image: np.ndarray) -> None:
    """Compare an image array [H, W, 3] with the annotated size: with another size every box would be misplaced.

    A missing size is added to the record.

    Raises:
        DataError: the sizes differ; the message names the file and both sizes.
    """
    height, width = image.shape[:2]
    annotated = record.setdefault("width", width), record.setdefault("height", height)
    if annotated != (width, height):
        raise DataError(
            f"{record['file_name']} (image id {record.get('image_id')}) is {width}x{height} pixels but the annotations "
            f"state {annotated[0]}x{annotated[1]}: the file is not the annotated one, or its EXIF rotation was not "
            "applied when it was annotated."
        )


@contextlib.contextmanager
def _explained(file, path):
    """Convert Pillow's exceptions for a file, None for an image that is open, to a DataError that names it by ``path``."""
    try:
        yield
    except UnidentifiedImageError:
        raise DataError(f"{path} is not an image ({_look(file)}): download it again or remove it.") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"{path} is too large to decode safely ({error}): scale it down.") from None
    except _DAMAGE as error:
        if isinstance(error, OVDetError):
            raise
        raise DataError(
            f"{path} cannot be decoded ({error}): it is damaged or truncated; download it again or remove it."
        ) from None


def _require_file(path):
    try:
        found = Path(path).is_file()
    except OSError as error:  # a name that is too long, a folder without permission
        raise DataError(f"the image {str(path)[:200]} cannot be read ({error.strerror}): check the path.") from None
    if not found:
        raise DataError(f"the image {path} does not exist: check the path.")


def _require_side(path, size):
    if min(size) < MIN_SIDE:
        raise DataError(
            f"{path} is {size[0]}x{size[1]} pixels, but the detectors need at least {MIN_SIDE} pixels per side: "
            "enlarge it or remove it."
        )
    if max(size) > MAX_RATIO * min(size):
        raise DataError(
            f"{path} is {size[0]}x{size[1]} pixels: its sides differ by more than a factor of {MAX_RATIO}, so that it "
            "cannot be resized; crop or remove it."
        )


def _to_eight_bits(image, path):
    """Convert 16-bit grayscale to 8 bits; Pillow converts the other modes later."""
    if image.mode == "F":
        raise DataError(f"{path} holds floating-point pixels, whose range is unknown: convert it to 8 or 16 bits.")
    if image.mode not in _SIXTEEN_BIT_MODES:
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path} holds 32-bit pixels, whose range is unknown: convert it to 8 or 16 bits.")
    eight_bits = Image.fromarray((values // 257).astype(np.uint8))
    eight_bits.info.update(image.info)
    eight_bits.getexif().update(image.getexif())
    return eight_bits


def _upright(image):
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF parser raises many types on damaged tags; the pixels are intact
        return image.copy()


def _swaps_sides(image):
    """Whether the EXIF orientation swaps width and height; a damaged block is ignored, as in :func:`_upright`."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:
        return False


def _look(file):
    """Describe a file by its first bytes, for the error message."""
    if hasattr(file, "seek"):
        file.seek(0)
        head = file.read(64)
    else:
        with open(file, "rb") as handle:
            head = handle.read(64)
    if not head:
        return "the file is empty"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it holds HTML or XML, perhaps the error page of a download"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF")):
        return "it is PostScript or PDF, which are not decoded"
    return f"its format is not among {', '.join(FILE_FORMATS)}"
