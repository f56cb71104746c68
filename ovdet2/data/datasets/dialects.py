"""The layouts of published OV-COCO annotation files: recognised by their content, mapped to COCO's category ids.

All of them come from the official files by one procedure and differ in their lists of categories and images. A layout
that is mistaken for another trains or evaluates the wrong classes without any error. Therefore every file that is not
exactly of one layout is refused.

| layout | categories | ids | images |
|---|---|---|---|
| OVR-CNN | 48, 17 or 65, each with word vectors ("embedding") | COCO's | with an annotation |
| RegionCLIP | 48, 17 or 65, without word vectors | COCO's | with an annotation |
| CLIPSelf, _65_cat | 65, though only the 48 are annotated | COCO's | with an annotation |
| Detic, _oriorder | 80, the 15 unused ones never annotated | COCO's | with an annotation |
| wusize (BARON, CLIM) | 80, the 15 unused ones never annotated | COCO's | all |
| VLDet, _del | 65 | 1 to 65 in COCO's order | with an annotation |
| OADP, HD-OVD | 65 | 0 to 64, base classes first | all, or with an annotation |

Sources, all of them conversion scripts: alirezazareian/ovr-cnn ipynb/003, microsoft/RegionCLIP
coco_zeroshot_categories, facebookresearch/Detic tools/get_coco_zeroshot_oriorder, wusize/ovdet tools/pre_processors,
clin1223/VLDet tools/get_coco_zeroshot, LutingWang/OADP oadp/build_annotations. wusize/CLIPSelf has no script: its row
follows from its configs and the name of the file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ovdet2.data.datasets.coco_json import filter_coco_json, first_few, first_texts, require_ids, require_lists
from ovdet2.data.datasets.prepare import Official, read_annotations, write_prepared
from ovdet2.data.datasets.splits import OV_COCO, OV_COCO_UNUSED
from ovdet2.data.datasets.validity import is_id
from ovdet2.errors import DataError
from ovdet2.io.files import sha256_file

_BASE = frozenset(name for _, name in OV_COCO.base)
_NOVEL = frozenset(name for _, name in OV_COCO.novel)
_UNUSED = frozenset(name for _, name in OV_COCO_UNUSED)
_COCO_IDS = dict((*OV_COCO.base, *OV_COCO.novel, *OV_COCO_UNUSED))
_ID_OF = {name: category_id for category_id, name in _COCO_IDS.items()}
_VLDET_IDS = dict(enumerate((name for _, name in sorted((*OV_COCO.base, *OV_COCO.novel))), start=1))
_OADP_IDS = dict(enumerate(OV_COCO.names))
_OFFICIAL_WAY = "use the official COCO files instead: ovdet2 dataset prepare ov-coco (datasets/README.md)"


@dataclass(frozen=True)
class Layout:
    """A recognised layout.

    Args:
        name: the code bases that use it.
        reason: the properties by which it was recognised.
        names: {category id in the file: class name}.
    """

    name: str
    reason: str
    names: Mapping[int, str]


def recognise(data: Mapping[str, Any], source: str | Path) -> Layout:
    """Recognise the OV-COCO layout of a json.

    Args:
        data: parsed json.
        source: its path, for messages.

    Raises:
        DataError: the classes are ambiguous: categories without names or listed twice, names that are not COCO's, a
            numbering or a set of classes that no layout has, annotations of a category that is not listed; or ovdet2
            has written the file.
    """
    require_lists(data, source)
    if "manifest" in data:
        raise DataError(
            f"{source} was written by ovdet2 dataset prepare ov-coco and needs no conversion: copy it into the "
            "annotations folder."
        )
    names = _category_names(data["categories"], source)
    require_ids(data, source)
    annotated = _annotated_classes(data["annotations"], names, source)
    count = f"{len(names)} categories"
    if names == _VLDET_IDS:
        return Layout("VLDet (_del)", f"{count} numbered 1 to 65 in COCO's order", names)
    if names == _OADP_IDS:
        return Layout("OADP, HD-OVD", f"{count} numbered 0 to 64, base classes first", names)
    _require_coco_ids(names, source)
    classes = frozenset(names.values())
    if classes == _BASE | _NOVEL | _UNUSED:
        if annotated & _UNUSED:
            return Layout("official COCO", f"{count}, annotations of classes that OV-COCO does not use", names)
        if {image.get("id") for image in data["images"]} - {entry.get("image_id") for entry in data["annotations"]}:
            return Layout("wusize (BARON, CLIM)", f"all {count} of COCO, images without annotation kept", names)
        return Layout("Detic, CoDet (_oriorder)", f"all {count} of COCO, annotated images only", names)
    if classes not in (_BASE, _NOVEL, _BASE | _NOVEL):
        raise DataError(
            f"{source} has {count}, not the 48 base, the 17 novel, both, or all 80 of COCO, as every known layout of "
            f"OV-COCO has: {_OFFICIAL_WAY}."
        )
    if classes > _BASE and annotated <= _BASE:
        return Layout("CLIPSelf (_65_cat)", f"{count} with COCO's ids, annotations of base classes only", names)
    if any("embedding" in category for category in data["categories"]):
        return Layout("OVR-CNN", f"{count} with COCO's ids and word vectors", names)
    return Layout("RegionCLIP", f"{count} with COCO's ids, without word vectors", names)


def to_coco_ids(data: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """Map the category ids of a json to COCO's.

    Args:
        data: json as of :func:`recognise`; not changed.
        layout: its layout.

    Returns:
        The json with COCO's ids; category records keep only id, name and supercategory, not their word vectors.
    """
    coco_id = {category_id: _ID_OF[name] for category_id, name in layout.names.items()}
    annotations = data["annotations"]
    if any(category_id != _ID_OF[name] for category_id, name in layout.names.items()):
        annotations = [{**entry, "category_id": coco_id[entry["category_id"]]} for entry in annotations]
    categories = [
        {key: category[key] for key in ("supercategory", "name") if key in category} | {"id": coco_id[category["id"]]}
        for category in data["categories"]
    ]
    return {**data, "annotations": annotations, "categories": categories}


def import_ov_coco(
    files: Iterable[str | Path], folder: str | Path, official: Mapping[str, Official]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Write ov_coco_train_base.json and ov_coco_val_all.json from files of other code bases.

    Files of one subset are merged, for example a test set with one file of base and one of novel classes. Whether a
    file is of train2017 or val2017 is read from the "coco_url" of its images, else from its name.

    Args:
        files: paths; at least one.
        folder: where to write.
        official: :class:`Official` by name of the written file.

    Yields:
        (path, report) as of :func:`~ovdet2.data.datasets.prepare.prepare_split`, for each subset with a file;
        report["layouts"] has one line per file with the recognised layout and the reason.

    Raises:
        DataError: a file that :func:`recognise` refuses, that is of neither subset or of both, or that repeats
            annotations of another file; a subset without annotations of classes that it must have.
    """
    parts = {}
    for path in map(Path, files):
        data = read_annotations(path, remedy="check the path")
        layout = recognise(data, path)
        parts.setdefault(_subset(data["images"], path), []).append((path, layout, to_coco_ids(data, layout)))
    for subset, target, wanted in (
        ("train2017", "ov_coco_train_base.json", {"base": OV_COCO.base}),
        ("val2017", "ov_coco_val_all.json", {"base": OV_COCO.base, "novel": OV_COCO.novel}),
    ):
        if subset in parts:
            paths, layouts, jsons = zip(*parts[subset], strict=True)
            target = Path(folder) / target
            yield target, _write_subset(target, wanted, paths, layouts, jsons, official[target.name])


