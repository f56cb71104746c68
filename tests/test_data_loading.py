"""Decoding, the steps of a sample, and the order and position of the training stream."""

import copy
import itertools
import json
import random
import struct
import warnings

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovdet2.data import loader as loading
from ovdet2.data.mapped_records import MappedRecords
from ovdet2.data.records import load_records
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.data.stream import SourceStream
from ovdet2.errors import DataError, UsageError
from ovdet2.io.images import MIN_SIDE, read_image
from tests.micro_training import micro_cfg, write_data

GREY = np.linspace(0, 255, 40 * 60).reshape(40, 60)


@pytest.fixture
def data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def saved(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def colour_image():
    return Image.fromarray(np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2).astype(np.uint8))


class TestDecoding:
    def test_colour_orders(self, tmp_path):
        path = saved(tmp_path, colour_image())
        rgb = read_image(path, "RGB")
        assert rgb.shape == (40, 60, 3) and rgb.dtype == np.uint8 and rgb.flags.c_contiguous
        assert np.array_equal(rgb, np.asarray(colour_image()))
        assert np.array_equal(read_image(path, "BGR"), rgb[:, :, ::-1])
        assert read_image(path, "L").shape == (40, 60, 1)
        with pytest.raises(UsageError, match="INPUT.FORMAT"):
            read_image(path, "HSV")

    def test_grayscale_is_repeated(self, tmp_path):
        pixels = read_image(saved(tmp_path, Image.fromarray(GREY.astype(np.uint8))))
        assert np.array_equal(pixels, np.repeat(GREY.astype(np.uint8)[:, :, None], 3, axis=2))

    def test_sixteen_bits_are_scaled_not_clipped(self, tmp_path):
        """Pillow's own conversion turns every value above 255 into white."""
        image = Image.fromarray((GREY * 257).astype(np.uint16))
        pixels = read_image(saved(tmp_path, image))
        assert abs(pixels[:, :, 0].astype(int) - GREY).max() <= 1 and pixels.std() > 60

    def test_cmyk(self, tmp_path):
        path = saved(tmp_path, colour_image().convert("CMYK"), "image.jpg", quality=95)
        difference = read_image(path).astype(int) - np.asarray(colour_image())
        assert read_image(path).shape == (40, 60, 3) and abs(difference).mean() < 6

    def test_alpha_and_palette(self, tmp_path):
        expected = np.asarray(colour_image())
        assert np.array_equal(read_image(saved(tmp_path, colour_image().convert("RGBA"))), expected)
        assert read_image(saved(tmp_path, colour_image().convert("P"), "palette.png")).shape == expected.shape

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_rotation_shows_the_image_upright(self, tmp_path, orientation):
        upright = np.asarray(colour_image())
        # What a camera stores so that the given orientation shows it upright.
        stored = {
            1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
            5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2),
            8: np.rot90(upright, -1),
        }[orientation]  # fmt: skip
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
        assert np.array_equal(read_image(path), upright)

    def test_damaged_exif_is_ignored(self, tmp_path):
        path = saved(tmp_path, colour_image(), "image.jpg", exif=b"Exif\0\0MM\0*" + struct.pack(">I", 9999) + b"x" * 9)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert read_image(path).shape == (40, 60, 3)

    @pytest.mark.parametrize("ending", ["jpg", "png"])
    def test_truncated(self, tmp_path, ending):
        path = saved(tmp_path, colour_image(), f"cut.{ending}")
        content = path.read_bytes()
        for length in (len(content) // 2, 30):
            path.write_bytes(content[:length])
            with pytest.raises(DataError, match=rf"cut.{ending}.*(download|damaged)"):
                read_image(path)

    @pytest.mark.parametrize(
        "content, reason",
        [
            (b"", "the file is empty"),
            (b"<!DOCTYPE html><html>not found</html>", "HTML"),
            (b"\x7fELF" * 9, "its format is not among JPEG"),
        ],
    )
    def test_not_an_image(self, tmp_path, content, reason):
        path = tmp_path / "page.jpg"
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"page.jpg.*{reason}"):
            read_image(path)

    @pytest.mark.parametrize("size", [(1, 1), (MIN_SIDE - 1, 200), (20000, 20)])
    def test_too_small(self, tmp_path, size):
        with pytest.raises(DataError, match=f"small.png is {size[0]}x{size[1]}.*32 pixels"):
            read_image(saved(tmp_path, Image.new("RGB", size), "small.png"))

    def test_pixel_bomb(self, tmp_path, monkeypatch):
        path = saved(tmp_path, colour_image(), "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DataError, match="bomb.png is too large"):
            read_image(path)

    def test_missing_folder_and_floats(self, tmp_path):
        for path in (tmp_path, tmp_path / "absent.jpg"):
            with pytest.raises(DataError, match="does not exist"):
                read_image(path)
        path = saved(tmp_path, Image.fromarray(GREY.astype(np.float32)), "float.tiff")
        with pytest.raises(DataError, match="floating-point"):
            read_image(path)


def batches_of(loader, count):
    """(image id, image, boxes) of the next batches, from a fresh iterator."""
    found = []
    for batch in itertools.islice(loader, count):
        found.append([(r["image_id"], r["image"], r["instances"].gt_boxes.tensor) for r in batch])
    return found


def same(left, right):
    return len(left) == len(right) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        for x, y in zip(left, right)
        for a, b in zip(x, y, strict=True)
    )


