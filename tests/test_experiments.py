"""The runner of experiments with a made-up one: what runs, in which order, what is refused, and the table."""

import json
import re
from pathlib import Path

import pytest

from ovdet2.config import load_config
from ovdet2.errors import DataError, UsageError
from ovdet2.experiments import Artefact, Column, Entry, Experiment, Plan, command
from ovdet2.experiments.find import find_plan
from ovdet2.experiments.runner import Runner, _inputs_in
from ovdet2.experiments.table import insert_table
from ovdet2.io.files import write_json
from ovdet2.programs import experiments

CONFIG = "ovshapes/vild_text_r18.yaml"
TEST_SET = "ov_shapes_val_all"
COLUMNS = {"AP": Column(("bbox", "AP")), "AR": Column(("proposals", "AR"))}


def make_experiment(source=Path(__file__), **options):
    table = Artefact(
        "table of words", "MODEL.VOCABULARY.FILE", "table/words.bin", ("make_table", "{path}"), {"file": source}
    )
    cache = Artefact(
        "cache", "MODEL.TEACHER.PRETRAINED", "cache.bin", ("make_cache", "{path}", "{weights}"), weights_of="first"
    )
    entries = {
        "first": Entry("the first", CONFIG),
        "second": Entry("the second", CONFIG, ("SOLVER.BASE_LR", "0.5"), needs=("table", "cache")),
        "third": Entry("evaluated", CONFIG, weights_of="second"),
        "program": Entry("a program", command=("measure", "{folder}"), folder="{name}"),
    }
    return Experiment(entries, COLUMNS, {"table": table, "cache": cache}, **options)


PLAN = Plan("made up", lambda args: make_experiment(marker="made-up"))


@pytest.fixture
def programs(monkeypatch):
    """Commands that were run; each writes the files of its program, with an AP that grows with the seed."""

    def run(words):
        run.commands.append([str(word) for word in words])
        if run.failing and run.failing in " ".join(run.commands[-1]):
            raise SystemExit(5)
        if words[0].startswith("make_"):
            Path(words[1]).write_text(words[0])
        elif words[0] == "measure":
            write_json(Path(words[1]) / "report.json", {"bbox": {"AP": 7.0}})
        else:
            options = dict(zip(words, words[1:]))
            folder = Path(options["OUTPUT_DIR"])
            report = {"bbox": {"AP": 10.0 + int(options["SEED"])}, "proposals": {"AR": None}}
            write_json(folder / "inference" / TEST_SET / "report.json", report)
            (folder / "model_final.pth").write_text(" ".join(run.commands[-1]))

    run.commands, run.failing = [], ""
    monkeypatch.setattr(command, "run_program", run)
    return run


def kinds(programs):
    return [words[0].removeprefix("ovdet2.programs.") for words in programs.commands]


def test_what_entries_need_is_made_once_for_all_entries_and_seeds(programs, tmp_path):
    runner = Runner(make_experiment(), tmp_path, ["--num-gpus", "2", "SOLVER.MAX_ITER", "9"])
    for seed in (0, 1):
        for name in runner.experiment.entries:
            runner.run(name, seed)
    assert kinds(programs) == ["train", "make_table", "make_cache", "train", "train", "measure", *["train"] * 3]
    second, third = programs.commands[3], programs.commands[4]
    assert second == [
        "ovdet2.programs.train", "--config-file", CONFIG, "--resume", "--num-gpus", "2", "SOLVER.MAX_ITER", "9",
        "SOLVER.BASE_LR", "0.5", "SEED", "0", "OUTPUT_DIR", str(tmp_path / "second" / "seed0"),
        "MODEL.VOCABULARY.FILE", str(tmp_path / "table" / "words.bin"),
        "MODEL.TEACHER.PRETRAINED", str(tmp_path / "cache.bin"),
    ]  # fmt: skip
    assert "--eval-only" in third
    assert third[-2:] == ["MODEL.WEIGHTS", str(tmp_path / "second" / "seed0" / "model_final.pth")]
    weights = tmp_path / "first" / "seed0" / "model_final.pth"
    assert programs.commands[2] == ["make_cache", str(tmp_path / "cache.bin"), str(weights)]
    again = Runner(make_experiment(), tmp_path, ["--num-gpus", "8", "SOLVER.MAX_ITER", "9"])  # processes are no input
    for name in again.experiment.entries:
        again.run(name, 1)
    assert len(programs.commands) == 9


