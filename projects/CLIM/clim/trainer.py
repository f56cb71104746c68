"""CLIM's training: ovdet2's trainer with another model, loader and optimizer, so its exact resume and its checks."""

import logging
import statistics
import time
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from clim.checkpoint import load_clip
from clim.loading import build_loader
from clim.model import MAX_LOG_SCALE, CLIMPretraining
from clim.sources import build_source
from clim.text_table import TextTable, build_text_table
from ovdet2.engine import Trainer
from ovdet2.engine.optimizer import mixed_precision
from ovdet2.errors import DataError

logger = logging.getLogger("ovdet2.clim")


class CLIMTrainer(Trainer):
    """Trains MODEL.TEACHER on CLIM.SOURCE."""

    def __init__(self, cfg):
        """
        Args:
            cfg: frozen configuration with the keys of :func:`clim.config.add_clim_config`.

        Raises:
            UsageError, DataError: see :func:`~clim.sources.build_source`, :func:`~clim.checkpoint.load_clip`,
                :class:`~clim.text_table.TextTable` and :class:`~clim.model.CLIMPretraining`.
        """
        self._teacher = load_clip(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED, cfg.MODEL.DEVICE)
        source = build_source(cfg)
        self._table = TextTable(text_table_of(cfg), source, self._teacher.fingerprint)
        self._source = source
        super().__init__(cfg)

    def build_train_loader(self, cfg):
        """See :func:`clim.loading.build_loader`."""
        return build_loader(cfg, self._source, self._table, self._teacher)

    def build_model(self, cfg):
        """See :class:`clim.model.CLIMPretraining`."""
        clim = cfg.CLIM
        model = CLIMPretraining(self._teacher, clim.TRAINABLE_BLOCKS, clim.GRIDS, clim.SINGLES, clim.CANVAS)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("%s: %.2f M parameters are trained.", self._teacher.fingerprint, trained / 1e6)
        return model

    def build_optimizer(self, cfg, model):
        """AdamW; weights of two or more dimensions decay, as in open_clip."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": cfg.SOLVER.WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, betas=tuple(cfg.CLIM.BETAS), eps=cfg.CLIM.EPS)

    def build_hooks(self):
        """The clamp of the logit scale comes before all others, so that it is in every checkpoint."""
        return [ClampLogitScale(self.clip.logit_scale), *super().build_hooks()]

    @property
    def clip(self):
        """The open_clip model in training."""
        return self._trained.clip

    def state_dict(self):
        return super().state_dict() | {"original": self._teacher.fingerprint.to_dict()}

    def load_state_dict(self, state):
        """Restore :meth:`state_dict`.

        Raises:
            DataError: the saved run started from other weights.
        """
        if state.get("original") != self._teacher.fingerprint.to_dict():
            raise DataError(
                f"{self.cfg.OUTPUT_DIR} holds a run that started from {state.get('original')}, not from "
                f"{self._teacher.fingerprint}: set MODEL.TEACHER to those weights, or OUTPUT_DIR to another folder."
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
            images = torch.stack([record["image"] for record in batch]).to(self.cfg.MODEL.DEVICE)
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


def text_table_of(cfg):
    """Path of the captions' embeddings."""
    return Path(cfg.CLIM.TEXT_TABLE or f"{cfg.OUTPUT_DIR}/captions.safetensors")


def prepare(cfg):
    """What is made once, before training: drawn captions, index of shards, text table. A collective call."""
    if comm.is_main_process():
        source, path = build_source(cfg), text_table_of(cfg)
        if not path.is_file():
            teacher = load_clip(cfg.MODEL.TEACHER.ARCHITECTURE, cfg.MODEL.TEACHER.PRETRAINED, cfg.MODEL.DEVICE)
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
