"""Attribute vectors of ground-truth objects: word embedding and box geometry (CLIP-DETR, Eq. 2 and 3).

Shapes: M objects of a batch, D text embedding, C channels.
Names: ``_cxcywh`` boxes (centre x, centre y, width, height).
"""

import torch
from torch import Tensor, nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.targets import Targets
from ovdet2.vocabulary.bank import WordBank

GEOMETRY = {"label": 0, "label+scale": 2, "label+box": 4}  # number of the last columns of (cx, cy, w, h) used


class ObjectAttributes(nn.Module):
    """A linear layer on an object's text embedding and its box geometry."""

    def __init__(
        self, dim: int, bank: WordBank, features: str = "label+scale", label_table: WordBank | None = None
    ) -> None:
        """
        Args:
            dim: C.
            bank: word bank of the detector; not a submodule of this module.
            features: "label"; "label+scale": also width and height (the paper's choice); "label+box": also the centre;
                normalised by the image size.
            label_table: embeddings of the same base words by another teacher; None: the detector's.

        Raises:
            UsageError: ``features`` is unknown.
        """
        super().__init__()
        if features not in GEOMETRY:
            raise UsageError(f"MODEL.CLIP_DETR.ATTRIBUTES is {features!r}: choose one of {', '.join(GEOMETRY)}.")
        self._shared = (bank,)  # a tuple hides it from state_dict: it is the detector's
        self.label_table = label_table
        self.first = 4 - GEOMETRY[features]
        self.projection = nn.Linear(self.words.embeddings.shape[1] + GEOMETRY[features], dim)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    @property
    def words(self) -> WordBank:
        """The word bank with the label embeddings."""
        return self._shared[0] if self.label_table is None else self.label_table

    def forward(self, targets: Targets) -> Tensor:
        """z_attr of the objects.

        Args:
            targets: the ground-truth objects.

        Returns:
            Tensor [M, C], float32 (float64 if the layer is).

        Raises:
            UsageError: a label is not a base word.
        """
        table = self.words.training_embeddings
        if targets.label_limit > len(table):
            raise UsageError(
                f"the batch has an object of class {targets.label_limit - 1}, but there are {len(table)} base words; "
                f"images {', '.join(targets.names)}: train on the data set whose base classes the vocabulary has."
            )
        with torch.autocast(table.device.type, enabled=False):  # half precision would round the sizes
            known = torch.cat([table[targets.labels], targets.boxes_cxcywh[:, self.first :].to(table)], dim=1)
            return self.projection(known.to(self.projection.weight.dtype))
