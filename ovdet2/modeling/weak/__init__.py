"""What detectors share that learn words from images without boxes.

A loss on such images is a :class:`Term`: a *region sampler* ``(proposals, texts) -> RegionSet`` chooses boxes, the
detector's box head embeds them, and a *region-word loss* ``(embeddings, regions, texts) -> Tensor`` compares them with
words or captions. :class:`WeakPart` is the part of a detector with some terms.
"""

from ovdet2.modeling.weak.caption_queue import CaptionQueue
from ovdet2.modeling.weak.part import Term, WeakPart
from ovdet2.modeling.weak.text_batch import RegionSet, TextBatch

__all__ = ["CaptionQueue", "RegionSet", "Term", "TextBatch", "WeakPart"]