def train_loader(data_root, *overrides):
    return loading.build_train_loader(micro_cfg(data_root / "out", overrides))


class TestTrainingStream:
    def test_workers_change_nothing(self, data_root):
        none = batches_of(train_loader(data_root), 7)
        assert same(none, batches_of(train_loader(data_root, "DATALOADER.NUM_WORKERS", "2"), 7))
        assert len({image.shape for batch in none for _, image, _ in batch}) > 2, "augmentations vary"
        assert not same(none, batches_of(train_loader(data_root, "SEED", "8"), 7))

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_resumes_at_its_position(self, data_root, workers):
        straight = batches_of(train_loader(data_root, "DATALOADER.NUM_WORKERS", workers), 9)
        first = train_loader(data_root, "DATALOADER.NUM_WORKERS", workers)
        batches_of(first, 4)
        second = train_loader(data_root, "DATALOADER.NUM_WORKERS", workers, "SEED", "99")
        second.load_state_dict(first.state_dict())
        assert same(straight[4:], batches_of(second, 5))

    def test_global_generators_are_not_touched(self, data_root):
        for seed_of in (random.seed, np.random.seed, torch.manual_seed):
            seed_of(3)
        expected = random.random(), np.random.rand(), torch.rand(1).item()
        for seed_of in (random.seed, np.random.seed, torch.manual_seed):
            seed_of(3)
        batches_of(train_loader(data_root), 2)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected

    def test_each_epoch_is_a_permutation_and_batches_have_one_orientation(self, data_root):
        ungrouped = train_loader(data_root, "DATALOADER.ASPECT_RATIO_GROUPING", "False")
        ids = [image_id for batch in batches_of(ungrouped, 6) for image_id, _, _ in batch]
        assert sorted(ids[:12]) == sorted(ids[12:]) == list(range(1, 13)) and ids[:12] != ids[12:]
        for batch in itertools.islice(train_loader(data_root), 9):
            assert len({record["width"] > record["height"] for record in batch}) == 1 and len(batch) == 4

    @pytest.mark.parametrize("old, new", [(1, 2), (2, 1), (2, 3)])
    def test_changed_number_of_processes(self, old, new, monkeypatch, data_root, caplog):
        """What comes after a resume with other processes is what had not come before, each image once an epoch."""

        def images(world_size, batches, state=None):
            """Image ids over all processes, and the position after them."""
            monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
            monkeypatch.setattr(comm, "gather", lambda data: [data] * world_size)
            drawn, loader = [], None
            for rank in range(world_size):
                monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
                loader = train_loader(
                    data_root, "DATALOADER.ASPECT_RATIO_GROUPING", "False", "SOLVER.IMS_PER_BATCH", "6"
                )
                if state:
                    loader.load_state_dict(state)
                drawn += [r["image_id"] for batch in itertools.islice(loader, batches) for r in batch]
            return drawn, loader.state_dict()

        before, state = images(old, 1)
        after, _ = images(new, 3, state)
        assert len(before) == 6 and len(after) == 18
        assert sorted(before + after) == sorted(list(range(1, 13)) * 2)
        assert f"had {old} processes" in caplog.text

    def test_rare_classes_may_be_repeated(self, data_root):
        loader = train_loader(data_root, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
        assert len(batches_of(loader, 3)) == 3
        with pytest.raises(UsageError, match="SAMPLER_TRAIN"):
            train_loader(data_root, "DATALOADER.SAMPLER_TRAIN", "Shuffled")

    def test_batch_that_cannot_be_divided(self, data_root, monkeypatch):
        monkeypatch.setattr(comm, "get_world_size", lambda: 3)
        with pytest.raises(UsageError, match="IMS_PER_BATCH is 4.*number, 3"):
            train_loader(data_root)


def damage(data_root, numbers):
    for number in numbers:
        (data_root / "micro" / "images" / f"{number:04d}.png").write_bytes(b"<html>")


class TestBadImages:
    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_skipped_counted_once_and_batches_stay_full(self, data_root, workers, caplog):
        damage(data_root, [2, 5])
        loader = train_loader(data_root, "DATALOADER.NUM_WORKERS", workers)
        found = batches_of(loader, 12)
        assert all(len(batch) == 4 for batch in found)
        assert not {2, 5} & {image_id for batch in found for image_id, _, _ in batch}
        assert sorted(path[-8:] for path in loader.bad_images) == ["0002.png", "0005.png"]
        assert caplog.text.count("Skipped training image") == 2

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_ceiling_names_the_files(self, data_root, workers):
        damage(data_root, [2, 5, 6])
        loader = train_loader(data_root, "DATALOADER.MAX_BAD_IMAGES", "2", "DATALOADER.NUM_WORKERS", workers)
        with pytest.raises(DataError, match=r"(?s)^3 of 12.*MAX_BAD_IMAGES") as caught:
            batches_of(loader, 12)
        assert all(f"000{number}.png" in str(caught.value) for number in (2, 5, 6))

    @pytest.mark.parametrize("ceiling", ["0", "100"])
    def test_all_bad_ends(self, data_root, ceiling):
        """Detectron2 would try for ever."""
        damage(data_root, range(1, 13))
        with pytest.raises(DataError, match="of 12 training images cannot be used"):
            batches_of(train_loader(data_root, "DATALOADER.MAX_BAD_IMAGES", ceiling), 1)

    @pytest.mark.parametrize("workers", ["0", "2"])
    @pytest.mark.parametrize("repeated", [3, 12])
    def test_several_records_of_one_missing_file_count_once(self, data_root, repeated, workers):
        """No batch holds None, whatever the share of such records; the ceiling counts files."""
        path = data_root / "micro" / "train.json"
        data = json.loads(path.read_text())
        for image in data["images"][:repeated]:
            image |= {"file_name": "absent.png", "width": 64, "height": 48}
        path.write_text(json.dumps(data))
        loader = train_loader(data_root, "DATALOADER.MAX_BAD_IMAGES", "1", "DATALOADER.NUM_WORKERS", workers)
        if repeated == 12:
            with pytest.raises(DataError, match="(?s)^1 of 12 training images cannot be used.*absent.png"):
                batches_of(loader, 1)
            return
        found = batches_of(loader, 12)
        assert all(len(batch) == 4 for batch in found)
        assert [path[-10:] for path in loader.bad_images] == ["absent.png"]
        strict = train_loader(data_root, "DATALOADER.MAX_BAD_IMAGES", "0", "DATALOADER.NUM_WORKERS", workers)
        with pytest.raises(DataError, match="(?s)^1 of 12.*absent.png"):
            batches_of(strict, 12)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.sets(st.integers(0, 3)), st.integers(0, 4))
    def test_an_item_has_a_sample_or_too_many_bad_files(self, files, unreadable, max_bad):
        """Whatever share of the records has unreadable files, and however many records have one file."""

        def make(record):
            if int(record["file_name"]) in unreadable:
                raise DataError(f"{record['file_name']} is damaged")
            return record

        dataset = MappedRecords([{"file_name": str(file)} for file in files], make, max_bad=max_bad)
        for place in range(len(files)):
            sample, faults = dataset[(place, place)]
            bad = {path for path, _ in faults}
            assert sample is not None or len(bad) > max_bad or set(files) <= unreadable
            assert bad <= set(map(str, unreadable))
        stream = SourceStream(dataset, lambda seed: itertools.cycle(range(len(files))), 2)
        try:
            batches = list(itertools.islice(stream, 5))
        except DataError:
            return
        assert all(sample is not None for batch in batches for sample in batch)

    @pytest.mark.parametrize("counted_by", ["this process", "two others"])
    def test_a_resumed_run_goes_on_counting(self, data_root, counted_by):
        """Without that, an interrupted run could skip MAX_BAD_IMAGES images again after each --resume."""
        damage(data_root, [2])
        options = "DATALOADER.MAX_BAD_IMAGES", "2"
        first = train_loader(data_root, *options)
        batches_of(first, 6)
        state = json.loads(json.dumps(first.state_dict()))  # plain values, which a checkpoint can hold
        saved = state["sources"]["DATASETS.TRAIN"]
        (counted,) = saved["bad_images"]
        assert [path[-8:] for path in counted] == ["0002.png"]
        if counted_by == "two others":
            saved["bad_images"] = [counted, {"other.png": "other.png is damaged"}]
        damage(data_root, [5] if counted_by == "two others" else [5, 6])
        second = train_loader(data_root, *options)
        second.load_state_dict(state)
        with pytest.raises(DataError, match="(?s)^3 of 12.*0002.png"):
            batches_of(second, 9)

    def test_maker_that_returns_nothing_ends(self, data_root):
        loader = loading.build_train_loader(micro_cfg(data_root / "out"), maker=lambda record: None)
        with pytest.raises(DataError, match="the sample maker returned nothing"):
            batches_of(loader, 1)

    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_none_is_tolerated_at_evaluation(self, data_root, workers):
        cfg = micro_cfg(data_root / "out", ["DATALOADER.NUM_WORKERS", workers])
        assert [batch[0]["image_id"] for batch in loading.build_test_loader(cfg, "ov_micro_val")] == list(range(1, 13))
        damage(data_root, [9])
        with pytest.raises(DataError, match=r"^[^\n]*0009.png.*cannot be skipped"):
            list(loading.build_test_loader(cfg, "ov_micro_val"))

    def test_small_training_image_is_skipped(self, data_root):
        path = data_root / "micro" / "images" / "0003.png"
        Image.new("RGB", (31, 200)).save(path)
        loader = train_loader(data_root)
        batches_of(loader, 9)
        assert list(loader.bad_images) == [str(path)]


