"""Best of n: which of several candidates fits its text best.  B prompts, n candidates, D channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError


@dataclass(frozen=True)
class Ranking:
    """How well candidates fit.

    Args:
        scores: cosines ``[B, n]`` of every candidate with its own prompt.
    """

    scores: Tensor

    @property
    def best(self) -> Tensor:
        """The best candidate of every prompt, int64 ``[B]`` in 0 .. n - 1; the first of equals."""
        return self.scores.argmax(1)

    @property
    def rows(self) -> Tensor:
        """Where the best candidates stand among all, int64 ``[B]``."""
        return torch.arange(len(self.scores), device=self.scores.device) + self.best * len(self.scores)

    def pick(self, candidates: Tensor) -> Tensor:
        """Return the best candidate of every prompt ``[B, ...]`` out of ``[n * B, ...]``."""
        return candidates[self.rows.to(candidates.device)]


def rank(sounds: Tensor, texts: Tensor) -> Ranking:
    """Compare candidates with their prompts.

    Args:
        sounds: unit embeddings ``[n * B, D]``; candidate j of prompt i stands at ``i + j * B``.
        texts: unit embeddings of the prompts ``[B, D]``.

    Raises:
        ConfigError: the number of sounds is no multiple of the number of texts.

    Source: as AudioLDM ranks (spec 2.9), except that the candidates of a prompt are only compared with each other.
    """
    if not len(texts) or not len(sounds) or len(sounds) % len(texts):
        raise ConfigError(f"seen {len(sounds)} sounds for {len(texts)} texts; wanted is the same number for each")
    return Ranking((sounds.unflatten(0, (-1, len(texts))) * texts).sum(-1).T)
