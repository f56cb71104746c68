"""The declared setting of an evaluation: what the training saw, so that its figures can be compared with others.

Each entry is a text; "none" states that nothing of that kind was used, "unknown" that it is not known. Nothing is guessed:
an entry comes from the configuration, from the record of a published detector, or from the user.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ovdet2.errors import UsageError, did_you_mean

UNKNOWN, NONE = "unknown", "none"
ANSWERS = ("yes", "no", UNKNOWN)
LETTERS = {
    "V": "a vision-language model was used",
    "G": "the novel names were known in training",
    "W": "image labels or captions were used",
}
_TITLES = {
    "boxes": "boxes",
    "image_labels": "image labels",
    "captions": "captions",
    "novel_names": "novel names used in training",
    "teacher": "teacher",
    "teacher_data": "data of the teacher",
}


@dataclass(frozen=True)
class Setting:
    """What the training of a detector had seen.

    Attributes:
        boxes: data sets and classes whose boxes were used.
        image_labels, captions: data sets with labels of images and with captions that were used.
        novel_names: "yes", "no" or "unknown": whether the names of the novel classes of the evaluation were used.
        teacher: the vision-language model.
        teacher_data: what the teacher was trained on.
        stated: letters of :data:`LETTERS` stated by the user, "" for none of them; None: they follow from the entries.
        stated_by: where the entries come from.
    """

    boxes: str = UNKNOWN
    image_labels: str = UNKNOWN
    captions: str = UNKNOWN
    novel_names: str = UNKNOWN
    teacher: str = UNKNOWN
    teacher_data: str = UNKNOWN
    stated: str | None = None
    stated_by: str = ""

    @property
    def letters(self) -> str:
        """The letters that hold, each unknown one with a question mark: "V", "VW", "VG?W?"; "none"; "unknown"."""
        holds = self._holds()
        if all(value is None for value in holds.values()):
            return UNKNOWN
        marks = {True: "", None: "?"}
        return "".join(letter + marks[value] for letter, value in holds.items() if value is not False) or NONE

    def _holds(self):
        """{letter: True, False, or None for unknown}."""
        if self.stated is not None:
            return {letter: letter in self.stated for letter in LETTERS}
        weak = [_used(self.image_labels), _used(self.captions)]
        return {
            "V": _used(self.teacher),
            "G": {"yes": True, "no": False}.get(self.novel_names),
            "W": True if True in weak else None if None in weak else False,
        }

    def to_report(self) -> dict[str, str]:
        """The entry "setting" of report.json."""
        return {"letters": self.letters} | {name: getattr(self, name) for name in (*_TITLES, "stated_by")}

    def changed(self, entries: Mapping[str, str], letters: str | None = None, by: str = "") -> Setting:
        """The setting with entries of the user.

        Args:
            entries: {name: text}; empty texts are skipped.
            letters: all letters that hold, such as "VW", or "none"; entries that are unknown become what the letters
                imply, entries that are known must agree.
            by: who states them, for "stated_by".

        Raises:
            UsageError: an unknown name or letter, another answer than :data:`ANSWERS`, or a contradiction.
        """
        entries = {name: text for name, text in entries.items() if text}
        for name in entries:
            if name not in _TITLES:
                raise UsageError(f"the setting has no {name!r}{did_you_mean(name, _TITLES)}: use {', '.join(_TITLES)}.")
        answer = entries.get("novel_names", UNKNOWN)
        if answer not in ANSWERS:
            raise UsageError(f"novel_names is {answer!r}: give one of {', '.join(ANSWERS)}.")
        if not entries and letters is None:
            return self
        made = replace(self, **entries, stated_by=", ".join(filter(None, (self.stated_by, by))))
        return made if letters is None else made._with_letters(letters)

    def _with_letters(self, letters):
        given = "" if letters == NONE else letters
        if not set(given) <= set(LETTERS) or len(set(given)) < len(given) or letters == "":
            raise UsageError(
                f"the setting {letters!r} has other letters than {', '.join(LETTERS)}: give such as VW, or none."
            )
        for letter, value in self._holds().items():
            if value is not None and value is not (letter in given):
                raise UsageError(
                    f"the setting {letters!r} contradicts its entries: {LETTERS[letter]} is {'' if value else 'not '}what "
                    "they state. Change one of them."
                )
        implied = {}
        if "V" not in given:
            implied |= {"teacher": NONE, "teacher_data": NONE}
        if "W" not in given:
            implied |= {"image_labels": NONE, "captions": NONE}
        implied["novel_names"] = "yes" if "G" in given else "no"
        made = replace(self, **{name: text for name, text in implied.items() if getattr(self, name) == UNKNOWN})
        return replace(made, stated="".join(letter for letter in LETTERS if letter in given))


def read_setting(report: Mapping[str, Any]) -> dict[str, str]:
    """The entry "setting" of a report; everything is unknown in reports of earlier versions."""
    return {**Setting().to_report(), **(report.get("setting") or {})}


def setting_rows(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(title, text) of the setting of a report, the letters with their meaning first."""
    stated = read_setting(report)
    rows = [("setting", f"{stated['letters']}: {meaning(stated['letters'])}")]
    rows += [(title, stated[name]) for name, title in _TITLES.items()]
    return rows + ([("stated by", stated["stated_by"])] if stated["stated_by"] else [])


def meaning(letters: str) -> str:
    """The meaning of :attr:`Setting.letters` in words."""
    if letters == UNKNOWN:
        return "what the training saw is not known"
    if letters == NONE:
        return "boxes of base classes only"
    known = [text for letter, text in LETTERS.items() if letter in letters and f"{letter}?" not in letters]
    open_ = [text for letter, text in LETTERS.items() if f"{letter}?" in letters]
    return "; ".join([*known, *(f"not known: whether {text}" for text in open_)])


def add_setting_options(parser: ArgumentParser) -> None:
    """Add --setting and --seen, the user's statement of a setting."""
    parser.add_argument(
        "--setting",
        metavar="LETTERS",
        help="all letters that hold: V a vision-language model, G novel names known in training, W image labels or "
        "captions; such as V or VW; none (default: unknown)",
    )
    parser.add_argument(
        "--seen",
        nargs="+",
        default=[],
        metavar="NAME=TEXT",
        help=f"what the training saw: {', '.join(_TITLES)}; such as boxes='Objects365' captions=none novel_names=no",
    )


def stated_setting(letters: str | None, seen: Iterable[str], start: Setting | None = None) -> Setting:
    """The setting of the options of :func:`add_setting_options`; what they do not state is that of ``start``, or
    unknown without one.

    Raises:
        UsageError: see :meth:`Setting.changed`; or a text without "=".
    """
    pairs: Sequence[tuple[str, str, str]] = [text.partition("=") for text in seen]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--seen {name!r} has no '=': give such as boxes='Objects365' or novel_names=no.")
    return (start or Setting()).changed({name: text for name, _, text in pairs}, letters, "the command line")


def _used(text):
    """Whether an entry states that something was used; None: unknown. Labels that only the trunk saw do not count."""
    if text.endswith("(trunk)") and ("," not in text and ";" not in text):
        return False
    return {NONE: False, UNKNOWN: None}.get(text, True)
