"""The neck: backbone maps -> levels with the same number of channels.

Shapes: B images, C channels of the transformer.
"""

from collections.abc import Sequence

from torch import Tensor, nn


class MultiScaleNeck(nn.Module):
    """A 1x1 convolution per backbone map, 3x3 ones of stride 2 for coarser levels; group norm after each."""

    def __init__(self, in_channels: Sequence[int], dim: int = 256, levels: int = 4, groups: int = 32) -> None:
        """
        Args:
            in_channels: number of channels of each backbone map, finest first.
            dim: C.
            levels: number of maps to return; extra levels are computed from the backbone's last map, each from
                the level before.
            groups: number of groups of the group norm.
        """
        super().__init__()
        self.num_inputs = len(in_channels)
        blocks = [_block(groups, nn.Conv2d(channels, dim, 1)) for channels in in_channels]
        channels = in_channels[-1]
        for _ in range(levels - len(in_channels)):
            blocks.append(_block(groups, nn.Conv2d(channels, dim, 3, stride=2, padding=1)))
            channels = dim
        self.levels = nn.ModuleList(blocks)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """
        Args:
            features: list of Tensor [B, channels, h, w], finest first.

        Returns:
            list of Tensor [B, C, h, w], one per level.
        """
        maps = [block(feature) for block, feature in zip(self.levels, features)]
        latest = features[-1]
        for block in self.levels[self.num_inputs :]:
            latest = block(latest)
            maps.append(latest)
        return maps


def _block(groups, convolution):
    nn.init.xavier_uniform_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.GroupNorm(groups, convolution.out_channels))
