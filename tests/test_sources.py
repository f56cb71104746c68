"""Several sources of training images at once: order, positions, independence of each other, old states, refusals."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from ovdet2.config import load_config
from ovdet2.config.method import Method
from ovdet2.data import source_spec
from ovdet2.data.loader import build_train_loader, next_source
from ovdet2.data.records import load_records
from ovdet2.data.samples import BOXES, CAPTIONS, IMAGE_LABELS
from ovdet2.data.source_spec import SourceSpec, source_specs
from ovdet2.engine.start import scaled
from ovdet2.errors import DataError, UsageError
from tests.micro_training import SPLIT, micro_cfg, write_data

COUNT = 12


class LazyCaptions:
    """Captioned images whose records are made when they are asked for."""

    def __init__(self, root, count):
        self.root, self.count = root, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        path = self.root / "micro" / "images" / f"{index + 1:04d}.png"
        return {"file_name": str(path), "image_id": index + 1, "captions": (f"image {index + 1}",)}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """The micro data set, with captions ("micro_captions", "micro_lazy") and labels ("micro_labels") of its images."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    lazy = LazyCaptions(tmp_path, COUNT)

    def captions():
        sizes = [(64, 48) if number % 3 else (48, 64) for number in range(1, COUNT + 1)]
        return [record | {"width": w, "height": h} for record, (w, h) in zip(lazy, sizes)]

    labels = [{**record, "labels": (record["image_id"] % 2,)} for record in lazy]
    sets = {"micro_captions": captions, "micro_lazy": lambda: lazy, "micro_labels": lambda: labels}
    for name, load in sets.items():
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(ov_kind=IMAGE_LABELS if name == "micro_labels" else CAPTIONS)
    MetadataCatalog.get("micro_labels").set(ov_split=lambda: SPLIT)
    yield labels
    for name in sets:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def entry(name="micro_captions", images=2, **more):
    return {"name": name, "images": images, **more}


def loader_of(data_or_root, *sources, options=(), mix="parallel"):
    cfg = micro_cfg("out", [*options, "DATASETS.SOURCES", list(sources), "DATALOADER.MIX", mix])
    return build_train_loader(cfg)


def drawn(loader, steps):
    """[(source, image id, image), ...] of each of the next steps."""
    batches = itertools.islice(loader, steps)
    return [[(sample.source, sample.image_id, sample.image) for sample in batch] for batch in batches]


def equal(left, right):
    return len(left) == len(right) and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for x, y in zip(left, right) for a, b in zip(x, y, strict=True)
    )


def only(batches, source):
    return [item for batch in batches for item in batch if item[0] == source]


def saved_and_read(loader):
    return json.loads(json.dumps(loader.state_dict()))  # plain values, which a checkpoint can hold


