"""Offline region embeddings of the teacher: shards of safetensors under one manifest, written once, read by image id.

A cache is a folder::

    manifest.json                what it was made of, whether it is complete, each shard's ids, counts, size and hash
    shard-00000.safetensors      about 200 images, by ascending image id

Shapes: I images of a shard, R regions, D embedding dimension. A shard holds ``embeddings`` [R, D] float16 unit rows,
``boxes_xyxy`` [R, 4] float32 in pixels of the original image, ``image_ids`` [I] int64, ``offsets`` [I + 1] int64 (the
regions of image i are offsets[i] to offsets[i + 1]), ``ann_ids`` [R] int64 (-1 for proposals), ``scores`` [R] f32.
"""

import bisect
import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch

from ovdet2.errors import CacheError, DataError
from ovdet2.files import read_json, sha256_file, write_json, write_safetensors
from ovdet2.vlm.fingerprint import Fingerprint, require_same_teacher

SCHEMA = "ovdet2/region-cache/1"
MANIFEST = "manifest.json"
_MANIFEST_KEYS = ("complete", "command", "recipe", "images", "planned_shards", "shards")
_BUILD = "build it with tools/build_region_cache.py"
_OPEN_SHARDS = 64  # per process: a shard is a memory map and a file handle


@dataclass(frozen=True)
class Regions:
    """The cached regions of one image.

    Attributes:
        boxes_xyxy: Tensor [R, 4] float32, pixels of the original image.
        embeddings: Tensor [R, D] float16, unit rows.
        ann_ids: Tensor [R] int64, the annotation a box was taken from, -1 for a proposal.
        scores: Tensor [R] float32, in [0, 1].
    """

    boxes_xyxy: torch.Tensor
    embeddings: torch.Tensor
    ann_ids: torch.Tensor
    scores: torch.Tensor

    def __len__(self):
        return len(self.boxes_xyxy)


