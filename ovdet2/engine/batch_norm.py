"""Running statistics of batch normalisation in a run of several processes."""

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def average_batch_norm(model: torch.nn.Module) -> None:
    """Set every running mean and variance to its mean over the processes; in a single process, do nothing.

    Each process follows the images it sees, so without this the processes would evaluate different models, and a
    checkpoint would hold the statistics of rank 0. Modules in evaluation mode have no running statistics to average and are skipped.
    A collective call: call it in every process. A second call in a row changes no bit, for the sum is in float64:
    whether an evaluation follows a checkpoint makes no difference to a resumed run.

    Args:
        model: module, its buffers changed in place.
    """
    if comm.get_world_size() == 1:
        return
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var) if buffer is not None]
    if not buffers:
        return
    flat = torch.cat([buffer.double().flatten() for buffer in buffers])
    dist.all_reduce(flat)
    flat /= comm.get_world_size()
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers])):
        buffer.copy_(mean.view_as(buffer))
