"""Concept priors by CLIP: views, scores, batches, unreadable images."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ovdet2.io.images import read_image
from ovdet2.priors.clip import ClipBackend, view_boxes
from ovdet2.vocabulary import Vocabulary
from tests.priors_cases import WORDS


@pytest.fixture
def pictures(tmp_path):
    """Records of images in every form: RGB, grey, 16-bit, CMYK, turned by EXIF, with transparency, and long."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "rgb.png")
    image.convert("L").save(tmp_path / "grey.jpg")
    Image.fromarray(rng.integers(0, 65535, (48, 64)).astype(np.uint16)).save(tmp_path / "deep.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    Image.fromarray(rng.integers(0, 255, (40, 200, 3), dtype=np.uint8)).save(tmp_path / "long.png")
    names = ("rgb.png", "grey.jpg", "deep.png", "cmyk.jpg", "turned.jpg", "alpha.png", "long.png")
    return [{"image_id": i, "file_name": str(tmp_path / name)} for i, name in enumerate(names, 1)]


@pytest.mark.parametrize(
    "tiles, resize, filter",
    [(1, "crop", "bicubic"), (1, "squash", "bilinear"), (2, "crop", "bilinear"), (3, "squash", "bicubic")],
)
def test_clip_scores_equal_a_plain_loop(micro_teacher, pictures, monkeypatch, tiles, resize, filter):
    """Against Pillow's resizing of each view, image by image, and float64 arithmetic."""
    vocabulary = Vocabulary.build(WORDS, micro_teacher, "single")
    monkeypatch.setattr(micro_teacher, "interpolation", filter)
    mean, std = (tensor.numpy().astype(np.float64) for tensor in (micro_teacher.mean, micro_teacher.std))
    backend = ClipBackend(micro_teacher, vocabulary, tiles, resize, batch_size=12)
    found = {i: score for i, index, score in backend.lists(pictures, skip=None)}
    assert list(found) == [record["image_id"] for record in pictures]
    for record in pictures:
        image = Image.fromarray(read_image(record["file_name"], "RGB"))
        cells = [image]
        if tiles > 1:
            x, y = (np.rint(np.linspace(0, side, tiles + 1)).astype(int).tolist() for side in image.size)
            cells += [image.crop((x[j], y[i], x[j + 1], y[i + 1])) for i in range(tiles) for j in range(tiles)]
        if resize == "crop":  # all sides are even
            cells = [ImageOps.fit(cell, (min(cell.size),) * 2, Image.Resampling.NEAREST) for cell in cells]
        small = [np.asarray(cell.resize((32, 32), Image.Resampling[filter.upper()]), np.float64) for cell in cells]
        pixels = (np.stack(small).transpose(0, 3, 1, 2) / 255 - mean) / std
        with torch.no_grad():
            embedded = micro_teacher.clip.encode_image(torch.from_numpy(pixels).float()).double()
        cosine = (embedded / embedded.norm(dim=1, keepdim=True)) @ vocabulary.embeddings.double().T
        wanted = 1 / (1 + torch.exp(-cosine.amax(dim=0) / 0.07))
        assert torch.allclose(found[record["image_id"]].double(), wanted, atol=1e-3)


def test_batches_and_workers_change_nothing(micro_teacher, pictures):
    vocabulary = Vocabulary.build(WORDS, micro_teacher, "single")

    def scores(**options):
        return torch.stack(
            [s for _, _, s in ClipBackend(micro_teacher, vocabulary, 2, **options).lists(pictures, None)]
        )

    assert torch.allclose(scores(batch_size=1), scores(batch_size=64, num_workers=1), atol=1e-5)


@pytest.fixture
def passes(micro_teacher, monkeypatch):
    """The pixels of each forward pass; nothing is embedded."""
    seen = []

    def encode_image(pixels, batch_size):
        seen.append(pixels)
        return torch.ones(len(pixels), micro_teacher.embed_dim)

    monkeypatch.setattr(micro_teacher, "encode_image", encode_image)
    return seen


def test_squash_sees_the_ends_of_a_long_image_and_crop_does_not(micro_teacher, passes, tmp_path):
    image = np.zeros((32, 128, 3), dtype=np.uint8)
    image[:, :20] = 255
    Image.fromarray(image).save(tmp_path / "long.png")
    vocabulary = Vocabulary.build(WORDS, micro_teacher, "single")
    for tiles, resize in ((1, "crop"), (1, "squash"), (2, "squash")):
        record = {"image_id": 1, "file_name": str(tmp_path / "long.png")}
        list(ClipBackend(micro_teacher, vocabulary, tiles, resize).lists([record], skip=None))
    cropped, squashed, cells = (pixels.float().mean(dim=(1, 2, 3)).tolist() for pixels in passes)
    assert cropped == [0] and squashed == [pytest.approx(255 * 20 / 128, rel=0.05)]
    assert cells[0] == squashed[0] and cells[1] == cells[3] > 0 and cells[2] == cells[4] == 0


@pytest.mark.parametrize("tiles, batch_size, images", [(1, 5, [5, 2]), (2, 10, [2, 2, 2, 1]), (3, 4, [1] * 7)])
def test_a_batch_is_counted_in_views(micro_teacher, passes, pictures, tiles, batch_size, images):
    vocabulary = Vocabulary.build(WORDS, micro_teacher, "single")
    assert len(list(ClipBackend(micro_teacher, vocabulary, tiles, batch_size=batch_size).lists(pictures, None))) == 7
    of_an_image = 1 if tiles == 1 else 1 + tiles**2
    assert [len(pixels) for pixels in passes] == [count * of_an_image for count in images]
    assert all(pixels.dtype == torch.uint8 for pixels in passes)


def test_cells_cover_the_image_once():
    boxes = view_boxes(10, 17, 3).tolist()
    assert boxes[0] == [0, 0, 17, 10] and len(boxes) == 10
    covered = np.zeros((10, 17), dtype=int)
    for x0, y0, x1, y1 in boxes[1:]:
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all() and view_boxes(10, 17, 1).tolist() == boxes[:1]


def test_unreadable_images_are_left_out(micro_teacher, pictures, tmp_path):
    whole = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "rgb.png").write_bytes(whole[: len(whole) // 2])
    said = []
    backend = ClipBackend(micro_teacher, Vocabulary.build(WORDS, micro_teacher, "single"), batch_size=2)
    found = [i for i, _, _ in backend.lists(pictures + [{"image_id": 99, "file_name": "none.png"}], said.append)]
    assert found == [2, 3, 4, 5, 6, 7]
    assert len(said) == 2 and "rgb.png" in said[0] and "none.png" in said[1]
