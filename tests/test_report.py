"""report.json, the printed table, and what Detectron2 reads."""

import json
import math

import pytest
from detectron2.evaluation.testing import verify_results

from ovdet2.data.datasets.coco_json import Split
from ovdet2.evaluation import format_table, provenance
from ovdet2.evaluation.report import to_results
from tests.evaluation_sets import SPLIT, feed, proposals, random_set


def test_report_and_table_name_protocol_images_and_classes(make_evaluator, tmp_path, caplog):
    data, detections = random_set(8)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections, proposals_of=lambda image_id: proposals([[0, 0, 30, 30]]))
    with caplog.at_level("INFO", logger="ovdet2"):
        results = evaluator.evaluate()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["schema"] == "ovdet2/report/2"
    assert (report["split"], report["images"], report["detections_per_image"]) == ("test 3/3", 30, 100)
    for task in ("bbox", "proposals"):
        assert report[task] == {key: None if math.isnan(value) else value for key, value in results[task].items()}
    assert report["detections"] == len(detections)
    assert list(results["bbox"])[:4] == ["AP50-novel", "AP50-base", "AP50-all", "AP50-odd"]
    assert [row["category_id"] for row in report["per_class"]] == list(SPLIT.category_ids)
    row = report["per_class"][3]
    boxes = sum(box["category_id"] == 5 and not box["iscrowd"] for box in data["annotations"])
    assert (row["category_id"], row["name"], row["subset"], row["boxes"]) == (5, "d", "novel", boxes)
    assert {"AP50", "AP", "AP75", "APs", "APm", "APl", "AR@100"} < row.keys() and "segm" not in row
    table = format_table(report)
    assert table in caplog.text
    for part in ("test 3/3", "generalized", "IoU 0.50", "100 detections per image", "30 images", " s\n", "2/3", "3/3"):
        assert part in table
    assert f"{results['bbox']['AP50-novel']:.2f}" in table


def test_expected_results_of_detectron2_read_the_results(make_evaluator):
    from detectron2.config import get_cfg

    data, detections = random_set(8)
    evaluator = make_evaluator(data)
    feed(evaluator, data, detections)
    results = evaluator.evaluate()
    cfg = get_cfg()
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP50-novel", results["bbox"]["AP50-novel"], 0.01]]
    assert verify_results(cfg, results)
    cfg.TEST.EXPECTED_RESULTS = [["bbox", "AP50-novel", results["bbox"]["AP50-novel"] + 1, 0.5]]
    with pytest.raises(SystemExit):
        verify_results(cfg, results)


def test_a_transfer_target_has_no_base_row(make_evaluator):
    data, detections = random_set(8)
    target = Split("target", (), SPLIT.base + SPLIT.novel)
    evaluator = make_evaluator(data, split=target)
    feed(evaluator, data, detections, proposals_of=lambda image_id: proposals([[0, 0, 30, 30]]), split=target)
    results = evaluator.evaluate()
    report = evaluator.evaluation.report
    assert list(report["classes"]) == ["novel", "all"]
    assert not any("base" in key for task in ("bbox", "proposals") for key in results[task])
    assert results["bbox"]["AP50-novel"] == results["bbox"]["AP50-all"] > 0
    assert "base  " not in format_table(report)


def test_voc_has_two_figures_and_says_how(make_evaluator):
    data, detections = random_set(8)
    data["annotations"] = [a for a in data["annotations"] if not a["iscrowd"]]  # the two differ on those
    evaluators = [make_evaluator(data, metric=metric, folder=metric) for metric in ("ov_voc", "ov_coco")]
    for evaluator in evaluators:
        feed(evaluator, data, detections)
    voc, coco = (evaluator.evaluate()["bbox"] for evaluator in evaluators)
    assert {key.partition("-")[0] for key in voc} == {"AP50", "AP75"}
    assert voc == {key: coco[key] for key in voc}
    assert "101 recall points, all areas" in evaluators[0].evaluation.report["metric"]


@pytest.mark.parametrize("given, limits", [(0, []), (99, []), (300, [100, 300]), (1000, [100, 300, 1000])])
def test_recall_is_reported_up_to_the_proposals_given(make_evaluator, given, limits):
    data, detections = random_set(8, images=3)
    evaluator = make_evaluator(data, proposals_per_image=given)
    feed(evaluator, data, detections, proposals_of=lambda image_id: proposals([[0, 0, 30, 30]]))
    results = evaluator.evaluate()
    expected = {f"AR@{limit}-{subset}" for limit in limits for subset in ("novel", "base", "all")}
    assert set(results.get("proposals", {})) == expected


def test_report_says_what_made_it(make_evaluator, monkeypatch):
    data, detections = random_set(8, images=3)
    evaluator = make_evaluator(data, facts={"vocabulary": {"architecture": "ViT-B-32"}})
    feed(evaluator, data, detections)
    monkeypatch.setattr("sys.argv", ["train_net.py", "--config-file", "a file.yaml"])
    results = evaluator.evaluate()
    report = evaluator.evaluation.report
    assert report["vocabulary"] == {"architecture": "ViT-B-32"}
    assert report["command"] == "train_net.py --config-file 'a file.yaml'"
    assert {"python", "ovdet2", "detectron2", "torch", "faster-coco-eval"} <= set(report["versions"])
    assert report["git_commit"] is None or len(report["git_commit"]) == 40
    assert to_results(report)["bbox"].keys() == results["bbox"].keys()
    monkeypatch.setenv("PATH", "")  # no git
    assert provenance.provenance()["git_commit"] is provenance.provenance()["git_modified"] is None
