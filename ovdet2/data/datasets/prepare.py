"""Making the train (base classes only) and validation (base and novel classes) files of a split from official ones."""

import hashlib
import json
from pathlib import Path

from ovdet2.data.datasets.coco_json import filter_coco_json
from ovdet2.files import read_json, sha256_file, write_text

_SCHEMA = "ovdet2/split-json/1"


def prepare_split(annotations, prefix, split, remedy="check the folder"):
    """Write ``<prefix>_train_base.json`` and ``<prefix>_val_all.json`` beside instances_{train,val}2017.json.

    A file that already has the right content is left as it is; a new one replaces the old one atomically.

    Args:
        annotations: folder with instances_train2017.json and instances_val2017.json.
        prefix: "ov_coco", "ov_shapes", ...
        split: the :class:`~ovdet2.data.datasets.coco_json.Split`.
        remedy: what the user should do when an official file is missing.

    Yields:
        (path, report) per file when it is in place; report as of ``filter_coco_json`` plus "written" (bool).
    """
    base_ids = split.category_ids[: len(split.base)]
    for source, target, category_ids in (
        ("instances_train2017.json", f"{prefix}_train_base.json", base_ids),
        ("instances_val2017.json", f"{prefix}_val_all.json", split.category_ids),
    ):
        path = Path(annotations) / target
        yield path, _filter_file(Path(annotations) / source, path, split, category_ids, remedy)


def _filter_file(source, target, split, category_ids, remedy):
    data, report = filter_coco_json(read_json(source, remedy), category_ids)
    data["manifest"] = {
        "schema": _SCHEMA,
        "split": split.name,
        "source": source.name,
        "source_sha256": sha256_file(source),
        **{key: report[key] for key in ("images", "annotations", "categories", "degenerate")},
    }
    text = json.dumps(data, ensure_ascii=False) + "\n"
    unchanged = target.is_file() and sha256_file(target) == hashlib.sha256(text.encode()).hexdigest()
    if not unchanged:
        write_text(target, text)
    return {**report, "written": not unchanged}
