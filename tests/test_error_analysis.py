"""Error analysis: hand-made errors of each kind, a reference in plain Python, tidecv, and properties."""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import COCO, COCOeval_faster

from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import DataError
from ovdet2.evaluation import error_analysis
from ovdet2.evaluation.columns import Detections, Truth
from ovdet2.evaluation.error_analysis import ERROR_KINDS, image_quality, telling_images
from ovdet2.evaluation.matching import OUTCOMES, match

TIDECV = Path(__file__).parent / "golden" / "tidecv.json"
# Sparse ids in no order, as in COCO.
SPLIT = Split("test 3/2", base=((7, "a"), (3, "b"), (50, "c")), novel=((5, "d"), (90, "e")))
ONE_CLASS = Split("test 1", base=((7, "a"),))
BOX = (10, 10, 30, 30)
FAR = (200, 200, 240, 240)


def make_truth(boxes, federated=None, images=()):
    """Truth of (image id, category id, box[, crowd]) rows; ``federated`` is {image id: (negative, not exhaustive)}, and
    ``images`` names those without a box."""
    rows = [(*row, False)[:4] for row in boxes]
    records = {
        image_id: {"image_id": image_id}
        for image_id in sorted({*images, *(federated or ()), *(row[0] for row in rows)})
    }
    for image_id, (negative, not_exhaustive) in (federated or {}).items():
        records[image_id] |= {"neg_category_ids": negative, "not_exhaustive_category_ids": not_exhaustive}
    xyxy = np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 4)
    return Truth(
        images=records,
        ann_ids=np.arange(len(rows)),
        image_ids=np.array([row[0] for row in rows], dtype=np.int64),
        category_ids=np.array([row[1] for row in rows], dtype=np.int64),
        boxes_xyxy=xyxy,
        areas=(xyxy[:, 2:] - xyxy[:, :2]).prod(axis=1),
        crowd=np.array([row[3] for row in rows], dtype=bool),
    )


def make_detections(rows):
    """Detections of (image id, category id, box, score) rows."""
    return Detections(
        image_ids=np.array([row[0] for row in rows], dtype=np.int64),
        category_ids=np.array([row[1] for row in rows], dtype=np.int32),
        scores=np.array([row[3] for row in rows], dtype=np.float32),
        boxes_xyxy=np.array([row[2] for row in rows], dtype=np.float32).reshape(-1, 4),
    )


def analyse(truth, detections, split, **options):
    """The whole analysis of columns."""
    return error_analysis.analyse(truth, detections, split, match(truth, detections), **options)


def outcomes(truth, rows):
    """Names of the outcomes of detections given as rows."""
    return [OUTCOMES[value] for value in match(truth, make_detections(rows)).outcome]


def random_rows(seed=0, images=60, crowds=True, classes=SPLIT.category_ids):
    """(ground truth, detections) as rows, with every kind of error, all scores different."""
    random = np.random.default_rng(seed)
    boxes, found = [], []
    for image_id in random.permutation(1000)[:images].tolist():
        for _ in range(random.integers(0, 6)):
            corner, size = random.integers(0, 150, 2), random.integers(15, 50, 2)
            box = np.concatenate([corner, corner + size])
            category_id = int(random.choice(classes))
            boxes.append((image_id, category_id, box, bool(crowds and random.random() < 0.15)))
            for _ in range(random.integers(0, 5)):
                guess = category_id if random.random() < 0.6 else int(random.choice(classes))
                moved = np.sort((box + random.normal(0, 8, 4)).reshape(2, 2), axis=0).ravel()
                found.append((image_id, guess, np.float32(moved)))
        for _ in range(random.integers(0, 3)):
            corner = random.uniform(0, 150, 2)
            stray = np.concatenate([corner, corner + random.uniform(5, 50, 2)])
            found.append((image_id, int(random.choice(classes)), np.float32(stray)))
    scores = np.float32(random.permutation(len(found)) + 1) / np.float32(len(found) + 1)
    return boxes, [(*row, score) for row, score in zip(found, scores)]


def figures(boxes, found, split=SPLIT):
    """The whole analysis of rows."""
    return analyse(make_truth(boxes, images=[row[0] for row in found]), make_detections(found), split)


