"""What the programs that train have in common on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config-file, --resume, processes and machines of the run, and KEY VALUE overrides ("opts", the rest)."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="yaml file, or its name below configs/")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://<machine 0>:<port>, or auto")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the configuration")


def launch_run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace, device: str) -> None:
    """Run ``main(args)`` in the processes of :func:`add_run_arguments`, on CUDA if ``device`` asks and there is one."""
    from ovdet2.engine import launch  # slow to import, so after the errors a user makes most

    use_cuda = device.startswith("cuda") and torch.cuda.is_available()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,), use_cuda=use_cuda)
