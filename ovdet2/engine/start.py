"""What every program does first: configuration, logging, seeds."""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import detectron2
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

import ovdet2
from ovdet2.config import load_config, settle_device
from ovdet2.data.source_spec import TRAIN, entries_of, source_specs
from ovdet2.engine.claim import changed_by
from ovdet2.engine.console import open_logs
from ovdet2.engine.run_folder import claim_folder, is_claimed, sweep_folder
from ovdet2.errors import SetupError, UsageError, did_you_mean
from ovdet2.io.files import write_text
from ovdet2.io.shared_memory import shared_memory

logger = logging.getLogger(__name__)

SCHEDULES, WARMUPS = ("WarmupMultiStepLR", "WarmupCosineLR"), ("linear", "constant")
_PREPARED_BATCHES = 2  # of a loading process, torch's default
_LARGE_IMAGE_BYTES = 800 * 1333 * 3

# Switches of Detectron2 that Detectron2's own trainer or train_net reads and this one does not.
_NOT_SUPPORTED = ("TEST.PRECISE_BN.ENABLED", "TEST.AUG.ENABLED")


def setup(args: argparse.Namespace, extend: Callable[[CfgNode], None] | None = None) -> CfgNode:
    """Read the configuration and prepare this process. Call it in every process of the group.

    Sets up the loggers (console and OUTPUT_DIR/log.txt on rank 0), seeds python, numpy and torch with SEED + rank, and
    writes OUTPUT_DIR/config.yaml on rank 0. For training, OUTPUT_DIR is claimed until the end of the training. MODEL.DEVICE "cuda" becomes "cpu" on a machine without CUDA. For training
    with SOLVER.REFERENCE_WORLD_SIZE > 0, batch, learning rate and iterations are scaled to the number of processes.

    Args:
        args: with ``config_file`` (str), ``opts`` (list of KEY VALUE ...), and optionally ``eval_only``.
        extend: of :func:`~ovdet2.config.load_config`.

    Returns:
        The frozen configuration of this run, the same as config.yaml. A negative SEED is replaced by the random one
        that was drawn.

    Raises:
        UsageError: unknown file or key, wrong value, a batch that cannot be scaled, or a switch that ovdet2 does not
            have.
        SetupError: OUTPUT_DIR cannot be written, or another process trains in it.
    """
    cfg = load_config(args.config_file, args.opts or [], extend)
    for key in _NOT_SUPPORTED:
        node = cfg
        for part in key.split("."):
            node = node[part]
        if node:
            raise UsageError(f"ovdet2 does not offer {key}: set it to False.")
    on_cpu = settle_device(cfg)
    if cfg.SEED < 0:
        cfg.SEED = comm.shared_random_seed()
    changed = changed_by(args.opts or []) if cfg.TEST.EXPECTED_RESULTS else []
    if not cfg.DATASETS.TEST or (changed and "TEST.EXPECTED_RESULTS" not in args.opts):
        cfg.TEST.EXPECTED_RESULTS = []  # expected figures apply only to the unchanged configuration
    evaluates = getattr(args, "eval_only", False)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if not evaluates:
        cfg = scaled(cfg, comm.get_world_size())
    require_numbers(cfg)
    cfg.freeze()
    _open_output(cfg)
    rank = comm.get_rank()
    if comm.is_main_process() and not evaluates:
        claim_folder(cfg.OUTPUT_DIR)
    open_logs(cfg.OUTPUT_DIR, rank)
    if comm.is_main_process() and not evaluates:
        sweep_folder(cfg.OUTPUT_DIR)
    # An evaluation of a training that goes on does not replace the training's configuration.
    if comm.is_main_process() and not (evaluates and is_claimed(cfg.OUTPUT_DIR)):
        write_text(Path(cfg.OUTPUT_DIR) / "config.yaml", cfg.dump())
    _report(cfg, reference, on_cpu, changed)
    seed_all_rng(cfg.SEED + rank)
    if not evaluates:
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    return cfg


def require_numbers(cfg: CfgNode) -> None:
    """Refuse numbers that make no training, and unknown schedules, before anything is loaded.

    Raises:
        UsageError: names the key.
    """
    solver, workers = cfg.SOLVER, cfg.DATALOADER.NUM_WORKERS
    if type(solver.MAX_ITER) is not int or solver.MAX_ITER < 1:
        raise UsageError(f"SOLVER.MAX_ITER is {solver.MAX_ITER}: give a number of steps, at least 1.")
    if type(workers) is not int or workers < 0:
        raise UsageError(f"DATALOADER.NUM_WORKERS is {workers}: give a number of processes, or 0 for none.")
    if not (math.isfinite(solver.BASE_LR) and solver.BASE_LR >= 0):
        raise UsageError(f"SOLVER.BASE_LR is {solver.BASE_LR}: give a learning rate of at least 0.")
    if solver.LR_SCHEDULER_NAME not in SCHEDULES:
        meant = did_you_mean(solver.LR_SCHEDULER_NAME, SCHEDULES)
        raise UsageError(
            f"SOLVER.LR_SCHEDULER_NAME is {solver.LR_SCHEDULER_NAME!r}{meant}: choose one of {', '.join(SCHEDULES)}."
        )
    if solver.WARMUP_METHOD not in WARMUPS:
        raise UsageError(f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}: choose one of {', '.join(WARMUPS)}.")


