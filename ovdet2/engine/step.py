"""One optimisation step that stops, in every process and before the weights change, when a number is not finite."""

import contextlib
import time
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from ovdet2.errors import NumericalError, SetupError, UsageError


class CheckedStep:
    """Forward, backward, optimizer step, metrics.

    Detectron2's trainers check for NaN when they write metrics, so some iterations late, and on rank 0 only, so the
    other processes keep waiting. Here the processes agree after every forward pass.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        data_loader: Iterable[Any],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        max_norm: float | None = None,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            model: module returning a dict of scalar losses (or one scalar) from a batch.
            data_loader: iterable of batches, endless; opened at the first step.
            optimizer: over the model's parameters.
            scaler: torch.amp.GradScaler of float16, or None.
            max_norm: L2 norm over all parameters to which gradients are clipped, or None.
            amp_dtype: type of the mixed precision of the forward pass, or None for float32.
        """
        model.train()
        self.model = model
        self.data_loader = data_loader
        self.optimizer = optimizer
        self.scaler = scaler
        self.max_norm = max_norm
        self.amp_dtype = amp_dtype
        self.iter = 0
        self._batches = None

    def run_step(self) -> None:
        """Do iteration ``self.iter``.

        Raises:
            NumericalError: a loss or gradient is not finite in some process, or with float16 the gradients of many
                steps in a row; the same message in all of them.
            SetupError: the GPU's memory does not suffice for the batch.
        """
        if self._batches is None:
            self._batches = iter(self.data_loader)
        start = time.perf_counter()
        batch = next(self._batches)
        data_time = time.perf_counter() - start
        with self._memory_explained(batch):
            losses = self._update(batch)
        _write_metrics(losses, data_time)

    def _update(self, batch):
        """Change the weights once; returns the losses."""
        losses, failure = self._forward(batch)
        if not losses and failure is None:
            kinds = sorted({str(getattr(sample, "kind", "boxes")) for sample in batch})
            raise UsageError(
                f"a step on images of kind {', '.join(kinds)} gives no loss: a part that states these kinds in `sees` must "
                "return losses of them."
            )
        if losses:
            total = cast(torch.Tensor, sum(losses.values()))
        else:
            total = torch.full((), float("nan"), device=self._device())
        if not _everywhere(torch.isfinite(total.detach())):
            self._stop("the loss is not finite", batch, losses, failure)
        self.optimizer.zero_grad()
        if self.scaler is None:
            total.backward()
            # Gradients are averaged over the processes, so each of them finds the same here.
            if not torch.isfinite(self._clip()):
                self._stop("a gradient is not finite", batch, losses)
            self.optimizer.step()
        else:
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer)
            self._clip()
            # The scaler itself skips steps whose float16 gradients overflow, and halves its scale.
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() < 1:
                # Float16 does not overflow without a scale: the gradients themselves are not finite, in each step.
                self._stop("the float16 gradients are not finite, not even with a loss scale of 1,", batch, losses)
        return losses

    def close(self) -> None:
        """Release the batches and the workers that load them."""
        self._batches = None

    def _forward(self, batch):
        """(losses, None), or (None, reason) if Detectron2 itself found a number that is not finite."""
        try:
            with torch.autocast(self._device().type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                losses = self.model(batch)
        except FloatingPointError as error:
            return None, str(error)
        return (losses if isinstance(losses, dict) else {"loss": losses}), None

    @contextlib.contextmanager
    def _memory_explained(self, batch):
        """Name the images' sizes and the keys to change when the GPU's memory does not suffice."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            shapes = ", ".join(str(tuple(record["image"].shape)) for record in batch)
            raise SetupError(
                f"the GPU's memory does not suffice for images of {shapes} at iteration {self.iter}: lower "
                "SOLVER.IMS_PER_BATCH or the images' size (a detector's INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN), or "
                "set SOLVER.AMP.ENABLED True."
            ) from error

    def _clip(self):
        """Clip gradients if configured; returns the norm over all gradients before clipping."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        return norm

    def _device(self):
        return next(self.model.parameters()).device

    def _stop(self, what, batch, losses, failure=None):
        """Raise one NumericalError that names the losses and images of every process."""
        terms = failure or ", ".join(f"{name} {value.item():.4g}" for name, value in losses.items())
        images = ", ".join(f"{r.get('file_name')} (id {r.get('image_id')})" for r in batch)
        reports = comm.all_gather(f"{terms}; images {images}")
        listing = "\n".join(f"  process {rank}: {report}" for rank, report in enumerate(reports))
        raise NumericalError(
            f"{what} at iteration {self.iter}; the weights were not changed by it.\n{listing}\n"
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS or clip gradients (SOLVER.CLIP_GRADIENTS), look at "
            "these images' annotations, and go on from the last checkpoint with --resume."
        )


def _everywhere(flag):
    """Whether a boolean scalar tensor is true in all processes."""
    if comm.get_world_size() > 1:
        flag = flag.to(torch.int32)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _write_metrics(losses, data_time):
    """Put the losses, averaged over the processes, and the longest wait for data into Detectron2's event storage."""
    names = sorted(losses)
    row = torch.stack([losses[name].detach().float() for name in names])
    rows = torch.cat([row, row.new_tensor([data_time])])[None]
    if comm.get_world_size() > 1:
        gathered = [torch.empty_like(rows) for _ in range(comm.get_world_size())]
        dist.all_gather(gathered, rows)
        rows = torch.cat(gathered)
    if comm.is_main_process():
        means = dict(zip(names, rows[:, :-1].mean(dim=0).tolist()))
        storage = get_event_storage()
        storage.put_scalar("data_time", rows[:, -1].max().item())
        storage.put_scalar("total_loss", sum(means.values()))
        storage.put_scalars(**means)
