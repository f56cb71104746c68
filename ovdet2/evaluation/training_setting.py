"""The declared setting of a detector, from its configuration and, for published weights, from their record.

What neither states is "unknown". TEST.SETTING replaces entries.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ovdet2.config import methods_of
from ovdet2.data.datasets.coco_json import Split
from ovdet2.data.datasets.register import split_of
from ovdet2.data.samples import BOXES, CAPTIONS, IMAGE_LABELS
from ovdet2.data.source_spec import SourceSpec, source_specs
from ovdet2.errors import OVDetError, UsageError
from ovdet2.evaluation.setting import ANSWERS, NONE, UNKNOWN, Setting
from ovdet2.vocabulary.templates import clean_name
from ovdet2.zoo.records import RECORDS, Record, weights_path

# Start of a pretrained tag of open_clip, and the data that it names.
_TEACHER_DATA = {
    "openai": "400 million image-text pairs (OpenAI, not public)",
    "laion400m": "LAION-400M",
    "laion2b": "LAION-2B",
    "laion5b": "LAION-5B",
    "datacomp": "DataComp",
    "yfcc15m": "YFCC-15M",
    "cc12m": "CC12M",
    "embedded": "captioned images of OV-Shapes",
}


def setting_of(
    cfg: CfgNode,
    novel: Sequence[str],
    weights: str = "",
    trained_names: Iterable[str] | None = None,
    trains: bool = False,
) -> Setting:
    """The setting of a detector on a data set.

    Args:
        cfg: its configuration, with the training data sets.
        novel: names of the novel classes of the data set.
        weights: path that was loaded.
        trained_names: names of the words that had boxes in training, as a checkpoint states them; None: not stated.
        trains: the detector is in training, so that ``weights`` are what it started from.

    Raises:
        UsageError: TEST.SETTING has another answer than yes, no or unknown.
    """
    record = next((record for name, record in RECORDS.items() if _is_file(weights, weights_path(name))), None)
    if record is None or trains:
        setting = _of_configuration(cfg, novel, trained_names)
        if record is not None:
            setting = _joined(_of_record(record), setting)
    else:
        setting = _of_record(record)
    given = cfg.TEST.SETTING
    stated = {
        "boxes": given.BOXES,
        "image_labels": given.IMAGE_LABELS,
        "captions": given.CAPTIONS,
        "novel_names": given.NOVEL_NAMES,
        "teacher": given.TEACHER,
        "teacher_data": given.TEACHER_DATA,
    }
    return setting.changed(stated, by="TEST.SETTING")


def teacher_data(pretrained: str) -> str:
    """What a CLIP was trained on, by its pretrained tag; "unknown" for a file and for other tags."""
    return next((data for tag, data in _TEACHER_DATA.items() if pretrained.startswith(tag)), UNKNOWN)


def _of_record(record: Record) -> Setting:
    training = record.training
    answer = training.novel.split(":")[0].split(",")[0].split()[:1]
    word = {"none": "no"}.get(answer[0].lower(), answer[0].lower()) if answer else UNKNOWN
    tag = (record.teacher or "").rpartition(" ")[2]
    return Setting(
        boxes=training.boxes,
        image_labels=training.image_labels,
        captions=training.captions,
        novel_names=word if word in ANSWERS else UNKNOWN,
        teacher=record.teacher or NONE,
        teacher_data=teacher_data(tag) if record.teacher else NONE,
        stated_by=f"zoo record {record.name}",
    )


def _of_configuration(cfg: CfgNode, novel: Sequence[str], trained_names: Iterable[str] | None) -> Setting:
    teacher, data = _teacher(cfg)
    made = Setting(teacher=teacher, teacher_data=data, stated_by="configuration")
    try:
        specs = source_specs(cfg)
    except UsageError:  # it could not be trained like this
        specs = []
    if not any(spec.datasets for spec in specs):
        return made
    seen = {kind: _datasets(specs, kind) for kind in (BOXES, IMAGE_LABELS, CAPTIONS)}
    return Setting(
        boxes=_listed(seen[BOXES]),
        image_labels=_listed(seen[IMAGE_LABELS]),
        captions=_listed(seen[CAPTIONS]),
        novel_names=_novel_names(cfg, seen, novel, trained_names),
        teacher=teacher,
        teacher_data=data,
        stated_by=made.stated_by,
    )


def _novel_names(cfg, seen, novel, trained_names):
    """Whether novel names were trained on; captions, and methods from outside ovdet2, may hold them."""
    methods = [method for method in methods_of(cfg) if method.is_on(cfg)]
    if any(method.names_novel_classes(cfg) for method in methods):
        return "yes"
    wanted, stated = {clean_name(name) for name in novel}, trained_names is not None
    known = {clean_name(name) for name in trained_names or ()}
    unresolved = [split for split in seen[IMAGE_LABELS].values() if split is None]
    unresolved += [split for split in seen[BOXES].values() if split is None and not stated]
    for split in seen[BOXES].values():
        known |= {clean_name(name) for _, name in split.base} if split else set()
    for split in seen[IMAGE_LABELS].values():
        known |= {clean_name(name) for name in split.names} if split else set()
    if wanted & known:
        return "yes"
    foreign = any(not type(method).__module__.startswith("ovdet2.") for method in methods)
    return UNKNOWN if seen[CAPTIONS] or unresolved or foreign else "no"


def _datasets(specs: Sequence[SourceSpec], kind: str) -> dict[str, Split | None]:
    """{data set: its split, if the registration states the classes}; the same whatever was read before."""
    return {name: _registered_split(name) for spec in specs if spec.kind == kind for name in spec.datasets}


def _registered_split(name: str) -> Split | None:
    if name not in DatasetCatalog.list() or not MetadataCatalog.get(name).get("ov_classes_known"):
        return None
    try:
        return split_of(name)
    except OVDetError:  # a training set that is not on this machine
        return None


def _listed(datasets: dict[str, Split | None]) -> str:
    named = [
        f"{name} ({len(split.base) or len(split.names)} classes)" if split else name for name, split in datasets.items()
    ]
    return ", ".join(named) or NONE


def _teacher(cfg: CfgNode) -> tuple[str, str]:
    """(the vision-language model, its data); "none" for a closed-set head without distillation or CLIP trunk."""
    model = cfg.MODEL
    is_used = (
        model.OVD.CLASSIFIER != "closed_set"
        or model.OVD.SECONDARY_SCORES != "none"
        or "clip" in model.BACKBONE.NAME
        or any(method.is_on(cfg) for method in methods_of(cfg))
    )
    if not is_used:
        return NONE, NONE
    if not model.TEACHER.ARCHITECTURE:
        return UNKNOWN, UNKNOWN
    tag = Path(model.TEACHER.PRETRAINED).name
    return f"{model.TEACHER.ARCHITECTURE} {tag}".strip(), teacher_data(model.TEACHER.PRETRAINED)


def _joined(before: Setting, after: Setting) -> Setting:
    """The setting of a training that started from weights with another setting."""

    def both(name: str) -> str:
        texts = [text for text in dict.fromkeys((getattr(before, name), getattr(after, name))) if text != NONE]
        return UNKNOWN if UNKNOWN in texts else "; then ".join(texts) or NONE

    answers = {before.novel_names, after.novel_names}
    return Setting(
        **{name: both(name) for name in ("boxes", "image_labels", "captions", "teacher", "teacher_data")},
        novel_names="yes" if "yes" in answers else UNKNOWN if UNKNOWN in answers else "no",
        stated_by=f"{before.stated_by}, {after.stated_by}",
    )


def _is_file(name: str, path: Path) -> bool:
    return bool(name) and os.path.abspath(os.path.expanduser(name)) == os.path.abspath(path)
