"""The runner of the OV-Shapes rows: what runs, in which order, what is refused, and the table. No row is really run."""

import json
from pathlib import Path

import pytest
import run_ovshapes

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import sha256_file

METRICS = {
    "AP50-novel": 10.0,
    "AP50-unseen_nouns": 5.0,
    "AP50-unseen_combinations": 20.0,
    "AP50-base": 50.0,
    "AP-base": 30.0,
}


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Commands asked for; each leaves the files its program would leave, with an AP that grows with the seed."""
    asked = []

    def run(command):
        asked.append(" ".join(command))
        if fail and fail[0] in asked[-1]:
            raise KeyboardInterrupt
        option = "--output" if "--output" in command else "OUTPUT_DIR"
        folder = Path(command[command.index(option) + 1])
        folder.mkdir(parents=True, exist_ok=True)
        if "build_region_cache" in command[0]:
            (folder / "manifest.json").write_text(json.dumps({"shards": [{"sha256": "1" * 64}]}))
            return
        if "CLIM" in command[0]:
            (folder / "clim_a1.safetensors").write_text("clim")
            return
        if "build_concept_priors" in command[0]:
            folder.rmdir()
            folder.write_text("priors")
            return
        (folder / "model_final.pth").write_text(asked[-1])
        seed = int(command[command.index("SEED") + 1])
        report = folder / "inference" / run_ovshapes.DATASET / "report.json"
        report.parent.mkdir(parents=True, exist_ok=True)
        box = {key: value + seed for key, value in METRICS.items()} | {"AP50-all": 40.0}
        report.write_text(json.dumps({"bbox": box, "proposals": {"AR@100-novel": 60.0, "AR@100-base": 61.0}}))

    fail = []
    monkeypatch.setattr(run_ovshapes, "run", run)
    monkeypatch.setattr(run_ovshapes, "ensure_generated", lambda _: {"pixels_sha256": {"train2017": "0" * 64}})
    run.asked, run.fail = asked, fail
    return run


def test_what_a_row_needs_runs_first_and_nothing_twice(runs, tmp_path):
    run_ovshapes.run_row("vild_text_clip", 1, tmp_path)
    run_ovshapes.run_row("vild", 1, tmp_path)
    run_ovshapes.run_row("vild_ensemble", 1, tmp_path)
    kinds = [next(kind for kind in ("--eval-only", "region_cache.py", "train_net.py") if kind in c) for c in runs.asked]
    assert kinds == ["train_net.py", "--eval-only", "train_net.py", "region_cache.py", "train_net.py", "train_net.py"]
    seeds = [command.split("SEED ")[1][0] for command in runs.asked if "SEED" in command]
    assert seeds == ["1", "1", "0", "1", "1"]  # the cache is of the detector of seed 0
    assert f"MODEL.VILD.REGION_CACHE {tmp_path / 'region_cache'}" in runs.asked[-1]
    before = len(runs.asked)
    run_ovshapes.run_row("vild_ensemble", 1, tmp_path)
    assert len(runs.asked) == before


def test_a_detector_on_the_weights_of_clim_has_them_trained_first(runs, tmp_path):
    if not run_ovshapes.CLIM_CONFIG.is_file():
        pytest.skip("projects/CLIM was removed")
    for seed in (0, 1):
        run_ovshapes.run_row("fvlm_vit_clim", seed, tmp_path)
    kinds = [command.split()[0] for command in runs.asked]
    assert kinds == ["projects/CLIM/train.py", "train_net.py", "train_net.py"]
    assert f"MODEL.TEACHER.PRETRAINED {tmp_path / 'clim' / 'clim_a1.safetensors'}" in runs.asked[1]
    made_of = json.loads((tmp_path / "fvlm_vit_clim" / "seed0" / "row.json").read_text())["made_of"]
    trained = json.loads((tmp_path / "clim" / "clim_a1.json").read_text())["made_of"]
    weights = sha256_file(run_ovshapes.ASSETS / "open_clip" / "ovshapes-vit.safetensors")
    assert made_of["teacher"] == trained["teacher"] == weights and set(trained) == {"teacher", "configuration"}


def test_rows_of_one_training_share_what_they_read(runs, tmp_path):
    """The row scored otherwise takes the weights and the priors, and reads no cache."""
    run_ovshapes.run_row("cckt_full_class", 1, tmp_path)
    run_ovshapes.run_row("cckt_contrast", 1, tmp_path)
    kinds = [command.split()[0] for command in runs.asked]
    assert kinds == ["tools/build_region_cache.py", "tools/build_concept_priors.py", *["train_net.py"] * 3]
    cache = f"MODEL.CCKT.REGION_CACHE {tmp_path / 'annotation_cache'}"
    priors = f"MODEL.CCKT.PRIOR_FILE {tmp_path / 'priors' / 'clip.safetensors'}"
    assert [cache in command for command in runs.asked[2:]] == [True, False, True]
    assert [priors in command for command in runs.asked[2:]] == [True, True, False]
    weights = tmp_path / "cckt_full" / "seed1" / "model_final.pth"
    assert (
        f"--eval-only SEED 1 OUTPUT_DIR {tmp_path / 'cckt_full_class' / 'seed1'} MODEL.WEIGHTS {weights}"
        in runs.asked[3]
    )


def test_interrupted_row_goes_on_and_keeps_its_time(runs, tmp_path):
    runs.fail.append("train_net.py")
    with pytest.raises(KeyboardInterrupt):
        run_ovshapes.run_row("vild_text", 0, tmp_path)
    path = tmp_path / "vild_text" / "seed0" / "row.json"
    state = json.loads(path.read_text())
    assert "done" not in state and not run_ovshapes.is_done(path.parent)
    path.write_text(json.dumps(state | {"minutes": 7.0}))
    runs.fail.clear()
    run_ovshapes.run_row("vild_text", 0, tmp_path)
    assert json.loads(path.read_text())["minutes"] >= 7.0 and run_ovshapes.is_done(path.parent)


def test_results_of_something_else_are_refused(runs, tmp_path, monkeypatch):
    run_ovshapes.run_row("vild", 0, tmp_path)
    weights = tmp_path / "vild_text" / "seed0" / "model_final.pth"
    trained = weights.read_text()
    weights.write_text("another detector")
    with pytest.raises(DataError, match="region_cache was made with another detector or teacher: remove it"):
        run_ovshapes.run_row("vild", 0, tmp_path)
    weights.write_text(trained)
    (tmp_path / "region_cache" / "manifest.json").write_text(json.dumps({"shards": [{"sha256": "2" * 64}]}))
    with pytest.raises(DataError, match="vild.seed0 holds a row made with another region cache: remove it"):
        run_ovshapes.run_row("vild", 0, tmp_path)
    load = run_ovshapes.load_config
    monkeypatch.setattr(run_ovshapes, "load_config", lambda name, keys: load(name, [*keys, "SOLVER.BASE_LR", 0.5]))
    with pytest.raises(DataError, match="vild_text.seed0 holds a row made with another configuration"):
        run_ovshapes.run_row("vild_text", 0, tmp_path)


def test_table_has_mean_and_spread_of_the_seeds_that_are_done(runs, tmp_path):
    for seed in (0, 2):
        run_ovshapes.run_row("vild", seed, tmp_path)
    table = run_ovshapes.make_table(["vild_text", "vild", "vild_image"], [0, 1, 2], tmp_path)
    lines = table.splitlines()
    assert lines[0].startswith("| row | novel AP50 | unseen nouns") and len(lines) == 6  # vild_image was not run
    assert lines[2].startswith("| ViLD-text | 10.0 | 5.0 | 20.0 | 50.0 | 30.0 | 40.0 | 60.0 | 61.0 |")
    assert lines[3].startswith("| ViLD | 11.0 ± 1.4 | 6.0 ± 1.4 | 21.0 ± 1.4 | 51.0 ± 1.4 | 31.0 ± 1.4 | 40.0 ± 0.0 |")
    assert lines[5].startswith("The region cache, made once for all rows and seeds, took")
    document = tmp_path / "R.md"
    document.write_text(f"before\n{run_ovshapes.BEGIN}\nold\n{run_ovshapes.END}\nafter\n")
    run_ovshapes.insert_table(document, table, "python x")
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and table in text and "old" not in text
    document.write_text("no markers")
    with pytest.raises(DataError, match="R.md has no lines"):
        run_ovshapes.insert_table(document, table, "python x")


def test_unknown_row(tmp_path):
    with pytest.raises(UsageError, match="unknown rows .'vilt'.; there are teacher"):
        run_ovshapes.main(["--rows", "vilt", "--output", str(tmp_path)])
