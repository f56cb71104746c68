"""No program writes onto a file that it reads: not by its own name, not through a link, and not after it has begun."""

import importlib
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from ovdet2 import programs
from ovdet2.command_line import keep_inputs
from ovdet2.errors import UsageError
from tests.micro_training import write_data

CLIP = ["--architecture", "ViT-B-32", "--pretrained"]
SHAPES = ["--config-file", "ovshapes/cckt_full_r18.yaml"]

# program -> (module, argv for the input and the folder of the output, name of the output in its folder)
PROGRAMS = {
    "vocab: word list": ("build_vocabulary", lambda i, o: ["--words", i, *CLIP, "openai", "--output", o], "words.txt"),
    "vocab: table": (
        "build_vocabulary",
        lambda i, o: ["--words", "a", "--import-table", i, *CLIP, "x", "--output", o],
        "t.npy",
    ),
    "vocab: json": ("build_vocabulary", lambda i, o: ["--json", i, *CLIP, "openai", "--output", o], "a.json"),
    "vocab: teacher": ("build_vocabulary", lambda i, o: ["--words", "a", *CLIP, i, "--output", o], "w.safetensors"),
    "vocab: templates": (
        "build_vocabulary",
        lambda i, o: ["--words", "a", *CLIP, "openai", "--templates", i, "--output", o],
        "t.txt",
    ),
    "prior: lists": (
        "build_concept_priors",
        lambda i, o: ["--backend", "file", "--input", i, "--dataset", "ov_micro_val", "--output", o],
        "lists.json",
    ),
    "prior: vocabulary": (
        "build_concept_priors",
        lambda i, o: ["--backend", "clip", "--vocabulary", i, *CLIP, "x", "--dataset", "ov_micro_val", "--output", o],
        "v.safetensors",
    ),
    "cache build: boxes": (
        "build_region_cache",
        lambda i, o: [*SHAPES, "--dataset", "ov_micro_train", "--boxes", i, "--output", os.path.dirname(o)],
        "manifest.json",
    ),
    "cache build: weights": (
        "build_region_cache",
        lambda i, o: [*SHAPES, "--dataset", "ov_micro_train", "--output", os.path.dirname(o), "MODEL.WEIGHTS", i],
        "shard-00000.safetensors",
    ),
    "cache inspect: vocabulary": (
        "inspect_cache",
        lambda i, o: [os.path.dirname(i), "--vocabulary", i, "--output", os.path.dirname(o)],
        "regions.png",
    ),
    "dataset check: report": (
        "check_dataset",
        lambda i, o: ["--json", "other.json", "--images", os.path.dirname(i), "--report", o],
        "image.png",
    ),
    "dataset check: copy": (
        "check_dataset",
        lambda i, o: ["--json", "other.json", "--images", os.path.dirname(i), "--fix", o, "--overwrite"],
        "image.png",
    ),
    "report compare": ("compare_reports", lambda i, o: [i, "other.json", "--html", o], "report.json"),
    "report make": (
        "make_report",
        lambda i, o: [os.path.dirname(i), "--dataset", "ov_micro_val", "--output", o],
        "predictions.jsonl",
    ),
    "report queries": (
        "draw_queries",
        lambda i, o: [*SHAPES, "--input", i, "a/x.png", "--output", os.path.dirname(o), "MODEL.WEIGHTS", "w"],
        "x_query1.png",
    ),
    "report score-maps": (
        "draw_score_maps",
        lambda i, o: [*SHAPES, "--input", i, "a/x.png", "--output", os.path.dirname(o), "MODEL.WEIGHTS", "w"],
        "x_layers.png",
    ),
    "pseudo-labels: weights": (
        "build_pseudo_labels",
        lambda i, o: [*SHAPES, "--dataset", "ov_micro_train", "--output", o, "MODEL.WEIGHTS", i],
        "model.pth",
    ),
    "vocab thresholds": (
        "choose_thresholds",
        lambda i, o: ["in", "--vocabulary", i, "--output", o],
        "with_thresholds.safetensors",
    ),
    "eval: predictions": (
        "evaluate_predictions",
        lambda i, o: ["--predictions", i, "--dataset", "ov_micro_val", "--output", os.path.dirname(o)],
        "predictions.jsonl",
    ),
    "cache captions": (
        "build_caption_cache",
        lambda i, o: ["--dataset", "ov_micro_val", "--architecture", "micro-clip", "--pretrained", i, "--output", o],
        "captions.safetensors",
    ),
    "import-weights": ("import_deformable_detr", lambda i, o: [i, "--output", o], "detr.safetensors"),
    "import-weights: detic": (
        "import_detic",
        lambda i, o: [i, "--config-file", "ovlvis/detic_r50.yaml", "--output", o],
        "detic.safetensors",
    ),
    "import-weights: detic's words": (
        "import_detic",
        lambda i, o: ["in.pth", "--vocabulary", i, "--config-file", "ovlvis/detic_r50.yaml", "--output", o],
        "detic.safetensors",
    ),
    "import-weights: detectron2": (
        "import_detectron2",
        lambda i, o: ["--config-file", "coco/clip_on_crops_r50.yaml", "--output", o, i],
        "crops.safetensors",
    ),
    "teacher": (
        "evaluate_teacher",
        lambda i, o: ["--dataset", "ov_micro_val", *CLIP, i, "--output", os.path.dirname(o)],
        "accuracy.json",
    ),
    "experiment": (
        "experiments",
        lambda i, o: ["ov-shapes", "--rows", "vild_text", "--output", os.path.dirname(o), "--", "MODEL.WEIGHTS", i],
        "results.json",
    ),
    "predict: picture": (
        "predict",
        lambda i, o: ["--config-file", "ovshapes-vild", "--input", i, "a/x.png", "--output", os.path.dirname(o)],
        "x.png",
    ),
    "predict: records": (
        "predict",
        lambda i, o: [*SHAPES, "--input", "a/x.png", "--vocabulary", i, "--output", os.path.dirname(o)],
        "detections.json",
    ),
}


