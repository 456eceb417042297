"""What a generator can be told moment by moment: how loud to be, as an image for a ControlNet.

B rows, M mel rows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from . import checkpoints
from .config import ControlNetConfig
from .latent import Control
from .nn.controlnet import ControlNet
from .values import from_json, to_json

LOUDNESS = "loudness.safetensors"
"""File of the ControlNet that follows loudness, beside the model that it was trained for."""
SMOOTHING = 9
"""Mel rows (of 10 ms) over which a loudness curve is averaged."""
MEAN, SPREAD = -4.0, 2.5
"""Of loudness curves in nats, roughly."""


def loudness(mel: Tensor) -> Tensor:
    """Return how loud each row of log-mel ``[B, M, bins]`` is: nats ``[B, M]``, smoothed."""
    level = mel.exp().mean(2).clamp_min(1e-5).log()
    padded = functional.pad(level[:, None], (SMOOTHING // 2, SMOOTHING // 2), mode="replicate")
    return functional.avg_pool1d(padded, SMOOTHING, 1)[:, 0]


def loudness_hint(curve: Tensor, bins: int) -> Tensor:
    """Draw loudness curves ``[B, M]`` as images of the mel's size, ``[B, 1, M, bins]``."""
    return ((curve - MEAN) / SPREAD)[:, None, :, None].expand(-1, 1, -1, bins)


def follow(network: ControlNet, curve: Tensor, bins: int, scale: float = 1.0) -> Control:
    """Return the control that makes a generator as loud as a curve says.

    Args:
        network: from :func:`read`.
        curve: from :func:`loudness`, ``[B, M]``.
        bins: of the generator's mel.
        scale: how strongly; 0 is not at all.
    """
    return Control(network, loudness_hint(curve, bins), scale)


def save(folder: Path, network: ControlNet) -> None:
    """Write a ControlNet for loudness beside the model that it was trained for, in half precision."""
    halves = {name: value.half() for name, value in network.state_dict().items()}
    checkpoints.save_model(folder, to_json(network.control), halves, LOUDNESS)


def read(folder: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ControlNet:
    """Load the ControlNet for loudness of a model's folder.

    Raises:
        CheckpointError: the file is missing, damaged or of another architecture.
    """
    text, tensors = checkpoints.read_model(folder, LOUDNESS)
    with torch.device("meta"):
        network = ControlNet(from_json(ControlNetConfig, text))
    found = checkpoints.matched(tensors, [], network.state_dict(), str(folder / LOUDNESS))
    checkpoints.fill(network, found, device=device, dtype=dtype)
    return network.eval().requires_grad_(False)
