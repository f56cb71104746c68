"""`ovdet2 eval --predictions`: files of other tools, without a hand edit; malformed files; no scores; scores from a CLIP."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from ovdet2 import cli
from ovdet2.data.datasets.coco_json import Split
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation import foreign_predictions
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.foreign_predictions import entries_of
from ovdet2.evaluation.precision_recall import precision_and_recall
from ovdet2.evaluation.rescoring import rescore
from ovdet2.programs.evaluate_predictions import main
from ovdet2.vlm.crops import crop_regions, scale_boxes
from tests.evaluation_sets import SIDE, SPLIT, columns_of, feed, instances, random_set, with_masks, xyxy
from tests.test_lvis_evaluation import random_lvis

KEYS = ("AP50-novel", "AP50-base", "AP50-all", "AP-all")


@pytest.fixture
def run(registered, tmp_path):
    """Evaluates a text or json as a file with ``ovdet2 eval``; gives report.json."""

    def evaluate(data, content, *options, split=SPLIT, **registration):
        path = tmp_path / "theirs.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        name = registered(data, split, **registration)
        words = ["--predictions", str(path), "--dataset", name, "--output", str(tmp_path / "theirs"), *options]
        main(["--bootstrap", "0", *words])
        return read_report(tmp_path / "theirs")

    return evaluate


@pytest.mark.parametrize("form", ["numbers", "digits", "names", "lines", "spaces", "xyxy"])
def test_every_form_of_a_file_gives_the_figures_of_the_evaluator(make_evaluator, run, form, monkeypatch):
    monkeypatch.setattr(foreign_predictions, "_CHUNK", 50)  # entries lie across chunks
    data, detections = random_set(4)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    expected = evaluator.evaluate()["bbox"]
    names, options = dict(SPLIT.base + SPLIT.novel), []
    shuffled = [detections[i] for i in np.random.default_rng(0).permutation(len(detections))]
    shuffled.sort(key=lambda found: -found["score"])  # equal scores of an image keep their order below
    changed = [dict(found) for found in detections]
    for found in changed:
        if form == "digits":
            found |= {"image_id": str(found["image_id"]), "category_id": str(found["category_id"])}
        elif form == "names":
            found["category_name"] = names[found.pop("category_id")]
        elif form == "xyxy":
            found["bbox"] = xyxy(found["bbox"])[0].tolist()
            options = ["--boxes", "xyxy"]
    content = json.dumps(changed)
    if form == "lines":
        content = "\n".join(map(json.dumps, changed)) + "\n"
    if form == "spaces":
        content = f"\ufeff \n{json.dumps(changed, indent=2)}\n\n"
    report = run(data, content, *options)
    assert {key: report["bbox"][key] for key in KEYS} == {key: pytest.approx(expected[key], abs=1e-9) for key in KEYS}
    assert report["detections"] == len(detections) and len(report["predictions_sha256"]) == 64
    assert report["setting"]["letters"] == "unknown"


def test_lvis_with_masks_in_any_order_and_from_our_own_file(make_evaluator, run, tmp_path):
    """The best 5 of an image over all words, run-length codes as texts and as lists."""
    data, detections = random_lvis(2)
    scores = np.random.default_rng(0).permutation(len(detections)) / 1000
    detections = [{**found, "score": float(np.float32(score))} for found, score in zip(detections, scores)]
    from ovdet2.data.datasets.lvis_split import frequency_split

    kinds = {"split": frequency_split, "metric": "ov_lvis", "masks": True}
    evaluator = make_evaluator(data, max_detections=5, **kinds)
    feed(evaluator, data, detections, split=frequency_split(data["categories"]))
    expected = evaluator.evaluate()
    random = np.random.default_rng(1)
    report = run(data, [detections[i] for i in random.permutation(len(detections))], "--detections", "5", **kinds)
    for task in ("bbox", "segm"):
        for key in ("AP-all", "AP50-novel", "APr", "APc", "APf"):
            assert report[task][key] == pytest.approx(expected[task][key], abs=1e-9, nan_ok=True), (task, key)
    ours = (tmp_path / "out" / "predictions.jsonl").read_text()
    again = run(data, ours, "--detections", "5", **kinds)
    assert (again["bbox"], again["segm"]) == (report["bbox"], report["segm"])


def test_a_json_of_transformers_is_evaluated_as_it_is(run, tmp_path):
    """Post-processing of a tiny YOLOS with COCO's ids as labels, converted in the way of its users' scripts."""
    transformers = pytest.importorskip("transformers")
    data, _ = random_set(3, images=6)
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[64, 64],
        patch_size=16, num_detection_tokens=10, num_labels=91,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.YolosForObjectDetection(config).eval()
    processor, results = transformers.YolosImageProcessor(size={"height": 64, "width": 64}), []
    for weights in network.parameters():  # the detection tokens begin with zeros
        torch.nn.init.normal_(weights, std=0.3)
    random = np.random.default_rng(0)
    for image in data["images"]:
        pixels = random.integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        with torch.no_grad():
            output = network(**processor(images=pixels, return_tensors="pt"))
        [found] = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[(SIDE, SIDE)])
        for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):
            left, top, right, bottom = box.tolist()
            # A random network has any label; the ids of the annotation file are used.
            category_id = [7, 3, 50, 5, 90, 1][label.item() % 6]
            box = [left, top, right - left, bottom - top]
            results.append(
                {"image_id": image["id"], "category_id": category_id, "bbox": box, "score": round(score.item(), 6)}
            )
    report = run(data, results, "--setting", "none", "--seen", "boxes=nothing: random weights")
    assert report["detections"] == len(results) == 60
    assert (report["setting"]["letters"], report["setting"]["boxes"]) == ("none", "nothing: random weights")
    page = (tmp_path / "theirs" / "report.html").read_text()
    assert "nothing: random weights" in page and "setting none" in page


def test_the_export_of_detectron2_is_evaluated_as_it_is(make_evaluator, run):
    """coco_instances_results.json of its COCOEvaluator, with masks."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    data, detections = with_masks(*random_set(5))
    evaluator = make_evaluator(data, masks=True)
    feed(evaluator, data, detections)
    expected, exported = evaluator.evaluate(), []
    for image in data["images"]:
        of_image = [found for found in detections if found["image_id"] == image["id"]]
        for entry in instances_to_coco_json(instances(of_image), image["id"]):
            exported.append({**entry, "category_id": SPLIT.category_ids[entry["category_id"]]})
    report = run(data, exported, masks=True)
    for task in ("bbox", "segm"):
        for key in KEYS:
            assert report[task][key] == pytest.approx(expected[task][key], abs=1e-6)


