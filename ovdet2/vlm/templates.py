"""Prompt template sets and how a class name is put into them.

The sets are data (``ovdet2/assets/prompts/*.json``, each naming its source); "openclip80" comes from open_clip itself.
"""

import functools
import hashlib
import json
from pathlib import Path

from ovdet2.errors import UsageError

_PROMPTS = Path(__file__).resolve().parent.parent / "assets" / "prompts"


def template_set_names():
    """Sorted names of the known template sets."""
    return sorted([path.stem for path in _PROMPTS.glob("*.json")] + ["openclip80"])


@functools.cache
def get_templates(set_name):
    """The templates of a set: a tuple of strings with "{}" for the name and optionally "{article}".

    Raises:
        UsageError: unknown set; the message lists the known ones.
    """
    if set_name == "openclip80":
        from open_clip import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    path = _PROMPTS / f"{set_name}.json"
    if not path.is_file():
        raise UsageError(f"unknown template set {set_name!r}; choose one of {', '.join(template_set_names())}.")
    return tuple(json.loads(path.read_text(encoding="utf-8"))["templates"])


def templates_sha256(set_name):
    """Hex SHA-256 of a set's templates, so that an edited set is seen as another one."""
    return hashlib.sha256("\n".join(get_templates(set_name)).encode()).hexdigest()


def clean_name(name):
    """ViLD's cleaning of a class name: lower case, "_" to space, "/" to " or ", no trailing full stop, single spaces.

    Text in parentheses is kept: LVIS tells "bow (weapon)" from "bow (decorative ribbons)" by it.
    """
    name = name.replace("_", " ").replace("/", " or ").lower()
    return " ".join(name.split()).rstrip(".").rstrip()


def article(name):
    """ "an" before a, e, i, o, u, else "a": ViLD's rule goes by the letter, not the sound ("a hour", "an unicorn")."""
    return "an" if name[:1] in "aeiou" and name else "a"


def render(name, set_name):
    """All prompts of a set for one class name.

    In ViLD's set a text that begins with "a" or "the" gets "This is " in front, as in its official demo.

    Args:
        name: class name as in the data set; cleaned here.
        set_name: a template set.

    Returns:
        list of strings, one per template.
    """
    cleaned = clean_name(name)
    texts = [
        template.replace("{article}", article(cleaned)).replace("{}", cleaned) for template in get_templates(set_name)
    ]
    if set_name == "vild63":
        texts = ["This is " + text if text.startswith(("a", "the")) else text for text in texts]
    return texts
