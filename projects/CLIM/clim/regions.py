"""Zero-shot naming of ground-truth boxes: by a pass per crop, and from one pass over the image (Tables 3 and 5).

Shapes: G boxes of an image, K words, D embedding dimension.
"""

from functools import partial
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from torch.nn import functional as F

from ovdet2.data.datasets import split_of
from ovdet2.errors import NumericalError, UsageError
from ovdet2.io.files import read_json, write_json
from ovdet2.io.images import read_image
from ovdet2.io.progress import progress_bar
from ovdet2.ov_shapes.world.classes import CLASS_NAMES
from ovdet2.ov_shapes.world.scenes import single_object_scene
from ovdet2.vlm.crops import embed_regions
from ovdet2.vlm.dense import embed_regions_dense, is_vit
from ovdet2.vocabulary import Vocabulary

WHOLE_IMAGES = 650  # ten of each class of OV-Shapes
_KEPT = (1, 5)


def evaluate(teacher, dataset, side, factors=(1.0, 1.5), templates="vild63", limit=0, square=False):
    """Name the ground-truth boxes of a data set, and on OV-Shapes whole images.

    Args:
        teacher: :class:`~ovdet2.vlm.teacher.Teacher`.
        dataset: registered open-vocabulary data set.
        side: longest edge of the image for the map, in pixels.
        factors: crops, as multiples of the box.
        templates: prompt template set.
        limit: first images that are looked at; 0: all.
        square: pad the image to a square for the map, as the authors do; see
            :func:`~ovdet2.vlm.dense.embed_regions_dense`.

    Returns:
        dict "teacher", "dataset", "settings", and per way ("crops"; "dense map" of a ViT or "attention pool" of a
        ResNet; "whole images" of OV-Shapes) {"top1" | "top5": {"all" | "base" | "novel" | group: percent}}.

    Raises:
        UsageError: no such data set, or a tower without dense features.
    """
    split = split_of(dataset)
    if split is None:
        raise UsageError(f"{dataset!r} is not a registered open-vocabulary data set: see datasets/README.md.")
    one_pass = "dense map" if is_vit(teacher.clip.visual) else "attention pool"
    dense = partial(embed_regions_dense, side=side, square=square)
    ways = {"crops": partial(embed_regions, factors=factors), one_pass: dense}
    words = Vocabulary.build(split.names, teacher, templates, split.base_mask, split.category_ids).embeddings
    classes, ranks = [], {name: [] for name in ways}
    records = DatasetCatalog.get(dataset)
    for record in progress_bar(records[:limit] if limit else records, desc="naming boxes", unit="image"):
        boxes, truth = truth_of(record)
        image = torch.from_numpy(read_image(record["file_name"], "RGB").copy()).permute(2, 0, 1)
        classes.append(truth)
        for name, embed in ways.items():
            ranks[name].append(ranks_of(embed(teacher, image, boxes).cpu() @ words.T, truth))
    result = {
        "teacher": str(teacher.fingerprint),
        "dataset": dataset,
        "settings": {
            "side": side,
            "square": square,
            "factors": list(factors),
            "templates": templates,
            "limit": limit,
        },
    }
    for name, found in ranks.items():
        result[name] = accuracies(torch.cat(found), torch.cat(classes), split)
    if set(split.names) == set(CLASS_NAMES):
        result["whole images"] = whole_image_accuracy(teacher, words, split)
    return result


def whole_image_accuracy(teacher, words, split, seed=0):
    """Zero-shot accuracy on clean images of one object each, ten per class, of separate seeds.

    The images, and so the figure, are those of "whole_images" in the manifests of the embedded models.

    Args:
        teacher: as of :func:`evaluate`.
        words: Tensor [65, D], unit rows in the order of the split's names.
        split: OV-Shapes'.
        seed: of the images.

    Returns:
        As one way of :func:`evaluate`.
    """
    rows, truth, side = [], [], (teacher.image_size, teacher.image_size)
    for index in progress_bar(range(WHOLE_IMAGES), desc="naming images", unit="image"):
        image = torch.from_numpy(single_object_scene(seed, index).image).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(image, side, mode=teacher.interpolation, antialias=True).clamp(0, 1)
        rows.append(teacher.encode_image(pixels).cpu())
        truth.append(split.names.index(CLASS_NAMES[index % len(CLASS_NAMES)]))
    truth = torch.tensor(truth)
    return accuracies(ranks_of(torch.cat(rows) @ words.T, truth), truth, split)


