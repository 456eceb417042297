"""What a generator can be told moment by moment: how loud to be, as an image for a ControlNet.

B rows, M mel rows.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import checkpoints
from .audio import log_mel, recording, resample
from .config import ControlNetConfig, LatentConfig
from .editing import Condition
from .latent import Conditioning, Control
from .loading import fill, matched
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


def loudness_of(wave: Tensor | np.ndarray, sample_rate: int, config: LatentConfig) -> Tensor:
    """Return how loud a recording is from moment to moment.

    Args:
        wave: samples in [-1, 1], ``[S]`` or the channels of one recording ``[C, S]``, which are averaged.
        sample_rate: of ``wave`` in Hz.
        config: of the generator that is to follow.

    Returns:
        Nats ``[M]``, a value per mel row.

    Raises:
        AudioError: ``wave`` is no recording.
    """
    mel = config.mel
    heard = resample(torch.atleast_2d(recording(wave)).mean(0, keepdim=True), sample_rate, mel.sample_rate)
    # A reflected edge longer than the sound has nothing to reflect.
    return loudness(log_mel(functional.pad(heard, (0, max(0, mel.n_fft - heard.shape[1]))), mel))[0]


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


def following(
    network: ControlNet, curve: Tensor, scale: float, config: LatentConfig, condition: Condition
) -> Condition:
    """Return a condition that says the same as another, and how loud to be besides.

    Args:
        network: from :func:`read`.
        curve: nats ``[M]``, a value per mel row; the last one holds on.
        scale: as in :func:`follow`.
        config: of the generator.
        condition: what is said already.
    """
    factor, bins = config.vae.factor, config.mel.bins

    def told(first: int, steps: int) -> tuple[Conditioning, Conditioning]:
        rows = torch.arange(first * factor, (first + steps) * factor).clamp(0, len(curve) - 1)
        own = curve[rows].to(next(network.parameters()))

        # In both halves, as in training: guidance is away from no label, not away from no control.
        def with_control(half: Conditioning) -> Conditioning:
            control = follow(network, own.expand(max(1, half.count), -1), bins, scale)
            return replace(half, controls=(*half.controls, control))

        asked, absent = condition(first, steps)
        return with_control(asked), with_control(absent)

    return told


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
    found = matched(tensors, [], network.state_dict(), str(folder / LOUDNESS))
    fill(network, found, device=device, dtype=dtype)
    return network.eval().requires_grad_(False)