def good():
    """A data set of two images and entries that are right."""
    image = {"width": SIDE, "height": SIDE, "file_name": "1.jpg"}
    box = {"category_id": 7, "bbox": [10, 20, 30, 40]}
    truth = [{**box, "id": 1, "image_id": 4, "area": 1200, "iscrowd": 0}]
    categories = [{"id": category_id, "name": name} for category_id, name in SPLIT.base + SPLIT.novel]
    data = {"images": [{**image, "id": 4}, {**image, "id": 9}], "annotations": truth, "categories": categories}
    data["categories"].append({"id": 77, "name": "outside"})
    return data, [{**box, "image_id": 4, "score": 0.75}, {**box, "image_id": 9, "score": 0.5, "category_id": 3}]


def changed(**entries):
    """Two entries of which the second is changed; None removes."""
    first, second = good()[1]
    second |= entries
    return [first, {key: value for key, value in second.items() if value is not None}]


HERE = r"entry 1 \(image id 9\)"


@pytest.mark.parametrize(
    "content, named",
    [
        ("", "is empty"),
        ("{]", "entry 0 is not valid JSON"),
        (json.dumps(good()[1])[:-1], "within the list, at entry"),
        (json.dumps(good()[1])[:-30], "entry 1 is not valid JSON"),
        (json.dumps(good()[1]) + "[]", "after the list of 2 entries"),
        ({"annotations": good()[1]}, "entry 0: it has no image_id.*give the list 'annotations'"),
        ([good()[1][0], 5], "entry 1: it is 5"),
        (changed(image_id=None), "entry 1: it has no image_id"),
        (changed(image_id=1.5), r"entry 1 \(image id 1.5\).*no whole number"),
        (changed(image_id=True), r"entry 1 \(image id True\)"),
        (changed(image_id=123), r"entry 1 \(image id 123\): the data set has no such image"),
        (changed(category_id=0), f"{HERE}.*no category 0.*not numbers of the model's outputs"),
        (changed(category_id=None), f"{HERE}.*category_id is None"),
        (changed(category_id="dd"), f"{HERE}.*no class named 'dd'"),
        (changed(bbox=None), f"{HERE}.*bbox is None"),
        (changed(bbox=[1, 2, 3]), f"{HERE}.*four finite numbers"),
        (changed(bbox=[1, 2, "3", 4]), f"{HERE}.*four finite numbers"),
        (json.dumps(changed(bbox=[1, 2, float("nan"), 4])), f"{HERE}.*four finite numbers"),
        (changed(bbox=[50, 50, -10, 10]), f"{HERE}.*negative size"),
        (changed(score="high"), f"{HERE}.*score is 'high'"),
        (json.dumps(changed(score=float("inf"))), f"{HERE}.*finite number"),
        (changed(score=None), f"{HERE}.*no score, and 1 of 2"),
        (changed(score=0.75), "all 2 detections have the score 0.75.*--without-ap.*--rescore"),
        ([{**entry, "bbox": [0.1, 0.2, 0.3, 0.4]} for entry in good()[1]], "relative to the image"),
        ([{**entry, "bbox": [110, 120, 150, 190]} for entry in good()[1]], r"entry 0 \(image id 4\).*--boxes xyxy"),
    ],
)
def test_a_malformed_file_is_refused_and_its_entry_named(run, content, named):
    with pytest.raises(DataError, match=named):
        run(good()[0], content)


