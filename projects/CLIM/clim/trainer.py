"""CLIM's training: ovdet2's trainer with another model, loader and optimizer, so its exact resume and its checks."""

import logging
import statistics
import time
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from clim.loading import build_loader
from clim.model import MAX_LOG_SCALE, CLIMPretraining, stacked
from clim.sources import build_source
from clim.text_table import TextTable, build_text_table
from ovdet2.data.datasets import split_of
from ovdet2.data.datasets.register import require_choice_allowed
from ovdet2.data.mosaic import draw_mosaics
from ovdet2.engine import Trainer
from ovdet2.engine.optimizer import full_model_norm, mixed_precision
from ovdet2.errors import DataError, UsageError
from ovdet2.vlm.dense import is_vit, stride_of
from ovdet2.vlm.teacher import Teacher

logger = logging.getLogger("ovdet2.clim")


class CLIMTrainer(Trainer):
    """Trains MODEL.TEACHER on CLIM.SOURCE."""

    def __init__(self, cfg):
        """
        Args:
            cfg: frozen configuration with the keys of :func:`clim.config.add_clim_config`.

        Raises:
            UsageError, DataError: see :func:`~clim.sources.build_source`, :meth:`Teacher.load`,
                :class:`~clim.text_table.TextTable` and :class:`~clim.model.CLIMPretraining`.
        """
        self._teacher = Teacher.load(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED, cfg.MODEL.DEVICE)
        source = build_source(cfg)
        self._table = TextTable(text_table_of(cfg), source, self._teacher.fingerprint)
        self._source = source
        super().__init__(cfg)

    def build_train_loader(self, cfg):
        """See :func:`clim.loading.build_loader`."""
        return build_loader(cfg, self._source, self._table, self._teacher)

    def build_model(self, cfg):
        """See :class:`clim.model.CLIMPretraining`."""
        model = build_pretraining(cfg, self._teacher)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%s: %.2f M parameters are trained.", self._teacher.fingerprint, trained / 1e6)
        return model

    def build_optimizer(self, cfg, model):
        """AdamW, with Detectron2's clipping per parameter; weights of two or more dimensions decay, as in open_clip."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.SOLVER.WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW
        if full_model_norm(cfg) is None:  # else done by CheckedStep
            optimizer = maybe_add_gradient_clipping(cfg, optimizer)
        settings = {"betas": tuple(cfg.CLIM.BETAS), "eps": cfg.CLIM.EPS, "fused": True}
        return optimizer(groups, lr=cfg.SOLVER.BASE_LR, **settings)

    def build_hooks(self):
        """The clamp of the logit scale comes before all others, so that it is in every checkpoint."""
        return [ClampLogitScale(self._trained.clip.logit_scale), *super().build_hooks()]

    @property
    def clip(self):
        """The open_clip model in training; with SOLVER.EMA.ENABLED the moving average of it."""
        return self.checkpointer.model.clip

    @property
    def captions_identity(self):
        """See ``identity`` of a source."""
        return self._source.identity()

    def state_dict(self):
        return super().state_dict() | {
            "original": self._teacher.fingerprint.to_dict(),
            "settings": settings_of(self.cfg),
        }

    def load_state_dict(self, state):
        """Restore :meth:`state_dict`.

        Raises:
            DataError: the saved run started from other weights, or had other settings.
        """
        original, own = state.get("original", {}), self._teacher.fingerprint
        if (original.get("architecture"), original.get("weights_sha256")) != (own.architecture, own.weights_sha256):
            raise DataError(
                f"{self.cfg.OUTPUT_DIR} holds a run that started from {state.get('original')}, not from "
                f"{self._teacher.fingerprint}: set MODEL.TEACHER to those weights, or OUTPUT_DIR to another folder."
            )
        saved, now = state.get("settings", {}), settings_of(self.cfg)
        if saved and not is_vit(self._teacher.clip.visual):
            saved = {
                "FREEZE_OUTPUT_AND_NORMS": False,
                **saved,
            }  # a run older than this key trained all of a ResNet's part
        different = [f"CLIM.{key} {saved[key]}, now {now.get(key)}" for key in saved if saved[key] != now.get(key)]
        if different:
            raise DataError(
                f"{self.cfg.OUTPUT_DIR} holds a run with other settings ({'; '.join(different)}): resume it with its "
                "own, or set OUTPUT_DIR to another folder."
            )
        super().load_state_dict(state)

    def composing_share(self, steps):
        """Do ``steps`` training steps and measure, of the same batches, the composing of mosaics.

        Returns:
            (median seconds of a step, loading and averaging over processes apart; median seconds of its composing).
        """
        batches, step_times, compose_times = iter(self.data_loader), [], []
        for _ in range(steps):
            batch = next(batches)
            images = stacked(batch, "image").to(self.cfg.MODEL.DEVICE)
            pixels = self._trained.normalise(images)
            compose_times.append(_seconds(lambda: self._trained.compose(pixels)))
            step_times.append(_seconds(lambda: self._step(batch)))
        return statistics.median(step_times), statistics.median(compose_times)

    def _step(self, batch):
        """Forward, backward and optimizer, in the precision of the run."""
        dtype = mixed_precision(self.cfg)[0]
        with torch.autocast(torch.device(self.cfg.MODEL.DEVICE).type, dtype=dtype, enabled=dtype is not None):
            loss = self._trained(batch)["loss_clim"]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class ClampLogitScale(HookBase):
    """Keeps the inverse temperature at or below 100, as CLIP does, and logs it."""

    def __init__(self, log_scale):
        self.log_scale = log_scale

    @torch.no_grad()
    def after_step(self):
        self.log_scale.clamp_(0.0, MAX_LOG_SCALE)
        if comm.is_main_process():
            get_event_storage().put_scalar("logit_scale", self.log_scale.exp().item())


def check(cfg, processes):
    """What can be checked in a configuration before anything is loaded or written.

    Args:
        cfg: configuration.
        processes: that share a batch.

    Raises:
        UsageError: a key of SOLVER that CLIM does not have, a number or share that is none, a data set that is not
            registered, a batch smaller than a mosaic, or one in which a grid of CLIM.GRIDS never comes.
        DataError: the files of the data set are missing or faulty.
    """
    clim, solver = cfg.CLIM, cfg.SOLVER
    if solver.OPTIMIZER != "AdamW" or solver.LR_FACTORS:
        raise UsageError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r} and LR_FACTORS {solver.LR_FACTORS}: CLIM has AdamW and "
            "one learning rate."
        )
    if (solver.WEIGHT_DECAY_NORM, solver.WEIGHT_DECAY_BIAS, solver.BIAS_LR_FACTOR) != (0.0, None, 1.0):
        raise UsageError(
            "SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS and BIAS_LR_FACTOR are not CLIM's: biases and norms have the "
            "same learning rate as all, and do not decay."
        )
    if not 0 <= clim.AVERAGE <= 1:
        raise UsageError(f"CLIM.AVERAGE is {clim.AVERAGE}: give the share of the trained weights, 0 to 1.")
    if clim.CAPTIONS_EACH < 1:
        raise UsageError(f"CLIM.CAPTIONS_EACH is {clim.CAPTIONS_EACH}: an image needs a caption.")
    _check_augmentation(clim)
    dataset = clim.EVALUATION.DATASET
    if dataset:
        if split_of(dataset) is None:
            raise UsageError(
                f"CLIM.EVALUATION.DATASET {dataset!r} is not a registered open-vocabulary data set: see "
                "datasets/README.md."
            )
        require_choice_allowed(dataset, "CLIM.EVALUATION.DATASET is")
        DatasetCatalog.get(dataset)  # a missing or faulty file is found now, not after training
    mosaics, _ = draw_mosaics(cfg.SOLVER.IMS_PER_BATCH // processes, clim.GRIDS, clim.SINGLES)
    missing = set(clim.GRIDS) - {len(mosaic) for mosaic in mosaics}
    if missing:
        round_of = sum(grid**2 for grid in clim.GRIDS) + clim.SINGLES
        raise UsageError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} over {processes} processes has no mosaic of "
            f"{' or '.join(f'{grid}x{grid}' for grid in sorted(missing))}: give each process {round_of} images or a "
            "multiple, or take those out of CLIM.GRIDS."
        )


def _check_augmentation(clim):
    low, high = clim.CROP_SCALE
    if not (0 < low <= high <= 1 and 0 <= clim.FLIP <= 1 and clim.SHUFFLE_BUFFER >= 1):
        raise UsageError(
            f"CLIM.CROP_SCALE {clim.CROP_SCALE}, FLIP {clim.FLIP}, SHUFFLE_BUFFER {clim.SHUFFLE_BUFFER}: give two "
            "shares of the image, the lower first, a chance, and at least one sample."
        )


def build_pretraining(cfg, teacher):
    """:class:`~clim.model.CLIMPretraining` of a configuration; the teacher's model is taken over.

    Raises:
        UsageError: settings do not fit the model, those of the evaluation included, which comes after the training.
    """
    clim, stride = cfg.CLIM, stride_of(teacher.clip.visual)
    evaluation = clim.EVALUATION
    if evaluation.DATASET and evaluation.SQUARE and evaluation.SIDE % stride:
        raise UsageError(
            f"CLIM.EVALUATION.SIDE is {evaluation.SIDE}: with SQUARE it must be a multiple of {stride} px, the cells of "
            f"{teacher.fingerprint.architecture}."
        )
    mosaics = clim.GRIDS, clim.SINGLES, clim.CANVAS, clim.SAME_TEXT
    return CLIMPretraining(teacher, clim.TRAINABLE_BLOCKS, *mosaics, clim.FREEZE_OUTPUT_AND_NORMS)


def settings_of(cfg):
    """What a run must be resumed with: CLIM.* but for what is used after training and where files lie."""
    free = {"AVERAGE", "EVALUATION", "TEXT_TABLE", "CAPTIONS", "IMAGES"}
    return {key: value for key, value in cfg.CLIM.items() if key not in free}


def text_table_of(cfg):
    """Path of the captions' embeddings."""
    return Path(cfg.CLIM.TEXT_TABLE or f"{cfg.OUTPUT_DIR}/captions.safetensors")


def prepare(cfg):
    """What is made once, before training: drawn captions, index of shards, text table. A collective call."""
    if comm.is_main_process():
        source, path = build_source(cfg), text_table_of(cfg)
        if not path.is_file():
            teacher = Teacher.load(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED, cfg.MODEL.DEVICE)
            build_pretraining(cfg, teacher)  # a canvas or number of blocks that does not fit is reported first
            build_text_table(path, source, teacher)
    comm.synchronize()


def _seconds(call):
    def wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start