# It writes reports under fixed names, and reads a folder of a model and a registered data set.
OF_RUNS = {"evaluate_zero_shot"}


def test_every_program_is_tried():
    files = (Path(programs.__file__).parent).glob("*.py")
    writing = {file.stem for file in files if '"--output"' in file.read_text(encoding="utf-8")}
    assert writing - OF_RUNS <= {module for module, *_ in PROGRAMS.values()}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a data set, an image a/x.png, and other.json; it is the working directory."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    for folder in ("a", "in", "out"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "a" / "x.png")
    (tmp_path / "other.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    return tmp_path


@pytest.mark.parametrize("link", ["none", "symbolic", "hard", "of the folder"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_program_replaces_what_it_reads(program, link, work):
    module, argv, name = PROGRAMS[program]
    output = work / "out" / name
    given = output if link in ("none", "of the folder") else work / "in" / name
    if name.endswith(".png"):
        Image.new("RGB", (40, 40)).save(given)
    else:
        given.write_bytes(b"precious")
    before = given.read_bytes()
    if link == "symbolic":
        output.symlink_to(given)
    elif link == "hard":
        output.hardlink_to(given)
    elif link == "of the folder":
        (work / "linked").symlink_to(work / "out")
        output = work / "linked" / name
    files = sorted(path for path in work.rglob("*") if path.is_file())
    with pytest.raises(UsageError, match="would replace an input|name another"):
        importlib.import_module(f"ovdet2.programs.{module}").main(argv(str(given), str(output)))
    assert given.read_bytes() == before
    assert sorted(path for path in work.rglob("*") if path.is_file()) == files  # nothing was written before


def test_training_does_not_replace_the_weights_it_starts_from(work):
    from ovdet2.programs import train

    (work / "run").mkdir()
    for name in ("model_final.pth", "model_0000009.pth"):
        (work / "run" / name).write_bytes(b"weights")
        options = ["--config-file", "ovshapes/vild_text_r18.yaml", "OUTPUT_DIR", "run", "MODEL.WEIGHTS", f"run/{name}"]
        with pytest.raises(
            UsageError, match=f"OUTPUT_DIR: run/{name} would replace an input: give another name or folder"
        ):
            train.run(options)
    assert sorted(path.name for path in (work / "run").iterdir()) == ["model_0000009.pth", "model_final.pth"]


def test_what_is_no_input(tmp_path):
    """Texts that are no paths, folders, files that do not exist yet, and a file of equal content."""
    output = tmp_path / "o.json"
    texts = ["cat, dog", "x" * 5000, "a\0b", "", None, 3, 0.5, True, {"key": ["nothing", {"deep": None}]}, tmp_path]
    keep_inputs("--output", [output, None], output, texts)  # it does not exist
    output.write_text("same")
    (tmp_path / "other.json").write_text("same")
    keep_inputs("--output", [output, tmp_path / "new"], tmp_path / "other.json", texts)
    with pytest.raises(UsageError, match=r"--output: .*o.json would replace an input: give"):
        keep_inputs("--output", [tmp_path / "new", output], texts, {"MODEL": {"WEIGHTS": str(output)}})


def test_a_symbolic_link_to_nothing_is_no_input(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    keep_inputs("--output", [tmp_path / "link"], tmp_path / "gone", tmp_path / "link")


def test_inputs_are_looked_at_only_if_an_output_exists(tmp_path):
    """A data set may have a hundred thousand images on a slow disk."""

    def images():
        raise AssertionError("looked at")
        yield

    keep_inputs("--output", [tmp_path / "new"], images())
