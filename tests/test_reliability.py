"""docs/RELIABILITY.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/RELIABILITY.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", PAGE)))


@pytest.mark.parametrize("path, name", NAMED)
def test_a_named_test_exists(path, name):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert not name or name in found


def test_every_attack_has_a_row_with_a_test_or_is_open():
    rows = dict(re.findall(r"^\| (T\d+) \|[^|]*\| ([^|]*)\|", PAGE, re.M))
    assert list(rows) == [f"T{number}" for number in range(1, 31)] and len(NAMED) > 40
    assert all("`tests/" in cell or cell.startswith("open") for cell in rows.values())
