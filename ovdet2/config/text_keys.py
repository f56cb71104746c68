"""Configuration keys that methods share which learn from captions and tags of images without boxes."""

from detectron2.config import CfgNode as CN

from ovdet2.errors import UsageError

TAG_CAPTIONS = ("all", "first")


def add_text_keys(keys: CN) -> None:
    """Add the shared keys to a method's group, such as ``cfg.MODEL.DETIC``."""
    # Weight of the caption loss, which reads DATASETS.CAPTION_CACHE; 0: off.
    keys.CAPTION_WEIGHT = 0.0
    # Weight of a negative caption; a positive has 1 (Detic: 1 on COCO, 0.125 on LVIS).
    keys.NEGATIVE_WEIGHT = 1.0
    # Captions of earlier steps that are negatives (CLIM: 256). 0: those of the step in all processes only.
    keys.QUEUE = 0
    # How names are found in captions: "words" (at word boundaries), or "published" (between spaces).
    keys.TAG_RULE = "words"
    # Find names in "all" captions of an image, or in the "first".
    keys.TAG_CAPTIONS = "all"
    # Each loss on images without boxes has a learned bias that starts at BIAS, in place of the classifier's (CLIM). False:
    # its logits are those of the classifier.
    keys.OWN_BIAS = False
    # Initial value of these biases: -4.6 is that of the detector's sigmoid classifier, CLIM's is -20.
    keys.BIAS = -4.6


def check_text_keys(cfg: CN, keys: CN, group: str, on: bool) -> None:
    """Refuse values of the shared keys that have no meaning, and detectors that cannot learn from captions and tags.

    Args:
        cfg: configuration.
        keys: the method's group.
        group: its name, for messages.
        on: whether the method has a loss on images without boxes.

    Raises:
        UsageError: such a value.
    """
    from ovdet2.vocabulary.tags import RULES

    for name in ("CAPTION_WEIGHT", "NEGATIVE_WEIGHT", "QUEUE"):
        if keys[name] < 0:
            raise UsageError(f"{group}.{name} is {keys[name]}: it must not be negative.")
    for name, choices in (("TAG_RULE", RULES), ("TAG_CAPTIONS", TAG_CAPTIONS)):
        if keys[name] not in choices:
            raise UsageError(f"{group}.{name} is {keys[name]!r}: choose {' or '.join(choices)}.")
    ovd = cfg.MODEL.OVD
    if on and (ovd.CLASSIFIER, ovd.CLS_LOSS) != ("text", "sigmoid"):
        raise UsageError(
            f"{group} has losses with a sigmoid for each word, but MODEL.OVD.CLASSIFIER is {ovd.CLASSIFIER!r} and CLS_LOSS "
            f'{ovd.CLS_LOSS!r}: set them to "text" and "sigmoid".'
        )
