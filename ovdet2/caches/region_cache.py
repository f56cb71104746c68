"""Region cache: offline region embeddings of the teacher, as safetensors shards with a manifest, read by image id.

Written by :mod:`ovdet2.caches.region_cache_writer`.

A cache is a folder::

    manifest.json                recipe, whether the cache is complete, ids, counts, size and hash of each shard
    shard-00000.safetensors      about 200 images, by ascending image id

Shapes: I images of a shard, R regions, D embedding dimension. A shard holds ``embeddings`` [R, D] float16 unit rows,
``boxes_xyxy`` [R, 4] float32 in pixels of the original image, ``image_ids`` [I] int64, ``offsets`` [I + 1] int64 (the
regions of image i are offsets[i] to offsets[i + 1]), ``ann_ids`` [R] int64 (-1 for proposals), ``scores`` [R] f32.
Names: ``_xyxy`` boxes (left, top, right, bottom).
"""

import bisect
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ovdet2.errors import CacheError, DataError
from ovdet2.io.files import read_json, sha256_file
from ovdet2.io.manifests import Optional, fault_of, parse_manifest
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher

SCHEMA = "ovdet2/region-cache/1"
MANIFEST = "manifest.json"
_FORM = {
    "complete": bool,
    "command": str,
    "recipe": {
        "dataset": str,
        "dataset_sha256": str,
        "boxes": Optional({"source": str}),
        "crops": Optional({str: object}),
    },
    "images": int,
    "regions": int,
    "planned_shards": int,
    "shards": [
        {
            "file": str,
            "first_image_id": object,  # an int, which may be negative
            "images": int,
            "regions": int,
            "bytes": int,
            "sha256": str,
            "unreadable": Optional({str: str}),
        }
    ],
}
_TENSORS = ("embeddings", "boxes_xyxy", "image_ids", "offsets", "ann_ids", "scores")
_BUILD = "build it with ovdet2 cache build"
_OPEN_SHARDS = 1024  # per process: each open shard is a memory map, and Linux allows a process 65,530 of them


@dataclass(frozen=True)
class Regions:
    """The regions of one image.

    Attributes:
        boxes_xyxy: Tensor [R, 4] float32, pixels of the original image.
        embeddings: Tensor [R, D] float16, unit rows.
        ann_ids: Tensor [R] int64, annotation id of an annotated box, -1 for a proposal.
        scores: Tensor [R] float32, in [0, 1].
    """

    boxes_xyxy: torch.Tensor
    embeddings: torch.Tensor
    ann_ids: torch.Tensor
    scores: torch.Tensor

    def __len__(self) -> int:
        return len(self.boxes_xyxy)


class MappedRegions:
    """The :class:`Regions` of an image in a memory-mapped file; each access to a tensor slices a view of the file.

    Copy a view before changing it or sending it to another process: sending a view would send the complete shard.
    """

    __slots__ = ("_tensors", "_rows")

    def __init__(self, tensors: dict[str, torch.Tensor], rows: slice) -> None:
        self._tensors = tensors
        self._rows = rows

    def __len__(self) -> int:
        return self._rows.stop - self._rows.start

    boxes_xyxy = property(lambda self: self._tensors["boxes_xyxy"][self._rows])
    embeddings = property(lambda self: self._tensors["embeddings"][self._rows])
    ann_ids = property(lambda self: self._tensors["ann_ids"][self._rows])
    scores = property(lambda self: self._tensors["scores"][self._rows])


