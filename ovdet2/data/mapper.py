"""The mapper that turns one data set record into what a model takes."""

import copy
import logging

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.dataset_mapper import DatasetMapper
from detectron2.structures import Boxes, Instances

from ovdet2.data.detr_augmentation import detr_crop
from ovdet2.data.images import read_image
from ovdet2.data.region_cache import RegionCache
from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.vlm.fingerprint import Fingerprint

logger = logging.getLogger(__name__)


class OpenVocabularyMapper(DatasetMapper):
    """Detectron2's mapper with our decoding, which applies INPUT.* (crop, resize, flip) as it does.

    A record is read, augmented, and returned with "image", a (3, H, W) uint8 tensor in INPUT.FORMAT, and in training
    with "instances" (boxes in pixels of the augmented image). With a region cache it also gets "regions",
    :class:`Instances` with ``proposal_boxes`` in the same pixels and the teacher's ``embeddings`` [R, D] float16. The
    augmentations draw from numpy's global generator, which the loader seeds for each sample.
    """

    @configurable
    def __init__(self, is_train, *, region_cache=None, regions_per_image=300, **kwargs):
        """
        Args:
            is_train: whether annotations and cached regions are attached.
            region_cache: :class:`~ovdet2.data.region_cache.RegionCache` of the training set, or None.
            regions_per_image: cached regions kept per image, drawn at random where there are more.
            kwargs: of :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.region_cache = region_cache
        self.regions_per_image = regions_per_image

    @classmethod
    def from_config(cls, cfg, is_train=True):
        """Detectron2's arguments, and the region cache if the training distils.

        Raises:
            UsageError: MODEL.LOAD_PROPOSALS is on, whose proposal files are pickles, which ovdet2 does not read; or
                MODEL.MASK_ON for a training set without masks.
            CacheError: the region cache is incomplete, or of another teacher or data set.
        """
        if cfg.MODEL.LOAD_PROPOSALS:
            raise UsageError("MODEL.LOAD_PROPOSALS reads pickled files, which ovdet2 does not open: set it to False.")
        if is_train and cfg.MODEL.MASK_ON:
            maskless = [name for name in cfg.DATASETS.TRAIN if not MetadataCatalog.get(name).get("ov_masks")]
            if maskless:
                raise UsageError(
                    f"MODEL.MASK_ON is True, but {', '.join(maskless)} carries boxes alone: set it to False, or "
                    "register the data set with masks=True."
                )
        arguments = super().from_config(cfg, is_train)
        if is_train and cfg.INPUT.DETR_CROP.ENABLED:
            arguments["augmentations"].insert(0, detr_crop(cfg.INPUT.DETR_CROP.RESIZE, cfg.INPUT.DETR_CROP.SIDES))
        return arguments | {
            "region_cache": open_region_cache(cfg) if is_train and cfg.MODEL.DISTILLATION.WEIGHT > 0 else None,
            "regions_per_image": cfg.MODEL.DISTILLATION.REGIONS_PER_IMAGE,
        }

    def __call__(self, record):
        """Map one record.

        Args:
            record: dict in Detectron2's standard form; "file_name" is needed, "annotations" in training. Not changed.

        Returns:
            dict, the record with "image" and, in training, "instances"; without "annotations".

        Raises:
            DataError: the image cannot be read, its size is not the one of the record, or its masks are not in
                INPUT.MASK_FORMAT.
            CacheError: the region cache has no entry for the image, or one that may not be trained on.
        """
        record = copy.deepcopy(record)
        image = read_image(record["file_name"], self.image_format)
        require_annotated_size(record, image)
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
            return record
        if self.region_cache is not None:
            cached = self.region_cache.regions(record["image_id"])
            _require_known(record, cached, self.region_cache.folder)
            record["regions"] = transform_regions(cached, transforms, image.shape[:2], self.regions_per_image)
        if "annotations" in record:
            try:
                self._transform_annotations(record, transforms, image.shape[:2])
            except ValueError as error:
                raise DataError(
                    f"{record['file_name']} (image id {record.get('image_id')}): {error} For run-length codes set "
                    "INPUT.MASK_FORMAT to bitmask."
                ) from None
        return record


def open_region_cache(cfg):
    """The cache of MODEL.DISTILLATION.REGION_CACHE, checked against DATASETS.TRAIN and MODEL.TEACHER.

    Raises:
        UsageError: no cache is named, or several training sets, whose image ids one cache cannot tell apart.
        CacheError: see :class:`RegionCache`; or it is of another teacher or data set.
    """
    folder, names = cfg.MODEL.DISTILLATION.REGION_CACHE, cfg.DATASETS.TRAIN
    if not folder:
        raise UsageError(
            "MODEL.DISTILLATION.WEIGHT is above 0 but MODEL.DISTILLATION.REGION_CACHE is empty: name the folder of a "
            "cache made by tools/build_region_cache.py."
        )
    if len(names) != 1:
        raise UsageError(
            f"a region cache belongs to one data set, DATASETS.TRAIN names {list(names)}: join their jsons."
        )
    cache = RegionCache(folder)
    stated = Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED)
    cache.require_teacher(stated, "MODEL.TEACHER of the configuration")
    cache.require_dataset(names[0], MetadataCatalog.get(names[0]).ov_files()[0])
    if cache.unreadable:
        logger.warning(
            "%d images have no regions in %s, since they could not be read (image ids %s); once they are mended, add "
            "--verify to: %s",
            *(len(cache.unreadable), folder, ", ".join(list(cache.unreadable)[:5]), cache.manifest["command"]),
        )
    return cache


def transform_regions(cached, transforms, image_size, limit):
    """Cached regions through the geometric transforms of their image, as ViLD does.

    A region of which nothing is left inside the image is dropped; the others are clipped to it.

    Args:
        cached: :class:`~ovdet2.data.region_cache.Regions`.
        transforms: Detectron2 TransformList that was applied to the image.
        image_size: (height, width) after it.
        limit: regions kept at most, drawn from numpy's global generator where there are more.

    Returns:
        :class:`Instances` with ``proposal_boxes`` and ``embeddings``.
    """
    # What TransformList.apply_box does, with the corners made once and not once for each transform.
    corners = cached.boxes_xyxy.double().numpy()[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
    corners = transforms.apply_coords(corners).reshape(-1, 4, 2)
    boxes = Boxes(torch.from_numpy(np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)).float())
    boxes.clip(image_size)
    kept = torch.nonzero(boxes.nonempty())[:, 0]
    if len(kept) == len(boxes) <= limit:
        # A copy: a view would take its whole shard along from a loader process to the trainer.
        return Instances(image_size, proposal_boxes=boxes, embeddings=cached.embeddings.clone())
    if len(kept) > limit:
        kept = kept[torch.from_numpy(np.random.permutation(len(kept))[:limit])]
    return Instances(image_size, proposal_boxes=boxes[kept], embeddings=cached.embeddings[kept])


def _require_known(record, cached, folder):
    """Cached regions lie in their image, and those taken from an annotation are of one that may be trained on.

    Raises:
        CacheError: names the image, and the box or annotation at fault.
    """
    where = f"the region cache {folder}, image id {record['image_id']}"
    boxes = cached.boxes_xyxy.numpy()
    limits = np.array([record["width"], record["height"]] * 2, dtype=np.float32) + 1
    inside = (boxes[:, :2] < boxes[:, 2:]).all(axis=1) & (boxes >= -1).all(axis=1) & (boxes <= limits).all(axis=1)
    if not inside.all():  # false for NaN, too
        worst = boxes[~inside][0].tolist()
        raise CacheError(
            f"{where}: region {worst} is no box inside the image of {record['width']}x{record['height']} pixels; "
            "the cache was built from other images, build it anew."
        )
    ann_ids = cached.ann_ids.numpy()
    taken = set(ann_ids[ann_ids >= 0].tolist())
    unknown = taken - {annotation.get("id") for annotation in record.get("annotations", ())}
    if unknown:
        raise CacheError(
            f"{where}: regions were cut around the annotations {sorted(unknown)[:5]}, which the training set does not "
            "hold: a box of a novel class must not be trained on. Build the cache from the base-only annotations."
        )


def require_annotated_size(record, image):
    """Compare an array [H, W, 3] with the annotated size (or fill it in): another one would misplace every box.

    Raises:
        DataError: names the file and both sizes.
    """
    height, width = image.shape[:2]
    annotated = record.setdefault("width", width), record.setdefault("height", height)
    if annotated != (width, height):
        raise DataError(
            f"{record['file_name']} (image id {record.get('image_id')}) is {width}x{height} pixels but the annotations "
            f"say {annotated[0]}x{annotated[1]}: the file is not the annotated one, or its EXIF rotation was not "
            "applied when it was annotated."
        )
