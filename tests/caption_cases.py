"""Captioned images of a few pixels as files of each format, for the tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from ovdet2.io.files import write_json

COLOURS = ("red", "green", "blue", "grey")


def image_of(index, height=40, width=48):
    """(H, W, 3) uint8 of one of four colours with some texture."""
    rows, columns = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3), np.uint8)
    image[..., index % 3] = 160 + (10 * index + 3 * rows + 5 * columns) % 90
    return image + np.uint8(40 * (index % 4 == 3))


def caption_of(index):
    return f"a {COLOURS[index % 4]} square of number {index}"


def write_coco(folder, count, captions_each=2):
    """captions.json and images/ of ``count`` images; returns the json's content."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(image_of(index)).save(folder / "images" / f"{index}.png")
    data = {
        "images": [{"id": 100 + index, "file_name": f"{index}.png"} for index in range(count)],
        "annotations": [
            {"id": each * count + index, "image_id": 100 + index, "caption": f"{caption_of(index)}, {each}"}
            for each in range(captions_each)
            for index in range(count)
        ],
    }
    write_json(folder / "captions.json", data)
    return data


def write_shard(path, samples):
    """A tar file; ``samples`` is a list of (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png_of(index):
    buffer = io.BytesIO()
    Image.fromarray(image_of(index)).save(buffer, format="PNG")
    return buffer.getvalue()


def make_tsv(folder, count=4, extra=()):
    write_coco(folder, count)
    lines = [f"{caption_of(i)}\t{i}.png\n".encode() for i in range(count)]
    (folder / "pairs.tsv").write_bytes(b"".join([*lines, *extra]))
    return folder / "pairs.tsv", folder / "images"


def make_shards(folder, per_shard=(3, 4), extra=()):
    number, paths = 0, []
    for shard, count in enumerate(per_shard):
        samples = []
        for _ in range(count):
            image = (f"d/{number:05d}.png", png_of(number))
            text = caption_of(number)
            as_json = (f"d/{number:05d}.json", json.dumps({"caption": text, "url": "x"}).encode())
            samples += [as_json, image] if number % 2 else [image, (f"d/{number:05d}.txt", f"{text}\n".encode())]
            number += 1
        paths.append(folder / f"{shard:03d}.tar")
        write_shard(paths[-1], [*samples, *(extra if shard == 0 else ())])
    return folder / "*.tar", folder / "index.safetensors"
