"""CCKT-Det on Deformable DETR: language goes in with the queries, the teacher's vision is asked for at their end.

Shapes: L decoder layers, B images, N queries, K words, X the most objects of one image, C channels, D embedding
dimension.
"""

import math

import torch
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from ovdet2.errors import UsageError
from ovdet2.layers import EmbeddingProjection, cosine_logits
from ovdet2.methods.cckt.class_crops import class_crops
from ovdet2.methods.cckt.region_contrast import ClassCrops, class_contrast, pair_contrast
from ovdet2.modeling.detr.criterion import class_targets

CONTRASTS = ("none", "instance", "batch", "class")
CLASS_LOSSES = ("class", "similarity", "both")
SCORES = ("class", "similarity", "product")
_NO_CROPS = (
    "the objects come without the teacher's embeddings, which MODEL.CCKT.CONTRAST needs: use ovdet2's mapper, with "
    "MODEL.CCKT.REGION_CACHE."
)


def similarity_logits(embeddings, words, temperature, bias=0.0):
    """cos(e, t) / tau + b, whose sigmoid is the similarity probability (Eq. 4, where b is 0).

    Args:
        embeddings: Tensor [..., D], unit rows.
        words: Tensor [K, D], unit rows; with leading dimensions, those of ``embeddings``.
        temperature: tau.
        bias: b.

    Returns:
        Tensor [..., K], float32 (float64 if ``embeddings`` is).
    """
    return cosine_logits(embeddings, words, temperature=temperature, bias=bias)


def product_logits(first, second):
    """The logit of the product of two probabilities given by their logits, without computing the product."""
    log_product = F.logsigmoid(first) + F.logsigmoid(second)
    log_product = log_product.clamp(max=-torch.finfo(log_product.dtype).tiny)  # not certain, or the logit is infinite
    # log(1 - exp(x)) by the way that is accurate on its side of log(1/2).
    near_one = log_product > -math.log(2)
    rest = torch.where(near_one, torch.log(-torch.expm1(log_product)), torch.log1p(-torch.exp(log_product)))
    return log_product - rest


