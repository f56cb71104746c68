"""From the images of a shard to the embeddings of their regions: decode once, cut, embed in full batches.

Shapes: R regions, F crops of each, S side of the teacher's input, D embedding dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ovdet2.caches.region_boxes import NO_BOXES, BoxFilters, FoundBoxes, apply_filters
from ovdet2.caches.region_cache import Regions
from ovdet2.errors import DataError, NumericalError
from ovdet2.io.images import read_image, require_annotated_size
from ovdet2.vlm.crops import boxes_to_cut, combine_crops, crop_regions
from ovdet2.vlm.teacher import Teacher

Source = TypeVar("Source", bound=Callable[..., FoundBoxes])
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CropRecipe:
    """How regions become embeddings.

    Attributes:
        policy: see :func:`~ovdet2.vlm.crops.crop_windows`.
        factors: the F enlargements of a box whose embeddings are summed.
        dtype: a key of :data:`DTYPES`.
        batch_size: crops per forward pass, rounded down to whole regions.
    """

    policy: str = "warp"
    factors: tuple = (1.0, 1.5)
    dtype: str = "fp32"
    batch_size: int = 256

    @property
    def regions_per_batch(self) -> int:
        """Regions whose crops fill a batch, at least 1."""
        return max(1, self.batch_size // len(self.factors))


class ShardEmbedder(Generic[Source]):
    """Embeds the regions of images, shard by shard.

    Peak memory above teacher and proposer: one decoded image (and two waiting per loader process), one batch of crops
    at S x S x 3 bytes each with the teacher's activations for it, and the float16 embeddings of the shard, twice.
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
            workers: processes that decode; 0 decodes here.
        """
        self.teacher = teacher
        self.boxes = boxes
        self.filters = filters
        self.crops = crops
        self.workers = workers

    def facts(self) -> dict[str, int | str]:
        """How the values came about beyond the recipe, for the manifest: they may differ in their last digits."""
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

        Batches are filled across images and never beyond the records given, so that the result depends on these alone.

        Args:
            records: Detectron2 records of one shard.
            on_image: called after each image, for a progress bar.

        Returns:
            (regions, faults): list of :class:`~ovdet2.caches.region_cache.Regions`, one per record; and {image id: text}
            of the images that cannot be read, which have none.

        Raises:
            NumericalError: an embedding is not finite; it names the image.
        """
        found, faults, rows = [], {}, _Rows(self)
        for record, sample in zip(records, self._samples(records)):
            if "fault" in sample:
                faults[record["image_id"]] = sample["fault"]
            boxes = NO_BOXES if "fault" in sample else self._boxes_of(record, sample)
            found.append(boxes)
            rows.add(sample.get("image"), boxes.boxes_xyxy)
            on_image()
        embeddings = rows.finish().split([len(boxes) for boxes in found])
        for record, values in zip(records, embeddings):
            if not torch.isfinite(values).all():
                raise NumericalError(
                    f"the teacher's embeddings of {record['file_name']} (image id {record['image_id']}) are not "
                    "finite: try another device, or --dtype fp32."
                )
        return [Regions(b.boxes_xyxy, e, b.ann_ids, b.scores) for b, e in zip(found, embeddings)], faults

    def _boxes_of(self, record, sample):
        height, width = sample["image"].shape[-2:]
        size = {"height": height, "width": width}
        found = self.boxes({**record, **size}, sample["prepared"]) if "prepared" in sample else self.boxes(record)
        return apply_filters(found, self.filters, height, width)

    def _samples(self, records):
        images = _Images(records, getattr(self.boxes, "prepare", None))
        return DataLoader(images, batch_size=None, num_workers=self.workers)


class _Rows:
    """Collects crops until a batch is full; the embeddings come out in the order the boxes went in."""

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
    """Decodes an image once: whole for the crops and, where the boxes are proposed, prepared for the proposer."""

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
