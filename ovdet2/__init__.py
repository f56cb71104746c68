"""ovdet2: open-vocabulary object detection on Detectron2."""

from __future__ import annotations

import importlib
import warnings

# Detectron2 0.6 and fvcore script functions at import, which torch 2.15 calls deprecated.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
# Detectron2 0.6 gathers objects from processes by way of a storage class of earlier versions of torch.
warnings.filterwarnings("ignore", message="TypedStorage is deprecated", category=UserWarning)

__version__ = "0.1.0"
__all__ = ["Detector", "Vocabulary", "register_captions", "register_image_labels", "register_ov_dataset"]

# Imported when they are first used: vocabularies and `ovdet2 doctor` work where Detectron2 is not installed.
_PLACES = {
    "Detector": "ovdet2.predictor",
    "Predictor": "ovdet2.predictor",  # the name of earlier versions
    "Vocabulary": "ovdet2.vocabulary",
    "register_captions": "ovdet2.data.datasets",
    "register_image_labels": "ovdet2.data.datasets",
    "register_ov_dataset": "ovdet2.data.datasets",
}


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'ovdet2' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PLACES[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "detectron2":
            raise
        message = f"ovdet2.{name} needs Detectron2, which is not installed. Run: ovdet2 doctor --install-detectron2"
        raise ModuleNotFoundError(message, name=error.name) from None
