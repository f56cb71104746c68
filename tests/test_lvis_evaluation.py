"""The federated rules: parity with the ``lvis`` package for boxes and masks, on LVIS v0.5 and on a set of v1's form."""

import json
import math

import numpy as np
import pycocotools.mask as mask_api
import pytest

from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.evaluation.coco_ap import evaluate_classes, mean_of
from ovdet2.evaluation.federation import Federation
from ovdet2.evaluation.report import format_table
from tests.evaluation_sets import SHARED, columns_of, feed, random_set, with_masks

FIXTURE = SHARED / "lvis_api_fixture" / "data" / "lvis_val_100.json"
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = {"AR@300": "AR@300", "ARs": "ARs@300", "ARm": "ARm@300", "ARl": "ARl@300"}  # ours: the package's


@pytest.fixture
def lvis(monkeypatch):
    """The reference; its last release asks for a name that NumPy dropped."""
    module = pytest.importorskip("lvis", reason="pip install --no-deps lvis==0.5.3")
    monkeypatch.setattr(np, "float", float, raising=False)
    return module


def reference(lvis, path, detections, task, max_detections=300):
    """{"AP": percent, ..., "APr": ...} of the package; nan where it says -1."""
    dropped = "segmentation" if task == "bbox" else "bbox"  # with both it takes the areas of boxes for masks, too
    found = [{key: value for key, value in detection.items() if key != dropped} for detection in detections]
    truth = lvis.LVIS(str(path))
    engine = lvis.LVISEval(truth, lvis.LVISResults(truth, found, max_dets=max_detections), task)
    engine.run()
    figures = {name: engine.results[name] for name in (*NAMES, "APr", "APc", "APf")}
    if max_detections == 300:
        figures |= {ours: engine.results[name] for ours, name in RECALLS.items()}
    return {name: 100 * value if value > -1 else math.nan for name, value in figures.items()}


def random_lvis(seed):
    """:func:`random_set` as an LVIS v1 json, with masks: no crowds, frequencies, both lists of every image."""
    data, detections = random_set(seed, images=40)
    random = np.random.default_rng(seed)
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 0
    with_masks(data, detections, seed)
    for annotation in data["annotations"]:
        del annotation["iscrowd"]
    for category, frequency in zip(data["categories"], "rcfrcf"):
        category["frequency"] = frequency
    category_ids = [category["id"] for category in data["categories"]]
    for image in data["images"]:
        there = {a["category_id"] for a in data["annotations"] if a["image_id"] == image["id"]}
        image["neg_category_ids"] = [i for i in category_ids if i not in there and random.random() < 0.4]
        # Of a class neither annotated nor negative the list says nothing that could matter.
        image["not_exhaustive_category_ids"] = [i for i in category_ids if random.random() < 0.3]
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
    return data, detections


def moved_truth(data, seed=0):
    """Detections made from the annotations: moved, doubled, of wrong classes, with few different scores."""
    random = np.random.default_rng(seed)
    images = {image["id"]: image for image in data["images"]}
    category_ids = [category["id"] for category in data["categories"]]
    detections = []
    for annotation in data["annotations"]:
        image = images[annotation["image_id"]]
        nearby = sorted({a["category_id"] for a in data["annotations"][:200]} | set(image["neg_category_ids"]))
        for _ in range(random.integers(0, 4)):
            shift = random.normal(0, 0.08, 2) * annotation["bbox"][2:]
            parts = [(np.reshape(part, (-1, 2)) + shift).flatten().tolist() for part in annotation["segmentation"]]
            codes = mask_api.frPyObjects(parts, image["height"], image["width"])
            code = mask_api.merge(codes)
            detections.append(
                {
                    "image_id": image["id"],
                    "category_id": int(
                        random.choice([annotation["category_id"]] * 3 + [random.choice(nearby), category_ids[0]])
                    ),
                    "bbox": [*(np.array(annotation["bbox"][:2]) + shift), *annotation["bbox"][2:]],
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
                    "score": float(random.integers(1, 20)) / 20,
                }
            )
    return detections


@pytest.mark.skipif(not FIXTURE.is_file(), reason="needs ../shared/data/lvis_api_fixture")
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_lvis_v05_equals_the_lvis_package(lvis, task):
    data = json.loads(FIXTURE.read_text())
    detections = moved_truth(data)
    split = frequency_split(data["categories"])
    assert len(split.category_ids) == 1230
    truth, found = columns_of(data, detections)
    per_class = evaluate_classes(truth, found, split.category_ids, task, (300,), Federation(truth.images))
    expected = reference(lvis, FIXTURE, detections, task)
    for name in (*NAMES, *RECALLS):
        assert abs(mean_of(figures[name] for figures in per_class.values()) - expected[name]) < 1e-6, name
    for group, ids in split.groups.items():
        assert abs(mean_of(per_class[category_id]["AP"] for category_id in ids) - expected[f"AP{group}"]) < 1e-6
    assert 10 < expected["AP"] < 90


@pytest.mark.parametrize("seed, max_detections", [(0, None), (1, 5), (2, 5)])
def test_evaluator_equals_the_lvis_package(lvis, make_evaluator, tmp_path, seed, max_detections):
    """Ties, classes without ground truth, images without detections, both lists; the cut comes before the matching."""
    data, detections = random_lvis(seed)
    split = frequency_split(data["categories"])
    evaluator = make_evaluator(data, split=frequency_split, metric="ov_lvis", masks=True, max_detections=max_detections)
    feed(evaluator, data, detections, split=split)
    results = evaluator.evaluate()
    (path,) = tmp_path.glob("test_*.json")
    for task in ("bbox", "segm"):
        expected = reference(lvis, path, detections, task, max_detections or 300)
        for name, value in expected.items():
            if name in ("ARs", "ARm", "ARl"):
                continue  # not in the report
            ours = results[task][name if name in ("APr", "APc", "APf") else f"{name}-all"]
            assert (math.isnan(ours) and math.isnan(value)) or abs(ours - value) < 1e-6, (task, name)
        assert results[task]["APr"] == results[task]["AP-r"] == results[task]["AP-novel"]
    report = evaluator.evaluation.report
    assert report["detections_per_image"] == (max_detections or 300)
    assert [row for row in report["classes"]] == ["novel", "base", "all", "r", "c", "f"]
    assert "LVIS, federated" in report["metric"] and "masks" in format_table(report)


def test_what_is_neither_annotated_nor_negative_counts_neither_way():
    data, _ = random_lvis(3)
    first, second, third = data["images"][:3]
    for image in (first, second, third):
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    box = {"category_id": 7, "bbox": [10, 10, 20, 20]}
    data["annotations"] = [{**box, "id": 1, "image_id": first["id"], "area": 400, "iscrowd": 0}]
    detections = [{**box, "image_id": image["id"], "score": score} for image, score in ((first, 0.5), (second, 0.9))]

    def ap():
        truth, found = columns_of(data, detections)
        return evaluate_classes(truth, found, [7], "bbox", (300,), Federation(truth.images))[7]["AP"]

    assert ap() == 100
    second["neg_category_ids"] = [7]
    assert ap() == pytest.approx(50)
    second["not_exhaustive_category_ids"] = [7]
    assert ap() == 100
