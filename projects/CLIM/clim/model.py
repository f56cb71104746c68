"""The model that CLIM trains: a CLIP whose regions of mosaics, and single images, meet their captions.

Shapes: B images of a process, R = B regions and singles of it, S side of an image, C side of a canvas, D embedding
dimension.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ovdet2.data.mosaic import compose_mosaics, draw_mosaics
from ovdet2.errors import UsageError
from ovdet2.modeling.contrastive import gather_rows, symmetric_info_nce
from ovdet2.vlm.dense import dense_map, is_vit, pool_regions, stride_of

MAX_LOG_SCALE = math.log(100.0)


def clim_loss(regions, texts, logit_scale, same_text=0.9999):
    """InfoNCE in both directions over the regions and single images of all processes; a collective call.

    Args:
        regions: Tensor [R, D], unit rows.
        texts: Tensor [R, D], unit rows of their captions.
        logit_scale: scalar Tensor, the inverse temperature.
        same_text: cosine above which captions are no negatives of each other's images, which the authors' code does not
            have: CLIM.SAME_TEXT.

    Returns:
        Scalar Tensor float32 (float64 if the inputs are), the same in every process.
    """
    with torch.autocast(regions.device.type, enabled=False):
        regions, _ = gather_rows(regions if regions.dtype == torch.float64 else regions.float())
        texts, _ = gather_rows(texts.to(regions.dtype))
        return symmetric_info_nce(logit_scale * regions @ texts.T, texts @ texts.T > same_text)


class CLIMPretraining(nn.Module):
    """A CLIP in training on mosaics. Batch normalisation keeps its statistics, and the text tower stays as it is."""

    def __init__(
        self, teacher, blocks, grids=(2, 3, 4), singles=3, canvas=1024, same_text=0.9999, freeze_output_and_norms=True
    ):
        """
        Args:
            teacher: :class:`~ovdet2.vlm.teacher.Teacher`, whose model is taken over and changed.
            blocks, freeze_output_and_norms: see :func:`set_trainable`.
            grids, singles: of :func:`~ovdet2.data.mosaic.draw_mosaics`.
            canvas: C, pixels.
            same_text: of :func:`clim_loss`.

        Raises:
            UsageError: a tower without dense features, a canvas that does not fit its stride, or see
                :func:`set_trainable`.
        """
        super().__init__()
        self.clip = teacher.clip
        self.grids, self.singles, self.canvas, self.same_text = tuple(grids), singles, canvas, same_text
        self.interpolation = teacher.interpolation
        self.register_buffer("mean", teacher.mean.clone(), persistent=False)
        self.register_buffer("std", teacher.std.clone(), persistent=False)
        _check_canvas(self.clip.visual, canvas, self.grids, teacher.fingerprint.architecture)
        set_trainable(self.clip, blocks, freeze_output_and_norms)

    def train(self, mode=True):
        """Stay in evaluation mode: CLIP has no dropout, and the statistics of mosaics are not those of images."""
        return super().train(False)

    def forward(self, batch):
        """
        Args:
            batch: list of B dicts "image" [3, S, S] uint8 and "text" [D] float32, arrays or Tensors, of one size.

        Returns:
            {"loss_clim": scalar Tensor}.

        Raises:
            UsageError: fewer images than a mosaic has.
        """
        images, texts = (stacked(batch, key).to(self.mean.device) for key in ("image", "text"))
        regions, order = self.embed(images)
        return {"loss_clim": clim_loss(regions, texts[order], self.clip.logit_scale.exp(), self.same_text)}

    def embed(self, images):
        """Embeddings of a batch, in its mosaics and single images.

        Args:
            images: Tensor [B, 3, S, S] uint8.

        Returns:
            (Tensor [B, D] unit rows, Tensor [B] long, the image of each).
        """
        visual, pixels = self.clip.visual, self.normalise(images)
        canvases, boxes, indices, rest = self.compose(pixels)
        parts = [pool_regions(visual, dense_map(visual, canvases), boxes)]
        if len(rest):
            parts.append(F.normalize(self.clip.encode_image(pixels[rest]).float(), dim=1))
        return torch.cat(parts), torch.cat([*indices, rest])

    def normalise(self, images):
        """[B, 3, S, S] uint8 to the tower's own mean and deviation."""
        return ((images / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def compose(self, pixels):
        """:func:`~ovdet2.data.mosaic.compose_mosaics` of a batch [B, 3, S, S], and the indices [U] of its singles."""
        mosaics, rest = draw_mosaics(len(pixels), self.grids, self.singles)
        size = (self.canvas, self.canvas)
        return *compose_mosaics(pixels, mosaics, size, self.interpolation), rest.to(pixels.device)


def stacked(batch, key):
    """One field of all records of a batch as a Tensor on the CPU."""
    return torch.from_numpy(np.stack([np.asarray(record[key]) for record in batch]))


def set_trainable(clip, blocks, freeze_output_and_norms=True):
    """Freeze a CLIP but for the logit scale and the end of its image tower.

    Args:
        clip: open_clip model.
        blocks: last transformer blocks of a ViT, or stages of a ModifiedResNet with its attention pool, that are
            trained; -1 for all of the tower.
        freeze_output_and_norms: of a ModifiedResNet, freeze the batch norms and the value and output projections of the
            attention pool in any case, as the authors do. These projections map into the joint space.

    Raises:
        UsageError: none, or more than there are.
    """
    visual = clip.visual
    stages = visual.transformer.resblocks if is_vit(visual) else [getattr(visual, f"layer{i}") for i in (1, 2, 3, 4)]
    if blocks != -1 and not 1 <= blocks <= len(stages):
        raise UsageError(
            f"CLIM.TRAINABLE_BLOCKS is {blocks}, the image tower has {len(stages)}: give 1 to {len(stages)}, or -1 for "
            "all of the tower."
        )
    clip.requires_grad_(False)
    clip.logit_scale.requires_grad_(True)
    trained = [visual] if blocks == -1 else list(stages[-blocks:]) + ([] if is_vit(visual) else [visual.attnpool])
    for module in trained:
        module.requires_grad_(True)
    if freeze_output_and_norms and not is_vit(visual):
        norms = [module for module in visual.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in (visual.attnpool.v_proj, visual.attnpool.c_proj, *norms):
            module.requires_grad_(False)


def _check_canvas(visual, canvas, grids, architecture):
    stride, most = stride_of(visual), max(grids, default=1)
    if canvas % stride or canvas < stride * most:
        nearest = max(round(canvas / stride), most) * stride
        raise UsageError(
            f"CLIM.CANVAS is {canvas}, and {architecture} has a cell of its map every {stride} px: it must be a "
            f"multiple of them, and hold a cell for each of {most} x {most} images. The nearest is {nearest}."
        )
