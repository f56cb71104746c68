"""A closed-set classifier, the baseline of text classifiers.

Shapes: R regions, C channels, K words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ovdet2.errors import UsageError

if TYPE_CHECKING:
    from ovdet2.vocabulary.bank import WordBank


class ClosedSetClassifier(nn.Linear):
    """A linear layer over the fixed words it was built with. As a sanity check, its novel AP must be about 0.

    It has a column for every word, but no training box has a novel word.
    """

    per_word = False  # its logits are for a softmax

    def __init__(self, input_dim: int, bank: WordBank) -> None:
        """
        Args:
            input_dim: C.
            bank: word bank of the detector; K is fixed to its current length.
        """
        super().__init__(input_dim, len(bank) + 1)
        self.vocabulary = bank
        nn.init.normal_(self.weight, std=0.01)
        nn.init.zeros_(self.bias)

    @property
    def num_training_classes(self) -> int:
        """K: every word has a column in training."""
        return self.out_features - 1

    def forward(self, input: Tensor) -> Tensor:
        """
        Args:
            input: features, Tensor [R, C].

        Returns:
            Tensor [R, K + 1], background last.

        Raises:
            UsageError: the vocabulary has another number of words than the layer was built for.
        """
        if len(self.vocabulary) != self.num_training_classes:
            raise UsageError(
                f"a closed-set head of {self.num_training_classes} classes cannot take "
                f"{len(self.vocabulary)} words: its classes are fixed. Only a detector with MODEL.OVD.CLASSIFIER "
                '"text" takes other words.'
            )
        return super().forward(input)
