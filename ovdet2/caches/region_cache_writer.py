"""Writing a region cache: shard by shard, by any number of processes at once, whole or not at all.

The format is that of :mod:`ovdet2.caches.region_cache`. What a shard holds depends on the recipe and on its images
alone, so it does not matter which process writes it, or whether two do.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ovdet2.caches.claims import Claims
from ovdet2.caches.region_cache import (
    MANIFEST,
    SCHEMA,
    Regions,
    Shard,
    read_manifest,
    recipe_digest,
    shard_digest,
    shard_name,
)
from ovdet2.errors import CacheError
from ovdet2.io.files import sha256_file, write_json, write_safetensors

_POLL_SECONDS = 1.0


def write_shard(
    folder: str | Path,
    index: int,
    recipe: dict[str, Any],
    image_ids: Sequence[int],
    regions: Sequence[Regions],
    facts: dict[str, Any] | None = None,
) -> None:
    """Write one shard atomically.

    Args:
        folder: of the cache.
        index: number of the shard.
        recipe: dict, see :class:`CacheWriter`.
        image_ids: ascending ints, I of them.
        regions: list of I :class:`~ovdet2.caches.region_cache.Regions`.
        facts: further JSON-serialisable entries of the shard's header, see :meth:`CacheWriter.write`.

    Raises:
        ValueError: ids not ascending, or embeddings that are not unit rows.
    """
    if list(image_ids) != sorted(set(image_ids)) or len(image_ids) != len(regions):
        raise ValueError("a shard takes ascending image ids, each with its regions")
    embeddings = torch.cat([r.embeddings for r in regions]).half().cpu()
    norms = torch.cat([part.float().norm(dim=1) for part in embeddings.split(1024)])
    if not torch.all((norms - 1).abs() < 1e-2):  # false for NaN, too
        raise ValueError(f"embeddings of norm {norms.min().item():.3g} to {norms.max().item():.3g} are no unit rows")
    counts = torch.tensor([0] + [len(r) for r in regions], dtype=torch.int64)
    tensors = {
        "embeddings": embeddings,
        "boxes_xyxy": torch.cat([r.boxes_xyxy.float() for r in regions]),
        "image_ids": torch.tensor(list(image_ids), dtype=torch.int64),
        "offsets": counts.cumsum(0),
        "ann_ids": torch.cat([r.ann_ids.long() for r in regions]),
        "scores": torch.cat([r.scores.float() for r in regions]),
    }
    manifest = {"schema": SCHEMA, "recipe_sha256": recipe_digest(recipe), "shard": index, **(facts or {})}
    manifest["sha256"] = shard_digest(tensors, manifest)
    write_safetensors(Path(folder) / shard_name(index), tensors, manifest)


class CacheWriter:
    """The bookkeeping of building a cache: which shards are there, which are to do, and the manifest."""

    def __init__(
        self, folder: str | Path, recipe: dict[str, Any], image_ids: Iterable[int], images_per_shard: int, command: str
    ) -> None:
        """Begin or go on with a cache. Nothing of a complete one changes before a shard is found damaged.

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
        # As it will be read back: tuples become lists.
        self.recipe = json.loads(json.dumps(recipe | {"images_per_shard": images_per_shard}))
        self.command = command
        ids = sorted(image_ids)
        self.shards = [ids[start : start + images_per_shard] for start in range(0, len(ids), images_per_shard)]
        self._digest = recipe_digest(self.recipe)
        complete = self._found_complete()
        if complete is None:
            self._write_manifest(None)

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there, or not whole by their size and header; cheap."""
        complete = self._found_complete()
        sizes = {s["file"]: s["bytes"] for s in complete["shards"]} if complete else {}
        return [index for index in range(len(self.shards)) if not self._is_there(index, sizes)]

    def remove_damaged(
        self,
        only: Collection[int] | None = None,
        renew: Callable[[dict[str, Any]], bool] = lambda shard: False,
        progress: Callable[[list[int]], Iterable[int]] = iter,
    ) -> list[int]:
        """Read every byte of the shards that are there and remove those that are not as they were written.

        Args:
            only: numbers of the shards to be concerned with; None: all.
            renew: (shard's header) -> whether to remove a sound one, too.
            progress: wrapper of a list, such as tqdm.

        Returns:
            list of the numbers of those removed.
        """
        removed = []

        def is_good(index):
            shard = self._open(index)
            return shard is not None and shard.is_sound() and self._has_stated_hash(index) and not renew(shard.manifest)

        with Claims(self.folder) as claims:
            for index in progress([i for i in range(len(self.shards)) if only is None or i in only]):
                if not self._path(index).is_file() or is_good(index) or not claims.take(_claim(index)):
                    continue
                try:
                    # Somebody else may have mended it before the claim was ours.
                    if self._path(index).is_file() and not is_good(index):
                        self._write_manifest(None)
                        self._path(index).unlink()
                        removed.append(index)
                finally:
                    claims.release(_claim(index))
        return removed

    def claimed(self, start: int = 0, only: Collection[int] | None = None) -> Iterator[int]:
        """The shards this process is to write, each claimed while it is being written; waits for those of others.

        A generator, to be run through: it ends when every shard it is concerned with is there, whoever wrote it.

        Args:
            start: index in the list of missing shards to begin with, so that several processes begin apart.
            only: numbers of the shards to be concerned with; None: all.
        """
        pending = [index for index in self.missing() if only is None or index in only]
        pending = pending[start % max(len(pending), 1) :] + pending[: start % max(len(pending), 1)]
        if pending and (self._found_complete() is not None):
            self._write_manifest(None)
        with Claims(self.folder) as claims:
            while pending:
                before = len(pending)
                for index in tuple(pending):
                    if not self._is_there(index) and claims.take(_claim(index)):
                        try:
                            if not self._is_there(index):  # it was not when we looked, before the claim
                                yield index
                        finally:
                            claims.release(_claim(index))
                    if self._is_there(index):
                        pending.remove(index)
                if len(pending) == before:
                    time.sleep(_POLL_SECONDS)
            claims.sweep()

    def write(self, index: int, regions: Sequence[Regions], facts: dict[str, Any] | None = None) -> None:
        """Write a shard, unless somebody else has done so meanwhile.

        Args:
            index: its number.
            regions: the :class:`~ovdet2.caches.region_cache.Regions` of its images, in the order of
                ``self.shards[index]``.
            facts: what else its header and the manifest say of it: how it was computed, images left out.
        """
        if not self._is_there(index):
            write_shard(self.folder, index, self.recipe, self.shards[index], regions, facts)

    def finish(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> dict[str, Any] | None:
        """Describe every shard in the manifest and mark the cache complete; of several processes one does it.

        Returns:
            The manifest; None while shards are missing, which somebody else is to write.
        """
        with Claims(self.folder) as claims:
            while True:
                complete = self._found_complete()
                if self.missing():
                    return None
                if complete:
                    return complete
                if claims.take("manifest"):
                    return self._write_manifest([self._describe(i) for i in progress(range(len(self.shards)))])
                time.sleep(_POLL_SECONDS)

    def _path(self, index):
        return self.folder / shard_name(index)

    def _open(self, index):
        """The shard, or None if it is damaged or of other images or another recipe."""
        try:
            shard = Shard(self._path(index), self._digest)
        except CacheError:
            return None
        return shard if shard.image_ids == self.shards[index] else None

    def _has_stated_hash(self, index):
        """Whether a shard's file is the one that a complete manifest describes; true without one."""
        complete = self._found_complete()
        return not complete or sha256_file(self._path(index)) == complete["shards"][index]["sha256"]

    def _is_there(self, index, sizes=None):
        path = self._path(index)
        if not path.is_file() or (sizes and path.stat().st_size != sizes[path.name]):
            return False
        return self._open(index) is not None

    def _found_complete(self):
        """The manifest in the folder if it says complete; None if it does not or is not there."""
        if not (self.folder / MANIFEST).is_file():
            return None
        found = read_manifest(self.folder)
        if found["recipe"] != self.recipe:
            raise CacheError(
                f"{self.folder} holds a region cache made with {_differences(found['recipe'], self.recipe)}: choose "
                "another folder, or remove it."
            )
        return found if found["complete"] else None

    def _write_manifest(self, shards):
        """Complete with the descriptions of all shards, or incomplete with None."""
        manifest = {
            "schema": SCHEMA,
            "complete": shards is not None,
            "command": self.command,
            "recipe": self.recipe,
            "images": sum(map(len, self.shards)),
            "regions": sum(shard["regions"] for shard in shards or ()),
            "planned_shards": len(self.shards),
            "shards": shards or [],
        }
        write_json(self.folder / MANIFEST, manifest, indent=1)
        return manifest

    def _describe(self, index):
        path, ids = self._path(index), self.shards[index]
        shard = Shard(path, self._digest)
        own = ("schema", "recipe_sha256", "shard", "sha256")
        return {
            "file": path.name,
            "first_image_id": ids[0],
            "last_image_id": ids[-1],
            "images": len(ids),
            "regions": len(shard),
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
            **{key: value for key, value in shard.manifest.items() if key not in own},
        }


def _claim(index):
    return Path(shard_name(index)).stem


def _differences(found, wanted):
    """ "teacher A instead of B, dim 4 instead of 5", for an error message."""
    texts = []
    for key in sorted(set(found) | set(wanted)):
        if found.get(key) != wanted.get(key):
            texts.append(f"{key} {found.get(key)} instead of {wanted.get(key)}")
    return "; ".join(texts)