def compare(before, after, dataset, side, output, name, square=False):
    """Measure two teachers alike, write regions_before.json and regions_<name>.json, and print the difference.

    Args:
        before, after: :class:`~ovdet2.vlm.teacher.Teacher`.
        dataset, side, square: of :func:`evaluate`.
        output: folder. A regions_before.json of the same teacher and settings is taken as it is.
        name: what to call ``after``.

    Returns:
        Percent by which the error of the map's (or attention pool's) top-1 fell, relative to before.
    """
    results = []
    names = ("before", name)
    for teacher, title in zip((before, after), names):
        path = Path(output) / f"regions_{title}.json"
        result = read_json(path) if path.is_file() else {}
        same = result.get("teacher") == str(teacher.fingerprint) and result.get("dataset") == dataset
        # Files of before have no "square": images were not padded.
        if not same or (result["settings"]["side"], result["settings"].get("square", False)) != (side, square):
            result = evaluate(teacher, dataset, side, square=square)
            write_json(path, result, indent=1)
        results.append(result)
    print(table(results, names))
    one_pass = "dense map" if "dense map" in results[1] else "attention pool"
    errors = [100 - result[one_pass]["top1"]["all"] for result in results]
    cut = 100 * (1 - errors[1] / errors[0]) if errors[0] else 0.0
    print(f"error of the {one_pass}: {errors[0]:.1f}% before, {errors[1]:.1f}% after, {cut:.1f}% less")
    return cut


def table(results, names):
    """A markdown table, a row per result and way: top-1 and top-5 of all boxes, and top-1 of each subset."""
    subsets = list(results[0]["crops"]["top1"])
    lines = ["| | regions by | top-1 | top-5 | " + " | ".join(subsets[1:]) + " |"]
    lines.append("|---" * 2 + "|---:" * (len(subsets) + 1) + "|")
    for result, name in zip(results, names, strict=True):
        for way in ("crops", "dense map", "attention pool", "whole images"):
            if way in result:
                top1, top5 = result[way]["top1"], result[way]["top5"]
                figures = [top1["all"], top5["all"], *(top1[subset] for subset in subsets[1:])]
                lines.append(f"| {name} | {way} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    return "\n".join(lines)


def truth_of(record):
    """(boxes [G, 4] XYXY float, contiguous classes [G] long) of the objects of a record that are not crowd."""
    annotations = [annotation for annotation in record["annotations"] if not annotation.get("iscrowd", 0)]
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return boxes, torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.long)


def ranks_of(logits, truth):
    """How many other words score as high as the right one or higher: Tensor [G] long of logits [G, K] and classes [G].

    Raises:
        NumericalError: logits that are not finite.
    """
    if not logits.isfinite().all():
        raise NumericalError("embeddings of regions are not finite: these weights name nothing.")
    return (logits >= logits.gather(1, truth[:, None])).sum(dim=1) - 1


def accuracies(ranks, truth, split):
    """{"top1" | "top5": {subset: percent}}; without subsets that have no box."""
    ids, base = torch.tensor(split.category_ids)[truth], torch.tensor(split.base_mask)[truth]
    subsets = {"all": torch.ones_like(base), "base": base, "novel": ~base}
    subsets |= {group: torch.isin(ids, torch.tensor(wanted)) for group, wanted in split.groups.items()}
    return {
        f"top{kept}": {
            name: 100 * (ranks[mask] < kept).float().mean().item() for name, mask in subsets.items() if mask.any()
        }
        for kept in _KEPT
    }
