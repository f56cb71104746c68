"""Classifiers over region features: by cosine to text embeddings, and the closed linear layer it is compared with.

Shapes: R regions, C channels, K words, B base words, D embedding dimension.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from ovdet2.errors import UsageError


class EmbeddingProjection(nn.Linear):
    """Region features into the teacher's space, at unit length."""

    def __init__(self, input_dim, embed_dim, bias=True):
        """
        Args:
            input_dim: C, of the flattened features.
            embed_dim: D.
            bias: whether the linear map has one.
        """
        super().__init__(input_dim, embed_dim, bias)
        nn.init.normal_(self.weight, std=0.01)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, features):
        """Tensor [R, C], or [R, ...] of C values each -> unit Tensor [R, D], float32."""
        return F.normalize(super().forward(features.flatten(1)).float(), dim=1)


def column_probabilities(embeddings, columns, temperature):
    """Softmax over the columns of cosine over temperature, without autocast: half precision cannot resolve it.

    Args:
        embeddings: Tensor [R, D], unit rows.
        columns: Tensor [K, D], unit rows.
        temperature: tau > 0.

    Returns:
        Tensor [R, K] float32.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return (embeddings.float() @ columns.float().T / temperature).softmax(dim=1)


class _WordClassifier(nn.Module):
    """What classifiers over a vocabulary share: projected features, the words of the mode, the background's label."""

    def __init__(self, input_dim, vocabulary, temperature, bias=True):
        super().__init__()
        self.vocabulary = vocabulary
        self.temperature = temperature
        self.projection = EmbeddingProjection(input_dim, vocabulary.embeddings.shape[1], bias)

    @property
    def num_training_classes(self):
        """B: the label that means background in training."""
        return self.vocabulary.words.num_base

    @property
    def words(self):
        """Unit rows: [B, D] of the base words in training, [K, D] at test."""
        return self.vocabulary.training_embeddings if self.training else self.vocabulary.embeddings

    def embed(self, features):
        """Region embeddings: Tensor [R, C] -> unit Tensor [R, D], float32."""
        return self.projection(features)


class TextClassifier(_WordClassifier):
    """Logits ``cos(e, [t_1 .. t_K, e_bg]) / tau`` with a learned background embedding (ViLD Eq. 2).

    With ``per_word`` each word is a decision of its own, ``cos(e, t_k) / tau + b`` for a sigmoid, and the background
    has no embedding: its logit is 0, which wins where no word reaches a probability of one half.

    In training only the B base columns and the background exist; at test the whole vocabulary does.
    """

    def __init__(self, input_dim, vocabulary, temperature=0.01, per_word=False):
        """
        Args:
            input_dim: C.
            vocabulary: :class:`~ovdet2.layers.WordBank`; B in training is read from it.
            temperature: tau > 0, the same in training and at test.
            per_word: logits for a sigmoid instead of a softmax.
        """
        super().__init__(input_dim, vocabulary, temperature)
        self.per_word = per_word
        if per_word:
            # A probability of 0.01 at the start, as for focal loss: else the many negatives drown the first steps.
            self.bias = nn.Parameter(torch.tensor(math.log(0.01 / 0.99)))
        else:
            self.background = nn.Parameter(torch.empty(vocabulary.embeddings.shape[1]))
            nn.init.normal_(self.background, std=0.01)

    def forward(self, features):
        """
        Args:
            features: Tensor [R, C].

        Returns:
            Tensor [R, B + 1] in training, [R, K + 1] at test; background last; float32.
        """
        embeddings = self.embed(features)
        with torch.autocast(features.device.type, enabled=False):  # half precision cannot resolve cos / 0.01
            if self.per_word:
                logits = embeddings @ self.words.T / self.temperature + self.bias
                return F.pad(logits, (0, 1))
            columns = torch.cat([self.words, F.normalize(self.background.float(), dim=0)[None]])
            return embeddings @ columns.T / self.temperature


class TextBackgroundClassifier(_WordClassifier):
    """Logits ``cos(e, [t_1 .. t_K, t_bg]) / (s tau)``: the background is a text, s is learned (F-VLM).

    t_bg is the teacher's embedding of the word "background", frozen, and the projection has no bias. s starts at 1 and
    is learned as its logarithm, which keeps it positive and lets weight decay pull it to 1.
    """

    per_word = False  # its logits are for a softmax

    def __init__(self, input_dim, vocabulary, temperature=0.01):
        """
        Args:
            input_dim: C.
            vocabulary: :class:`~ovdet2.layers.WordBank` with a ``background``; B in training is read from it.
            temperature: tau > 0.

        Raises:
            UsageError: the vocabulary has no background.
        """
        super().__init__(input_dim, vocabulary, temperature, bias=False)
        if vocabulary.background is None:
            raise UsageError("a text background needs the embedding of the word: give WordBank a background.")
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, features):
        """
        Args:
            features: Tensor [R, C].

        Returns:
            Tensor [R, B + 1] in training, [R, K + 1] at test; background last; float32.
        """
        embeddings = self.embed(features)
        with torch.autocast(features.device.type, enabled=False):
            columns = torch.cat([self.words, self.vocabulary.background[None]])
            return embeddings @ columns.T / (self.temperature * self.log_scale.exp())


class ClosedSetClassifier(nn.Linear):
    """A linear layer over the fixed words it was built with: the sanity row whose novel AP must be about 0.

    It has a column for every word, so it is asked about novel ones too, but no training box ever supports them.
    """

    per_word = False  # its logits are for a softmax

    def __init__(self, input_dim, vocabulary):
        """
        Args:
            input_dim: C.
            vocabulary: :class:`~ovdet2.layers.WordBank`; K is fixed to its present length.
        """
        super().__init__(input_dim, len(vocabulary.words) + 1)
        self.vocabulary = vocabulary
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    @property
    def num_training_classes(self):
        """K: every word has a column in training."""
        return self.out_features - 1

    def forward(self, features):
        """
        Args:
            features: Tensor [R, C].

        Returns:
            Tensor [R, K + 1], background last.

        Raises:
            UsageError: the vocabulary is no longer the one the layer was built for.
        """
        if len(self.vocabulary.words) != self.num_training_classes:
            raise UsageError(
                f"a closed-set head of {self.num_training_classes} classes cannot take "
                f'{len(self.vocabulary.words)} words: use MODEL.OVD.CLASSIFIER "text".'
            )
        return super().forward(features)
