"""ovdet2: open-vocabulary object detection on Detectron2."""

import warnings

# Detectron2 0.6 and fvcore script functions at import; today's torch says twice that it would rather not.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)

__version__ = "0.1.0"
__all__ = ["Predictor", "Vocabulary"]


def __getattr__(name):
    # Lazy, so that the vocabulary and the tools around it work where Detectron2 is not installed.
    if name == "Predictor":
        from ovdet2.predictor import Predictor

        return Predictor
    if name == "Vocabulary":
        from ovdet2.vocabulary import Vocabulary

        return Vocabulary
    raise AttributeError(f"module 'ovdet2' has no attribute {name!r}")
