"""What the steps attach for CCKT-Det: the teacher's embeddings of annotated boxes and the words of an image."""

import json

import pytest
import torch
from build_concept_priors import main as build_priors
from detectron2.data import transforms as T
from torch.nn import functional as F

from ovdet2.caches.region_cache import RegionCache, Regions
from ovdet2.config import get_cfg
from ovdet2.data.loader import build_test_loader, build_train_loader
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.data.samples import CAPTIONS
from ovdet2.data.source_spec import SourceSpec
from ovdet2.data.steps import AugmentImage, build_steps
from ovdet2.engine.trainer import Trainer
from ovdet2.errors import CacheError, UsageError
from ovdet2.io.files import read_json, sha256_file
from ovdet2.methods.cckt.class_crops import class_crops
from ovdet2.methods.cckt.sample import AttachObjectCrops, AttachPresentWords, ObjectCrops, PresentWords
from ovdet2.modeling.build import build_teacher
from tests.micro_training import SPLIT, micro_cfg, write_data
from tests.test_detr_build import SMALL
from tests.test_region_cache import RECIPE, build

WORDS = SPLIT.names  # disc, bar; ring is novel


def embedding(ann_id, dim=4):
    """A unit row that tells an annotation from the others."""
    return F.normalize(torch.sin(torch.arange(1.0, dim + 1) * (ann_id + 1)), dim=0).half()


def annotation_cache(root, folder="cache", source="annotations", left_out=(), dim=4, teacher=None):
    """A cache of the micro training set, without the annotations ``left_out``."""
    json_file = root / "micro" / "train.json"
    data = json.loads(json_file.read_text())
    boxes = {image["id"]: [] for image in data["images"]}
    for box in data["annotations"]:
        if box["id"] not in left_out and not box["iscrowd"]:
            boxes[box["image_id"]].append(box)

    def make(image_id):
        xywh = torch.tensor([box["bbox"] for box in boxes[image_id]], dtype=torch.float32).reshape(-1, 4)
        rows = [embedding(box["id"], dim) for box in boxes[image_id]]
        return Regions(
            torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
            torch.stack(rows) if rows else torch.zeros(0, dim).half(),
            torch.tensor([box["id"] for box in boxes[image_id]], dtype=torch.int64),
            torch.ones(len(rows)),
        )

    recipe = RECIPE | {"dataset_sha256": sha256_file(json_file), "boxes": {"source": source}, "dim": dim}
    recipe |= {} if teacher is None else {"teacher": teacher.to_dict()}
    build(root / folder, [image["id"] for image in data["images"]], 5, recipe, make)
    return str(root / folder)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    return tmp_path


def priors(data, *options, dataset="ov_micro_val", name="p"):
    output = data / f"{name}.safetensors"
    build_priors(["--dataset", dataset, "--output", str(output), *(options or ("--backend", "oracle"))])
    return str(output)


def configured(data, **changes):
    """A configuration of the micro data set with both parts of CCKT-Det."""
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("ov_micro_train",), ("ov_micro_val",)
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.ASPECT_RATIO_GROUPING, cfg.SOLVER.IMS_PER_BATCH = 0, False, 2
    cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED = "ViT-B-32", "openai"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (48,), 48
    cfg.MODEL.CCKT.ENABLED = True
    for key, value in changes.items():
        cfg.MODEL.CCKT[key] = value
    return cfg


def record(data, boxes, image_id=1):
    """A record of image 1 (48 x 64) with annotations {id: (box xyxy, class, crowd)}."""
    annotations = [
        {"id": number, "bbox": list(box), "bbox_mode": 0, "category_id": label, "iscrowd": crowd}
        for number, (box, label, crowd) in boxes.items()
    ]
    path = data / "micro" / "images" / f"{image_id:04d}.png"
    return {"file_name": str(path), "image_id": image_id, "height": 48, "width": 64, "annotations": annotations}