# --- each kind of error -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "category_id, box, expected",
    [
        (7, BOX, "true"),
        (7, (10, 10, 30, 20.2), "true"),  # IoU 0.51
        (7, (10, 10, 30, 19), "localisation"),  # IoU 0.45
        (7, (10, 10, 30, 12.2), "localisation"),  # IoU 0.11
        (7, (10, 10, 30, 11), "background"),  # IoU 0.05
        (7, FAR, "background"),
        (5, BOX, "classification"),
        (5, (10, 10, 30, 19), "both"),
        (5, (10, 10, 30, 11), "background"),
    ],
)
def test_one_detection_of_each_kind(category_id, box, expected):
    truth = make_truth([(1, 7, BOX)])
    assert outcomes(truth, [(1, category_id, box, 0.9)]) == [expected]


def test_the_second_detection_of_a_box_is_a_duplicate():
    truth = make_truth([(1, 7, BOX)])
    rows = [(1, 7, (10, 10, 30, 28), 0.3), (1, 7, BOX, 0.2)]
    assert outcomes(truth, rows) == ["true", "duplicate"]
    assert outcomes(truth, rows[::-1]) == ["duplicate", "true"]  # the better score wins, not the first row


def test_a_duplicate_that_overlaps_a_box_of_another_class_is_of_the_wrong_class():
    truth = make_truth([(1, 7, BOX), (1, 5, BOX)])
    assert outcomes(truth, [(1, 7, BOX, 0.9), (1, 7, BOX, 0.8)]) == ["true", "classification"]


@pytest.mark.parametrize("box, kind", [(BOX, "classification"), ((10, 10, 30, 19), "localisation")])
def test_repairing_the_only_error_gives_full_average_precision_and_the_box_is_not_missed(box, kind):
    category_id = 5 if kind == "classification" else 7
    result = analyse(make_truth([(1, 7, BOX)]), make_detections([(1, category_id, box, 0.9)]), SPLIT)
    assert result["AP50"] == {"novel": None, "base": 0.0, "all": 0.0}
    for other in ERROR_KINDS:
        assert result["errors"][other]["all"] == (other == kind)
        assert result["dAP50"][other]["base"] == pytest.approx(100 * (other == kind))


@pytest.mark.parametrize("kind, box, category_id", [("background", FAR, 7), ("both", (10, 10, 30, 19), 7)])
def test_repairing_a_false_positive_before_the_true_one_doubles_precision(kind, box, category_id):
    truth = make_truth([(1, 5, BOX), (1, 7, (100, 100, 140, 140))])
    found = make_detections([(1, 7, box, 0.9), (1, 7, (100, 100, 140, 140), 0.8), (1, 5, BOX, 0.7)])
    result = analyse(truth, found, SPLIT)
    assert result["AP50"]["base"] == pytest.approx(50)
    assert {name for name in ERROR_KINDS if result["errors"][name]["all"]} == {kind}
    assert result["dAP50"][kind] == pytest.approx({"novel": 0, "base": 50, "all": 25})


def test_a_missed_box_and_its_repair():
    truth = make_truth([(1, 7, BOX), (1, 7, FAR)])
    result = analyse(truth, make_detections([(1, 7, BOX, 0.9)]), SPLIT)
    assert result["errors"]["missed"] == {"novel": 0, "base": 1, "all": 1}
    assert result["AP50"]["base"] == pytest.approx(100 * 51 / 101)  # recall 0.5 is reached by 51 of the 101 points
    assert result["dAP50"]["missed"]["base"] == pytest.approx(100 * 50 / 101)


def test_novel_called_base_counts_as_base_error_and_costs_novel_precision():
    result = analyse(make_truth([(1, 5, BOX), (1, 7, FAR)]), make_detections([(1, 7, BOX, 0.9)]), SPLIT)
    assert result["errors"]["classification"] == {"novel": 0, "base": 1, "all": 1}
    assert result["dAP50"]["classification"] == pytest.approx({"novel": 100, "base": 0, "all": 50})
    assert result["confusion"]["boxes"]["novel"] == {"right": 0, "novel": 0, "base": 1, "other": 0, "nothing": 0}
    assert result["confusion"]["boxes"]["base"]["nothing"] == 1
    assert result["confusion"]["pairs"] == [
        {"true": "d", "true_subset": "novel", "said": "a", "said_subset": "base", "count": 1}
    ]


def test_of_two_errors_on_one_box_the_better_one_is_repaired_and_the_other_kind_gains_nothing():
    rows = [(1, 7, (10, 10, 30, 19), 0.9), (1, 5, BOX, 0.8)]
    result = analyse(make_truth([(1, 7, BOX)]), make_detections(rows), SPLIT)
    assert result["dAP50"]["localisation"]["base"] == pytest.approx(100)
    assert result["dAP50"]["classification"]["base"] == 0