class TestParallel:
    def test_a_batch_has_the_images_of_all_sources_boxes_first(self, data):
        loader = loader_of(data, entry(images=3, min_size=[40]), entry("micro_labels", 1))
        for batch in itertools.islice(loader, 4):
            assert [sample.kind for sample in batch] == [BOXES] * 4 + [CAPTIONS] * 3 + [IMAGE_LABELS]
            assert [sample.source for sample in batch] == ["DATASETS.TRAIN"] * 4 + ["micro_captions"] * 3 + [
                "micro_labels"
            ]
            for sample in batch[4:7]:
                assert sample.captions == (f"image {sample.image_id}",) and "instances" not in sample
                assert min(sample.image.shape[1:]) == 40 and sample.height in (48, 64) and not sample.labels
            assert batch[7].labels == (batch[7].image_id % 2,) and "instances" not in batch[7]
            assert all(len(sample.instances) for sample in batch[:4])
            assert len({sample.width > sample.height for sample in batch[4:7]}) == 1  # of one orientation

    def test_the_first_source_draws_as_if_it_were_the_only_one(self, data):
        alone = drawn(loader_of(data), 7)
        mixed = drawn(loader_of(data, entry(), entry("micro_lazy", 1)), 7)
        assert equal(alone, [[item for item in batch if item[0] == "DATASETS.TRAIN"] for batch in mixed])

    def test_two_sources_of_one_data_set_share_no_random_numbers(self, data):
        options = "DATALOADER.ASPECT_RATIO_GROUPING", "False"
        again = entry("again", 4, datasets=["ov_micro_train"])
        more = entry("and again", 4, datasets=["ov_micro_train"])
        batches = drawn(loader_of(data, again, more, options=options), 3)
        orders = [[item[1] for item in only(batches, name)] for name in ("DATASETS.TRAIN", "again", "and again")]
        assert all(sorted(order) == list(range(1, COUNT + 1)) for order in orders)
        assert orders[0] != orders[1] != orders[2] != orders[0]
        shapes = [
            [tuple(image.shape) for _, _, image in sorted(only(batches, name), key=lambda item: item[1])]
            for name in ("DATASETS.TRAIN", "again", "and again")
        ]
        assert shapes[0] != shapes[1] != shapes[2] != shapes[0]

    def test_workers_change_nothing(self, data):
        sources = entry(images=2), entry("micro_lazy", 1)
        none = drawn(loader_of(data, *sources), 6)
        assert equal(none, drawn(loader_of(data, *sources, options=["DATALOADER.NUM_WORKERS", "2"]), 6))

    def test_only_captions(self, data):
        loader = loader_of(data, entry(), options=["DATASETS.TRAIN", "()"])
        assert {sample.kind for sample in next(iter(loader))} == {CAPTIONS}

    def test_a_second_source_of_boxes_is_checked_for_novel_classes(self, data):
        with pytest.raises(DataError, match="ov_micro_val holds 6 .*novel"):
            loader_of(data, entry("ov_micro_val"))


class TestAlternate:
    @given(
        ratios=st.lists(st.one_of(st.integers(1, 9), st.floats(0.05, 9)), min_size=1, max_size=4),
        steps=st.integers(1, 80),
    )
    @settings(max_examples=100, deadline=None)
    def test_no_source_gets_ahead_of_its_share_by_a_step(self, ratios, steps):
        turns = [0] * len(ratios)
        for step in range(1, steps + 1):
            turns[next_source(turns, ratios)] += 1
            shares = [ratio / sum(ratios) * step for ratio in ratios]
            assert all(taken < share + 1 for taken, share in zip(turns, shares))
            assert all(taken > share - len(ratios) for taken, share in zip(turns, shares))

    @given(ratios=st.lists(st.integers(1, 5), min_size=1, max_size=4))
    @settings(max_examples=50, deadline=None)
    def test_ratios_are_met_exactly_in_every_round(self, ratios):
        turns = [0] * len(ratios)
        for number in range(1, 4):
            for _ in range(sum(ratios)):
                turns[next_source(turns, ratios)] += 1
            assert turns == [ratio * number for ratio in ratios]

    def test_order(self, data):
        loader = loader_of(data, entry(images=2, ratio=2.0), mix="alternate")
        batches = drawn(loader, 9)
        assert all(len({source for source, *_ in batch}) == 1 for batch in batches)
        assert [batch[0][0] for batch in batches[:3]] == ["micro_captions", "DATASETS.TRAIN", "micro_captions"]
        assert Counter(batch[0][0] for batch in batches) == {"micro_captions": 6, "DATASETS.TRAIN": 3}
        assert loader.alternates and not loader_of(data, mix="alternate").alternates

    def test_each_source_goes_through_its_own_stream(self, data):
        parallel = drawn(loader_of(data, entry(ratio=2)), 6)
        alternating = drawn(loader_of(data, entry(ratio=2), mix="alternate"), 9)
        assert equal([only(parallel, "micro_captions")], [only(alternating, "micro_captions")])
        assert equal([only(parallel[:3], "DATASETS.TRAIN")], [only(alternating, "DATASETS.TRAIN")])


