"""The region cache: round trip, resume, every way it can be wrong, and what the mapper makes of it."""

import json
import multiprocessing
import pickle
import shutil
from dataclasses import fields

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.data import transforms as T
from detectron2.data.transforms import HFlipTransform, NoOpTransform, ResizeTransform
from fvcore.transforms.transform import CropTransform, TransformList
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from ovdet2.caches.claims import Claims
from ovdet2.caches.region_cache import RegionCache, Regions, shard_name
from ovdet2.caches.region_cache_writer import CacheWriter, write_shard
from ovdet2.config import get_cfg
from ovdet2.data.mapped_records import MappedRecords
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.data.steps.regions import AttachCachedRegions, CachedRegions, transform_regions
from ovdet2.data.stream import SourceStream
from ovdet2.errors import CacheError, SetupError, UsageError
from ovdet2.io.files import sha256_file
from ovdet2.methods.vild.sample import open_region_cache
from ovdet2.vlm.fingerprint import Fingerprint
from tests.micro_training import write_data

TEACHER = Fingerprint("ViT-B-32", "openai", "a" * 64)
RECIPE = {"teacher": TEACHER.to_dict(), "dim": 4, "dataset": "ov_micro_train", "dataset_sha256": "0" * 64}


def regions(count, seed=0, ann_ids=None, size=(48, 64)):
    """Made-up regions inside an image of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    corners = torch.rand(count, 2, generator=generator) * torch.tensor([width - 20.0, height - 20.0])
    return Regions(
        torch.cat([corners, corners + 5 + 15 * torch.rand(count, 2, generator=generator)], dim=1),
        F.normalize(torch.randn(count, 4, generator=generator), dim=1).half(),
        torch.full((count,), -1) if ann_ids is None else torch.tensor(ann_ids),
        torch.rand(count, generator=generator),
    )


def build(folder, ids, per_shard=2, recipe=RECIPE, make=lambda image_id: regions(image_id % 4, image_id)):
    """A whole cache; image i has i mod 4 regions, so some have none."""
    writer = CacheWriter(folder, recipe, ids, per_shard, "build it again")
    for index in writer.claimed():
        writer.write(index, [make(image_id) for image_id in writer.shards[index]])
    assert writer.finish()["complete"]
    return RegionCache(folder)


def equal(first, second):
    return all(torch.equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(Regions))


@given(st.sets(st.integers(0, 10**9), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_round_trip(tmp_path_factory, ids, per_shard):
    folder = tmp_path_factory.mktemp("cache")
    cache = build(folder, ids, per_shard)
    assert len(cache) == len(ids) and cache.teacher == TEACHER
    for image_id in ids:
        found = cache.regions(image_id)
        assert equal(found, regions(image_id % 4, image_id)) and found.embeddings.dtype == torch.float16
    assert sorted(ids) == [i for s in cache.manifest["shards"] for i in range_of(s, ids)]


def range_of(shard, ids):
    return sorted(i for i in ids if shard["first_image_id"] <= i <= shard["last_image_id"])


def test_reader_travels_to_workers(tmp_path):
    cache = build(tmp_path / "c", range(1, 8))
    cache.regions(3)
    assert equal(pickle.loads(pickle.dumps(cache)).regions(6), regions(2, 6))


def test_killed_run_goes_on_and_a_rerun_changes_nothing(tmp_path):
    whole = build(tmp_path / "whole", range(1, 8))
    writer = CacheWriter(tmp_path / "cut", RECIPE, range(1, 8), 2, "python again")
    assert writer.missing() == [0, 1, 2, 3]
    for index in (0, 2):
        writer.write(index, [regions(i % 4, i) for i in writer.shards[index]])
    with pytest.raises(CacheError, match="2 of 4 shards are written: complete it with: python again"):
        RegionCache(tmp_path / "cut")
    again = CacheWriter(tmp_path / "cut", RECIPE, range(1, 8), 2, "python again")
    assert again.missing() == [1, 3] and again.finish() is None
    build(tmp_path / "cut", range(1, 8))
    for shard in whole.manifest["shards"]:
        assert sha256_file(tmp_path / "cut" / shard["file"]) == shard["sha256"]
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard*")}
    build(tmp_path / "cut", range(1, 8), make=None)
    assert times == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cut").glob("shard*")}


def test_another_recipe_is_refused_and_nothing_written_is_lost(tmp_path):
    build(tmp_path / "c", range(1, 8))
    with pytest.raises(CacheError, match="dim 4 instead of 5; teacher .*a{64}.* instead of .*b{64}.*choose another"):
        other = RECIPE | {"dim": 5, "teacher": Fingerprint("ViT-B-16", "openai", "b" * 64).to_dict()}
        CacheWriter(tmp_path / "c", other, range(1, 8), 2, "")
    assert equal(RegionCache(tmp_path / "c").regions(3), regions(3, 3))


def test_embeddings_must_be_unit_rows(tmp_path):
    for value in (2.0, float("nan")):
        bad = regions(3)
        bad.embeddings[1] *= value
        with pytest.raises(ValueError, match="no unit rows"):
            write_shard(tmp_path, 0, RECIPE, [1], [bad])


def truncate(folder):
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:-20])


def remove(folder):
    (folder / shard_name(1)).unlink()


def other_schema(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("region-cache/1", "region-cache/0"))


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def no_json(folder):
    (folder / "manifest.json").write_text('{"schema": ')


@pytest.mark.parametrize(
    "damage, message",
    [
        (truncate, r"shard-00001.safetensors has \d+ bytes instead of \d+.*complete it with: build it again"),
        (remove, "shard-00001.safetensors is missing: complete it with: build it again"),
        (other_schema, "schema 'ovdet2/region-cache/0', this version reads 'ovdet2/region-cache/1'"),
        (no_manifest, "manifest.json does not exist: build it with ovdet2 cache build"),
        (no_json, "not valid JSON"),
    ],
)
def test_damaged_cache_is_refused_at_the_start(tmp_path, damage, message):
    build(tmp_path / "c", range(1, 8))
    damage(tmp_path / "c")
    with pytest.raises(CacheError, match=message):
        RegionCache(tmp_path / "c")


def test_truncated_shard_is_rebuilt_by_the_same_command(tmp_path):
    build(tmp_path / "c", range(1, 8))
    truncate(tmp_path / "c")
    assert CacheWriter(tmp_path / "c", RECIPE, range(1, 8), 2, "").missing() == [1]
    assert equal(build(tmp_path / "c", range(1, 8)).regions(3), regions(3, 3))


@pytest.mark.parametrize("complete", [True, False])
@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_flipped_bit_is_found_and_only_its_shard_removed(tmp_path_factory, complete, data):
    folder = tmp_path_factory.mktemp("flipped")
    build(folder, range(1, 8))
    if not complete:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"complete": False, "shards": []}))
    index = data.draw(st.integers(0, 3))
    path = folder / shard_name(index)
    content = bytearray(path.read_bytes())
    # Where the manifest is not complete, the shard must speak for itself: for its tensors and what it says of them.
    start = 0 if complete else 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(start, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard*")}
    path.write_bytes(content)
    writer = CacheWriter(folder, RECIPE, range(1, 8), 2, "")
    assert writer.remove_damaged() == [index] and writer.missing() == [index]
    cache = build(folder, range(1, 8))
    after = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard*")}
    assert {name for name in before if before[name] != after[name]} == {path.name}
    assert all(equal(cache.regions(i), regions(i % 4, i)) for i in range(1, 8))
    assert CacheWriter(folder, RECIPE, range(1, 8), 2, "").remove_damaged() == []


def test_two_that_verify_at_once(tmp_path):
    """One has found a shard damaged when the other mends it: the new shard stays."""
    folder = tmp_path / "c"
    build(folder, range(1, 8))
    path = folder / shard_name(1)
    good = path.read_bytes()
    path.write_bytes(good[:-8] + bytes(8))
    slow = CacheWriter(folder, RECIPE, range(1, 8), 2, "")
    whole, take = RegionCache(folder).manifest, Claims.take

    def mended_meanwhile(claims, name):  # between the look and the claim of the slow one
        path.write_bytes(good)
        return take(claims, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "take", mended_meanwhile)
        assert slow.remove_damaged() == []
    assert path.read_bytes() == good and RegionCache(folder).manifest == whole
    path.write_bytes(good[:-8] + bytes(8))
    assert slow.remove_damaged(only={0, 2}) == [] and slow.remove_damaged(only={1}) == [1]


def test_what_another_has_written_meanwhile_stands(tmp_path):
    build(tmp_path / "c", range(1, 8))
    times = (tmp_path / "c" / shard_name(2)).stat().st_mtime_ns
    writer = CacheWriter(tmp_path / "c", RECIPE, range(1, 8), 2, "")
    writer.write(2, [regions(1, 9) for _ in writer.shards[2]], {"device": "another"})
    assert (tmp_path / "c" / shard_name(2)).stat().st_mtime_ns == times


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*_, **__):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SetupError, match=r"shard-00000.*No space left.*GB are free there: free disk space"):
        build(tmp_path / "c", range(1, 8))
    assert not list((tmp_path / "c").glob("shard*")) and not list((tmp_path / "c").glob("*.lock"))


def test_only_a_share_of_the_shards(tmp_path):
    """Two tasks of an array: the one that ends last completes the manifest."""
    for number, left in ((1, [0, 2]), (0, [])):
        writer = CacheWriter(tmp_path / "c", RECIPE, range(1, 8), 2, "all")
        for index in writer.claimed(only={i for i in range(4) if i % 2 == number}):
            writer.write(index, [regions(i % 4, i) for i in writer.shards[index]])
        assert writer.missing() == left and bool(writer.finish()) == (not left)
    build(tmp_path / "whole", range(1, 8))
    for name in map(shard_name, range(4)):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_facts_of_a_shard_are_in_the_manifest(tmp_path):
    writer = CacheWriter(tmp_path / "c", RECIPE, [1, 2], 2, "")
    for index in writer.claimed():
        writer.write(index, [regions(1), regions(0)], {"threads": 2, "unreadable": {"2": "truncated"}})
    assert writer.finish()["shards"][0]["threads"] == 2
    assert RegionCache(tmp_path / "c").manifest["shards"][0]["unreadable"] == {"2": "truncated"}


@given(st.permutations([3, 7, 9, -1, 8]))
@settings(max_examples=20, deadline=None)
def test_by_annotation(tmp_path_factory, wanted):
    folder = tmp_path_factory.mktemp("annotations")
    made = regions(4, 5, [9, 3, -1, 7])
    cache = build(folder, [5], make=lambda _: made)
    embeddings, found = cache.of_annotations(5, wanted)
    for ann_id, row, there in zip(wanted, embeddings, found):
        assert bool(there) == (ann_id in (3, 7, 9))
        assert torch.equal(row, made.embeddings[[9, 3, -1, 7].index(ann_id)] if there else torch.zeros(4).half())
    assert cache.missing == 2
    assert cache.of_annotations(5, [])[0].shape == (0, 4)
    embeddings, found = build(folder / "none", [5], make=lambda _: regions(0)).of_annotations(5, [7])
    assert embeddings.tolist() == [[0, 0, 0, 0]] and found.tolist() == [False]


def read_in_worker(cache, image_id, queue):
    queue.put(cache.regions(image_id).embeddings.float().sum().item())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reader_in_processes_however_started(tmp_path, method):
    cache = build(tmp_path / "c", range(1, 8))
    expected = cache.regions(6).embeddings.float().sum().item()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    workers = [context.Process(target=read_in_worker, args=(cache, 6, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=60) for _ in workers] == [expected, expected]
    for worker in workers:
        worker.join()


def test_shard_of_another_cache_is_refused_when_read(tmp_path):
    build(tmp_path / "a", range(1, 8), recipe=RECIPE | {"dataset": "another!!!!!!!"})
    cache = build(tmp_path / "b", range(1, 8))
    shutil.copy(tmp_path / "a" / shard_name(1), tmp_path / "b" / shard_name(1))
    with pytest.raises(CacheError, match="not a shard of this cache"):
        cache.regions(3)


@pytest.mark.parametrize("image_id", [0, 5, 99])
def test_image_without_entry(tmp_path, image_id):
    cache = build(tmp_path / "c", [1, 2, 3, 4, 7, 8])
    with pytest.raises(CacheError, match=f"no entry for image id {image_id}"):
        cache.regions(image_id)


def test_other_teacher_names_both(tmp_path):
    cache = build(tmp_path / "c", [1])
    cache.require_teacher(TEACHER, "the vocabulary")
    cache.require_teacher(Fingerprint.stated("ViT-B-32", "openai"), "a table")
    with pytest.raises(CacheError, match="teacher ViT-B-32 / openai .a{12}.*teacher ViT-B-32 / openai .b{12}"):
        cache.require_teacher(Fingerprint("ViT-B-32", "openai", "b" * 64), "the vocabulary")


@pytest.fixture
def micro(tmp_path, monkeypatch):
    """Configuration of a distilling run on the micro data set, with its cache."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    json_file = tmp_path / "micro" / "train.json"
    build(tmp_path / "cache", range(1, 13), 5, RECIPE | {"dataset_sha256": sha256_file(json_file)})
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("ov_micro_train",)
    cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED = "ViT-B-32", "openai"
    cfg.MODEL.VILD.WEIGHT, cfg.MODEL.VILD.REGION_CACHE = 0.5, str(tmp_path / "cache")
    return cfg


