"""The steps that make a sample: decoding, augmentation, instances, the steps of methods, cleanup."""

from ovdet2.data.steps.augment import AugmentImage
from ovdet2.data.steps.build import build_steps
from ovdet2.data.steps.decode import DecodeImage
from ovdet2.data.steps.finish import Finish
from ovdet2.data.steps.instances import AttachInstances
from ovdet2.data.steps.step import Step

__all__ = ["AttachInstances", "AugmentImage", "DecodeImage", "Finish", "Step", "build_steps"]
