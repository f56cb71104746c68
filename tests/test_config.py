"""The configuration: no orphan key, safe loading, errors of usage."""

import ast
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import detectron2.config
import pytest
from detectron2.config import CfgNode

from ovdet2.config import find_methods, get_cfg, load_config, methods
from ovdet2.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent


def leaves(node, prefix=()):
    """Dotted names of all keys."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, (*prefix, key))
        else:
            yield ".".join((*prefix, key))


ADDED = sorted(set(leaves(get_cfg())) - set(leaves(detectron2.config.get_cfg())))


def accesses(source):
    """The tails of upper-case attributes in the code: ``cfg.MODEL.OVD.TEMPERATURE`` gives (MODEL, OVD, TEMPERATURE)."""
    for node in ast.walk(ast.parse(source)):
        tail = []
        if isinstance(getattr(node, "ctx", None), ast.Store):  # declares the key
            continue
        while isinstance(node, ast.Attribute) and node.attr.isupper():
            tail.insert(0, node.attr)
            node = node.value
        if tail:
            yield tuple(tail)


@pytest.fixture(scope="module")
def read_keys():
    """What the code of the package and of the programs reads; tests do not count."""
    files = [*(ROOT / "ovdet2").rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    return {tail for path in files if "tests" not in path.parts for tail in accesses(path.read_text())}


@pytest.fixture(scope="module")
def declarations():
    """The lines of the files that declare keys: the core's, and those of each method."""
    files = [ROOT / "ovdet2" / "config" / "keys.py", *(ROOT / "ovdet2" / "methods").glob("*/__init__.py")]
    return [line for path in files for line in path.read_text().splitlines()]


@pytest.mark.parametrize("key", ADDED)
def test_every_added_key_is_read(key, read_keys):
    """A part of the tree may be taken first (``ovd = cfg.MODEL.OVD``): what is written must end the key's name."""
    path = tuple(key.split("."))
    assert any(path[-len(tail) :] == tail for tail in read_keys), f"{key} is documented but never read"


@pytest.mark.parametrize("key", ADDED)
def test_every_added_key_is_documented(key, declarations):
    at, *_ = [i for i, line in enumerate(declarations) if re.match(rf"\s+cfg\.{re.escape(key)} = ", line)]
    assert declarations[at - 1].strip().startswith("#")


@pytest.mark.parametrize("code, words", [
    ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'.*correct the module"),
    ("def broken(:", "SyntaxError"),
    ("x = 1", "METHOD of made_up.*is lacking"),
    ("from ovdet2.config import Method as METHOD", r"is a class: write METHOD = <Class>\(\)"),
    ("from ovdet2.config import Method\nMETHOD = Method()", "is named ''"),
    ("from ovdet2.config import Method\nMETHOD = Method()\nMETHOD.name = 'vild'", "several methods are named vild"),
    (
        """
from ovdet2.config import Method

class A(Method):
    name = "new"

    def add_keys(self, cfg):
        cfg.MODEL.VILD = type(cfg)()

METHOD = A()
""",
        "the method new replaces the keys MODEL.VILD",
    ),
])  # fmt: skip
def test_wrong_modules_of_parts(code, words, tmp_path, monkeypatch):
    name = f"made_up_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=words.replace("made_up", name)):
        load_config("", ["MODEL.PARTS", [name]])


@pytest.mark.parametrize("path", ["", ".x", "projects/Example", "a:METHOD", 3, "no.such"])
def test_wrong_paths_of_parts(path):
    with pytest.raises(UsageError, match="MODEL.PARTS names"):
        load_config("", ["MODEL.PARTS", [path]])


def test_text_as_parts_in_a_file(tmp_path):
    (tmp_path / "a.yaml").write_text("MODEL: {PARTS: tests.caption_method}")
    with pytest.raises(UsageError, match="MODEL.PARTS is 'tests.caption_method': give a list"):
        load_config(tmp_path / "a.yaml")


def test_installed_packages_with_parts(monkeypatch, caplog):
    """One by its module, one by its METHOD, and broken ones, which are skipped with a warning."""
    points = [EntryPoint(name, value, methods.GROUP) for name, value in (
        ("one", "tests.caption_method"), ("broken", "no_such_package.part"), ("other", "projects.Example.example:METHOD"),
    )]  # fmt: skip
    monkeypatch.setattr(methods, "entry_points", lambda group: points)
    methods._installed.cache_clear()
    try:
        names = [method.name for method in find_methods()]
    finally:
        methods._installed.cache_clear()
    assert names[-2:] == ["example", "caption_test"] and "the entry point broken of ovdet2.parts" in caplog.text


def test_keys_were_found():
    assert "SOLVER.OPTIMIZER" in ADDED and "DATALOADER.MAX_BAD_IMAGES" in ADDED


@pytest.mark.parametrize("overrides, words", [
    (["NO_SUCH_KEY", "1"], "NO_SUCH_KEY"),
    (["SOLVER.OPTIMISER", "AdamW"], "SOLVER.OPTIMISER"),
    (["SOLVER.MAX_ITER", "'ten'"], "MAX_ITER"),
    (["SOLVER.MAX_ITER"], "command line"),
])  # fmt: skip
def test_wrong_override(overrides, words):
    with pytest.raises(UsageError, match=words):
        load_config("", overrides)


@pytest.mark.parametrize(
    "content, words",
    [
        ("SOLVER:\n  NO_SUCH_KEY: 1\n", "NO_SUCH_KEY"),
        ("OUTPUT_DIR: !!python/object/apply:os.getcwd []\n", "bad.yaml"),
        ("SOLVER: [1\n", "bad.yaml"),
        ("just words\n", "bad.yaml"),
    ],
)
def test_wrong_file(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UsageError, match=words):
        load_config(str(path))


@pytest.mark.parametrize("group", ["MODEL.OVD", "MODEL", "MODEL.FPN", "INPUT.LSJ"])
def test_a_group_without_keys(tmp_path, group):
    """It would replace the group of the base by the defaults: a comment-like line would change the detector."""
    *outer, last = group.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate([*outer, last])]
    (tmp_path / "base.yaml").write_text("MODEL:\n  OVD:\n    SECONDARY_SCORES: map\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\n" + "\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=f"own.yaml has the group {group} without any key: remove it"):
        load_config(tmp_path / "own.yaml")


def test_unknown_file_lists_the_shipped_ones():
    with pytest.raises(UsageError, match="no configuration file nowhere.yaml.*ovshapes/vild_text_r18.yaml"):
        load_config("nowhere.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_loads(path):
    assert isinstance(load_config(str(path)), CfgNode)
