"""Best of n: which of several candidates fits its text best.  B prompts, n candidates, D channels."""

from __future__ import annotations

from torch import Tensor

from .errors import ConfigError


def rank(sounds: Tensor, texts: Tensor) -> Tensor:
    """Compare candidates with their prompts.

    Args:
        sounds: unit embeddings ``[n * B, D]``; candidate j of prompt i stands at ``i + j * B``.
        texts: unit embeddings of the prompts ``[B, D]``.

    Returns:
        Cosines ``[B, n]`` of every candidate with its own prompt.

    Raises:
        ConfigError: the number of sounds is no multiple of the number of texts.

    Source: as AudioLDM ranks (spec 2.9), except that the candidates of a prompt are only compared with each other.
    """
    if not len(texts) or not len(sounds) or len(sounds) % len(texts):
        raise ConfigError(f"seen {len(sounds)} sounds for {len(texts)} texts; wanted is the same number for each")
    scores: Tensor = (sounds.unflatten(0, (-1, len(texts))) * texts).sum(-1).T
    return scores
