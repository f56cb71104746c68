"""Train and evaluate ViLD-text, ViLD and ViLD-ensemble on OV-Shapes, and draw their detections.

    ovdet2 demo

OV-Shapes is a small data set of drawn shapes that is generated on the first use. ViLD's region cache is also built. All of
it takes about 15 minutes on two CPU cores and 1.3 GB in the working folder: datasets/ has the images, output/ovshapes/ the
runs, output/demo/ the pictures. An interrupted demo goes on where it stopped.

Then, in the same folder, the trained detectors have names, such as Detector("ovshapes-vild-ensemble").
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from PIL import Image

from ovdet2.command_line import command_parser
from ovdet2.errors import exit_on_error
from ovdet2.experiments.command import run_program
from ovdet2.experiments.runner import Runner
from ovdet2.io.files import atomic_path
from ovdet2.io.images import open_image
from ovdet2.ov_shapes.rows import ENTRIES, OUTPUT, OV_SHAPES_ROWS, TEST_SET
from ovdet2.ov_shapes.world.classes import BASE_NAMES, NOVEL_NAMES

PICTURES = 4
FREE_WORDS = "red star, blue star, moon, striped shape"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_parser("demo", __doc__)
    parser.add_argument(
        "--output",
        default=OUTPUT,
        type=Path,
        help="folder of the runs (output/ovshapes); pictures go to demo/ next to it",
    )
    run_demo(parser.parse_args(argv).output)


def run_demo(output: Path) -> None:
    """Run the rows, draw, and print where everything is.

    Args:
        output: folder of the runs.
    """
    rows, runner = ["teacher", "vild_text", "vild", "vild_ensemble"], Runner(OV_SHAPES_ROWS, output)
    for name in rows:
        runner.run(name)
    images = [record["file_name"] for record, _ in zip(with_novel_objects(), range(PICTURES))]
    drawn = output.parent / "demo"
    before = draw(runner, "vild_text", images, drawn / "vild_text")
    after = draw(runner, "vild_ensemble", images, drawn / "vild_ensemble")
    free_words = draw(runner, "vild_ensemble", images, drawn / "free_words", "--vocabulary", FREE_WORDS)
    sheet = contact_sheet([*before, *after], drawn / "detections.png")
    print("\n" + runner.table(runner.results(rows, [0])))
    print(
        f"\n{PICTURES} validation images, above by ViLD-text ({novel_detections(before)} detections of words that had no "
        f"training box), below by ViLD-ensemble ({novel_detections(after)}): {sheet}"
    )
    print(f"The same images with other words ({FREE_WORDS}): {free_words[0].parent}")
    print(
        f"Correct and wrong detections of ViLD-ensemble: {output}/vild_ensemble/seed0/inference/{TEST_SET}/report.html"
    )


def draw(runner: Runner, row: str, images: Sequence[str], folder: Path, *options: str) -> list[Path]:
    """Draw a row's detections in ``images``; returns the paths of the pictures."""
    command = ["ovdet2.programs.predict", "--config-file", ENTRIES[row].config, "--input", *images]
    run_program(
        [*command, "--output", str(folder), *options, "MODEL.WEIGHTS", str(runner.folder(row) / "model_final.pth")]
    )
    return [folder / f"{Path(image).stem}.png" for image in images]


def novel_detections(pictures: Sequence[Path]) -> int:
    """Detections drawn whose word is novel."""
    records = json.loads((pictures[0].parent / "detections.json").read_text())
    return sum(d["word"] in NOVEL_NAMES for record in records for d in record["detections"])


def with_novel_objects() -> Iterator[dict[str, Any]]:
    """Validation records with a novel object and at least three objects, so that the pictures are informative."""
    import ovdet2.data.datasets  # noqa: F401  registers OV-Shapes

    for record in DatasetCatalog.get(TEST_SET):
        classes = [annotation["category_id"] for annotation in record["annotations"]]
        if len(classes) >= 3 and max(classes) >= len(BASE_NAMES):
            yield record


def contact_sheet(paths: Sequence[Path], destination: Path, columns: int = 4, side: int = 480) -> Path:
    """One picture of several, each fitted into a square of ``side`` pixels; returns ``destination``."""
    rows = -(-len(paths) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side), "white")
    for index, path in enumerate(paths):
        with open_image(path) as picture:
            picture.thumbnail((side - 8, side - 8))
            sheet.paste(picture.convert("RGB"), (index % columns * side + 4, index // columns * side + 4))
    with atomic_path(destination) as temporary:
        sheet.save(temporary, format="PNG")
    return Path(destination)


if __name__ == "__main__":
    with exit_on_error():
        main()
