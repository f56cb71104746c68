"""Convert a published detector of Detic, CoDet or VLDet to a checkpoint that needs no data set and no CLIP.

The default words come from the file itself: its text classifier holds the embeddings of the classes that it detects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ovdet2.data.datasets.lvis_split import frequency_split
from ovdet2.data.datasets.splits import OV_COCO
from ovdet2.errors import DataError
from ovdet2.methods.detic.import_weights import import_weights, trained_words
from ovdet2.modeling import OpenVocabularyRCNN
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vocabulary import Vocabulary, manifest_bytes
from ovdet2.vocabulary.templates import clean_name
from ovdet2.vocabulary.word_lists import WordList, named_words

_BUFFERS = ".vocabulary."  # in the names of the buffers of a word bank


def open_words(
    weights: Mapping[str, Tensor], cfg: CfgNode, *, words: str, boxes: Sequence[str], columns: int | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint from a published file.

    Args:
        weights: official name to tensor.
        cfg: configuration of the detector. Its teacher is not loaded: its name is recorded as that of the embeddings.
        words: the default words, see :func:`class_list`. The file's table has a column for each, in that order.
        boxes: lists of :func:`class_list` whose classes had boxes in training.
        columns: number of words of the table, if it has more than the default words: those are its first ones. The
            tables of ImageNet-21k have 22,047, of which LVIS's classes are the first 1,203.

    Returns:
        dict of name to tensor: the detector's weights, and its word bank with the default words.

    Raises:
        DataError: the file is of another detector, or of other words.
    """
    vocabulary = default_words(weights, cfg, class_list(words), boxes, columns)
    detector = skeleton(cfg, vocabulary)
    imported = import_weights(weights, {name: value for name, value in detector.items() if _BUFFERS not in name})
    prefix = next(name for name in detector if _BUFFERS in name).rpartition(".")[0]
    known = set(map(clean_name, vocabulary.names))
    further = {name for name in _names_with_boxes(boxes) if name not in known}
    return imported | {
        f"{prefix}.embeddings": vocabulary.embeddings,
        f"{prefix}.base_mask": vocabulary.base_mask,
        f"{prefix}.manifest": manifest_bytes(vocabulary, further),
    }


def skeleton(cfg: CfgNode, vocabulary: Vocabulary) -> dict[str, Tensor]:
    """The state dict of a detector without storage; only the buffers of its word bank have values."""
    with torch.device("meta"):
        return OpenVocabularyRCNN(cfg, vocabulary=vocabulary).state_dict()


def default_words(
    weights: Mapping[str, Tensor], cfg: CfgNode, words: WordList, boxes: Sequence[str], columns: int | None = None
) -> Vocabulary:
    """The default words with the embeddings of the file; for arguments and errors see :func:`open_words`."""
    table = trained_words(weights)[0]
    expected = columns or len(words.names)
    if len(table) != expected:
        raise DataError(
            f"the file has a table of {len(table)} words, but {expected} are expected: it is of another training."
        )
    trained = _names_with_boxes(boxes)
    return Vocabulary.from_table(
        words.names,
        table[: len(words.names)].numpy(),
        Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED),
        cfg.MODEL.VOCABULARY.TEMPLATES,
        [clean_name(name) in trained for name in words.names],
        words.category_ids,
    )


def class_list(name: str) -> WordList:
    """A list of classes by ascending category id.

    Args:
        name: one of :data:`~ovdet2.vocabulary.word_lists.NAMED`; "lvis_base", the 866 classes of LVIS that are not
            rare; "ov_coco" and "ov_coco_base", the 65 classes of OV-COCO and its 48 base classes.
    """
    if name == "lvis_base":
        from detectron2.data.datasets.lvis_v1_categories import LVIS_CATEGORIES

        pairs = frequency_split(LVIS_CATEGORIES, "Detectron2's list of LVIS").base
    elif name in ("ov_coco", "ov_coco_base"):
        pairs = OV_COCO.base if name == "ov_coco_base" else (*OV_COCO.base, *OV_COCO.novel)
    else:
        return named_words(name)
    ids, names = zip(*sorted(pairs))
    return WordList(names, ids)


def _names_with_boxes(lists: Sequence[str]) -> set[str]:
    return {clean_name(name) for boxes in lists for name in class_list(boxes).names}
