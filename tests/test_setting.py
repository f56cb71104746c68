"""The declared setting: from configurations, zoo records and the user; never guessed; in every report."""

import json

import pytest

from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError
from ovdet2.evaluation import format_table
from ovdet2.evaluation.checked_report import read_report
from ovdet2.evaluation.setting import Setting, meaning, read_setting, stated_setting
from ovdet2.evaluation.training_setting import setting_of, teacher_data
from ovdet2.report.compare import as_html, as_text, compare
from ovdet2.zoo.records import RECORDS, weights_path
from tests.evaluation_sets import feed, random_set

NOTHING = dict.fromkeys(("boxes", "image_labels", "captions", "teacher", "teacher_data"), "none")


@pytest.mark.parametrize(
    "entries, letters",
    [
        ({}, "unknown"),
        (NOTHING | {"novel_names": "no"}, "none"),
        (NOTHING | {"novel_names": "no", "teacher": "ViT-B-32 openai"}, "V"),
        (NOTHING | {"novel_names": "yes", "captions": "CC3M"}, "GW"),
        (NOTHING | {"novel_names": "unknown", "image_labels": "ImageNet-1K (trunk)"}, "G?"),
        ({"teacher": "ViT-B-32 openai", "image_labels": "none"}, "VG?W?"),
        ({"teacher": "none", "image_labels": "ImageNet, 997 classes"}, "G?W"),
    ],
)
def test_letters_follow_from_the_entries(entries, letters):
    setting = Setting(**entries)
    assert setting.letters == letters == setting.to_report()["letters"]
    assert ("not known" in meaning(letters)) == ("?" in letters or letters == "unknown")


def test_the_user_states_letters_and_entries():
    made = stated_setting("VW", ["boxes=Objects365, 365 classes", "captions=none"])
    assert (made.letters, made.boxes, made.captions, made.novel_names) == (
        "VW",
        "Objects365, 365 classes",
        "none",
        "no",
    )
    assert (made.teacher, made.image_labels, made.stated_by) == ("unknown", "unknown", "the command line")
    assert (
        stated_setting("none", []).to_report()
        == Setting("unknown", "none", "none", "no", "none", "none", "", "the command line").to_report()
    )
    assert stated_setting(None, []) == Setting()
    assert stated_setting(None, ["novel_names=yes"]).letters == "V?GW?"


@pytest.mark.parametrize(
    "letters, seen, named",
    [
        ("X", [], "V, G, W"),
        ("VV", [], "VV"),
        ("", [], "other letters"),
        ("V", ["teacher=none"], "contradicts"),
        ("V", ["novel_names=yes"], "contradicts"),
        ("V", ["captions=CC3M"], "contradicts"),
        (None, ["novel_names=perhaps"], "perhaps"),
        (None, ["boxs=COCO"], "did you mean boxes"),
        (None, ["boxes"], "="),
    ],
)
def test_what_is_no_setting_is_refused(letters, seen, named):
    with pytest.raises(UsageError, match=named):
        stated_setting(letters, seen)


def test_a_configuration_states_what_it_trains_on():
    cfg = load_config("ovcoco/vild_r50.yaml")
    novel = ["cat", "dog"]
    setting = setting_of(cfg, novel)
    assert setting.letters == "V" and setting.boxes == "ov_coco_train_base (48 classes)"
    assert (setting.image_labels, setting.captions, setting.novel_names) == ("none", "none", "no")
    assert setting.teacher == "ViT-B-32-quickgelu openai" and "OpenAI" in setting.teacher_data
    assert setting.stated_by == "configuration"
    assert setting_of(cfg, ["Person"]).novel_names == "yes"  # a base class of the training
    closed = setting_of(load_config("ovshapes/closed_set_r18.yaml"), novel)
    assert (closed.letters, closed.teacher) == ("none", "none")
    distilled = setting_of(load_config("ovshapes/clip_detr_align_closed_r18.yaml"), novel)
    assert distilled.letters == "V" and distilled.teacher_data == "captioned images of OV-Shapes"


def test_captions_leave_the_novel_names_unknown():
    source = "[{'name': 'ov_shapes_captions', 'images': 2}]"
    setting = setting_of(load_config("ovshapes/vild_text_r18.yaml", ["DATASETS.SOURCES", source]), ["moon"])
    assert (setting.letters, setting.captions, setting.novel_names) == ("VG?W", "ov_shapes_captions", "unknown")


