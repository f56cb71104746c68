"""What the checker passes loads, maps and is evaluated: one property over odd, but possible, jsons.

Every value is drawn from those that tools write and that have caused faults: ids of 64 bits, sizes as floats, addresses
that are placeholders, masks of all forms, flags of all types, boxes at the edges.
"""

import json
import math
import uuid
from functools import partial

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ovdet2.config import get_cfg
from ovdet2.data.datasets.check import check, problems
from ovdet2.data.datasets.conversion import convert
from ovdet2.data.datasets.register import all_base, register_dataset
from ovdet2.data.datasets.repair import repair
from ovdet2.data.datasets.validity import OTHER_LENGTH, OTHER_SIZE, segmentation_fault
from ovdet2.data.sample_maker import build_sample_maker
from ovdet2.errors import DataError
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.matching import match

SIZES = {"a.png": (50, 40), "sub/b.png": (64, 48)}  # width, height
EXTREME = [0, 1, -7, 2**31, -(2**31) - 1, 2**53 + 1, 2**63 - 1, -(2**63)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("valid")
    (root / "sub").mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size, "teal").save(root / name)
    return root


def sometimes(usual, odd):
    """``usual`` eleven times in twelve."""
    return st.integers(0, 11).flatmap(lambda draw: usual if draw else odd)


def unique_ids(count):
    return st.lists(
        sometimes(st.integers(1, 99), st.sampled_from(EXTREME)), min_size=count, max_size=count, unique=True
    )


def forms_of(number):
    """An integer as tools write it; text is a problem, which the repair converts."""
    return sometimes(
        st.just(number), st.sampled_from([float(number), str(number)]) if abs(number) < 2**53 else st.just(number)
    )


@st.composite
def image_records(draw, ids, category_ids):
    records = []
    for image_id in ids:
        name = draw(st.sampled_from(sorted(SIZES)))
        width, height = SIZES[name]
        record = {"id": draw(forms_of(image_id)), "file_name": name}
        record |= draw(
            sometimes(
                st.sampled_from([{"width": width, "height": height}, {"width": float(width), "height": height}]),
                st.sampled_from([{}, {"width": 0, "height": None}, {"width": str(width), "height": height}]),
            )
        )
        lists = st.lists(st.sampled_from(category_ids), max_size=3)
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            record[key] = draw(sometimes(lists, st.sampled_from([[], [str(category_ids[0])], None])))
        url = draw(st.sampled_from([None, f"http://images/of/{name}", "", "N/A", "http://", "https://host", "none"]))
        if url is not None and not (url.endswith("png") and "/" not in name):
            record["coco_url"] = url
        records.append(record)
    return records


def segmentations(width, height):
    total = width * height
    point = st.sampled_from([0, 3, 5.5, width, height, -1, width + 2.5, 1e-300])
    polygon = st.lists(st.tuples(point, point), min_size=3, max_size=5).map(
        lambda points: [v for p in points for v in p]
    )
    runs = st.sampled_from([[total], [0, total], [7, 9, total - 16], [5, 0, 0, total - 5], [1] * total])
    code = st.fixed_dictionaries({"size": st.sampled_from([[height, width], [float(height), width]]), "counts": runs})
    text = st.sampled_from([[total], [7, 9, total - 16]]).map(lambda counts: compressed(counts, width, height))
    odd = st.sampled_from(
        [[], None, [1, 2, 3, 4], [1, 2, 9, 2, 9, 9], [[1, 1, 5, 5]], {"size": [width, height], "counts": [total]}]
        + [{"size": [height, width], "counts": counts} for counts in ([-1, total + 1], [total - 1], "zz", "", [])]
        + [[[1, 1, 5, 5, 1e9, 3]], [[[1, 1], [5, 5], [1, 5]]], "x"]
    )
    return sometimes(st.lists(polygon, min_size=1, max_size=2) | code | text, odd)