# --- what the metric leaves out -----------------------------------------------------------------------------------


def test_detections_on_a_crowd_of_their_class_are_no_errors():
    truth = make_truth([(1, 7, (0, 0, 100, 100), True), (1, 5, FAR)])
    rows = [(1, 7, BOX, 0.9), (1, 7, (90, 0, 120, 30), 0.8), (1, 5, BOX, 0.7), (1, 5, FAR, 0.6)]
    assert outcomes(truth, rows) == ["left out", "background", "background", "true"]
    assert not match(truth, make_detections([])).missed[0]


def test_the_federated_rule():
    federated = {1: ([3], [7])}
    truth = make_truth([(1, 7, BOX), (1, 5, (60, 60, 90, 90))], federated)
    rows = [
        (1, 7, BOX, 0.9),  # annotated, found
        (1, 7, FAR, 0.8),  # annotated, not exhaustively
        (1, 5, FAR, 0.7),  # annotated
        (1, 3, FAR, 0.6),  # verified absent
        (1, 50, BOX, 0.5),  # neither
    ]
    assert outcomes(truth, rows) == ["true", "left out", "background", "background", "left out"]
    assert outcomes(make_truth([(1, 7, BOX), (1, 5, (60, 60, 90, 90))]), rows)[4] == "classification"
    result = analyse(truth, make_detections(rows), SPLIT)
    assert result["left_out"] == 2
    assert result["AP50"]["base"] == pytest.approx(100)


def test_categories_that_the_split_does_not_have_are_errors_of_no_subset():
    truth = make_truth([(1, 5, BOX)])
    result = analyse(truth, make_detections([(1, 1000, BOX, 0.9)]), SPLIT)
    assert result["errors"]["classification"] == {"novel": 0, "base": 0, "all": 1}
    assert result["dAP50"]["classification"]["novel"] == pytest.approx(100)
    assert result["confusion"]["boxes"]["novel"]["other"] == 1
    assert result["confusion"]["pairs"][0]["said"] == "category 1000"


def test_a_detection_in_an_unknown_image_is_an_error_that_names_it():
    with pytest.raises(DataError, match="image 2 "):
        match(make_truth([(1, 7, BOX)]), make_detections([(2, 7, BOX, 0.9)]))


# --- against references -------------------------------------------------------------------------------------------


def plain_iou(a, b, of_first=False):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (area_a if of_first else area_a + area_b - shared)


def plain_explanation(boxes, found):
    """The definitions once more, one detection at a time: (kinds, repaired {detection: box}, missed boxes, matched)."""
    kinds, target, matched = {}, {}, {}
    by_score = sorted(range(len(found)), key=lambda d: -found[d][3])
    as_floats = [tuple(float(v) for v in row[2]) for row in boxes], [tuple(float(v) for v in row[2]) for row in found]

    def iou(d, g):
        return plain_iou(as_floats[1][d], as_floats[0][g])

    def boxes_of(d, crowd=False):
        return [g for g, box in enumerate(boxes) if box[0] == found[d][0] and box[3] == crowd]

    for d in by_score:
        free = [g for g in boxes_of(d) if boxes[g][1] == found[d][1] and g not in matched.values()]
        best = max(free, key=lambda g: iou(d, g), default=None)
        if best is not None and iou(d, best) >= 0.5:
            matched[d] = best
    for d in by_score:
        same = [g for g in boxes_of(d) if boxes[g][1] == found[d][1]]
        others = [g for g in boxes_of(d) if boxes[g][1] != found[d][1]]
        crowds = [g for g in boxes_of(d, crowd=True) if boxes[g][1] == found[d][1]]
        nearest, wrong = (max(of, key=lambda g: iou(d, g), default=None) for of in (same, others))
        if d in matched:
            kinds[d] = "true"
        elif any(plain_iou(as_floats[1][d], as_floats[0][g], of_first=True) >= 0.5 for g in crowds):
            kinds[d] = "left out"
        elif nearest is not None and 0.1 <= iou(d, nearest) <= 0.5:
            kinds[d], target[d] = "localisation", nearest
        elif wrong is not None and iou(d, wrong) >= 0.5:
            kinds[d], target[d] = "classification", wrong
        elif nearest is not None and iou(d, nearest) >= 0.5:
            kinds[d] = "duplicate"
        elif all(iou(d, g) <= 0.1 for g in boxes_of(d)):
            kinds[d] = "background"
        else:
            kinds[d] = "both"
    repaired = {}
    for d in by_score:
        if d in target and target[d] not in matched.values() and target[d] not in repaired.values():
            repaired[d] = target[d]
    covered = {*matched.values(), *repaired.values()}
    missed = [g for g, box in enumerate(boxes) if not box[3] and g not in covered]
    return kinds, repaired, missed