def test_a_failed_run_goes_on_where_it_stopped(programs, tmp_path):
    programs.failing = "SOLVER.BASE_LR"
    with pytest.raises(SystemExit) as ended:
        Runner(make_experiment(), tmp_path).run("third")
    assert ended.value.code == 5
    state_file = tmp_path / "second" / "seed0" / "row.json"
    state = json.loads(state_file.read_text())
    assert "done" not in state and set(state["made_of"]) == {"configuration", "table of words", "cache"}
    assert Runner(make_experiment(), tmp_path).result("second") is None
    write_json(state_file, state | {"minutes": 7.0})
    programs.failing = ""
    programs.commands.clear()
    runner = Runner(make_experiment(), tmp_path)
    runner.run("third")
    assert kinds(programs) == ["train", "train"] and json.loads(state_file.read_text())["minutes"] >= 7.0
    assert runner.result("third")["bbox"]["AP"] == 10.0


def test_a_report_of_an_unfinished_run_does_not_count(programs, tmp_path):
    runner = Runner(make_experiment(), tmp_path)
    state_file = runner.run("first") / "row.json"
    state = json.loads(state_file.read_text())
    write_json(state_file, {key: value for key, value in state.items() if key != "done"})
    assert runner.result("first") is None
    (state_file.parent / "inference" / TEST_SET / "report.json").unlink()
    write_json(state_file, state)
    assert runner.result("first") is None
    runner.run("first")
    assert kinds(programs) == ["train", "train"] and runner.result("first") is not None


def test_an_interrupted_artefact_is_made_again(programs, tmp_path):
    programs.failing = "make_table"
    with pytest.raises(SystemExit):
        Runner(make_experiment(), tmp_path).artefact("table")
    (tmp_path / "table" / "words.bin").write_text("half")
    programs.failing = ""
    assert Runner(make_experiment(), tmp_path).artefact("table").read_text() == "make_table"


def test_what_was_made_with_other_inputs_is_refused_and_named(programs, tmp_path):
    source = tmp_path / "source"
    source.write_text("1")
    output = tmp_path / "out"
    Runner(make_experiment(source), output).run("third")
    with pytest.raises(DataError, match="first.seed0 holds a row made with another configuration: remove it"):
        Runner(make_experiment(source), output, ["SOLVER.MAX_ITER", "9"]).run("first")
    with pytest.raises(DataError, match="first.seed0 holds a row made with another configuration"):  # nor tabulated
        Runner(make_experiment(source), output, ["SOLVER.MAX_ITER", "9"]).results(["first"], [0])
    source.write_text("2")
    with pytest.raises(DataError, match="words.bin was made with another file: remove it and .*words.json"):
        Runner(make_experiment(source), output).run("second")
    source.write_text("1")
    (output / "table" / "words.bin").write_text("other words")
    with pytest.raises(DataError, match="second.seed0 holds a row made with another table of words: remove it"):
        Runner(make_experiment(source), output).run("second")
    (output / "table" / "words.bin").write_text("make_table")
    (output / "first" / "seed0" / "model_final.pth").write_text("other weights")
    with pytest.raises(DataError, match="cache.bin was made with another detector"):
        Runner(make_experiment(source), output).run("second")
    (output / "first" / "seed0" / "model_final.pth").unlink()
    with pytest.raises(DataError, match="model_final.pth is needed and was removed"):
        Runner(make_experiment(source), output).run("second")


