"""From images to the regions of a shard: batches, odd images, and what is done with those that cannot be read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovdet2.caches.region_boxes import BoxFilters, FoundBoxes
from ovdet2.caches.region_embedding import CropRecipe, ShardEmbedder
from ovdet2.errors import NumericalError
from ovdet2.io.images import read_image
from ovdet2.vlm.crops import embed_regions


class Boxes:
    """A source that holds its boxes."""

    def __init__(self, boxes):
        self.boxes = {image_id: torch.tensor(b, dtype=torch.float32).reshape(-1, 4) for image_id, b in boxes.items()}

    def __call__(self, record):
        boxes = self.boxes[record["image_id"]]
        return FoundBoxes(boxes, torch.ones(len(boxes)), torch.arange(len(boxes)))


def record(path, image_id, size=None):
    width, height = size or Image.open(path).size
    return {"file_name": str(path), "image_id": image_id, "width": width, "height": height}


def save(folder, image_id, width=64, height=48, seed=None):
    rng = np.random.default_rng(image_id if seed is None else seed)
    path = folder / f"{image_id}.png"
    Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return record(path, image_id)


def boxes_like(count, seed):
    rng = np.random.default_rng(seed)
    low = rng.random((count, 2)) * [40, 30]
    return np.concatenate([low, low + 2 + rng.random((count, 2)) * 16], axis=1).tolist()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 7), st.sampled_from([(1.0,), (1.0, 1.5)]))
@settings(max_examples=15, deadline=None)
def test_batches_are_filled_across_images_and_change_nothing(micro_teacher, tmp_path_factory, counts, batch, factors):
    folder = tmp_path_factory.mktemp("images")
    records = [save(folder, image_id) for image_id in range(len(counts))]
    source = Boxes({image_id: boxes_like(count, image_id) for image_id, count in enumerate(counts)})
    embedder = ShardEmbedder(micro_teacher, source, BoxFilters(), CropRecipe(factors=factors, batch_size=batch))
    regions, faults = embedder.embed(records)
    assert [len(r) for r in regions] == counts and not faults
    for one, found in zip(records, regions):
        image = torch.from_numpy(read_image(one["file_name"]).copy()).permute(2, 0, 1)
        wanted = embed_regions(micro_teacher, image, source(one).boxes_xyxy, factors)
        assert torch.allclose(found.embeddings.float(), wanted, atol=2e-3)
        assert torch.equal(found.ann_ids, torch.arange(len(found)))


def test_the_teacher_never_sees_more_than_a_batch(micro_teacher, tmp_path, monkeypatch):
    """10,000 boxes in one image, then none, then one of one pixel: the memory for crops stays that of a batch."""
    sizes, encode = [], micro_teacher.encode_image
    monkeypatch.setattr(
        micro_teacher, "encode_image", lambda crops, *rest: sizes.append(len(crops)) or encode(crops, *rest)
    )
    records = [save(tmp_path, image_id) for image_id in range(3)]
    source = Boxes({0: boxes_like(10_000, 0), 1: [], 2: [[5, 5, 6, 6]]})
    regions, _ = ShardEmbedder(micro_teacher, source, BoxFilters(), CropRecipe(batch_size=512)).embed(records)
    assert [len(r) for r in regions] == [10_000, 0, 1]
    assert max(sizes) == 512 and sum(sizes) == 2 * 10_001 and set(sizes[:-1]) == {512}


def odd_images(folder):
    """Files of every odd kind, all of one picture: {name: (record, whether its pixels are those of the picture)}."""
    y, x = np.mgrid[0:48, 0:64]
    grey = ((np.sin(x / 5) + np.cos(y / 7) + 2) * 63).astype(np.uint8)
    picture = Image.fromarray(grey).convert("RGB")
    picture.save(folder / "rgb.png")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("CMYK").save(folder / "cmyk.tif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "exif.png", exif=exif)
    return {path.stem: record(path, number, (64, 48)) for number, path in enumerate(sorted(folder.iterdir()))}


def test_cmyk_16_bit_grey_and_rotated_files_are_the_same_picture(micro_teacher, tmp_path):
    records = odd_images(tmp_path)
    assert len(records) == 5
    source = Boxes({one["image_id"]: [[5, 5, 30, 40], [20, 0, 64, 48]] for one in records.values()})
    regions, faults = ShardEmbedder(micro_teacher, source, BoxFilters(), CropRecipe()).embed(list(records.values()))
    assert not faults
    by_name = dict(zip(records, regions))
    for name, found in by_name.items():
        cosine = (found.embeddings.float() * by_name["rgb"].embeddings.float()).sum(dim=1)
        assert cosine.min() > 0.999, name


@pytest.mark.parametrize("workers", [0, 1])
def test_files_that_cannot_be_read_have_no_regions_and_are_named(micro_teacher, tmp_path, workers):
    records = [save(tmp_path, image_id) for image_id in range(4)]
    truncated, missing, other_size = (tmp_path / f"{i}.png" for i in (0, 1, 2))
    truncated.write_bytes(truncated.read_bytes()[:500])
    missing.unlink()
    Image.new("RGB", (64, 64)).save(other_size)
    source = Boxes({image_id: boxes_like(3, image_id) for image_id in range(4)})
    embedder = ShardEmbedder(micro_teacher, source, BoxFilters(), CropRecipe(), workers)
    regions, faults = embedder.embed(records)
    assert [len(r) for r in regions] == [0, 0, 0, 3]
    assert set(faults) == {0, 1, 2} and "truncated" in faults[0] and "does not exist" in faults[1]
    assert "64x64 pixels but the annotations state 64x48" in faults[2]


def test_embeddings_that_are_not_finite_stop_the_run(micro_teacher, tmp_path, monkeypatch):
    records = [save(tmp_path, image_id) for image_id in range(2)]
    source = Boxes({0: boxes_like(1, 0), 1: boxes_like(1, 1)})
    broken = torch.ones(4, micro_teacher.embed_dim)
    broken[3] = float("nan")
    monkeypatch.setattr(micro_teacher, "encode_image", lambda crops, *_: broken)
    with pytest.raises(NumericalError, match=r"1.png \(image id 1\) are not finite"):
        ShardEmbedder(micro_teacher, source, BoxFilters(), CropRecipe()).embed(records)


def test_facts_say_how_it_was_computed(micro_teacher):
    facts = ShardEmbedder(micro_teacher, Boxes({}), BoxFilters(), CropRecipe(batch_size=7)).facts()
    assert facts == {"batch_size": 7, "threads": torch.get_num_threads(), "device": "cpu", "torch": torch.__version__}
