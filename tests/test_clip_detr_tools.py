"""The programs that run CLIP-DETR's ablations and measure its cost, at a small size."""

import json
from pathlib import Path

import ablate_clip_detr
import pytest

from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError
from ovdet2.experiments import command
from ovdet2.methods.clip_detr.experiments import TABLES

CONFIG = "configs/ovshapes/clip_detr_both_closed_r18.yaml"


@pytest.fixture
def commands(monkeypatch):
    """Commands of the training program, which is not run: it is as if it had reached an AP of 10 times its seed."""
    commands = []

    def stand_in(words):
        options = dict(zip(words[-4::2], words[-3::2]))
        report = Path(options["OUTPUT_DIR"]) / "inference" / "ov_shapes_val_all" / "report.json"
        report.parent.mkdir(parents=True)
        report.write_text(json.dumps({"bbox": {"AP-base": 10.0 * int(options["SEED"])}}))
        commands.append(words)

    monkeypatch.setattr(command, "run_program", stand_in)
    return commands


def means(rows):
    """{row: mean figure over its seeds}."""
    figures = {}
    for row in rows:
        figures.setdefault(row["row"], []).append(row["AP-base"])
    return {name: sum(values) / len(values) for name, values in figures.items()}


def test_rows_are_run_once_with_their_keys(commands, tmp_path, capsys):
    options = ["--config-file", CONFIG, "--output", str(tmp_path), "--figure", "AP-base", "--seeds", "1", "2"]
    rows = ["--rows", "+ AlignNet", "rho 0.1", "mixed x 2", "CLIP-DETR"]
    results = means(ablate_clip_detr.main([*options, *rows, "--", "--num-gpus", "2"]))
    assert results == dict.fromkeys(rows[1:], 15.0) and "| rho 0.1 | 15.0 ± 7.1 |" in capsys.readouterr().out
    assert len(commands) == 8 and len({words[-1] for words in commands}) == 8
    for words in commands:
        assert words[0] == "ovdet2.programs.train" and words[words.index("--num-gpus") + 1] == "2"
        made = load_config(CONFIG, words[words.index("--num-gpus") + 2 :])  # the keys exist, the values fit
        assert load_config(CONFIG).TEST.EXPECTED_RESULTS and not made.TEST.EXPECTED_RESULTS
    keys = commands[2][commands[2].index("--num-gpus") + 2 :]
    clip = load_config(CONFIG, keys).MODEL.CLIP_DETR
    assert (
        clip.BETAS == [0.1, 0.3, 0.5, 0.7, 0.9] * 2
        and clip.ALIGN_WEIGHT == load_config(CONFIG).MODEL.CLIP_DETR.ALIGN_WEIGHT
    )
    assert load_config(CONFIG, commands[0][-6:]).MODEL.CLIP_DETR.DYNAMIC_WEIGHT == 0
    ablate_clip_detr.main([*options, *rows])  # the number of processes is no setting
    tabulated = means(ablate_clip_detr.main([*options, "--tables", "6", "7", "--tabulate"]))
    assert len(commands) == 8 and tabulated["mixed x 2"] == 15.0 and "0.9 x 1" not in tabulated
    assert "Not run to the end: 0.3 x 5, 0.5 x 5, 0.9 x 5, 0.3 x 1, 0.5 x 1, 0.9 x 1." in capsys.readouterr().out
    assert means(ablate_clip_detr.main([*options, "--rows", "rho 1.0"])) == {"rho 1.0": 15.0}  # the complete method
    assert (
        len(commands) == 8 and not (tmp_path / "rho_1.0").exists() and (tmp_path / "plus_AlignNet" / "seed2").is_dir()
    )


def test_a_row_counts_when_it_was_run_to_its_end_with_these_settings(commands, tmp_path):
    options = ["--config-file", CONFIG, "--output", str(tmp_path), "--seeds", "1", "--rows", "rho 0.1"]
    ablate_clip_detr.main([*options, "--figure", "AP-base"])
    with pytest.raises(UsageError, match="no figure 'AP-bas': the report has AP-base"):
        ablate_clip_detr.main([*options, "--figure", "AP-bas"])
    with pytest.raises(DataError, match="rho_0.1.seed1 holds a row made with another configuration"):
        ablate_clip_detr.main([*options, "--figure", "AP-base", "--", "SOLVER.MAX_ITER", "5"])
    (tmp_path / "rho_0.4" / "seed1").mkdir(parents=True)
    with pytest.raises(DataError, match="rho_0.4.seed1 holds a run that does not record"):
        ablate_clip_detr.main([*options[:-1], "rho 0.4", "--figure", "AP-base", "--tabulate"])
    state = tmp_path / "rho_0.1" / "seed1" / "row.json"
    unfinished = {key: value for key, value in json.loads(state.read_text()).items() if key != "done"}
    state.write_text(json.dumps(unfinished))  # a report of before the end
    assert ablate_clip_detr.main([*options, "--figure", "AP-base", "--tabulate"]) == []
    assert len(commands) == 1


def test_every_row_of_the_paper_is_a_configuration():
    found = {}
    for table, rows in TABLES.items():
        for name, keys in rows.items():
            overrides = [part for key, value in keys.items() for part in (f"MODEL.CLIP_DETR.{key}", str(value))]
            found[table, name] = load_config(CONFIG, overrides).MODEL.CLIP_DETR
    assert len(found) == 29 and found[4, "baseline"].ALIGN_WEIGHT == found[4, "baseline"].DYNAMIC_WEIGHT == 0
    assert {clip.RHO for (table, _), clip in found.items() if table == 8} == {0.1, 0.4, 0.8, 1.0, 1.5}
    assert {clip.SHIFT for (table, _), clip in found.items() if table} == {"literal"}  # as the paper's
    assert {clip.SHIFT for (table, _), clip in found.items() if table == 0} == {"literal", "signed", "corners"}


@pytest.mark.parametrize("options, words", [
    (["--tables", "5", "--rows", "rho 0.1"], "unknown rows .'rho 0.1'.; there are label, label.box, CLIP-DETR"),
    (["--config-file", "configs/ovshapes/clip_detr_align_closed_r18.yaml"], "lacks a part"),
])  # fmt: skip
def test_what_cannot_be_run(options, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        ablate_clip_detr.main(["--config-file", CONFIG, "--output", str(tmp_path), *options])
