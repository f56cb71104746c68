"""Train, evaluate, predict and draw on a small OV-Shapes, through the programs a user types."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import train_net
from ovdet2 import Detector, Vocabulary
from ovdet2.config import find_config, load_config
from ovdet2.data.datasets.ov_shapes import ensure_generated
from ovdet2.errors import DataError, UsageError
from ovdet2.modeling import build_vocabulary
from ovdet2.modeling.build import build_classifier, build_teacher
from ovdet2.programs import choose_thresholds, report_scores, swap_names
from ovdet2.programs import predict as demo
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary.bank import WordBank
from ovdet2.vocabulary.templates import clean_name
from tests.processes import ROOT, run_program

CONFIG = "ovshapes/vild_text_r18.yaml"
SMALL = [
    "SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.WARMUP_ITERS", "1", "DATALOADER.NUM_WORKERS", "0",
    "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "MODEL.RPN.POST_NMS_TOPK_TEST", "100",
    "MODEL.VOCABULARY.TEMPLATES", "single",
    "TEST.EXPECTED_RESULTS", "[]",  # of the full training, not of three steps
]  # fmt: skip
WITHOUT_PICTURES = ["TEST.HTML_REPORT", "False"]


def program(*arguments, root):
    """Run a program of the project as a user would, with ``root`` as the folder of data sets."""
    return run_program(*arguments, env={"DETECTRON2_DATASETS": str(root)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of data sets, output folder) of a training of three steps."""
    root, output = tmp_path_factory.mktemp("datasets"), tmp_path_factory.mktemp("output")
    ensure_generated(root, counts={"train2017": 16, "val2017": 6}, workers=1)
    options = [*SMALL, *WITHOUT_PICTURES, "OUTPUT_DIR", output]
    done = program("train_net.py", "--config-file", f"configs/{CONFIG}", *options, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "48/17" in done.stdout and "novel" in done.stdout  # the table is printed
    return root, output


@pytest.fixture(scope="module")
def predictor(run):
    return Detector(CONFIG, run[1] / "model_final.pth", SMALL)


def report_of(output):
    return json.loads((output / "inference" / "ov_shapes_val_all" / "report.json").read_text())


def test_training_leaves_weights_config_and_report(run):
    _, output = run
    report = report_of(output)
    assert (
        report["images"] == 6
        and report["classes"]["base"]["classes"] == 48
        and report["classes"]["novel"]["classes"] == 17
    )
    assert {"AP50-novel", "AP50-base", "AP50-all", "AP50-unseen_nouns", "AP50-unseen_combinations"} <= set(
        report["bbox"]
    )
    assert set(report["proposals"]) == {"AR@100-novel", "AR@100-base", "AR@100-all"}  # 100 proposals are made
    assert (output / "config.yaml").is_file() and (output / "model_final.pth").is_file()
    state = torch.load(output / "model_final.pth", weights_only=True)["model"]
    prefix = "roi_heads.box_predictor.cls_score.vocabulary."
    assert state[prefix + "embeddings"].shape == (65, 128)
    assert b'"ovshapes-resnet"' in bytes(state[prefix + "manifest"].tolist())
    assert not any("scorer" in name or "clip" in name for name in state)


def test_two_processes_evaluate_as_one(run, tmp_path, monkeypatch):
    root, output = run
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    paths = ["MODEL.WEIGHTS", str(output / "model_final.pth"), "OUTPUT_DIR", str(tmp_path), "MODEL.DEVICE", "cpu"]
    train_net.run(
        ["--config-file", f"configs/{CONFIG}", "--eval-only", "--num-gpus", "2", *SMALL, *WITHOUT_PICTURES, *paths]
    )
    one, two = report_of(output), report_of(tmp_path)
    assert two["processes"] == 2 and one["detections"] > 0
    for key in ("bbox", "proposals", "per_class"):
        assert one[key] == two[key]
    assert predictions_of(output) == predictions_of(tmp_path)


def predictions_of(output):
    """Dict of image id to all that was predicted for it."""
    lines = (output / "inference" / "ov_shapes_val_all" / "predictions.jsonl").read_text().splitlines()
    return {record["image_id"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize("name", ["clip_on_crops", "clip_on_crops_objectness", "vild_text_clip"])
def test_reference_rows_run_on_the_same_weights(run, name):
    root, output = run
    image = next((root / "ov_shapes" / "val2017").glob("*.jpg"))
    plain = Detector(CONFIG, output / "model_final.pth", SMALL).predict(image)
    other = Detector(f"ovshapes/{name}_r18.yaml", output / "model_final.pth", SMALL).predict(image)
    assert len(other) and not torch.equal(plain.scores[:20], other.scores[:20])


def test_predictor_takes_any_words(run, predictor):
    image = next((run[0] / "ov_shapes" / "val2017").glob("*.jpg"))
    predictor.set_vocabulary("striped moon, red mug, plain circle")
    buffer = predictor.model.vocabulary
    assert predictor.names == ("striped moon", "red mug", "plain circle")
    assert buffer.base_mask[:3].tolist() == [False, False, True]  # training had boxes of circles only
    assert buffer.num_detectable == 3 and buffer.num_base == 48  # the other base words compete
    single, batch = predictor.predict(image), predictor.predict([image, np.asarray(Image.open(image))])
    assert torch.allclose(single.scores, batch[0].scores, rtol=1e-2, atol=0) and len(single) > 0
    assert torch.allclose(batch[0].scores, batch[1].scores, rtol=1e-2, atol=0)
    with Image.open(image) as picture:
        assert single.image_size == (picture.height, picture.width)
    predictor.set_vocabulary(["moon"])
    assert (predictor.predict(image).pred_classes == 0).all()
    assert predictor.predict([]) == []


def test_images_of_several_sizes_together_or_each_by_itself(run, predictor):
    """Padding to the largest image changes scores; one pass per image does not."""
    predictor.set_vocabulary("moon, plain circle")
    [first, *_] = sorted((run[0] / "ov_shapes" / "val2017").glob("*.jpg"))
    pixels = np.asarray(Image.open(first).convert("RGB"))
    images = [pixels, np.ascontiguousarray(pixels[: pixels.shape[0] // 2]), pixels.repeat(2, axis=1)]
    singles = [predictor.predict(image) for image in images]
    for one, other in zip(predictor.predict(images, together=False), singles, strict=True):
        require_equal(one, other)
    together = predictor.predict(images)
    assert [each.image_size for each in together] == [image.shape[:2] for image in images]
    assert not all(
        len(each) == len(other) and torch.equal(each.scores, other.scores)
        for each, other in zip(together, singles, strict=True)
    )


def test_few_words_compete_with_those_of_training(run):
    """48 base words minus those that are asked, with the embeddings of the checkpoint; "off", or 8 words, has none."""
    image = next((run[0] / "ov_shapes" / "val2017").glob("*.jpg"))
    detector = Detector(CONFIG, run[1] / "model_final.pth", SMALL)
    bank, known = detector.model.vocabulary, detector.model.vocabulary.words
    detector.set_vocabulary("moon, plain circle")
    assert detector.names == ("moon", "plain circle") and len(bank) == 2 + 47
    rows = [row for row, name in enumerate(known.names[:48]) if name != "plain circle"]
    assert bank.names[2:] == tuple(known.names[row] for row in rows)
    assert torch.equal(bank.embeddings[2:], known.embeddings[rows])
    among_others = detector.predict(image)
    assert set(among_others.pred_classes.tolist()) <= {0, 1}
    detector.set_vocabulary("moon, round thing; plain circle")  # a synonym does not compete with its word
    assert len(bank) == 2 + 47 and "plain circle" not in bank.names
    detector.set_vocabulary("moon, plain circle", competitors="off")
    assert len(bank) == 2 and detector.predict(image).scores.max() > among_others.scores.max()
    detector.set_vocabulary("moon, plain circle")
    assert torch.equal(detector.predict(image).scores, among_others.scores)
    detector.set_vocabulary("a, b, c, d, e, f, g, h")
    assert len(bank) == bank.num_detectable == 8
    off = Detector(CONFIG, run[1] / "model_final.pth", SMALL, competitors="off")
    off.set_vocabulary("moon")
    assert len(off.model.vocabulary) == 1
    with pytest.raises(UsageError, match="competitors is 'on': choose"):
        detector.set_vocabulary("moon", competitors="on")


def test_competitors_of_a_vocabulary_file_need_no_teacher(run, tmp_path, monkeypatch):
    """Their embeddings are those of the checkpoint."""
    words = Vocabulary.build(["moon"], build_teacher(load_config(CONFIG, SMALL)), "single")
    words.save(tmp_path / "v.safetensors")
    monkeypatch.setattr("ovdet2.predictor.words_to_vocabulary", lambda *_: pytest.fail("embedded anew"))
    file = ["MODEL.VOCABULARY.FILE", str(tmp_path / "v.safetensors")]
    detector = Detector(CONFIG, run[1] / "model_final.pth", [*SMALL, *file])
    assert detector.names == ("moon",) and len(detector.model.vocabulary) == 1 + 48


def test_predictor_knows_the_words_of_training_however_they_come(run, predictor, tmp_path):
    """Names, a list, a text file, a Vocabulary, a vocabulary file, MODEL.VOCABULARY.FILE: whatever mask a file has."""
    names, known = ["striped moon", "Plain_Circle", "red mug"], [False, True, False]
    cfg = load_config(CONFIG, SMALL)
    words = Vocabulary.build(names, build_teacher(cfg), "single", [True, False, False])
    words.save(tmp_path / "v.safetensors")
    (tmp_path / "w.txt").write_text("\n".join(names), encoding="utf-8")
    bank = predictor.model.vocabulary
    for given in (
        ", ".join(names), names, tmp_path / "w.txt", str(tmp_path / "w.txt"), words, tmp_path / "v.safetensors",
        str(tmp_path / "v.safetensors"),
    ):  # fmt: skip
        predictor.set_vocabulary(["moon"])
        predictor.set_vocabulary(given)
        assert predictor.names == tuple(names) and bank.base_mask[:3].tolist() == known
        assert torch.allclose(bank.embeddings[:3], words.embeddings, atol=1e-6)
    other = Detector(
        CONFIG, run[1] / "model_final.pth", [*SMALL, "MODEL.VOCABULARY.FILE", str(tmp_path / "v.safetensors")]
    )
    assert other.names == tuple(names) and other.model.vocabulary.base_mask[:3].tolist() == known
    assert bank.trained_base_names == other.model.vocabulary.trained_base_names and len(bank.trained_base_names) == 48


@pytest.mark.parametrize("count", [1, 3, 7, 8, 12])
def test_the_same_words_give_the_same_detections_through_every_door(run, tmp_path, count):
    """By name, as a list, in a text file, in a vocabulary file whatever its mask, and by MODEL.VOCABULARY.FILE."""
    split, weights = load_split(), run[1] / "model_final.pth"
    image = next((run[0] / "ov_shapes" / "val2017").glob("*.jpg"))
    bases, novels = [name for _, name in split.base], [name for _, name in split.novel]
    names = ["red mug", *bases[: count // 2], *novels[: count - 1 - count // 2]]
    by_name = Detector(CONFIG, weights, SMALL)
    by_name.set_vocabulary(", ".join(names))
    wanted, bank = by_name.predict(image), by_name.model.vocabulary
    (tmp_path / "w.txt").write_text("\n".join(names), encoding="utf-8")
    (tmp_path / "w.json").write_text(json.dumps(names), encoding="utf-8")
    doors = {
        "list": names,
        "text file": tmp_path / "w.txt",
        "json": tmp_path / "w.json",
        "dict": dict.fromkeys(names, ()),
    }
    for mask in ([False] * len(names), [True] * len(names)):
        file = tmp_path / f"{mask[0]}.safetensors"
        Vocabulary.build(names, build_teacher(by_name.cfg), "single", mask).save(file)
        doors[f"file, all {mask[0]}"] = file
        door = Detector(CONFIG, weights, [*SMALL, "MODEL.VOCABULARY.FILE", str(file)])
        assert torch.equal(door.model.vocabulary.base_mask, bank.base_mask)
        require_equal(door.predict(image), wanted)
    for door in doors.values():
        other = Detector(CONFIG, weights, SMALL)
        other.set_vocabulary(door)
        assert torch.equal(other.model.vocabulary.base_mask, bank.base_mask)
        require_equal(other.predict(image), wanted)


def require_equal(detections, others):
    assert len(others) and len(detections) == len(others)
    for name in ("scores", "pred_classes"):
        assert torch.equal(detections.get(name), others.get(name))
    assert torch.equal(detections.pred_boxes.tensor, others.pred_boxes.tensor)


def test_an_evaluation_takes_a_file_of_the_words_whatever_its_mask_and_order(run, tmp_path):
    """Made from a list of words, it states no base word: base words are those of the data set."""
    split = load_split()
    words = ["zebra", *reversed(split.names), "yak"]
    Vocabulary.build(words, build_teacher(load_config(CONFIG, SMALL)), "single").save(tmp_path / "v.safetensors")
    cfg = load_config(CONFIG, [*SMALL, "MODEL.VOCABULARY.FILE", str(tmp_path / "v.safetensors")])
    found, wanted = build_vocabulary(cfg), build_vocabulary(load_config(CONFIG, SMALL))
    assert found.names == wanted.names and found.category_ids == wanted.category_ids
    assert torch.equal(found.base_mask, wanted.base_mask) and found.num_base == 48
    assert torch.allclose(found.embeddings, wanted.embeddings, atol=1e-6)
    cfg.TEST.DISTRACTORS = ["yak", "gnu"]  # the file has one of them
    further = build_vocabulary(cfg)
    assert further.names == (*wanted.names, "yak", "gnu") and further.category_ids[-2:] == (-1, -2)
    assert further.num_base == 48 and torch.equal(further.embeddings[:65], found.embeddings)


def test_fine_tuning_on_fewer_classes_forgets_no_trained_word(run, tmp_path):
    """The checkpoint of a training on one class, from weights that had seen boxes of 48."""
    root, output = run
    data = json.loads((root / "ov_shapes" / "annotations" / "instances_train2017.json").read_text())
    ids = {name: number for number, name in load_split().base}
    present = {annotation["category_id"] for annotation in data["annotations"]}
    chosen = next(name for name, number in ids.items() if number in present and name != "plain circle")
    kept = [annotation for annotation in data["annotations"] if annotation["category_id"] == ids[chosen]]
    (tmp_path / "fewer.json").write_text(json.dumps(data | {"annotations": kept}))
    images = str(root / "ov_shapes" / "train2017")
    own = {"json": str(tmp_path / "fewer.json"), "images": images, "base": [chosen]}
    own["novel"] = ["plain circle", next(name for _, name in load_split().novel)]
    options = [
        "DATASETS.OWN", [own | {"name": "fewer", "base_only": True}], "DATASETS.TRAIN", "('fewer',)",
        "DATASETS.TEST", "('fewer',)", "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", tmp_path,
        "MODEL.WEIGHTS", output / "model_final.pth",
    ]  # fmt: skip
    options += WITHOUT_PICTURES
    done = program("train_net.py", "--config-file", f"configs/{CONFIG}", *SMALL, *options, root=root)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "inference" / "fewer" / "report.json").read_text())
    assert report["novel_words_trained_on"] == ["plain circle"]  # the split's mask stays, the report says what it hides
    tuned = Detector(CONFIG, tmp_path / "model_final.pth", SMALL)
    assert tuned.names == (chosen, *own["novel"]) and tuned.model.vocabulary.base_mask.tolist() == [True, False, False]
    assert tuned.model.vocabulary.trained_base_names == {clean_name(name) for name in ids}
    tuned.set_vocabulary(["plain circle", chosen, own["novel"][1], "red mug"])
    assert tuned.model.vocabulary.base_mask[:4].tolist() == [True, True, False, False]
    assert tuned.model.vocabulary.num_base == 48  # the other base words of the first training compete


def test_predictor_refuses(run, predictor, tmp_path):
    for words, message in (("", "empty"), ("cat, Cat", "twice")):
        with pytest.raises(UsageError, match=message):
            predictor.set_vocabulary(words)
    rows = torch.nn.functional.normalize(torch.randn(1, 128), dim=1)
    with pytest.raises(DataError, match="teacher ViT-B-32 / openai"):
        predictor.set_vocabulary(Vocabulary(["cat"], [False], rows, Fingerprint.stated("ViT-B-32", "openai"), "single"))
    with pytest.raises(UsageError, match="RGB array"):
        predictor.predict(np.zeros((64, 64), dtype=np.float32))
    Image.new("RGB", (16, 64)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match="thin.png"):
        predictor.predict(tmp_path / "thin.png")
    with pytest.raises(DataError, match="16x64 pixels"):  # as of a file
        predictor.predict(Image.new("RGB", (16, 64)))
    with pytest.raises(UsageError, match="needs trained weights"):
        Detector(CONFIG, overrides=[*SMALL, "MODEL.WEIGHTS", ""])
    with pytest.raises(DataError, match="ovshapes_r18.safetensors holds only the backbone"):
        Detector(CONFIG, overrides=SMALL)  # the trunk that training starts from is no detector


def test_vocabulary_file_must_fit(run, tmp_path):
    teacherless = ["MODEL.VOCABULARY.FILE", str(tmp_path / "v.safetensors")]
    rows = torch.nn.functional.normalize(torch.randn(65, 128), dim=1)
    names = load_split().names
    Vocabulary(names, load_split().base_mask, rows, Fingerprint.stated("ViT-B-32", "openai"), "single").save(
        tmp_path / "v.safetensors"
    )
    with pytest.raises(DataError, match="v.safetensors is of teacher ViT-B-32 / openai.*MODEL.TEACHER"):
        Detector(CONFIG, run[1] / "model_final.pth", [*SMALL, *teacherless])
    words = Vocabulary(
        names[:3], load_split().base_mask[:3], rows[:3], Fingerprint.stated("ovshapes-resnet", "embedded"), "single"
    )
    words.save(tmp_path / "v.safetensors")
    with pytest.raises(DataError, match="holds 3 words .3 base., OV-Shapes 48/17 has 65"):
        build_vocabulary(load_config(CONFIG, [*SMALL, *teacherless]))
    predictor = Detector(CONFIG, run[1] / "model_final.pth", [*SMALL, *teacherless])  # which needs no data set
    assert predictor.names == names[:3]


def test_a_vocabulary_file_is_joined_by_the_distractors(run, tmp_path):
    cfg = load_config(CONFIG, [*SMALL, "TEST.DISTRACTORS", "['zebra', 'tie']"])
    whole = build_vocabulary(cfg)
    assert whole.names[65:] == ("zebra", "tie") and whole.category_ids[65:] == (-1, -2) and whole.num_base == 48
    Vocabulary(
        whole.names[:65], whole.base_mask[:65], whole.embeddings[:65], whole.teacher, "single", whole.category_ids[:65]
    ).save(tmp_path / "v.safetensors")
    cfg.MODEL.VOCABULARY.FILE = str(tmp_path / "v.safetensors")
    joined = build_vocabulary(cfg)
    assert joined.names == whole.names and joined.category_ids == whole.category_ids
    assert torch.allclose(joined.embeddings, whole.embeddings, atol=1e-6)
    cfg.MODEL.OVD.CLASSIFIER = "closed_set"
    with pytest.raises(UsageError, match="closed-set head takes no TEST.DISTRACTORS"):
        build_classifier(cfg, 8, WordBank(whole))


def load_split():
    from ovdet2.data.datasets.ov_shapes import OV_SHAPES

    return OV_SHAPES


def test_demo_draws_and_survives_a_damaged_image(run, tmp_path, capsys):
    root, output = run
    inputs = tmp_path / "in"
    inputs.mkdir()
    good = sorted((root / "ov_shapes" / "val2017").glob("*.jpg"))[:2]
    for path in good:
        (inputs / path.name).write_bytes(path.read_bytes())
    (inputs / "torn.jpg").write_bytes(good[0].read_bytes()[:500])
    pictures = demo.main(
        [
            "--config-file",
            CONFIG,
            "--input",
            str(inputs),
            str(inputs / "*1.jpg"),
            "--vocabulary",
            "moon, red star",
            "--output",
            str(tmp_path / "out"),
            "--confidence-threshold",
            "0.0",
            *SMALL,
            "MODEL.WEIGHTS",
            str(output / "model_final.pth"),
        ]
    )
    assert "torn.jpg" in capsys.readouterr().out
    assert [p.stem for p in pictures] == [p.stem for p in good]
    records = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {d["word"] for r in records for d in r["detections"]} <= {"moon", "red star"}
    with Image.open(pictures[0]) as picture:
        assert max(picture.size) >= 640 and len(set(picture.resize((40, 40)).convert("RGB").get_flattened_data())) > 20
    with pytest.raises(UsageError, match="vocabulary is empty"):
        command = [
            "--config-file",
            CONFIG,
            "--input",
            str(inputs),
            "--vocabulary",
            "",
            "--output",
            str(tmp_path),
            *SMALL,
        ]
        demo.main([*command, "MODEL.WEIGHTS", str(output / "model_final.pth")])
    with pytest.raises(UsageError, match="nothing matches"):
        demo.main(
            [
                "--config-file",
                CONFIG,
                "--input",
                "no/*.png",
                "--output",
                str(tmp_path),
                *SMALL,
                "MODEL.WEIGHTS",
                str(output / "model_final.pth"),
            ]
        )


@pytest.mark.parametrize("path", sorted(p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml")), ids=str)
def test_every_configuration_loads_and_claims(path):
    load_config(str(path))
    header = find_config(str(path)).read_text().split("_BASE_")[0].split("\nMODEL:")[0]
    assert header.startswith("#")
    if path.parts[1] != "base":
        assert f"--config-file {path}" in header


def test_training_on_another_split_than_the_vocabulary_is_refused(run, monkeypatch):
    from ovdet2.data.loader import build_train_loader

    monkeypatch.setenv("DETECTRON2_DATASETS", str(run[0]))
    for other in ("ov_coco_val_all", "coco_2017_val"):  # another split, and none
        with pytest.raises(UsageError, match=f"ov_shapes_train_base and {other} have different base classes"):
            build_train_loader(load_config(CONFIG, [*SMALL, "DATASETS.TEST", f"('{other}',)"]))


def test_predict_with_negative_words_and_thresholds(run, tmp_path, capsys):
    """Thresholds of a vocabulary file drop what is below them, unless overridden; a negative word is not detected."""
    image, weights = next((run[0] / "ov_shapes" / "val2017").glob("*.jpg")), str(run[1] / "model_final.pth")
    words = Vocabulary.build(["moon", "plain circle"], build_teacher(load_config(CONFIG, SMALL)), "single")
    replace(words, thresholds=(0.0, 1.0)).save(tmp_path / "v.safetensors")
    command = ["--config-file", CONFIG, "--input", str(image), "--output", str(tmp_path / "out"), "--overlap", "1"]

    def predicted(*options):
        demo.main([*command, *options, *SMALL, "MODEL.WEIGHTS", weights])
        [record] = json.loads((tmp_path / "out" / "detections.json").read_text())
        return record["detections"]

    assert {detection["word"] for detection in predicted("--vocabulary", str(tmp_path / "v.safetensors"))} == {"moon"}
    assert "thresholds of the vocabulary: 2 of 2 words" in capsys.readouterr().out
    further = ["--negative-words", "red mug", "--confidence-threshold", "0"]
    assert {d["word"] for d in predicted("--vocabulary", str(tmp_path / "v.safetensors"), *further)} == set(words.names)
    with pytest.raises(UsageError, match="--negative-words and --pooling need --vocabulary"):
        demo.main([*command, "--negative-words", "red mug", *SMALL, "MODEL.WEIGHTS", weights])


@pytest.mark.slow
def test_synonyms_scores_and_thresholds_of_a_run(run, tmp_path, monkeypatch, capsys):
    """The programs on a run: swapped names change the embeddings only, and the first evaluation is reused."""
    root, output = run
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    weights = str(output / "model_final.pth")
    options = [*SMALL, *WITHOUT_PICTURES, "OUTPUT_DIR", str(tmp_path), "MODEL.WEIGHTS", weights]
    words = ["--config-file", CONFIG, "--names", "ov_shapes"]
    result = swap_names.main([*words, "--name", "2", *options])
    assert result["swapped"]["all"] == report_of(tmp_path)["classes"]["all"]["with_ground_truth"]
    swapped = Vocabulary.load(tmp_path / "synonyms" / "other_names.safetensors")
    teacher = build_teacher(load_config(CONFIG, SMALL))
    row = swapped.names.index("striped moon")
    [expected] = Vocabulary.build(["moon striped"], teacher, "single").embeddings
    assert torch.allclose(swapped.embeddings[row], expected, atol=1e-6) and swapped.synonyms[row] == ("moon striped",)
    before, after = report_of(tmp_path), report_of(tmp_path / "synonyms")
    for subset in ("novel", "base", "all"):
        assert result["figures"][subset]["before"] == pytest.approx(before["bbox"][f"AP50-{subset}"], abs=1e-9)
        assert result["figures"][subset]["after"] == pytest.approx(after["bbox"][f"AP50-{subset}"], abs=1e-9)
    same = ("weights", "dataset", "json_sha256")
    assert [before[key] for key in same] == [after[key] for key in same]
    swap_names.main([*words, "--name", "mean", *options])
    assert report_of(tmp_path)["finished"] == before["finished"]  # not evaluated again
    folder = str(tmp_path / "inference" / "ov_shapes_val_all")
    scores = report_scores.main([folder, "--floor", "0", "--binning", "width"])  # untrained scores are low
    assert scores["calibration"]["subsets"]["all"]["detections"] == before["detections"]
    given = ["--weights", weights, "--output", str(tmp_path / "v.safetensors")]
    saved = choose_thresholds.vocabulary_of(choose_thresholds.parse_args([folder, *given]))
    assert saved.names == swapped.names
    detector = Detector(CONFIG, weights, SMALL)
    image = next((root / "ov_shapes" / "val2017").glob("*.jpg"))
    detector.set_vocabulary(saved)
    every = detector.predict(image)
    limit = float(every.scores.median())
    detector.set_vocabulary(replace(saved, thresholds=(limit,) * 65))
    assert 0 < len(detector.predict(image)) == int((every.scores.double() > limit).sum()) < len(every)
    require_equal(detector.predict(image, threshold=0.0), every)
