"""Embed the regions of the images of a shard: decode each image once, crop the regions, encode full batches of crops.

Shapes: R regions, F crops of each, S side of the teacher's input, D embedding dimension.
Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import Dataset

from ovdet2.caches.region_boxes import NO_BOXES, BoxFilters, ImageBoxes, apply_filters
from ovdet2.caches.region_cache import Regions
from ovdet2.errors import DataError, NumericalError
from ovdet2.io.images import read_image, require_annotated_size
from ovdet2.io.loading import WatchedLoader
from ovdet2.vlm.crops import boxes_to_cut, combine_crops, crop_regions
from ovdet2.vlm.teacher import Teacher

Source = TypeVar("Source", bound=Callable[..., ImageBoxes])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CropRecipe:
    """Settings of the region crops and their encoding.

    Attributes:
        policy: see :func:`~ovdet2.vlm.crops.crop_windows`.
        factors: the F enlargements of a box whose embeddings are summed.
        dtype: a key of :data:`DTYPES`.
        batch_size: crops per forward pass, rounded down to a multiple of F.
    """

    policy: str = "warp"
    factors: tuple = (1.0, 1.5)
    dtype: str = "fp32"
    batch_size: int = 256

    @property
    def regions_per_batch(self) -> int:
        """Number of regions whose crops fill a batch, at least 1."""
        return max(1, self.batch_size // len(self.factors))


class ShardEmbedder(Generic[Source]):
    """Embeds the regions of images, shard by shard.

    Peak memory in addition to teacher and proposer: one decoded image (and two per loading worker), one batch of crops
    at S x S x 3 bytes each with the teacher's activations for it, and the float16 embeddings of the shard twice.
    """

    def __init__(
        self,
        teacher: Teacher,
        boxes: Source,
        filters: BoxFilters,
        crops: CropRecipe,
        workers: int = 0,
    ) -> None:
        """
        Args:
            teacher: :class:`~ovdet2.vlm.teacher.Teacher`, on its device.
            boxes: a source of :mod:`ovdet2.caches.region_boxes`, or
                :class:`~ovdet2.engine.region_proposals.ProposalBoxes`.
            filters: :class:`~ovdet2.caches.region_boxes.BoxFilters`.
            crops: :class:`CropRecipe`.
            workers: processes that decode; 0 decodes in this process.
        """
        self.teacher = teacher
        self.boxes = boxes
        self.filters = filters
        self.crops = crops
        self.workers = workers

    def facts(self) -> dict[str, int | str]:
        """Settings outside of the recipe, for the manifest; they may change the last digits of the values."""
        device = self.teacher.mean.device
        return {
            "batch_size": self.crops.batch_size,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "torch": torch.__version__,
        }

    def embed(
        self, records: Sequence[Mapping[str, Any]], on_image: Callable[[], object] = lambda: None
    ) -> tuple[list[Regions], dict[int, str]]:
        """The regions of some images.

        A batch may hold crops of several images, but only of the given records: the result depends on them only.

        Args:
            records: Detectron2 records of one shard.
            on_image: called after each image, for a progress bar.

        Returns:
            (regions, faults): list of :class:`~ovdet2.caches.region_cache.Regions`, one per record; and
            {image id: error message} of the images that cannot be read, whose regions are empty.

        Raises:
            NumericalError: an embedding is not finite; the message names the image.
        """
        image_boxes, faults, rows = [], {}, _Rows(self)
        for record, sample in zip(records, self._samples(records)):
            if "fault" in sample:
                faults[record["image_id"]] = sample["fault"]
            boxes = NO_BOXES if "fault" in sample else self._boxes_of(record, sample)
            image_boxes.append(boxes)
            rows.add(sample.get("image"), boxes.boxes_xyxy)
            on_image()
        embeddings = rows.finish().split([len(boxes) for boxes in image_boxes])
        for record, values in zip(records, embeddings):
            if not torch.isfinite(values).all():
                raise NumericalError(
                    f"the teacher's embeddings of {record['file_name']} (image id {record['image_id']}) are not "
                    "finite: try another device, or --dtype fp32."
                )
        return [Regions(b.boxes_xyxy, e, b.ann_ids, b.scores) for b, e in zip(image_boxes, embeddings)], faults

    def _boxes_of(self, record, sample):
        height, width = sample["image"].shape[-2:]
        size = {"height": height, "width": width}
        boxes = self.boxes({**record, **size}, sample["prepared"]) if "prepared" in sample else self.boxes(record)
        return apply_filters(boxes, self.filters, height, width)

    def _samples(self, records):
        images = _Images(records, getattr(self.boxes, "prepare", None))
        return WatchedLoader(images, self.workers, batch_size=None)


class _Rows:
    """Collects crops until a batch is full, then encodes it; the embeddings have the order of the boxes."""

    def __init__(self, owner):
        self.teacher, self.crops = owner.teacher, owner.crops
        self.waiting, self.room, self.done = [], owner.crops.regions_per_batch, []

    def add(self, image, boxes_xyxy):
        start = 0
        while start < len(boxes_xyxy):
            chunk = boxes_xyxy[start : start + self.room]
            cut = boxes_to_cut(chunk, self.crops.factors, *image.shape[-2:])
            image = image.to(self.teacher.mean.device)
            self.waiting.append(self._cut(image, cut))
            start += len(chunk)
            self.room -= len(chunk)
            if self.room == 0:
                self._flush()

    def _cut(self, image, boxes_xyxy):
        teacher = self.teacher
        return crop_regions(
            image, boxes_xyxy, teacher.image_size, self.crops.policy, teacher.interpolation, teacher.mean_colour
        )

    def finish(self):
        """Tensor [R, D] float16 on the CPU."""
        if self.waiting:
            self._flush()
        return torch.cat([torch.zeros((0, self.teacher.embed_dim), dtype=torch.float16), *self.done])

    def _flush(self):
        crops = torch.cat(self.waiting)
        embeddings = self.teacher.encode_image(crops, len(crops), DTYPES[self.crops.dtype])
        self.done.append(combine_crops(embeddings, len(self.crops.factors)).half().cpu())
        self.waiting, self.room = [], self.crops.regions_per_batch


class _Images(Dataset):
    """Decodes each image once: unchanged for the crops and, if the boxes are proposals, prepared for the proposer."""

    def __init__(self, records, prepare):
        self.records = records
        self.prepare = prepare

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record = dict(self.records[index])
        try:
            rgb = read_image(record["file_name"], "RGB")
            require_annotated_size(record, rgb)
        except DataError as error:
            return {"fault": str(error)}
        sample = {"image": torch.from_numpy(rgb.copy()).permute(2, 0, 1)}
        if self.prepare is not None:
            sample["prepared"] = self.prepare(rgb)
        return sample