class TestResume:
    @pytest.mark.parametrize("mix", ["parallel", "alternate"])
    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_at_any_position(self, data, mix, workers):
        sources = entry(images=3, ratio=2), entry("micro_lazy", 1, ratio=0.5)
        options = ["DATALOADER.NUM_WORKERS", workers]
        straight = drawn(loader_of(data, *sources, options=options, mix=mix), 12)
        for position in (0, 1, 5, 7) if workers == "0" else (4,):
            first = loader_of(data, *sources, options=options, mix=mix)
            drawn(first, position)
            second = loader_of(data, *sources, options=[*options, "SEED", "99"], mix=mix)
            second.load_state_dict(saved_and_read(first))
            assert equal(straight[position:], drawn(second, 12 - position)), position
            assert second.state_dict() == resumed_state(data, sources, options, mix)

    @pytest.mark.parametrize("old, new", [(1, 2), (2, 1)])
    def test_changed_number_of_processes(self, data, old, new, monkeypatch):
        """Of each source comes what had not come before, each image once an epoch."""

        def images(world_size, steps, state=None):
            monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
            monkeypatch.setattr(comm, "gather", lambda data: [data] * world_size)
            found, loader = [], None
            for rank in range(world_size):
                monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
                loader = loader_of(data, entry(images=2), options=["DATALOADER.ASPECT_RATIO_GROUPING", "False"])
                if state:
                    loader.load_state_dict(state)
                found += drawn(loader, steps)
            return found, loader.state_dict()

        before, state = images(old, 1)
        after, _ = images(new, 5, state)
        for source, epochs in (("DATASETS.TRAIN", 2), ("micro_captions", 1)):
            ids = [image_id for _, image_id, _ in only(before + after, source)]
            assert sorted(ids) == sorted(list(range(1, COUNT + 1)) * epochs)

    def test_state_of_a_version_without_sources(self, data):
        straight = drawn(loader_of(data), 6)
        first = loader_of(data)
        drawn(first, 3)
        old = {
            key: value
            for key, value in saved_and_read(first)["sources"]["DATASETS.TRAIN"].items()
            if key not in ("ratio", "turns")
        }
        second = loader_of(data, options=["SEED", "99"])
        second.load_state_dict(old)
        assert equal(straight[3:], drawn(second, 3))

    def test_a_source_more_and_one_less(self, data, caplog):
        straight = drawn(loader_of(data, entry()), 6)
        first = loader_of(data, entry())
        drawn(first, 3)
        second = loader_of(data, entry(), entry("micro_lazy", 1))
        second.load_state_dict(saved_and_read(first))
        found = drawn(second, 3)
        assert "had the sources DATASETS.TRAIN, micro_captions, this one has" in caplog.text
        for name in ("DATASETS.TRAIN", "micro_captions"):
            assert equal([only(straight[3:], name)], [only(found, name)])
        third = loader_of(data)
        third.load_state_dict(saved_and_read(first))
        assert equal([only(straight[3:], "DATASETS.TRAIN")], [only(drawn(third, 3), "DATASETS.TRAIN")])

    def test_turns_start_anew_with_other_ratios(self, data):
        """Else a source that was added, or has a higher ratio now, would have all steps until it has caught up."""
        first = loader_of(data, entry(), mix="alternate")
        drawn(first, 8)
        second = loader_of(data, entry(), entry("micro_lazy", 1), mix="alternate")
        second.load_state_dict(saved_and_read(first))
        assert [batch[0][0] for batch in drawn(second, 3)] == ["DATASETS.TRAIN", "micro_captions", "micro_lazy"]

    def test_a_source_that_shrinks_starts_anew_and_the_others_go_on(self, data, caplog):
        straight = drawn(loader_of(data, entry("micro_lazy")), 6)
        first = loader_of(data, entry("micro_lazy"))
        drawn(first, 3)
        state = saved_and_read(first)
        DatasetCatalog.get("micro_lazy").count = COUNT - 2
        second = loader_of(data, entry("micro_lazy"))
        second.load_state_dict(state)
        found = drawn(second, 5)
        assert "has 10 images, the saved run had 12" in caplog.text
        assert equal([only(straight[3:], "DATASETS.TRAIN")], [only(found[:3], "DATASETS.TRAIN")])
        assert sorted(item[1] for item in only(found, "micro_lazy")) == list(range(1, COUNT - 1))


