"""The classifier of every open-vocabulary detector: cosines of region embeddings to text embeddings.

Shapes: R regions, C channels, K words, B base words, D embedding dimension; "..." any leading dimensions.
Names: ``_logits`` before softmax or sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from ovdet2.vocabulary.bank import WordBank

Background = Literal["none", "zero", "learned", "text"]

RARE_BIAS = -math.log(99)  # initial probability 0.01, as for focal loss: else negatives dominate the first steps
MAX_SCALE = 100.0


class EmbeddingProjection(nn.Linear):
    """Linear projection of region features into the teacher's embedding space, followed by L2 normalisation."""

    def __init__(self, input_dim: int, embed_dim: int, bias: bool = True) -> None:
        """
        Args:
            input_dim: C, of the flattened features.
            embed_dim: D.
            bias: whether the linear layer has a bias.
        """
        super().__init__(input_dim, embed_dim, bias)
        nn.init.normal_(self.weight, std=0.01)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Features, Tensor [R, C], or [R, ...] of C values each -> unit Tensor [R, D], float32."""
        return F.normalize(super().forward(input.flatten(1)).float(), dim=1)


def cosine_logits(
    embeddings: Tensor,
    rows: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor | None = None,
) -> Tensor:
    """``cos(e, t) / tau + b``, or ``s cos(e, t) + b``.

    Computed in float32 also under autocast: half precision is too coarse for cosines that are divided by 0.01.

    Args:
        embeddings: e, Tensor [..., D], unit rows.
        rows: t, Tensor [K, D], unit rows; or [..., K, D], with the leading dimensions of ``embeddings``.
        temperature: tau > 0; None: 1.
        scale: s; None: 1.
        bias: b; None: none.

    Returns:
        Tensor [..., K], float32 (float64 if ``embeddings`` is).
    """
    embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    with torch.autocast(embeddings.device.type, enabled=False):
        logits = embeddings @ rows.mT.to(embeddings)
        if temperature is not None:
            logits = logits / temperature
        if scale is not None:
            logits = scale * logits
        return logits if bias is None else logits + bias


def column_probabilities(
    embeddings: Tensor,
    columns: Tensor,
    temperature: float | Tensor,
    pool: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Softmax of :func:`cosine_logits` over the columns.

    Args:
        embeddings: Tensor [R, D], unit rows.
        columns: Tensor [K, D], unit rows.
        temperature: tau > 0.
        pool: joins columns before the softmax, such as :meth:`~ovdet2.vocabulary.bank.WordBank.best_names`.

    Returns:
        Tensor [R, K] float32.
    """
    logits = cosine_logits(embeddings, columns, temperature=temperature)
    return (logits if pool is None else pool(logits)).softmax(dim=1)


