"""What the programs have in common on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def command_parser(verb: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of ``ovdet2 <verb>``, whose help is the docstring of the program."""
    return argparse.ArgumentParser(
        prog=f"ovdet2 {verb}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_config_file(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --config-file."""
    shipped = "yaml file, or the name of one that comes with ovdet2, such as ovshapes/vild_text_r18.yaml"
    parser.add_argument("--config-file", required=required, default="", metavar="FILE", help=shipped)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the rest of the line, KEY VALUE overrides ("opts")."""
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of the configuration, last, such as MODEL.WEIGHTS model_final.pth",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config-file, --resume, processes and machines of the run, and overrides."""
    add_config_file(parser, required=False)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://<machine 0>:<port>, or auto")
    add_overrides(parser)


def launch_run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace, device: str) -> None:
    """Run ``main(args)`` in the processes of :func:`add_run_arguments`, on CUDA if ``device`` asks and there is one."""
    import torch

    from ovdet2.engine import launch  # slow to import, so after the errors a user makes most

    use_cuda = device.startswith("cuda") and torch.cuda.is_available()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,), use_cuda=use_cuda)
