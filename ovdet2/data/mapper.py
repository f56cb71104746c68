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

from ovdet2.caches.region_cache import RegionCache
from ovdet2.data.datasets import split_of
from ovdet2.data.detr_augmentation import detr_crop
from ovdet2.data.large_scale_jitter import large_scale_jitter
from ovdet2.errors import CacheError, DataError, UsageError
from ovdet2.io.images import read_image, require_annotated_size
from ovdet2.priors.image_words import AnnotatedWords, open_prior_words
from ovdet2.vlm.fingerprint import Fingerprint

logger = logging.getLogger(__name__)


class OpenVocabularyMapper(DatasetMapper):
    """Detectron2's mapper with our decoding, which applies INPUT.* (crop, resize, flip) as it does.

    A record is read, augmented, and returned with "image", a (3, H, W) uint8 tensor in INPUT.FORMAT, and in training
    with "instances" (boxes in pixels of the augmented image). With a region cache it also gets "regions",
    :class:`Instances` with ``proposal_boxes`` in the same pixels and the teacher's ``embeddings`` [R, D] float16. With
    a cache of annotated boxes the instances get ``gt_embeddings`` [M, D] float16, zero where there is none, and
    ``gt_embedded`` [M] bool; with words of images the record gets "prior_words", indices into the vocabulary. The
    augmentations draw from numpy's global generator, which the loader seeds for each sample.
    """

    @configurable
    def __init__(
        self, is_train, *, region_cache=None, regions_per_image=300, annotation_cache=None, image_words=None, **kwargs
    ):
        """
        Args:
            is_train: whether annotations and cached regions are attached.
            region_cache: :class:`~ovdet2.caches.region_cache.RegionCache` of the training set, or None.
            regions_per_image: cached regions kept per image, drawn at random where there are more.
            annotation_cache: the same with the annotated boxes of the training set, or None.
            image_words: function of the mapped record that gives its words, or None.
            kwargs: of :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.annotation_cache, self.image_words = annotation_cache, image_words
        self.region_cache = region_cache
        self.regions_per_image = regions_per_image

    @classmethod
    def from_config(cls, cfg, is_train=True):
        """Detectron2's arguments, the region caches if the training distils, and the words that CCKT wants.

        The priors of the test are opened for training, too: a file that does not fit is to be known before the hours.

        Raises:
            UsageError: MODEL.LOAD_PROPOSALS is on, whose proposal files are pickles, which ovdet2 does not read; or
                MODEL.MASK_ON for a training set without masks; or INPUT.LSJ together with another crop.
            CacheError: a region cache is incomplete, or of another teacher or data set; or see
                :func:`~ovdet2.priors.image_words.open_prior_words`.
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
        if is_train and cfg.INPUT.LSJ.ENABLED:
            if cfg.INPUT.DETR_CROP.ENABLED or cfg.INPUT.CROP.ENABLED:
                raise UsageError("INPUT.LSJ crops by itself: switch INPUT.DETR_CROP and INPUT.CROP off.")
            arguments["augmentations"][:1] = large_scale_jitter(cfg.INPUT.LSJ.SCALES, cfg.INPUT.LSJ.SIDE)
        cckt, words = cfg.MODEL.CCKT, None
        if cckt.ENABLED and cckt.PRIORS:
            words = open_prior_words(cfg)
            if is_train:
                words = AnnotatedWords(_num_base(cfg), cckt.PRIOR_DROPOUT, cckt.PRIOR_DISTRACTORS)
        contrasts = is_train and cckt.ENABLED and cckt.CONTRAST != "none"
        return arguments | {
            "region_cache": open_region_cache(cfg) if is_train and cfg.MODEL.VILD.WEIGHT > 0 else None,
            "regions_per_image": cfg.MODEL.VILD.REGIONS_PER_IMAGE,
            "annotation_cache": open_annotation_cache(cfg) if contrasts else None,
            "image_words": words,
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
            CacheError: a region cache or the prior has no entry for the image, or one that may not be trained on.
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
            return self._with_words(record)
        if self.region_cache is not None:
            cached = self.region_cache.regions(record["image_id"])
            _require_known(record, cached, self.region_cache.folder)
            record["regions"] = transform_regions(cached, transforms, image.shape[:2], self.regions_per_image)
        if "annotations" in record:
            self._attach_instances(record, transforms, image.shape[:2])
            return self._with_words(record)
        return record

    def _with_words(self, record):
        if self.image_words is not None:
            record["prior_words"] = self.image_words(record)
        return record

    def _attach_instances(self, record, transforms, image_size):
        """Annotations become "instances", with the teacher's embeddings if there is a cache of them."""
        annotations, cache = record["annotations"], self.annotation_cache
        if cache is not None:
            _require_known(record, cache.regions(record["image_id"]), cache.folder)
            classes = torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64)
            ids = torch.tensor([annotation.get("id", -1) for annotation in annotations], dtype=torch.int64)
            # Detectron2 leaves out crowds and what was cropped away, and keeps of an annotation its class alone: let
            # that be its place.
            for place, annotation in enumerate(annotations):
                annotation["category_id"] = place
        try:
            self._transform_annotations(record, transforms, image_size)
        except ValueError as error:
            raise DataError(
                f"{record['file_name']} (image id {record.get('image_id')}): {error} For run-length codes set "
                "INPUT.MASK_FORMAT to bitmask."
            ) from None
        if cache is not None:
            instances = record["instances"]
            kept = instances.gt_classes
            instances.gt_classes = classes[kept]
            instances.gt_embeddings, instances.gt_embedded = cache.of_annotations(record["image_id"], ids[kept])