class CosineClassifier(nn.Module):
    """Projects region features and classifies them by :func:`cosine_logits` with the rows of a word bank.

    In training the columns are the B base words, at test all K words. The classifiers of the methods are settings of
    this class:

    =====================  ===============  ==================  ===============  ==========
    classifier             logits           learned factor      bias             background
    =====================  ===============  ==================  ===============  ==========
    ViLD (Eq. 2)           cos / tau        no                  no               "learned"
    R-CNN, sigmoid         cos / tau + b    no                  yes              "zero"
    F-VLM                  cos / (s tau)    of the temperature  no               "text"
    DETR                   s cos + b        scale               yes              "none"
    =====================  ===============  ==================  ===============  ==========

    Attributes:
        vocabulary: the word bank; "vocabulary" is its name in checkpoints.
        background_kind: see the constructor's ``background``.
    """

    vocabulary: WordBank
    log_scale: nn.Parameter | None
    bias: nn.Parameter | None
    background: nn.Parameter | None

    def __init__(
        self,
        input_dim: int,
        bank: WordBank,
        *,
        temperature: float | None = None,
        scale: float | None = None,
        learns_temperature: bool = False,
        bias: float | None = None,
        background: Background = "none",
        projection_bias: bool = True,
        owns_bank: bool = True,
    ) -> None:
        """
        Args:
            input_dim: C.
            bank: word bank; its words may change at any time.
            temperature: tau > 0, the same in training and at test. Give either ``temperature`` or ``scale``.
            scale: initial value of a learned s, which is clamped to at most 100.
            learns_temperature: learn a factor s of tau, which starts at 1. The parameter is log s, so that s stays
                positive and weight decay moves it to 1.
            bias: initial value of a learned b; None: no bias.
            background: the last column. "none": no column; "zero": its logit is 0, the highest if no word reaches a
                probability of one half; "learned": a learned embedding; "text": the bank's embedding of "background".
            projection_bias: whether the projection of the features has a bias.
            owns_bank: whether the bank is a sub-module, saved and moved with the classifier; False if several
                classifiers of a detector share it.

        Raises:
            UsageError: a scale outside (0, 100], or a text background and a bank without background.
        """
        super().__init__()
        if (temperature is None) == (scale is None) or (learns_temperature and temperature is None):
            raise ValueError("give either a temperature, fixed or learned, or a scale")
        if scale is not None and not 0 < scale <= MAX_SCALE:
            raise UsageError(
                f"the initial scale of the text classifier is {scale}: choose one in (0, {MAX_SCALE:.0f}]."
            )
        if background == "text" and bank.background is None:
            raise UsageError("a text background needs the embedding of the word: give WordBank a background.")
        if owns_bank:
            self.vocabulary = bank
        else:
            # Not a sub-module: otherwise state_dict would hold the bank once per classifier.
            object.__setattr__(self, "vocabulary", bank)
        self.temperature = temperature
        self.background_kind = background
        embed_dim = bank.embeddings.shape[1]
        self.projection = EmbeddingProjection(input_dim, embed_dim, projection_bias)
        self.log_scale = self.bias = self.background = None
        if scale is not None:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        elif learns_temperature:
            self.log_scale = nn.Parameter(torch.zeros(()))
        if bias is not None:
            self.bias = nn.Parameter(torch.tensor(bias))
        if background == "learned":
            self.background = nn.Parameter(torch.empty(embed_dim))
            nn.init.normal_(self.background, std=0.01)

    @property
    def per_word(self) -> bool:
        """Whether each logit goes through a sigmoid, instead of a softmax over the words."""
        return self.background_kind in ("none", "zero")

    @property
    def num_training_classes(self) -> int:
        """B, the number of training classes and the label of background in training."""
        return self.vocabulary.num_base

    def embed(self, features: Tensor) -> Tensor:
        """Region embeddings.

        Args:
            features: Tensor [..., C], or maps [R, c, h, w] of C values each.

        Returns:
            Tensor [..., D] or [R, D], unit rows, float32.
        """
        if features.ndim < 3 or features.shape[-1] != self.projection.in_features:
            return self.projection(features)
        return self.projection(features.flatten(0, -2)).unflatten(0, features.shape[:-1])

    def classify_without_background(self, embeddings: Tensor) -> Tensor:
        """Softmax over all words without background, as in ViLD's image branch: Tensor [R, D] -> [R, K]."""
        logits = cosine_logits(embeddings, self.vocabulary.rows(training=False), **self.factor())
        return self.vocabulary.best_names(logits).softmax(dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """
        Args:
            features: Tensor [..., C], or maps [R, c, h, w] of C values each.

        Returns:
            Logits, Tensor [..., B] in training, [..., K] at test, float32; with a background one more column, the last.
        """
        embeddings = self.embed(features)
        with torch.autocast(features.device.type, enabled=False):
            logits = cosine_logits(embeddings, self._columns(), **self.factor(), bias=self.bias)
            if not self.training:
                logits = self.vocabulary.best_names(logits)
            return F.pad(logits, (0, 1)) if self.background_kind == "zero" else logits

    def _columns(self) -> Tensor:
        words = self.vocabulary.rows(self.training)
        if self.background is not None:  # "learned"
            return torch.cat([words, F.normalize(self.background.float(), dim=0)[None]])
        if self.background_kind == "text":
            background = self.vocabulary.background
            assert background is not None  # the constructor requires one, and the bank never drops it
            return torch.cat([words, background[None]])
        return words

    def factor(self) -> dict[str, float | Tensor]:
        """tau or s as a keyword argument of :func:`cosine_logits`."""
        log_scale = self.log_scale
        if self.temperature is not None:
            return {"temperature": self.temperature if log_scale is None else self.temperature * log_scale.exp()}
        assert log_scale is not None  # without a temperature the constructor makes one
        with torch.no_grad():  # clamps the parameter: a clamped output would have no gradient above the maximum
            log_scale.clamp_(max=math.log(MAX_SCALE))
        return {"scale": log_scale.exp()}