class TestSteps:
    def test_boxes_follow_the_augmentation(self, data_root):
        cfg = micro_cfg(data_root / "out", ["INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.RANDOM_FLIP", "none"])
        record = load_records(["ov_micro_train"], "DATASETS.TRAIN", True)[0]
        before = copy.deepcopy(record)
        mapped = build_sample_maker(cfg, True)(record)
        assert mapped["image"].shape == (3, 96, 128) and mapped["image"].dtype == torch.uint8
        x, y, w, h = record["annotations"][0]["bbox"]
        expected = torch.tensor([x, y, x + w, y + h]) * 2.0
        assert torch.allclose(mapped["instances"].gt_boxes.tensor[0], expected)
        assert record == before and "annotations" not in mapped
        assert mapped.pixels is None and mapped.transforms is None and mapped.kept is None
        assert (mapped.kind, mapped.source) == ("boxes", "DATASETS.TRAIN")

    def test_other_size_than_annotated(self, data_root):
        record = load_records(["ov_micro_train"], "DATASETS.TRAIN", True)[0]
        record["width"] += 1
        with pytest.raises(DataError, match=r"image id 1\) is 64x48 pixels but the annotations state 65x48"):
            build_sample_maker(micro_cfg(data_root / "out"), True)(record)

    def test_pickled_proposals_are_refused(self, data_root):
        with pytest.raises(UsageError, match="LOAD_PROPOSALS"):
            build_sample_maker(micro_cfg(data_root / "out", ["MODEL.LOAD_PROPOSALS", "True"]), True)


