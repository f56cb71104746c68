"""Images with captions: COCO-captions json, tab-separated lines, and the captions of OV-Shapes.

A source is a sequence of records ``{"file_name", "image_id", "first", "captions"}``: the image's captions are rows
``first .. first + captions - 1`` of ``texts()``, the order of the text table. Nothing is decoded before ``read``.
"""

import logging
from collections import defaultdict
from pathlib import Path

import numpy as np
from detectron2.data.common import DatasetFromList

from ovdet2.data.datasets.register import data_root
from ovdet2.errors import DataError, UsageError
from ovdet2.io.files import read_json, sha256_file
from ovdet2.io.images import read_image

logger = logging.getLogger("ovdet2.clim")
SOURCES = ("coco", "tsv", "tar", "ov_shapes")
_SHOWN = 5  # faults named in a message


def build_source(cfg):
    """The source of a configuration (CLIM.SOURCE, CAPTIONS, IMAGES, PAIRS, CAPTIONS_EACH; DATALOADER.MAX_BAD_IMAGES).

    Raises:
        UsageError: unknown kind, or no file named.
        DataError: a missing or damaged file, more faulty captions than tolerated, or nothing left.
    """
    kind, captions = cfg.CLIM.SOURCE, data_root() / cfg.CLIM.CAPTIONS
    if kind not in SOURCES:
        raise UsageError(f"CLIM.SOURCE is {kind!r}: choose one of {', '.join(SOURCES)}.")
    if not cfg.CLIM.CAPTIONS and kind != "ov_shapes":
        raise UsageError(f"CLIM.SOURCE is {kind!r} and CLIM.CAPTIONS is empty: name the file, or the shards.")
    folder, max_bad = data_root() / cfg.CLIM.IMAGES, cfg.DATALOADER.MAX_BAD_IMAGES
    if kind == "coco":
        return CocoCaptions(captions, folder, max_bad)
    if kind == "tsv":
        return TsvCaptions(captions, folder, max_bad)
    if kind == "tar":
        from clim.tar_shards import TarShards

        return TarShards(captions, f"{cfg.OUTPUT_DIR}/shards.safetensors", max_bad)
    from clim.ov_shapes import ensure_captions

    return CocoCaptions(*ensure_captions(data_root(), cfg.CLIM.PAIRS, cfg.CLIM.CAPTIONS_EACH), max_bad)


class CocoCaptions:
    """A COCO-captions json and its images."""

    def __init__(self, json_file, folder, max_bad=0):
        """
        Args:
            json_file: with "images" (id, file_name) and "annotations" (image_id, caption).
            folder: of the images.
            max_bad: images without a caption, and empty captions, that are left out with a warning.

        Raises:
            DataError: no such json, a caption of an unknown image, more faults than ``max_bad``, or no image left.
        """
        data = read_json(json_file, "set CLIM.CAPTIONS to a COCO-captions json")
        captions, faults = defaultdict(list), []
        try:
            names = {image["id"]: image["file_name"] for image in data["images"]}
            for entry in data["annotations"]:
                text = entry.get("caption")
                if entry["image_id"] not in names:
                    raise DataError(f"{json_file}: a caption is of image {entry['image_id']}, which it does not list.")
                if isinstance(text, str) and text.strip():
                    captions[entry["image_id"]].append(text.strip())
                else:
                    faults.append(f"annotation {entry.get('id')} of image {entry['image_id']} has an empty caption")
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{json_file} is no COCO-captions json ({error!r}): check CLIM.CAPTIONS.") from None
        faults += [f"image {key} ({name}) has no caption" for key, name in names.items() if not captions[key]]
        self.folder, self._identity = Path(folder), {"kind": "coco", "sha256": sha256_file(json_file)}
        records, self._texts = [], []
        for key, name in names.items():
            if captions[key]:
                record = {"file_name": name, "image_id": key, "first": len(self._texts), "captions": len(captions[key])}
                records.append(record)
                self._texts += captions[key]
        require_few(faults, max_bad, json_file, len(records))
        self._records = DatasetFromList(records, copy=False)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        record = self._records[index]
        return record | {"file_name": str(self.folder / record["file_name"])}

    def texts(self):
        """All captions, in the order of the text table."""
        return iter(self._texts)

    @property
    def num_texts(self):
        return len(self._texts)

    def identity(self):
        """What tells this source's captions from others': a JSON-serialisable dict."""
        return self._identity

    def read(self, record):
        """Image of a record, (H, W, 3) uint8 RGB. Raises :class:`DataError`."""
        return read_image(record["file_name"], "RGB")


