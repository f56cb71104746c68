"""Words that readers found unclear do not come back: docstrings, comments, messages, documentation, configurations.

What to write instead: "semantic prior", "present words", "secondary scores", "repair", "skipped", "must", "requires",
"on the fly", "not run here", "recipe", "inputs", "all", "only", "same", "separate".
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
UNCLEAR = {
    "asked for": r"\bask(s|ed)? for\b",
    "told": r"\b(is|are|was|were|be) (not )?told\b|\bwords told\b",
    "said": r"\bsaid\b|\bwhoever\b|\bhave to say\b",
    "sees at once": r"\bat once\b",
    "second branch": r"\bsecond[ _](branch|opinion|probs)\b",
    "mend": r"\bmend(s|ed|ing|able)?\b",
    "cannot be right": r"\bcannot be right\b",
    "left out": r"\bleft out\b|\bleave(s)? out\b",
    "is to be": r"\b(is|are) to be\b",
    "wants": r"\bwants\b",
    "nobody ran": r"\bnobody (ran|has run)\b",
    "made of": r"\bmade of\b|\bingredients\b",
    "beside it": r"\bothers beside (it|them)\b",
    "bears": r"\bbears?\b",
    "loud": r"\bas loud\b",
    "its place": r"\bbe its place\b",
    "best per object": r"\bbest per object\b",
    "whole": r"\bwhole\b",
    "alone": r"\balone\b",
    "ours": r"\bours\b",
    "of its own": r"\bof (its|their) own\b",
    "where there is": r"\bwhere there (is|are)\b",
    "the like": r"\b(and|or) the like\b",
}
# Fine in these phrases.
ALLOWED = re.compile(
    r"\bwhole (images?|numbers?|views?)\b|\bmade of (torch|parts|steps)\b"
    r'|"(teddy )?bear"|"said(_subset)?"|"MODEL\.OVD\.SECOND_BRANCH"',  # class names of COCO; a former key, which is still read; keys of report.json
    re.I,
)
KEY = re.compile(r"""["'][\w ]+["']""")  # a name in a file, such as "said" in report.json
REPLACED = re.compile(r"\{[^{}]*\}")  # code within an f-string
EXCLUDED = {"docs/LOG.md", "CHANGELOG.md", "LICENSE"}  # the log and the changes tell what was


def pages():
    """Paths of everything that people read."""
    for pattern in ("ovdet2/**/*.py", "projects/**/*.py", "tools/*.py", "datasets/*.py", "demo/*.py", "*.py"):
        yield from ROOT.glob(pattern)
    for pattern in ("*.md", "docs/*.md", "datasets/*.md", "ovdet2/**/*.md", "projects/**/*.md"):
        yield from ROOT.glob(pattern)
    for pattern in ("configs/**/*.yaml", "projects/**/*.yaml"):
        yield from ROOT.glob(pattern)


PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in set(pages())
    if "tests" not in path.parts and path.relative_to(ROOT).as_posix() not in EXCLUDED
)


def prose(path):
    """(line number, text) of what people read in a file: of Python its strings and comments."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".py"):
        yield from enumerate(text.splitlines(), 1)
        return
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in kinds or KEY.fullmatch(token.string):
            continue
        string = REPLACED.sub("", token.string) if token.string[:2].lower().startswith(("f", "rf")) else token.string
        yield from enumerate(string.splitlines(), token.start[0])


@pytest.mark.parametrize("path", PAGES)
def test_no_unclear_words(path):
    hits = [
        f"{path}:{number}: {name}: {line.strip()}"
        for number, line in prose(path)
        for name, pattern in UNCLEAR.items()
        if re.search(pattern, ALLOWED.sub("", line), re.I)
    ]
    assert not hits, "\n".join(hits)


def test_a_word_in_a_docstring_is_found(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text('"""The whole box.\n\nIt is mended."""\nwhole = 1  # of the whole image\n')
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    with pytest.raises(AssertionError, match=r"a.py:1: whole[^\n]*\n\s*a.py:3: mend[^\n]*"):
        test_no_unclear_words("a.py")
