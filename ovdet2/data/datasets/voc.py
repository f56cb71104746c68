"""PASCAL VOC's annotations (one XML file per image) as a COCO json."""

from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

from ovdet2.errors import DataError

# Class names in the order of the challenge, those of two words written as such: they are prompts.
NAMES = {
    "aeroplane": "aeroplane",
    "bicycle": "bicycle",
    "bird": "bird",
    "boat": "boat",
    "bottle": "bottle",
    "bus": "bus",
    "car": "car",
    "cat": "cat",
    "chair": "chair",
    "cow": "cow",
    "diningtable": "dining table",
    "dog": "dog",
    "horse": "horse",
    "motorbike": "motorbike",
    "person": "person",
    "pottedplant": "potted plant",
    "sheep": "sheep",
    "sofa": "sofa",
    "train": "train",
    "tvmonitor": "tv monitor",
}


def voc_json(folder, subset):
    """Turn a VOC folder into a COCO json.

    VOC counts pixels from 1 and includes the last one: (xmin, xmax) = (1, w) is a box of x 0 and width w. Objects
    marked "difficult" get the flag "iscrowd": finding them counts neither way. By the metric "ov_voc" IoU decides what
    finds them, as in the challenge; COCO's own code would take the share of the detection inside of them.

    Args:
        folder: with Annotations/ and ImageSets/Main/, as VOC2007 is.
        subset: name of a list in ImageSets/Main, such as "test".

    Returns:
        COCO json, a dict: images numbered from 1 in the order of the list, categories 1 to 20.

    Raises:
        DataError: a file is missing or no VOC annotation; an unknown class; a box without area.
    """
    listing = Path(folder) / "ImageSets" / "Main" / f"{subset}.txt"
    try:
        stems = listing.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{listing} cannot be read ({error}): unpack the archive of the challenge so that {folder} holds "
            "Annotations, ImageSets and JPEGImages."
        ) from None
    ids = {name: number for number, name in enumerate(NAMES, start=1)}
    images, annotations = [], []
    for image_id, stem in enumerate(tqdm(stems, desc=f"reading VOC {subset}", unit="image", leave=False), start=1):
        path = Path(folder) / "Annotations" / f"{stem}.xml"
        image, objects = _read(path, ids)
        images.append({"id": image_id, "file_name": f"{stem}.jpg", **image})
        annotations.extend({"id": len(annotations) + n, "image_id": image_id, **o} for n, o in enumerate(objects, 1))
    categories = [{"id": ids[name], "name": prompt} for name, prompt in NAMES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _read(path, ids):
    """({"width", "height"}, list of COCO annotations without id and image_id) of one file."""
    try:
        root = ElementTree.parse(path).getroot()
        image = {key: int(root.find("size").find(key).text) for key in ("width", "height")}
        return image, [_annotation(entry, ids) for entry in root.findall("object")]
    except (OSError, ElementTree.ParseError, AttributeError, ValueError, KeyError) as error:
        raise DataError(f"{path} is missing or no VOC annotation ({error!r}): unpack the archive again.") from None


def _annotation(entry, ids):
    box = entry.find("bndbox")
    x0, y0, x1, y1 = (float(box.find(key).text) for key in ("xmin", "ymin", "xmax", "ymax"))
    width, height = x1 - x0 + 1, y1 - y0 + 1
    if width <= 0 or height <= 0:
        raise ValueError(f"a box of {width} x {height} pixels")
    difficult = entry.find("difficult")
    return {
        "category_id": ids[entry.find("name").text],
        "bbox": [x0 - 1, y0 - 1, width, height],
        "area": width * height,
        "iscrowd": int(difficult is not None and difficult.text.strip() == "1"),
    }