def compressed(counts, width, height):
    import pycocotools.mask as mask_api

    code = mask_api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode()}


def boxes(width, height):
    near = st.sampled_from([0, 0.0, -0.0, 3, 7.25, -0.9, 1e-300])
    length = st.sampled_from([1, 9.5, 20, 1e-3, 1e-4, 33])
    edge = st.sampled_from([[0, 0, width, height], [-1, -1, width + 2, height + 2], [width - 1e-5, 3, 1, 2]])
    odd = st.sampled_from([[1, 2, 0, 3], [1, 2, 1e-320, 3], [width, 0, 1, 1], ["1", "2", 3, 4], [1, 2, 3], None])
    return sometimes(st.tuples(near, near, length, length).map(list) | edge, odd)


flags = sometimes(st.sampled_from([0, 1]), st.sampled_from([True, False, 1.0, None, "0", 2, "x"]))


@st.composite
def jsons(draw):
    """(json, masks, lvis)."""
    category_ids = draw(st.integers(1, 3).flatmap(unique_ids))
    image_ids = draw(st.integers(1, 3).flatmap(unique_ids))
    names = [
        "apple",
        "Äpfel/x",
        draw(st.sampled_from(["no", "half \ud800", "a\tb", "猫", "apple.", 7, " ", "x" * 300])),
    ]
    categories = [
        {"id": draw(forms_of(number)), "name": name, "frequency": draw(st.sampled_from(["r", "c", "f"]))}
        | draw(sometimes(st.just({}), st.just({"supercategory": names[0]})))
        for number, name in zip(category_ids, names)
    ]
    images = draw(image_records(image_ids, category_ids))
    count, annotations = draw(st.integers(0, 5)), []
    for annotation_id in draw(unique_ids(count)):
        position = draw(st.integers(0, len(images) - 1))
        width, height = SIZES[images[position]["file_name"]]
        fields = st.fixed_dictionaries(
            {"bbox": boxes(width, height)},
            optional={
                "iscrowd": flags,
                "ignore": flags,
                "area": sometimes(
                    st.sampled_from([1, 40.5, width * height, 1e-300]), st.sampled_from(["9", 0, 10**40])
                ),
                "segmentation": segmentations(width, height),
            },
        )
        references = {"image_id": image_ids[position], "category_id": draw(st.sampled_from(category_ids))}
        annotations.append({"id": draw(forms_of(annotation_id)), **references, **draw(fields)})
    data = {"images": images, "annotations": annotations, "categories": categories}
    return data, draw(st.booleans()), draw(st.booleans())


def detections_of(record, masks):
    """Boxes near the annotated ones, and one of each class at the corner, as a detector would give them."""
    height, width = record["height"], record["width"]
    annotated = [(box["bbox"], box["category_id"]) for box in record["annotations"]]
    rows = [(x, y, x + w, y + h) for (x, y, w, h), _ in annotated] + [(0, 0, width / 2, height / 2)]
    instances = Instances((height, width))
    instances.pred_boxes = Boxes(torch.tensor(rows, dtype=torch.float32))
    instances.scores = torch.linspace(0.9, 0.1, len(rows))
    instances.pred_classes = torch.tensor([category for _, category in annotated] + [0])
    if masks:
        instances.pred_masks = torch.rand(len(rows), height, width) > 0.5
    return instances