def resumed_state(data, sources, options, mix):
    loader = loader_of(data, *sources, options=options, mix=mix)
    drawn(loader, 12)
    return loader.state_dict()


def test_unreadable_images_are_counted_for_each_source(data, tmp_path, caplog):
    (tmp_path / "micro" / "images" / "0002.png").write_bytes(b"<html>")
    loader = loader_of(data, entry(images=4))
    batches = drawn(loader, 6)
    assert all(len(batch) == 8 for batch in batches) and 2 not in {item[1] for batch in batches for item in batch}
    assert [path[-8:] for path in loader.bad_images] == ["0002.png"]
    assert caplog.text.count("Skipped training image") == 2
    with pytest.raises(DataError, match="1 of 12.*MAX_BAD_IMAGES is 0"):
        drawn(loader_of(data, entry(images=4), options=["DATALOADER.MAX_BAD_IMAGES", "0"]), 6)


class TestImageLabels:
    def test_of_novel_classes_are_refused_unless_registered_as_such(self, data):
        data[3]["labels"] = (0, 2)
        with pytest.raises(
            DataError, match="1 images of the training set micro_labels .*micro, first 4: .*novel_labels"
        ):
            loader_of(data, entry("micro_labels"))
        assert len(load_records(["micro_labels"], "", False, base_only=False, kind=IMAGE_LABELS)) == COUNT
        MetadataCatalog.get("micro_labels").set(ov_novel_labels=True)
        assert len(drawn(loader_of(data, entry("micro_labels")), 2)) == 2

    def test_of_another_split(self, data):
        MetadataCatalog.get("micro_labels").__dict__["ov_split"] = lambda: None
        with pytest.raises(UsageError, match="micro_labels have different base classes"):
            loader_of(data, entry("micro_labels"))

    def test_rare_labels_may_be_repeated(self, data):
        sampler = "RepeatFactorTrainingSampler"
        for record in data[1:]:
            record["labels"] = (0,)
        options = ["DATALOADER.REPEAT_THRESHOLD", "0.9"]
        batches = drawn(loader_of(data, entry("micro_labels", sampler=sampler), options=options), 40)
        seen = Counter(item[1] for item in only(batches, "micro_labels"))
        assert seen[1] > 2 * np.mean([seen[number] for number in range(2, COUNT + 1)])
        with pytest.raises(UsageError, match="the sampler of micro_captions is 'RepeatFactor.*source with classes"):
            loader_of(data, entry(sampler=sampler))


