"""Manifests of region caches that tests do not read further."""

from ovdet2.caches.region_cache import SCHEMA
from ovdet2.caches.region_cache_writer import shard_name


def manifest(*hashes):
    """A complete manifest with a shard of each hash."""
    shards = [
        {"file": shard_name(n), "first_image_id": n, "images": 1, "regions": 1, "bytes": 1, "sha256": value}
        for n, value in enumerate(hashes)
    ]
    count = len(shards)
    return {
        "schema": SCHEMA, "complete": True, "command": "", "recipe": {"dataset": "", "dataset_sha256": ""},
        "images": count, "regions": count, "planned_shards": count, "shards": shards,
    }  # fmt: skip
