"""AP of every decoder layer in the report: from the detections of the layers to report.json and report.html."""

import pytest

from ovdet2.config import load_config
from ovdet2.engine import Trainer
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation import format_table
from ovdet2.evaluation.report import to_results
from ovdet2.report.html_report import decoder_layer_section
from tests.evaluation_sets import feed, random_set
from tests.micro_training import write_data

FIGURES = [f"{name}-{subset}" for name in ("AP50", "AP") for subset in ("novel", "base", "all")]


def three_layers(make_evaluator, folder, seed=6, **options):
    """(evaluator, its report) of a detector whose layers find more and more."""
    data, detections = random_set(seed)
    evaluator = make_evaluator(data, folder=folder, decoder_layers=3, **options)
    feed(evaluator, data, detections, layers=[detections[::4], detections[::2]])
    evaluator.evaluate()
    return evaluator, evaluator.evaluation.report


def test_each_layer_has_the_figures_of_its_detections(make_evaluator):
    """The last one's are those of the detector, and of an evaluation that knows of no layers."""
    data, detections = random_set(6)
    _, report = three_layers(make_evaluator, "layers")
    alone = []
    for number, found in enumerate((detections[::4], detections[::2], detections)):
        evaluator = make_evaluator(data, folder=f"alone{number}")
        feed(evaluator, data, found)
        evaluator.evaluate()
        assert evaluator.evaluation.report["decoder_layers"] == []
        alone.append(evaluator.evaluation.report["bbox"])
    assert len(report["decoder_layers"]) == 3
    for layer, expected in zip(report["decoder_layers"], alone):
        assert [name for name in layer if name in FIGURES] == FIGURES
        assert layer == {name: expected[name] for name in layer}
    assert report["bbox"] == alone[-1]
    assert alone[0]["AP50-all"] < alone[1]["AP50-all"] < alone[2]["AP50-all"]
    assert "decoder_layers" not in to_results(report)


def test_shown_in_the_table_and_on_the_page(make_evaluator):
    _, report = three_layers(make_evaluator, "out")
    lines = format_table(report).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("decoder layer"))
    assert lines[start].split()[2:] == FIGURES
    section = decoder_layer_section(report["decoder_layers"])
    for number, layer in enumerate(report["decoder_layers"], start=1):
        assert lines[start + number].split() == [str(number), *(f"{layer[name]:.2f}" for name in FIGURES)]
        assert f'<td class="n">{layer["AP50-novel"]:.2f}</td>' in section
    assert decoder_layer_section([]) == ""


def test_voc_has_no_mean_over_thresholds(make_evaluator):
    _, report = three_layers(make_evaluator, "out", metric="ov_voc")
    assert {name.partition("-")[0] for name in report["decoder_layers"][0]} == {"AP50"}


def test_measured_again_from_the_files(make_evaluator, tmp_path):
    evaluator, report = three_layers(make_evaluator, "stopped")
    data, detections = random_set(6)
    (tmp_path / "stopped" / "report.json").unlink()
    again = make_again(make_evaluator, data, tmp_path / "stopped")
    assert again.measure_again().report["decoder_layers"] == report["decoder_layers"]
    (tmp_path / "stopped" / "decoder_layer_01" / "predictions.jsonl").write_text('{"image_id": 1}\n')
    with pytest.raises(DataError, match="decoder_layer_01.* does not have the images"):
        again.measure_again()
    # A new evaluation does not take them for its own, with fewer layers or none.
    again.reset()
    feed(again, data, detections)
    again.evaluate()
    assert again.evaluation.report["decoder_layers"] == []
    assert evaluator.evaluation.report["bbox"] == again.evaluation.report["bbox"]


def make_again(make_evaluator, data, folder):
    """An evaluator for what lies in a folder, without resetting it."""
    evaluator = make_evaluator(data, folder="elsewhere")
    evaluator._output_dir = folder
    return evaluator


def test_detectors_without_layers_are_told_to_switch_it_off(make_evaluator):
    data, detections = random_set(6)
    evaluator = make_evaluator(data, decoder_layers=3)
    for layers in ((), [detections]):
        with pytest.raises(UsageError, match=f"2 decoder layers before the last, and the model gives {len(layers)}"):
            feed(evaluator, data, detections, layers=layers)


def test_the_configuration_reaches_detector_and_evaluator(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_data(tmp_path)
    cfg = load_config("ovshapes/detr_text_r18.yaml", [
        "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.VOCABULARY.TEMPLATES", "single", "OUTPUT_DIR", str(tmp_path),
        "DATASETS.TRAIN", "('ov_micro_train',)", "DATASETS.TEST", "('ov_micro_val',)", "TEST.DECODER_LAYERS", "True",
        "INPUT.MIN_SIZE_TEST", "48", "MODEL.DETR.DIM", "32", "MODEL.DETR.NUM_QUERIES", "8",
    ])  # fmt: skip
    results = Trainer.test(cfg, Trainer.build_model(cfg).eval())
    folder = tmp_path / "inference" / "ov_micro_val"
    assert sorted(path.name for path in folder.glob("decoder_layer_*")) == ["decoder_layer_01", "decoder_layer_02"]
    page = (folder / "report.html").read_text()
    assert "<h2>Decoder layers</h2>" in page and "AP50-novel" in results["bbox"]
