"""Checks that the settings of CCKT-Det are consistent."""

from ovdet2.errors import UsageError

CONTRASTS = ("none", "instance", "batch", "class")
CLASS_LOSSES = ("class", "similarity", "both")
SCORES = ("class", "similarity", "product")


def check_choices(contrast: str, class_loss: str, score: str) -> None:
    """Refuse unknown values, and scores that no loss trains.

    Args:
        contrast, class_loss, score: MODEL.CCKT.CONTRAST, CLASS_LOSS_ON and SCORE.

    Raises:
        UsageError: such a setting; the message names its key.
    """
    for key, value, choices in (
        ("CONTRAST", contrast, CONTRASTS), ("CLASS_LOSS_ON", class_loss, CLASS_LOSSES), ("SCORE", score, SCORES)
    ):  # fmt: skip
        if value not in choices:
            raise UsageError(f"MODEL.CCKT.{key} is {value!r}: choose one of {', '.join(choices)}.")
    if score != "class" and not trains_embeddings(contrast, class_loss):
        raise UsageError(
            f"MODEL.CCKT.SCORE is {score!r}, but neither MODEL.CCKT.CONTRAST nor CLASS_LOSS_ON trains region "
            'embeddings: set SCORE to "class", or train them.'
        )
    if score != "similarity" and class_loss == "similarity":
        raise UsageError(
            f'MODEL.CCKT.SCORE is {score!r}, but with CLASS_LOSS_ON "similarity" nothing trains the class branch: '
            'set SCORE to "similarity", or CLASS_LOSS_ON to "both".'
        )


def check_contrast(temperature: float, norm: float) -> None:
    """Refuse numbers out of range.

    Args:
        temperature, norm: MODEL.CCKT.CONTRAST_TEMPERATURE and CONTRAST_NORM.

    Raises:
        UsageError: the temperature is negative, or the norm is not positive.
    """
    if temperature < 0 or norm <= 0:
        raise UsageError(
            f"MODEL.CCKT.CONTRAST_TEMPERATURE is {temperature} and CONTRAST_NORM {norm}: choose a temperature above 0, or "
            "0 for MODEL.CCKT.TEMPERATURE, and a norm above 0."
        )


def trains_embeddings(contrast: str, class_loss: str) -> bool:
    """Whether a loss trains region embeddings."""
    return contrast != "none" or class_loss != "class"
