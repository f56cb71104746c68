"""What is read from a query: its box and its class logits.

Shapes: B images, N queries, C channels, D embedding, K words.
"""

import math

import torch
from torch import nn

from ovdet2.errors import UsageError
from ovdet2.layers.text_classifier import EmbeddingProjection

_PRIOR_BIAS = -math.log(99)  # a probability of 0.01, so that the many negatives do not drown the first steps
_MAX_LOG_SCALE = math.log(100)


def inverse_sigmoid(x, eps=1e-5):
    """Logit of values in [0, 1]; a value or its complement below ``eps`` counts as ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class BoxHead(nn.Module):
    """Three layers from a query to the logits of (cx, cy, w, h), or to a change of a reference's logits."""

    def __init__(self, dim, size_bias=0.0):
        """
        Args:
            dim: C.
            size_bias: initial logit of width and height; -2 means boxes of 0.12 of the image at first.
        """
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        nn.init.constant_(self.layers[-1].bias[2:], size_bias)

    def forward(self, hidden):
        """Tensor [..., C] -> [..., 4], float32 at least."""
        return in_full_precision(self.layers[2], self.layers[1](self.layers[0](hidden).relu()).relu())


class ClosedSetBranch(nn.Linear):
    """A column of weights per class: the closed-set detector, and the sanity row that knows no novel class."""

    def __init__(self, dim, num_classes):
        """
        Args:
            dim: C.
            num_classes: K.
        """
        super().__init__(dim, num_classes)
        nn.init.constant_(self.bias, _PRIOR_BIAS)

    def forward(self, hidden):
        """Tensor [B, N, C] -> logits [B, N, K], float32 at least."""
        return in_full_precision(super().forward, hidden)


class TextBranch(nn.Module):
    """Logits ``s cos(e, t_k) + b`` with learned s and b, for a sigmoid per word."""

    def __init__(self, dim, vocabulary, scale=1 / 0.07):
        """
        Args:
            dim: C.
            vocabulary: :class:`~ovdet2.layers.WordBank` of the detector, which every layer's branch reads and
                none owns; base columns in training, all words at test.
            scale: initial s, at most 100, where it stays capped.
        """
        super().__init__()
        if not 0 < scale <= 100:
            raise UsageError(f"the scale of the text branch starts at {scale}: choose one in (0, 100].")
        self._shared = (vocabulary,)  # a tuple hides it from state_dict, where it would stand once for each layer
        self.projection = EmbeddingProjection(dim, vocabulary.embeddings.shape[1])
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(_PRIOR_BIAS))

    @property
    def vocabulary(self):
        """The detector's :class:`~ovdet2.layers.WordBank`."""
        return self._shared[0]

    def embed(self, hidden):
        """Tensor [B, N, C] -> unit embeddings e [B, N, D], float32."""
        return self.projection(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def forward(self, hidden):
        """Tensor [B, N, C] -> logits [B, N, base words] in training, [B, N, K] at test; float32."""
        words = self.vocabulary.training_embeddings if self.training else self.vocabulary.embeddings
        embeddings = self.embed(hidden)
        with torch.no_grad():  # the parameter itself: beyond a cap on its value no gradient would bring it back
            self.log_scale.clamp_(max=_MAX_LOG_SCALE)
        with torch.autocast(hidden.device.type, enabled=False):  # half precision cannot resolve cosines times 100
            scale = self.log_scale.float().exp()
            return scale * (embeddings @ words.T.to(embeddings.dtype)) + self.bias.float()


def in_full_precision(layer, hidden):
    """``layer(hidden)`` in float32 at least, under autocast too: in bfloat16 a logit of 3 is known to 0.016."""
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.to(torch.promote_types(hidden.dtype, torch.float32)))
