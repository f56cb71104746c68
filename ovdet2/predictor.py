"""Detect any words in images: set the vocabulary once, predict many times."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from PIL import Image
from torch import Tensor

from ovdet2.config import load_config, settle_device, without_training_parts
from ovdet2.data.samples import Sample
from ovdet2.engine.checkpoint import AtomicCheckpointer
from ovdet2.errors import DataError, OVDetError, SetupError, UsageError, counted
from ovdet2.io.images import MIN_SIDE, pixels_of, read_image
from ovdet2.io.weights import read_entries
from ovdet2.modeling import OpenVocabularyDeformableDETR, OpenVocabularyRCNN  # registers all architectures, too
from ovdet2.modeling.build import background_of, build_teacher, load_vocabulary, words_to_vocabulary
from ovdet2.modeling.part import Part
from ovdet2.vocabulary import Vocabulary, from_buffers
from ovdet2.vocabulary.templates import clean_name, template_set_names
from ovdet2.vocabulary.word_lists import Words
from ovdet2.zoo.records import RECORDS
from ovdet2.zoo.store import fetch

FEW_WORDS = 8  # from so many words on, they compete with each other only
SAME_TEACHER = (
    0.95  # cosine of the embeddings of a word by one teacher in nearly the same prompts; another gives about 0
)
_COMPARED = 8  # words that are embedded again to compare teachers
# A path, a PIL image, or an array [H, W, 3] uint8 RGB.
Picture = str | Path | Image.Image | np.ndarray


class Detector:
    """A trained detector with an exchangeable vocabulary. No data set is needed.

    The initial vocabulary is that of MODEL.VOCABULARY.FILE, or, if that is empty, the one of the checkpoint.

    >>> detector = Detector("ovshapes/vild_text_r18.yaml", "output/model_final.pth")
    >>> detector.set_vocabulary("striped moon, red star")
    >>> instances = detector.predict("photo.jpg")

    A softmax over words compares the words of the vocabulary: of a single word it makes nearly everything that word.
    If fewer than :data:`FEW_WORDS` words are set, the base words of the training therefore take part as competitors,
    which are never detected themselves. Evaluations never use competitors.

    *Negative words* are words of the user that absorb detections ("none of these"). With a softmax they are further
    competitors, with any number of words. Where each word has a separate sigmoid (the DETR family, Detic, federated
    heads), a box whose best word is a negative one has no detections. No detection is of a negative word.
    """

    def __init__(
        self,
        config: str | Path | CfgNode,
        weights: str | Path | None = None,
        overrides: Sequence[Any] = (),
        competitors: str = "auto",
        accept_license: bool = False,
    ) -> None:
        """
        Args:
            config: a name of :data:`ovdet2.zoo.DETECTORS`, a yaml path, the name of a shipped configuration, or a
                CfgNode. A published detector is downloaded on its first use.
            weights: checkpoint; None or empty: the weights of the named detector, else MODEL.WEIGHTS.
            overrides: list [key, value, ...]; ignored if ``config`` is a CfgNode.
            competitors: "auto", as the class describes, or "off". It changes nothing where each word has a separate sigmoid
                and no other score, as in the detectors of the DETR family.
            accept_license: accept that the weights of a published detector must not be used commercially.

        Raises:
            UsageError: no weights are given, ``competitors`` is something else, or a licence must be accepted.
            SetupError: a published detector cannot be downloaded.
            DataError: the weights cannot be read, are of another model, or of another embedding space.
        """
        if not isinstance(config, CfgNode):
            if str(config) in RECORDS and not weights:
                fetch(RECORDS[str(config)], accept_license)
            config = load_config(config, [*overrides, "MODEL.WEIGHTS", str(weights)] if weights else overrides)
        cfg = without_training_parts(config)
        weights = str(weights or cfg.MODEL.WEIGHTS)
        if not weights:
            raise UsageError("a Detector needs trained weights: give weights=... or MODEL.WEIGHTS.")
        cfg.MODEL.WEIGHTS = weights  # so that the backbone's pretrained weights are not read
        settle_device(cfg)
        self.cfg = cfg
        saved = saved_vocabulary(weights)
        self.model: OpenVocabularyRCNN | OpenVocabularyDeformableDETR = _build(cfg, saved).eval()
        AtomicCheckpointer(self.model).load_all(weights)
        self.competitors = _checked(competitors)
        words = self.model.vocabulary.words
        self._known_words = words if saved is None else saved  # with their embeddings
        self._trained: Vocabulary | None = None  # the base words of the training, once they are needed
        if cfg.MODEL.VOCABULARY.FILE:  # set() computes the base mask from the checkpoint: the file's may differ
            self._set(words, None, self.competitors)
        self.resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    @property
    def names(self) -> tuple[str, ...]:
        """The words of the vocabulary, without competitors; ``pred_classes`` are indices into them."""
        return self.model.vocabulary.names[: self.model.vocabulary.num_detectable]

    def set_vocabulary(
        self,
        words: Words | Vocabulary,
        templates: str | None = None,
        competitors: str | None = None,
        *,
        negative_words: Words | Vocabulary | None = None,
        pooling: str | None = None,
    ) -> None:
        """Replace the vocabulary; the words need not be in any data set.

        A word that had training boxes counts as base, every other word as novel; the base mask of a vocabulary is
        ignored. Only score fusion depends on it.

        Args:
            words: "cat, red mug", a list, a dict {word: [synonyms]}, a word list (``.txt`` or ``.json``, see
                :func:`~ovdet2.vocabulary.read_words`), a vocabulary file (``.safetensors``), or a vocabulary. The
                embeddings of a word and its synonyms ("sofa; couch") are averaged.
            templates: prompt template set; default MODEL.VOCABULARY.TEMPLATES.
            competitors: "auto" or "off"; None: as given to the constructor.
            negative_words: words that absorb detections, see the class; in the forms of ``words``.
            pooling: how the names of a word are joined. "mean": their embeddings are averaged. "max": the logit of a word
                is the largest of its names. None: "mean", or as a vocabulary (file) states.

        Raises:
            UsageError: no word, a duplicate word, an unknown template set, a negative word that is also a name of a word,
                or "max" for a vocabulary that holds averages.
            DataError: a file that cannot be read, or a vocabulary of another teacher.
            SetupError: MODEL.TEACHER must embed the words, and its weights cannot be downloaded.
        """
        competitors = self.competitors if competitors is None else _checked(competitors)
        words = words_to_vocabulary(self.cfg, words, templates, pooling)
        negative = None if negative_words is None else words_to_vocabulary(self.cfg, negative_words, templates, pooling)
        self._verify_teacher(words)
        self._set(words, background_of(self.cfg, words, templates), competitors, negative)

    def _verify_teacher(self, words: Vocabulary) -> None:
        """Compare MODEL.TEACHER with the embeddings of a checkpoint that states its teacher by name only.

        A published detector does: its embeddings come from a file without the teacher. If MODEL.TEACHER is a weight file,
        names cannot show that both are the same, so some words of the checkpoint are embedded again.

        Raises:
            DataError: their embeddings differ; the message names both teachers.
        """
        stated, given, known = self.model.vocabulary.teacher, words.teacher, self._known_words
        if stated.weights_sha256 or not given.weights_sha256 or stated.pretrained == given.pretrained:
            return  # WordBank.set compares the fingerprints
        rows = [row for row, name in enumerate(known.names) if name.isalpha()][:_COMPARED]
        if not rows or given.architecture != stated.architecture or build_teacher(self.cfg).fingerprint != given:
            return
        templates = known.templates if known.templates in template_set_names() else self.cfg.MODEL.VOCABULARY.TEMPLATES
        again = Vocabulary.build([known.names[row] for row in rows], build_teacher(self.cfg), templates)
        cosines = (again.embeddings * known.embeddings[rows]).sum(dim=1)
        if bool((cosines < SAME_TEACHER).any()):
            worst = int(cosines.argmin())
            raise DataError(
                f"the model has words of teacher {stated}, but {given} embeds {again.names[worst]!r} in another way (cosine "
                f"{cosines[worst]:.3f}): give the weights of {stated.architecture}, {stated.pretrained}, as MODEL.TEACHER.PRETRAINED."
            )
        self.model.vocabulary.confirm_teacher(given)
        self._known_words = replace(known, teacher=given)

    def _set(
        self, words: Vocabulary, background: Tensor | None, competitors: str, negative: Vocabulary | None = None
    ) -> None:
        both = sorted(_names_of(words) & _names_of(negative)) if negative is not None else []
        if both:
            raise UsageError(f"{both[0]!r} is a word to detect and a negative word: remove one of the two.")
        wanted = competitors == "auto" and len(words) < FEW_WORDS and self.model.words_compete
        competing = self._base_words(words, negative) if wanted else None
        self.model.vocabulary.set(words, background, competing, negative)

    def _base_words(self, vocabulary: Vocabulary, negative: Vocabulary | None) -> Vocabulary | None:
        """The base words of the training that are no name of a word or negative word, synonyms included; None without
        any."""
        names = _names_of(vocabulary) | (set() if negative is None else _names_of(negative))
        if self._trained is None:
            self._trained = self._embedded_base_words()
        rows = [row for row, name in enumerate(self._trained.names) if clean_name(name) not in names]
        return self._trained.selected(rows) if rows else None

    def _embedded_base_words(self) -> Vocabulary:
        """All base words of the training: with the embeddings of the checkpoint, or else by MODEL.TEACHER."""
        trained, known = self.model.vocabulary.trained_base_names, self._known_words
        rows = [row for row, name in enumerate(known.names) if clean_name(name) in trained]
        lacking = sorted(trained - {clean_name(known.names[row]) for row in rows})
        base_words = known.selected(rows)
        return base_words.joined(words_to_vocabulary(self.cfg, lacking)) if lacking else base_words

    @property
    def thresholds(self) -> Tensor | None:
        """Tensor [K] float64, the thresholds of :attr:`names` (nan for a word without); None if the vocabulary has none."""
        thresholds = self.model.vocabulary.words.thresholds
        if thresholds is None or all(value is None for value in thresholds):
            return None
        values = [math.nan if value is None else value for value in thresholds[: len(self.names)]]
        return torch.tensor(values, dtype=torch.float64)

    @property
    def has_priors(self) -> bool:
        """Whether the detector reads the words present in an image (semantic priors)."""
        return bool(self._priors)

    @property
    def _priors(self) -> list[Part]:
        """The parts that read present words."""
        return [part for part in getattr(self.model, "parts", ()) if part.takes_present_words]

    def predict_present_words(self, image: Picture) -> list[str]:
        """Predict the words present in an image with the teacher of MODEL.TEACHER, by descending score.

        :meth:`predict` uses them if no present words are given. A file of concept priors is not read.

        Raises:
            UsageError: the detector takes no semantic priors.
            DataError: an unreadable image file, or a vocabulary of another teacher than MODEL.TEACHER.
        """
        if not self.has_priors:
            raise UsageError("this detector takes no semantic priors: it predicts no present words.")
        return self._priors[0].predict_present_words(to_rgb_array(image), lambda: build_teacher(self.cfg))

    present = predict_present_words  # the name of earlier versions

    @torch.no_grad()
    def predict(
        self,
        images: Picture | Sequence[Picture],
        present_words: Sequence[str] | None = None,
        *,
        together: bool = True,
        present: Sequence[str] | None = None,
        threshold: float | None = None,
    ) -> Instances | list[Instances]:
        """Detect objects in one image or a batch.

        Images of other sizes change the scores of a batch a little: each is padded to the largest, and convolutions read
        the padding at its border. With ``together=False`` every image has the detections that it has by itself.

        Args:
            images: a path, a PIL image or an array [H, W, 3] uint8 RGB; or a list of them.
            present_words: for a detector with semantic priors, the words present in the images; None:
                :meth:`predict_present_words` of each image.
            together: whether a list is one forward pass, which is faster, or one for each image.
            present: former name of ``present_words``.
            threshold: detections with a higher score are returned. None: the thresholds of the vocabulary, if it has any
                (``ovdet2 vocab thresholds``), else all detections.

        Returns:
            :class:`~detectron2.structures.Instances` on the CPU, by descending score, with ``pred_boxes`` (XYXY pixels
            of the image), ``scores`` (0 to 1) and ``pred_classes`` (indices into :attr:`names`). With semantic priors
            also ``prior_words``, the present word of each detection's query (an index into :attr:`names`, -1 for
            none). A list for a list.

        Raises:
            DataError: an unreadable image file.
            UsageError: an array of another shape or type, a present word that is not in the vocabulary, or present
                words for a detector without priors.
        """
        single = not isinstance(images, (list, tuple))
        pictures: Any = [images] if single else images
        words = present if present_words is None else present_words
        batch = [self.prepare(image, words) for image in pictures]
        if not batch:
            return []
        passes = [batch] if together else [[sample] for sample in batch]
        with _memory_explained(batch, len(self.names)):
            detections = [output["instances"].to("cpu") for each in passes for output in self.model(each)]
        detections = [above(self.thresholds if threshold is None else threshold, each) for each in detections]
        return detections[0] if single else detections

    def prepare(self, image: Picture, present_words: Sequence[str] | None = None) -> Sample:
        """The model's input sample for an image; for arguments and errors see :meth:`predict`."""
        if present_words is not None and not self.has_priors:
            raise UsageError("this detector takes no semantic priors: do not give present words.")
        rgb = to_rgb_array(image)
        pixels = rgb if self.cfg.INPUT.FORMAT == "RGB" else rgb[:, :, ::-1]
        resized = self.resize.get_transform(pixels).apply_image(np.ascontiguousarray(pixels))
        tensor = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        sample = Sample(image=tensor, height=rgb.shape[0], width=rgb.shape[1])
        if self.has_priors:
            words = self.predict_present_words(rgb) if present_words is None else present_words
            for part in self._priors:
                part.give_present_words(sample, words)
        return sample