def record_of(tmp_path, image_id=3, **changes):
    path = tmp_path / "micro" / "images" / f"{image_id:04d}.png"
    width, height = Image.open(path).size
    return {"file_name": str(path), "image_id": image_id, "width": width, "height": height, "annotations": []} | changes


def test_configured_cache_is_checked(micro, tmp_path):
    assert len(open_region_cache(micro, micro.DATASETS.TRAIN)) == 12
    micro.MODEL.TEACHER.ARCHITECTURE = "ViT-B-16"
    with pytest.raises(CacheError, match="ViT-B-32 / openai.*ViT-B-16 / openai"):
        open_region_cache(micro, micro.DATASETS.TRAIN)
    micro.MODEL.TEACHER.ARCHITECTURE = "ViT-B-32"
    json_file = tmp_path / "micro" / "train.json"
    json_file.write_text(json.dumps(json.loads(json_file.read_text()) | {"info": {}}))
    with pytest.raises(CacheError, match="was built for ov_micro_train with annotations of SHA-256"):
        open_region_cache(micro, micro.DATASETS.TRAIN)
    micro.DATASETS.TRAIN = ("ov_micro_train", "ov_micro_val")
    with pytest.raises(UsageError, match="merge their jsons"):
        open_region_cache(micro, micro.DATASETS.TRAIN)
    micro.MODEL.VILD.REGION_CACHE = ""
    with pytest.raises(UsageError, match="REGION_CACHE is empty"):
        open_region_cache(micro, micro.DATASETS.TRAIN)


