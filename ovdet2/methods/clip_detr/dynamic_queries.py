"""Dynamic query learning: sets of denoising queries from noised ground truth (CLIP-DETR, Eq. 6 to 9).

Shapes: B images, M objects of the batch, X the most of one image, S sets, N conventional queries, C channels. The
G = S X dynamic queries of an image follow its conventional ones, set after set; some members are padding.
Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from ovdet2.errors import UsageError
from ovdet2.methods.clip_detr.box_noise import SHIFTS, moved_boxes
from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.part import ExtraQueries
from ovdet2.modeling.detr.position_encoding import box_position
from ovdet2.modeling.detr.targets import Matches, Targets

_LOGGED = 20  # images with too many objects


class BoxEncoder(nn.Module):
    """Position encoding of boxes as in a two-stage detector, for detectors whose queries have learned positions."""

    def __init__(self, dim: int) -> None:
        """
        Args:
            dim: C, a multiple of 4.
        """
        super().__init__()
        self.dim = dim
        self.linear, self.norm = nn.Linear(2 * dim, dim), nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, boxes_cxcywh: Tensor) -> Tensor:
        """Tensor [B, N, 4] in [0, 1] -> [B, N, C]."""
        return self.norm(self.linear(box_position(boxes_cxcywh, self.dim // 2)))


@dataclass(frozen=True)
class DynamicSets:
    """Sets of dynamic queries, which are decoded together with the conventional ones.

    Attributes:
        extra: the S X queries of each image, with their attention mask.
        matches: objects of all members without padding, indexed by their position among the S X.
        sets: S.
        objects: number of members of one set without padding, over all images.
    """

    extra: ExtraQueries
    matches: Matches
    sets: int
    objects: int


class DynamicQueries(nn.Module):
    """Builds the sets of dynamic queries; it has parameters only with a ``box_encoder``."""

    def __init__(
        self,
        betas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        rho: float = 1.0,
        shift: str = "literal",
        max_objects: int = 100,
        box_encoder: BoxEncoder | None = None,
    ) -> None:
        """
        Args:
            betas: fraction of noise in the content of each of the S sets, 0 to 1.
            rho: bound of the noise, see :mod:`~ovdet2.methods.clip_detr.box_noise`.
            shift: "literal", the paper's equation; "signed"; or "corners", DINO's rule.
            max_objects: maximum number of objects of an image; if there are more, this number is drawn.
            box_encoder: for a detector with learned positions, whose references are points; None: the detector encodes
                boxes.

        Raises:
            UsageError: there is no set, a fraction is outside of [0, 1], rho is negative, ``shift`` is unknown, or
                ``max_objects`` is below 1.
        """
        super().__init__()
        if not betas or min(betas) < 0 or max(betas) > 1 or rho < 0 or max_objects < 1:
            raise UsageError(
                f"MODEL.CLIP_DETR has BETAS {list(betas)}, RHO {rho} and MAX_OBJECTS {max_objects}: give one fraction of "
                "noise from 0 to 1 for each set, RHO of at least 0 and MAX_OBJECTS of at least 1."
            )
        if shift not in SHIFTS:
            raise UsageError(f"shift is {shift!r}: choose one of {', '.join(SHIFTS)}.")
        self.register_buffer("betas", torch.tensor(betas), persistent=False)
        self.rho, self.shift, self.max_objects = rho, shift, max_objects
        self.box_encoder = box_encoder

    def forward(
        self,
        queries: Queries,
        targets: Targets,
        attributes: Tensor,
        encode_position: Callable[[Tensor], Tensor],
        heads: int,
    ) -> DynamicSets:
        """
        Args:
            queries: the conventional queries.
            targets: the ground-truth objects.
            attributes: Tensor [M, C], z_attr.
            encode_position: the detector's function, Tensor [B, n, 4] -> [B, n, C]; not called with a box encoder.
            heads: number of attention heads of the decoder.

        Returns:
            The sets; noise is drawn from torch's global generator.
        """
        rows, counts = self._draw(targets)
        rows, sets = rows.to(attributes.device), len(self.betas)
        attributes, boxes = attributes[rows], targets.boxes_cxcywh[rows].to(queries.references)
        noise = torch.randn(len(rows), sets, attributes.shape[1], dtype=attributes.dtype, device=rows.device)
        content = padded_sets(noisy_content(attributes, noise, self.betas.to(attributes)), counts)
        shares = torch.rand(len(rows), sets, 4, dtype=boxes.dtype, device=rows.device)
        references = padded_sets(moved_boxes(boxes, shares, self.rho, self.shift), counts)
        position = (self.box_encoder or encode_position)(references)
        if self.box_encoder is not None:
            references = references[..., :2]
        conventional = queries.content.shape[1]
        hidden = hidden_from(conventional, sets, counts, rows.device)[:, conventional:].repeat_interleave(heads, dim=0)
        extra = ExtraQueries(Queries(content, position, references), hidden)
        return DynamicSets(extra, set_members(counts, sets, rows), sets, len(rows))

    def _draw(self, targets):
        """(rows of the objects that are used, Tensor on the CPU; number of them in each image)."""
        rows, start = [], 0
        for name, count in zip(targets.names, targets.counts):
            if count > self.max_objects:
                message = f"{name}: dynamic queries of {self.max_objects} of its {count} objects, drawn at random."
                log_first_n(logging.INFO, message, _LOGGED, name=__name__)
                rows.append(start + torch.randperm(count)[: self.max_objects])
            else:
                rows.append(torch.arange(start, start + count))
            start += count
        return torch.cat(rows), tuple(map(len, rows))


def noisy_content(attributes: Tensor, noise: Tensor, betas: Tensor) -> Tensor:
    """Content of dynamic queries: sqrt(beta_s) noise + sqrt(1 - beta_s) LN(z_attr) (Eq. 6).

    Layer norm without weights normalises the attributes. Otherwise their scale, which the linear layer learns, could be
    negligible or dominant compared with noise of variance 1.

    Args:
        attributes: Tensor [M, C].
        noise: Tensor [M, S, C].
        betas: Tensor [S].

    Returns:
        Tensor [M, S, C].
    """
    known = F.layer_norm(attributes, attributes.shape[1:])[:, None]
    return betas[:, None].sqrt() * noise + (1 - betas[:, None]).sqrt() * known


def padded_sets(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Arrange rows of objects as padded sets of every image.

    Args:
        rows: Tensor [M, S, ...], in the order of the images.
        counts: B ints with sum M, the number of objects of each image.

    Returns:
        Tensor [B, S X, ...], 0 where padded.
    """
    return pad_sequence(list(rows.split(counts)), batch_first=True).transpose(1, 2).flatten(1, 2)


