"""The class names of a registered data set as a word list."""

from __future__ import annotations

from detectron2.data import MetadataCatalog

from ovdet2.data.datasets.register import split_of
from ovdet2.errors import UsageError
from ovdet2.vocabulary.word_lists import WordList, words_of_json


def words_of_dataset(name: str, with_synonyms: bool = False) -> WordList:
    """The classes of a registered data set in the order of its split, base first.

    Args:
        name: a data set of Detectron2's catalog with a base/novel split.
        with_synonyms: read synonyms from its annotation json.

    Raises:
        UsageError: no such data set.
        DataError: the json is needed and missing.
    """
    split = split_of(name)
    if split is None:
        raise UsageError(f"{name!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    synonyms = None
    if with_synonyms:
        described = words_of_json(MetadataCatalog.get(name).ov_files()[0])
        if described.synonyms is not None:
            assert described.category_ids is not None  # of a json
            known = dict(zip(described.category_ids, described.synonyms))
            synonyms = tuple(known.get(category_id, ()) for category_id in split.category_ids)
    return WordList(split.names, split.category_ids, synonyms, split.base_mask)
