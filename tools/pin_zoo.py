#!/usr/bin/env python
"""Maintain the records of the zoo (ovdet2/assets/zoo/*.json). Needs network, but for --structure and --page.

    # download the files of a record that have no SHA-256, check and convert them, and write bytes and SHA-256 into the record
    python tools/pin_zoo.py deformable-detr-r50
    # write docs/ZOO.md from the records
    python tools/pin_zoo.py --page
    # write the names and shapes of a record's converted tensors, from its configuration
    python tools/pin_zoo.py --structure deformable-detr-r50

A file that a record already pins is not changed: delete its "sha256" first, with a reason in the commit. A file that must be
downloaded by hand is pinned with --file.
"""

import argparse
import json
import tempfile
from pathlib import Path

import open_clip
import torch
from detectron2.modeling import META_ARCH_REGISTRY

import ovdet2.modeling  # noqa: F401  registers the architectures
from ovdet2.config import load_config, settle_device
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.io.download import download
from ovdet2.io.files import sha256_file, write_json, write_text
from ovdet2.vlm.fingerprint import Fingerprint
from ovdet2.vlm.teacher import register_embedded_models
from ovdet2.vocabulary import Vocabulary
from ovdet2.vocabulary.word_lists import named_words
from ovdet2.zoo import records
from ovdet2.zoo.page import zoo_page
from ovdet2.zoo.store import check_file, structure_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ZOO.md"


def main(argv=None):
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="records")
    parser.add_argument("--page", action="store_true", help="write docs/ZOO.md")
    parser.add_argument("--structure", action="store_true", help="write the structure instead")
    parser.add_argument(
        "--file", help="the downloaded file of the first place without SHA-256, which is not downloaded then"
    )
    args = parser.parse_args(argv)
    if args.file and len(args.names) > 1:
        raise UsageError("--file pins one record: give one name.")
    if args.page:
        write_text(PAGE, zoo_page(records.RECORDS))
    elif not args.names:
        raise UsageError("name at least one record.")
    for name in args.names:
        record = records.record_of(name)
        if args.structure:
            write_text(records.structure_path(record.structure), records.structure_text(configured_structure(record)))
            print(f"wrote {records.structure_path(record.structure)}")
        else:
            pin(record, args.file)


def configured_structure(record):
    """{name: shape} of the detector that the record's configuration builds; no weights are filled or loaded."""
    cfg = load_config(record.config, record.overrides)
    settle_device(cfg)
    # A closed set has a row of weights for each word; otherwise no weight depends on the number of words.
    closed = cfg.MODEL.OVD.CLASSIFIER == "closed_set"
    words = placeholder(cfg, len(named_words(record.options.get("words", "coco")).names) if closed else 1)
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg, vocabulary=words)
    return structure_of(model.state_dict())


def placeholder(cfg, count):
    """Made-up words with as many dimensions as the embeddings of MODEL.TEACHER, whose weights may be absent."""
    register_embedded_models()
    dimensions = open_clip.get_model_config(cfg.MODEL.TEACHER.ARCHITECTURE)["embed_dim"]
    rows = torch.nn.functional.normalize(torch.ones(count, dimensions), dim=1)
    teacher = Fingerprint.stated(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED)
    return Vocabulary(
        [f"word {number}" for number in range(count)], torch.ones(count, dtype=torch.bool), rows, teacher, "-"
    )


def pin(record, file=None):
    """Write bytes and SHA-256 of the record's files without one into its json."""
    place = next(
        path for path in records.ASSETS.glob("*.json") if record.name in json.loads(path.read_text())["records"]
    )
    data = json.loads(place.read_text(encoding="utf-8"))
    for source, entry in zip(record.sources, data["records"][record.name]["sources"]):
        if source.sha256 or (source.by_hand and file is None):
            print(f"{source.url}: {'pinned already' if source.sha256 else 'download it by hand, then give --file'}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(file) if file else download(source.url, Path(folder) / source.file_name, source.bytes)
            check_file(record, path)
            entry |= {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
            write_json(place, data, indent=1)
            print(f"{source.url}: {entry['bytes']} bytes, SHA-256 {entry['sha256']}")
        if file:
            return


if __name__ == "__main__":
    with exit_on_error():
        main()
