"""List, fetch, import and verify published detectors.

The weights are converted to safetensors in $OVDET2_HOME/zoo/NAME (default: ~/.cache/ovdet2/zoo/NAME). Afterwards, NAME
stands for configuration and weights in `Detector("NAME")` and `--config-file NAME`, without network.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ovdet2.command_line import add_accept_license, command_parser
from ovdet2.errors import DataError, counted, exit_on_error
from ovdet2.zoo import DETECTORS, store
from ovdet2.zoo.records import RECORDS, record_of

_LIST = """List the published detectors that ovdet2 can load.

    ovdet2 zoo list

For each: its name, whether it is on this machine ("damaged": see ovdet2 zoo verify), the level of trust in its file, the licence of the weights, and a
published figure, which was not measured here. docs/ZOO.md has more. The detectors of `ovdet2 demo`, which are trained on
this machine, come last.
"""
_FETCH = """Download a published detector and convert it.

    ovdet2 zoo fetch deformable-detr-r50-refine
    ovdet2 predict --model deformable-detr-r50-refine --input photo.jpg --output pictures

An interrupted download is continued by the same command. A detector that is on this machine is not downloaded again.

Exit codes: 2 usage, 3 a file that is not the record's, 4 no network.
"""
_IMPORT = """Import the downloaded file of a published detector.

    ovdet2 zoo import deformable-detr-r50 ~/Downloads/r50_deformable_detr-checkpoint.pth

The file may come from any of the places of `docs/ZOO.md`. It is read without running code from it, and is not changed.

Exit codes: 2 usage, 3 a file that is not the record's.
"""
_VERIFY = """Check hashes, names and shapes of the published detectors on this machine.

    ovdet2 zoo verify
    ovdet2 zoo verify deformable-detr-r50-refine

Exit codes: 2 usage, 3 weights that have changed.
"""


def list_main(argv: Sequence[str] | None = None) -> None:
    """The program ``ovdet2 zoo list``."""
    command_parser("zoo list", _LIST).parse_args(argv)
    rows = [("name", "here", "trust", "weights", "published, not run here")]
    for record in RECORDS.values():
        figure = record.figures[0]
        licence = record.licence.weights + ", non-commercial" * record.licence.non_commercial
        try:
            here, trust = "yes" if store.is_here(record) else "no", store.trust_of(record)
        except DataError:  # ovdet2 zoo verify says what to do
            here, trust = "damaged", "-"
        rows.append((record.name, here, trust, licence, f"{figure.metric} {figure.value}"))
    for name, named in DETECTORS.items():
        if not named.published:
            here = "yes" if Path(named.weights).is_file() else "no"
            rows.append((name, here, "trained here", "-", f"none: {named.remedy}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())


def fetch_main(argv: Sequence[str] | None = None) -> Path:
    """The program ``ovdet2 zoo fetch``; returns the path of the converted weights."""
    parser = command_parser("zoo fetch", _FETCH)
    parser.add_argument("name", help="name of a detector, see ovdet2 zoo list")
    add_accept_license(parser)
    args = parser.parse_args(argv)
    record = record_of(args.name)
    if store.is_here(record):
        print(f"{record.name} is here already; trust: {store.trust_of(record)}")
    return store.fetch(record, args.accept_license)


def import_main(argv: Sequence[str] | None = None) -> Path:
    """The program ``ovdet2 zoo import``; returns the path of the converted weights."""
    parser = command_parser("zoo import", _IMPORT)
    parser.add_argument("name", help="name of a detector, see ovdet2 zoo list")
    parser.add_argument("file", help="the downloaded file (.pth, .pkl or .safetensors)")
    add_accept_license(parser)
    args = parser.parse_args(argv)
    return store.import_file(record_of(args.name), args.file, args.accept_license)


def verify_main(argv: Sequence[str] | None = None) -> None:
    """The program ``ovdet2 zoo verify``.

    Raises:
        DataError: weights are damaged or have changed; all are checked first.
    """
    parser = command_parser("zoo verify", _VERIFY)
    parser.add_argument("name", nargs="?", help="name of a detector (default: all that are here)")
    args = parser.parse_args(argv)
    present = [record for record in RECORDS.values() if store.manifest_path(record).is_file()]
    faults = []
    for record in [record_of(args.name)] if args.name else present:
        try:
            print(f"{record.name}: {store.verify(record)}")
        except DataError as error:
            faults.append(record.name)
            print(f"{record.name}: {error}")
    if faults:
        raise DataError(f"{counted(len(faults), 'detector')} cannot be used ({', '.join(faults)}): see above.")
    if not present and not args.name:
        print("No published detector is on this machine: see ovdet2 zoo list.")


if __name__ == "__main__":
    with exit_on_error():
        list_main()