def test_mapper_attaches_regions_in_training_only(micro, tmp_path):
    mapped = build_sample_maker(micro, True)(record_of(tmp_path))
    found = mapped.attached(CachedRegions)
    assert found.boxes_xyxy.shape == (3, 4) and found.embeddings.shape == (3, 4)
    scale = mapped["image"].shape[1] / Image.open(record_of(tmp_path)["file_name"]).height
    there = regions(3, 3).boxes_xyxy * scale
    mirrored = mapped["image"].shape[2] - there[:, [2, 1, 0, 3]]
    mirrored[:, [1, 3]] = there[:, [1, 3]]
    assert scale > 2 and any(torch.allclose(found.boxes_xyxy, box, rtol=0.02) for box in (there, mirrored))
    assert not any(isinstance(step, AttachCachedRegions) for step in build_sample_maker(micro, False).steps)
    micro.MODEL.VILD.WEIGHT = 0.0
    assert not build_sample_maker(micro, True)(record_of(tmp_path)).attachments


def test_a_box_of_an_annotation_outside_the_training_set_stops_the_run(micro, tmp_path):
    """Annotation 4 is of the novel class: it is in the json of the test set only."""
    build(
        tmp_path / "leak",
        range(1, 13),
        recipe=open_region_cache(micro, micro.DATASETS.TRAIN).manifest["recipe"] | {"boxes": {"source": "annotations"}},
        make=lambda image_id: regions(2, image_id, [3, 4]),
    )
    micro.MODEL.VILD.REGION_CACHE = str(tmp_path / "leak")
    mapper = build_sample_maker(micro, True)
    box = {"bbox": [1, 1, 20, 20], "bbox_mode": 1, "category_id": 0}
    made = mapper(record_of(tmp_path, annotations=[box | {"id": 3}, box | {"id": 4}]))
    assert len(made.attached(CachedRegions).boxes_xyxy) == 2
    leaking = record_of(tmp_path, annotations=[box | {"id": 3}])
    records = MappedRecords([leaking, record_of(tmp_path, 4)], mapper, max_bad=10)
    for workers in (0, 1):  # no skipping to the next image, and a readable message out of a loader process
        loader = SourceStream(records, lambda seed: iter([0, 1]), 1, num_workers=workers)
        with pytest.raises(CacheError, match=r"^[^\n]*image id 3: regions belong to the annotations \[4\]"):
            next(iter(loader))


