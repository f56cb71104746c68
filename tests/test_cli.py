"""The ``ovdet2`` command: help with examples that can be parsed, exit codes, no Detectron2, and the old scripts."""

import argparse
import ast
import functools
import importlib
import json
import runpy
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

from ovdet2 import __version__, cli, errors
from ovdet2.cli import VERBS, Verb
from ovdet2.config import find_config
from ovdet2.programs import bench, experiments, prepare_dataset

ROOT = Path(__file__).resolve().parents[1]
# Verbs whose programs check their options against each other in parse_args, without reading files.
CHECKED = ("cache build", "prior", "vocab")


def code_of(capsys, *words):
    """(exit code, stdout, stderr) of ``ovdet2 <words>``."""
    with pytest.raises(SystemExit) as exit:
        cli.main(words)
    return exit.value.code, *capsys.readouterr()


def example_lines(text):
    """The words after ``ovdet2`` of each command line among the indented examples of a help text."""
    joined = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in joined if line.startswith("    ovdet2 ")]


def verb_of(words):
    """(name of the verb, words after it)."""
    count = 2 if " ".join(words[:2]) in VERBS else 1
    return " ".join(words[:count]), words[count:]


class Parsed(Exception):
    """Raised instead of running a program whose options are right."""


def parse(words, monkeypatch):
    """The options of a command line, whose program is not run; a usage error is a SystemExit."""
    name, arguments = verb_of(words)
    verb = VERBS[name]
    if name in CHECKED:
        return importlib.import_module(verb.module).parse_args(arguments)
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser, args=None, namespace=None):
        raise Parsed(original(parser, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Parsed) as parsed:
            getattr(importlib.import_module(verb.module), verb.function)(arguments)
    return parsed.value.args[0]


# --- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VERBS)
def test_help_has_examples_that_can_be_parsed(name, capsys, monkeypatch):
    code, out, err = code_of(capsys, *name.split(), "--help")
    assert code == 0 and not err and out.startswith(f"usage: ovdet2 {name} ")
    summary = out.split("\n\n")[1].strip()
    assert summary[0].isupper() and summary[-1] in ".:" and "\n" not in summary, "it starts with one plain sentence"
    examples = [words for words in example_lines(out) if verb_of(words)[0] == name]
    assert examples
    for words in examples:
        if words in (["experiment"], ["doctor", "--install-detectron2"]) or "--help" in words:
            continue
        args = parse(words, monkeypatch)
        if getattr(args, "config_file", ""):
            assert find_config(args.config_file).is_file()
            assert len(getattr(args, "opts", [])) % 2 == 0


def test_one_spelling_of_configurations_and_overrides(capsys):
    for name in VERBS:
        _, out, _ = code_of(capsys, *name.split(), "--help")
        if "--config-file" in out.split("options:")[-1]:
            assert "--config-file CONFIG_FILE" in out
            only_registers_data_sets = name in ("report make", "report scores", "vocab thresholds", "zero-shot")
            assert "KEY VALUE " in out or only_registers_data_sets


@pytest.mark.parametrize(
    "words, meant",
    [
        (("predict", "--threshold", "0.5", "--vocabulary", "x"), "--threshold (did you mean --confidence-threshold?)"),
        (("train", "--config", "a.yaml", "--numgpus=2"), "--numgpus (did you mean --num-gpus?)"),
        (("vocab", "--colour", "red", "--words", "x"), "no option --colour"),
    ],
)
def test_an_unknown_option_is_named(words, meant, capsys):
    """Also where argparse would take it for an override."""
    code, _, stderr = code_of(capsys, *words)
    assert code == 2 and meant in stderr


def test_an_option_after_overrides_is_refused(capsys):
    words = ["train", "--config-file", "ovshapes/vild_text_r18.yaml", "MODEL.WEIGHTS", "x.pth", "--resume"]
    code, _, err = code_of(capsys, *words)
    assert code == 2 and "--resume comes after KEY VALUE overrides: put it before them" in err


@pytest.mark.parametrize("module", prepare_dataset.MODULES)
def test_help_of_each_data_set(module, capsys, monkeypatch):
    code, out, _ = code_of(capsys, "dataset", "prepare", module, "--help")
    examples = example_lines(out)
    assert code == 0 and examples and all(words[:3] == ["dataset", "prepare", module] for words in examples)
    for words in examples:
        parse(words, monkeypatch)


def test_check_and_repair_have_their_own_options(capsys):
    shared = ("--json", "--images", "--decode", "--workers", "--max-shown", "--report", "--overwrite")
    check, repair = (code_of(capsys, "dataset", verb, "--help")[1] for verb in ("check", "repair"))
    assert all(option in text for option in shared for text in (check, repair))
    assert "--fix" in check and "--output" not in check
    assert "--output" in repair and "--fix" not in repair


def test_messages_of_repair_name_its_own_options(tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("{}")
    for options in (["--output", str(path)], ["--output", str(tmp_path)], []):
        code, _, err = code_of(capsys, "dataset", "repair", "--json", str(path), *options)
        assert code == 2 and "--output" in err and "--fix" not in err


def test_repair_writes_the_copy(tmp_path, capsys):
    path, out = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(
        '{"images": [{"id": 1, "file_name": "a.png", "width": 9, "height": 9}], "categories": [{"id": 1, "name": "a"}],'
        ' "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 0, 5]},'
        '{"id": 2, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]}]}'
    )
    words = ["dataset", "repair", "--json", str(path), "--output", str(out)]
    code, printed, _ = code_of(capsys, *words)
    assert code == 0 and "repaired box-empty, 1: removed" in printed and out.is_file()
    code, _, err = code_of(capsys, *words)
    assert code == 2 and "name another file with --output, or add --overwrite" in err
    assert code_of(capsys, *words, "--overwrite")[0] == 0


# --- the command itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_list_of_verbs(words, capsys):
    code, out, _ = code_of(capsys, *words)
    assert code == 0 and all(f"  {name} " in out and verb.help in out for name, verb in VERBS.items())


@pytest.mark.parametrize("group", ["cache", "dataset", "report"])
def test_the_list_of_a_group(group, capsys):
    code, out, _ = code_of(capsys, group)
    listed = {name for name in VERBS if f"  {name} " in out}
    assert code == 0 and listed == {name for name in VERBS if name.startswith(f"{group} ")}


@pytest.mark.parametrize("words", [["fly"], ["cache", "fly"], ["report", "--html"], ["--fly"], ["fly", "--help"]])
def test_an_unknown_verb(words, capsys):
    code, out, err = code_of(capsys, *words)
    named = " ".join(word for word in words if word != "--help")
    assert code == 2 and not out and f"there is no verb {named!r}" in err and "ovdet2 --help" in err


@pytest.mark.parametrize("words, named", [
    (["dataset", "prepare", "imagenet"], "there is no data set 'imagenet' to prepare; there are ov-coco, ov-lvis, voc"),
    (["bench", "moon"], "there is no benchmark 'moon'; there are cache"),
    (["experiment", "moon"], "there is no experiment 'moon'"),
    (["train", "--fly"], "there is no option --fly"),
    (["report", "compare", "a", "b", "--classes", "-1"], "--classes must be at least 0"),
    (["train", "--config-file", "absent.yaml"], "absent.yaml"),
])  # fmt: skip
def test_a_usage_error(words, named, capsys):
    code, _, err = code_of(capsys, *words)
    assert code == 2 and named in err and "Traceback" not in err


def test_a_data_error(tmp_path, capsys):
    code, _, err = code_of(capsys, "dataset", "check", "--json", str(tmp_path / "absent.json"))
    assert code == 3 and err.startswith("DataError: ") and "absent.json" in err


@pytest.mark.parametrize("error, code", [
    (errors.UsageError, 2), (errors.DataError, 3), (errors.CacheError, 3), (errors.SetupError, 4),
    (errors.NumericalError, 5),
])  # fmt: skip
def test_the_exit_code_of_an_error(error, code, monkeypatch, capsys):
    def fail(words):
        raise error(f"{words} are wrong.")

    monkeypatch.setitem(sys.modules, "some_program", types.SimpleNamespace(main=fail))
    monkeypatch.setitem(VERBS, "fail", Verb("some_program", "fail"))
    assert code_of(capsys, "fail", "a") == (code, "", f"{error.__name__}: ['a'] are wrong.\n")


@pytest.mark.parametrize("result, code", [(3, 3), (0, 0), (None, 0), ({"a": 1}, 0), ([1], 0)])
def test_only_an_int_is_an_exit_code(result, code, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "some_program", types.SimpleNamespace(main=lambda words: result))
    monkeypatch.setitem(VERBS, "work", Verb("some_program", "work"))
    assert code_of(capsys, "work") == (code, "", "")


def test_the_version(capsys):
    assert code_of(capsys, "--version") == (0, f"ovdet2 {__version__}\n", "")


# --- without Detectron2 --------------------------------------------------------------------------------------------

BLOCKED = r"""
import contextlib, io, json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Block())
from ovdet2 import cli

result = {}
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as exit:
            code = exit.code
    result[" ".join(words)] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(result))
"""
WITHOUT = {"doctor", "report compare"}  # verbs that need no Detectron2
NAMED = {"bench": ["detr"], "dataset prepare": ["ov-coco"]}  # these need it as soon as one is named


@pytest.fixture(scope="module")
def blocked():
    """{command line: [exit code, stdout, stderr]} in one process that cannot import Detectron2."""
    lines = [["--help"], ["--version"], ["cache"], ["doctor", "--help"], ["doctor", "--only", "python"]]
    lines += [["doctor", "--only", "detectron2"], ["doctor", "--install-detectron2", "--help"], ["bench"]]
    lines += [["dataset", "prepare", "--help"], ["report", "compare", "--help"], ["fly"]]
    for name in VERBS:
        if name not in WITHOUT:
            lines += [[*name.split(), *NAMED.get(name, ())], [*name.split(), *NAMED.get(name, ()), "--help"]]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(lines)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", [name for name in VERBS if name not in WITHOUT])
def test_a_verb_without_detectron2_says_how_to_install_it(name, blocked):
    line = " ".join([name, *NAMED.get(name, ())])
    code, out, err = blocked[line]
    assert code == 4 and not out and err.startswith(f"SetupError: ovdet2 {name} needs Detectron2")
    assert cli.INSTALL_DETECTRON2 in err and "Traceback" not in err
    code, out, err = blocked[f"{line} --help"]
    assert code == 0 and not err and f"usage: ovdet2 {name} " in out and cli.INSTALL_DETECTRON2 in out


def test_what_works_without_detectron2(blocked):
    lines = ["--help", "--version", "cache", "doctor --help", "doctor --only python", "bench"]
    lines += ["dataset prepare --help", "report compare --help", "doctor --install-detectron2 --help"]
    for line in lines:
        code, out, err = blocked[line]
        assert code == 0 and out and not err, line
    assert blocked["fly"][0] == 2
    code, out, _ = blocked["doctor --only detectron2"]
    assert code == 4 and "Detectron2 cannot be imported" in out and cli.INSTALL_DETECTRON2 in out


# --- the old scripts -----------------------------------------------------------------------------------------------

SCRIPTS = {
    "datasets/prepare_ov_coco.py": "ovdet2.programs.prepare_ov_coco",
    "datasets/prepare_ov_lvis.py": "ovdet2.programs.prepare_ov_lvis",
    "datasets/prepare_voc.py": "ovdet2.programs.prepare_voc",
    "demo/demo.py": "predict",
    "tools/benchmark_clip_detr.py": "ovdet2.methods.clip_detr.bench",
    "tools/benchmark_detr.py": "ovdet2.bench.detr",
    "tools/benchmark_evaluation.py": "ovdet2.bench.evaluation",
    "tools/benchmark_fvlm.py": "ovdet2.methods.fvlm.bench",
    "tools/benchmark_step.py": "ovdet2.methods.vild.bench",
    "tools/benchmark_vocabulary.py": "ovdet2.bench.vocabulary",
    "tools/build_concept_priors.py": "prior",
    "tools/build_pseudo_labels.py": "dataset pseudo-labels",
    "tools/build_region_cache.py": "cache build",
    "tools/build_vocabulary.py": "vocab",
    "tools/check_dataset.py": "dataset check",
    "tools/compare_reports.py": "report compare",
    "tools/draw_queries.py": "report queries",
    "tools/draw_score_maps.py": "report score-maps",
    "tools/evaluate_teacher.py": "teacher",
    "tools/import_deformable_detr.py": "import-weights",
    "tools/inspect_cache.py": "cache inspect",
    "tools/install_detectron2.py": "ovdet2.programs.install_detectron2",
    "tools/make_report.py": "report make",
    "tools/ovshapes_demo.py": "demo",
    "tools/pretrain_backbone.py": "ovdet2.ov_shapes.trunk",
    "tools/train_embedded_teacher.py": "ovdet2.ov_shapes.teachers",
    "train_net.py": "train",
}
EXPERIMENTS = {
    "tools/ablate_clip_detr.py": "clip_detr.ablations",
    "tools/run_ovshapes.py": "ov-shapes",
    "tools/sweep_cckt_priors.py": "cckt.priors",
    "tools/sweep_cckt_teachers.py": "cckt.teachers",
}
OTHERS = {"tools/bench_cache.py"}
DEVELOPMENT = {
    "tools/check_types.py",
    "tools/pin_zoo.py",
    "tools/torch_versions.py",
}  # programs for the developers of ovdet2, which are no wrappers


def scripts():
    """The scripts of the repository, as paths relative to it."""
    paths = [
        ROOT / "train_net.py",
        *(path for name in ("tools", "datasets", "demo") for path in (ROOT / name).glob("*.py")),
    ]
    return {path.relative_to(ROOT).as_posix() for path in paths} - DEVELOPMENT


def test_every_script_is_a_short_wrapper():
    assert scripts() == {*SCRIPTS, *EXPERIMENTS, *OTHERS}
    for script in scripts():
        source = (ROOT / script).read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 25, script
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
        assert {name.split(".")[0] for name in names} <= {"ovdet2", "sys", "functools"}, script


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_calls_the_program_of_its_verb(script):
    verb = VERBS.get(SCRIPTS[script], Verb(SCRIPTS[script], ""))
    main = runpy.run_path(str(ROOT / script))["run" if script == "train_net.py" else "main"]
    assert main == getattr(importlib.import_module(verb.module), verb.function)


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_a_script_calls_its_experiment(script, monkeypatch):
    monkeypatch.setattr(experiments, "main", lambda argv: argv)
    main = runpy.run_path(str(ROOT / script))["main"]
    assert main(["--seeds", "1"]) == [EXPERIMENTS[script], "--seeds", "1"]


def test_the_script_of_the_cache_benchmark(monkeypatch):
    script = runpy.run_path(str(ROOT / "tools" / "bench_cache.py"))["main"]
    assert isinstance(script, functools.partial)
    monkeypatch.setattr("ovdet2.bench.cache.main", lambda options, more: (options, more))
    assert bench.main(["cache", "--x"]) == (["--x"], script.keywords["more"])
    assert script.func.__module__ == "ovdet2.bench.cache" and not script.args