def _num_base(cfg):
    """Base classes of the training set.

    Raises:
        UsageError: it has no split.
    """
    split = split_of(cfg.DATASETS.TRAIN[0])
    if split is None:
        raise UsageError(
            f"the data set {cfg.DATASETS.TRAIN[0]!r} has no base/novel split: register it with register_ov_dataset."
        )
    return len(split.base)


def open_annotation_cache(cfg):
    """The cache of MODEL.CCKT.REGION_CACHE, checked as :func:`open_region_cache` does, and that it is of annotations.

    Raises:
        UsageError, CacheError: see :func:`open_region_cache`; or it holds other boxes than the annotated ones.
    """
    cache = _checked_cache(cfg, cfg.MODEL.CCKT.REGION_CACHE, "MODEL.CCKT.CONTRAST", "MODEL.CCKT.REGION_CACHE")
    if cache.manifest["recipe"]["boxes"]["source"] != "annotations":
        raise CacheError(
            f"the region cache {cache.folder} holds {cache.manifest['recipe']['boxes']['source']}, MODEL.CCKT.CONTRAST "
            "needs annotated boxes: build one with tools/build_region_cache.py --boxes annotations."
        )
    return cache


def open_region_cache(cfg):
    """The cache of MODEL.VILD.REGION_CACHE, checked against DATASETS.TRAIN and MODEL.TEACHER.

    Raises:
        UsageError: no cache is named, or several training sets, whose image ids one cache cannot tell apart.
        CacheError: see :class:`RegionCache`; or it is of another teacher or data set.
    """
    key = "MODEL.VILD.REGION_CACHE"
    return _checked_cache(cfg, cfg.MODEL.VILD.REGION_CACHE, "MODEL.VILD.WEIGHT", key)


def _checked_cache(cfg, folder, asked_by, key):
    names = cfg.DATASETS.TRAIN
    if not folder:
        raise UsageError(
            f"{asked_by} asks for a region cache, but {key} is empty: name the folder of one made by "
            "tools/build_region_cache.py."
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
        cached: :class:`~ovdet2.caches.region_cache.Regions`.
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
