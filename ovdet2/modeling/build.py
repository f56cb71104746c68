"""Build what all detectors share from a configuration: teacher, vocabulary, word bank, classifier."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor

from ovdet2.config import methods_of
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.splits import distractors
from ovdet2.data.samples import BOXES
from ovdet2.data.source_spec import kind_of, source_specs
from ovdet2.errors import DataError, UsageError
from ovdet2.layers import ClosedSetClassifier, CosineClassifier
from ovdet2.layers.cosine_classifier import RARE_BIAS
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher
from ovdet2.vlm.teacher import Teacher
from ovdet2.vocabulary import Vocabulary, read_words
from ovdet2.vocabulary.bank import WordBank
from ovdet2.vocabulary.templates import clean_name, template_set_names
from ovdet2.vocabulary.word_lists import Words

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=1)
def _load_teacher(architecture, pretrained):
    return Teacher.load(architecture, pretrained)


def build_teacher(cfg: CfgNode) -> Teacher:
    """The teacher of MODEL.TEACHER, loaded once per process, on the CPU.

    Raises:
        UsageError: no architecture is set.
    """
    if not cfg.MODEL.TEACHER.ARCHITECTURE:
        raise UsageError(
            "MODEL.TEACHER.ARCHITECTURE is empty: name an open_clip model, such as ovshapes-resnet or ViT-B-32."
        )
    return _load_teacher(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED)


def require_teacher_pixels(cfg: CfgNode, teacher: Teacher) -> None:
    """Refuse a pixel normalisation other than the teacher's: the features would be wrong without an error.

    Raises:
        UsageError: INPUT.FORMAT, MODEL.PIXEL_MEAN or MODEL.PIXEL_STD differ from the teacher's; the message gives
            the teacher's values.
    """
    expected = [(255 * values.flatten()).tolist() for values in (teacher.mean, teacher.std)]
    given = [cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD]
    same = torch.allclose(torch.tensor(expected), torch.tensor(given, dtype=torch.float32), atol=0.1)
    if cfg.INPUT.FORMAT != "RGB" or not same:
        mean, std = ([round(value, 3) for value in values] for values in expected)
        raise UsageError(
            f"{teacher.fingerprint.architecture} was trained on RGB images with MODEL.PIXEL_MEAN {mean} and PIXEL_STD "
            f"{std}: set them, and INPUT.FORMAT to RGB (now {cfg.INPUT.FORMAT}, {list(given[0])}, {list(given[1])})."
        )


def dataset_split(cfg: CfgNode) -> Split:
    """The :class:`~ovdet2.data.datasets.coco_json.Split` of the first data set with boxes: of tests, else of training.

    Raises:
        UsageError: there is no such data set, or it is registered without base and novel classes.
    """
    names = [*cfg.DATASETS.TEST, *(name for spec in source_specs(cfg) for name in spec.datasets)]
    for name in names:
        if kind_of(name) != BOXES:
            continue
        split = split_of(name)
        if split is None:
            raise UsageError(f"the data set {name!r} has no base/novel split: register it with register_ov_dataset.")
        return split
    raise UsageError(
        f"no data set with boxes among {names or 'DATASETS.TEST and DATASETS.TRAIN, which are empty'}: there are no class "
        "names to build a vocabulary from. Name one in DATASETS.TEST."
    )


def build_vocabulary(cfg: CfgNode) -> Vocabulary:
    """The vocabulary of a run: MODEL.VOCABULARY.FILE, else the data set's class names embedded by the teacher.

    The file may hold further words, in any order: base words are those of the data set, whatever the file states.
    TEST.DISTRACTORS are appended as novel words with category ids -1, -2, ...

    Raises:
        DataError: the file is of another teacher than MODEL.TEACHER, or lacks words of the data set.
        UsageError: a distractor is a class of the data set.
    """
    split, extra = dataset_split(cfg), distractors(cfg)
    names, base_mask = (*split.names, *extra), (*split.base_mask, *(False for _ in extra))
    ids = (*split.category_ids, *range(-1, -1 - len(extra), -1))
    if not cfg.MODEL.VOCABULARY.FILE:
        return Vocabulary.build(names, build_teacher(cfg), cfg.MODEL.VOCABULARY.TEMPLATES, base_mask, ids)
    path, vocabulary = cfg.MODEL.VOCABULARY.FILE, load_vocabulary(cfg, cfg.MODEL.VOCABULARY.FILE)
    known = set(map(clean_name, vocabulary.names))
    lacking = [word for word in extra if clean_name(word) not in known]
    if lacking:
        words = Vocabulary.build(lacking, build_teacher(cfg), cfg.MODEL.VOCABULARY.TEMPLATES)
        require_same_teacher(vocabulary.teacher, f"the vocabulary file {path}", words.teacher, "MODEL.TEACHER")
        vocabulary = vocabulary.joined(words)
    rows = {clean_name(name): row for row, name in enumerate(vocabulary.names)}
    missing = [name for name in names if clean_name(name) not in rows]
    if missing:
        raise DataError(
            f"{path} holds {len(vocabulary)} words ({vocabulary.num_base} base), {split.name}"
            f"{' with TEST.DISTRACTORS' if extra else ''} has {len(names)} ({sum(base_mask)} base); it lacks {len(missing)} "
            f"of them, first {missing[:3]}: rebuild it with ovdet2 vocab --dataset."
        )
    chosen = vocabulary.selected([rows[clean_name(name)] for name in names])
    # Thresholds were chosen for one detector; evaluation and training use none.
    return replace(chosen, names=names, base_mask=torch.tensor(base_mask), category_ids=ids, thresholds=None)


def load_vocabulary(cfg: CfgNode, path: str | Path) -> Vocabulary:
    """Read a vocabulary file, of any words, for a detector.

    Raises:
        DataError: the file cannot be read, or is of another teacher than MODEL.TEACHER.
    """
    vocabulary = Vocabulary.load(path)
    configured = Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED)
    require_same_teacher(
        vocabulary.teacher, f"the vocabulary file {path}", configured, "MODEL.TEACHER of the configuration"
    )
    if vocabulary.teacher.weights_sha256 is None:
        logger.warning(
            "%s is an imported table. Its teacher %s was stated at import and cannot be verified.",
            path,
            vocabulary.teacher,
        )
    return vocabulary


def words_to_vocabulary(
    cfg: CfgNode, words: Words | Vocabulary, templates: str | None = None, pooling: str | None = None
) -> Vocabulary:
    """Build a vocabulary from user-provided words; MODEL.TEACHER embeds words without embeddings.

    Args:
        cfg: configuration.
        words: "cat, red mug", a list, a dict of synonyms or a word list, see
            :func:`~ovdet2.vocabulary.read_words`; or a vocabulary file (``.safetensors``), or a :class:`Vocabulary`.
        templates: prompt template set of words to embed; default MODEL.VOCABULARY.TEMPLATES.
        pooling: how the names of a word are joined, "mean" or "max", see :meth:`Vocabulary.build`; None: "mean", or as a
            vocabulary (file) states.

    Raises:
        UsageError: no word, a duplicate word, an unknown template set; "max" for a vocabulary of averaged names.
        DataError: a file cannot be read, or is of another teacher.
    """
    if isinstance(words, Vocabulary):
        return words.pooled(pooling)
    if isinstance(words, (str, Path)) and str(words).endswith(".safetensors"):
        return load_vocabulary(cfg, words).pooled(pooling)
    parsed, templates = read_words(words), templates or cfg.MODEL.VOCABULARY.TEMPLATES
    return Vocabulary.build(
        parsed.names, build_teacher(cfg), templates, synonyms=parsed.synonyms, pooling=pooling or "mean"
    )


def background_of(cfg: CfgNode, vocabulary: Vocabulary, templates: str | None = None) -> Tensor | None:
    """The teacher's embedding of the word "background" in the prompts of a vocabulary.

    Args:
        cfg: configuration.
        vocabulary: :class:`~ovdet2.vocabulary.Vocabulary`.
        templates: prompt template set or file of the vocabulary's words; None: the set recorded in the vocabulary, or
            MODEL.VOCABULARY.TEMPLATES if it records none, such as an imported table.

    Returns:
        Tensor [D]; None if the detector has no text background.
    """
    read_by_part = any(method.reads_background and method.is_on(cfg) for method in methods_of(cfg))
    if cfg.MODEL.OVD.CLASSIFIER != "text_background" and not read_by_part:
        return None
    if templates is None:
        named = vocabulary.templates in template_set_names()
        templates = vocabulary.templates if named else cfg.MODEL.VOCABULARY.TEMPLATES
    return Vocabulary.build(("background",), build_teacher(cfg), templates).embeddings[0]


def build_word_bank(cfg: CfgNode, vocabulary: Vocabulary | None = None) -> WordBank:
    """The :class:`WordBank` of a vocabulary, by default :func:`build_vocabulary`'s, with a background embedding if the
    classifier uses one."""
    vocabulary = build_vocabulary(cfg) if vocabulary is None else vocabulary
    return WordBank(vocabulary, background_of(cfg, vocabulary))


def build_classifier(cfg: CfgNode, input_dim: int, bank: WordBank) -> CosineClassifier | ClosedSetClassifier:
    """The classifier of MODEL.OVD.CLASSIFIER over region features of ``input_dim`` channels, background last.

    Raises:
        UsageError: the classifier is unknown, or a closed-set classifier is given distractors.
    """
    ovd = cfg.MODEL.OVD
    if ovd.CLASSIFIER == "text":
        if ovd.CLS_LOSS == "sigmoid":
            return CosineClassifier(input_dim, bank, temperature=ovd.TEMPERATURE, bias=RARE_BIAS, background="zero")
        return CosineClassifier(input_dim, bank, temperature=ovd.TEMPERATURE, background="learned")
    if ovd.CLASSIFIER == "text_background":
        return CosineClassifier(
            input_dim,
            bank,
            temperature=ovd.TEMPERATURE,
            learns_temperature=True,
            background="text",
            projection_bias=False,
        )
    if ovd.CLASSIFIER == "closed_set":
        if cfg.TEST.DISTRACTORS:
            raise UsageError("a closed-set head takes no TEST.DISTRACTORS: its classes are fixed.")
        return ClosedSetClassifier(input_dim, bank)
    raise UsageError(f'MODEL.OVD.CLASSIFIER is {ovd.CLASSIFIER!r}: choose "text", "text_background" or "closed_set".')
