"""Image files of strangers: formats, sizes, names, damage. A bad image is a DataError, never another exception."""

import io
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from ovdet2.data.mapped_records import MappedRecords
from ovdet2.data.samples import Sample
from ovdet2.data.steps.decode import DecodeImage
from ovdet2.errors import DataError
from ovdet2.io.images import FILE_FORMATS, decode_image, image_size, open_image, read_image
from ovdet2.io.members import member_address
from ovdet2.priors.chat_server import image_bytes
from tests.caption_cases import image_of, write_shard

ROOT = Path(__file__).resolve().parents[1]
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(%pipe%touch trace) (w) file\nshowpage\n%%EOF\n"
)


def encoded(kind, index=3):
    buffer = io.BytesIO()
    Image.fromarray(image_of(index)).save(buffer, kind)
    return buffer.getvalue()


def read_by_step(path):
    DecodeImage("BGR")(Sample(file_name=str(path), image_id=1))


def read_member(path):
    tar = path.with_suffix(".tar")
    content = path.read_bytes()
    write_shard(tar, [("a.jpg", content)])
    read_image(member_address(tar, 0, 512, len(content)))


READERS = [read_image, image_size, read_by_step, read_member, image_bytes]


class TestFormats:
    @pytest.mark.parametrize("reader", READERS)
    def test_postscript_starts_no_program(self, tmp_path, monkeypatch, reader):
        monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
        path = tmp_path / "photo.jpg"
        path.write_bytes(EPS)
        with pytest.raises(DataError, match="it is PostScript or PDF, which are not decoded"):
            reader(path)

    @pytest.mark.parametrize("kind", ["EPS", "PDF", "PCX", "SGI", "TGA", "ICO", "IM", "SPIDER"])
    def test_of_others_are_refused(self, tmp_path, kind):
        path = tmp_path / "photo.jpg"
        path.write_bytes(encoded(kind) if kind != "SPIDER" else _spider())
        with pytest.raises(DataError, match="photo.jpg is not an image"):
            read_image(path)

    @pytest.mark.parametrize("kind", [kind for kind in FILE_FORMATS if kind in Image.SAVE or not Image.init()])
    def test_of_the_list_are_read_whatever_their_suffix(self, tmp_path, kind):
        if kind not in Image.SAVE:
            pytest.skip(f"this build of Pillow cannot write {kind}")
        path = tmp_path / "photo.jpg"
        path.write_bytes(encoded(kind))
        assert read_image(path).shape == (40, 48, 3) and image_size(path) == (48, 40)

    def test_are_listed_in_one_place(self):
        """No other module opens a file with Pillow."""
        pattern = re.compile(r"\bImage\.open\(")
        files = [*ROOT.glob("ovdet2/**/*.py"), *ROOT.glob("projects/**/*.py"), *ROOT.glob("[td][a-z]*/*.py")]
        found = {
            path.relative_to(ROOT).as_posix()
            for path in files
            if "tests" not in path.parts and pattern.search(path.read_text(encoding="utf-8"))
        }
        assert found == {"ovdet2/io/images.py"}


def _spider():
    buffer = io.BytesIO()
    Image.new("F", (48, 40)).save(buffer, "SPIDER")
    return buffer.getvalue()


class TestSides:
    @pytest.mark.parametrize("size, refused", [((40, 4000), False), ((40, 4001), True), ((4001, 40), True)])
    def test_that_differ_too_much(self, tmp_path, size, refused):
        path = tmp_path / "strip.png"
        Image.new("L", size).save(path)
        for reader in (read_image, image_size):
            if refused:
                with pytest.raises(DataError, match=f"{size[0]}x{size[1]} pixels: its sides differ.*factor of 100"):
                    reader(path)
            else:
                reader(path)

    def test_too_small_is_stated_first(self, tmp_path):
        Image.new("L", (20, 20_000)).save(tmp_path / "strip.png")
        with pytest.raises(DataError, match="at least 32 pixels per side"):
            read_image(tmp_path / "strip.png")


class TestPaths:
    @pytest.mark.parametrize("reader", [read_image, image_size, read_by_step])
    def test_a_name_that_is_too_long(self, tmp_path, reader):
        with pytest.raises(DataError, match=r"the image .*cannot be read \(File name too long\)"):
            reader(tmp_path / f"{'a' * 300}.jpg")

    @pytest.mark.parametrize("reader", [read_image, image_size, read_by_step])
    def test_a_folder_without_permission(self, tmp_path, monkeypatch, reader):
        def refuse(self, **_):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "stat", refuse)
        with pytest.raises(DataError, match=r"a.jpg cannot be read \(Permission denied\)"):
            reader(tmp_path / "a.jpg")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_a_file_without_permission(self, tmp_path):
        path = tmp_path / "a.png"
        path.write_bytes(encoded("PNG"))
        path.chmod(0)
        with pytest.raises(DataError, match="a.png"):
            read_image(path)

    @pytest.mark.parametrize("name", ["", ".", "a\x00b.jpg"])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(DataError):
            read_image(tmp_path / name)


def test_bad_images_are_counted_not_the_end_of_a_run(tmp_path):
    """Each is replaced by the good one."""
    good = tmp_path / "good.png"
    good.write_bytes(encoded("PNG"))
    (tmp_path / "eps.jpg").write_bytes(EPS)
    Image.new("L", (40, 40_000)).save(tmp_path / "strip.png")
    paths = [good, tmp_path / "eps.jpg", tmp_path / "strip.png", tmp_path / f"{'a' * 300}.jpg", tmp_path / "none.jpg"]

    def maker(record):
        sample = Sample(file_name=record["file_name"], image_id=1)
        DecodeImage("RGB")(sample)
        return sample

    data = MappedRecords([{"file_name": str(path)} for path in paths], maker, max_bad=10)
    for index, path in enumerate(paths):
        sample, faults = data[(index, index)]
        assert sample.file_name == str(good) and (path == good or faults[0][0] == str(path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000"])
def test_changed_bytes_are_an_image_or_a_data_error(kind):
    rng = random.Random(kind)
    good = encoded(kind)
    for _ in range(150):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 2, 8))):
            bad[rng.randrange(min(len(bad), rng.choice((64, 300, 10**6))))] = rng.randrange(256)
        if rng.random() < 0.3:
            del bad[rng.randrange(len(bad)) :]
        try:
            found = decode_image(io.BytesIO(bytes(bad)), "bad.jpg")
        except DataError as error:
            assert "bad.jpg" in str(error)
        else:
            assert found.dtype == np.uint8 and found.ndim == 3


def test_open_image_is_lazy(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    with open_image(path) as image:
        assert image.size == (48, 40) and image.format == "PNG"