def test_a_folder_that_does_not_record_its_inputs(programs, tmp_path):
    folder = tmp_path / "first" / "seed0"
    write_json(folder / "inference" / TEST_SET / "report.json", {"bbox": {"AP": 3.0}})
    with pytest.raises(DataError, match="does not record its inputs: remove it"):
        Runner(make_experiment(), tmp_path).run("first")
    accepting = Runner(make_experiment(accept_unmarked=True), tmp_path)
    assert accepting.result("first") is None  # trained for how long?
    (folder / "model_final.pth").write_text("weights")
    assert accepting.result("first")["bbox"]["AP"] == 3.0
    accepting.run("first")
    assert programs.commands == [] and "| the first | 3.0 | - | - | 1 |" in accepting.table(
        accepting.results(["first"], [0])
    )
    write_json(folder / "row.json", {"configuration": "0"})  # all that earlier versions recorded of an ablation
    with pytest.raises(DataError, match="made with another configuration"):
        Runner(make_experiment(), tmp_path).run("first")


def test_the_users_artefact_must_exist(tmp_path):
    given = {"prior": Artefact("concept prior", "MODEL.TEACHER.PRETRAINED", str(tmp_path / "p"))}
    with pytest.raises(DataError, match="the concept prior .* does not exist"):
        Runner(Experiment({"a": Entry("a", CONFIG, needs=("prior",))}, COLUMNS, given), tmp_path).run("a")


def test_entries_of_one_detector_are_evaluated_in_this_process(tmp_path, monkeypatch):
    """The detector is built once; entries of other weights are evaluated anew; facts stand in the table."""
    built, evaluated = [], []

    class StandIn:
        @staticmethod
        def build_trained(cfg):
            built.append(cfg)
            return "model"

        @staticmethod
        def test(cfg, model):
            evaluated.append(cfg.MODEL.OVD.TEMPERATURE)
            figures = {"bbox": {"AP": 100 * evaluated[-1]}}
            write_json(Path(cfg.OUTPUT_DIR) / "inference" / TEST_SET / "report.json", figures)

    monkeypatch.setattr("ovdet2.engine.Trainer", StandIn)
    weights = tmp_path / "weights.pth"
    weights.write_text("1")
    entries = {
        f"tau{tau}": Entry(
            f"tau {tau}", CONFIG, ("MODEL.OVD.TEMPERATURE", tau), weights=str(weights), folder="{name}",
            facts=lambda cfg: {"tau": cfg.MODEL.OVD.TEMPERATURE},
        )
        for tau in ("0.02", "0.05")
    }  # fmt: skip
    columns = {"tau": Column(("facts", "tau"), "{:g}".format), "AP": COLUMNS["AP"]}
    experiment = Experiment(entries, columns, shared_detector=True)
    runner = Runner(experiment, tmp_path / "out")
    for name in entries:
        runner.run(name)
    assert len(built) == 1 and evaluated == [0.02, 0.05]
    results = runner.results(entries, [0, 1])
    lines = runner.table(results).splitlines()
    assert lines[0] == "| row | tau | AP | minutes |" and lines[3].startswith("| tau 0.05 | 0.05 | 5.0 | ")
    row = runner.rows(results)[0]
    assert row == {"row": "tau0.02", "minutes": row["minutes"], "tau": 0.02, "AP": 2.0}
    Runner(experiment, tmp_path / "out").run("tau0.02")
    assert evaluated == [0.02, 0.05]
    weights.write_text("2")
    Runner(experiment, tmp_path / "out").run("tau0.02")
    assert len(built) == 2 and evaluated == [0.02, 0.05, 0.02]


