"""docs/FIDELITY.md names tests and keys that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "FIDELITY.md").read_text(encoding="utf-8")
FILES = {path.name: path for folder in ("tests", "ovdet2", "projects") for path in (ROOT / folder).rglob("test_*.py")}
ROWS = [line for line in PAGE.splitlines() if line.startswith("|") and "`" in line]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_tests_of_a_row_exist(row):
    """A path is the file's; a test stands in the file that is named before it, or in one of this row."""
    held_by = row.rstrip(" |").rpartition(" | ")[2]
    paths = re.findall(r"`([\w/]*test_\w+\.py)(?:: test_\w+)?`", held_by)
    names = re.findall(r"`(?:[\w/]*test_\w+\.py: )?(test_\w+)`", held_by)
    for path in paths:
        assert path.rpartition("/")[2] in FILES and ("/" not in path or (ROOT / path).is_file()), path
    for name in names:
        files = [path for path in FILES.values() if f"def {name}(" in path.read_text(encoding="utf-8")]
        assert files, name
        assert not paths or {path.rpartition("/")[2] for path in paths} & {path.name for path in files}, name


def test_every_method_has_rows():
    sections = re.split(r"^### ", PAGE, flags=re.M)[1:]
    assert sections and all(re.search(r"^\|.*`.*test_", section, re.M) for section in sections)


def test_every_row_that_names_tests_is_understood():
    """Whatever notation it uses."""
    for row in ROWS:
        held_by = row.rstrip(" |").rpartition(" | ")[2]
        mentions = len(re.findall(r"\btest_\w+(?:\.py)?", held_by))
        read = re.findall(r"`([\w/]*test_\w+\.py)(?:: test_\w+)?`", held_by)
        read += re.findall(r"`(?:[\w/]*test_\w+\.py: )?(test_\w+)`", held_by)
        assert len(read) == mentions, row
