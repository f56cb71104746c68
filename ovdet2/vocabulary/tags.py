"""Tags: the concepts of a list whose names stand in the captions of an image."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ovdet2.errors import UsageError

RULES = ("words", "published")
_TOKEN = re.compile(r"\w+")


class TagMatcher:
    """Finds the concepts that captions name. Picklable; one pass over a caption, whatever the number of concepts.

    "words": a name is found if its words follow each other in a caption, in any case and with any punctuation or line
    break between them ("Fire-hydrant" for "fire hydrant", but not "car" in "carpet").

    "published": Detic's rule. The captions are joined by spaces and lower-cased; a name is found if it stands between
    spaces, or at the start before a space, or at the end after a space. In names "_" is a space, and text from "(" on is
    dropped. A name before a comma or a full stop is not found.

    Attributes:
        names: for each of the K concepts its name and synonyms.
        rule: one of :data:`RULES`.
    """

    def __init__(self, names: Sequence[Sequence[str]], rule: str = "words") -> None:
        """
        Args:
            names: for each concept its names, at least one.
            rule: see the class.

        Raises:
            UsageError: an unknown rule, no concept, or a name without a letter or digit.
        """
        if rule not in RULES:
            raise UsageError(f"the rule of tags is {rule!r}: choose {' or '.join(RULES)}.")
        if not names:
            raise UsageError("there are no concepts to find in captions: give a list of at least one.")
        self.names, self.rule = tuple(map(tuple, names)), rule
        self._concepts: dict[tuple[str, ...], set[int]] = defaultdict(set)
        for concept, synonyms in enumerate(self.names):
            for name in synonyms:
                key = (_plain(name),) if rule == "published" else _words(name)
                if not all(key) or not key:
                    raise UsageError(
                        f"the name {name!r} of concept {concept} has no letter or digit: correct the list."
                    )
                self._concepts[key].add(concept)
        self._lengths = sorted({len(key) for key in self._concepts})

    def __len__(self) -> int:
        return len(self.names)

    def find(self, captions: Iterable[str]) -> tuple[int, ...]:
        """Indices of the concepts that any of the captions names, ascending; empty without captions."""
        if self.rule == "published":
            return tuple(sorted(self._find_published(" ".join(captions).lower())))
        found: set[int] = set()
        for caption in captions:
            words = _words(caption)
            for length in self._lengths:
                for first in range(len(words) - length + 1):
                    found |= self._concepts.get(words[first : first + length], set())
        return tuple(sorted(found))

    def _find_published(self, text):
        for (name,), concepts in self._concepts.items():
            if f" {name} " in text or text.startswith(f"{name} ") or text.endswith(f" {name}"):
                yield from concepts


def _words(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(unicodedata.normalize("NFC", text).replace("_", " ").casefold()))


def _plain(name: str) -> str:
    return name.replace("_", " ").partition("(")[0].strip().lower()
