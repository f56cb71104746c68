"""What training knows of an object as one vector: its word and its size (CLIP-DETR, Eq. 2 and 3).

Shapes: M objects of a batch, D text embedding, C channels.
"""

import torch
from torch import Tensor, nn

from ovdet2.errors import UsageError
from ovdet2.modeling.detr.targets import Targets
from ovdet2.vocabulary.bank import WordBank

GEOMETRY = {"label": 0, "label+scale": 2, "label+box": 4}  # columns of (cx, cy, w, h) taken, from the right


class ObjectAttributes(nn.Module):
    """A linear layer over an object's text embedding and its size."""

    def __init__(
        self, dim: int, bank: WordBank, features: str = "label+scale", label_table: WordBank | None = None
    ) -> None:
        """
        Args:
            dim: C.
            bank: words of the detector, which are read and not owned.
            features: "label"; "label+scale", with width and height (the paper's choice); "label+box", with the centre,
                too; all in shares of the image.
            label_table: the same base words embedded by another teacher, to be read instead; None: the detector's.

        Raises:
            UsageError: unknown features.
        """
        super().__init__()
        if features not in GEOMETRY:
            raise UsageError(
                f"the attributes of an object cannot be {features!r}: choose one of {', '.join(GEOMETRY)}."
            )
        self._shared = (bank,)  # a tuple hides it from state_dict, where it stands already
        self.label_table = label_table
        self.first = 4 - GEOMETRY[features]
        self.projection = nn.Linear(self.words.embeddings.shape[1] + GEOMETRY[features], dim)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    @property
    def words(self) -> WordBank:
        """The words that labels are looked up in."""
        return self._shared[0] if self.label_table is None else self.label_table

    def forward(self, targets: Targets) -> Tensor:
        """z_attr of the objects.

        Args:
            targets: the objects.

        Returns:
            Tensor [M, C], float32 (float64 if the layer is).

        Raises:
            UsageError: a label that is no base word.
        """
        table = self.words.training_embeddings
        if targets.label_limit > len(table):
            raise UsageError(
                f"the batch has an object of class {targets.label_limit - 1}, but there are {len(table)} base words; "
                f"images {', '.join(targets.names)}: train on the data set whose base classes the vocabulary has."
            )
        with torch.autocast(table.device.type, enabled=False):  # half precision would blur the sizes
            known = torch.cat([table[targets.labels], targets.boxes_cxcywh[:, self.first :].to(table)], dim=1)
            return self.projection(known.to(self.projection.weight.dtype))
