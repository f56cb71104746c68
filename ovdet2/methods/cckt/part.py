"""CCKT-Det on Deformable DETR: words present in an image are added to its queries, and CLIP embeddings of the objects'
crops supervise the embeddings of the decoder outputs.

Shapes: L decoder layers, B images, N queries, K words, X the most objects of one image, C channels, D embedding
dimension. Names: ``pred_`` predicted, ``gt_`` ground truth, ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from ovdet2.data.samples import Sample
from ovdet2.errors import UsageError
from ovdet2.layers import EmbeddingProjection, cosine_logits
from ovdet2.methods.cckt.check import check_choices, trains_embeddings
from ovdet2.methods.cckt.class_crops import class_crops
from ovdet2.methods.cckt.online_priors import OnlinePriors, word_indices
from ovdet2.methods.cckt.region_contrast import ClassCrops, class_contrast, pair_contrast
from ovdet2.methods.cckt.sample import AttachObjectCrops, ObjectCrops, PresentWords
from ovdet2.methods.cckt.semantic_priors import CarriedWords, SemanticPriors
from ovdet2.modeling.detr.criterion import class_targets
from ovdet2.modeling.detr.matcher import MatchingCost
from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.outputs import DetrOutputs
from ovdet2.modeling.detr.part import DetrPart, DetrStep
from ovdet2.modeling.detr.targets import Matches
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.bank import WordBank

if TYPE_CHECKING:
    from ovdet2.data.sources import TrainSource
    from ovdet2.vlm.teacher import Teacher

EMBEDDINGS = "cckt_embeddings"  # in DetrOutputs.added
NO_CROPS = (
    "the objects have no teacher embeddings, which MODEL.CCKT.CONTRAST requires: load the training set with "
    "the steps of this configuration; they read MODEL.CCKT.REGION_CACHE."
)


def similarity_logits(embeddings: Tensor, words: Tensor, temperature: float, bias: float = 0.0) -> Tensor:
    """cos(e, t) / tau + b, whose sigmoid is the similarity probability (Eq. 4, where b is 0).

    Args:
        embeddings: Tensor [..., D], unit rows.
        words: Tensor [K, D], unit rows; or [..., K, D] with the leading dimensions of ``embeddings``.
        temperature: tau.
        bias: b.

    Returns:
        Tensor [..., K], float32 (float64 if ``embeddings`` is).
    """
    return cosine_logits(embeddings, words, temperature=temperature, bias=bias)


def product_logits(first: Tensor, second: Tensor) -> Tensor:
    """Logit of the product of two probabilities, which are given as logits; computed without underflow."""
    log_product = F.logsigmoid(first) + F.logsigmoid(second)
    log_product = log_product.clamp(max=-torch.finfo(log_product.dtype).tiny)  # probability < 1: the logit stays finite
    # log(1 - exp(x)): each branch is accurate on one side of log(1/2).
    near_one = log_product > -math.log(2)
    rest = torch.where(near_one, torch.log(-torch.expm1(log_product)), torch.log1p(-torch.exp(log_product)))
    return log_product - rest


class CCKT(DetrPart):
    """Semantic priors, region embedding heads, contrastive distillation and similarity scores; each is optional.

    Attributes:
        takes_present_words: whether semantic priors are used.
    """

    def __init__(
        self,
        bank: WordBank,
        priors: SemanticPriors | None = None,
        dim: int = 256,
        num_heads: int = 0,
        *,
        temperature: float = 0.07,
        contrast_temperature: float | None = None,
        bias: float = 0.0,
        similarity_cost: float = 1.0,
        class_loss: str = "class",
        contrast: str = "instance",
        contrast_start: int = 0,
        score: str = "similarity",
        alpha: float = 0.25,
        gamma: float = 2.0,
        look: Callable[[Teacher, Vocabulary], OnlinePriors] = OnlinePriors,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        """
        Args:
            bank: word bank of the detector; not a submodule of this part.
            priors: semantic priors, or None.
            dim: C.
            num_heads: number of region embedding heads: one per decoder layer, or 1 for all; built only if a loss
                trains them.
            temperature: tau of similarities.
            contrast_temperature: tau of the contrast; None: that of similarities.
            bias: b of similarities.
            similarity_cost: weight of the similarity in the matching cost.
            class_loss: the focal loss is on the logits of the "class" branch (published code), on those of "similarity"
                (Eq. 7), where the class branch is not trained, or on "both".
            contrast: "instance" (Eqs. 5 and 6, within each image), "batch" (the same, over the images of the process),
                "class" (published code), or "none".
            contrast_start: first iteration with the contrast. The similarity cost starts at the same iteration, unless
                a class loss trains the similarity.
            score: score of a detection: the "class" branch, "similarity", or the "product" of the two probabilities.
            alpha, gamma: parameters of the focal loss.
            look: function of the teacher and the words that builds the predictor of present words for images without a
            prior file.
            loss_weights: weights of "loss_contrast" and "loss_similarity".

        Raises:
            UsageError: see :func:`~ovdet2.methods.cckt.check.check_choices`.
        """
        super().__init__(loss_weights)
        check_choices(contrast, class_loss, score)
        self._shared = (bank,)  # a tuple hides it from state_dict: it is the detector's
        self.priors = priors
        self.takes_present_words = priors is not None
        embed_dim = bank.embeddings.shape[1]
        heads = num_heads if trains_embeddings(contrast, class_loss) else 0
        self.heads = nn.ModuleList(EmbeddingProjection(dim, embed_dim) for _ in range(heads))
        self.class_crops = ClassCrops() if contrast == "class" else None
        self.temperature, self.bias, self.alpha, self.gamma = temperature, bias, alpha, gamma
        self.contrast_temperature = temperature if contrast_temperature is None else contrast_temperature
        self.class_loss, self.contrast, self.contrast_start, self.score_by = class_loss, contrast, contrast_start, score
        self.similarity_weight = similarity_cost
        self._look = look
        self._online: OnlinePriors | None = None

    @property
    def bank(self) -> WordBank:
        """Word bank of the detector."""
        return self._shared[0]

    def prepare_training(self, sources: Sequence[TrainSource]) -> None:
        """Read the crops of the base classes from the cache, for the contrast "class".

        Raises:
            UsageError: no training source attaches crops of its objects.
            CacheError: see :func:`~ovdet2.methods.cckt.class_crops.class_crops`.
        """
        if self.class_crops is None:
            return
        for source in sources:
            for step in source.steps:
                if isinstance(step, AttachObjectCrops):
                    num_base = len(self.bank.training_embeddings)
                    self.class_crops.fill(*class_crops(source.records, step.cache, num_base, seed=source.seed))
                    return
        raise UsageError(NO_CROPS)

    def predict_present_words(self, image: np.ndarray, teacher: Callable[[], Teacher]) -> list[str]:
        """See :class:`~ovdet2.methods.cckt.online_priors.OnlinePriors`; the teacher is loaded at the first image.

        Raises:
            DataError: the word embeddings are of another teacher.
        """
        words, online = self.bank.words, self._online
        if online is None or online.vocabulary is not words:
            self._online = online = self._look(teacher(), words)
        return [words.names[word] for word in online(image).tolist()]

    def give_present_words(self, sample: Sample, words: Sequence[str]) -> None:
        """Attach :class:`PresentWords`.

        Raises:
            UsageError: see :func:`~ovdet2.methods.cckt.online_priors.word_indices`.
        """
        sample.attach(PresentWords(word_indices(words, self.bank.names)))

    def alter_queries(self, queries: Queries, samples: Sequence[Sample]) -> Queries:
        """Add semantic priors to the queries, see :class:`SemanticPriors`; unchanged if priors are off."""
        return queries if self.priors is None else self.priors(queries, samples)

    def embed(self, hidden: Tensor, all_layers: bool = True) -> Tensor:
        """Region embeddings.

        Args:
            hidden: Tensor [L, B, N, C], hidden states of all decoder layers.
            all_layers: whether to embed all layers, or only the last one.

        Returns:
            Tensor [L or 1, B, N, D], unit rows, float32.
        """
        heads = list(self.heads) * (len(hidden) if len(self.heads) == 1 else 1)
        pairs = list(zip(heads, hidden))
        return torch.stack(
            [
                head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
                for head, states in pairs[0 if all_layers else -1 :]
            ]
        )

    def alter_outputs(self, outputs: DetrOutputs) -> DetrOutputs:
        """Add :data:`EMBEDDINGS` [L, B, N, D] to the outputs if there are heads. With ``class_loss`` "similarity",
        ``pred_logits`` become the similarity logits of the base words."""
        if not self.heads:
            return outputs
        embeddings = self.embed(outputs.hidden)
        if self.class_loss == "similarity":
            outputs = replace(outputs, pred_logits=self._similarity(embeddings))
        return outputs.with_added(**{EMBEDDINGS: embeddings})

    def matching_costs(self) -> list[MatchingCost]:
        """:meth:`similarity_cost`, if there are region embeddings."""
        return [(self.similarity_weight, self.similarity_cost)] if self.heads else []

    def similarity_cost(self, outputs: DetrOutputs, labels: Tensor) -> Tensor:
        """Matching cost: minus the similarity probability of the object's word (Eqs. 3 and 4).

        Args:
            outputs: result of :meth:`alter_outputs`.
            labels: Tensor [B, X] int64, padded.

        Returns:
            Tensor [L, B, N, X]; 0 until a loss trains the embeddings (``contrast_start``).
        """
        if not self._contrast_counts() and self.class_loss == "class":
            layers, images, queries, _ = outputs.pred_boxes.shape
            return outputs.pred_boxes.new_zeros((layers, images, queries, labels.shape[1]))
        words = self.bank.training_embeddings[labels]  # B x X x D
        return -similarity_logits(outputs.added[EMBEDDINGS], words, self.temperature, self.bias).sigmoid()

    def losses(
        self, step: DetrStep, outputs: DetrOutputs, matches: Sequence[Matches], num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """The losses "loss_contrast" and, if ``class_loss`` is "both", "loss_similarity"; names of layers as of the
        criterion.

        Raises:
            UsageError: the contrast needs crops of objects that the samples lack, or crops of classes that are not read.
        """
        losses: dict[str, Tensor] = {}
        if not self.heads:
            return losses
        targets = step.targets
        crops = object_crops(step.samples, targets.labels.device) if self.contrast in ("instance", "batch") else None
        for layer, pairs in enumerate(matches):
            place = "" if layer == len(matches) - 1 else f"_{layer}"
            embeddings = outputs.added[EMBEDDINGS][layer - len(matches)]
            if self.contrast != "none":
                # Times 0 before its start: DistributedDataParallel needs a gradient of the heads in every step of every process.
                loss = self._contrast(embeddings, targets, pairs, crops) / num_boxes
                losses[f"loss_contrast{place}"] = loss if self._contrast_counts() else 0.0 * loss
            if self.class_loss == "both":
                logits = self._similarity(embeddings)
                gt_classes = class_targets(logits, targets, pairs)
                focal = sigmoid_focal_loss(logits, gt_classes, self.alpha, self.gamma, "sum")
                losses[f"loss_similarity{place}"] = focal / num_boxes
        return losses

    def score(self, outputs: DetrOutputs, queries: Queries) -> DetrOutputs:
        """Replace ``pred_logits`` [L or 1, B, N, K] according to ``score`` of the constructor."""
        if self.score_by == "class":
            return outputs
        logits = outputs.pred_logits
        similarity = self._similarity(self.embed(outputs.hidden, all_layers=len(logits) > 1))
        if self.score_by == "product":
            similarity = product_logits(logits.to(similarity), similarity)
        return replace(outputs, pred_logits=similarity)

    def annotate(self, instances: Instances, queries: Queries, image: int) -> None:
        """Set ``prior_words`` of the detections: the prior word of each detection's query, -1 for none."""
        carried = queries.attached(CarriedWords)
        if carried is not None:
            words = carried.words[image][instances.queries]
            instances.prior_words = words.where(words < self.bank.num_detectable, -1)  # negative words are not shown

    def _similarity(self, embeddings):
        logits = similarity_logits(embeddings, self.bank.rows(self.training), self.temperature, self.bias)
        return logits if self.training else self.bank.best_names(logits)

    def _contrast(self, embeddings, targets, matches, crops):
        """The contrast of one layer, summed over pairs; ``embeddings`` [B, N, D]; ``crops`` None with "class"."""
        per_image, count = embeddings.shape[1], len(targets)
        if self.class_crops is not None:
            rows, labels = matches.image * per_image + matches.query, targets.labels[matches.target]
            drawn, active = self.class_crops.draw()
            return class_contrast(embeddings.flatten(0, 1), rows, labels, drawn, active, self.contrast_temperature)
        # Contrast "batch": all images of the process are treated as one.
        first = matches.image * per_image if self.contrast == "batch" else 0
        query = matches.query.new_full((count,), -1)
        query[matches.target] = first + matches.query
        objects = crops.embeddings, query, crops.embedded & (query >= 0)
        if self.contrast == "batch":
            embeddings, objects = embeddings.flatten(0, 1)[None], [part[None] for part in objects]
        else:
            with torch.autocast(embeddings.device.type, enabled=False):
                objects = [targets.padded(part) for part in objects]
        teacher, query, valid = objects
        return pair_contrast(embeddings, teacher, query, valid, self.contrast_temperature)

    def _contrast_counts(self):
        """Whether the contrast is active; True outside of a training loop."""
        try:
            return self.contrast != "none" and get_event_storage().iter >= self.contrast_start
        except AssertionError:  # Detectron2 raises this outside of a training loop
            return True


def object_crops(samples: Sequence[Sample], device: torch.device) -> ObjectCrops:
    """Concatenate the crop embeddings of the objects of all samples.

    Raises:
        UsageError: a sample has none.
    """
    if any(ObjectCrops not in sample.attachments for sample in samples):
        raise UsageError(NO_CROPS)
    of_samples = [sample.attached(ObjectCrops) for sample in samples]
    with torch.autocast("cpu", enabled=False):  # CPU autocast cannot concatenate float16
        embeddings = torch.cat([crops.embeddings for crops in of_samples])
    embedded = torch.cat([crops.embedded for crops in of_samples])
    return ObjectCrops(embeddings.to(device, non_blocking=True), embedded.to(device, non_blocking=True))