def test_program_runs_all_and_writes_the_table(programs, tmp_path, capsys):
    document = tmp_path / "R.md"
    document.write_text("before\n<!-- made-up table: by hand -->\nold\n<!-- end of made-up table -->\nafter\n")
    options = ["tests.test_experiments:PLAN", "--output", str(tmp_path / "out"), "--seeds", "0", "2"]
    rows = experiments.main([*options, "--table", str(document)])
    assert [(row["row"], row.get("seed")) for row in rows] == [
        ("first", 0), ("first", 2), ("second", 0), ("second", 2), ("third", 0), ("third", 2), ("program", None)
    ]  # fmt: skip
    table = (tmp_path / "out" / "table.md").read_text()
    lines = table.splitlines()
    assert lines[:2] == ["| row | AP | AR | minutes | seeds |", "|---|---:|---:|---:|---:|"]
    assert re.match(r"\| the first \| 11.0 ± 1.4 \| - \| [\d.]+ ± [\d.]+ \| 2 \|$", lines[2])
    assert re.match(r"\| a program \| 7.0 \| - \| [\d.]+ \| 1 \|$", lines[5])
    assert "The table of words, made once for all rows and seeds, took " in table
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows
    text = document.read_text()
    assert text.startswith("before\n<!-- made-up table: by hand -->\n`ovdet2 experiment ")
    assert "tests.test_experiments:PLAN --seeds 0 2`\n" in text and table in text and "old" not in text
    assert text.endswith("<!-- end of made-up table -->\nafter\n")
    ran = len(programs.commands)
    capsys.readouterr()
    rows = experiments.main([*options, "7", "--tabulate"])
    assert len(programs.commands) == ran and {row.get("seed") for row in rows} == {0, 2, None}
    other = ["tests.test_experiments:PLAN", "--output", str(tmp_path / "other"), "--tabulate"]
    assert experiments.main([*other, "--rows", "first"]) == []
    assert "Not run to the end: first." in capsys.readouterr().out


def test_keys_that_change_no_figure_are_no_inputs_of_a_run():
    def inputs(*overrides):
        return _inputs_in(load_config(CONFIG, list(overrides)))

    plain = inputs()
    assert inputs("TEST.SETTING.CAPTIONS", "CC3M", "TEST.BOOTSTRAP", "0") == plain
    assert inputs("TEST.DETECTIONS_PER_IMAGE", "50") != plain and "SETTING" not in plain


def test_a_document_without_markers(tmp_path):
    document = tmp_path / "R.md"
    document.write_text("<!-- end of x table --> <!-- x table -->")
    with pytest.raises(DataError, match="R.md has no lines"):
        insert_table(document, "x", "table", "python x")


def test_a_figure_that_must_exist(programs, tmp_path):
    experiment = Experiment({"first": Entry("first", CONFIG)}, {"x": Column(("bbox", "AQ"), required=True)})
    runner = Runner(experiment, tmp_path)
    runner.run("first")
    with pytest.raises(UsageError, match="no figure 'AQ': the report has AP"):
        runner.table(runner.results(["first"], [0]))


@pytest.mark.parametrize("name, message", [
    ("cckt.prior", "no experiment 'cckt.prior'; there are cckt.priors, cckt.teachers, clip_detr.ablations"),
    ("ovdet2.no_such_module:PLAN", "cannot be imported"),
    ("ovdet2.errors:UsageError", "no UsageError that is an ovdet2.experiments.Plan"),
])  # fmt: skip
def test_unknown_experiments(name, message):
    with pytest.raises(UsageError, match=message):
        find_plan(name)


def test_unknown_rows_and_tables(tmp_path):
    options = ["tests.test_experiments:PLAN", "--output", str(tmp_path)]
    with pytest.raises(UsageError, match="unknown rows .'fourth'.; there are first, second"):
        experiments.main([*options, "--rows", "fourth"])
    ablations = ["clip_detr.ablations", "--config-file", "ovshapes/clip_detr_both_closed_r18.yaml"]
    with pytest.raises(UsageError, match="goes to no file"):
        experiments.main([*ablations, "--output", str(tmp_path), "--table", "R.md"])


def test_programs_run_from_the_package_and_scripts_from_a_checkout(tmp_path, monkeypatch, capfd):
    command.run_program(["json.tool", "--help"])
    assert "usage: python -m json.tool" in capfd.readouterr().out
    with pytest.raises(SystemExit) as ended:
        command.run_program(["json.tool", "--no-such-option"])
    assert ended.value.code == 2
    monkeypatch.setattr(command, "CHECKOUT", tmp_path)
    with pytest.raises(UsageError, match="projects/CLIM/train.py is needed, which an installed ovdet2 does not have"):
        command.run_program(["projects/CLIM/train.py"])
