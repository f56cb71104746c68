r"""Compare two evaluations: all figures of A and B, B - A, and the classes with the largest gains and losses.

    ovdet2 report compare output/ovshapes/vild_text/seed0/inference/ov_shapes_val_all \
        output/ovshapes/vild/seed0/inference/ov_shapes_val_all --html compare.html

A and B are report.json files or the folders that hold them. Both reports must have measured the same (data set,
annotation file, split, protocol, metric, detections per image, distractors). Otherwise the comparison is refused; with
--anyway it is made, and starts with a warning.

Exit codes: 2 usage, 3 data, or reports that did not measure the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovdet2.command_line import command_parser, keep_inputs
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.evaluation.checked_report import read_report
from ovdet2.io.files import write_text
from ovdet2.report.compare import as_html, as_text, compare, require_comparable


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line; returns the comparison."""
    parser = command_parser("report compare", __doc__)
    parser.add_argument("a", metavar="A", type=Path, help="report.json or its folder")
    parser.add_argument("b", metavar="B", type=Path, help="report.json or its folder")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the comparison as an HTML file")
    parser.add_argument("--classes", type=int, default=10, help="number of classes listed as gains, and as losses (10)")
    parser.add_argument("--anyway", action="store_true", help="compare reports that did not measure the same")
    args = parser.parse_args(argv)
    if args.classes < 0:
        raise UsageError("--classes must be at least 0: change it.")
    keep_inputs("--html", [args.html], [file_of(args.a), file_of(args.b)])
    reports = read_report(args.a), read_report(args.b)
    if not args.anyway:
        require_comparable(*reports)
    comparison = compare(*reports, args.classes)
    names = str(args.a), str(args.b)
    print(as_text(comparison, names))
    if args.html:
        write_text(args.html, as_html(comparison, reports, names))
        print(f"\n{args.html}")
    return comparison


def file_of(path: Path) -> Path:
    """The report file of a report or its folder."""
    return path / "report.json" if path.is_dir() else path


if __name__ == "__main__":
    with exit_on_error():
        main()
