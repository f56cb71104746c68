"""Prompt template sets, and the rendering of prompts from class names.

The sets are data (``ovdet2/assets/prompts/*.json``, each with its source); "openclip80" comes from open_clip. Every
function that takes the name of a set also takes the path of a user's template file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from pathlib import Path

from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json

_PROMPTS = Path(__file__).resolve().parents[1] / "assets" / "prompts"


def template_set_names() -> list[str]:
    """Sorted names of the known template sets."""
    return sorted([path.stem for path in _PROMPTS.glob("*.json")] + ["openclip80"])


def get_templates(set_name: str | Path) -> tuple[str, ...]:
    """The templates of a set: strings with "{}" for the name and optionally "{article}".

    Args:
        set_name: one of :func:`template_set_names`, or the path of a file: ".txt" with a template per line (UTF-8, "#"
            starts a comment line), or ".json", a list or {"templates": list}.

    Raises:
        UsageError: unknown set; the message lists the known sets.
        DataError: the file is missing or damaged, holds no template, or a template without "{}".
    """
    if str(set_name).endswith((".txt", ".json")):
        path = Path(set_name)
        state = path.stat() if path.is_file() else None
        return _read_templates(path, state and (state.st_mtime_ns, state.st_size))
    return _known_templates(set_name)


@functools.cache
def _known_templates(set_name):
    if set_name == "openclip80":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    path = _PROMPTS / f"{set_name}.json"
    if not path.is_file():
        raise UsageError(
            f"unknown template set {set_name!r}; choose one of {', '.join(template_set_names())}, or give a .txt or "
            ".json file."
        )
    return tuple(json.loads(path.read_text(encoding="utf-8"))["templates"])


@functools.lru_cache(maxsize=8)  # called once per word; ``stamp`` changes when the file is edited
def _read_templates(path, stamp):
    if path.suffix == ".json":
        templates = read_json(path, "give a list of templates")
        templates = templates.get("templates") if isinstance(templates, dict) else templates
    else:
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the template file {path} cannot be read ({error}): give a UTF-8 file.") from None
        templates = [line for line in lines if line and not line.startswith("#")]
    if not templates or not isinstance(templates, list):
        raise DataError(f"{path} holds no templates: give one or more, such as 'a photo of {{article}} {{}}.'.")
    for number, template in enumerate(templates):
        if not isinstance(template, str) or "{}" not in template:
            raise DataError(f"template {number} of {path}, {template!r}, has no {{}} for the class name: add it.")
    return tuple(templates)


def set_title(set_name: str | Path) -> str:
    """Name of a template set in artefacts: its name, or the file name of a path (a hash distinguishes such files)."""
    return Path(set_name).name


def templates_sha256(set_name: str | Path) -> str:
    """Hex SHA-256 of a set's templates, which detects an edited set."""
    return hashlib.sha256("\n".join(get_templates(set_name)).encode()).hexdigest()


def clean_name(name: str) -> str:
    """ViLD's cleaning of a class name: lower case, "_" to space, "/" to " or ", no trailing full stop, single spaces.

    Text in parentheses is kept: it distinguishes LVIS's "bow (weapon)" from "bow (decorative ribbons)". Characters are
    composed (Unicode's form NFC), so that two spellings of the same letter are the same word.
    """
    name = unicodedata.normalize("NFC", name).replace("_", " ").replace("/", " or ").lower()
    return " ".join(name.split()).rstrip(".").rstrip()


def is_visible(name: str) -> bool:
    """Whether a name has a character that is seen: not only spaces, control characters and joiners of width zero."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in name)


def article(name: str) -> str:
    """ "an" before a, e, i, o, u, else "a": ViLD's rule uses the letter, not the sound ("a hour", "an unicorn")."""
    return "an" if name[:1] in "aeiou" and name else "a"


def render(name: str, set_name: str | Path) -> list[str]:
    """All prompts of a template set for one class name.

    In ViLD's set "This is " is prepended to a prompt that begins with "a" or "the", as in its official demo.

    Args:
        name: class name as in the data set; cleaned here.
        set_name: a template set or file.

    Returns:
        One prompt per template.
    """
    cleaned = clean_name(name)
    texts = [
        template.replace("{article}", article(cleaned)).replace("{}", cleaned) for template in get_templates(set_name)
    ]
    if set_name == "vild63":
        texts = ["This is " + text if text.startswith(("a", "the")) else text for text in texts]
    return texts