def _write_subset(target, wanted, paths, layouts, jsons, official):
    joined = " and ".join(map(str, paths))
    data = _merged(jsons, joined)
    annotated = {entry["category_id"] for entry in data["annotations"]}
    for kind, classes in wanted.items():
        if not annotated & dict(classes).keys():
            raise DataError(
                f"{joined}: no annotation of a {kind} class, which {target.name} needs: give the file that has them "
                "too (--from BASE_FILE NOVEL_FILE)."
            )
    category_ids = [category_id for classes in wanted.values() for category_id, _ in classes]
    filtered, report = filter_coco_json(data, category_ids, source=joined)
    published = official.filtered_counts["images"]
    report["verdict"] = (
        f"as published: {published:,} images"
        if report["images"] == published
        else f"the published file has {published:,} images: the source is a part of it, or was changed"
    )
    report["layouts"] = [
        f"from {path}: {layout.name} layout ({layout.reason})" for path, layout in zip(paths, layouts, strict=True)
    ]
    sources = [
        {"file": path.name, "sha256": sha256_file(path), "layout": layout.name}
        for path, layout in zip(paths, layouts, strict=True)
    ]
    return write_prepared(target, filtered, report, OV_COCO, {"sources": sources})


def _merged(jsons, sources):
    """Merge jsons that have COCO's ids: every image and category once, all annotations."""
    if len(jsons) == 1:
        return jsons[0]
    lists = {}
    for key in ("images", "categories"):
        lists[key] = list({record.get("id"): record for data in jsons for record in data[key]}.values())
    lists["annotations"] = [entry for data in jsons for entry in data["annotations"]]
    counted = Counter(entry.get("id") for entry in lists["annotations"])
    twice = [annotation_id for annotation_id, count in counted.items() if count > 1]
    if twice:
        raise DataError(
            f"{sources}: {len(twice)} annotations occur twice, id {first_few(twice)}: give files without common "
            "annotations, such as one of the base and one of the novel classes."
        )
    return {**jsons[0], **lists}


