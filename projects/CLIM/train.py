#!/usr/bin/env python
"""Pre-train an open_clip model on mosaics of captioned images (CLIM), publish its weights, and measure both.

    python projects/CLIM/train.py --config-file projects/CLIM/configs/ovshapes_vit.yaml [SOLVER.BASE_LR 1e-4 ...]
    python projects/CLIM/train.py --config-file ... --resume              go on after an interruption
    python projects/CLIM/train.py --config-file ... --resume CLIM.AVERAGE 0.7      other weights of a finished run
    python projects/CLIM/train.py --config-file ... --text-only           embed the captions and stop
    python projects/CLIM/train.py --config-file ... --measure-composing 5 seconds of a step and of its mosaics

The result, OUTPUT_DIR/clim_a<CLIM.AVERAGE>.safetensors, is a teacher: MODEL.TEACHER.PRETRAINED or --pretrained of every
tool. With CLIM.EVALUATION.DATASET the regions of the original and of the result are named: regions_before.json and
regions_a<CLIM.AVERAGE>.json beside it.

Several machines: the same command on each, with --num-machines M --machine-rank R --dist-url tcp://<machine 0>:<port>;
or torchrun. Exit codes: 2 usage, 3 data, 4 environment, 5 a loss that is not finite.
"""

import argparse

import yaml
from clim.config import add_clim_config

from ovdet2.command_line import add_run_arguments, launch_run
from ovdet2.config import load_config
from ovdet2.errors import UsageError, exit_on_error


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text-only", action="store_true", help="embed the captions and stop")
    parser.add_argument("--measure-composing", type=int, default=0, metavar="N", help="time N steps and stop")
    add_run_arguments(parser)
    return parser.parse_args(argv)


def main(args):
    """One process of the run."""
    from clim.trainer import CLIMTrainer, prepare
    from detectron2.utils import comm

    from ovdet2.engine import setup

    cfg = setup(args, extend=add_clim_config)
    prepare(cfg)
    if args.text_only:
        return
    trainer = CLIMTrainer(cfg)
    if args.measure_composing:
        step, compose = trainer.composing_share(args.measure_composing)
        print(f"a step takes {step:.3f} s, composing its mosaics {compose:.4f} s: {100 * compose / step:.2f}%")
        return
    trainer.resume_or_load(resume=args.resume)
    trainer.train()
    if comm.is_main_process():
        publish(cfg, trainer.clip, trainer.captions_identity)


def publish(cfg, clip, captions):
    """Write the averaged weights, and measure the original's and theirs.

    Args:
        cfg: configuration.
        clip: the trained open_clip model.
        captions: what identifies the captions it was trained on, a JSON-serialisable dict.
    """
    from clim.checkpoint import export
    from clim.regions import compare

    from ovdet2.vlm.teacher import Teacher

    weights = f"{cfg.OUTPUT_DIR}/clim_a{cfg.CLIM.AVERAGE:g}.safetensors"
    original = Teacher.load(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED, cfg.MODEL.DEVICE)
    solver = {key: cfg.SOLVER[key] for key in ("BASE_LR", "IMS_PER_BATCH", "MAX_ITER", "WEIGHT_DECAY")}
    facts = {"clim": yaml.safe_load(cfg.CLIM.dump()), "solver": solver, "seed": cfg.SEED, "captions": captions}
    fingerprint = export(weights, clip, original, cfg.CLIM.AVERAGE, facts)
    after = Teacher.load(fingerprint.architecture, weights, cfg.MODEL.DEVICE)
    print(
        f"{weights}: {fingerprint}, for MODEL.TEACHER.ARCHITECTURE {fingerprint.architecture}; its temperature is "
        f"{1 / after.logit_scale:.4f}"
    )
    evaluation = cfg.CLIM.EVALUATION
    if evaluation.DATASET:
        settings = evaluation.DATASET, evaluation.SIDE, cfg.OUTPUT_DIR, f"a{cfg.CLIM.AVERAGE:g}", evaluation.SQUARE
        compare(original, after, *settings)


def run(argv=None):
    """The program: check the configuration once, before any process is started, then run :func:`main` in each."""
    from clim.trainer import check

    from ovdet2.engine import scaled, torchrun_rank

    args = parse_args(argv)
    cfg = load_config(args.config_file, args.opts, add_clim_config)
    if args.measure_composing < 0:
        raise UsageError("--measure-composing is a number of steps.")
    _, processes = torchrun_rank() or (0, max(1, args.num_gpus) * args.num_machines)
    check(scaled(cfg, processes), processes)
    launch_run(main, args, cfg.MODEL.DEVICE)


if __name__ == "__main__":
    with exit_on_error():
        run()