def plain_ap50(boxes, found, kinds, repaired, missed, repair=None):
    """{category id: AP50 in percent} with one kind repaired."""
    counts = {i: sum(box[1] == i and not box[3] for box in boxes) for i in SPLIT.category_ids}
    points = {i: [] for i in SPLIT.category_ids}
    for d, (_, category_id, _, score) in enumerate(found):
        if kinds[d] == repair and d in repaired:
            points[boxes[repaired[d]][1]].append((score, True))
        elif kinds[d] not in (repair, "left out"):
            points[category_id].append((score, kinds[d] == "true"))
    result = {}
    for category_id, count in counts.items():
        if not count:
            continue
        count -= sum(boxes[g][1] == category_id for g in missed) if repair == "missed" else 0
        hits, curve = 0, []
        for rank, (_, true) in enumerate(sorted(points[category_id], key=lambda point: -point[0]), start=1):
            hits += true
            curve.append((hits / count if count else 0.0, hits / rank))
        sums = [
            max((p for recall, p in curve if count and recall >= point), default=0.0)
            for point in np.linspace(0, 1, 101)
        ]
        result[category_id] = 100 * math.fsum(sums) / 101
    return result


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definitions_in_plain_python(seed):
    boxes, found = random_rows(seed)
    kinds, repaired, missed = plain_explanation(boxes, found)
    truth, detections = make_truth(boxes, images=[row[0] for row in found]), make_detections(found)
    matches, result = match(truth, detections), analyse(truth, detections, SPLIT)
    assert [OUTCOMES[value] for value in matches.outcome] == [kinds[d] for d in range(len(found))]
    assert np.flatnonzero(matches.repairs).tolist() == sorted(repaired)
    assert np.flatnonzero(matches.missed).tolist() == missed
    assert set(kinds.values()) == set(OUTCOMES)  # the data holds every kind
    base = {category_id for category_id, _ in SPLIT.base}
    before = plain_ap50(boxes, found, kinds, repaired, missed)
    for kind in ERROR_KINDS:
        after = plain_ap50(boxes, found, kinds, repaired, missed, kind)
        for subset, wanted in (("base", base & set(before)), ("novel", set(before) - base), ("all", set(before))):
            gain = np.mean([after[i] for i in wanted]) - np.mean([before[i] for i in wanted])
            assert result["dAP50"][kind][subset] == pytest.approx(gain, abs=1e-10)
            assert result["AP50"][subset] == pytest.approx(np.mean([before[i] for i in wanted]), abs=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_equals_tidecv(seed):
    """Stored figures of tidecv 1.0.1 (no dependency of ours), without crowds, where its definitions and ours agree."""
    theirs = json.loads(TIDECV.read_text())["figures"][seed]
    ours = figures(*random_rows(seed, crowds=False))
    assert ours["AP50"]["all"] == pytest.approx(theirs["AP50"], abs=1e-9)
    for kind in ERROR_KINDS:
        assert ours["errors"][kind]["all"] == theirs["errors"][kind]
        assert ours["dAP50"][kind]["all"] == pytest.approx(theirs["dAP50"][kind], abs=1e-9)


def as_coco(rows, images, **last):
    """The evaluation engine's data set of rows; ``last`` is {COCO's name of the last column: its type}."""
    annotations = []
    for number, (image_id, category_id, box, value) in enumerate(rows, start=1):
        x, y, right, lower = map(float, box)
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": [x, y, right - x, lower - y],
                "area": (right - x) * (lower - y),
                **{key: kind(value) for key, kind in last.items()},
            }
        )
    categories = [{"id": i, "frequency": "f"} for i in SPLIT.category_ids]
    return COCO({"images": images, "annotations": annotations, "categories": categories})


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_the_one_of_the_evaluator_with_ties_and_crowds(seed):
    boxes, found = random_rows(seed)
    found = [(*row[:3], np.float32(round(float(row[3]), 1))) for row in found]
    images = [{"id": image_id} for image_id in sorted({row[0] for row in (*boxes, *found)})]

    engine = COCOeval_faster(as_coco(boxes, images, iscrowd=int), as_coco(found, images, score=float), "bbox")
    engine.evaluate()
    engine.accumulate()
    expected = 100 * engine.eval["precision"][0, :, :, 0, -1].mean()
    result = figures(boxes, found)
    assert result["AP50"]["all"] == pytest.approx(expected, abs=1e-9)
    assert 100 * np.mean(result["curves"]["all"]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_the_one_of_the_evaluator_under_the_federated_rule(seed):
    boxes, found = random_rows(seed, crowds=False)
    random = np.random.default_rng(seed)
    federated = {}
    for image_id in {row[0] for row in (*boxes, *found)}:
        present = {row[1] for row in boxes if row[0] == image_id}
        absent = [i for i in SPLIT.category_ids if i not in present and random.random() < 0.5]
        federated[image_id] = (absent, [i for i in present if random.random() < 0.3])
    images = [
        {"id": image_id, "neg_category_ids": lists[0], "not_exhaustive_category_ids": lists[1]}
        for image_id, lists in sorted(federated.items())
    ]
    engine = COCOeval_faster(
        as_coco(boxes, images), as_coco(found, images, score=float), "bbox", lvis_style=True, print_function=lambda _: 0
    )
    engine.params.maxDets = [300]
    engine.evaluate()
    engine.accumulate()
    precision = engine.eval["precision"][0, :, :, 0, -1]  # recalls x classes
    result = analyse(make_truth(boxes, federated), make_detections(found), SPLIT)
    assert result["left_out"] > 0
    assert result["AP50"]["all"] == pytest.approx(100 * precision.mean(), abs=1e-9)
    assert result["AP50"]["all"] != pytest.approx(figures(boxes, found)["AP50"]["all"], abs=0.1)


# --- properties ---------------------------------------------------------------------------------------------------


def same(one, other):
    """The figures agree: counts exactly, means to rounding."""
    for key in ("errors", "confusion", "left_out", "image_quality"):
        assert one[key] == other[key]
    for subset in ("novel", "base", "all"):
        assert one["AP50"][subset] == pytest.approx(other["AP50"][subset])
        assert one["curves"][subset] == pytest.approx(other["curves"][subset])
        for kind in ERROR_KINDS:
            assert one["dAP50"][kind][subset] == pytest.approx(other["dAP50"][kind][subset], abs=1e-9)


def test_order_of_boxes_and_detections_does_not_matter():
    boxes, found = random_rows(3)
    random = np.random.default_rng(0)
    shuffled = [[rows[i] for i in random.permutation(len(rows))] for rows in (boxes, found)]
    same(figures(boxes, found), figures(*shuffled))


def test_every_image_twice_leaves_every_mean_and_doubles_the_counts():
    boxes, found = random_rows(4)
    once = figures(boxes, found)
    twice = figures(*([*rows, *((row[0] + 1000, *row[1:]) for row in rows)] for rows in (boxes, found)))
    for subset in ("novel", "base", "all"):
        assert twice["AP50"][subset] == pytest.approx(once["AP50"][subset])
        for kind in ERROR_KINDS:
            assert twice["dAP50"][kind][subset] == pytest.approx(once["dAP50"][kind][subset], abs=1e-9)
            assert twice["errors"][kind][subset] == 2 * once["errors"][kind][subset]


def test_no_repair_lowers_average_precision():
    for seed in range(8):
        result = figures(*random_rows(seed))
        assert min(gain for gains in result["dAP50"].values() for gain in gains.values()) >= -1e-9


def test_perfect_detections_have_no_error():
    boxes, _ = random_rows(5)
    found = [(*row[:3], 0.1 + 0.001 * i) for i, row in enumerate(row for row in boxes if not row[3])]
    result = figures(boxes, found)
    assert result["AP50"] == pytest.approx({"novel": 100, "base": 100, "all": 100})
    assert all(count == 0 for counts in result["errors"].values() for count in counts.values())
    assert all(gain == 0 for gains in result["dAP50"].values() for gain in gains.values())
    assert result["confusion"]["pairs"] == []
    assert {share for share, _ in result["image_quality"].values()} == {1.0}


def test_no_detections():
    boxes, _ = random_rows(6)
    result = figures(boxes, [])
    assert result["AP50"] == {"novel": 0, "base": 0, "all": 0}
    assert result["errors"]["missed"]["all"] == sum(not row[3] for row in boxes)
    assert result["dAP50"]["missed"]["all"] == 0  # nothing is left to be precise about
    assert {share for share, _ in result["image_quality"].values()} == {0.0}


def test_no_ground_truth():
    result = figures([], [(1, 7, BOX, 0.5)])
    assert result["AP50"] == {"novel": None, "base": None, "all": None}
    assert result["curves"]["all"] is None
    assert result["errors"]["background"]["base"] == 1
    assert result["image_quality"] == {}


def test_one_class():
    boxes, found = random_rows(7, classes=(7,))
    result = figures(boxes, found, ONE_CLASS)
    assert result["errors"]["classification"]["all"] == result["errors"]["both"]["all"] == 0
    assert result["AP50"]["base"] == result["AP50"]["all"] > 0
    assert result["AP50"]["novel"] is None


# --- confusion and images -----------------------------------------------------------------------------------------


def test_a_detection_that_has_found_another_box_does_not_speak_for_this_one():
    truth = make_truth([(1, 7, (0, 0, 100, 100)), (1, 5, (0, 0, 100, 80))])
    found = make_detections([(1, 5, (0, 0, 100, 80), 0.9), (1, 3, (0, 0, 100, 100), 0.4), (1, 7, (0, 0, 100, 90), 0.3)])
    matches = match(truth, found)
    assert matches.predicted.tolist() == [1, 0]


def test_confusion_lists_the_most_frequent_pairs_first_and_counts_all():
    boxes = [(image_id, 5, BOX) for image_id in range(1, 6)] + [(6, 7, BOX), (7, 50, BOX)]
    said = (7, 7, 3, 90, 5, 3, 50)
    result = analyse(
        make_truth(boxes), make_detections([(i, c, BOX, 0.5) for i, c in enumerate(said, start=1)]), SPLIT, pairs=3
    )["confusion"]
    assert result["boxes"]["novel"] == {"right": 1, "novel": 1, "base": 3, "other": 0, "nothing": 0}
    assert result["boxes"]["base"] == {"right": 1, "novel": 0, "base": 1, "other": 0, "nothing": 0}
    assert [(pair["true"], pair["said"], pair["count"]) for pair in result["pairs"]] == [
        ("d", "a", 2),
        ("a", "b", 1),
        ("d", "b", 1),
    ]


def test_image_quality_is_the_share_true_among_as_many_detections_as_boxes():
    truth = make_truth([(1, 7, BOX), (1, 7, FAR), (2, 5, BOX), (3, 5, BOX)])
    found = make_detections(
        [(1, 7, BOX, 0.9), (1, 3, BOX, 0.8), (1, 7, FAR, 0.7), (2, 5, BOX, 0.1), (3, 7, BOX, 0.2), (3, 5, BOX, 0.1)]
    )
    quality = image_quality(truth, found, match(truth, found))
    assert quality == {1: (0.5, 2), 2: (1.0, 1), 3: (0.0, 1)}
    assert telling_images(quality, 9) == ([3], [2])
    assert telling_images(dict.fromkeys(range(5), (0.5, 1)), 2) == ([0, 1], [2, 3])  # no image is both


@pytest.mark.slow
def test_five_thousand_images_in_less_than_a_minute():
    random = np.random.default_rng(0)
    images, classes = 5000, tuple((i, f"class {i}") for i in range(1, 81))
    split = Split("test 60/20", base=classes[:60], novel=classes[60:])

    def boxes(count):
        corners = random.uniform(0, 500, (count, 2))
        return np.concatenate([corners, corners + random.uniform(10, 150, (count, 2))], axis=1)

    gt, dt = boxes(7 * images), boxes(100 * images)
    near = random.integers(0, 7, 100 * images) + np.repeat(np.arange(images), 100) * 7
    close = random.random(100 * images) < 0.5
    dt[close] = np.sort((gt[near] + random.normal(0, 8, dt.shape)).reshape(-1, 2, 2), axis=1).reshape(-1, 4)[close]
    gt_classes = random.integers(1, 81, len(gt))
    dt_classes = np.where(random.random(len(dt)) < 0.3, gt_classes[near], random.integers(1, 81, len(dt)))
    truth = make_truth([(i // 7 + 1, c, box) for i, (c, box) in enumerate(zip(gt_classes.tolist(), gt))])
    found = Detections(
        np.repeat(np.arange(1, images + 1), 100), dt_classes.astype(np.int32), random.random(len(dt)).astype("f4"), dt
    )
    started = time.process_time()
    analyse(truth, found, split)
    assert time.process_time() - started < 60
