#!/usr/bin/env python
"""Train and evaluate a detector.

    train_net.py --config-file configs/ovcoco/vild_text_r50.yaml [--num-gpus 8] [SOLVER.BASE_LR 0.01 ...]
    train_net.py --config-file ... --resume                              go on after an interruption
    train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth

Several machines: the same command on each, with --num-machines M --machine-rank R --dist-url tcp://<machine 0>:<port>;
or torchrun, which needs none of these. Without CUDA, --num-gpus N starts N processes on the CPU.

Exit codes: 1 TEST.EXPECTED_RESULTS missed, 2 usage, 3 data, 4 environment, 5 a loss that is not finite.
"""

import argparse

import torch

from ovdet2.config import load_config, without_training_parts
from ovdet2.errors import exit_on_error


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="yaml file, or its name below configs/")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of OUTPUT_DIR")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1, metavar="M", help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://<machine 0>:<port>, or auto")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the configuration")
    return parser.parse_args(argv)


def main(args):
    """One process of the run.

    Returns:
        dict of results, as of Detectron2's trainer.

    Raises:
        UsageError: --eval-only without weights.
        DataError: --eval-only with weights that are not those of the model.
    """
    from detectron2.evaluation import verify_results
    from detectron2.utils import comm

    from ovdet2.engine import AtomicCheckpointer, Trainer, setup

    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(without_training_parts(cfg))
        checkpointer = AtomicCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume, whole=True)
        results = Trainer.test(cfg, model, weights=checkpointer.loaded)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def run(argv=None):
    """The program: check the configuration once, before any process is started, then run :func:`main` in each."""
    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    from ovdet2.engine import launch  # slow to import, so after the errors a user makes most

    use_cuda = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,), use_cuda=use_cuda)


if __name__ == "__main__":
    with exit_on_error():
        run()
