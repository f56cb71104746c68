r"""Check a COCO- or LVIS-format json and its images; write a cleaned copy where asked.

    ovdet2 dataset check --json datasets/fruit/train.json --images datasets/fruit/images --decode

Names the id of each annotation, image or category at fault. Exit code 0: no problem (notes are none); 3: problems, with
--fix only those that are left in the copy.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ovdet2.command_line import command_parser
from ovdet2.data.datasets.check import check, check_json, problems
from ovdet2.data.datasets.findings import KINDS, NOTES
from ovdet2.data.datasets.repair import repair
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import read_json, sha256_file, write_json, write_text

SCHEMA, SCHEMA_FIXED = "ovdet2/dataset-check/1", "ovdet2/fixed-json/1"


def repair_main(argv: Sequence[str] | None = None) -> int:
    """The program ``ovdet2 dataset repair``, which is ``ovdet2 dataset check --fix``; returns the exit code."""
    parser = command_parser("dataset repair", __doc__)
    parser.add_argument("--json", required=True, help="annotation file")
    parser.add_argument("--output", required=True, metavar="OUT", help="repaired copy to write")
    args, others = parser.parse_known_args(argv)
    return main(["--json", args.json, "--fix", args.output, *others])


def main(argv: Sequence[str] | None = None) -> int:
    """The program ``ovdet2 dataset check``; returns the exit code."""
    args = parse_args(argv)
    data = read_json(args.json)
    found = check(data, args.json, args.images, args.decode, args.workers)
    print_findings(found, args.max_shown)
    print(f"{args.json}: {summary(found)}")
    report = {
        "schema": SCHEMA,
        "json": str(args.json),
        "json_sha256": sha256_file(args.json),
        "images": str(args.images) if args.images else None,
        "decoded": args.decode,
        "findings": as_json(found),
    }
    try:
        if args.fix:
            found, report["fix"] = write_fixed(data, found, report["json_sha256"], args)
    finally:  # where nothing could be mended the findings are wanted all the more
        if args.report:
            write_json(args.report, report)
    return DataError.exit_code if problems(found) else 0


def write_fixed(data, found, sha256, args):
    """Write and check the cleaned copy, and print its changes.

    Args:
        data, found: the parsed json and its findings.
        sha256: of the file it was read from.
        args: the command line.

    Returns:
        (left, entry): what is found in the copy, and the report's object about it.
    """
    repaired, changes = repair(data, found)
    left = problems(check_json(repaired, args.fix))  # no need to see the images again: those with a fault are gone
    source = {"source": args.json.name, "source_sha256": sha256, "changes": len(changes), "problems_left": len(left)}
    repaired["manifest"] = {"schema": SCHEMA_FIXED, **source}
    write_text(args.fix, json.dumps(repaired) + "\n")  # as ASCII, which also holds text that is not valid Unicode
    print_changes(changes, args.max_shown)
    print_findings(left, args.max_shown)
    print(f"{args.fix}: written, changes: {len(changes):,}. Left, where mending would be a guess: {summary(left)}")
    return left, {
        "json": str(args.fix),
        "changes": [change._asdict() for change in changes],
        "left": as_json(left),
    }


def parse_args(argv):
    """The command line of this program.

    Raises:
        UsageError: options that do not go together, or an output that would replace a file it must not.
    """
    parser = command_parser("dataset check", __doc__)
    parser.add_argument("--json", type=Path, required=True, help="annotation file")
    parser.add_argument("--images", type=Path, help="folder of the file names; without it no image file is looked at")
    parser.add_argument("--decode", action="store_true", help="decode every image whole, not its header alone")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read images")
    parser.add_argument("--max-shown", type=int, default=20, help="findings printed of each kind")
    parser.add_argument("--report", type=Path, help="JSON file to write, with every finding and change")
    parser.add_argument("--fix", type=Path, metavar="OUT", help="write a cleaned copy here")
    parser.add_argument("--overwrite", action="store_true", help="let --fix replace an existing file")
    args = parser.parse_args(argv)
    if args.decode and not args.images:
        raise UsageError("--decode needs the folder of the images: add --images.")
    if args.workers < 1 or args.max_shown < 0:
        raise UsageError("--workers is at least 1 and --max-shown at least 0: change them.")
    for option, output in (("--fix", args.fix), ("--report", args.report)):
        if output and output.is_dir():
            raise UsageError(f"{option} {output} is a folder: name a file.")
        if output and same_file(output, args.json):
            raise UsageError(f"{option} {output} is the file that is checked, which is never changed: name another.")
    if args.fix and args.report and same_file(args.fix, args.report):
        raise UsageError(f"--fix and --report both name {args.fix}: name two files.")
    if args.fix and args.fix.exists() and not args.overwrite:
        raise UsageError(f"{args.fix} exists: name another file for --fix, or add --overwrite.")
    return args


def same_file(one, other):
    """Whether two paths lead to one file, links included."""
    if one.exists() and other.exists():
        return one.samefile(other)
    return one.resolve() == other.resolve()


def print_findings(findings, max_shown):
    """Print findings under one heading for each kind, at most ``max_shown`` of a kind."""
    kinds = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(f"{finding.where}: {finding.detail}".removesuffix(": "))
    for kind, lines in kinds.items():
        print_some(f"{'note: ' * (kind in NOTES)}{kind}, {len(lines):,}: {KINDS[kind].what}", lines, max_shown)


def print_changes(changes, max_shown):
    """The same for the changes of a repair."""
    kinds = {}
    for change in changes:
        kinds.setdefault(change.kind, []).append(f"{change.where}: {change.done}")
    for kind, lines in kinds.items():
        print_some(f"fixed {kind}, {len(lines):,}: {KINDS[kind].fix}", lines, max_shown)


def print_some(heading, lines, max_shown):
    """A heading and the first lines."""
    print(heading)
    for line in lines[:max_shown]:
        print(f"  {line}")
    if len(lines) > max_shown:
        print(f"  and {len(lines) - max_shown:,} more (--report FILE lists all)")


def summary(findings):
    """How many there are, such as "problems: 3 (box-empty 2, area 1), notes: 1"."""
    counts = Counter(finding.kind for finding in findings)
    notes = sum(counts.pop(kind, 0) for kind in NOTES)
    listed = f" ({', '.join(f'{kind} {count:,}' for kind, count in counts.items())})" if counts else ""
    return f"problems: {counts.total():,}{listed}, notes: {notes:,}"


def as_json(findings):
    """Findings as objects for the report."""
    return [finding._asdict() | {"of": KINDS[finding.kind].of, "note": finding.kind in NOTES} for finding in findings]


if __name__ == "__main__":
    with exit_on_error():
        raise SystemExit(main())
