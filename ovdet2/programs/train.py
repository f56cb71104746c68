"""Train a detector and evaluate it.

    ovdet2 train --config-file ovcoco/vild_text_r50.yaml --num-gpus 8 SOLVER.BASE_LR 0.01
    # continue after an interruption
    ovdet2 train --config-file ovcoco/vild_text_r50.yaml --num-gpus 8 --resume

On several machines, run the same command on each with --num-machines M --machine-rank R --dist-url
tcp://<machine 0>:<port>, or start it with torchrun, which needs none of these options. Without CUDA, --num-gpus N starts
N processes on the CPU. A configuration of your own may begin with `_BASE_: "ovcoco/vild_text_r50.yaml"`, a name or a path.

SIGTERM and Ctrl-C stop a training after the step, with a checkpoint; a second one ends it immediately.

Exit codes: 1 TEST.EXPECTED_RESULTS missed, 2 usage, 3 data, 4 environment, 5 a loss that is not finite, 130 Ctrl-C, 143
SIGTERM.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ovdet2.command_line import add_run_arguments, command_parser, keep_inputs, launch_run
from ovdet2.config import load_config, without_training_parts
from ovdet2.errors import UsageError, exit_on_error
from ovdet2.zoo import DETECTORS

_EVALUATE = """Evaluate a trained detector.

    ovdet2 eval --config-file ovcoco/vild_text_r50.yaml --num-gpus 8 MODEL.WEIGHTS model_final.pth
    # a trained detector by name: {detectors}
    ovdet2 eval --config-file ovshapes-vild
    # the newest checkpoint of a run
    ovdet2 eval --config-file ovshapes/vild_text_r18.yaml --resume OUTPUT_DIR output/my_run
    # detections that any tool wrote: ovdet2 eval --predictions --help
    ovdet2 eval --predictions coco_instances_results.json --dataset ov_coco_val_all --output output/theirs

The predictions, report.json and report.html are written to OUTPUT_DIR/inference/<data set>. Several processes or machines
share the work, with the options of ovdet2 train.

Exit codes: 1 TEST.EXPECTED_RESULTS missed, 2 usage, 3 data, 4 environment, 5 a score that is not finite.
"""


def parse_args(argv: Sequence[str] | None = None, verb: str = "train") -> argparse.Namespace:
    """The command line of ``ovdet2 train`` or ``ovdet2 eval``."""
    train = verb == "train"
    parser = command_parser(verb, __doc__ if train else _EVALUATE.format(detectors=", ".join(DETECTORS)))
    if train:
        parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop, as ovdet2 eval")
    else:
        parser.set_defaults(eval_only=True)
    add_run_arguments(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """One process of the run.

    Returns:
        dict of results, as of Detectron2's trainer.

    Raises:
        UsageError: --eval-only without weights.
        DataError: --eval-only with weights that are not those of the model.
    """
    from detectron2.utils import comm

    from ovdet2.engine import AtomicCheckpointer, Trainer, setup
    from ovdet2.engine.claim import check_claim
    from ovdet2.engine.run_folder import release_folder

    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(without_training_parts(cfg))
        checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume, complete=True)
        results = Trainer.test(cfg, model, weights=checkpointer.loaded)
        if comm.is_main_process():
            check_claim(cfg, results)
        return results
    try:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    finally:
        release_folder(cfg.OUTPUT_DIR)


def evaluate(argv: Sequence[str] | None = None) -> None:
    """The program ``ovdet2 eval``: of a detector, or with --predictions of a file."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--predictions" for word in words):
        from ovdet2.programs.evaluate_predictions import main as evaluate_file

        evaluate_file(words)
    else:
        run(words, "eval")


def run(argv: Sequence[str] | None = None, verb: str = "train") -> None:
    """The program: check the configuration once, before any process is started, then run :func:`main` in each."""
    args = parse_args(argv, verb)
    named = DETECTORS.get(args.config_file)
    if named is not None and not args.eval_only:
        raise UsageError(
            f"{args.config_file} is a trained detector. To train one like it, give its configuration, "
            f"--config-file {named.config}; to train it further, add "
            f"{' '.join(map(str, [*named.overrides, 'MODEL.WEIGHTS', named.weights]))}."
        )
    cfg = load_config(args.config_file, args.opts)
    if not args.eval_only and not args.resume:  # these checkpoints would be replaced or removed
        keep_inputs("OUTPUT_DIR", Path(cfg.OUTPUT_DIR).glob("model_*.pth"), cfg.MODEL.WEIGHTS)
    launch_run(main, args, cfg.MODEL.DEVICE)


if __name__ == "__main__":
    with exit_on_error():
        run()
