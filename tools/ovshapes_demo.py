"""The demonstration of `make demo`: train ViLD-text on OV-Shapes, evaluate it, draw what it finds.

Called by ``run_ovshapes.py --demo``.
"""

import json
from pathlib import Path

from detectron2.data import DatasetCatalog
from PIL import Image
from run_ovshapes import ROWS, make_table, run, run_row

from ovdet2.data.shapes.classes import NOVEL_NAMES
from ovdet2.files import atomic_path

PICTURES = 8
FREE_WORDS = "red star, blue star, moon, striped shape"


def run_demo(output):
    """Run the rows, draw, and print where everything is.

    Args:
        output: folder of the runs.
    """
    rows = ["teacher", "vild_text"]
    for name in rows:
        run_row(name, 0, output)
    weights = ["MODEL.WEIGHTS", str(output / "vild_text" / "seed0" / "model_final.pth")]
    images = [record["file_name"] for record in with_novel_objects()][:PICTURES]
    drawn = output.parent / "demo"
    command = ["demo/demo.py", "--config-file", f"configs/{ROWS['vild_text'].config}", "--input", *images]
    run([*command, "--output", str(drawn / "all_words"), *weights])
    run([*command, "--output", str(drawn / "free_words"), "--vocabulary", FREE_WORDS, *weights])
    pictures = [drawn / "all_words" / f"{Path(image).stem}.png" for image in images]
    sheet = contact_sheet(pictures, drawn / "detections.png")
    print("\n" + make_table(rows, [0], output))
    found = json.loads((drawn / "all_words" / "detections.json").read_text())
    novel = sum(d["word"] in NOVEL_NAMES for record in found for d in record["detections"])
    print(
        f"\nPictures of {PICTURES} validation images with {novel} detections of words that had no training box: {sheet}"
    )
    print(f"The same images asked for other words ({FREE_WORDS}): {drawn / 'free_words'}")


def with_novel_objects():
    """Validation records that show a novel object and at least three objects: pictures worth looking at."""
    import ovdet2.data.datasets  # noqa: F401  registers OV-Shapes

    base = 65 - len(NOVEL_NAMES)
    for record in DatasetCatalog.get("ov_shapes_val_all"):
        classes = [annotation["category_id"] for annotation in record["annotations"]]
        if len(classes) >= 3 and max(classes) >= base:
            yield record


def contact_sheet(paths, destination, columns=4, side=480):
    """One picture of several, each fitted into a square of ``side`` pixels; returns ``destination``."""
    rows = -(-len(paths) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for index, path in enumerate(paths):
        with Image.open(path) as picture:
            picture.thumbnail((side - 8, side - 8))
            sheet.paste(picture.convert("RGB"), (index % columns * side + 4, index // columns * side + 4))
    with atomic_path(destination) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(destination)
