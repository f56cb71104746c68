r"""Check a COCO- or LVIS-format annotation file and its images.

    # report every problem; --decode also finds damaged images
    ovdet2 dataset check --json datasets/fruit/train.json --images datasets/fruit/images --decode
    # check and write a repaired copy, like ovdet2 dataset repair
    ovdet2 dataset check --json datasets/fruit/train.json --fix datasets/fruit/train_repaired.json

Each problem names the id of its annotation, image or category. The file itself is never changed. A file without problems
loads, trains and is evaluated; add --masks for a data set that is registered with masks.

Exit codes: 0 no problem (notes do not count), 3 problems (with --fix: problems left in the copy, or most of the file or of a
category was removed), 2 usage.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.check import check, check_json, is_lvis, problems
from ovdet2.data.datasets.findings import KINDS, NOTES, Finding
from ovdet2.data.datasets.repair import Change, losses, repair
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import read_json, sha256_file, write_json, write_text

SCHEMA, SCHEMA_FIXED = "ovdet2/dataset-check/1", "ovdet2/fixed-json/1"

REPAIR = r"""Write a repaired copy of a COCO- or LVIS-format annotation file.

    # repair what the annotation file shows without the images
    ovdet2 dataset repair --json datasets/fruit/train.json --output datasets/fruit/train_repaired.json
    # also remove images that are missing or damaged, and list every change in a report
    ovdet2 dataset repair --json datasets/fruit/train.json --images datasets/fruit/images --decode \
        --output datasets/fruit/train_repaired.json --report datasets/fruit/repair.json

The file is first checked as by ovdet2 dataset check. Numbers given as text are converted, missing image sizes are taken
from --images. Then invalid records are removed, an image with its annotations; an invalid optional field, such as a
segmentation, is removed from its annotation; boxes are clipped to their image; missing or repeated annotation ids and
wrong areas are replaced. Every change is printed. A problem whose repair would be a guess, such as boxes given as
(x1, y1, x2, y2), is left and reported. The file itself is never changed.

