"""The configuration: no orphan key, safe loading, errors of usage."""

import ast
import io
import tokenize
from importlib.metadata import EntryPoint
from pathlib import Path

import detectron2.config
import pytest
import yaml
from detectron2.config import CfgNode

from ovdet2.config import find_methods, get_cfg, load_config, methods
from ovdet2.errors import DataError, UsageError
from ovdet2.programs import train
from ovdet2.zoo import DETECTORS

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


def declarations(source):
    """{key: whether only a comment stands on the line above} of the first ``cfg.<key> = ...`` of each key."""
    comments = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#")
    }
    found = {}
    for node in ast.walk(ast.parse(source)):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            found.setdefault(ast.unparse(target), node.lineno - 1 in comments)
    return {name.removeprefix("cfg."): above for name, above in found.items() if name.startswith("cfg.")}


@pytest.fixture(scope="module")
def documented():
    """:func:`declarations` of the files that declare keys: the core's, and those of each method."""
    files = [ROOT / "ovdet2" / "config" / "keys.py", *(ROOT / "ovdet2" / "methods").glob("*/__init__.py")]
    found = {key: above for path in files for key, above in declarations(path.read_text()).items()}
    # Keys that several methods add to their groups.
    shared = declarations((ROOT / "ovdet2" / "config" / "text_keys.py").read_text().replace(" keys.", " cfg."))
    return {key: shared[name] for key in ADDED if (name := key.rpartition(".")[2]) in shared} | found


@pytest.mark.parametrize("key", ADDED)
def test_every_added_key_is_read(key, read_keys):
    """A part of the tree may be taken first (``ovd = cfg.MODEL.OVD``): what is written must end the key's name."""
    path = tuple(key.split("."))
    assert any(path[-len(tail) :] == tail for tail in read_keys), f"{key} is documented but never read"


@pytest.mark.parametrize("key", ADDED)
def test_every_added_key_is_documented(key, documented):
    assert documented[key], f"no comment stands above cfg.{key} = ..."


def test_what_counts_as_documented():
    source = "# Why.\ncfg.A = 1\ncfg.B.C = 2\nd = 3  # of d\ncfg.E = 4\n# Again.\ncfg.B.C = 5\n"
    assert declarations(source) == {"A": True, "B.C": False, "E": False}


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


@pytest.mark.parametrize(
    "wrong, meant", [("ovshapes/vild_txt_r18.yaml", "ovshapes/vild_text_r18.yaml"), ("ovshapes-vlid", "ovshapes-vild")]
)
def test_a_mistyped_name_is_guessed(wrong, meant):
    with pytest.raises(UsageError, match=f"no configuration file {wrong} .did you mean {meant}?"):
        load_config(wrong)


@pytest.mark.parametrize("wrong, meant", [("MODEL.WEIGTHS", "MODEL.WEIGHTS"), ("SOLVER.MAXITER", "SOLVER.MAX_ITER"), ("MODEL.VILD.WIEGHT", "MODEL.VILD.WEIGHT")])  # fmt: skip
def test_a_mistyped_key_is_guessed(wrong, meant, tmp_path):
    with pytest.raises(UsageError, match=f"{wrong} .did you mean {meant}?"):
        load_config("", [wrong, 1])
    *groups, last = wrong.split(".")
    node = {last: 1}
    for group in reversed(groups):
        node = {group: node}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(node))
    with pytest.raises(UsageError, match=f"{wrong} .did you mean {meant}?"):
        load_config(tmp_path / "own.yaml")


class TestBaseOfAFile:
    """``_BASE_`` is a path relative to the file, or the name of a shipped configuration."""

    def write(self, path, base):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'_BASE_: "{base}"\nSOLVER:\n  MAX_ITER: 7\n')
        return path

    @pytest.mark.parametrize("base", ("ovshapes/vild_text_r18.yaml", "configs/ovshapes/vild_text_r18.yaml", "../ovshapes/vild_text_r18.yaml"))  # fmt: skip
    def test_a_shipped_one(self, base, tmp_path, monkeypatch):
        expected = load_config("ovshapes/vild_text_r18.yaml", ["SOLVER.MAX_ITER", 7])
        assert load_config(self.write(tmp_path / "own.yaml", base)) == expected
        monkeypatch.chdir(tmp_path)
        assert load_config("own.yaml") == expected

    def test_the_users_file_comes_first(self, tmp_path):
        (tmp_path / "ovshapes").mkdir()
        (tmp_path / "ovshapes" / "vild_text_r18.yaml").write_text("SEED: 99\n")
        assert load_config(self.write(tmp_path / "own.yaml", "ovshapes/vild_text_r18.yaml")).SEED == 99

    def test_bases_of_bases(self, tmp_path):
        self.write(tmp_path / "a" / "first.yaml", "ovshapes/vild_text_r18.yaml")
        second = self.write(tmp_path / "second.yaml", "a/first.yaml")
        assert load_config(second).OUTPUT_DIR == load_config("ovshapes/vild_text_r18.yaml").OUTPUT_DIR

    def test_one_that_does_not_exist(self, tmp_path):
        with pytest.raises(UsageError, match="_BASE_ names .*nothing.yaml, which does not exist: give a path relative"):
            load_config(self.write(tmp_path / "own.yaml", "nothing.yaml"))

    def test_a_circle(self, tmp_path):
        self.write(tmp_path / "a.yaml", "b.yaml")
        with pytest.raises(UsageError, match="b.yaml is its own _BASE_"):
            load_config(self.write(tmp_path / "b.yaml", "a.yaml"))


class TestTrainedDetectors:
    """The names of ovdet2.zoo stand for a configuration with its weights."""

    def test_the_configuration_and_the_weights(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OVDET2_HOME", str(tmp_path / "home"))
        for name, named in DETECTORS.items():
            Path(named.weights).parent.mkdir(parents=True)
            Path(named.weights).touch()
            assert load_config(name) == load_config(named.config, [*named.overrides, "MODEL.WEIGHTS", named.weights])
            assert load_config(name, ["MODEL.WEIGHTS", "mine.pth"]).MODEL.WEIGHTS == "mine.pth"

    @pytest.mark.parametrize("name", DETECTORS)
    def test_weights_that_are_not_there(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("OVDET2_HOME", str(tmp_path / "home"))
        with pytest.raises(DataError, match=f"{DETECTORS[name].weights} does not exist: {DETECTORS[name].remedy}"):
            load_config(name)

    def test_training_takes_a_configuration(self):
        with pytest.raises(UsageError, match="ovshapes-vild is a trained detector. .*--config-file ovshapes/vild_r18"):
            train.run(["--config-file", "ovshapes-vild"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configuration_loads(path):
    assert isinstance(load_config(str(path)), CfgNode)