@pytest.mark.parametrize(
    "segmentation, named",
    [
        ([[1, 2, 3, 4, 5, 6]], "segmentation is"),
        ({"size": [9, 9], "counts": "04"}, r"the mask has the size \[9, 9\]"),
        (None, "1 of 2 entries have a segmentation"),
    ],
)
def test_malformed_masks_are_refused(run, segmentation, named):
    data, entries = good()
    data["annotations"][0]["segmentation"] = [[10, 20, 40, 20, 40, 60]]
    entries[0]["segmentation"] = {"size": [SIDE, SIDE], "counts": [SIDE * SIDE - 5, 5]}
    if segmentation is not None:
        entries[1]["segmentation"] = segmentation
    with pytest.raises(DataError, match=named):
        run(data, entries, masks=True)


def test_xyxy_is_refused_where_it_cannot_be(run):
    with pytest.raises(DataError, match=r"entry 1 \(image id 9\).*ends before it begins.*remove --boxes xyxy"):
        run(good()[0], changed(bbox=[50, 50, 20, 20]), "--boxes", "xyxy")


def test_classes_outside_of_the_split_compete_and_are_dropped(run):
    data, entries = good()
    report = run(data, [*entries, {**entries[0], "category_id": 77, "score": 0.9}])
    assert (report["distractors"], report["distractor_detections"], report["detections"]) == (["outside"], 1, 2)
    assert report["bbox"]["AP50-base"] == 100
    report = run(data, [*entries, {**entries[0], "category_id": 77, "score": 0.9}], "--detections", "1")
    assert report["bbox"]["AP50-base"] == 0


def test_without_scores_there_is_precision_and_recall_and_the_reason(run, tmp_path, capsys):
    data, detections = random_set(3)
    for found in detections:
        del found["score"]
    report = run(data, detections, "--without-ap")
    assert "none of the" in report["scores_tell_nothing"] and not any(key.startswith("AP") for key in report["bbox"])
    assert "no AP: none of the" in capsys.readouterr().out
    assert "No AP: none of the" in (tmp_path / "theirs" / "report.html").read_text()
    truth, found = columns_of(data, [{**each, "score": 1.0} for each in detections])
    figures = precision_and_recall(truth, found, SPLIT, "ov_coco")
    for category_id in (7, 3, 50, 5, 90):
        expected = plain_precision_recall(data, detections, category_id)
        assert [figures[category_id][name] for name in ("P50", "R50", "P75", "R75")] == pytest.approx(expected)
    assert report["bbox"]["R50-base"] == pytest.approx(np.mean([figures[i]["R50"] for i in (7, 3, 50)]))
    assert np.isnan(figures[1]["R50"])
    with pytest.raises(UsageError, match="remove --without-ap"):
        run(data, [{**each, "score": number / 1000} for number, each in enumerate(detections)], "--without-ap")


