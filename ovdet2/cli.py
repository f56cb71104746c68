"""The ``ovdet2`` command and its verbs.

The program of a verb is imported when the verb is called, so that ``ovdet2 --help`` is quick and ``ovdet2 doctor`` runs
without Detectron2. Every program ends with exit code 2 for a usage error, 3 for data, 4 for the environment and 5 for a
loss that is not finite.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ovdet2 import __version__
from ovdet2.errors import SetupError, UsageError, exit_on_error

INSTALL_DETECTRON2 = "ovdet2 doctor --install-detectron2"


class Verb(NamedTuple):
    """A program: ``function`` of ``module`` takes the words after the verb; if it returns an int, that is the exit code."""

    module: str
    help: str
    function: str = "main"


VERBS = {
    "train": Verb("ovdet2.programs.train", "train a detector and evaluate it", "run"),
    "eval": Verb("ovdet2.programs.train", "evaluate a trained detector", "evaluate"),
    "synonyms": Verb("ovdet2.programs.swap_names", "evaluate the same weights with other names of the classes"),
    "predict": Verb("ovdet2.programs.predict", "detect any words in your images and draw the detections"),
    "demo": Verb("ovdet2.ov_shapes.demo", "train, evaluate and draw ViLD on OV-Shapes, a small generated world"),
    "cache build": Verb("ovdet2.programs.build_region_cache", "embed regions of all training images with the teacher"),
    "cache captions": Verb("ovdet2.programs.build_caption_cache", "embed all captions of a data set with the teacher"),
    "cache inspect": Verb("ovdet2.programs.inspect_cache", "print what a region cache contains and draw regions"),
    "vocab": Verb("ovdet2.programs.build_vocabulary", "embed words, or import embeddings, as a vocabulary file"),
    "vocab thresholds": Verb(
        "ovdet2.programs.choose_thresholds", "choose a score threshold for each word on a validation set"
    ),
    "prior": Verb("ovdet2.programs.build_concept_priors", "list the words present in each image of a data set"),
    "dataset prepare": Verb(
        "ovdet2.programs.prepare_dataset", "make the annotation files of a data set such as OV-COCO"
    ),
    "dataset check": Verb("ovdet2.programs.check_dataset", "report every problem of an annotation file and its images"),
    "dataset repair": Verb(
        "ovdet2.programs.check_dataset", "write a repaired copy of an annotation file", "repair_main"
    ),
    "dataset pseudo-labels": Verb(
        "ovdet2.programs.build_pseudo_labels", "annotate novel classes with a trained detector"
    ),
    "report make": Verb("ovdet2.programs.make_report", "write report.html for the folder of an evaluation"),
    "report compare": Verb("ovdet2.programs.compare_reports", "compare two evaluations"),
    "report scores": Verb("ovdet2.programs.report_scores", "calibration, and false positives on absent words"),
    "report queries": Verb("ovdet2.programs.draw_queries", "draw the best queries of a Deformable DETR"),
    "report score-maps": Verb("ovdet2.programs.draw_score_maps", "draw the encoder features of a Deformable DETR"),
    "teacher": Verb("ovdet2.programs.evaluate_teacher", "classify ground-truth boxes with a CLIP (zero-shot)"),
    "import-weights": Verb("ovdet2.programs.import_weights", "import published weights of Deformable DETR or Detic"),
    "zoo list": Verb("ovdet2.programs.zoo", "list the published detectors, their licences and figures", "list_main"),
    "zoo fetch": Verb("ovdet2.programs.zoo", "download a published detector and convert it", "fetch_main"),
    "zoo import": Verb("ovdet2.programs.zoo", "convert the downloaded file of a published detector", "import_main"),
    "zoo verify": Verb("ovdet2.programs.zoo", "check the published detectors on this machine", "verify_main"),
    "zero-shot": Verb("ovdet2.programs.evaluate_zero_shot", "evaluate a zero-shot detector of transformers"),
    "experiment": Verb("ovdet2.programs.experiments", "train and evaluate the entries of a table, and write it"),
    "bench": Verb("ovdet2.programs.bench", "measure time and memory against a reference"),
    "doctor": Verb("ovdet2.doctor", "check the environment, or install Detectron2"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit with its code.

    Args:
        argv: the words after ``ovdet2``; None: those of the process.

    Raises:
        SystemExit: always, with the exit code.
    """
    try:
        with exit_on_error():
            code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # of `ovdet2 ... | head`; the interpreter's own flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(argv: Sequence[str]) -> int:
    """Run a verb; returns the exit code.

    Raises:
        UsageError: there is no such verb.
        SetupError: Detectron2 is not installed.
    """
    words = list(argv)
    if words[:1] == ["--version"]:
        print(f"ovdet2 {__version__}")
        return 0
    name = next((name for name in (" ".join(words[:2]), " ".join(words[:1])) if name in VERBS), "")
    if not name:
        return _help(words)
    verb, arguments = VERBS[name], words[len(name.split()) :]
    try:
        program: Callable[[Sequence[str]], object] = getattr(importlib.import_module(verb.module), verb.function)
        result = program(arguments)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "detectron2":
            raise
        if {"-h", "--help"} & set(arguments):  # its options cannot be listed, which is no reason to fail
            print(f"usage: ovdet2 {name} ...\n\n{verb.help[:1].upper()}{verb.help[1:]}.\n")
            print(f"Detectron2 is not installed. To list the options, first run: {INSTALL_DETECTRON2}")
            return 0
        raise SetupError(f"ovdet2 {name} needs Detectron2, which is not installed. Run: {INSTALL_DETECTRON2}") from None
    return result if isinstance(result, int) else 0


def _help(words: Sequence[str]) -> int:
    """Print the list of all verbs, or of a group such as "cache"; returns the exit code 0.

    Raises:
        UsageError: the words name neither a verb nor a group.
    """
    names = [word for word in words if word not in ("-h", "--help")]
    listed = {name: verb for name, verb in VERBS.items() if not names or name.split()[0] == names[0]}
    if not listed or len(names) > 1:
        raise UsageError(f"there is no verb {' '.join(names[:2])!r}: see ovdet2 --help.")
    width = max(map(len, listed))
    print(f"usage: ovdet2 {' '.join([*names, 'VERB'])} ...\n\nOpen-vocabulary object detection on Detectron2.\n")
    print("\n".join(f"  {name:{width}}  {verb.help}" for name, verb in listed.items()))
    print("\novdet2 VERB --help lists the options of a verb, with examples.")
    print("Overrides of the configuration are KEY VALUE pairs at the end of the line.")
    return 0


if __name__ == "__main__":
    main()
