"""How far a mel is from the truth, as the ear weighs it.  B batch, T mel rows."""

from __future__ import annotations

from torch import Tensor

LOG_WEIGHT = 0.5
COMPRESSION = 0.5
"""Exponent from amplitude to loudness: with logarithms alone the bits go into the noise between words."""
BACKGROUND = 0.1
"""Share of the window's loudness in each bin's yardstick, so that empty bins do not count as much as full ones."""


def mel_error(predicted: Tensor, mel: Tensor) -> Tensor:
    """Compare log-mels ``[..., T, bins]`` (nats): mean absolute error of logarithms and of relative loudness.

    Returns:
        Per row ``[...]``: ``LOG_WEIGHT * |error in nats| + |error in loudness| / the bin's mean loudness there``.
    """
    loudness = (COMPRESSION * mel).exp()
    level = loudness.mean(-2, keepdim=True)
    level = level + BACKGROUND * level.mean(-1, keepdim=True)
    # No real sound is louder than e^2; a first guess may be, and must not overflow.
    error = ((COMPRESSION * predicted.clamp_max(3.0)).exp() - loudness).abs() / level
    return LOG_WEIGHT * (predicted - mel).abs().mean((-2, -1)) + error.mean((-2, -1))
