"""Other zero-shot detectors behind the interface of :class:`~ovdet2.predictor.Detector`: those of ``transformers``.

OWL-ViT, OWLv2, Grounding DINO, MM-Grounding-DINO and OmDet-Turbo read words as text. A detection's class is an index into
the words. It is never decoded from tokens, so two words that share tokens are never confused.

Shapes: K words, Q boxes of a forward pass, T tokens of a text, H x W pixels.
Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid, ``_probs`` probabilities in [0, 1],
``_xyxy`` boxes (left, top, right, bottom), ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import batched_nms, box_convert

from ovdet2.data.datasets import split_of
from ovdet2.errors import DataError, SetupError, UsageError, counted
from ovdet2.evaluation import OpenVocabularyEvaluator
from ovdet2.evaluation.ov_evaluator import DETECTION_LIMITS
from ovdet2.evaluation.setting import Setting
from ovdet2.io.progress import progress_bar
from ovdet2.predictor import Picture, to_rgb_array
from ovdet2.vocabulary import read_words
from ovdet2.vocabulary.word_lists import Words


class Family(NamedTuple):
    """How detectors of one kind are used.

    Attributes:
        template: prompt of a word.
        words_per_pass: words of one forward pass; None: as many as the text has tokens for.
        independent: whether the score of a word is the same whatever other words are in the pass.
        square: whether the processor pads images to squares, to which boxes then refer.
        nms: IoU threshold of the NMS within a class; None: no NMS.
    """

    template: str
    words_per_pass: int | None
    independent: bool
    square: bool
    nms: float | None


FAMILIES = {
    "owlvit": Family("a photo of a {}", 512, independent=True, square=False, nms=None),
    "owlv2": Family("a photo of a {}", 512, independent=True, square=True, nms=None),
    "grounding-dino": Family("{}", None, independent=False, square=False, nms=None),
    "mm-grounding-dino": Family("{}", None, independent=False, square=False, nms=None),
    "omdet-turbo": Family("{}", 64, independent=False, square=False, nms=0.5),
}
_DOT, _DELIMITERS = ".", ".?"  # between the words of a text of Grounding DINO; it would split a word with one of them
_SHOWN = 3  # prompts named in a note


class ZeroShotDetector:
    """A zero-shot detector of ``transformers`` with an exchangeable vocabulary.

    >>> detector = ZeroShotDetector.load("folder/of/owlv2-base-patch16")
    >>> detector.set_vocabulary("striped moon, red star")
    >>> instances = detector.predict("photo.jpg")

    All pairs of a box and a word compete for the places of an image, as in the published evaluations of these detectors on
    COCO and LVIS. ``post_process_grounded_object_detection`` of ``transformers`` keeps one word of a box instead.
    """

    def __init__(
        self,
        network: Any,
        processor: Any,
        name: str = "",
        detections: int = 100,
        template: str | None = None,
        words_per_pass: int | None = None,
    ) -> None:
        """
        Args:
            network: of AutoModelForZeroShotObjectDetection.
            processor: of AutoProcessor.
            name: for reports; "": the kind of the network.
            detections: per image, best first.
            template: prompt of a word, with "{}" for the word; None: the family's.
            words_per_pass: of one forward pass; None: the family's.

        Raises:
            UsageError: the network is of another kind than :data:`FAMILIES`, or the template has no "{}".
        """
        kind = network.config.model_type
        if kind not in FAMILIES:
            raise UsageError(f"{kind!r} is no zero-shot detector known here: choose one of {', '.join(FAMILIES)}.")
        self.family = FAMILIES[kind]
        self.kind, self.name, self.detections = kind, name or kind, detections
        self.network, self.processor = network.eval().requires_grad_(False), processor
        self.template = self.family.template if template is None else template
        if "{}" not in self.template:
            raise UsageError(f'the template {self.template!r} has no "{{}}" for the word.')
        self.words_per_pass = words_per_pass or self.family.words_per_pass
        self.names: tuple[str, ...] = ()
        self._passes: list[_Pass] = []

    @classmethod
    def load(cls, source: str | Path, device: str = "cpu", **options: Any) -> ZeroShotDetector:
        """Read a folder of ``save_pretrained``, or a model of the hub by its name. Code in it is not run.

        Args:
            source: folder or name.
            device: of the network.
            options: of the constructor, but ``name``, which is that of the source.

        Raises:
            SetupError: ``transformers`` is not installed, or a name cannot be fetched.
            DataError: the folder holds no zero-shot detector with safetensors weights and its processor.
            UsageError: see the constructor.
        """
        try:
            from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor
        except ImportError as error:
            raise SetupError(
                f"zero-shot detectors need transformers 4.55 or later ({error}): pip install transformers."
            ) from None
        local = Path(source).is_dir()
        try:
            processor = AutoProcessor.from_pretrained(source, local_files_only=local)
            network = AutoModelForZeroShotObjectDetection.from_pretrained(
                source, local_files_only=local, use_safetensors=True
            )
        except Exception as error:  # transformers raises many kinds here
            message = f"the zero-shot detector {source} could not be loaded ({type(error).__name__}: {error})"
            if local:
                raise DataError(f"{message}: it needs safetensors weights and its processor.") from error
            raise SetupError(f"{message}: download it with a browser, and give its folder.") from error
        return cls(network.to(device), processor, Path(source).name, **options)

    def set_vocabulary(self, words: Words) -> None:
        """Replace the words.

        A long vocabulary is split over several forward passes, which is printed.

        Args:
            words: "cat, red mug", a list, or a word list, see :func:`~ovdet2.vocabulary.read_words`.

        Raises:
            UsageError: no word, synonyms, or a word that is longer than the one text of all words that Grounding DINO reads.
        """
        parsed = read_words(words)
        if parsed.synonyms is not None:
            raise UsageError("zero-shot detectors take one name for each word: remove the synonyms.")
        passes, prompts = [], [self.template.format(name) for name in parsed.names]
        split = self._split_texts if self.family.words_per_pass is None else self._split_words
        for first, inputs, spans in split(prompts):
            passes.append(_Pass(first, len(spans), inputs, spans))
        self.names, self._passes = tuple(parsed.names), passes
        if len(passes) > 1:
            note = "" if self.family.independent else "; its scores depend on which words share a pass"
            print(f"{self.name} takes {counted(len(self.names), 'word')} in {len(passes)} forward passes{note}.")

    def _split_words(self, prompts):
        """Yield (first word, text inputs, an empty span for each word) of each pass over separate prompts."""
        assert self.words_per_pass is not None
        limit = self.network.config.text_config.max_position_embeddings
        # With the tokens of start and end. With the usual prompt some names of LVIS are longer than OWLv2's 16.
        long = [prompt for prompt in prompts if len(self.processor.tokenizer(prompt)["input_ids"]) > limit]
        if long:
            shown = ", ".join(map(repr, long[:_SHOWN])) + ", ..." * (len(long) > _SHOWN)
            print(
                f"{self.name} reads {limit} tokens of a prompt and not the end of {counted(len(long), 'prompt')}: {shown}"
            )
        for first in range(0, len(prompts), self.words_per_pass):
            chunk = prompts[first : first + self.words_per_pass]
            yield first, {"prompts": chunk}, [range(0)] * len(chunk)

    def _split_texts(self, prompts):
        """Yield (first word, text inputs, the span of tokens of each word) of each pass over one text of all words."""
        tokenizer, limit = self.processor.tokenizer, self.network.config.max_text_len
        dot = tokenizer.convert_tokens_to_ids(_DOT)
        ids, spans, first = [tokenizer.cls_token_id], [], 0
        for number, prompt in enumerate(prompts):
            clean = prompt.lower().translate(str.maketrans(_DELIMITERS, " " * len(_DELIMITERS)))
            tokens = tokenizer(clean, add_special_tokens=False)["input_ids"]
            if not tokens or len(tokens) + 3 > limit:  # [CLS], the dot and [SEP]
                raise UsageError(
                    f"the word {prompt!r} has {len(tokens)} tokens, {self.name} takes 1 to {limit - 3}: change it."
                )
            full = len(ids) + len(tokens) + 2 > limit or len(spans) == self.words_per_pass
            if full:
                yield first, self._text(ids), spans
                ids, spans, first = [tokenizer.cls_token_id], [], number
            spans.append(range(len(ids), len(ids) + len(tokens)))
            ids += [*tokens, dot]
        yield first, self._text(ids), spans

    def _text(self, ids):
        ids = torch.tensor([[*ids, self.processor.tokenizer.sep_token_id]])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    @torch.inference_mode()
    def predict(self, images: Picture | Sequence[Picture]) -> Instances | list[Instances]:
        """Detect objects in one image or several.

        Args:
            images: a path, a PIL image or an array [H, W, 3] uint8 RGB; or a list of them.

        Returns:
            :class:`~detectron2.structures.Instances` on the CPU, by descending score, with ``pred_boxes`` (XYXY pixels of
            the image), ``scores`` (0 to 1) and ``pred_classes`` (indices into ``names``). A list for a list.

        Raises:
            DataError: an unreadable image file.
            UsageError: no vocabulary was set, or an array of another shape or type.
        """
        if not self.names:
            raise UsageError("a zero-shot detector has no words yet: call set_vocabulary.")
        single = not isinstance(images, (list, tuple))
        pictures: Any = [images] if single else images
        detections = [self._detect(to_rgb_array(picture)) for picture in pictures]
        return detections[0] if single else detections

    def _detect(self, rgb):
        height, width = rgb.shape[:2]
        parts = [self._run(rgb, each) for each in self._passes]
        boxes_cxcywh, scores, classes = (torch.cat(values) for values in zip(*parts))
        side = max(height, width)
        scale = [side] * 4 if self.family.square else [width, height, width, height]
        boxes_xyxy = box_convert(boxes_cxcywh, "cxcywh", "xyxy") * torch.tensor(scale, dtype=torch.float32)
        if self.family.nms is None:
            order = scores.argsort(descending=True, stable=True)
        else:
            order = batched_nms(boxes_xyxy, scores, classes, self.family.nms)
        order = order[: self.detections]
        boxes = Boxes(boxes_xyxy[order])
        boxes.clip((height, width))
        return Instances((height, width), pred_boxes=boxes, scores=scores[order], pred_classes=classes[order])

    def _run(self, rgb, part):
        """(boxes_cxcywh [R, 4] relative, scores [R], classes [R]) of the best pairs of one pass."""
        pred_logits, boxes_cxcywh = self._forward(rgb, part)
        probs = pred_logits.float().sigmoid()
        if self.family.words_per_pass is None:  # a column for each token
            probs = token_to_word_probs(probs, part.spans)
        probs = probs[:, : part.count]
        best, pairs = probs.flatten().topk(min(self.detections, probs.numel()))
        rows = pairs // part.count
        return boxes_cxcywh.float().cpu()[rows.cpu()], best.cpu(), (pairs % part.count + part.first).cpu()

    def _forward(self, rgb, part):
        """(pred_logits [Q, K of the pass, or T], boxes_cxcywh [Q, 4] relative to the padded image) of one image."""
        device = self.network.device
        if self.family.words_per_pass is None:
            image = self.processor.image_processor(images=rgb, return_tensors="pt")
            output = self.network(**{name: value.to(device) for name, value in (part.inputs | image).items()})
            return output.logits[0], output.pred_boxes[0]
        inputs = self.processor(images=rgb, text=[part.inputs["prompts"]], return_tensors="pt", truncation=True)
        output = self.network(**inputs.to(device))
        if self.kind == "omdet-turbo":
            return output.decoder_class_logits[0], output.decoder_coord_logits[0]
        return output.logits[0], output.pred_boxes[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What a report states of the detector."""
        return {
            "weights": self.name,
            "vocabulary": {"words": len(self.names), "templates": self.template},
            "forward_passes": len(self._passes),
        }


