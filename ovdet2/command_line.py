"""Arguments that several programs share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ovdet2.errors import UsageError, did_you_mean


def command_parser(verb: str, doc: str | None) -> argparse.ArgumentParser:
    """The parser of ``ovdet2 <verb>``, whose help is the docstring of the program."""
    return _Parser(prog=f"ovdet2 {verb}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


class _Parser(argparse.ArgumentParser):
    """A parser that names an unknown option, wherever it stands, before argparse takes it for an override."""

    def parse_known_args(self, args=None, namespace=None):  # pyrefly: ignore[bad-override]  overloads
        words = list(sys.argv[1:] if args is None else args)
        known = [name for action in self._actions for name in action.option_strings]
        for word in words:
            option = word.split("=")[0]
            if option.startswith("--") and option != "--" and not any(name.startswith(option) for name in known):
                self.error(f"there is no option {option}{did_you_mean(option, known)}")
        return super().parse_known_args(words, namespace)


class _Overrides(argparse.Action):
    """Store KEY VALUE overrides; an option among them is an error, because it would be read as a key."""

    def __call__(self, parser, namespace, values, option_string=None):
        late = [word for word in values or () if str(word).startswith("--")]
        if late:
            parser.error(f"{late[0]} comes after KEY VALUE overrides: put it before them")
        setattr(namespace, self.dest, list(values or ()))


# Arguments of add_argument.
CONFIG_FILE: dict[str, Any] = {
    "metavar": "CONFIG_FILE",
    "help": "yaml file, or the name of a configuration of ovdet2, such as ovshapes/vild_text_r18.yaml, or of a trained detector",
}
OVERRIDES: dict[str, Any] = {
    "nargs": argparse.REMAINDER,
    "action": _Overrides,
    "default": [],
    "metavar": "KEY VALUE",
    "help": "overrides of the configuration, last, such as MODEL.WEIGHTS model_final.pth",
}


def add_config_file(
    parser: argparse.ArgumentParser, required: bool = True, purpose: str = "", aliases: Sequence[str] = ()
) -> None:
    """Add --config-file, whose default is "" (the default values of all keys).

    Args:
        parser: changed.
        required: whether the option must be given.
        purpose: what the configuration is for, the end of the help text.
        aliases: further names of the option.
    """
    text = f"{CONFIG_FILE['help']}; {purpose}" if purpose else CONFIG_FILE["help"]
    parser.add_argument("--config-file", *aliases, required=required, default="", **CONFIG_FILE | {"help": text})


def add_accept_license(parser: argparse.ArgumentParser) -> None:
    """Add --accept-license, for published weights."""
    parser.add_argument(
        "--accept-license", action="store_true", help="accept a licence of weights that forbids commercial use"
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the rest of the line, KEY VALUE overrides: ``opts``, a list that may be empty."""
    parser.add_argument("opts", **OVERRIDES)


def keep_inputs(option: str, written: Iterable[str | Path | None], *inputs: Any) -> None:
    """Refuse to replace a file that the program reads. Every program calls it before it writes its first file.

    Args:
        option: that names the output, for the message.
        written: files that will be written; None is ignored.
        inputs: what the program reads: paths, texts that may be paths, and lists, dicts (their values), configurations and
            parsed options of them. What names no existing file is ignored.

    Raises:
        UsageError: a file to write is one of the inputs, links included.
    """
    existing = {_identity(path): path for path in written if path is not None}
    existing.pop(None, None)  # a file that does not exist yet is no input
    if not existing:
        return
    for name in _paths_in(inputs):
        replaced = existing.get(_identity(name))
        if replaced is not None:
            also = "" if os.fspath(replaced) == os.fspath(name) else f" ({name})"
            raise UsageError(f"{option}: {replaced} would replace an input{also}: give another name or folder.")


def options_but(args: argparse.Namespace, *outputs: str) -> dict[str, Any]:
    """The parsed options except those that name outputs, for :func:`keep_inputs`."""
    return {name: value for name, value in vars(args).items() if name not in outputs}


def dataset_files(*names: str) -> Iterator[str]:
    """The annotation files of registered open-vocabulary data sets, for :func:`keep_inputs`; other names have none."""
    from detectron2.data import MetadataCatalog

    for name in names:
        files = getattr(MetadataCatalog.get(name), "ov_files", None) if name in MetadataCatalog.list() else None
        if files is not None:
            yield str(files()[0])


def _paths_in(value: Any) -> Iterator[str | Path]:
    if isinstance(value, (str, Path)):
        yield value
    elif isinstance(value, argparse.Namespace):
        yield from _paths_in(vars(value))
    elif isinstance(value, Mapping):
        yield from _paths_in(list(value.values()))
    elif isinstance(value, Iterable):
        for each in value:
            yield from _paths_in(each)


def _identity(path: str | Path) -> tuple[int, int] | None:
    """What two names of one file share: device and inode, of what a link leads to; None if there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null byte in a text that is no path
        return None
    return found.st_dev, found.st_ino


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --config-file, --resume, processes and machines of the run, and overrides."""
    add_config_file(parser, required=False)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://<machine 0>:<port>, or auto")
    add_overrides(parser)


def launch_run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace, device: str) -> None:
    """Run ``main(args)`` in the processes of :func:`add_run_arguments`, on CUDA if ``device`` names it and it is available."""
    import torch

    from ovdet2.engine import launch  # slow to import, so after the most frequent usage errors

    use_cuda = device.startswith("cuda") and torch.cuda.is_available()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,), use_cuda=use_cuda)
