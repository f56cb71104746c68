"""Lists of words with their ids and synonyms: of public data sets by name, of any COCO json, of a user's file."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "words"
NAMED = ("coco", "lvis", "objects365_v1", "objects365_v2", "openimages", "openimages_challenge", "voc")
_SUFFIXES = (".txt", ".json")  # of word lists
# Between words in the prompts of other detectors, and in text of other keyboards.
_OTHER_MARKS = (" . ", "|", ";", "\uff0c", "\u3001", "\uff1b", "\n", "\t", ",")

_SENTENCES = re.compile(r"\w{3,}\. \S.*\.\s*$")  # "person. dog." but not "st. bernard" or "Mt. Fuji."
Words = str | Path | Iterable[str] | Mapping[str, Iterable[str]]


@dataclass(frozen=True)
class WordList:
    """K words before they are embedded.

    Attributes:
        names: K class names, spelt as in their source.
        category_ids: K ids of the data set (integers; Open Images: strings such as "/m/01yrx"), or None.
        synonyms: K tuples of further names of the class, which may be empty; None: the source has no synonyms.
        base_mask: K booleans, or None.
    """

    names: tuple[str, ...]
    category_ids: tuple[int | str, ...] | None = None
    synonyms: tuple[tuple[str, ...], ...] | None = None
    base_mask: tuple[bool, ...] | None = None


def named_words(name: str, corrected: bool = False) -> WordList:
    """The classes of a public data set, by ascending id (Open Images: in the order of its class list).

    COCO and LVIS v1 (with synonyms) come from Detectron2, the others from
    ``ovdet2/assets/words``, where each file names its source.

    Args:
        name: one of :data:`NAMED`: 80, 1203, 365, 365, 601, 500 and 20 classes.
        corrected: correct the spelling mistakes in the names of a data set (objects365_v2 has 16).

    Raises:
        UsageError: an unknown name, or no corrections are known for it.
    """
    if name not in NAMED:
        raise UsageError(f"there are no words named {name!r}: choose one of {', '.join(NAMED)}.")
    if name in ("coco", "lvis"):
        words, corrections = _from_libraries(name), {}
    else:
        data = json.loads((_ASSETS / f"{name}.json").read_text(encoding="utf-8"))
        ids, names = zip(*data["words"])
        words, corrections = WordList(names, ids), data.get("corrections", {})
    if not corrected:
        return words
    if not corrections:
        raise UsageError(f"no spelling corrections are known for {name!r}: use its names without corrections.")
    assert words.category_ids is not None  # only word lists of text files have none
    pairs = zip(words.category_ids, words.names)
    return WordList(tuple(corrections.get(str(number), name) for number, name in pairs), words.category_ids)


def words_of_json(path: str | Path) -> WordList:
    """The categories of a COCO or LVIS json by ascending id, with LVIS's synonyms.

    Raises:
        DataError: the file is missing or damaged, or has no categories with id and name.
    """
    data = read_json(path)
    categories = data.get("categories") if isinstance(data, dict) else None
    if not categories or not all("id" in category and "name" in category for category in categories):
        raise DataError(f"{path} has no categories with id and name: give a COCO or LVIS annotation file.")
    return _of_categories(categories)


def read_words(words: Words) -> WordList:
    """The user's words with their synonyms, from text, a file or Python objects.

    Args:
        words: one of

            - "cat, sofa; couch": words between commas or line breaks, each followed by its synonyms after semicolons;
            - the path of a ".txt" file (UTF-8) with a word per line and the same semicolons; "#" starts a comment;
            - the path of a ".json" file: a list of words, or {word: [synonyms]};
            - a list of words, or a dict {word: [synonyms]}; their text is not split.

    Raises:
        DataError: the file is missing or of another format.
        UsageError: the text is an existing file of another suffix, an entry is no text or has control characters, a single
            word looks like several ("cat . dog"), or the text is a list as code writes it ('["cat"]').
    """
    if isinstance(words, Path) or (isinstance(words, str) and _names_file(words)):
        return _words_of_file(Path(words))
    if isinstance(words, str):
        _refuse_code(words.strip())
        entries = _split(words.replace(",", "\n"))
    else:
        entries = _entries_of(words, "the list of words")
    if len(entries) == 1:
        remedy = "separate words by commas" if isinstance(words, str) else "give each word as an entry of the list"
        _refuse_joined(entries[0][0], remedy)
    return _word_list(entries)


def other_names_of_ov_shapes() -> WordList:
    """The classes of OV-Shapes with four other names each, as the head of the file describes them."""
    return _words_of_file(_ASSETS / "ov_shapes_other_names.txt")


def parse_words(words: str | Path | Iterable[str]) -> list[str]:
    """The names of :func:`read_words`, where synonyms have no meaning.

    Raises:
        DataError, UsageError: as :func:`read_words`, or a word has synonyms.
    """
    parsed = read_words(words)
    for name, synonyms in zip(parsed.names, parsed.synonyms or ()):
        if synonyms:
            raise UsageError(
                f"{name!r} has the synonym {synonyms[0]!r}, but synonyms are not used here: give one name per word."
            )
    return list(parsed.names)


def _names_file(text: str) -> bool:
    """Whether a string is the path of a word list rather than words."""
    if "\n" in text or "\0" in text or (_suffix(text) not in _SUFFIXES and "," in text):
        return False
    if _suffix(text) in _SUFFIXES:
        return "," not in text or os.path.isfile(text)  # isfile: no error for a text too long for a path
    if os.path.isfile(text):
        raise UsageError(
            f"{text} is a file, not a word: words are read from a .txt file, one per line, or a .json file. If a word "
            "has this name, add a comma."
        )
    return False


def _suffix(path: str | Path) -> str:
    """The suffix of a file name in lower case."""
    return Path(path).suffix.lower()


def _words_of_file(path: Path) -> WordList:
    if _suffix(path) == ".json":
        return _word_list(
            _entries_of(read_json(path, "give a list of words or {word: [synonyms]}"), str(path), DataError)
        )
    if _suffix(path) != ".txt":
        raise UsageError(f"{path} is no word list: give a .txt file with a word per line, or a .json file.")
    if not path.is_file():
        raise DataError(f"the word list {path} does not exist: check the path.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the word list {path} cannot be read ({error}): give a UTF-8 file, one word per line."
        ) from None
    return _word_list(_split("\n".join(line.split("#")[0] for line in lines)))


def _split(text: str) -> list[tuple[str, ...]]:
    """A tuple of names for each line that is not empty: the word and its synonyms."""
    entries = [[part.strip() for part in line.split(";")] for line in text.splitlines() if line.strip()]
    return [(first, *(name for name in others if name)) for first, *others in entries]


def _entries_of(values: Any, source: str, kind: type[DataError | UsageError] = UsageError) -> list[tuple[str, ...]]:
    """Tuples (word, synonyms ...) of a list of words or a dict {word: [synonyms]}."""
    form = "give a list of words or {word: [synonyms]}"
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise kind(f"{source} holds {values!r}: {form}.")
    entries: list[tuple[str, ...]] = []
    for word in values:
        names = values[word] if isinstance(values, Mapping) else ()
        for name in (word, names) if isinstance(names, str) or not isinstance(names, Iterable) else (word, *names):
            if not isinstance(name, str) or name is names:
                where = f" as a name of {word!r}" if isinstance(values, Mapping) else ""
                raise kind(f"{source} holds {name!r}{where}: {form}.")
        entries.append((word, *names))
    return entries


def _refuse_joined(word: str, remedy: str) -> None:
    """Refuse a single word that seems to be several, joined as in the prompts of other programs."""
    mark = next((mark for mark in _OTHER_MARKS if mark in word.strip()), None)
    if mark is None and _SENTENCES.search(word):
        mark = "."
    if mark is not None:
        raise UsageError(f"{word!r} seems to be several words, joined by {mark.strip(' ')!r}: {remedy}.")


def _refuse_code(text: str) -> None:
    """Refuse a text that is a list or words in quotation marks, as code or a shell would write them."""
    words = [word.strip() for word in text.split(",")]
    quoted = all(len(word) > 2 and word[0] == word[-1] and word[0] in "'\"" for word in words)
    if quoted or (text[:1], text[-1:]) in (("[", "]"), ("{", "}")):
        raise UsageError(
            f"{text[:80]!r} is written as code: give the words without brackets and quotation marks, separated by commas."
        )


def _word_list(entries: Sequence[tuple[str, ...]]) -> WordList:
    entries = [tuple(unicodedata.normalize("NFC", name) for name in entry) for entry in entries]
    for name in (name for entry in entries for name in entry):
        odd = next((char for char in name if unicodedata.category(char) in ("Cc", "Cs") and not char.isspace()), None)
        if odd is not None:
            raise UsageError(
                f"the word {name[:80]!r} has the character U+{ord(odd):04X}, which is no text: correct it."
            )
    synonyms = tuple(others for _, *others in entries)
    synonyms = tuple(map(tuple, synonyms)) if any(synonyms) else None
    return WordList(tuple(entry[0] for entry in entries), synonyms=synonyms)


def _from_libraries(name):
    if name == "coco":
        from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

        return _of_categories([category for category in COCO_CATEGORIES if category["isthing"]])
    from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

    return _of_categories(LVIS_CATEGORIES)


def _of_categories(categories):
    ordered = sorted(categories, key=lambda category: category["id"])
    synonyms = None
    if any("synonyms" in category for category in ordered):
        synonyms = tuple(
            tuple(other for other in category.get("synonyms", ()) if other != category["name"]) for category in ordered
        )
    return WordList(
        tuple(category["name"] for category in ordered), tuple(category["id"] for category in ordered), synonyms
    )
