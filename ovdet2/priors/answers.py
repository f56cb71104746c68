"""Answers of a vision-language model to "does this word exist in this image": parse them, and store them on disk.

Answers are stored in a folder of JSON-lines files. The first line of a file states model and prompt. Each process
appends to a separate file, and reads the complete lines of all files with its model and prompt. A killed process loses
no answer; only its last line may be incomplete, and that question is asked again. An answer that is neither yes nor no
is not stored: the next run, perhaps with a corrected server, asks again.
"""

import io
import json
import logging
import math
import os
import re
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ovdet2.errors import DataError

logger = logging.getLogger(__name__)

SCHEMA = "ovdet2/answers/1"
_LEADING = re.compile(r"^\W*(?:(?:the )?answer(?: is)?\W+)?(yes|no)\b", re.IGNORECASE)
_THINKING = "(?:think|thinking|thought|reasoning)"  # tags around what a model writes before its answer
_OPENED, _CLOSED = re.compile(rf"\s*<{_THINKING}>", re.I), re.compile(rf"</{_THINKING}>", re.I)
_PICTURES = r"(?:images?|pictures?|photos?|attachments?)\b(?! (?:in|on) (?:the|this) (?:image|picture|photo))"
# Answers of a model that received no image: "No, I cannot see any image".
_BLIND = re.compile(
    r"\b(?:can'?t|can ?not|could ?n[o']t|unable to|not able to|(?:do|does|did)(?: not|n't)) (?:\w+ly )?"
    r"(?:see|view|access|open|process|analy[sz]e|have|receive|find|look at|interpret) "
    rf"(?:any |an? |the |your |this |that |access to )*{_PICTURES}"
    r"|\bno (?:image|picture|photo)s? (?:was|is|were|are|has been|have been|attached|provided|uploaded|shared|given|to)\b"
    r"|\btext[- ](?:based|only) (?:ai|assistant|model|language model)\b",
    re.I,
)
_MARKS = " \t\n▁Ġ.,!:*\"'"  # what tokenizers and chat models put around a word


class Answer(NamedTuple):
    """Attributes:
    yes: probability of "yes" in [0, 1], or None if the text is neither yes nor no.
    text: text of the model; "" if only its probabilities were read.
    """

    yes: float | None
    text: str


def parse_answer(text: str) -> float | None:
    """1.0 for a text that begins with yes, 0.0 for no, otherwise None. "Answer: No." counts as no.

    What a model thinks before it answers, "<think> ... </think>", is skipped. The answer of a model that received no image
    ("No, I cannot see any image") is None.
    """
    match = None if is_blind(text) else _LEADING.match(without_thinking(text))
    return None if match is None else float(match[1].lower() == "yes")


def without_thinking(text: str) -> str:
    """The text after its last closing tag of thinking; "" if the thinking does not end."""
    *_, answer = _CLOSED.split(text)
    return "" if _OPENED.match(answer) else answer


def is_blind(text: str) -> bool:
    """Whether a model states that it received no image, or that it cannot read images."""
    return _BLIND.search(without_thinking(text).replace("\u2019", "'")) is not None


def yes_or_no(token: str) -> str | None:
    """ "yes" or "no" for a token that spells it (any case, tokenizer marks around it are ignored); otherwise None."""
    bare = token.strip(_MARKS).lower()
    return bare if bare in ("yes", "no") else None


def yes_probability(positions: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> float | None:
    """P(yes) at the first token with a letter, renormalised over the alternatives that spell yes or no.

    Tokens of thinking ("<think> ... </think>") are skipped.

    Args:
        positions: for each generated token, (token, [(alternative, log probability), ...]); the alternatives are the
            likeliest tokens at its position, itself included.

    Returns:
        float in [0, 1], or None if that token spells neither.
    """
    for token, alternatives in _after_thinking(positions):
        if not any(character.isalpha() for character in token.strip(_MARKS)):
            continue
        if yes_or_no(token) is None:
            return None
        mass = {"yes": 0.0, "no": 0.0}
        for alternative, log_probability in alternatives:
            spelled = yes_or_no(alternative)
            if spelled:
                mass[spelled] += math.exp(min(log_probability, 0.0))
        total = mass["yes"] + mass["no"]
        return mass["yes"] / total if total > 0 else None
    return None


def _after_thinking(positions):
    """The positions after the last closing tag, which may be written in several tokens."""
    written, start = "", 0
    for number, (token, _) in enumerate(positions, 1):
        written += token
        if _CLOSED.search(written):
            written, start = "", number
    return positions[start:]


class AnswerBook:
    """The answers of one model to one prompt, by SHA-256 of the image file and word. Safe to add to from threads."""

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        """
        Args:
            folder: of the files; created with the first answer.
            identity: JSON-serialisable dict of the inputs of an answer besides image and word: model, prompt, settings.

        Raises:
            DataError: a file cannot be read.
        """
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity))
        self.damaged = 0  # lines that are no answer
        self._answers = {}  # image SHA-256 -> {word: Answer}
        self._lock = threading.Lock()
        self._file: io.FileIO | None = None
        for path in sorted(self.folder.glob("*.jsonl")):
            self._read(path)
        if self.damaged > 0:
            logger.warning("%s: %d lines are damaged; their questions are asked again", folder, self.damaged)

    def get(self, image_sha256: str, word: str) -> Answer | None:
        """The stored :class:`Answer`, or None."""
        return self._answers.get(image_sha256, {}).get(word)

    def add(self, image_sha256: str, word: str, answer: Answer) -> None:
        """Store an answer; on return it has been passed to the operating system.

        An answer that is neither yes nor no is kept in memory only.
        """
        line = {"image": image_sha256, "word": word, "yes": answer.yes, "text": answer.text}
        with self._lock:
            if answer.yes is not None:
                if self._file is None:
                    self._file = self._begin()
                self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            self._answers.setdefault(image_sha256, {})[word] = answer

    def close(self) -> None:
        """Flush added answers to the disk, and close the file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _begin(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = open(self.folder / f"answers-{uuid.uuid4().hex[:12]}.jsonl", "xb", buffering=0)
        handle.write(json.dumps({"schema": SCHEMA, "identity": self.identity}, ensure_ascii=False).encode() + b"\n")
        return handle

    def _read(self, path):
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): repair or remove it.") from None
        if lines.pop():
            self.damaged += 1  # incomplete: a complete line ends in a newline
        header = _as_dict(lines[0]) if lines else {}
        if header.get("schema") != SCHEMA or header.get("identity") != self.identity:
            return
        for line in lines[1:]:
            entry = _as_dict(line)
            image, word, yes, text = (entry.get(key) for key in ("image", "word", "yes", "text"))
            is_probability = yes is None or (type(yes) in (int, float) and 0 <= yes <= 1)
            if not (isinstance(image, str) and isinstance(word, str) and isinstance(text, str) and is_probability):
                self.damaged += 1
            elif yes is not None:  # earlier versions stored the others, too
                self._answers.setdefault(image, {})[word] = Answer(yes, text)


def _as_dict(line):
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