def _category_names(categories, source):
    """Dict of category id to name; both unique, the names COCO's."""
    ids, names = ([category.get(key) for category in categories] for key in ("id", "name"))
    if not all(map(is_id, ids)) or not all(isinstance(name, str) for name in names):
        raise DataError(
            f"{source} has categories without an integer id or without a name. Ids without names are ambiguous: VLDet "
            "numbers 65 classes from 1 in COCO's order, OADP from 0 with the base classes first. Use a file whose "
            f"categories are named, or {_OFFICIAL_WAY}."
        )
    for kind, values in (("id", ids), ("name", names)):
        twice = [value for value, count in Counter(values).items() if count > 1]
        if twice:
            raise DataError(f"{source} has the category {kind} {first_few(twice)} twice: {_OFFICIAL_WAY}.")
    unknown = [name for name in names if name not in _ID_OF]
    if unknown or not names:
        fault = f"classes that COCO does not have: {first_few(unknown)}" if unknown else "no category"
        raise DataError(f"{source} has {fault}. It has no known layout of OV-COCO: {_OFFICIAL_WAY}.")
    return dict(zip(ids, names, strict=True))


def _annotated_classes(annotations, names, source):
    """Names of the classes that have an annotation."""
    used = {}  # category id -> an annotation of it
    for annotation in annotations:
        used.setdefault(annotation.get("category_id"), annotation.get("id"))
    stray = [f"{category_id} (annotation {used[category_id]})" for category_id in used if category_id not in names]
    if stray:
        raise DataError(
            f"{source} has annotations of categories that it does not list: {first_texts(stray)}. Its annotations and "
            f"its categories seem to be numbered differently: {_OFFICIAL_WAY}."
        )
    return frozenset(names[category_id] for category_id in used)


def _require_coco_ids(names, source):
    strange = [
        f"{category_id} for {name} (COCO: {_ID_OF[name]})"
        for category_id, name in sorted(names.items())
        if _ID_OF[name] != category_id
    ]
    if strange:
        raise DataError(
            f"{source} numbers its {len(names)} categories neither as COCO, nor 1 to 65 in COCO's order (VLDet), nor 0 "
            f"to 64 with the base classes first (OADP): {first_texts(strange)}. The order is ambiguous: {_OFFICIAL_WAY}."
        )


def _subset(images, path):
    """ "train2017" or "val2017"."""
    urls = {part for image in images for part in str(image.get("coco_url", "")).split("/")}
    for evidence in (urls, {part for part in ("train2017", "val2017") if part in path.name}):
        found = evidence & {"train2017", "val2017"}
        if len(found) == 1:
            return found.pop()
        if found:
            raise DataError(f"{path} has images of train2017 and of val2017: give one file for each.")
    raise DataError(
        f"{path}: neither the coco_url of its images nor its file name contains train2017 or val2017: add one of the "
        "two to the file name."
    )
