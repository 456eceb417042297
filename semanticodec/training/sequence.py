"""The objective of AudioLDM 2's sequence generator: guess each pooled AudioMAE feature from those before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..conditioners.sequence import Context, SequenceGenerator


def sequence_loss(generator: SequenceGenerator, conditions: Sequence[Context], target: Tensor) -> Tensor:
    """Return the mean absolute error of the guesses, each made from the conditions and the true vectors before it.

    Args:
        generator: in training mode.
        conditions: as for :meth:`~semanticodec.conditioners.sequence.SequenceGenerator.embed`.
        target: the pooled features ``[B, n, D]`` of the clips, from :func:`semanticodec.conditioners.audiomae.context`.

    Raises:
        ConfigError: as ``embed``.

    Source: spec 4.3: L1 between GPT-2's outputs, shifted by one, and the targets.
    """
    read, mask = generator.embed(conditions, target.shape[1])
    seen = torch.cat([read, target[:, :-1].to(read)], 1)
    seen_mask = torch.cat([mask, mask.new_ones(len(mask), target.shape[1] - 1)], 1)
    guesses = generator(seen, seen_mask)[:, read.shape[1] - 1 :]
    return functional.l1_loss(guesses, target.to(guesses))
