"""An image gives the same array by path, as a member of a tar file, from open bytes and as a PIL image, or the same error."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet2.errors import DataError, OVDetError, UsageError
from ovdet2.io.images import decode_image, read_image
from ovdet2.io.members import member_address
from ovdet2.predictor import to_rgb_array

LEVELS = np.add.outer(np.arange(40) * 3, np.arange(60) * 2).astype(np.uint8)


def colours():
    return Image.fromarray(np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]], axis=2))


def deep(bits):
    return Image.fromarray((LEVELS.astype(np.int32) * 257).astype(np.uint16 if bits == 16 else np.int32))


def frames():
    return {"save_all": True, "append_images": [Image.new("L", (60, 40), 200)]}


# name -> (image, suffix, options of save)
IMAGES = {
    "RGB": (colours(), "png", {}),
    "jpeg": (colours(), "jpg", {}),
    "grey": (Image.fromarray(LEVELS), "png", {}),
    "16 bits": (deep(16), "png", {}),
    "16 bits of TIFF": (deep(16), "tif", {}),
    "32 bits in the range of 16": (deep(32), "tif", {}),
    "one bit": (colours().convert("1"), "png", {}),
    "palette": (colours().convert("P"), "png", {}),
    "palette with transparency": (colours().convert("P"), "png", {"transparency": 3}),
    "alpha": (colours().convert("RGBA"), "png", {}),
    "grey with alpha": (colours().convert("LA"), "png", {}),
    "CMYK": (colours().convert("CMYK"), "jpg", {}),
    "YCbCr": (colours().convert("YCbCr"), "jpg", {}),
    "LAB": (Image.new("LAB", (60, 40), (90, 20, 30)), "tif", {}),
    "float": (Image.fromarray(LEVELS.astype(np.float32) / 255), "tif", {}),
    "32 bits": (Image.fromarray(LEVELS.astype(np.int32) * 10_000_000), "tif", {}),
    "animation": (Image.fromarray(LEVELS), "gif", frames()),
    "small": (Image.new("RGB", (31, 80)), "png", {}),
}
for number in range(2, 9):
    turn = Image.Exif()
    turn[0x0112] = number
    IMAGES[f"turned {number}"] = colours(), "png", {"exif": turn}
    IMAGES[f"16 bits turned {number}"] = deep(16), "png", {"exif": turn}


def by_path(path):
    return to_rgb_array(path)


def by_pil(path):
    with Image.open(path) as image:
        return to_rgb_array(image)


def by_loaded_pil(path):
    with Image.open(path) as image:
        image.load()
        return to_rgb_array(image)


def by_bytes(path):
    return decode_image(io.BytesIO(path.read_bytes()), path)


def by_member(path):
    with tarfile.open(path.with_suffix(".tar"), "w") as tar:
        tar.add(path, path.name)
        member = tarfile.TarInfo()
    with tarfile.open(path.with_suffix(".tar")) as tar:
        [member] = tar.getmembers()
    return read_image(member_address(path.with_suffix(".tar"), 0, member.offset_data, member.size))


def outcome(read, path):
    """The pixels, or the class of the error."""
    try:
        return read(path)
    except OVDetError as error:
        return type(error)


@pytest.mark.parametrize("name", IMAGES)
def test_every_door_gives_the_same_pixels_or_error(name, tmp_path):
    image, suffix, options = IMAGES[name]
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    wanted = outcome(by_path, path)
    for read in (by_pil, by_loaded_pil, by_bytes, by_member):
        found = outcome(read, path)
        assert found is wanted if isinstance(wanted, type) else np.array_equal(found, wanted), read.__name__
    assert (wanted is DataError) == (name in ("float", "32 bits", "small"))


@pytest.mark.parametrize("name", IMAGES)
def test_images_in_memory_equal_their_lossless_file(name, tmp_path):
    image, suffix, options = IMAGES[name]
    if suffix == "jpg" or "exif" in options or "transparency" in options:
        suffix, options = "png", {}
    if image.mode in ("CMYK", "YCbCr"):
        wanted = np.asarray(image.convert("RGB"))
    else:
        image.save(tmp_path / f"image.{suffix}", **options)
        wanted = outcome(by_path, tmp_path / f"image.{suffix}")
    found = outcome(to_rgb_array, image)
    assert found is wanted if isinstance(wanted, type) else np.array_equal(found, wanted)


def test_sixteen_bits_are_not_white():
    pixels = to_rgb_array(deep(16))
    assert np.array_equal(pixels, np.repeat(LEVELS[:, :, None], 3, axis=2))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "gif"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_files_are_named_by_every_door(suffix, share, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    try:
        with Image.open(path) as image, pytest.raises(DataError, match=f"cut.{suffix} cannot be decoded"):
            to_rgb_array(image)
    except OSError:
        pass  # Pillow refuses it before it is an image
    for read in (by_path, by_bytes):
        with pytest.raises(DataError, match=f"cut.{suffix} "):
            read(path)


def test_colours_that_pillow_does_not_convert(monkeypatch):
    def convert(self, mode):
        raise ValueError("conversion not supported")  # LAB, where Pillow has no colour management

    image = Image.new("LAB", (60, 40))
    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(DataError, match="the PIL image has colours of the mode LAB"):
        to_rgb_array(image)


def test_a_pil_image_is_not_changed():
    image = colours().convert("RGBA")
    image.getexif()[0x0112] = 6
    before = image.tobytes(), image.size, image.mode, dict(image.getexif())
    assert to_rgb_array(image).shape == (60, 40, 3)  # upright
    assert (image.tobytes(), image.size, image.mode, dict(image.getexif())) == before


@pytest.mark.parametrize(
    "value, message",
    [
        (np.zeros((40, 40), np.uint8), r"uint8 \[40, 40\]"),
        (np.zeros((40, 40, 4), np.uint8), r"uint8 \[40, 40, 4\]"),
        (np.zeros((3, 40, 40), np.uint8), r"uint8 \[3, 40, 40\]"),
        (np.zeros((40, 40, 3), np.float32), r"float32 \[40, 40, 3\]"),
        (np.zeros((40, 40, 3), np.uint16), r"uint16 \[40, 40, 3\]"),
        (torch.zeros(40, 40, 3, requires_grad=True), "got Tensor"),
        (b"bytes", "got bytes"),
        (None, "got NoneType"),
        (np.zeros((20, 40, 3), np.uint8), "40x20 pixels"),
    ],
)
def test_what_is_no_image(value, message):
    with pytest.raises(UsageError, match=message):
        to_rgb_array(value)