def shard_name(index):
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def recipe_digest(recipe):
    """Hash of what a cache is made of; every shard carries it."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def write_shard(folder, index, recipe, image_ids, regions):
    """Write one shard atomically.

    Args:
        folder: of the cache.
        index: number of the shard.
        recipe: dict, see :class:`CacheWriter`.
        image_ids: ascending ints, I of them.
        regions: list of I :class:`Regions`.

    Raises:
        ValueError: ids not ascending, or embeddings that are not unit rows.
    """
    if list(image_ids) != sorted(set(image_ids)) or len(image_ids) != len(regions):
        raise ValueError("a shard takes ascending image ids, each with its regions")
    embeddings = torch.cat([r.embeddings.float().cpu() for r in regions])
    norms = embeddings.norm(dim=1)
    if not torch.all((norms - 1).abs() < 1e-2):  # false for NaN, too
        raise ValueError(f"embeddings of norm {norms.min().item():.3g} to {norms.max().item():.3g} are no unit rows")
    counts = torch.tensor([0] + [len(r) for r in regions], dtype=torch.int64)
    tensors = {
        "embeddings": embeddings.half(),
        "boxes_xyxy": torch.cat([r.boxes_xyxy.float() for r in regions]),
        "image_ids": torch.tensor(list(image_ids), dtype=torch.int64),
        "offsets": counts.cumsum(0),
        "ann_ids": torch.cat([r.ann_ids.long() for r in regions]),
        "scores": torch.cat([r.scores.float() for r in regions]),
    }
    manifest = {"schema": SCHEMA, "recipe_sha256": recipe_digest(recipe), "shard": index}
    write_safetensors(Path(folder) / shard_name(index), tensors, manifest)


class CacheWriter:
    """The bookkeeping of building a cache: which shards are there, which are to do, and the manifest."""

    def __init__(self, folder, recipe, image_ids, images_per_shard, command):
        """Begin or go on with a cache. Nothing of a complete one changes before a shard is written anew.

        Args:
            folder: of the cache.
            recipe: JSON-serialisable dict that decides every value: "teacher" (:meth:`Fingerprint.to_dict`), "dataset",
                "dataset_sha256", "dim", and how boxes and crops were chosen.
            image_ids: of the whole data set, in any order.
            images_per_shard: images of a shard, at least 1.
            command: what a user types to build or complete the cache; error messages repeat it.

        Raises:
            CacheError: the folder holds a cache made of something else.
        """
        self.folder = Path(folder)
        self.recipe = recipe | {"images_per_shard": images_per_shard}
        self.command = command
        ids = sorted(image_ids)
        self.shards = [ids[start : start + images_per_shard] for start in range(0, len(ids), images_per_shard)]
        self._complete = None  # the manifest found, while it is true
        if (self.folder / MANIFEST).is_file():
            found = _read_manifest(self.folder)
            if found["recipe"] != self.recipe:
                keys = sorted(set(found["recipe"]) | set(self.recipe))
                different = [key for key in keys if found["recipe"].get(key) != self.recipe.get(key)]
                raise CacheError(
                    f"{folder} holds a region cache made with another {', '.join(different)}: choose another folder, "
                    "or remove it."
                )
            self._complete = found if found["complete"] else None
        if not self._complete:
            self._write_manifest(complete=False)

    def to_do(self, progress=iter):
        """Numbers of the shards that are missing or not whole; a killed run loses the one it was at.

        Args:
            progress: wrapper of a list, such as tqdm: the shards of a complete cache are compared with their hashes.
        """
        return [index for index, ids in progress(list(enumerate(self.shards))) if not self._is_good(index, ids)]

    def write(self, index, regions):
        """Write shard ``index`` from the :class:`Regions` of its images, in the order of ``self.shards[index]``."""
        if self._complete:
            self._write_manifest(complete=False)
            self._complete = None
        write_shard(self.folder, index, self.recipe, self.shards[index], regions)

    def finish(self):
        """Describe every shard in the manifest and mark the cache complete; returns the manifest."""
        return self._complete or self._write_manifest(complete=True)

    def _is_good(self, index, ids):
        path = self.folder / shard_name(index)
        if not path.is_file():
            return False
        try:
            shard = _Shard(path, recipe_digest(self.recipe))
        except CacheError:
            return False
        if self._complete and sha256_file(path) != self._complete["shards"][index]["sha256"]:
            return False
        return shard.image_ids == ids

    def _write_manifest(self, complete):
        shards = [self._describe(index, ids) for index, ids in enumerate(self.shards)] if complete else []
        manifest = {
            "schema": SCHEMA,
            "complete": complete,
            "command": self.command,
            "recipe": self.recipe,
            "images": sum(map(len, self.shards)),
            "regions": sum(shard["regions"] for shard in shards),
            "planned_shards": len(self.shards),
            "shards": shards,
        }
        write_json(self.folder / MANIFEST, manifest, indent=1)
        return manifest

    def _describe(self, index, ids):
        path = self.folder / shard_name(index)
        return {
            "file": path.name,
            "first_image_id": ids[0],
            "last_image_id": ids[-1],
            "images": len(ids),
            "regions": _Shard(path, recipe_digest(self.recipe)).offsets[-1],
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }


class RegionCache:
    """Reads a complete cache by image id; memory-mapped, so that only the rows asked for are read.

    Picklable, and safe to carry into loader workers however they are started.
    """

    def __init__(self, folder):
        """
        Args:
            folder: of the cache.

        Raises:
            CacheError: no cache, another schema, an incomplete one, or a shard that is missing or has another size;
                the message holds the command that completes it.
        """
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        command = f"complete it with: {self.manifest['command']}"
        if not self.manifest["complete"]:
            there = sum((self.folder / shard_name(i)).is_file() for i in range(self.manifest["planned_shards"]))
            raise CacheError(
                f"the region cache {folder} is incomplete, {there} of {self.manifest['planned_shards']} shards are "
                f"there: {command}"
            )
        for shard in self.manifest["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file():
                raise CacheError(f"the shard {path} is missing: {command}")
            if path.stat().st_size != shard["bytes"]:
                raise CacheError(
                    f"the shard {path} has {path.stat().st_size} bytes instead of {shard['bytes']}, it was cut off or "
                    f"replaced: {command}"
                )
        self._first_ids = [shard["first_image_id"] for shard in self.manifest["shards"]]
        self._digest = recipe_digest(self.manifest["recipe"])
        self._open = OrderedDict()

    @property
    def teacher(self):
        """:class:`Fingerprint` of the teacher."""
        return Fingerprint.from_dict(self.manifest["recipe"].get("teacher"), f"the region cache {self.folder}")

    def __len__(self):
        """Images."""
        return self.manifest["images"]

    def require_teacher(self, fingerprint, owner):
        """Raise CacheError, naming both, unless the embeddings are of the teacher ``owner`` (a text) has."""
        try:
            require_same_teacher(self.teacher, f"the region cache {self.folder}", fingerprint, owner)
        except DataError as error:
            raise CacheError(str(error)) from None

    def require_dataset(self, name, json_file):
        """Raise CacheError unless the cache was built from this very json."""
        recipe, found = self.manifest["recipe"], sha256_file(json_file)
        if recipe["dataset_sha256"] != found:
            raise CacheError(
                f"the region cache {self.folder} was built for {recipe['dataset']} with annotations of SHA-256 "
                f"{recipe['dataset_sha256'][:12]}, but {name} reads {json_file} with {found[:12]}: build one for it "
                "(tools/build_region_cache.py --output another folder)."
            )

    def regions(self, image_id):
        """The :class:`Regions` of an image.

        Raises:
            CacheError: the cache has no entry for it, or its shard is damaged.
        """
        index = bisect.bisect_right(self._first_ids, image_id) - 1
        shard = self._shard(index) if index >= 0 else None
        row = shard.rows.get(image_id) if shard else None
        if row is None:
            raise CacheError(
                f"the region cache {self.folder} has no entry for image id {image_id}: it was built for other images; "
                f"{_BUILD} from the annotations of this training."
            )
        return shard.read(row)

    def _shard(self, index):
        if index not in self._open:
            path = self.folder / self.manifest["shards"][index]["file"]
            self._open[index] = _Shard(path, self._digest)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def __getstate__(self):
        return self.__dict__ | {"_open": OrderedDict()}  # a memory map is opened anew in another process


class _Shard:
    """One open shard."""

    def __init__(self, path, digest):
        from safetensors import SafetensorError, safe_open

        self.path = path
        try:
            self._file = safe_open(str(path), framework="pt")
            manifest = json.loads((self._file.metadata() or {}).get("manifest", "{}"))
            self.image_ids = self._file.get_tensor("image_ids").tolist()
            self.offsets = self._file.get_tensor("offsets").tolist()
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise CacheError(f"{path} is not a whole shard ({error}): remove it and {_BUILD}.") from None
        if manifest.get("schema") != SCHEMA or manifest.get("recipe_sha256") != digest:
            raise CacheError(
                f"{path} (schema {manifest.get('schema')!r}) is not a shard of this cache, whose schema is {SCHEMA!r}: "
                f"remove it and {_BUILD}."
            )
        self.rows = {image_id: row for row, image_id in enumerate(self.image_ids)}

    def read(self, row):
        start, end = self.offsets[row], self.offsets[row + 1]
        names = ("boxes_xyxy", "embeddings", "ann_ids", "scores")
        return Regions(**{name: self._file.get_slice(name)[start:end] for name in names})


def _read_manifest(folder):
    path = Path(folder) / MANIFEST
    try:
        manifest = read_json(path, _BUILD)
    except DataError as error:
        raise CacheError(f"there is no region cache to read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise CacheError(f"{path} has schema {schema!r}, this version reads {SCHEMA!r}: {_BUILD} anew.")
    missing = [key for key in _MANIFEST_KEYS if key not in manifest]
    if missing:
        raise CacheError(f"{path} has no {', '.join(missing)}: remove the folder and {_BUILD}.")
    return manifest