Exit codes: 0 the copy has no problem, 3 problems are left in the copy, most of the file or of a category was removed, or
no image would be left, 2 usage.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``ovdet2 dataset check``; returns the exit code."""
    return run(parse_args(argv))


def repair_main(argv: Sequence[str] | None = None) -> int:
    """The program ``ovdet2 dataset repair``; returns the exit code."""
    return run(parse_args(argv, repairs=True))


def run(args: argparse.Namespace) -> int:
    """Check, write the repaired copy and the report if they are requested; returns the exit code.

    Args:
        args: of :func:`parse_args`.

    Raises:
        DataError: the file is no json object, or the repaired copy would have no image. The report is written first.
    """
    data = read_json(args.json)
    findings = check(data, args.json, args.images, args.decode, args.workers, args.masks, args.lvis)
    print_findings(findings, args.max_shown)
    if args.lvis is None and is_lvis(data):
        print(f"{args.json}: checked by the rules of LVIS, for the metric ov_lvis (--no-lvis: those of COCO)")
    print(f"{args.json}: {summary(findings)}")
    report = {
        "schema": SCHEMA,
        "json": str(args.json),
        "json_sha256": sha256_file(args.json),
        "images": str(args.images) if args.images else None,
        "decoded": args.decode,
        "findings": as_json(findings),
    }
    lost = []
    try:
        if args.output:
            findings, report["fix"] = write_repaired(data, findings, report["json_sha256"], args)
            lost = report["fix"]["lost"]
    finally:  # the report explains a failed repair
        if args.report:
            write_json(args.report, report)
    return DataError.exit_code if problems(findings) or lost else 0


def write_repaired(
    data: Mapping[str, Any], findings: Sequence[Finding], sha256: str, args: argparse.Namespace
) -> tuple[list[Finding], dict[str, Any]]:
    """Write and check the repaired copy, and print its changes.

    Args:
        data: the parsed json.
        findings: of the check of ``data``.
        sha256: of the file that ``data`` was read from.
        args: of :func:`parse_args`.

    Returns:
        (left, entry): the problems of the copy, and the object that describes the copy in the report.

    Raises:
        DataError: the copy would have no image.
    """
    lvis = is_lvis(data) if args.lvis is None else args.lvis
    repaired, changes = repair(data, findings, args.images, lvis)
    # The image files need no second check: images with a fault are removed.
    left = problems(check_json(repaired, args.output, args.masks, args.lvis))
    lost = losses(data, repaired, findings)
    source = {"source": args.json.name, "source_sha256": sha256, "changes": len(changes), "problems_left": len(left)}
    repaired["manifest"] = {"schema": SCHEMA_FIXED, **source}
    write_text(args.output, json.dumps(repaired) + "\n")  # as ASCII, which also holds text that is not valid Unicode
    print_changes(changes, args.max_shown)
    print_findings(left, args.max_shown)
    print(
        f"{args.output}: written, changes: {len(changes):,}. Left, because a repair would be a guess: {summary(left)}"
    )
    if args.images is None and any(finding.kind == "image-size" for finding in left):
        print(f"{args.output}: add --images FOLDER, and missing image sizes are taken from the image files.")
    if lost:
        print(
            f"{args.output}: most was removed, {'; '.join(lost)}. Such a file has seldom many accidents: read the first "
            f"changes above, and look for one cause, such as another --images folder."
        )
    return left, {
        "json": str(args.output),
        "lost": lost,
        "changes": [change._asdict() for change in changes],
        "left": as_json(left),
    }


def parse_args(argv: Sequence[str] | None = None, repairs: bool = False) -> argparse.Namespace:
    """The command line of ``ovdet2 dataset check``, or with ``repairs`` of ``ovdet2 dataset repair``.

    Args:
        argv: the words after the verb; None: those of the process.
        repairs: which of the two programs. Their options differ in the one that names the repaired copy.

    Returns:
        The options; ``output`` is the path of the repaired copy, or None.

    Raises:
        UsageError: options that exclude each other, or an output that would replace the input or another file.
    """
    parser = command_parser("dataset repair", REPAIR) if repairs else command_parser("dataset check", __doc__)
    copy = "--output" if repairs else "--fix"
    parser.add_argument("--json", type=Path, required=True, help="annotation file to check; it is never changed")
    parser.add_argument(
        copy, dest="output", type=Path, required=repairs, metavar="OUT", help="repaired copy of --json to write"
    )
    parser.add_argument("--overwrite", action="store_true", help=f"allow {copy} to replace an existing file")
    parser.add_argument("--images", type=Path, help="image folder; default: no image file is checked")
    parser.add_argument("--masks", action="store_true", help="require a mask of each annotation, as masks: True does")
    parser.add_argument(
        "--lvis",
        action=argparse.BooleanOptionalAction,
        help="the rules of LVIS, as the metric ov_lvis has; default: if the file has fields of LVIS",
    )
    parser.add_argument("--decode", action="store_true", help="decode every image of --images; default: headers only")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read images")
    parser.add_argument("--max-shown", type=int, default=20, help="most findings printed of each kind (20)")
    parser.add_argument("--report", type=Path, help="JSON file to write, with every finding and change")
    args = parser.parse_args(argv)
    if args.decode and not args.images:
        raise UsageError("--decode needs the folder of the images: add --images.")
    if args.workers < 1 or args.max_shown < 0:
        raise UsageError("--workers must be at least 1 and --max-shown at least 0: change them.")
    for option, output in ((copy, args.output), ("--report", args.report)):
        if output and output.is_dir():
            raise UsageError(f"{option} {output} is a folder: name a file.")
        if output and same_file(output, args.json):
            raise UsageError(f"{option} {output} is the file that is checked, which is never changed: name another.")
    if args.output and args.report and same_file(args.output, args.report):
        raise UsageError(f"{copy} and --report both name {args.output}: name two files.")
    if args.output and args.output.exists() and not args.overwrite:
        raise UsageError(f"{args.output} exists: name another file with {copy}, or add --overwrite.")
    return args


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file, links included."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def print_findings(findings: Sequence[Finding], max_shown: int) -> None:
    """Print findings under a heading for each kind, at most ``max_shown`` of a kind."""
    kinds: dict[str, list[str]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(f"{finding.where}: {finding.detail}".removesuffix(": "))
    for kind, lines in kinds.items():
        print_some(f"{'note: ' * (kind in NOTES)}{kind}, {len(lines):,}: {KINDS[kind].what}", lines, max_shown)


def print_changes(changes: Sequence[Change], max_shown: int) -> None:
    """Print the changes of a repair under a heading for each kind, at most ``max_shown`` of a kind."""
    kinds: dict[str, list[str]] = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(f"{change.where}: {change.done}")
    for kind, lines in kinds.items():
        print_some(f"repaired {kind}, {len(lines):,}: {KINDS[kind].fix}", lines, max_shown)


def print_some(heading: str, lines: Sequence[str], max_shown: int) -> None:
    """Print a heading and the first ``max_shown`` lines."""
    print(heading)
    for line in lines[:max_shown]:
        print(f"  {line}")
    if len(lines) > max_shown:
        print(f"  and {len(lines) - max_shown:,} more (--report FILE lists all)")


def summary(findings: Sequence[Finding]) -> str:
    """The number of problems and notes, such as "problems: 3 (box-empty 2, area 1), notes: 1"."""
    counts = Counter(finding.kind for finding in findings)
    notes = sum(counts.pop(kind, 0) for kind in NOTES)
    listed = f" ({', '.join(f'{kind} {count:,}' for kind, count in counts.items())})" if counts else ""
    return f"problems: {counts.total():,}{listed}, notes: {notes:,}"


def as_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as objects of the report."""
    return [finding._asdict() | {"of": KINDS[finding.kind].of, "note": finding.kind in NOTES} for finding in findings]


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(main())