class TestConfiguration:
    @pytest.mark.parametrize("wrong, words", [
        ({"name": "micro_captions"}, r"lacks \['images'\]"),
        (entry(batch=3), r"unknown keys \['batch'\]"),
        ("micro_captions", "micro_captions"),
        (entry(kind="boxes"), "micro_captions is a data set of captions, the source micro_captions is of boxes"),
        (entry("both", datasets=["micro_captions", "micro_labels"]), "one kind per entry"),
        (entry(ratio=0), "the ratio 0"),
        (entry(images=True), "True images per step"),
        (entry(5), "the name 5"),
        (entry("caps", datasets="micro_captions"), "the datasets 'micro_captions'"),
        (entry(min_size="64"), "the datasets"),
        (entry(min_size=[0]), r"has min_size \[0\] and max_size 0: give pixels"),
        (entry(max_size="64"), "max_size '64'"),
        (entry(images=0), "images of micro_captions in DATASETS.SOURCES is 0"),
        (entry("DATASETS.TRAIN", datasets=["micro_captions"]), "named DATASETS.TRAIN"),
        (entry("unknown"), "the source unknown is .*name registered data sets"),
    ])  # fmt: skip
    def test_wrong_entries(self, data, wrong, words):
        with pytest.raises(UsageError, match=words):
            loader_of(data, wrong)

    def test_captions_are_no_training_set_of_boxes(self, data):
        with pytest.raises(UsageError, match="name others in DATASETS.SOURCES"):
            loader_of(data, options=["DATASETS.TRAIN", "('micro_captions',)"])

    def test_unknown_mix_and_lazy_sets_together(self, data):
        with pytest.raises(UsageError, match="DATALOADER.MIX"):
            loader_of(data, mix="sometimes")
        with pytest.raises(UsageError, match="cannot be joined"):
            loader_of(data, entry("both", datasets=["micro_captions", "micro_lazy"]))
        assert len(loader_of(data, entry("both", datasets=["micro_captions"] * 2)).sources[1].records) == 2 * COUNT

    def test_jitter_and_sizes_of_a_source(self, data):
        options = ["INPUT.LSJ.ENABLED", "True"]
        with pytest.raises(UsageError, match="INPUT.LSJ sets the sizes"):
            loader_of(data, entry("again", datasets=["ov_micro_train"], min_size=40), options=options)
        loader = loader_of(data, entry(min_size=40, max_size=50), options=options)
        assert all(max(image.shape[1:]) <= 50 for *_, image in only(drawn(loader, 3), "micro_captions"))

    def test_from_the_command_line(self, data):
        cfg = load_config("", ["DATASETS.SOURCES", "[{'name': 'micro_captions', 'images': 8, 'ratio': 3}]"])
        cfg.DATASETS.TRAIN = ("ov_micro_train",)
        [boxes, captions] = source_specs(cfg)
        assert (boxes.kind, captions) == (
            BOXES,
            SourceSpec("micro_captions", ("micro_captions",), 8, CAPTIONS, ratio=3),
        )

    def test_methods_add_sources_and_entries_of_their_name_replace_them(self, data, monkeypatch):
        class Captioned(Method):
            def sources(self, cfg):
                return [SourceSpec("micro_captions", ("micro_captions",), 8, CAPTIONS)]

        monkeypatch.setattr(source_spec, "methods_of", lambda cfg: [Captioned()])
        cfg = micro_cfg("out", ["SOLVER.REFERENCE_WORLD_SIZE", "4"])
        assert [spec.images_per_step for spec in source_specs(cfg)] == [4, 8]
        assert [spec.images_per_step for spec in source_specs(scaled(cfg, 2))] == [2, 4]
        cfg = micro_cfg("out", ["DATASETS.SOURCES", [entry(images=6)]])
        assert [spec.images_per_step for spec in source_specs(cfg)] == [4, 6]

    def test_images_of_sources_grow_with_the_processes(self, data):
        cfg = micro_cfg("out", ["SOLVER.REFERENCE_WORLD_SIZE", "2", "DATASETS.SOURCES", [entry(images=6, ratio=2)]])
        more = scaled(cfg, 3)
        assert more.SOLVER.IMS_PER_BATCH == 6 and more.is_frozen() and cfg.DATASETS.SOURCES[0]["images"] == 6
        [_, captions] = source_specs(more)
        assert (captions.images_per_step, captions.ratio) == (9, 2) and scaled(more, 3) is more
        cfg = micro_cfg("out", ["SOLVER.REFERENCE_WORLD_SIZE", "2", "DATASETS.SOURCES", [entry(images=3)]])
        with pytest.raises(UsageError, match="images of the source micro_captions is 3, no multiple of .*, 2"):
            scaled(cfg, 4)

    def test_images_that_cannot_be_divided(self, data, monkeypatch):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        with pytest.raises(UsageError, match="images of micro_captions in DATASETS.SOURCES is 3.*number, 2"):
            loader_of(data, entry(images=3))
