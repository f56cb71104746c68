"""The tokenizer of a teacher, and whether its prompts fit the context.

A tokenizer cuts a longer prompt without a word: two long names that begin alike would have the same embedding.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from ovdet2.errors import DataError, SetupError, UsageError

_ANSWER_SECONDS = 10.0  # in which the hub must answer
_SPECIAL_TOKENS = 4  # at most so many tokens are added to a prompt


def load_tokenizer(architecture: str) -> Any:
    """The tokenizer of an open_clip architecture.

    Returns:
        callable, list of N strings -> token ids [N, T].

    Raises:
        DataError: its files are not on this machine and cannot be downloaded.
        SetupError: it needs a library that is not installed.
    """
    import open_clip

    text = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
    name = text.get("hf_tokenizer_name")
    try:
        if not name:
            return open_clip.get_tokenizer(architecture)
        try:
            return open_clip.get_tokenizer(architecture, local_files_only=True)
        except (OSError, ValueError):  # not among the downloaded files
            _require_hub(architecture, name)
            return open_clip.get_tokenizer(architecture)
    except ImportError as error:
        raise SetupError(
            f"the tokenizer of {architecture} needs a library that is not installed ({error}): install it with pip."
        ) from None
    except DataError:
        raise
    except Exception as error:  # open_clip, transformers and the hub client raise many kinds here
        raise _missing(architecture, name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def _require_hub(architecture, name):
    """Ask the hub once: without a network, its client tries each of a dozen files several times."""
    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_ANSWER_SECONDS):
            return
    except urllib.error.HTTPError:
        return  # an answer, whatever it is
    except OSError as error:
        raise _missing(architecture, name, f"{constants.ENDPOINT} does not answer: {error}") from None


def _missing(architecture, name, reason):
    return DataError(
        f"the tokenizer {name or 'of SigLIP'} of {architecture} is not on this machine and cannot be downloaded ({reason}): "
        "run the command once with a network, or copy the folder of HF_HOME from a machine that has it."
    )


def require_fitting_prompts(tokenizer: Any, texts: Sequence[str], architecture: str) -> None:
    """Refuse prompts with more tokens than the teacher reads.

    Args:
        tokenizer: of :func:`load_tokenizer`. One without ``encode`` and ``context_length`` is called with one more
            token of context, ``tokenizer(texts, context_length=T + 1)``.
        texts: N prompts.
        architecture: for the message.

    Raises:
        UsageError: a prompt is too long; the message names it.
    """
    length = tokenizer.context_length
    # A token has at least one byte, so that most prompts need not be counted.
    long = [text for text in texts if len(text.encode()) + _SPECIAL_TOKENS > length]
    encode = getattr(tokenizer, "encode", None)
    for text in long:
        if encode is not None:
            limit = length - 2  # start and end tokens
            fits = len(encode(text)) <= limit
        else:
            limit, fits = length, _fits(tokenizer, text, length)
        if not fits:
            raise UsageError(
                f"the prompt {text[:80]!r}... has more than the {limit} tokens that {architecture} reads: "
                "shorten the name or choose a template set with shorter prompts."
            )


def _fits(tokenizer, text, length):
    """Whether one more place is filled with padding, which is what an empty text has most of."""
    empty = tokenizer([""], context_length=length)[0].tolist()
    padding = max(set(empty), key=empty.count)
    tokens, more = (tokenizer([text], context_length=places)[0].tolist() for places in (length, length + 1))
    return sorted([*tokens, padding]) == sorted(more)
