"""Rules of the code's structure, read from its syntax trees."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 60


def functions(source):
    """(name, lines) of each function: lines of its body that are neither docstring nor blank nor only a comment."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            own = lines[body[0].lineno - 1 : node.end_lineno] if body else []
            yield node.name, sum(bool(line.strip()) and not line.strip().startswith("#") for line in own)


@pytest.mark.parametrize("folder", ["ovdet2", "projects", "tools"])
def test_functions_are_short(folder):
    long = [
        f"{path.relative_to(ROOT)}: {name} has {count} lines"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name, count in functions(path.read_text(encoding="utf-8"))
        if count > LONGEST
    ]
    assert not long


def test_what_is_counted():
    source = (
        'def f(\n    a,\n):\n    """Of two\n    lines."""\n    # why\n    a = 1\n\n    return (\n        a\n    )\n'
    )
    assert list(functions(source)) == [("f", 4)]
    assert list(functions('def f():\n    """Nothing."""\n')) == [("f", 0)]


def affixes():
    """{affix: meaning} of the table of docs/ARCHITECTURE.md."""
    table = (
        (ROOT / "docs/ARCHITECTURE.md")
        .read_text(encoding="utf-8")
        .partition("| affix | meaning |")[2]
        .partition("\n\n")[0]
    )
    return dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M))


def name_legend(source, meanings):
    """(affixes of the names in the code, the legend that they require, the legend of the module's docstring)."""
    tree = ast.parse(source)
    # Not names of ours: functions such as cxcywh_to_xyxy, torch's ..._with_logits, arguments such as output_logits=True.
    foreign = r"\w+_to_\w+|\w+_with_logits|output_logits"
    names = {name for name in re.findall(r"\b[A-Za-z]\w*", source) if not re.fullmatch(foreign, name)}

    def has(name, affix):
        return name.startswith(affix) if affix.endswith("_") else name.endswith(affix) or name == "deltas" == affix[1:]

    present = [affix for affix in meanings if any(has(name, affix) for name in names)]
    docstring = " ".join((ast.get_docstring(tree) or "").split())
    required = "Names: " + ", ".join(f"``{affix}`` {meanings[affix]}" for affix in present) + "." if present else ""
    stated = re.search(r"Names: ``.*?\.(?= |$)", docstring)
    return present, required, stated.group() if stated else ""


SHAPED = [
    path.relative_to(ROOT).as_posix()
    for folder in ("ovdet2", "projects")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "tests" not in path.parts and re.search(r"^Shapes: ", path.read_text(encoding="utf-8"), re.M)
]


@pytest.mark.parametrize("path", SHAPED)
def test_shape_legends_have_name_legends(path):
    _, required, stated = name_legend((ROOT / path).read_text(encoding="utf-8"), affixes())
    assert stated == required, f"the docstring of {path} must have the legend: {required or 'none'}"


def test_what_a_name_legend_states():
    meanings = affixes()
    assert len(meanings) == 8 and meanings["gt_"] == "ground truth"
    source = '"""Shapes: R.\n\nNames: ``gt_`` ground truth.\n"""\ngt_a = cxcywh_to_xyxy(deltas)\n'
    present, required, stated = name_legend(source, meanings)
    assert present == ["gt_", "_deltas"] and required.startswith("Names: ``gt_`` ground truth, ``_deltas`` box")
    assert stated == "Names: ``gt_`` ground truth."
    assert name_legend("a = 1\n", meanings) == ([], "", "")