@pytest.mark.parametrize("box", [[5, 5, 80, 20], [-3, 5, 10, 20], [10, 5, 10, 20], [0, 0, float("nan"), 9]])
def test_region_outside_the_image(micro, tmp_path, box):
    bad = regions(1)
    bad.boxes_xyxy[0] = torch.tensor(box)
    recipe = open_region_cache(micro, micro.DATASETS.TRAIN).manifest["recipe"]
    build(tmp_path / "bad", range(1, 13), recipe=recipe, make=lambda _: bad)
    micro.MODEL.VILD.REGION_CACHE = str(tmp_path / "bad")
    with pytest.raises(CacheError, match="image id 4: region .* is no box inside the image of 64x48 pixels"):
        build_sample_maker(micro, True)(record_of(tmp_path, 4))


def test_regions_follow_their_image():
    """Resize to 2x and 3x, flip, and crop: a box drawn as pixels lands where its transformed region says."""
    canvas = np.zeros((48, 64, 3), dtype=np.uint8)
    canvas[10:30, 8:24] = 255
    cached = Regions(
        torch.tensor([[8.0, 10.0, 24.0, 30.0]]), torch.zeros(1, 4).half(), torch.tensor([-1]), torch.ones(1)
    )
    steps = [T.Resize((96, 192)), T.RandomFlip(prob=1.0), CropTransform(90, 6, 90, 84)]
    augmented = T.AugInput(canvas)
    transforms = T.AugmentationList(steps)(augmented)
    found = transform_regions(cached, transforms, augmented.image.shape[:2], 10)[0][0]
    rows, columns = np.nonzero(augmented.image[:, :, 0] > 127)
    drawn = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()
    assert torch.allclose(found, drawn, atol=0.25)