class _Pass(NamedTuple):
    """The words of a forward pass: the number of the first, how many, the text inputs, and their spans of tokens."""

    first: int
    count: int
    inputs: dict[str, Any]
    spans: list[range]


def token_to_word_probs(token_probs: Tensor, spans: Sequence[range]) -> Tensor:
    """The probability of a word: the mean over its tokens, as in the evaluation of Grounding DINO on COCO.

    Args:
        token_probs: Tensor [Q, T].
        spans: positions of the tokens of each of K words, none empty.

    Returns:
        Tensor [Q, K].
    """
    return torch.stack([token_probs[:, span.start : span.stop].mean(dim=1) for span in spans], dim=1)


def evaluate(
    detector: ZeroShotDetector, dataset: str, output: str | Path, setting: Setting | None = None
) -> Mapping[str, Mapping[str, float]]:
    """Evaluate a zero-shot detector with the evaluator of all detectors: base, novel and all classes, one report.json.

    Args:
        detector: its vocabulary becomes that of the data set, and the number of detections that of its metric.
        dataset: of :func:`~ovdet2.data.datasets.register_ov_dataset`.
        output: folder of the report.
        setting: what the training saw, for the report; None: unknown.

    Returns:
        As :meth:`~ovdet2.evaluation.OpenVocabularyEvaluator.evaluate`.

    Raises:
        UsageError: the data set has no base / novel split.
        DataError: the data set is missing or damaged.
    """
    split = split_of(dataset)
    if split is None:
        raise UsageError(f"{dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    detector.set_vocabulary(list(split.names))
    detector.detections = DETECTION_LIMITS[MetadataCatalog.get(dataset).evaluator_type]
    evaluator = OpenVocabularyEvaluator(
        dataset, output, facts=detector.facts | {"setting": (setting or Setting()).to_report()}
    )
    evaluator.reset()
    for record in progress_bar(DatasetCatalog.get(dataset), desc="detecting", unit="image"):
        evaluator.process([record], [{"instances": detector.predict(record["file_name"])}])
    return evaluator.evaluate()
