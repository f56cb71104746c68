"""Write a region cache shard by shard, with any number of concurrent processes; each shard is written atomically.

For the format see :mod:`ovdet2.caches.region_cache`. The content of a shard depends only on the recipe and on its
images, so it does not matter which process writes it, or whether two processes do.
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
    if not torch.all((norms - 1).abs() < 1e-2):  # false for NaN too
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
    """Keeps track of the shards of a cache that is being built, and writes its manifest."""

    def __init__(
        self, folder: str | Path, recipe: dict[str, Any], image_ids: Iterable[int], images_per_shard: int, command: str
    ) -> None:
        """Begin or continue a cache. A complete cache is not changed unless a shard is found damaged.

        Args:
            folder: of the cache.
            recipe: JSON-serialisable dict of all inputs that determine the values: "teacher"
                (:meth:`Fingerprint.to_dict`), "dataset", "dataset_sha256", "dim", and the choice of boxes and crops.
            image_ids: of all images of the data set, in any order.
            images_per_shard: images of a shard, at least 1.
            command: the shell command that builds or completes the cache, for error messages.

        Raises:
            CacheError: the folder holds a cache of another recipe.
        """
        self.folder = Path(folder)
        # In the form in which it will be read back: tuples become lists.
        self.recipe = json.loads(json.dumps(recipe | {"images_per_shard": images_per_shard}))
        self.command = command
        ids = sorted(image_ids)
        self.shards = [ids[start : start + images_per_shard] for start in range(0, len(ids), images_per_shard)]
        self._digest = recipe_digest(self.recipe)
        complete = self._complete_manifest()
        if complete is None:
            self._write_manifest(None)

    def missing(self) -> list[int]:
        """Indices of the shards that are missing, or incomplete by their size and header (a cheap check)."""
        complete = self._complete_manifest()
        sizes = {s["file"]: s["bytes"] for s in complete["shards"]} if complete else {}
        return [index for index in range(len(self.shards)) if not self._is_there(index, sizes)]

    def remove_damaged(
        self,
        only: Collection[int] | None = None,
        renew: Callable[[dict[str, Any]], bool] = lambda shard: False,
        progress: Callable[[list[int]], Iterable[int]] = iter,
    ) -> list[int]:
        """Read every byte of the existing shards and remove the damaged ones.

        Args:
            only: indices of the shards to check; None: all.
            renew: (shard's header) -> whether to remove the shard although it is not damaged.
            progress: wrapper of a list, such as tqdm.

        Returns:
            list of the indices of the removed shards.
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
                    # Another process may have repaired it before this one got the claim.
                    if self._path(index).is_file() and not is_good(index):
                        self._write_manifest(None)
                        self._path(index).unlink()
                        removed.append(index)
                finally:
                    claims.release(_claim(index))
        return removed

    def claimed(self, start: int = 0, only: Collection[int] | None = None) -> Iterator[int]:
        """Yield the indices of shards that this process must write; each is claimed while it is being written.

        The generator ends when every shard exists. It waits for the shards that other processes are writing.

        Args:
            start: first position in the list of missing shards, so that several processes begin at different ones.
            only: indices of the shards to write; None: all.
        """
        pending = [index for index in self.missing() if only is None or index in only]
        pending = pending[start % max(len(pending), 1) :] + pending[: start % max(len(pending), 1)]
        if pending and (self._complete_manifest() is not None):
            self._write_manifest(None)
        with Claims(self.folder) as claims:
            while pending:
                before = len(pending)
                for index in tuple(pending):
                    if not self._is_there(index) and claims.take(_claim(index)):
                        try:
                            if not self._is_there(index):  # another process may have written it before the claim
                                yield index
                        finally:
                            claims.release(_claim(index))
                    if self._is_there(index):
                        pending.remove(index)
                if len(pending) == before:
                    time.sleep(_POLL_SECONDS)
            claims.sweep()

    def write(self, index: int, regions: Sequence[Regions], facts: dict[str, Any] | None = None) -> None:
        """Write a shard, unless another process has written it.

        Args:
            index: of the shard.
            regions: the :class:`~ovdet2.caches.region_cache.Regions` of its images, in the order of
                ``self.shards[index]``.
            facts: further entries of its header and of the manifest: how it was computed, unreadable images.
        """
        if not self._is_there(index):
            write_shard(self.folder, index, self.recipe, self.shards[index], regions, facts)

    def finish(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> dict[str, Any] | None:
        """Write the complete manifest, which describes every shard; of several processes one writes it.

        Returns:
            The manifest; None if shards are missing, which other processes are writing.
        """
        with Claims(self.folder) as claims:
            while True:
                complete = self._complete_manifest()
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
        """The shard, or None if it is damaged, of other images, or of another recipe."""
        try:
            shard = Shard(self._path(index), self._digest)
        except CacheError:
            return None
        return shard if shard.image_ids == self.shards[index] else None

    def _has_stated_hash(self, index):
        """Whether a shard's file has the hash that a complete manifest states; True if the manifest is incomplete."""
        complete = self._complete_manifest()
        return not complete or sha256_file(self._path(index)) == complete["shards"][index]["sha256"]

    def _is_there(self, index, sizes=None):
        path = self._path(index)
        if not path.is_file() or (sizes and path.stat().st_size != sizes[path.name]):
            return False
        return self._open(index) is not None

    def _complete_manifest(self):
        """The manifest in the folder if it is complete; otherwise None."""
        if not (self.folder / MANIFEST).is_file():
            return None
        manifest = read_manifest(self.folder)
        if manifest["recipe"] != self.recipe:
            raise CacheError(
                f"{self.folder} holds a region cache made with {_differences(manifest['recipe'], self.recipe)}: choose "
                "another folder, or remove it."
            )
        return manifest if manifest["complete"] else None

    def _write_manifest(self, shards):
        """Write the manifest: complete with the descriptions of all shards, incomplete if ``shards`` is None."""
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


def _differences(stored, expected):
    """ "teacher A instead of B, dim 4 instead of 5", for an error message."""
    texts = []
    for key in sorted(set(stored) | set(expected)):
        if stored.get(key) != expected.get(key):
            texts.append(f"{key} {stored.get(key)} instead of {expected.get(key)}")
    return "; ".join(texts)