class TestNovelLabels:
    """None may reach training (contract 4), however the data set was registered."""

    def test_registered_without_base_only(self, data_root):
        (data_root / "micro" / "train.json").write_text((data_root / "micro" / "val.json").read_text())
        with pytest.raises(
            DataError, match=r"ov_micro_train holds 6 .*novel.* images 1, 3, 5, 7, 9, \.\.\.: .*base_only=True"
        ):
            train_loader(data_root)

    def test_evaluation_set(self, data_root):
        for names in ("('ov_micro_val',)", "('ov_micro_train', 'ov_micro_val')"):
            with pytest.raises(DataError, match="ov_micro_val holds 6"):
                train_loader(data_root, "DATASETS.TRAIN", names)

    def test_evaluation_set_of_ov_shapes(self, data_root):
        from ovdet2.data.datasets.ov_shapes import ensure_generated

        ensure_generated(data_root, counts={"train2017": 1, "val2017": 4}, workers=1)
        names = "DATASETS.TRAIN", "('ov_shapes_val_all',)", "DATASETS.TEST", "('ov_shapes_val_all',)"
        with pytest.raises(DataError, match="ov_shapes_val_all holds .* of OV-Shapes 48/17"):
            train_loader(data_root, *names)

    def test_single_crowd_in_an_image_that_is_left_out(self, data_root):
        path = data_root / "micro" / "train.json"
        data = json.loads(path.read_text())
        for box in data["annotations"]:
            box["iscrowd"] = int(box["image_id"] == 7)
        path.write_text(json.dumps(data))
        assert 7 not in {record["image_id"] for record in train_loader(data_root).sources[0].records}
        next(box for box in data["annotations"] if box["iscrowd"])["category_id"] = 5
        path.write_text(json.dumps(data))
        with pytest.raises(DataError, match="ov_micro_train holds 1 .*images 7: "):
            train_loader(data_root)


@pytest.mark.parametrize("names", ["()", "('no_such_set',)"])
def test_unknown_data_set_lists_the_known(data_root, names):
    with pytest.raises(UsageError, match="(?s)DATASETS.TRAIN.*ov_coco_train_base"):
        train_loader(data_root, "DATASETS.TRAIN", names)


def test_builtin_data_set_that_is_missing(data_root):
    with pytest.raises(DataError, match="coco_2017_val.*DETECTRON2_DATASETS"):
        load_records(["coco_2017_val"], "DATASETS.TEST", False)


def test_several_data_sets_are_joined(data_root):
    assert len(load_records(["ov_micro_train", "ov_micro_val"], "DATASETS.TRAIN", False)) == 24
    with pytest.raises(UsageError, match="cannot be joined"):
        from detectron2.data import MetadataCatalog

        MetadataCatalog.get("ov_micro_val").__dict__["thing_classes"] = ["other"]
        try:
            load_records(["ov_micro_train", "ov_micro_val"], "DATASETS.TRAIN", False)
        finally:
            MetadataCatalog.get("ov_micro_val").__dict__["thing_classes"] = ["disc", "bar", "ring"]
