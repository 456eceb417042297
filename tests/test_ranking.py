"""Best of n: candidates of one prompt never meet those of another."""

from __future__ import annotations

import pytest
import torch
from tiny import noise
from torch.nn import functional

from semanticodec.errors import ConfigError
from semanticodec.ranking import rank


def test_cosines_of_each_candidate_with_its_own_prompt() -> None:
    texts = functional.normalize(noise(3, 8), dim=-1)
    sounds = functional.normalize(noise(12, 8, seed=1), dim=-1)
    scores = rank(sounds, texts)
    assert scores.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(scores[i, j], sounds[i + 3 * j] @ texts[i])


def test_prompts_are_not_mixed() -> None:
    """The one candidate that fits prompt 0 perfectly belongs to prompt 1, and stays there."""
    texts = torch.eye(2, 4)
    sounds = torch.tensor([[0.1, 0, 1, 0], [1.0, 0, 0, 0], [0.2, 0, 1, 0], [0, 0.3, 1, 0]])
    torch.testing.assert_close(rank(sounds, texts), torch.tensor([[0.1, 0.2], [0.0, 0.3]]))


@pytest.mark.parametrize(("sounds", "texts"), [(5, 2), (0, 2), (3, 0)])
def test_numbers_that_do_not_fit(sounds: int, texts: int) -> None:
    with pytest.raises(ConfigError, match=f"seen {sounds} sounds for {texts} texts"):
        rank(torch.ones(sounds, 4), torch.ones(texts, 4))