class TsvCaptions:
    """Lines of caption<TAB>path, as of CC3M; the file is read by line offsets, so millions of lines fit in memory."""

    def __init__(self, tsv_file, folder, max_bad=0):
        """
        Args:
            tsv_file: UTF-8, one pair a line, no header.
            folder: that the paths are relative to.
            max_bad: lines without a caption or path that are left out with a warning.

        Raises:
            DataError: no such file, more faulty lines than ``max_bad``, or no line left.
        """
        self.path, self.folder = Path(tsv_file), Path(folder)
        offsets, position, faults = [], 0, []
        try:
            with open(self.path, "rb") as handle:
                for number, line in enumerate(handle, 1):
                    fault = _fault_of(line)
                    if fault is None:
                        offsets.append(position)
                    else:
                        faults.append(f"line {number} {fault}")
                    position += len(line)
        except OSError as error:
            raise DataError(f"{tsv_file} cannot be read ({error.strerror}): check CLIM.CAPTIONS.") from None
        require_few(faults, max_bad, tsv_file, len(offsets))
        self._offsets = np.array(offsets, dtype=np.int64)
        self._identity = {"kind": "tsv", "sha256": sha256_file(self.path)}

    def __len__(self):
        return len(self._offsets)

    num_texts = property(__len__)

    def __getitem__(self, index):
        path = self._fields(index)[1]
        return {"file_name": str(self.folder / path), "image_id": int(index), "first": int(index), "captions": 1}

    def texts(self):
        """See :meth:`CocoCaptions.texts`."""
        return (self._fields(index)[0] for index in range(len(self)))

    def identity(self):
        """See :meth:`CocoCaptions.identity`."""
        return self._identity

    read = CocoCaptions.read

    def _fields(self, index):
        with open(self.path, "rb") as handle:
            handle.seek(self._offsets[index])
            caption, path = handle.readline().decode().split("\t")
        return caption.strip(), path.strip()


def require_few(faults, max_bad, source, usable):
    """Warn of the captions that are left out.

    Args:
        faults: list of str.
        max_bad: how many are tolerated.
        source: the file, for messages.
        usable: images that are left.

    Raises:
        DataError: more faults than tolerated, or nothing left.
    """
    shown = "; ".join(faults[:_SHOWN]) + ("; ..." if len(faults) > _SHOWN else "")
    if len(faults) > max_bad:
        raise DataError(
            f"{source} has {len(faults)} faulty entries, DATALOADER.MAX_BAD_IMAGES is {max_bad}: {shown}. Give each "
            "image a caption or remove it, or raise DATALOADER.MAX_BAD_IMAGES."
        )
    if not usable:
        raise DataError(f"{source} holds no image with a caption{': ' + shown if shown else ''}: check CLIM.CAPTIONS.")
    if faults:
        logger.warning("%s: %d entries are left out: %s", source, len(faults), shown)


def _fault_of(line):
    """What is wrong with a line of a tsv file, or None."""
    try:
        fields = line.decode().rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return "is no UTF-8"
    if len(fields) != 2:
        return f"has {len(fields)} fields instead of caption<TAB>path"
    if not all(field.strip() for field in fields):
        return f"has an empty {'path' if fields[0].strip() else 'caption'}"
    return "has a URL instead of the path of a downloaded image" if "://" in fields[1] else None
