r"""Two evaluations side by side: figures of A, of B, B - A, and the classes that gained and lost most.

    ovdet2 report compare output/ovshapes/vild_text/seed0/inference/ov_shapes_val_all \
        output/ovshapes/vild/seed0/inference/ov_shapes_val_all --html compare.html

A and B are report.json files or the folders that hold one. Reports that did not measure the same (data set, its
annotation file, split, protocol, metric, detections per image, distractors) are refused with exit code 3 unless
--anyway is given, which then says so on top.
"""

from pathlib import Path

from ovdet2.command_line import command_parser
from ovdet2.errors import DataError, UsageError, exit_on_error
from ovdet2.io.files import read_json, write_text
from ovdet2.report.compare import as_html, as_text, compare, require_comparable

SCHEMA = "ovdet2/report/"


def main(argv=None):
    """Command line; returns the comparison."""
    parser = command_parser("report compare", __doc__)
    parser.add_argument("a", metavar="A", type=Path, help="report.json, or its folder")
    parser.add_argument("b", metavar="B", type=Path)
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the comparison as one HTML file, too")
    parser.add_argument("--classes", type=int, default=10, help="classes shown of the largest gains, and of losses")
    parser.add_argument("--anyway", action="store_true", help="compare reports that did not measure the same")
    args = parser.parse_args(argv)
    if args.classes < 0:
        raise UsageError("--classes is at least 0: change it.")
    reports = [read_report(path) for path in (args.a, args.b)]
    if not args.anyway:
        require_comparable(*reports)
    comparison = compare(*reports, args.classes)
    print(as_text(comparison, (args.a, args.b)))
    if args.html:
        write_text(args.html, as_html(comparison, reports, (args.a, args.b)))
        print(f"\n{args.html}")
    return comparison


def read_report(path):
    """The report of a file or folder.

    Raises:
        DataError: there is none, it is damaged, or it is something else.
    """
    path = path / "report.json" if path.is_dir() else path
    report = read_json(path, "give a report.json or the folder of a finished evaluation")
    if not isinstance(report, dict) or not str(report.get("schema")).startswith(SCHEMA):
        raise DataError(f"{path} is not a report of ovdet2: give a report.json, or the folder that holds it.")
    return report


if __name__ == "__main__":
    with exit_on_error():
        main()
