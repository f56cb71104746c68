"""Dynamic query learning: sets of queries that start from objects under more or less noise (CLIP-DETR, Eq. 6 to 9).

Shapes: B images, M objects of the batch, X the most of one image, S sets, N conventional queries, C channels. The
G = S X dynamic queries of an image follow its conventional ones, set after set; some members are padding.
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
from ovdet2.modeling.detr.memory import Queries
from ovdet2.modeling.detr.part import ExtraQueries
from ovdet2.modeling.detr.position_encoding import box_position
from ovdet2.modeling.detr.targets import Matches, Targets

_LOGGED = 20  # images with too many objects

# Boxes are corrected before a sigmoid: where it is saturated, as at a side of 1, no gradient would move them.
_CENTRES, _SIDES = (0.01, 0.99), (0.001, 0.99)


class BoxEncoder(nn.Module):
    """Positions of boxes as a two-stage detector encodes them, for one whose own queries have learned positions."""

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
    """Queries that the decoder takes with the conventional ones.

    Attributes:
        extra: the S X queries of each image, and what they must not see.
        matches: of all members that are no padding, by their place among the S X.
        sets: S.
        objects: members of a set that are no padding, over all images.
    """

    extra: ExtraQueries
    matches: Matches
    sets: int
    objects: int


class DynamicQueries(nn.Module):
    """Makes the sets; without parameters unless it encodes positions itself."""

    def __init__(
        self,
        betas: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        rho: float = 1.0,
        signed: bool = True,
        max_objects: int = 100,
        box_encoder: BoxEncoder | None = None,
    ) -> None:
        """
        Args:
            betas: share of noise in the content of each of the S sets, 0 to 1.
            rho: most that centres are shifted, in halves of the box's sides, and that sides are stretched, in
                themselves.
            signed: shifts and stretches are of either sign, as DINO's are. As the paper writes them they are not:
                centres go to the right and down, and boxes only grow.
            max_objects: of an image; of more as many are drawn.
            box_encoder: for a detector with learned positions, whose references are points; None:
                the detector encodes boxes itself.

        Raises:
            UsageError: no set, a share outside of [0, 1], a negative rho, or no object.
        """
        super().__init__()
        if not betas or min(betas) < 0 or max(betas) > 1 or rho < 0 or max_objects < 1:
            raise UsageError(
                f"MODEL.CLIP_DETR has BETAS {list(betas)}, RHO {rho} and MAX_OBJECTS {max_objects}: give one share of "
                "noise from 0 to 1 for each set, and let RHO be 0 or more and MAX_OBJECTS at least 1."
            )
        self.register_buffer("betas", torch.tensor(betas), persistent=False)
        self.rho, self.signed, self.max_objects = rho, signed, max_objects
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
            queries: the conventional ones.
            targets: the objects.
            attributes: Tensor [M, C], z_attr.
            encode_position: the detector's, Tensor [B, n, 4] -> [B, n, C]; not called where there is a box encoder.
            heads: H of the decoder.

        Returns:
            The sets; their noise is of torch's global generator.
        """
        rows, counts = self._draw(targets)
        rows, sets = rows.to(attributes.device), len(self.betas)
        attributes, boxes = attributes[rows], targets.boxes_cxcywh[rows].to(queries.references)
        noise = torch.randn(len(rows), sets, attributes.shape[1], dtype=attributes.dtype, device=rows.device)
        content = padded_sets(noisy_content(attributes, noise, self.betas.to(attributes)), counts)
        shares = torch.rand(len(rows), sets, 4, dtype=boxes.dtype, device=rows.device)
        references = padded_sets(moved_boxes(boxes, shares, self.rho, self.signed), counts)
        position = (self.box_encoder or encode_position)(references)
        if self.box_encoder is not None:
            references = references[..., :2]
        conventional = queries.content.shape[1]
        hidden = hidden_from(conventional, sets, counts, rows.device)[:, conventional:].repeat_interleave(heads, dim=0)
        extra = ExtraQueries(Queries(content, position, references), hidden)
        return DynamicSets(extra, set_members(counts, sets, rows), sets, len(rows))

    def _draw(self, targets):
        """(rows of the objects that are used, Tensor on the CPU; how many those are in each image)."""
        rows, start = [], 0
        for name, count in zip(targets.names, targets.counts):
            if count > self.max_objects:
                message = f"{name}: dynamic queries for {self.max_objects} of its {count} objects, drawn."
                log_first_n(logging.INFO, message, _LOGGED, name=__name__)
                rows.append(start + torch.randperm(count)[: self.max_objects])
            else:
                rows.append(torch.arange(start, start + count))
            start += count
        return torch.cat(rows), tuple(map(len, rows))


def noisy_content(attributes: Tensor, noise: Tensor, betas: Tensor) -> Tensor:
    """Contents of queries: sqrt(beta_s) noise + sqrt(1 - beta_s) z_attr (Eq. 6).

    Attributes are normalised first, by layer norm without weights: the linear layer gives them any scale, which beside
    noise of variance 1 would be negligible or dominant.

    Args:
        attributes: Tensor [M, C].
        noise: Tensor [M, S, C].
        betas: Tensor [S].

    Returns:
        Tensor [M, S, C].
    """
    known = F.layer_norm(attributes, attributes.shape[1:])[:, None]
    return betas[:, None].sqrt() * noise + (1 - betas[:, None]).sqrt() * known


def moved_boxes(boxes_cxcywh: Tensor, shares: Tensor, rho: float, signed: bool = True) -> Tensor:
    """Shifted and stretched boxes: centre + lambda sides / 2, sides + lambda sides (Eq. 7), lambda of each number.

    Args:
        boxes_cxcywh: Tensor [M, 4] in [0, 1].
        shares: Tensor [M, S, 4] in [0, 1), uniform.
        rho: lambda is uniform in (-rho, rho), or in (0, rho).
        signed: which of the two.

    Returns:
        Tensor [M, S, 4], centres clamped to [0.01, 0.99], sides to [0.001, 0.99].
    """
    degree = rho * (2 * shares - 1) if signed else rho * shares
    centre, sides = boxes_cxcywh[:, None].split(2, dim=-1)
    centre = (centre + degree[..., :2] * sides / 2).clamp(*_CENTRES)
    return torch.cat([centre, (sides + degree[..., 2:] * sides).clamp(*_SIDES)], dim=-1)


def padded_sets(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Members of the sets of every image.

    Args:
        rows: Tensor [M, S, ...], those of the first image first.
        counts: B ints, whose sum is M.

    Returns:
        Tensor [B, S X, ...], 0 where padded.
    """
    return pad_sequence(list(rows.split(counts)), batch_first=True).transpose(1, 2).flatten(1, 2)


def hidden_from(conventional: int, sets: int, counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Which query must not see which (Eq. 9): a set sees itself and the conventional queries, and these themselves.

    A padded member is hidden from all, but sees the conventional queries: the attention of no row is empty.

    Args:
        conventional: N.
        sets: S.
        counts: B ints, the members of each image's sets.
        device: of the result.

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
    """The object that each member of a set stands for.

    Args:
        counts: B ints, the members of each image's sets.
        sets: S.
        rows: Tensor [M'] int64, M' the sum of the counts: rows of the targets.

    Returns:
        S M' pairs, queries counted from the first dynamic one.
    """
    largest = max(counts)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    place = torch.cat([torch.arange(count) for count in counts])
    query = (torch.arange(sets)[:, None] * largest + place).flatten()
    image, query = image.to(rows.device), query.to(rows.device)
    return Matches(image.repeat(sets), query, rows.repeat(sets))