def test_what_no_configuration_states_is_unknown():
    cfg = load_config("ovcoco/detic_r50.yaml")  # for published weights: it has no training set
    setting = setting_of(cfg, ["cat"], "somebody.pth")
    assert (setting.boxes, setting.image_labels, setting.novel_names) == ("unknown",) * 3
    assert setting.letters == "VG?W?"
    lvis = load_config("ovlvis/vild_r50.yaml")
    assert setting_of(lvis, ["cat"]).novel_names in ("unknown", "no")
    assert setting_of(lvis, ["cat"], trained_names=["dog"]).novel_names == "no"
    assert setting_of(lvis, ["cat"], trained_names=["Cat"]).novel_names == "yes"
    assert teacher_data("clim_a1.safetensors") == "unknown" and teacher_data("laion2b_s32b_b82k") == "LAION-2B"


def test_a_zoo_record_comes_before_the_configuration(monkeypatch, tmp_path):
    monkeypatch.setenv("OVDET2_HOME", str(tmp_path))
    name = "deformable-detr-r50"
    record = RECORDS[name]
    cfg, weights = load_config(record.config), str(weights_path(name))
    setting = setting_of(cfg, [], weights)
    assert (setting.boxes, setting.teacher) == (record.training.boxes, "none")
    assert (setting.novel_names, setting.letters, setting.stated_by) == ("no", "none", f"zoo record {name}")
    further = setting_of(load_config("ovcoco/deformable_detr_r50.yaml"), ["cat"], weights, trains=True)
    assert further.boxes.startswith(f"{record.training.boxes}; then ov_coco_train_base") and further.letters == "V"


def test_keys_replace_what_the_configuration_states():
    cfg = load_config("ovcoco/vild_r50.yaml", ["TEST.SETTING.NOVEL_NAMES", "yes", "TEST.SETTING.CAPTIONS", "CC3M"])
    setting = setting_of(cfg, ["cat"])
    assert (setting.letters, setting.captions) == ("VGW", "CC3M")
    assert setting.stated_by == "configuration, TEST.SETTING"
    cfg = load_config("ovcoco/vild_r50.yaml", ["TEST.SETTING.NOVEL_NAMES", "maybe"])
    with pytest.raises(UsageError, match="maybe"):
        setting_of(cfg, ["cat"])


@pytest.fixture
def reports(make_evaluator):
    """Two reports of the same detections, one with a setting."""
    data, detections = random_set(8)
    setting = Setting(**NOTHING | {"novel_names": "no", "teacher": "ViT-B-32 <openai>"}).to_report()
    made = []
    for facts in ({"setting": setting}, {}):
        evaluator = make_evaluator(data, facts=facts, folder=f"of{len(made)}")
        feed(evaluator, data, detections)
        evaluator.evaluate()
        made.append(evaluator.evaluation.report)
    made[1] |= {key: made[0][key] for key in ("dataset", "json_sha256")}
    return made


def test_table_and_comparison_print_the_setting_and_the_intervals(reports):
    a, b = reports
    table = format_table(a)
    assert "setting V: a vision-language model was used" in table and "boxes, V " in table
    assert "novel names used in training: no" in table and "boxes, unknown" in format_table(b)
    low, high = a["bootstrap"]["intervals"]["AP50-novel"]
    assert f"AP50-novel {low:.2f} to {high:.2f}" in table and low <= a["bbox"]["AP50-novel"] <= high
    assert a["bootstrap"]["figures"]["AP-base"] == pytest.approx(a["bbox"]["AP-base"], abs=1e-10)
    comparison = compare(a, b)
    text = as_text(comparison, ("a", "b"))
    assert "setting: A V: a vision-language model was used; B unknown" in text and "+0.00 to +0.00" in text
    assert set(map(tuple, comparison["intervals"].values())) == {(0.0, 0.0)}
    page = as_html(comparison, (a, b), ("a", "b"))
    assert "ViT-B-32 &lt;openai&gt;" in page and "+0.00 to +0.00" in page
    assert compare(a, b | {"json_sha256": "other"})["intervals"] == {}


def test_reports_without_a_setting_are_unknown(reports):
    old = {key: value for key, value in reports[0].items() if key not in ("setting", "bootstrap")}
    assert read_setting(old)["letters"] == "unknown" and "boxes, unknown" in format_table(old)


@pytest.mark.parametrize(
    "entry, value",
    [
        ("setting", ["V"]),
        ("setting", {"letters": 5}),
        ("bootstrap", 3),
        ("bootstrap", {"resamples": 2}),
        ("bootstrap.intervals", {"AP50-novel": [1]}),
        ("bootstrap.values", {"AP50-novel": ["1", "2"]}),
    ],
)
def test_a_damaged_setting_is_refused(reports, tmp_path, entry, value):
    name, _, inner = entry.partition(".")
    report = reports[0] | {name: reports[0][name] | {inner: value} if inner else value}
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(DataError, match=name):
        read_report(tmp_path)
