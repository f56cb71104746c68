"""The rows of OV-Shapes as entries: what runs, in which order, what is refused, and the table. No row is really run."""

import json
import shutil
from pathlib import Path

import pytest
import run_ovshapes

from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError
from ovdet2.experiments import command
from ovdet2.experiments.command import CHECKOUT
from ovdet2.experiments.runner import Runner
from ovdet2.io.files import sha256_file
from ovdet2.ov_shapes import rows
from ovdet2.ov_shapes.rows import OV_SHAPES_ROWS, TEST_SET
from tests.cache_cases import manifest

METRICS = {
    "AP50-novel": 10.0,
    "AP50-unseen_nouns": 5.0,
    "AP50-unseen_combinations": 20.0,
    "AP50-base": 50.0,
    "AP-base": 30.0,
}


@pytest.fixture
def runs(monkeypatch):
    """Commands that were run; each leaves the files its program would leave, with an AP that grows with the seed."""

    def run(words):
        run.commands.append(" ".join(words))
        if run.failing and run.failing in run.commands[-1]:
            raise KeyboardInterrupt
        option = "--output" if "--output" in words else "OUTPUT_DIR"
        folder = Path(words[words.index(option) + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if "build_region_cache" in words[0]:
            (folder / "manifest.json").write_text(json.dumps(manifest("1" * 64)))
            return
        if "CLIM" in words[0]:
            (folder / "clim_a1.safetensors").write_text("clim")
            return
        if "build_concept_priors" in words[0]:
            folder.rmdir()
            folder.write_text("priors")
            return
        if "evaluate_teacher" in words[0]:
            (folder / "report.json").write_text(json.dumps({"bbox": METRICS}))
            return
        if "--eval-only" not in words:
            (folder / "model_final.pth").write_text(run.commands[-1])
        seed = int(words[words.index("SEED") + 1])
        report = folder / "inference" / ("ov_shapes_test" if "ov_shapes_test" in run.commands[-1] else TEST_SET)
        report = report / "report.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        box = {key: value + seed for key, value in METRICS.items()} | {"AP50-all": 40.0}
        report.write_text(json.dumps({"bbox": box, "proposals": {"AR@100-novel": 60.0, "AR@100-base": 61.0}}))

    run.commands, run.failing = [], ""
    monkeypatch.setattr(command, "run_program", run)
    monkeypatch.setattr(rows, "ensure_generated", lambda _: {"pixels_sha256": {"train2017": "0" * 64}})
    monkeypatch.setattr(rows, "ensure_test", lambda _: {"pixels_sha256": {"test2017": "3" * 64}})
    return run


def run_row(name, seed, output):
    """As a command of its own would."""
    return Runner(OV_SHAPES_ROWS, output).run(name, seed)


def kinds(runs):
    return [words.split()[0].removeprefix("ovdet2.programs.") for words in runs.commands]


def test_what_a_row_needs_runs_first_and_nothing_twice(runs, tmp_path):
    run_row("vild_text_clip", 1, tmp_path)
    run_row("vild", 1, tmp_path)
    run_row("vild_ensemble", 1, tmp_path)
    assert kinds(runs) == ["train", "train", "train", "build_region_cache", "train", "train"]
    assert ["--eval-only" in words for words in runs.commands] == [False, True, False, False, False, False]
    seeds = [words.split("SEED ")[1][0] for words in runs.commands if "SEED" in words]
    assert seeds == ["1", "1", "0", "1", "1"]  # the cache is of the detector of seed 0
    assert f"MODEL.VILD.REGION_CACHE {tmp_path / 'region_cache'}" in runs.commands[-1]
    before = len(runs.commands)
    run_row("vild_ensemble", 1, tmp_path)
    assert len(runs.commands) == before


def test_a_detector_on_the_weights_of_clim_has_them_trained_first(runs, tmp_path):
    if not (CHECKOUT / rows.CLIM_CONFIG).is_file():
        pytest.skip("projects/CLIM was removed")
    for seed in (0, 1):
        run_row("fvlm_vit_clim", seed, tmp_path)
    assert kinds(runs) == ["projects/CLIM/train.py", "train", "train"]
    assert f"--resume OUTPUT_DIR {tmp_path / 'clim'}" in runs.commands[0]
    assert f"MODEL.TEACHER.PRETRAINED {tmp_path / 'clim' / 'clim_a1.safetensors'}" in runs.commands[1]
    made_of = json.loads((tmp_path / "fvlm_vit_clim" / "seed0" / "row.json").read_text())["made_of"]
    trained = json.loads((tmp_path / "clim" / "clim_a1.json").read_text())["made_of"]
    weights = sha256_file(rows.ASSETS / "open_clip" / "ovshapes-vit.safetensors")
    assert made_of["teacher"] == trained["teacher"] == weights and set(trained) == {"teacher", "configuration"}


def test_without_a_checkout_the_row_of_clim_says_so(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "CHECKOUT", tmp_path / "site-packages")
    with pytest.raises(UsageError, match="projects/CLIM/.* is needed, which an installed ovdet2 does not have: get"):
        run_row("fvlm_vit_clim", 0, tmp_path)
    assert runs.commands == []


def test_rows_of_one_training_share_what_they_read(runs, tmp_path):
    """The row scored otherwise takes the weights and the priors, and reads no cache."""
    run_row("cckt_full_class", 1, tmp_path)
    run_row("cckt_contrast", 1, tmp_path)
    assert kinds(runs) == ["build_region_cache", "build_concept_priors", *["train"] * 3]
    cache = f"MODEL.CCKT.REGION_CACHE {tmp_path / 'annotation_cache'}"
    priors = f"MODEL.CCKT.PRIOR_FILE {tmp_path / 'priors' / 'clip.safetensors'}"
    assert [cache in words for words in runs.commands[2:]] == [True, False, True]
    assert [priors in words for words in runs.commands[2:]] == [True, True, False]
    weights = tmp_path / "cckt_full" / "seed1" / "model_final.pth"
    assert (
        f"--eval-only SEED 1 OUTPUT_DIR {tmp_path / 'cckt_full_class' / 'seed1'} MODEL.WEIGHTS {weights}"
        in runs.commands[3]
    )


def test_needs_of_a_row_are_what_its_configuration_reads():
    """Stated in the entries; a row that lacks one would stop when it is run."""
    for name, row in rows.ENTRIES.items():
        if not row.config:
            continue
        cfg = load_config(row.config)
        model = cfg.MODEL
        trained = not row.weights_of
        needed = {
            "region_cache": model.VILD.WEIGHT > 0 and trained,
            "annotation_cache": model.CCKT.ENABLED and model.CCKT.CONTRAST != "none" and trained,
            "clip_priors": model.CCKT.ENABLED and model.CCKT.PRIORS,
            "caption_cache": any(model[name].CAPTION_WEIGHT > 0 for name in ("DETIC", "VLDET")) and trained,
            "clim": model.TEACHER.PRETRAINED.endswith(".safetensors"),
        }
        assert row.needs == tuple(need for need, wanted in needed.items() if wanted), name


def test_interrupted_row_goes_on_and_keeps_its_time(runs, tmp_path):
    runs.failing = "programs.train"
    with pytest.raises(KeyboardInterrupt):
        run_row("vild_text", 0, tmp_path)
    path = tmp_path / "vild_text" / "seed0" / "row.json"
    state = json.loads(path.read_text())
    assert "done" not in state and Runner(OV_SHAPES_ROWS, tmp_path).result("vild_text") is None
    path.write_text(json.dumps(state | {"minutes": 7.0}))
    runs.failing = ""
    run_row("vild_text", 0, tmp_path)
    assert json.loads(path.read_text())["minutes"] >= 7.0
    assert Runner(OV_SHAPES_ROWS, tmp_path).result("vild_text") is not None


def test_results_of_something_else_are_refused(runs, tmp_path, monkeypatch):
    run_row("vild", 0, tmp_path)
    weights = tmp_path / "vild_text" / "seed0" / "model_final.pth"
    trained = weights.read_text()
    weights.write_text("another detector")
    with pytest.raises(DataError, match="region_cache was made with another detector: remove it"):
        run_row("vild", 0, tmp_path)
    weights.write_text(trained)
    (tmp_path / "region_cache" / "manifest.json").write_text(json.dumps(manifest("2" * 64)))
    with pytest.raises(DataError, match="vild.seed0 holds a row made with another region cache: remove it"):
        run_row("vild", 0, tmp_path)
    monkeypatch.setattr(rows, "ensure_generated", lambda _: {"pixels_sha256": {"train2017": "1" * 64}})
    with pytest.raises(DataError, match="vild_text.seed0 holds a row made with another OV-Shapes"):
        run_row("vild_text", 0, tmp_path)
    with pytest.raises(DataError, match="vild_text.seed0 holds a row made with another configuration"):
        Runner(OV_SHAPES_ROWS, tmp_path, ["SOLVER.BASE_LR", "0.5"]).run("vild_text", 0)


def test_a_finished_row_of_before_is_recognised(runs, tmp_path):
    """The file has more inputs than the teacher's row has today."""
    folder = tmp_path / "teacher" / "seed0"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text("{}")
    inputs = rows.inputs_of(None) | {"configuration": "", "weights": ""}
    (folder / "row.json").write_text(json.dumps({"minutes": 0.5, "done": True, "made_of": inputs}))
    for seed in (0, 1):
        assert run_row("teacher", seed, tmp_path) == folder
    assert runs.commands == []


def test_table_has_mean_and_spread_of_the_seeds_that_are_done(runs, tmp_path):
    for seed in (0, 2):
        run_row("vild", seed, tmp_path)
    document = tmp_path / "R.md"
    markers = "<!-- ov-shapes table: written by tools/run_ovshapes.py -->", "<!-- end of ov-shapes table -->"
    document.write_text("before\n{}\nold\n{}\nafter\n".format(*markers))
    chosen = ["--rows", "vild_text", "vild", "vild_image", "--seeds", "0", "1", "2", "--tabulate"]
    run_ovshapes.main([*chosen, "--output", str(tmp_path), "--table", str(document)])
    table = (tmp_path / "table.md").read_text()
    lines = table.splitlines()
    assert lines[0].startswith("| row | novel AP50 | unseen nouns") and len(lines) == 6  # vild_image was not run
    assert lines[2].startswith("| ViLD-text | 10.0 | 5.0 | 20.0 | 50.0 | 30.0 | 40.0 | 60.0 | 61.0 |")
    assert lines[3].startswith("| ViLD | 11.0 ± 1.4 | 6.0 ± 1.4 | 21.0 ± 1.4 | 51.0 ± 1.4 | 31.0 ± 1.4 | 40.0 ± 0.0 |")
    assert lines[5].startswith("The region cache, made once for all rows and seeds, took")
    text = document.read_text()
    assert text.startswith(f"before\n{markers[0]}\n`ovdet2 experiment ov-shapes --rows vild_text vild vild_image ")
    assert (
        "--seeds 0 1 2`\n" in text and text.endswith(f"{markers[1]}\nafter\n") and table in text and "old" not in text
    )
    document.write_text("no markers")
    with pytest.raises(DataError, match="R.md has no lines"):
        run_ovshapes.main([*chosen, "--output", str(tmp_path), "--table", str(document)])


def readings(output):
    return [json.loads(line) for line in (output / "test_readings.jsonl").read_text().splitlines()]


def test_the_final_table_evaluates_the_weights_of_the_runs_and_logs_it(runs, tmp_path):
    """Trained once; below test/ with the prior of the test images; each reading has a line before it begins."""
    chosen = ["--rows", "teacher", "cckt_full", "cckt_full_class", "--seeds", "0", "1", "--output", str(tmp_path)]
    run_ovshapes.main(chosen)
    assert not (tmp_path / "test_readings.jsonl").exists() and not (tmp_path / "test").exists()
    trained, table = len(runs.commands), (tmp_path / "table.md").read_text()
    document = tmp_path / "R.md"
    document.write_text("<!-- ov-shapes-test table -->\n<!-- end of ov-shapes-test table -->\n")
    results = run_ovshapes.main([*chosen, "--split", "test", "--table", str(document)])
    new = runs.commands[trained:]
    assert kinds(runs)[trained:] == ["evaluate_teacher", "build_concept_priors", *["train"] * 4]
    assert all("ov_shapes_test" in words and TEST_SET not in words for words in new)
    priors = tmp_path / "test" / "priors" / "clip.safetensors"
    assert new[0].endswith(f"--output {tmp_path / 'test' / 'teacher' / 'seed0'}") and f"--output {priors}" in new[1]
    weights = tmp_path / "cckt_full" / "seed0" / "model_final.pth"
    for words, row in zip(new[2:4], ("cckt_full", "cckt_full_class"), strict=True):
        assert "--eval-only DATASETS.TEST ('ov_shapes_test',) TEST.EXPECTED_RESULTS [] SEED 0" in words
        assert f"OUTPUT_DIR {tmp_path / 'test' / row / 'seed0'} MODEL.WEIGHTS {weights}" in words
        assert words.endswith(f"MODEL.CCKT.PRIOR_FILE {priors}") and "REGION_CACHE" not in words
    lines = readings(tmp_path)
    assert [(line["row"], line["seed"]) for line in lines] == [
        ("teacher", None), ("clip_priors", None), ("cckt_full", 0), ("cckt_full_class", 0), ("cckt_full", 1),
        ("cckt_full_class", 1),
    ]  # fmt: skip
    assert lines[2]["weights_sha256"] == lines[3]["weights_sha256"] == sha256_file(weights)
    assert set(lines[2]) == {"date", "row", "seed", "weights_sha256", "commit", "command"}
    assert lines[2]["command"].startswith("ovdet2.programs.train --config-file ovshapes/cckt_full_r18.yaml --eval-only")
    assert (tmp_path / "table.md").read_text() == table and "settings by" in table and "times read" not in table
    final = (tmp_path / "test" / "table.md").read_text().splitlines()
    assert final[0].endswith("| settings by | times read | minutes | seeds |")
    assert "| val | 2 | " in final[3] and final[3].startswith("| CCKT-Det: priors, contrast, similarity | 10.5 ± 0.7 |")
    assert final[2].startswith("| CLIP on ground-truth boxes") and "| val | 1 | " in final[2]
    assert {(row["settings_by"], row["readings"]) for row in results} == {("val", 1), ("val", 2)}
    assert "--seeds 0 1 --split test`" in document.read_text() and final[3] in document.read_text()


def test_a_test_set_that_is_read_again_is_counted(runs, tmp_path):
    """Removing the results does not remove the log; an interrupted evaluation counts."""
    chosen = ["--rows", "vild_text", "--split", "test", "--output", str(tmp_path)]
    [row] = run_ovshapes.main(chosen)
    assert kinds(runs) == ["train", "train"] and "--resume" in runs.commands[0]  # trained and evaluated on val first
    assert row["readings"] == 1 and run_ovshapes.main(chosen) == [row] and len(readings(tmp_path)) == 1
    shutil.rmtree(tmp_path / "test")
    runs.failing = "ov_shapes_test"
    with pytest.raises(KeyboardInterrupt):
        run_ovshapes.main(chosen)
    runs.failing = ""
    assert run_ovshapes.main(chosen)[0]["readings"] == 3 and len(runs.commands) == 4
    minutes = json.loads((tmp_path / "vild_text" / "seed0" / "row.json").read_text())
    (tmp_path / "vild_text" / "seed0" / "row.json").write_text(json.dumps(minutes | {"minutes": 17.0}))
    assert run_ovshapes.main(chosen)[0]["minutes"] == 17.0  # of the training
    (tmp_path / "test_readings.jsonl").write_text("[]\n")
    with pytest.raises(DataError, match="test_readings.jsonl is damaged"):
        run_ovshapes.main(chosen)


def test_weights_or_test_images_that_changed_are_refused(runs, tmp_path, monkeypatch):
    chosen = ["--rows", "vild_text", "--split", "test", "--output", str(tmp_path)]
    run_ovshapes.main(chosen)
    (tmp_path / "vild_text" / "seed0" / "model_final.pth").write_text("others")
    with pytest.raises(DataError, match="test.vild_text.seed0 holds a row made with another weights"):
        run_ovshapes.main(chosen)
    monkeypatch.setattr(rows, "ensure_test", lambda _: {"pixels_sha256": {"test2017": "4" * 64}})
    with pytest.raises(DataError, match="test.vild_text.seed0 holds a row made with another test images, weights"):
        run_ovshapes.main(chosen)


def test_every_row_states_which_set_chose_its_settings():
    assert {entry.settings_by for entry in (*rows.ENTRIES.values(), *rows.FINAL_TABLE.entries.values())} == {"val"}
    assert list(rows.FINAL_TABLE.entries) == list(rows.ENTRIES)
    for name, entry in rows.FINAL_TABLE.entries.items():
        words = (*entry.command, *entry.overrides)
        assert any("ov_shapes_test" in word for word in words) and TEST_SET not in words, name
        assert entry.command or entry.weights_of in rows.ENTRIES, name


def test_unknown_row(tmp_path):
    with pytest.raises(UsageError, match="unknown rows .'vilt'.; there are teacher"):
        run_ovshapes.main(["--rows", "vilt", "--output", str(tmp_path)])
