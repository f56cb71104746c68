"""Rules of the code's structure, read from its syntax trees."""

import ast
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
