"""Open-vocabulary Deformable DETR, whose classes are an input, with the parts of methods: wiring only.

Shapes: B images, L decoder layers, N queries, G extra queries of a part, H heads, K words.
Names: ``pred_`` predicted, ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import ImageList
from torch import Tensor, nn

from ovdet2.config.methods import check_methods, methods_of
from ovdet2.data.samples import BOXES, Sample, as_samples, of_kind
from ovdet2.errors import UsageError
from ovdet2.modeling.build import build_word_bank
from ovdet2.modeling.detr.build import (
    build_criterion,
    build_detr,
    build_detr_parts,
    build_postprocessor,
    loss_weights,
    refuse_unused,
)
from ovdet2.modeling.detr.criterion import SetCriterion, kind_of, mean_box_count
from ovdet2.modeling.detr.criterion import weighted as weighted_core
from ovdet2.modeling.detr.extra_queries import decode_with
from ovdet2.modeling.detr.memory import Memory, Queries
from ovdet2.modeling.detr.model import DeformableDETR
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.part import DetrPart, DetrStep
from ovdet2.modeling.detr.postprocess import PostProcessor
from ovdet2.modeling.detr.targets import Targets
from ovdet2.modeling.host import Host
from ovdet2.modeling.part import joined, register_parts, require_seen, weighted
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank

PartLosses = tuple[DetrPart, dict[str, Tensor]]


@META_ARCH_REGISTRY.register()
class OpenVocabularyDeformableDETR(nn.Module):
    """Deformable DETR (Zhu et al., ICLR 2021) that classifies its queries by word embeddings.

    At test the output of an image is {"instances"}: detections whose ``pred_classes`` index the vocabulary, in pixels
    of the original image, best first; parts may add fields. With ``every_layer`` there is also "decoder_layers": the
    detections of the layers before the last, from the first on.

    Attributes:
        parts: tuple of :class:`DetrPart` in their order, each also a module under the name of its method.
    """

    @configurable
    def __init__(
        self,
        *,
        network: DeformableDETR,
        vocabulary: WordBank,
        criterion: SetCriterion,
        postprocessor: PostProcessor,
        loss_weights: Mapping[str, float],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        every_layer: bool = False,
        parts: Iterable[DetrPart] = (),
    ) -> None:
        """
        Args:
            network: the network; its ``backbone.size_divisibility`` sets the padding of a batch.
            vocabulary: word bank, shared with the network.
            criterion: criterion with the matching costs of the parts.
            postprocessor: from outputs to detections.
            loss_weights: weights of the criterion's losses, by kind.
            pixel_mean, pixel_std: three values per channel, 0 to 255, in the order of INPUT.FORMAT.
            every_layer: at test, return the detections of all decoder layers.
            parts: parts, each with the name of its method, the prefix of its weights in a checkpoint.

        Raises:
            UsageError: two parts have the same name, or a part has the name of another attribute of the detector.
        """
        super().__init__()
        self.network = network
        self.vocabulary = vocabulary
        self.criterion = criterion
        self.postprocessor = postprocessor
        self.loss_weights = dict(loss_weights)
        self.every_layer = every_layer
        self.parts: tuple[DetrPart, ...] = register_parts(self, parts, DetrPart)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, vocabulary: Vocabulary | None = None) -> dict[str, Any]:
        """Arguments from a configuration; ``vocabulary`` replaces that of MODEL.VOCABULARY and DATASETS.TEST."""
        check_methods(cfg)
        refuse_unused(cfg)
        bank = build_word_bank(cfg, vocabulary)
        network = build_detr(cfg, build_backbone(cfg), bank)
        parts = build_detr_parts(cfg, methods_of(cfg), Host(bank, network.backbone, network))
        return {
            "network": network,
            "vocabulary": bank,
            "criterion": build_criterion(cfg, [cost for part in parts for cost in part.matching_costs()]),
            "postprocessor": build_postprocessor(cfg),
            "loss_weights": loss_weights(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "every_layer": cfg.TEST.DECODER_LAYERS,
            "parts": parts,
        }

    @property
    def words_compete(self) -> bool:
        """False: each word has a separate sigmoid."""
        return False

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.pixel_mean.device

    def forward(self, batched_inputs: Iterable[Sample | Mapping[str, Any]]) -> dict[str, Tensor] | list[dict[str, Any]]:
        """
        Args:
            batched_inputs: B samples, or Detectron2 records, with ``image``, Tensor [3, H, W] uint8 or float, 0 to 255;
                in training with the annotations of their kind (``instances`` for images with boxes) and the fields
                that the parts need; at test with ``height`` and ``width`` of the output (0: those of ``image``).

        Returns:
            In training the weighted losses, a dict of scalar Tensors; at test a list of B dicts, see the class.

        Raises:
            UsageError: a closed-set head is given another number of words, no part has a loss for a kind of images, a
                field that a part needs is missing, or two losses have the same name.
            NumericalError: a matching cost is not finite; the message names the image.
        """
        samples = as_samples(batched_inputs)
        if self.training:
            core, of_parts = self._losses(samples)
            added = [weighted(losses, part, kind_of) for part, losses in of_parts]
            return joined(weighted_core(core, self.loss_weights), *added)
        images, outputs, queries = self.infer(samples, all_layers=self.every_layer)
        sizes = [
            (sample.height or size[0], sample.width or size[1]) for sample, size in zip(samples, images.image_sizes)
        ]
        detections = self.postprocessor(outputs, sizes, vocabulary=self.vocabulary)
        for part in self.parts:
            for image, instances in enumerate(detections):
                part.annotate(instances, queries, image)
        results: list[dict[str, Any]] = [{"instances": instances} for instances in detections]
        if self.every_layer:
            layers = [self.postprocessor(outputs, sizes, layer, self.vocabulary) for layer in range(outputs.layers - 1)]
            for image, result in enumerate(results):
                result["decoder_layers"] = [of_layer[image] for of_layer in layers]
        return results

    def losses(self, batched_inputs: Iterable[Sample | Mapping[str, Any]]) -> dict[str, Tensor]:
        """Unweighted losses of a training batch, a dict of scalar Tensors; arguments as of :meth:`forward`."""
        core, of_parts = self._losses(as_samples(batched_inputs))
        return joined(core, *(losses for _, losses in of_parts))

    def infer(
        self,
        batched_inputs: Iterable[Sample | Mapping[str, Any]],
        all_layers: bool = False,
        keep_sampling: bool = False,
    ) -> tuple[ImageList, DetrOutputs, Queries]:
        """Forward pass at test: (padded images, outputs, queries). The scores are the sigmoid of the outputs' logits.

        Args:
            batched_inputs: as of :meth:`forward`.
            all_layers, keep_sampling: see :meth:`~ovdet2.modeling.detr.model.DeformableDETR.decode`.
        """
        images, memory, queries = self.encode(batched_inputs)
        outputs = self.network.decode(memory, queries, all_layers=all_layers, keep_sampling=keep_sampling)
        words = outputs.pred_logits.shape[-1]
        if words != len(self.vocabulary):
            raise UsageError(
                f"a closed-set head of {words} classes cannot take {len(self.vocabulary)} words: its "
                'classes are fixed. Only a detector with MODEL.OVD.CLASSIFIER "text" takes other words.'
            )
        for part in self.parts:
            outputs = part.score(outputs, queries)
        return images, outputs, queries

    def encode(self, batched_inputs: Iterable[Sample | Mapping[str, Any]]) -> tuple[ImageList, Memory, Queries]:
        """(the padded images, the encoded images, the queries that the decoder starts from)."""
        samples = as_samples(batched_inputs)
        images = self.preprocess(samples)
        memory = self.network.encode(images.tensor, images.image_sizes)
        queries = self.network.transformer.queries(memory)
        for part in self.parts:
            queries = part.alter_queries(queries, samples)
        return images, memory, queries

    def preprocess(self, samples: Sequence[Sample]) -> ImageList:
        """The normalised images, padded with zeros at the right and the bottom, and their sizes."""
        images = [(sample["image"].to(self.device) - self.pixel_mean) / self.pixel_std for sample in samples]
        return ImageList.from_tensors(images, self.network.backbone.size_divisibility)

    def _losses(self, samples: list[Sample]) -> tuple[dict[str, Tensor], list[PartLosses]]:
        """Unweighted losses of a batch: (the criterion's, those of parts), in the order of summation."""
        with_boxes = of_kind(samples, BOXES)
        core, of_parts = self._losses_of_boxes(with_boxes) if with_boxes else ({}, [])
        weak = [sample for sample in samples if sample.kind != BOXES]
        return core, [*of_parts, *(self._weak_losses(weak) if weak else [])]

    def _losses_of_boxes(self, samples: list[Sample]) -> tuple[dict[str, Tensor], list[PartLosses]]:
        """:meth:`_losses` of images with boxes.

        Parts draw random numbers and make collective calls in their order. All collective calls come before matching:
        matching may raise in one process only (non-finite cost), and the other processes would wait forever.
        """
        _, memory, queries = self.encode(samples)
        targets = Targets.of_samples(samples, self.device)
        step = DetrStep(samples, targets, memory, queries, self.network, self.criterion)
        prepared = [part.before_decoding(step) for part in self.parts]
        outputs, of_parts = decode_with(step, [before.extra for before in prepared], self.parts)
        before_matching = [
            (part, joined(before.losses, part.losses_before_matching(step, before, own)))
            for part, before, own in zip(self.parts, prepared, of_parts)
        ]
        num_boxes = mean_box_count(len(targets), self.device)
        losses, matches = self.criterion(outputs, targets, num_boxes)
        after_matching = [(part, part.losses(step, outputs, matches, num_boxes)) for part in self.parts]
        return losses, [*after_matching, *before_matching]

    def _weak_losses(self, samples: list[Sample]) -> list[PartLosses]:
        """Losses of parts on images without boxes; these are encoded but not decoded."""
        require_seen(self.parts, [sample.kind for sample in samples])
        images = self.preprocess(samples)
        memory = self.network.encode(images.tensor, images.image_sizes)
        losses = []
        for part in self.parts:
            rows = [row for row, sample in enumerate(samples) if sample.kind in part.sees]
            if rows:
                own = memory if len(rows) == len(samples) else memory.take(rows)
                losses.append((part, part.weak_losses([samples[row] for row in rows], own, self.network)))
        return losses
