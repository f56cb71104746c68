"""What `make demo` does: ViLD-text, the region cache, ViLD and ViLD-ensemble on OV-Shapes, and what they find.

Called by ``run_ovshapes.py --demo``.
"""

import json
from pathlib import Path

from detectron2.data import DatasetCatalog
from PIL import Image
from run_ovshapes import DATASET, ROWS, make_table, run, run_row

from ovdet2.io.files import atomic_path
from ovdet2.ov_shapes.world.classes import BASE_NAMES, NOVEL_NAMES

PICTURES = 4
FREE_WORDS = "red star, blue star, moon, striped shape"


def run_demo(output):
    """Run the rows, draw, and print where everything is.

    Args:
        output: folder of the runs.
    """
    rows = ["teacher", "vild_text", "vild", "vild_ensemble"]
    for name in rows:
        run_row(name, 0, output)
    images = [record["file_name"] for record in with_novel_objects()][:PICTURES]
    drawn = output.parent / "demo"
    before = draw("vild_text", images, output, drawn / "vild_text")
    after = draw("vild_ensemble", images, output, drawn / "vild_ensemble")
    free_words = draw("vild_ensemble", images, output, drawn / "free_words", "--vocabulary", FREE_WORDS)
    sheet = contact_sheet([*before, *after], drawn / "detections.png")
    print("\n" + make_table(rows, [0], output))
    print(
        f"\n{PICTURES} validation images, above by ViLD-text ({novel_finds(before)} detections of words that had no "
        f"training box), below by ViLD-ensemble ({novel_finds(after)}): {sheet}"
    )
    print(f"The same images asked for other words ({FREE_WORDS}): {free_words[0].parent}")
    print(f"What ViLD-ensemble gets right and wrong: {output}/vild_ensemble/seed0/inference/{DATASET}/report.html")


def draw(row, images, output, folder, *options):
    """Draw a row's detections in ``images``; returns the paths of the pictures."""
    weights = ["MODEL.WEIGHTS", str(output / row / "seed0" / "model_final.pth")]
    command = ["demo/demo.py", "--config-file", f"configs/{ROWS[row].config}", "--input", *images]
    run([*command, "--output", str(folder), *options, *weights])
    return [folder / f"{Path(image).stem}.png" for image in images]


def novel_finds(pictures):
    """Detections drawn whose word is novel."""
    found = json.loads((pictures[0].parent / "detections.json").read_text())
    return sum(d["word"] in NOVEL_NAMES for record in found for d in record["detections"])


def with_novel_objects():
    """Validation records that show a novel object and at least three objects: pictures worth looking at."""
    import ovdet2.data.datasets  # noqa: F401  registers OV-Shapes

    for record in DatasetCatalog.get("ov_shapes_val_all"):
        classes = [annotation["category_id"] for annotation in record["annotations"]]
        if len(classes) >= 3 and max(classes) >= len(BASE_NAMES):
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
