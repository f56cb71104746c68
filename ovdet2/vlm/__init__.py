"""The frozen vision-language teacher: loading, encoding, region crops, dense features."""

from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import Teacher

__all__ = ["Fingerprint", "Teacher"]
