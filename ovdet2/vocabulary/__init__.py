"""Words and their text embeddings: the vocabulary, its bank in a model, word lists, prompt templates."""

from ovdet2.vocabulary.table import (
    SCHEMA,
    Vocabulary,
    averaged_names,
    check_words,
    from_buffers,
    further_trained_names,
    manifest_bytes,
    parse_words,
    repeated_words,
)

__all__ = [
    "SCHEMA",
    "Vocabulary",
    "averaged_names",
    "check_words",
    "from_buffers",
    "further_trained_names",
    "manifest_bytes",
    "parse_words",
    "repeated_words",
]
