"""PASCAL VOC's annotations (one XML file per image) as a COCO json."""

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ovdet2.errors import DataError
from ovdet2.io.progress import progress_bar
from ovdet2.vocabulary.word_lists import named_words


def voc_json(folder: str | Path, subset: str) -> dict[str, Any]:
    """Convert the annotations of a VOC folder to a COCO json.

    VOC counts pixels from 1 and includes the last one: (xmin, xmax) = (1, w) is a box of x 0 and width w. Objects
    marked "difficult" get the flag "iscrowd": a detection of them is neither true nor false positive. The metric
    "ov_voc" matches detections to them by IoU, as in the challenge; COCO's code would match by the share of the
    detection inside of them.

    Args:
        folder: with Annotations/ and ImageSets/Main/, such as VOC2007.
        subset: name of a list in ImageSets/Main, such as "test".

    Returns:
        COCO json: images numbered from 1 in the order of the list, categories 1 to 20.

    Raises:
        DataError: a file is missing or no VOC annotation; an unknown class; a box without area.
    """
    listing = Path(folder) / "ImageSets" / "Main" / f"{subset}.txt"
    try:
        stems = listing.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{listing} cannot be read ({error}): unpack the archive of VOC so that {folder} holds Annotations, "
            "ImageSets and JPEGImages."
        ) from None
    words = named_words("voc")
    assert words.category_ids is not None
    ids = {name.replace(" ", ""): number for number, name in zip(words.category_ids, words.names)}
    images, annotations = [], []
    for image_id, stem in enumerate(
        progress_bar(stems, desc=f"reading VOC {subset}", unit="image", leave=False), start=1
    ):
        path = Path(folder) / "Annotations" / f"{stem}.xml"
        image, objects = _read(path, ids)
        images.append({"id": image_id, "file_name": f"{stem}.jpg", **image})
        annotations.extend({"id": len(annotations) + n, "image_id": image_id, **o} for n, o in enumerate(objects, 1))
    categories = [{"id": number, "name": name} for number, name in zip(words.category_ids, words.names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read(path, ids):
    """({"width", "height"}, list of COCO annotations without id and image_id) of one file."""
    try:
        root = ElementTree.parse(path).getroot()
        image = {key: int(_text(root, f"size/{key}")) for key in ("width", "height")}
        return image, [_annotation(entry, ids) for entry in root.findall("object")]
    except (OSError, ElementTree.ParseError, AttributeError, ValueError, KeyError) as error:
        raise DataError(f"{path} is missing or no VOC annotation ({error!r}): unpack the archive again.") from None


def _text(entry, path) -> str:
    text = entry.findtext(path)
    if text is None:
        raise ValueError(f"no {path}")
    return text


def _annotation(entry, ids):
    x0, y0, x1, y1 = (float(_text(entry, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    width, height = x1 - x0 + 1, y1 - y0 + 1
    if width <= 0 or height <= 0:
        raise ValueError(f"a box of {width} x {height} pixels")
    difficult = entry.find("difficult")
    return {
        "category_id": ids[_text(entry, "name")],
        "bbox": [x0 - 1, y0 - 1, width, height],
        "area": width * height,
        "iscrowd": int(difficult is not None and difficult.text.strip() == "1"),
    }
