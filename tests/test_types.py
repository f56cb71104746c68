"""The type checker passes, and public functions are annotated; the lists of known exceptions only shrink."""

import ast
import json

import check_types
import pytest

# Where no type error and no public function without annotations may be: packages end in a slash.
GREEN = (
    "ovdet2/data/samples.py",
    "ovdet2/data/source_spec.py",
    "ovdet2/data/sources.py",
    "ovdet2/data/stream.py",
    "ovdet2/data/loader.py",
    "ovdet2/data/readers/",
    "ovdet2/data/steps/",
    "ovdet2/methods/",
    "ovdet2/modeling/detr/",
    "ovdet2/config/",
    "ovdet2/modeling/part.py",
    "ovdet2/modeling/host.py",
    "ovdet2/modeling/rcnn/part.py",
)


def test_no_new_type_errors():
    pytest.importorskip("pyrefly", reason="pip install -e .[dev]")
    assert check_types.check_types() == 0


def test_public_functions_are_annotated(capsys):
    assert check_types.check_annotations() == 0, capsys.readouterr().out


def test_no_exceptions_at_the_seams():
    errors = {entry["path"] for entry in json.loads(check_types.TYPE_ERRORS.read_text())["errors"]}
    unannotated = set(json.loads(check_types.UNANNOTATED.read_text()))
    assert all((check_types.ROOT / path).exists() for path in GREEN)
    assert not [path for path in errors | unannotated if path.startswith(GREEN)]


def test_nothing_silences_a_file():
    for path in check_types.source_files():
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not line.startswith(("# type: ignore", "# pyrefly: ignore-errors", "# ruff: noqa")), path


@pytest.mark.parametrize("source, names", [
    ("def f(a: int, *b: int, c: str = '', **d: int) -> None: ...", []),
    ("def f(a): ...", ["f"]),
    ("def f(a: int): ...", ["f"]),
    ("def f(*a) -> None: ...", ["f"]),
    ("def f(*, a) -> None: ...", ["f"]),
    ("def f(**a) -> None: ...", ["f"]),
    ("async def f(a, /) -> None: ...", ["f"]),
    ("def _f(a): ...", []),
    ("class A:\n def f(self) -> None: ...\n @classmethod\n def g(cls, a: int) -> None: ...", []),
    ("class A:\n def f(self): ...\n def _g(self): ...\n def __len__(self): ...", ["A.f"]),
    ("class A:\n @staticmethod\n def f(a) -> None: ...", ["A.f"]),
    ("class _A:\n def f(self): ...", []),
])  # fmt: skip
def test_what_counts_as_annotated(source, names):
    functions = check_types.public_functions(ast.parse(source))
    assert [name for name, function, bound in functions if not check_types.is_annotated(function, bound)] == names


def test_update_only_shrinks(tmp_path, monkeypatch, capsys):
    package = tmp_path / "ovdet2"
    (package / "tests").mkdir(parents=True)
    (package / "a.py").write_text("def old(x): ...\ndef new(x): ...\ndef repaired() -> None: ...\n")
    (package / "tests" / "test_a.py").write_text("def test(x): ...\n")
    known = tmp_path / "known.json"
    known.write_text(json.dumps({"ovdet2/a.py": ["old", "repaired"], "ovdet2/gone.py": ["f"]}))
    now = check_types.unannotated(tmp_path)
    monkeypatch.setattr(check_types, "ROOT", tmp_path)
    monkeypatch.setattr(check_types, "UNANNOTATED", known)
    monkeypatch.setattr(check_types, "unannotated", lambda: now)
    assert now == {"ovdet2/a.py": ["new", "old"]}
    assert check_types.check_annotations() == 1
    printed = capsys.readouterr().out
    assert "a.py: new lacks" in printed and "a.py: repaired is listed" in printed and "gone.py: f is listed" in printed
    assert check_types.check_annotations(update=True) == 1
    assert json.loads(known.read_text()) == {"ovdet2/a.py": ["old"]}
    known.unlink()
    assert check_types.check_annotations() == 0
    assert json.loads(known.read_text()) == now
