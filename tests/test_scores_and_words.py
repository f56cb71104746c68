"""Calibration, absent words, thresholds of words and the synonym swap, against plain float64 statements."""

import json
import math
import uuid
from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import register_dataset
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.absent_words import AbsentDetections, absent_detections, absent_words
from ovdet2.evaluation.calibration import bin_of, calibration
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.matching import match
from ovdet2.evaluation.name_swap import name_swap, other_names, swap_lines
from ovdet2.evaluation.predictions import Predictions
from ovdet2.evaluation.word_thresholds import choose_thresholds
from ovdet2.ov_shapes.world.classes import CLASS_NAMES
from ovdet2.programs import choose_thresholds as thresholds_program
from ovdet2.programs import report_scores
from ovdet2.report.score_sections import absent_line, absent_section, calibration_section
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.word_lists import other_names_of_ov_shapes
from tests import micro
from tests.evaluation_sets import SIDE, SPLIT, columns_of, feed, random_set

BASE_IDS = [category_id for category_id, _ in SPLIT.base]


def iou(a, b):
    """IoU of two xywh boxes, and the share of the first that lies in the second."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared), shared / (a[2] * a[3])


def judged(data, detections):
    """[(category id, score, correct)] of the detections that count, by the definition of the matching."""
    rows = []
    for image in data["images"]:
        boxes = [a for a in data["annotations"] if a["image_id"] == image["id"]]
        taken = set()
        found = [d for d in detections if d["image_id"] == image["id"]]
        for detection in sorted(found, key=lambda d: -d["score"]):
            same = [b for b in boxes if b["category_id"] == detection["category_id"]]
            free = [(iou(detection["bbox"], b["bbox"])[0], -b["id"]) for b in same if not b["iscrowd"]]
            best, number = max([pair for pair in free if -pair[1] not in taken], default=(0, 0))
            if best >= 0.5:
                taken.add(-number)
            elif any(b["iscrowd"] and iou(detection["bbox"], b["bbox"])[1] >= 0.5 for b in same):
                continue
            rows.append((detection["category_id"], float(detection["score"]), best >= 0.5))
    return rows


@pytest.fixture(scope="module")
def case():
    data, detections = random_set(3, images=60)
    random = np.random.default_rng(5)
    for detection in detections:  # scores of many values, with some ties
        detection["score"] = float(np.float32(round(random.random() ** 2, 2)))
    truth, columns = columns_of(data, detections)
    return data, detections, truth, columns, match(truth, columns)


# --- calibration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binning", ["mass", "width"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_calibration_equals_its_definition(case, binning, floor):
    data, detections, _, columns, matches = case
    result = calibration(columns, SPLIT, matches, floor, 7, binning)
    for subset in ("novel", "base", "all"):
        rows = [
            (score, correct)
            for category_id, score, correct in judged(data, detections)
            if score >= floor and (subset == "all" or (category_id in BASE_IDS) == (subset == "base"))
        ]
        total = len(rows)
        ascending = sorted(score for score, _ in rows)
        starts = [ascending[i * total // 7] for i in range(7)]
        bins = {}
        for score, correct in rows:
            number = min(int(score * 7), 6) if binning == "width" else max(i for i in range(7) if starts[i] <= score)
            bins.setdefault(number, []).append((score, correct))
        errors = [
            len(each) / total * abs(sum(c for _, c in each) / len(each) - math.fsum(s for s, _ in each) / len(each))
            for each in bins.values()
        ]
        found = result["subsets"][subset]
        assert found["detections"] == total and found["correct"] == sum(correct for _, correct in rows) > 0
        assert found["ECE"] == pytest.approx(100 * math.fsum(errors), abs=1e-9) and len(found["curve"]) == len(bins) > 3
        mean = math.fsum(score for score, _ in rows) / total
        assert found["over_confidence"] == pytest.approx(100 * (mean - found["correct"] / total), abs=1e-9)
        assert sum(point["count"] for point in found["curve"]) == total
        assert [point["score"] for point in found["curve"]] == sorted(point["score"] for point in found["curve"])


def test_a_calibrated_detector_has_no_error(case):
    columns, matches = case[3], case[4]
    calibrated = replace(columns, scores=(matches.outcome == 0).astype(np.float64))
    result = calibration(calibrated, SPLIT, matches, 0.0, 10, "width")
    assert all(result["subsets"][subset]["ECE"] == 0 for subset in ("novel", "base", "all"))


def test_equal_scores_share_a_bin_and_options_are_checked(case):
    scores = np.array([0.2, 0.9, 0.2, 0.2, 0.5])
    assert len({*bin_of(scores, 5, "mass")[[0, 2, 3]].tolist()}) == 1
    assert bin_of(np.array([0.0, 0.5, 1.0]), 2, "width").tolist() == [0, 1, 1]
    for options in ((1.0, 5, "mass"), (0.0, 0, "mass"), (0.0, 5, "log")):
        with pytest.raises(UsageError, match="give a floor in"):
            calibration(case[3], SPLIT, case[4], *options)
    none = calibration(replace(case[3], scores=case[3].scores * 0), SPLIT, case[4], 0.5)
    assert none["subsets"]["all"]["ECE"] is None and calibration_section(none) == ""


# --- absent words --------------------------------------------------------------------------------------------------


def test_absent_words_equal_their_definition(case):
    """The class "f" has no annotation."""
    data, detections, truth, columns, _ = case
    predictions = Predictions(columns, {}, 0)
    found = absent_detections(truth, predictions, SPLIT, ())
    assert found is not None and found.words == ("f",)
    result = absent_words(found, len(truth.images), 0.4)
    scores = [d["score"] for d in detections if d["category_id"] == 1]
    images = [image["id"] for image in data["images"]]
    highest = [
        max([d["score"] for d in detections if d["category_id"] == 1 and d["image_id"] == image], default=0.0)
        for image in images
    ]
    false = sum(score > 0.4 for score in scores)
    assert false > 0 and result["false_positives_per_image"] == pytest.approx(false / len(images), abs=1e-12)
    share = 100 * sum(score > 0.4 for score in highest) / len(images)
    assert result["images_with_false_positives"] == pytest.approx(share, abs=1e-12)
    for values, key in ((scores, "score_quantiles"), (highest, "highest_score_quantiles")):
        for share, value in result[key].items():
            ascending = sorted(values)
            assert value == ascending[max(math.ceil(float(share) * len(values)) - 1, 0)]
    [row] = result["per_word"]
    assert row["word"] == "f" and row["highest_score"] == max(scores)
    assert f"{false / len(images):.3f} false positives per image" in absent_line(result)
    assert "Absent words" in absent_section(result) and absent_section(None) == ""


def test_words_that_are_not_known_to_be_absent_do_not_count(case):
    _, _, truth, columns, _ = case
    federated = replace(truth, images={i: r | {"neg_category_ids": []} for i, r in truth.images.items()})
    assert absent_detections(federated, Predictions(columns, {}, 0), SPLIT, ()) is None


def test_several_absent_words_and_a_choice_among_them():
    word, image_ids = np.array([0, 1, 1, 2]), np.array([7, 7, 8, 9])
    found = AbsentDetections(("a", "b c", "d"), word, image_ids, np.array([0.9, 0.5, 0.6, 0.1]))
    result = absent_words(found, 10, 0.3)
    assert result["false_positives_per_image"] == 0.3
    assert result["false_positives_per_image_and_word"] == pytest.approx(0.1, abs=1e-12)
    assert [row["word"] for row in result["per_word"]] == ["b c", "a", "d"]
    chosen = found.only(["D", "b_c"])
    assert chosen.word.tolist() == [1, 1, 0] and absent_words(chosen, 10, 0.3)["images_with_false_positives"] == 20
    with pytest.raises(UsageError, match="'e' is no absent word .* TEST.DISTRACTORS"):
        found.only(["e"])
    nothing = replace(found, word=word[:0], image_ids=image_ids[:0], scores=found.scores[:0])
    assert absent_words(nothing, 10)["score_quantiles"]["0.5"] is None


# --- thresholds ----------------------------------------------------------------------------------------------------


def best_of(rows, objects):
    """(F1, threshold) of the best cut of [(score, correct)]."""
    distinct = sorted({score for score, _ in rows}, reverse=True)
    best = (-1.0, 0.0)
    for score, lower in zip(distinct, [*distinct[1:], 0.0]):
        above = [correct for value, correct in rows if value >= score]
        f1 = 2 * sum(above) / (len(above) + objects)
        if f1 > best[0]:
            best = f1, (score + lower) / 2
    return best


def test_thresholds_equal_a_search_over_all_cuts(case):
    data, detections, truth, columns, matches = case
    rows = judged(data, detections)
    objects = {
        category_id: sum(a["category_id"] == category_id and not a["iscrowd"] for a in data["annotations"])
        for category_id in SPLIT.category_ids
    }
    least = sorted(objects.values())[2]  # at least one annotated class has too few
    chosen = choose_thresholds(truth, columns, SPLIT, matches, least + 1)
    general = best_of([row[1:] for row in rows], sum(objects.values()))[1]
    assert chosen.general == pytest.approx(general, abs=1e-12)
    separate = []
    for place, category_id in enumerate(SPLIT.category_ids):
        own = [row[1:] for row in rows if row[0] == category_id]
        f1, threshold = best_of(own, objects[category_id])
        separate.append(objects[category_id] > least and f1 > 0)
        wanted = threshold if separate[-1] else general
        assert chosen.values[place] == pytest.approx(wanted, abs=1e-12)
        above = [correct for score, correct in own if score > wanted]
        if objects[category_id]:
            expected = 2 * sum(above) / (len(above) + objects[category_id])
            assert chosen.f1[place] == pytest.approx(expected, abs=1e-12)
            assert chosen.f1[place] >= chosen.general_f1[place] - 1e-12
        else:
            assert np.isnan(chosen.f1[place])
    assert chosen.chosen.tolist() == separate and 0 < sum(separate) < len(separate)
    wrong = replace(matches, outcome=np.full(len(columns), 6, dtype=np.int8))
    with pytest.raises(DataError, match="no detection is correct"):
        choose_thresholds(truth, columns, SPLIT, wrong)


# --- the programs, on an evaluation --------------------------------------------------------------------------------


@pytest.fixture
def evaluated(tmp_path):
    """(folder, data set) of an evaluation with two distractor words."""
    data, detections = random_set(3, images=20)
    for annotation in data["annotations"]:
        annotation["category_id"] = annotation["category_id"] if annotation["category_id"] != 90 else 5
    (tmp_path / "a.json").write_text(json.dumps(data))
    name = f"test_{uuid.uuid4().hex}"
    register_dataset(name, tmp_path / "a.json", tmp_path, SPLIT)
    evaluator = OpenVocabularyEvaluator(name, tmp_path / "out", distractors=("street sign", "unicorn"))
    evaluator.reset()
    images = [image["id"] for image in data["images"]]
    feed(evaluator, data, detections, images[1:])
    boxes = Boxes(torch.tensor([[1.0, 1.0, 9.0, 9.0]] * 3))
    classes = torch.tensor([7, 7, 6])
    found = Instances((SIDE, SIDE), pred_boxes=boxes, scores=torch.tensor([0.75, 0.5, 0.25]), pred_classes=classes)
    evaluator.process([{"image_id": images[0]}], [{"instances": found}])
    evaluator.evaluate()
    yield tmp_path / "out", name
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name, None)


def test_scores_of_an_evaluation_with_distractors(evaluated, tmp_path, capsys):
    folder, _ = evaluated
    report = json.loads((folder / "report.json").read_text())
    assert report["absent_words"]["words"] == 4  # "e" and "f" have no annotation
    assert read_report(folder)["absent_words"] == report["absent_words"]
    for entry, value, named in (
        ("words", "4", "absent_words.words is '4'"),
        ("threshold", None, "absent_words.threshold is 'None'"),
        ("per_word", [{"word": 3}], r"absent_words.per_word\[0\]"),
        ("score_quantiles", [0.5], "absent_words.score_quantiles"),
    ):
        damaged = report | {"absent_words": report["absent_words"] | {entry: value}}
        (tmp_path / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(DataError, match=named):
            read_report(tmp_path)
    options = [str(folder), "--threshold", "0.4", "--absent", "unicorn, street sign"]
    result = report_scores.main(options)
    absent = result["absent_words"]
    assert absent["false_positives_per_image"] == 2 / 20 and absent["images_with_false_positives"] == 5
    assert absent["per_word"][0] == {"word": "unicorn", "false_positives_per_image": 0.1, "highest_score": 0.75}
    printed = capsys.readouterr().out
    assert "2 words that no image contains: 0.100 false positives per image" in printed and "Expected calib" in printed
    assert json.loads((folder / "scores.json").read_text()) == result
    assert "<h2>Calibration</h2>" in (folder / "scores.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="'dragon' is no absent word"):
        report_scores.main([str(folder), "--absent", "dragon"])


def test_thresholds_are_saved_with_the_vocabulary(evaluated, tmp_path, capsys):
    folder, name = evaluated
    names = ("zebra", *(name for _, name in (*SPLIT.base, *SPLIT.novel)))
    micro.vocabulary(names, 0).save(tmp_path / "v.safetensors")
    options = [str(folder), "--vocabulary", str(tmp_path / "v.safetensors"), "--min-objects", "1"]
    thresholds_program.main([*options, "--output", str(tmp_path / "w.safetensors")])
    read = Vocabulary.load(tmp_path / "w.safetensors")
    assert read.names == names and len(read.thresholds) == 7 and all(0 < value < 1 for value in read.thresholds)
    assert f"thresholds chosen on {name}" in capsys.readouterr().out
    general = read.thresholds[0]  # "zebra" is in no annotation
    assert read.thresholds[names.index("f")] == general and len(set(read.thresholds)) > 2
    assert Vocabulary.load(tmp_path / "v.safetensors").thresholds is None  # a file without them
    micro.vocabulary(("zebra",), 0).save(tmp_path / "z.safetensors")
    with pytest.raises(UsageError, match="no word of the vocabulary is a class of test 3/3"):
        thresholds_program.main(
            [str(folder), "--vocabulary", str(tmp_path / "z.safetensors"), "--output", str(tmp_path / "w.safetensors")]
        )
    MetadataCatalog.get(name).__dict__["ov_validation_set"] = "the_val_set"
    with pytest.raises(UsageError, match="held out for final tables.*Use the_val_set"):
        thresholds_program.main([*options, "--output", str(tmp_path / "w.safetensors")])


def test_thresholds_follow_their_words():
    words = replace(micro.vocabulary(), thresholds=(0.1, 0.2, None, 0.4, 0.5))
    assert words.selected([3, 2]).thresholds == (0.4, None) and words.base().thresholds == (0.1, 0.2, None)
    joined = words.joined(micro.vocabulary(("cat",), 0))
    assert joined.thresholds == (*words.thresholds, None)
    assert micro.vocabulary().joined(words.selected([0]).__class__(
        ("x",), [False], words.embeddings[:1], words.teacher, "single", thresholds=(0.3,)
    )).thresholds == (None,) * 5 + (0.3,)  # fmt: skip
    for wrong, named in (((0.1,), "5 words but 1 thresholds"), ((0.1, 0.2, "x", 0.4, 0.5), "word 2 is 'x'")):
        with pytest.raises(DataError, match=named):
            replace(words, thresholds=wrong)


# --- synonym swap --------------------------------------------------------------------------------------------------


def report_with(values, metric="AP50"):
    rows = zip((7, 3, 50, 5, 90), "abcde", ["base"] * 3 + ["novel"] * 2, values)
    return {"per_class": [{"category_id": i, "name": n, "subset": s, metric: v} for i, n, s, v in rows]}


def test_the_drop_equals_its_definition():
    before, after = [50.0, 40.5, None, 30.25, 20.0], [45.0, 41.0, None, 10.0, 20.0]
    swapped = {"a": ("x",), "c": ("y",), "d": ("z", "w")}
    result = name_swap(report_with(before), report_with(after), swapped)
    assert result["metric"] == "AP50" and result["swapped"] == {"novel": 1, "base": 1, "all": 2}
    assert result["figures"]["base"] == {"before": 50, "after": 45, "drop": 5}
    assert result["figures"]["all"]["drop"] == pytest.approx((5 + 20.25) / 2, abs=1e-12)
    assert result["all_classes"]["all"]["before"] == pytest.approx((50 + 40.5 + 30.25 + 20) / 4, abs=1e-12)
    assert result["all_classes"]["novel"]["drop"] == pytest.approx(20.25 / 2, abs=1e-12)
    assert [(row["name"], row["names"]) for row in result["per_class"]] == [("d", ["z", "w"]), ("a", ["x"])]
    assert any("d -> z; w" in line and "20.25" in line for line in swap_lines(result))
    only_base = name_swap(report_with(before, "AP"), report_with(after, "AP"), {"a": ("x",)})
    assert only_base["metric"] == "AP" and only_base["figures"]["novel"] is None and swap_lines(only_base)


def test_other_names_are_neither_the_class_nor_another_class():
    names = ("sofa", "Sea_Lion", "cat")
    synonyms = {"sofa": ("Sofa", "couch", "settee", "cat"), "sea lion": ("sea-lion",), "cat": ("cat",)}
    assert other_names(names, synonyms)["sofa"] == ("couch",)
    assert other_names(names, synonyms, 2) == {"sofa": ("settee",)}
    assert other_names(names, synonyms, None)["sofa"] == ("couch", "settee") and "cat" not in other_names(
        names, synonyms
    )


def test_other_names_of_ov_shapes():
    words = other_names_of_ov_shapes()
    assert words.names == CLASS_NAMES and all(len(names) == 4 for names in words.synonyms)
    every = [name for names in words.synonyms for name in names]
    assert len(set(every)) == 4 * 65 and not set(every) & set(words.names)
    synonyms = dict(zip(words.names, words.synonyms))
    assert all(len(other_names(words.names, synonyms, place)) == 65 for place in (1, 2, 3, 4))
    assert other_names(words.names, synonyms, 2)["striped moon"] == ("moon striped",)


def test_a_split_without_absent_words_has_none(case):
    _, _, truth, columns, _ = case
    annotated = sorted(set(truth.category_ids.tolist()))
    split = Split("some", base=tuple((i, str(i)) for i in annotated))
    assert absent_detections(truth, Predictions(columns, {}, 0), split, ()) is None
