"""Lists of words with their ids and synonyms: of public data sets by name, of any COCO json, of a user's file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json
from ovdet2.vocabulary import parse_words

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "words"
NAMED = ("coco", "lvis", "objects365_v1", "objects365_v2", "openimages", "voc")


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
        name: one of :data:`NAMED`: 80, 1203, 365, 365, 601 and 20 classes.
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


def words_of_text(text: str | Path) -> WordList:
    """Words from "cat, red mug", a ".txt" file with a word per line, or a ".json" file, optionally with synonyms.

    In a string or a text file a word's synonyms follow it after semicolons ("sofa; couch; settee"). A json file is a
    list of words or {word: [synonyms]}.

    Raises:
        DataError: the file is missing or of another format.
        UsageError: the text is an existing file of another suffix.
    """
    text = str(text)
    entries: list[tuple[Any, ...]]  # of a json file, until their types are checked
    if text.endswith(".json") and "," not in text:
        values = read_json(text, "give a list of words or {word: [synonyms]}")
        if isinstance(values, list):
            entries = [(word,) for word in values]
        elif isinstance(values, dict) and all(isinstance(names, list) for names in values.values()):
            entries = [(word, *names) for word, names in values.items()]
        else:
            entries = [(None,)]
        if not all(isinstance(name, str) for entry in entries for name in entry):
            raise DataError(f"{text} is neither a list of words nor {{word: [synonyms]}}: write it as one of them.")
    else:
        entries = [tuple(part.strip() for part in entry.split(";")) for entry in parse_words(text)]
        entries = [(first, *(name for name in others if name)) for first, *others in entries]
    synonyms = tuple(tuple(others) for _, *others in entries)
    return WordList(tuple(entry[0] for entry in entries), synonyms=synonyms if any(synonyms) else None)


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