def use(data, masks, lvis, root):
    """Register, load, map and evaluate a json; returns the report."""
    name = f"valid_{uuid.uuid4().hex}"
    path = root / f"{name}.json"
    path.write_text(json.dumps(data))
    register_dataset(
        name, path, root, partial(all_base, name), metric="ov_lvis" if lvis else "ov_coco", masks=masks, base_only=True
    )
    try:
        records = DatasetCatalog.get(name)
        of_codes = any(isinstance(box.get("segmentation"), dict) for record in records for box in record["annotations"])
        cfg = get_cfg()
        cfg.MODEL.MASK_ON, cfg.INPUT.MASK_FORMAT = masks, "bitmask" if of_codes else "polygon"
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), (name,)
        cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TEST = 40
        evaluator = OpenVocabularyEvaluator(name, root / name)
        evaluator.reset()
        for record in records:
            for is_train in (True, False):
                sample = build_sample_maker(cfg, is_train)(record)
                assert (sample.height, sample.width) == (record["height"], record["width"])
            evaluator.process([record], [{"instances": detections_of(record, masks)}])
        results = evaluator.evaluate()
        predicted, truth = evaluator.evaluation.detections, evaluator.evaluation.truth
        for task, figures in results.items():
            assert math.isnan(figures["AP50-all"]) == truth.crowd.all(), f"{task}: a class with objects has a figure"
        assert set(predicted.category_ids.tolist()) <= set(MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id)
        assert set(predicted.image_ids.tolist()) == {record["image_id"] for record in records}
        match(truth, predicted)
        return results, evaluator.evaluation
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def one_of_each(category_id=2**63 - 1, image_id=-(2**63)):
    box = {"id": 2**63 - 1, "image_id": image_id, "category_id": category_id, "bbox": [3, 3, 9, 9], "area": 81}
    return {
        "images": [{"id": image_id, "file_name": "a.png", "width": 50.0, "height": 40}],
        "annotations": [box | {"segmentation": [[3, 3, 12, 3, 12, 12, 3, 12]]}],
        "categories": [{"id": category_id, "name": "apple"}],
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(jsons())
@example((one_of_each(), True, False))
def test_what_the_checker_passes_can_be_used(folder, case):
    """Or, if it has problems, what is left after the repair, when the repair leaves none."""
    data, masks, lvis = case
    found = check(data, "x.json", folder, masks=masks, lvis=lvis)
    if problems(found):
        try:
            data, _ = repair(data, found, folder, lvis)
        except DataError:  # no image is left
            return
        found = check(data, "repaired.json", folder, masks=masks, lvis=lvis)
        event("repaired" if not problems(found) else "left")
    else:
        event("without a problem")
    if not problems(found):
        use(data, masks, lvis, folder)


runs = st.lists(st.integers(0, 70), min_size=1, max_size=30) | st.lists(st.integers(0, 200_000), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(runs, st.integers(-3, 3))
def test_run_lengths_add_up_as_text_and_as_a_list(counts, more):
    """COCO's own coder is the reference; a code of another number of pixels is refused in both forms."""
    total = sum(counts) + more
    if sum(counts) == 0 or total <= 0:
        return
    text = compressed(counts, sum(counts), 1)["counts"]
    for form in (counts, text):
        fault = segmentation_fault({"size": [1, total], "counts": form})
        assert fault == (None if more == 0 else OTHER_LENGTH)
        assert segmentation_fault({"size": [1, total], "counts": form}, (total + 1, 1)) == OTHER_SIZE


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(codec="ascii"), max_size=20) | st.text(max_size=5))
def test_text_that_is_no_code_is_refused_and_a_code_decodes(text):
    """Whatever passes, COCO's tools decode to the pixels of the image."""
    import pycocotools.mask as mask_api

    code = {"size": [4, 5], "counts": text}
    if segmentation_fault(code, (5, 4)) is None:
        assert mask_api.decode(code).shape == (4, 5)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["1", "1.0", " 2 ", "", "x", "true", "1e999"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "counts"]), inner, max_size=2),
    max_leaves=6,
)
keys = ("id", "image_id", "category_id", "bbox", "iscrowd", "ignore", "area", "segmentation", "width", "height", "name")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(keys), junk, max_size=6) | junk, max_size=4))
def test_converting_twice_changes_nothing_and_changes_no_valid_record(records):
    data = {"images": records, "categories": records, "annotations": records}
    once, findings = convert(data)
    again, none = convert(once)
    assert none == [] and repr(again) == repr(once)
    assert (repr(once) == repr(data)) == (not findings)