@given(st.integers(41, 900), st.integers(41, 900), st.integers(50, 1333), st.integers(50, 1333), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_boxes_of_a_resized_and_flipped_image_agree_to_a_thousandth_of_a_pixel(
    height, width, to_height, to_width, seed
):
    cached = regions(5, seed, size=(height, width))
    transforms = TransformList([ResizeTransform(height, width, to_height, to_width), HFlipTransform(to_width)])
    found = transform_regions(cached, transforms, (to_height, to_width), 10)[0].double()
    wanted = cached.boxes_xyxy.double() * torch.tensor([to_width / width, to_height / height] * 2, dtype=torch.float64)
    wanted[:, [0, 2]] = to_width - wanted[:, [2, 0]]
    assert torch.allclose(found, wanted, rtol=0, atol=1e-3)


def test_a_sample_does_not_take_its_shard_along(tmp_path):
    """What a loader process sends is the storage of a tensor, not its view."""
    cache = build(tmp_path / "c", [1, 2, 3], 3, make=lambda image_id: regions(3, image_id))
    sent = transform_regions(cache.regions(2), TransformList([NoOpTransform()]), (48, 64), 10)[1]
    assert sent.shape == (3, 4) and sent.untyped_storage().nbytes() == 3 * 4 * 2


def test_regions_cropped_away_are_dropped_and_cut_ones_clipped():
    cached = regions(3)
    cached.boxes_xyxy[:] = torch.tensor([[2.0, 2.0, 20.0, 20.0], [30.0, 10.0, 50.0, 40.0], [40.0, 20.0, 60.0, 40.0]])
    crop = TransformList([CropTransform(25, 5, 20, 30)])
    found = CachedRegions(*transform_regions(cached, crop, (30, 20), 10))
    assert torch.equal(found.boxes_xyxy, torch.tensor([[5.0, 5.0, 20.0, 30.0], [15.0, 15.0, 20.0, 30.0]]))
    assert torch.equal(found.embeddings, cached.embeddings[1:])
    assert len(transform_regions(cached, TransformList([CropTransform(61, 45, 3, 3)]), (3, 3), 10)[0]) == 0
    assert len(transform_regions(regions(0), TransformList([HFlipTransform(64)]), (48, 64), 10)[0]) == 0


def test_more_regions_than_wanted_are_drawn_at_random():
    cached, seen = regions(20), set()
    for seed in range(10):
        np.random.seed(seed)
        found = CachedRegions(*transform_regions(cached, TransformList([NoOpTransform()]), (48, 64), 6))
        chosen = [int((cached.boxes_xyxy == box).all(dim=1).nonzero()[0, 0]) for box in found.boxes_xyxy]
        assert len(set(chosen)) == 6 and torch.equal(found.embeddings, cached.embeddings[chosen])
        seen |= set(chosen)
    assert len(seen) > 15