def shard_name(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def recipe_digest(recipe: dict[str, Any]) -> str:
    """SHA-256 of the recipe of a cache; every shard stores it."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


class RegionCache:
    """Reads a complete cache by image id; memory-mapped, so that only the requested rows are read.

    Picklable, and safe in data loading workers with any start method.

    Attributes:
        unreadable: {image id as a string: reason} of the images that could not be read and have no regions.
        missing: number of annotations that :meth:`of_annotations` of this process did not find in the cache.
    """

    def __init__(self, folder: str | Path) -> None:
        """
        Args:
            folder: of the cache.

        Raises:
            CacheError: no cache, another schema, an incomplete cache, or a shard that is missing or has another size;
                the message holds the command that completes the cache.
        """
        self.folder = Path(folder)
        self.missing = 0
        self.manifest = read_manifest(self.folder)
        command = f"complete it with: {self.manifest['command']}"
        if not self.manifest["complete"]:
            written = len(list(self.folder.glob("shard-*.safetensors")))
            raise CacheError(
                f"the region cache {folder} is incomplete, {written} of {self.manifest['planned_shards']} shards are "
                f"written: {command}"
            )
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise CacheError(f"the shard {path} is missing: {command}")
            if path.stat().st_size != shard["bytes"]:
                raise CacheError(
                    f"the shard {path} has {path.stat().st_size} bytes instead of {shard['bytes']}, it was truncated "
                    f"or replaced: {command}"
                )
        self.unreadable = {
            k: why for shard in self.manifest["shards"] for k, why in shard.get("unreadable", {}).items()
        }
        self._first_ids = [shard["first_image_id"] for shard in self.manifest["shards"]]
        self._digest = recipe_digest(self.manifest["recipe"])
        self._open = OrderedDict()

    @property
    def teacher(self) -> Fingerprint:
        """:class:`Fingerprint` of the teacher."""
        return Fingerprint.from_dict(self.manifest["recipe"].get("teacher"), f"the region cache {self.folder}")

    def __len__(self):
        """Number of images."""
        return self.manifest["images"]

    def require_teacher(self, fingerprint: Fingerprint, owner: str) -> None:
        """Raise CacheError unless the cache and ``owner`` (a name for messages) have the same teacher."""
        try:
            require_same_teacher(self.teacher, f"the region cache {self.folder}", fingerprint, owner)
        except DataError as error:
            raise CacheError(str(error)) from None

    def require_dataset(self, name: str, json_file: str | Path) -> None:
        """Raise CacheError unless the cache was built from exactly this json."""
        recipe, digest = self.manifest["recipe"], sha256_file(json_file)
        if recipe["dataset_sha256"] != digest:
            raise CacheError(
                f"the region cache {self.folder} was built for {recipe['dataset']} with annotations of SHA-256 "
                f"{recipe['dataset_sha256'][:12]}, but {name} reads {json_file} with {digest[:12]}: build one for it "
                "(ovdet2 cache build --output another folder)."
            )

    def image_ids(self) -> Iterator[int]:
        """The ids of all images, ascending, shard by shard; a generator."""
        for index in range(len(self.manifest["shards"])):
            yield from self._shard(index).image_ids

    def regions(self, image_id: int) -> MappedRegions:
        """The :class:`MappedRegions` of an image.

        Raises:
            CacheError: the cache has no entry for it, or its shard is damaged.
        """
        index = bisect.bisect_right(self._first_ids, image_id) - 1
        regions = self._shard(index).regions(image_id) if index >= 0 else None
        if regions is None:
            raise CacheError(
                f"the region cache {self.folder} has no entry for image id {image_id}: it was built for other images; "
                f"{_BUILD} from the annotations of this training set."
            )
        return regions

    def of_annotations(self, image_id: int, ann_ids: Sequence[int] | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of annotated boxes, for losses on ground truth.

        Args:
            image_id: of the image.
            ann_ids: list or int64 Tensor [M] of its annotations.

        Returns:
            (embeddings, is_cached): Tensor [M, D] float16, unit rows, zero for annotations that are not cached; Tensor
            [M] bool. The others are counted in :attr:`missing`.

        Raises:
            CacheError: see :meth:`regions`.
        """
        cached = self.regions(image_id)
        ids = torch.as_tensor(ann_ids, dtype=torch.int64).reshape(-1)
        matches = ids[:, None] == cached.ann_ids
        is_cached = matches.any(dim=1) & (ids >= 0)
        embeddings = cached.embeddings.new_zeros((len(ids), cached.embeddings.shape[1]))
        if len(cached):  # argmax needs at least one column
            embeddings[is_cached] = cached.embeddings[matches[is_cached].int().argmax(dim=1)]
        self.missing += int((~is_cached).sum())
        return embeddings, is_cached

    def _shard(self, index):
        if index not in self._open:
            path = self.folder / self.manifest["shards"][index]["file"]
            self._open[index] = Shard(path, self._digest, f"repair it with: {self.manifest['command']} --verify")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def __getstate__(self):
        return self.__dict__ | {"_open": OrderedDict()}  # another process opens its own memory maps


class Shard:
    """One shard, memory-mapped.

    Attributes:
        manifest: dict of the file's header.
        image_ids: list of ints, ascending.
    """

    def __init__(self, path: str | Path, digest: str, remedy: str = f"remove it and {_BUILD}") -> None:
        """
        Args:
            path: of the file.
            digest: :func:`recipe_digest` of the cache it must belong to.
            remedy: last part of error messages, what to do.

        Raises:
            CacheError: the file is damaged, or not a shard of this cache.
        """
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            with safe_open(str(path), framework="pt") as file:
                self.manifest = parse_manifest(file.metadata())
                self.tensors = {name: file.get_tensor(name) for name in _TENSORS}  # views of the mapped file
            self.image_ids = self.tensors["image_ids"].tolist()
            self._offsets = self.tensors["offsets"].tolist()
        except (SafetensorError, OSError, ValueError) as error:
            raise CacheError(f"{path} is not a complete shard ({error}): {remedy}.") from None
        stated = self.manifest if isinstance(self.manifest, dict) else {}
        if stated.get("schema") != SCHEMA or stated.get("recipe_sha256") != digest:
            raise CacheError(
                f"{path} (schema {stated.get('schema')!r}) is not a shard of this cache, whose schema is "
                f"{SCHEMA!r}: {remedy}."
            )
        self._rows = {image_id: row for row, image_id in enumerate(self.image_ids)}

    def __len__(self) -> int:
        """Number of regions."""
        return self._offsets[-1]

    def regions(self, image_id: int) -> MappedRegions | None:
        """The :class:`MappedRegions` of an image; None if the shard has no entry for it."""
        row = self._rows.get(image_id)
        if row is None:
            return None
        return MappedRegions(self.tensors, slice(self._offsets[row], self._offsets[row + 1]))

    def is_sound(self) -> bool:
        """Whether header and tensors match the hash that was written with them."""
        stated = {key: value for key, value in self.manifest.items() if key != "sha256"}
        return self.manifest.get("sha256") == shard_digest(self.tensors, stated)


def shard_digest(tensors: dict[str, torch.Tensor], manifest: dict[str, Any]) -> str:
    """SHA-256 of a shard's tensors and header."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    for name in _TENSORS:
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a cache, complete or not.

    Raises:
        CacheError: there is none, or it is damaged or of another schema.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = read_json(path, _BUILD)
    except DataError as error:
        raise CacheError(f"there is no region cache to read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise CacheError(f"{path} has schema {schema!r}, this version reads {SCHEMA!r}: {_BUILD} again.")
    fault = fault_of(manifest, _FORM) or _fault_of_shards(manifest)
    if fault:
        raise CacheError(f"{path} is damaged ({fault}): remove the folder and {_BUILD}.")
    return manifest


def _fault_of_shards(manifest):
    """What is wrong with the list of shards of a manifest that has the form; None if nothing is."""
    shards = manifest["shards"]
    if manifest["complete"] and len(shards) != manifest["planned_shards"]:
        return f"it lists {len(shards)} of {manifest['planned_shards']} shards"
    for index, shard in enumerate(shards):
        if shard["file"] != shard_name(index):  # also a path that leads out of the folder
            return f"shards[{index}].file is {shard['file']!r}, not {shard_name(index)!r}"
    firsts = [shard["first_image_id"] for shard in shards]
    if not all(type(first) is int for first in firsts) or firsts != sorted(firsts):
        return "the first image ids of its shards are no ascending whole numbers"
    return None
