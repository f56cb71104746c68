"""Weights by a formula of (name, index), the same on every machine and in every version of torch."""

import math
import zlib

import torch


def uniform(name, shape):
    """Tensor of numbers in [0, 1) from a hash of ``name`` and the index of each entry, in integers of 32 bits."""
    x = torch.arange(math.prod(shape), dtype=torch.int64) + zlib.crc32(name.encode())
    for _ in range(2):
        x = ((x ^ (x >> 16)) & 0xFFFFFFFF) * 0x45D9F3B & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**32).view(shape)


def filled(shapes, gains=()):
    """Weights of a network whose activations neither vanish nor grow.

    Args:
        shapes: {name: shape}.
        gains: pairs (end of names, factor of the weights or shift of the biases of that name).

    Returns:
        {name: float32 Tensor}. Matrices and kernels have variance 2 / fan-in; norms have scales near 1; the rest is
        small. A transposed convolution counts as its transpose, which has the same size of fan-in.
    """
    weights = {}
    for name, shape in shapes.items():
        noise = 2 * uniform(name, shape) - 1
        if len(shape) > 1 and name.endswith("weight"):
            value = noise * math.sqrt(6 / math.prod(shape[1:]))
        elif name.endswith(("weight", "running_var", "gamma", "scale")):
            value = 1 + 0.3 * noise
        else:
            value = 0.1 * noise
        for end, gain in gains:
            if name.endswith(end):
                value = value + gain if name.endswith("bias") else value * gain
        weights[name] = value.float()
    return weights
