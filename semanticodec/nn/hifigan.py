"""The HiFi-GAN generator: log-mel to waveform by transposed convolutions.

Module names are those of the published checkpoints (weight norm folded), so that a key map is a table of prefixes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HiFiGANConfig
from ..errors import ConfigError

SLOPE = 0.1
LAST_SLOPE = 0.01
"""The published generator leaves the last activation at the framework's default."""
EDGE_KERNEL = 7


class ResStack(nn.Module):
    """Residual pairs of a dilated and a plain convolution."""

    def __init__(self, channels: int, kernel: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)
            for dilation in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=(kernel - 1) // 2) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        # In place only on what a convolution just wrote: nothing else holds it, autograd included.
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            h = dilated(F.leaky_relu(x, SLOPE))
            h = plain(F.leaky_relu_(h, SLOPE))
            x = h.add_(x)
        return x


class HiFiGAN(nn.Module):
    """Generate the waveform of a log-mel.

    Source: HiFi-GAN v1 generator (arXiv 2010.05646) as in SemantiCodec's published checkpoints (spec section 4.6).
    """

    def __init__(self, config: HiFiGANConfig, mel_bins: int = 64) -> None:
        """Build the generator.

        Raises:
            ConfigError: ``rates`` and ``kernels`` do not pair up.
        """
        super().__init__()
        if len(config.rates) != len(config.kernels):
            raise ConfigError(f"{len(config.rates)} rates and {len(config.kernels)} kernels; give one kernel per rate")
        self.config = config
        widths = [config.base >> stage for stage in range(len(config.rates) + 1)]
        self.conv_pre = nn.Conv1d(mel_bins, widths[0], EDGE_KERNEL, padding=EDGE_KERNEL // 2)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(before, after, kernel, stride=rate, padding=(kernel - rate) // 2)
            for before, after, kernel, rate in zip(widths[:-1], widths[1:], config.kernels, config.rates, strict=True)
        )
        self.resblocks = nn.ModuleList(
            ResStack(width, kernel, config.dilations) for width in widths[1:] for kernel in config.stack_kernels
        )
        self.conv_post = nn.Conv1d(widths[-1], 1, EDGE_KERNEL, padding=EDGE_KERNEL // 2)

    def forward(self, mel: Tensor) -> Tensor:
        """Generate samples.

        Args:
            mel: natural-log mel ``[B, mel_bins, L]``.

        Returns:
            Waveform ``[B, 160 * L + 32]`` in [-1, 1] (with the published rates and kernels: the first transposed
            convolution gives one step more than its rate, which becomes 32 samples).
        """
        x = self.conv_pre(mel)
        stacks = len(self.config.stack_kernels)
        for stage, up in enumerate(self.ups):
            x = up(F.leaky_relu_(x, SLOPE))
            first, *others = self.resblocks[stage * stacks : (stage + 1) * stacks]
            total = first(x)
            for stack in others:
                total.add_(stack(x))
            x = total.div_(stacks)
        wave: Tensor = self.conv_post(F.leaky_relu_(x, LAST_SLOPE))
        return wave.tanh_().squeeze(1)
