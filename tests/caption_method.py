"""A method that learns from captions, as small as one can be, for tests: words of the caption are on the whole image.

Named by MODEL.PARTS "tests.caption_method": nothing outside this file knows it.
"""

import os
import signal

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from torch.nn import functional as F

from ovdet2.config.method import Method
from ovdet2.data.samples import CAPTIONS
from ovdet2.layers import cosine_logits
from ovdet2.modeling.detr.part import DetrPart
from ovdet2.modeling.rcnn.part import RCNNPart


def words_in(captions, names):
    """Tensor [N, K]: 1 where a word stands in a caption of an image."""
    return torch.tensor([[float(any(name in text for text in texts)) for name in names] for texts in captions])


def caption_loss(embeddings, bank, captions):
    """Binary cross-entropy of the base words; embeddings [N, D], a row an image."""
    rows = bank.rows(training=True)
    wanted = words_in(captions, bank.names[: len(rows)]).to(embeddings)
    return F.binary_cross_entropy_with_logits(cosine_logits(embeddings, rows, temperature=0.1), wanted)


class CaptionedRegions(RCNNPart):
    """The whole image is a region whose words are those of its caption."""

    sees = (CAPTIONS,)

    def __init__(self, weight, kill_at):
        super().__init__({"loss_caption": weight})
        self.kill_at = kill_at

    def weak_losses(self, batch):
        if self.kill_at and get_event_storage().iter == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        whole = [Boxes(torch.tensor([[0.0, 0.0, *reversed(s.image.shape[1:])]])) for s in batch.samples]
        embeddings = batch.heads.embed_boxes(batch.features, whole)
        words = [sample.captions for sample in batch.samples]
        return {"loss_caption": caption_loss(embeddings, batch.heads.classifier.vocabulary, words)}


class CaptionedTokens(DetrPart):
    """The mean of the encoder's tokens is an embedding whose words are those of the caption."""

    sees = (CAPTIONS,)

    def __init__(self, weight, bank, dim):
        super().__init__({"loss_caption": weight})
        self._bank = (bank,)
        self.projection = torch.nn.Linear(dim, bank.embeddings.shape[1])

    def weak_losses(self, samples, memory, network):
        shown = (~memory.padding_mask)[..., None].to(memory.tokens)
        mean = (memory.tokens * shown).sum(dim=1) / shown.sum(dim=1)
        embeddings = F.normalize(self.projection(mean), dim=1)
        return {"loss_caption": caption_loss(embeddings, self._bank[0], [sample.captions for sample in samples])}


class CaptionMethod(Method):
    name = "caption_test"

    def add_keys(self, cfg: CfgNode) -> None:
        cfg.MODEL.CAPTION_TEST = CfgNode({"WEIGHT": 1.0, "KILL_AT": 0})

    def is_on(self, cfg):
        return cfg.MODEL.CAPTION_TEST.WEIGHT > 0

    def build(self, cfg, host):
        if host.network is not None:
            return CaptionedTokens(cfg.MODEL.CAPTION_TEST.WEIGHT, host.bank, cfg.MODEL.DETR.DIM)
        return CaptionedRegions(cfg.MODEL.CAPTION_TEST.WEIGHT, cfg.MODEL.CAPTION_TEST.KILL_AT)


METHOD = CaptionMethod()