def hidden_from(conventional: int, sets: int, counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Self-attention mask (Eq. 9): a set attends to itself and the conventional queries, these only to each other.

    Padding is hidden from all queries but attends to the conventional ones, so that no row is fully masked.

    Args:
        conventional: N.
        sets: S.
        counts: B ints, number of members of each set of an image.
        device: device of the result.

    Returns:
        Tensor [B, N + S X, N + S X] bool, True where the column is hidden from the row.
    """
    largest = max(counts)
    groups = torch.arange(sets, device=device).repeat_interleave(largest)
    groups = F.pad(groups, (conventional, 0), value=-1)
    others = (groups[:, None] != groups) & (groups >= 0)
    padding = torch.arange(largest, device=device) >= torch.tensor(counts, device=device)[:, None]  # B x X
    padding = F.pad(padding.repeat(1, sets), (conventional, 0), value=False)
    return others | padding[:, None]


def set_members(counts: Sequence[int], sets: int, rows: Tensor) -> Matches:
    """The pairs of dynamic queries and the objects that they are built from.

    Args:
        counts: B ints, number of members of each set of an image.
        sets: S.
        rows: Tensor [M'] int64, M' the sum of the counts: rows of the targets.

    Returns:
        S M' pairs; query indices start at the first dynamic query.
    """
    largest = max(counts)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    place = torch.cat([torch.arange(count) for count in counts])
    query = (torch.arange(sets)[:, None] * largest + place).flatten()
    image, query = image.to(rows.device), query.to(rows.device)
    return Matches(image.repeat(sets), query, rows.repeat(sets))