class TestEmbeddings:
    def mapper(self, data, *steps, **options):
        cfg = configured(data, PRIORS=False, REGION_CACHE=annotation_cache(data, **options))
        maker = build_sample_maker(cfg, True)
        step_of(maker, AugmentImage).augmentations = T.AugmentationList(list(steps))
        return maker

    def test_crowds_and_boxes_cropped_away_do_not_shift_the_others(self, data):
        json_file = data / "micro" / "train.json"
        whole = json.loads(json_file.read_text())
        boxes = {
            11: ((0, 0, 10, 10), 1, 0),  # cropped away
            12: ((20, 5, 60, 40), 0, 0),
            13: ((0, 0, 64, 48), 0, 1),  # a crowd
            14: ((30, 20, 50, 44), 1, 0),
        }
        whole["annotations"] = [
            {"id": number, "image_id": 1, "category_id": SPLIT.category_ids[label], "area": 9, "iscrowd": crowd,
             "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
            for number, (box, label, crowd) in boxes.items()
        ]  # fmt: skip
        json_file.write_text(json.dumps(whole))
        crop = T.FixedSizeCrop((48, 44), pad=False)
        crop.get_transform = lambda image: T.CropTransform(20, 0, 44, 48)
        mapped = self.mapper(data, crop, T.RandomFlip(prob=1.0))(record(data, boxes))
        instances, crops = mapped.instances, mapped.attached(ObjectCrops)
        assert instances.gt_classes.tolist() == [0, 1] and crops.embedded.tolist() == [True, True]
        assert torch.equal(crops.embeddings, torch.stack([embedding(12), embedding(14)]))
        assert instances.gt_boxes.tensor.tolist() == [[4, 5, 44, 40], [14, 20, 34, 44]]
        assert crops.embeddings.dtype == torch.float16 and mapped.kept is None and mapped.annotations is None

    def test_all_cropped_away(self, data):
        crop = T.FixedSizeCrop((9, 9), pad=False)
        crop.get_transform = lambda image: T.CropTransform(55, 39, 9, 9)
        train = json.loads((data / "micro" / "train.json").read_text())
        [box] = [b for b in train["annotations"] if b["image_id"] == 1][:1]
        x, y, w, h = box["bbox"]
        sample = self.mapper(data, crop)(record(data, {box["id"]: ((x, y, x + w, y + h), 1, 0)}))
        crops = sample.attached(ObjectCrops)
        assert len(sample.instances) == 0 and crops.embeddings.shape == (0, 4) and crops.embedded.shape == (0,)

    def test_annotations_without_a_crop_are_marked(self, data):
        train = json.loads((data / "micro" / "train.json").read_text())
        ids = [box["id"] for box in train["annotations"]]
        cfg = configured(data, PRIORS=False, REGION_CACHE=annotation_cache(data, left_out=ids[::2]))
        loader = iter(build_train_loader(cfg))
        flags = torch.cat([r.attached(ObjectCrops).embedded for _ in range(8) for r in next(loader)])
        assert set(flags.tolist()) == {True, False}

    def test_a_crop_of_an_annotation_outside_the_training_set_stops_the_run(self, data):
        """Such as one of a novel class, which only the json of the test set has."""
        mapper = self.mapper(data)
        with pytest.raises(CacheError, match=r"regions belong to the annotations .*a box of a novel class"):
            mapper(record(data, {999: ((5, 5, 30, 30), 0, 0)}))

    def test_crops_of_classes_are_of_all_the_training_set(self, data):
        train = json.loads((data / "micro" / "train.json").read_text())
        label = {raw: place for place, raw in enumerate(SPLIT.category_ids)}
        boxes = {box["id"]: label[box["category_id"]] for box in train["annotations"]}
        left_out = [number for number, word in boxes.items() if word == 0][:1]
        cfg = configured(data, PRIORS=False, REGION_CACHE=annotation_cache(data, left_out=left_out))
        [source] = build_train_loader(cfg).sources
        records, cache = source.records, step_of(source, AttachObjectCrops).cache
        wanted = [[embedding(n) for n in boxes if boxes[n] == word and n not in left_out] for word in range(2)]
        for per_class in (1, 2, 500):
            crops, counts = class_crops(records, cache, 2, per_class)
            assert counts.tolist() == [min(per_class, len(wanted[word])) for word in range(2)]
            for word, count in enumerate(counts.tolist()):
                rows = {tuple(row.tolist()) for row in crops[word, :count]}
                assert len(rows) == count and rows <= {tuple(row.tolist()) for row in wanted[word]}
                assert not crops[word, count:].any()
        again, _ = class_crops(records, cache, 2, 2)
        other, _ = class_crops(records, cache, 2, 2, seed=5)
        assert torch.equal(again, class_crops(records, cache, 2, 2)[0]) and not torch.equal(again, other)
        empty = RegionCache(annotation_cache(data, "empty", left_out=boxes))
        with pytest.raises(CacheError, match="empty has no crop of any annotation of the training set: build one"):
            class_crops(records, empty, 2)

    def test_crops_of_a_class_come_from_many_images(self, data, caplog):
        """An image full of disks gives one, unless there are no others; crowds and boxes without an id give none."""
        train = json.loads((data / "micro" / "train.json").read_text())
        ids = {box["image_id"]: box["id"] for box in train["annotations"]}
        first, second, third = list(ids)[:3]
        extra = [{"id": 900 + n, "image_id": first, "category_id": SPLIT.category_ids[0], "area": 9, "iscrowd": 0,
                  "bbox": [4 * n, 4, 9, 9]} for n in range(6)]  # fmt: skip
        train["annotations"] += extra
        (data / "micro" / "train.json").write_text(json.dumps(train))
        cache = RegionCache(annotation_cache(data))
        disks = [{"id": box["id"], "category_id": 0} for box in extra]
        records = [
            {"image_id": first, "annotations": disks},
            {"image_id": second, "annotations": [{"id": ids[second], "category_id": 0}]},
            {
                "image_id": third,
                "annotations": [{"id": ids[third], "category_id": 1, "iscrowd": 1}, {"category_id": 1}],
            },
        ]
        for seed in range(4):
            with caplog.at_level("WARNING", "ovdet2.methods.cckt.class_crops"):
                crops, counts = class_crops(records, cache, 2, 2, seed)
            assert counts.tolist() == [2, 0] and "1 of 2 base classes have no crop" in caplog.text
            assert embedding(ids[second]).tolist() in crops[0].tolist()
        crops, counts = class_crops(records, cache, 2, 5)
        assert counts.tolist() == [5, 0] and len({tuple(row) for row in crops[0].tolist()}) == 5

    def test_a_cache_of_proposals_is_refused(self, data):
        cfg = configured(data, PRIORS=False, REGION_CACHE=annotation_cache(data, source="proposals"))
        with pytest.raises(CacheError, match="holds proposals.*--boxes annotations"):
            build_sample_maker(cfg, True)

    def test_none_is_named(self, data):
        with pytest.raises(UsageError, match="MODEL.CCKT.CONTRAST requires .*MODEL.CCKT.REGION_CACHE is empty"):
            build_sample_maker(configured(data, PRIORS=False), True)

    def test_test_and_priors_alone_read_no_cache(self, data):
        cfg = configured(data, PRIOR_FILE=priors(data))
        assert not has_step(build_sample_maker(cfg, False), AttachObjectCrops)
        cfg.MODEL.CCKT.CONTRAST = "none"
        assert not has_step(build_sample_maker(cfg, True), AttachObjectCrops)


class TestWords:
    def test_training_takes_what_is_left_of_the_annotations(self, data):
        cfg = configured(data, CONTRAST="none", PRIOR_FILE=priors(data))
        mapper = build_sample_maker(cfg, True)
        two = {1: ((5, 5, 30, 30), 1, 0), 2: ((8, 8, 40, 40), 0, 0), 3: ((8, 8, 20, 40), 1, 0)}
        assert sorted(mapper(record(data, two)).attached(PresentWords).words.tolist()) == [0, 1]
        crop = T.FixedSizeCrop((9, 9), pad=False)
        crop.get_transform = lambda image: T.CropTransform(31, 31, 9, 9)
        step_of(mapper, AugmentImage).augmentations = T.AugmentationList([crop])
        assert mapper(record(data, two)).attached(PresentWords).words.tolist() == [0]

    def test_test_takes_the_file(self, data):
        cfg = configured(data, PRIOR_FILE=priors(data), PRIOR_TOP=2)
        truth = {r["image_id"]: {a["category_id"] for a in r["annotations"]} for r in load("ov_micro_val")}
        found = {
            record["image_id"]: set(record.attached(PresentWords).words.tolist())
            for [record] in build_test_loader(cfg, "ov_micro_val")
        }
        assert found == truth and {2} <= set().union(*truth.values())  # the novel ring is one of the words

    def test_file_of_another_data_set(self, data):
        cfg = configured(data, CONTRAST="none", PRIOR_FILE=priors(data, dataset="ov_micro_train"))
        for training in (True, False):
            with pytest.raises(CacheError, match="made for ov_micro_train .* but ov_micro_val reads .*val.json"):
                build_sample_maker(cfg, training)

    def test_words_of_another_vocabulary(self, data):
        given = data / "given.json"
        given.write_text(json.dumps({"1": [["sun", 0.9]]}))
        file = priors(data, "--backend", "file", "--input", str(given), "--words", "sun, moon")
        with pytest.raises(CacheError, match="has the words sun, moon; none is in the vocabulary"):
            build_sample_maker(configured(data, CONTRAST="none", PRIOR_FILE=file), True)

    def test_image_missing_in_the_file(self, data):
        """By the loader, which must not hand the error on as a record."""
        cfg = configured(data, PRIOR_FILE=priors(data))
        mapper = build_sample_maker(cfg, False)
        step_of(mapper, AttachPresentWords).words.words.priors._rows.pop(5)
        with pytest.raises(CacheError, match="no entry for image id 5"):
            list(build_test_loader(cfg, "ov_micro_val", mapper))

    def test_source_and_kind_are_logged(self, data, caplog):
        options = ("--backend", "noisy-oracle", "--precision", "0.9", "--recall", "0.5")
        cfg = configured(data, PRIOR_FILE=priors(data, *options))
        with caplog.at_level("INFO", "ovdet2.methods.cckt.sample"):
            build_sample_maker(cfg, False)
        assert (
            "simulation, backend noisy-oracle" in caplog.text.lower()
            and "do not report figures with them as results of a method" in caplog.text
        )

    def test_filling_that_is_none(self, data):
        cfg = configured(data, PRIOR_FILE=priors(data), PRIOR_FILL="all")
        with pytest.raises(UsageError, match="MODEL.CCKT.PRIOR_FILL is 'all'"):
            build_sample_maker(cfg, False)

    def test_images_without_boxes_have_no_words(self, data):
        cfg = configured(data)
        steps = build_steps(cfg, SourceSpec("captioned", ("ov_micro_train",), 2, CAPTIONS), True)
        assert [type(step).__name__ for step in steps] == ["DecodeImage", "AugmentImage", "Finish"]

    def test_no_file_and_several_test_sets(self, data):
        with pytest.raises(UsageError, match="PRIOR_FILE is empty"):
            build_sample_maker(configured(data), False)
        cfg = configured(data, PRIOR_FILE=priors(data))
        cfg.DATASETS.TEST = ("ov_micro_val", "ov_micro_train")
        with pytest.raises(UsageError, match="evaluate one at a time"):
            build_sample_maker(cfg, False)


def step_of(made_of, kind):
    """The step of a class, of a sample maker or a source."""
    [found] = [step for step in made_of.steps if isinstance(step, kind)]
    return found


def has_step(made_of, kind):
    return any(isinstance(step, kind) for step in made_of.steps)


def load(name):
    from detectron2.data import DatasetCatalog

    return DatasetCatalog.get(name)


@pytest.mark.slow
@pytest.mark.parametrize("contrast", ["instance", "class"])
def test_training_run_is_evaluated_and_its_report_names_the_priors(data, tmp_path, contrast):
    small = [
        *SMALL, "MODEL.TEACHER.ARCHITECTURE", "ovshapes-resnet", "MODEL.TEACHER.PRETRAINED", "embedded",
        "MODEL.VOCABULARY.TEMPLATES", "single", "SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", "0.001",
        "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "3", "MODEL.CCKT.ENABLED", "True",
        "MODEL.CCKT.PRIOR_FILE", priors(data, "--backend", "random"), "MODEL.CCKT.PRIOR_DISTRACTORS", "1",
        "SOLVER.AMP.ENABLED", "True", "MODEL.CCKT.CONTRAST_START", "1", "MODEL.CCKT.CONTRAST", contrast,
    ]  # fmt: skip
    teacher = build_teacher(micro_cfg(tmp_path / "out", small))
    folder = annotation_cache(data, "real", dim=teacher.embed_dim, teacher=teacher.fingerprint)
    cfg = micro_cfg(tmp_path / "out", [*small, "MODEL.CCKT.REGION_CACHE", folder])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()]
    values = [step["loss_contrast"] for step in steps if "loss_contrast" in step]
    assert values[0] == 0 and values[-1] > 0
    report = read_json(tmp_path / "out" / "inference" / "ov_micro_val" / "report.json")
    assert report["concept_prior"]["kind"] == "control" and report["concept_prior"]["source"]["backend"] == "random"
    assert (report["concept_prior"]["threshold"], report["concept_prior"]["top"]) == (0.7, 6)
