"""Words and their text embeddings: the vocabulary, its bank in a model, word lists, prompt templates."""

from ovdet2.vocabulary.table import (
    POOLINGS,
    SCHEMA,
    Vocabulary,
    averaged_names,
    check_words,
    from_buffers,
    further_trained_names,
    manifest_bytes,
    repeated_words,
)
from ovdet2.vocabulary.word_lists import WordList, parse_words, read_words

__all__ = [
    "POOLINGS",
    "SCHEMA",
    "Vocabulary",
    "WordList",
    "averaged_names",
    "check_words",
    "from_buffers",
    "further_trained_names",
    "manifest_bytes",
    "parse_words",
    "read_words",
    "repeated_words",
]