def above(thresholds: Tensor | float | None, instances: Instances) -> Instances:
    """The detections whose score is above a threshold.

    Args:
        thresholds: Tensor [K] float64, one for each word; nan: all detections of the word remain. A number for all words.
            None: all detections remain.
        instances: detections on the CPU.
    """
    if thresholds is None:
        return instances
    limits = thresholds[instances.pred_classes] if isinstance(thresholds, Tensor) else thresholds
    # Negated, so that nan keeps a detection.
    return instances[~(instances.scores.double() <= limits)]


@contextlib.contextmanager
def _memory_explained(batch: Sequence[Sample], words: int) -> Generator[None, None, None]:
    """Convert the error of too little memory; the detector can be used further.

    Raises:
        SetupError: names the images' sizes, the number of words, and what to lower.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch reports too little memory of the CPU as a RuntimeError.
        if isinstance(error, OVDetError) or (
            type(error) is RuntimeError
            and "not enough memory" not in str(error)
            and "allocate memory" not in str(error)
        ):
            raise
        sizes = ", ".join(f"{sample['image'].shape[2]}x{sample['image'].shape[1]}" for sample in batch)
    else:
        return
    # Outside of the handler, whose traceback holds the tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise SetupError(
        f"the memory does not suffice for {counted(len(batch), 'image')} of {sizes} pixels and {counted(words, 'word')}: "
        "give fewer images in a batch or fewer words, or lower INPUT.MIN_SIZE_TEST and INPUT.MAX_SIZE_TEST."
    )


def _checked(competitors: str) -> str:
    if competitors not in ("auto", "off"):
        raise UsageError(f'competitors is {competitors!r}: choose "auto" or "off".')
    return competitors


def _names_of(vocabulary: Vocabulary) -> set[str]:
    """The cleaned names of the words and their synonyms."""
    names = {name for group in vocabulary.synonyms or () for name in group}
    return set(map(clean_name, names.union(vocabulary.names)))


Predictor = Detector  # the name of earlier versions


def to_rgb_array(image: Picture) -> np.ndarray:
    """Array [H, W, 3] uint8 RGB from a path, a PIL image, or such an array.

    A PIL image is decoded as its file would be: upright, 16 bits scaled to 8 (:func:`~ovdet2.io.images.read_image`).

    Raises:
        UsageError: another type, shape or number of channels, or an array with a side below 32 pixels.
        DataError: an image that cannot be read, is of floating-point pixels, or has a side below 32 pixels.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, "RGB")
    if isinstance(image, Image.Image):
        return pixels_of(image, str(getattr(image, "filename", "")) or "the PIL image")
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        what = f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(f"expected a path, a PIL image or an RGB array [H, W, 3] uint8, got {what}.")
    if min(image.shape[:2]) < MIN_SIDE:
        raise UsageError(
            f"the image is {image.shape[1]}x{image.shape[0]} pixels, but at least {MIN_SIDE} per side are needed: "
            "enlarge it."
        )
    return image


def saved_vocabulary(weights: str) -> Vocabulary | None:
    """The vocabulary that a checkpoint of ovdet2 holds; None for another file, or a URL."""
    if not Path(weights).is_file():
        return None
    tensors = read_entries(weights, "vocabulary.")
    prefix = next((name.removesuffix("manifest") for name in tensors if name.endswith("vocabulary.manifest")), None)
    if prefix is None:
        return None
    return from_buffers(*(tensors[f"{prefix}{part}"] for part in ("embeddings", "base_mask", "manifest")))


def _build(cfg: CfgNode, saved: Vocabulary | None) -> OpenVocabularyRCNN | OpenVocabularyDeformableDETR:
    """Build the model with the vocabulary of MODEL.VOCABULARY.FILE, or, if that is empty, of the checkpoint."""
    words = load_vocabulary(cfg, cfg.MODEL.VOCABULARY.FILE) if cfg.MODEL.VOCABULARY.FILE else saved
    model_class = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return model_class(cfg, **({} if words is None else {"vocabulary": words})).to(cfg.MODEL.DEVICE)