def scaled(cfg: CfgNode, processes: int) -> CfgNode:
    """The configuration for a number of processes, if SOLVER.REFERENCE_WORLD_SIZE names the one it was written for.

    The images of a step and the learning rate grow with the number, iterations shrink; the number becomes the
    reference, so that scaling again, as the trainer does, changes nothing. Sources of methods become entries of
    DATASETS.SOURCES, which state the images that are used.

    Raises:
        UsageError: the images of a step are no multiple of the reference.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference == 0 or reference == processes:
        _require_multiple("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, reference)
        return cfg
    others = [spec for spec in source_specs(cfg) if spec.name != TRAIN]
    _require_multiple("SOLVER.IMS_PER_BATCH", cfg.SOLVER.IMS_PER_BATCH, reference)
    for spec in others:
        _require_multiple(f"the number of images of the source {spec.name}", spec.images_per_step, reference)
    entries = entries_of(
        [replace(spec, images_per_step=spec.images_per_step // reference * processes) for spec in others]
    )
    cfg = DefaultTrainer.auto_scale_workers(cfg, processes)  # a copy
    frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.DATASETS.SOURCES = entries
    if frozen:
        cfg.freeze()
    return cfg


def _require_multiple(what, images, reference):
    if reference > 0 and images % reference:
        raise UsageError(
            f"{what} is {images}, no multiple of SOLVER.REFERENCE_WORLD_SIZE, {reference}: change one of them, or set "
            "REFERENCE_WORLD_SIZE to 0 for no scaling."
        )


def _open_output(cfg):
    try:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    except OSError as error:
        raise SetupError(f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be made ({error}): choose another one.") from None
    if not os.access(cfg.OUTPUT_DIR, os.W_OK):
        raise SetupError(f"OUTPUT_DIR {cfg.OUTPUT_DIR!r} cannot be written: choose another one.")


def _report(cfg, reference, on_cpu, changed):
    """Log what is run, and what was changed.

    Args:
        cfg: what is run.
        reference: world size that the configuration was written for.
        on_cpu: whether MODEL.DEVICE names CUDA and there is none.
        changed: overrides that make the figures of TEST.EXPECTED_RESULTS meaningless.
    """
    logger.debug("Command: %s", " ".join(sys.argv))
    logger.debug("%s", _versions())
    processes = comm.get_world_size()
    where = "the CPU, for there is no CUDA device" if on_cpu else cfg.MODEL.DEVICE
    logger.info(
        "ovdet2 %s, torch %s, %d process%s on %s, seed %d",
        ovdet2.__version__, torch.__version__, processes, "es" * (processes > 1), where, cfg.SEED,
    )  # fmt: skip
    if changed:
        logger.info("The expected figures are not checked, because of %s.", ", ".join(changed))
    if cfg.SOLVER.REFERENCE_WORLD_SIZE != reference:
        logger.info(
            "Scaled from %d processes to %d: IMS_PER_BATCH %d, BASE_LR %g, MAX_ITER %d, STEPS %s, WARMUP_ITERS %d.",
            reference,
            cfg.SOLVER.REFERENCE_WORLD_SIZE,
            cfg.SOLVER.IMS_PER_BATCH,
            cfg.SOLVER.BASE_LR,
            cfg.SOLVER.MAX_ITER,
            cfg.SOLVER.STEPS,
            cfg.SOLVER.WARMUP_ITERS,
        )
    if cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER > 1:
        logger.warning(
            "SOLVER.WARMUP_ITERS, %d, is not below SOLVER.MAX_ITER, %d: the learning rate stays near 0. For a short trial, "
            "set WARMUP_ITERS to 0.",
            cfg.SOLVER.WARMUP_ITERS,
            cfg.SOLVER.MAX_ITER,
        )
    _warn_of_shared_memory(cfg)
    logger.info("Configuration, log and results: %s", cfg.OUTPUT_DIR)


def _warn_of_shared_memory(cfg):
    """Warn if the batches that the loading processes of this machine prepare may not fit into shared memory."""
    found, workers = shared_memory(), cfg.DATALOADER.NUM_WORKERS * comm.get_local_size()
    images = _PREPARED_BATCHES * workers * max(1, cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size())
    needed = images * _LARGE_IMAGE_BYTES
    if found is not None and found[0] < needed:
        logger.warning(
            "%d loading processes may need %.1f GB of shared memory, of which %.1f GB are free: enlarge /dev/shm (docker run "
            "--shm-size 8g) or lower DATALOADER.NUM_WORKERS if loading fails.",
            workers,
            needed / 1e9,
            found[0] / 1e9,
        )


def _versions():
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Detectron2 {detectron2.__version__}, {device}, {torch.get_num_threads()} threads"
    )