class CCKT(nn.Module):
    """What CCKT-Det adds to the detector: semantic priors, region embedding heads, contrastive distillation and
    scores by similarity. Each part may be absent."""

    def __init__(
        self,
        vocabulary,
        priors=None,
        dim=256,
        num_heads=0,
        *,
        temperature=0.07,
        bias=0.0,
        class_loss="class",
        contrast="instance",
        contrast_start=0,
        score="similarity",
        alpha=0.25,
        gamma=2.0,
    ):
        """
        Args:
            vocabulary: :class:`~ovdet2.layers.WordBank` of the detector.
            priors: :class:`~ovdet2.methods.cckt.semantic_priors.SemanticPriors`, or None.
            dim: C.
            num_heads: region embedding heads, one for each decoder layer, or 1 for all of them; made only if asked for
                by a loss.
            temperature: tau, of similarities and of the contrast.
            bias: b, of similarities.
            class_loss: the focal loss is on the logits of the "class" branch (published code), on those of "similarity"
                (Eq. 7), where the class branch is not trained, or on "both".
            contrast: "instance" (Eqs. 5 and 6, within each image), "batch" (the same, over the images of the process),
                "class" (published code), or "none".
            contrast_start: iteration from which the contrast counts; before it, unless a class loss trains the
                similarity, neither does the similarity in the matching.
            score: of a detection, by the "class" branch, by "similarity", or the "product" of the two probabilities.
            alpha, gamma: of the focal loss.

        Raises:
            UsageError: another choice, or scores that nothing trains.
        """
        super().__init__()
        for key, value, choices in (
            ("CONTRAST", contrast, CONTRASTS), ("CLASS_LOSS_ON", class_loss, CLASS_LOSSES), ("SCORE", score, SCORES)
        ):  # fmt: skip
            if value not in choices:
                raise UsageError(f"MODEL.CCKT.{key} is {value!r}: choose one of {', '.join(choices)}.")
        embeds = contrast != "none" or class_loss != "class"
        if score != "class" and not embeds:
            raise UsageError(
                f"MODEL.CCKT.SCORE is {score!r}, but neither MODEL.CCKT.CONTRAST nor CLASS_LOSS_ON trains region "
                'embeddings: set SCORE to "class", or train them.'
            )
        if score != "similarity" and class_loss == "similarity":
            raise UsageError(
                f'MODEL.CCKT.SCORE is {score!r}, but with CLASS_LOSS_ON "similarity" nothing trains the class branch: '
                'set SCORE to "similarity", or CLASS_LOSS_ON to "both".'
            )
        self._shared = (vocabulary,)  # a tuple hides it from state_dict: the detector owns it
        self.priors = priors
        embed_dim = vocabulary.embeddings.shape[1]
        self.heads = nn.ModuleList(EmbeddingProjection(dim, embed_dim) for _ in range(num_heads if embeds else 0))
        self.class_crops = ClassCrops() if contrast == "class" else None
        self.temperature, self.bias, self.alpha, self.gamma = temperature, bias, alpha, gamma
        self.class_loss, self.contrast, self.contrast_start, self.score = class_loss, contrast, contrast_start, score

    def prepare_training(self, dataset):
        """Take what the losses need of the training set: crops of every base class, with the contrast "class".

        Args:
            dataset: :class:`~ovdet2.data.loader.MappedRecords` whose mapper has a cache of annotated boxes; anything
                for the other contrasts.

        Raises:
            UsageError: there is no such cache.
            CacheError: see :func:`~ovdet2.methods.cckt.class_crops.class_crops`.
        """
        if self.class_crops is None:
            return
        cache = getattr(getattr(dataset, "mapper", None), "annotation_cache", None)
        if cache is None:
            raise UsageError(_NO_CROPS)
        num_base = len(self._shared[0].training_embeddings)
        self.class_crops.fill(*class_crops(dataset.records, cache, num_base, seed=dataset.seed))

    def add_priors(self, queries, records):
        """The queries with the words of their image, see :class:`SemanticPriors`; as they are without priors."""
        return queries if self.priors is None else self.priors(queries, records)

    def embed(self, hidden, all_layers=True):
        """Region embeddings.

        Args:
            hidden: Tensor [L, B, N, C], of all decoder layers.
            all_layers: of every layer, or of the last alone.

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

    def training_outputs(self, outputs):
        """What the criterion is to see.

        Args:
            outputs: of :meth:`~ovdet2.modeling.detr.model.DeformableDETR.decode`; of more "hidden" queries than there
                are logits, the first are meant.

        Returns:
            dict, ``outputs`` with "pred_embeddings" [L, B, N, D] if there are heads; with ``class_loss`` "similarity",
            similarity logits of the base words as "pred_logits".
        """
        if not self.heads:
            return outputs
        hidden = outputs["hidden"][:, :, : outputs["pred_logits"].shape[2]]
        outputs = outputs | {"pred_embeddings": self.embed(hidden)}
        if self.class_loss == "similarity":
            outputs["pred_logits"] = self._similarity(outputs["pred_embeddings"])
        return outputs

    def similarity_cost(self, outputs, labels):
        """Matching cost, minus the similarity probability of the object's word (Eqs. 3 and 4).

        Args:
            outputs: of :meth:`training_outputs`.
            labels: Tensor [B, X] int64, padded.

        Returns:
            Tensor [L, B, N, X]; 0 as long as nothing has trained the embeddings.
        """
        if not self._contrast_counts() and self.class_loss == "class":
            layers, images, queries, _ = outputs["pred_boxes"].shape
            return outputs["pred_boxes"].new_zeros((layers, images, queries, labels.shape[1]))
        words = self._shared[0].training_embeddings[labels]  # B x X x D
        return -similarity_logits(outputs["pred_embeddings"], words, self.temperature, self.bias).sigmoid()

    def losses(self, outputs, targets, matches, num_boxes):
        """The losses beside the criterion's, in the same layers.

        Args:
            outputs: of :meth:`training_outputs`.
            targets: :class:`~ovdet2.modeling.detr.targets.Targets`, with embeddings if the contrast is of objects.
            matches: of the criterion, the last layer's last.
            num_boxes: number or scalar Tensor > 0 that the sums are divided by.

        Returns:
            dict of unweighted scalar Tensors: "loss_contrast", and "loss_similarity" if ``class_loss`` is "both", named
            by layer as the criterion's.

        Raises:
            UsageError: a contrast is asked for, and the targets have no embeddings or the classes no crops.
        """
        losses = {}
        if not self.heads:
            return losses
        for layer, found in enumerate(matches):
            place = "" if layer == len(matches) - 1 else f"_{layer}"
            embeddings = outputs["pred_embeddings"][layer - len(matches)]
            if self.contrast != "none":
                # Times 0 before its start: the heads take part in every step of every process, as gradients want it.
                loss = self._contrast(embeddings, targets, found) / num_boxes
                losses[f"loss_contrast{place}"] = loss if self._contrast_counts() else 0.0 * loss
            if self.class_loss == "both":
                logits = self._similarity(embeddings)
                wanted = class_targets(logits, targets, found)
                focal = sigmoid_focal_loss(logits, wanted, self.alpha, self.gamma, "sum")
                losses[f"loss_similarity{place}"] = focal / num_boxes
        return losses

    def scored(self, outputs, queries):
        """What the post-processor is to see at test.

        Args:
            outputs: of :meth:`~ovdet2.modeling.detr.model.DeformableDETR.decode`.
            queries: the :class:`Queries` they come from.

        Returns:
            dict, ``outputs`` with "pred_logits" [L or 1, B, N, K] whose sigmoid is the score, and with "words" of the
            queries, where they carry any.
        """
        logits = outputs["pred_logits"]
        if self.score != "class":
            similarity = self._similarity(self.embed(outputs["hidden"], all_layers=len(logits) > 1))
            logits = similarity if self.score == "similarity" else product_logits(logits.to(similarity), similarity)
        return outputs | {"pred_logits": logits, "words": queries.words}

    def _similarity(self, embeddings):
        vocabulary = self._shared[0]
        rows = vocabulary.training_embeddings if self.training else vocabulary.embeddings
        return similarity_logits(embeddings, rows, self.temperature, self.bias)

    def _contrast(self, embeddings, targets, matches):
        """The sum over pairs of one layer; ``embeddings`` [B, N, D]."""
        per_image, count = embeddings.shape[1], len(targets)
        if self.contrast == "class":
            rows, labels = matches.image * per_image + matches.query, targets.labels[matches.target]
            return class_contrast(embeddings.flatten(0, 1), rows, labels, *self.class_crops.draw(), self.temperature)
        if targets.embeddings is None:
            raise UsageError(_NO_CROPS)
        # A batch is one large image.
        first = matches.image * per_image if self.contrast == "batch" else 0
        query = matches.query.new_full((count,), -1)
        query[matches.target] = first + matches.query
        objects = targets.embeddings, query, targets.embedded & (query >= 0)
        if self.contrast == "batch":
            embeddings, objects = embeddings.flatten(0, 1)[None], [part[None] for part in objects]
        else:
            with torch.autocast(embeddings.device.type, enabled=False):
                objects = [targets.padded(part) for part in objects]
        return pair_contrast(embeddings, *objects, self.temperature)

    def _contrast_counts(self):
        """Whether the contrast has begun; outside of a training loop it has."""
        try:
            return self.contrast != "none" and get_event_storage().iter >= self.contrast_start
        except AssertionError:  # Detectron2's way to say that there is no loop
            return True