def plain_precision_recall(data, detections, category_id):
    """P50, R50, P75, R75 in percent of one class, by loops over boxes in float64."""
    values = []
    for needed in (0.5, 0.75):
        true = false = 0
        of_class = [a for a in data["annotations"] if a["category_id"] == category_id]
        for image in data["images"]:
            boxes = [a for a in of_class if a["image_id"] == image["id"]]
            used = set()
            for found in detections:
                if (found["image_id"], found["category_id"]) != (image["id"], category_id):
                    continue
                plain = [i for i, a in enumerate(boxes) if not a["iscrowd"] and i not in used]
                best = max(plain, key=lambda i: overlap(found["bbox"], boxes[i]["bbox"])[0], default=None)
                if best is not None and overlap(found["bbox"], boxes[best]["bbox"])[0] >= needed:
                    used.add(best)
                    true += 1
                elif not any(a["iscrowd"] and overlap(found["bbox"], a["bbox"])[1] >= needed for a in boxes):
                    false += 1
        objects = sum(not a["iscrowd"] for a in of_class)
        values += [100 * true / (true + false), 100 * true / objects]
    return values


def overlap(a, b):
    """(IoU, share of the first box within the second) of two XYWH boxes."""
    sides = [max(0.0, min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i])) for i in (0, 1)]
    common = sides[0] * sides[1]
    return common / (a[2] * a[3] + b[2] * b[3] - common), common / (a[2] * a[3])


def test_a_clip_scores_boxes_with_words(micro_teacher, tmp_path):
    """Against each box by itself: two crops, their embeddings, a softmax in float64."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "1.png")
    data, entries = good()
    boxes = [[5, 5, 30, 20], [10, 20, 30, 35], [0, 0, 79, 59]]
    found = [{**entries[0], "bbox": box, "category_id": i} for box, i in zip(boxes, (7, 5, 7))]
    found.insert(1, {**entries[1], "bbox": [2, 2, 40, 40]})
    _, detections = columns_of(data, found)
    images = {image_id: {"file_name": str(tmp_path / "1.png")} for image_id in (4, 9)}
    words = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    scores = rescore(micro_teacher, words, images, detections, SPLIT)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for score, entry in zip(scores, found):
        box = torch.tensor(xyxy(entry["bbox"]))
        embedding = np.zeros(16)
        for factor in (1.0, 1.5):
            crop = crop_regions(image, scale_boxes(box, factor, 60, 80), 32, filter=micro_teacher.interpolation)
            embedding += micro_teacher.encode_image(crop)[0].double().numpy()
        logits = micro_teacher.logit_scale * (words.double().numpy() @ (embedding / np.linalg.norm(embedding)))
        probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert score == pytest.approx(probs[SPLIT.id_to_contiguous[entry["category_id"]]], abs=1e-5)
    assert len(set(scores.tolist())) == 4


def test_rescoring_needs_no_scores_and_is_stated(run, micro_clip_weights, tmp_path):
    data, entries = good()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(tmp_path / "1.jpg")
    for entry in entries:
        del entry["score"]
    clip = [
        "--rescore",
        "--architecture",
        "micro-clip",
        "--pretrained",
        str(micro_clip_weights),
        "--templates",
        "single",
    ]
    report = run(data, [*entries, {**entries[0], "category_id": 77}], *clip)
    assert "softmax" in report["scores"] and "1 detection of other classes dropped" in report["scores"]
    assert report["setting"]["teacher"].startswith("micro-clip") and report["bbox"]["AP50-base"] == 100
    with pytest.raises(UsageError, match="--architecture"):
        run(data, entries, "--rescore")


def test_the_verb_compares_with_a_report(make_evaluator, registered, tmp_path, capsys):
    data, detections = random_set(4)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    evaluator.evaluate()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (tmp_path / "theirs.json").write_text(json.dumps(detections))
    words = ["eval", "--predictions", str(tmp_path / "theirs.json"), "--dataset", report["dataset"]]
    words += ["--output", str(tmp_path / "theirs"), "--setting", "VW", "--compare", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    printed = capsys.readouterr().out
    assert exit.value.code == 0 and "B - A" in printed and "+0.00 to +0.00" in printed
    assert "setting: A unknown: what the training saw is not known; B VW" in printed


def test_entries_are_read_in_constant_memory(tmp_path, monkeypatch):
    """The file is longer than a chunk, which is all that is held."""
    monkeypatch.setattr(foreign_predictions, "_CHUNK", 1000)
    path = tmp_path / "long.json"
    path.write_text("[" + ",".join(json.dumps({"a": number}) for number in range(20_000)) + "]")
    entries = entries_of(path)
    assert next(entries) == {"a": 0}
    tracemalloc.start()
    assert sum(1 for _ in entries) == 19_999
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000 < path.stat().st_size


def test_a_split_without_novel_classes(run):
    data, entries = good()
    everything = Split("closed", base=SPLIT.base + SPLIT.novel)
    assert run(data, entries, split=everything)["bbox"]["AP50-all"] == 100
