"""The sequence generator: what GPT-2 reads, and that it writes the same with and without a cache."""

from __future__ import annotations

import pytest
import torch
from prompting import SEQUENCE
from tiny import fill, noise

from semanticodec.conditioners.keys import sequence_rules
from semanticodec.conditioners.sequence import Context, SequenceGenerator
from semanticodec.errors import ConfigError
from semanticodec.keymap import apply_rules
from semanticodec.training.sequence import sequence_loss


@pytest.fixture(scope="module")
def generator() -> SequenceGenerator:
    module = SequenceGenerator(SEQUENCE)
    fill(module)
    return module.requires_grad_(False).eval()


def conditions(length: int = 5, seed: int = 1) -> list[Context]:
    mask = torch.ones(2, length)
    mask[0, 3:] = 0
    return [(noise(2, 1, 12), torch.ones(2, 1)), (noise(2, length, 16, seed=seed), mask)]


def test_what_is_read(generator: SequenceGenerator) -> None:
    (vector, _), (states, _) = given = conditions()
    read, mask = generator.embed(given, 3)
    start, end = generator.start, generator.end
    want = [
        start[0].expand(2, 1, -1),
        generator.project[0](vector),
        end[0].expand(2, 1, -1),
        start[1].expand(2, 1, -1),
        generator.project[1](states),
        end[1].expand(2, 1, -1),
    ]
    assert torch.equal(read, torch.cat(want, 1))
    assert mask.tolist() == [[1, 1, 1, 1, 1, 1, 1, 0, 0, 1], [1] * 10]


def test_the_tail_gives_way(generator: SequenceGenerator) -> None:
    """40 positions: what 7 vectors need is cut off the conditions' end."""
    given = conditions(60)
    read, mask = generator.embed(given, 7)
    assert read.shape == (2, 33, 16)
    assert mask.shape == (2, 33)
    assert torch.equal(read[:, 4:], generator.project[1](given[1][0])[:, :29])
    assert generator.generate(given, 7).shape == (2, 7, 16)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_cached_is_uncached(generator: SequenceGenerator, count: int) -> None:
    plain = generator.generate(conditions(), count, cached=False)
    assert plain.shape == (2, count, 16)
    torch.testing.assert_close(generator.generate(conditions(), count), plain, rtol=1e-5, atol=1e-5)


def test_every_vector_is_the_guess_after_the_ones_before(generator: SequenceGenerator) -> None:
    written = generator.generate(conditions())
    read, mask = generator.embed(conditions(), 3)
    whole = torch.cat([read, written], 1)
    guesses = generator(whole, torch.cat([mask, torch.ones(2, 3)], 1))
    torch.testing.assert_close(guesses[:, 9:12], written, rtol=1e-5, atol=1e-5)
    assert (guesses[:, 8] - written[:, 0]).abs().max() > 0.01


def test_what_is_masked_is_not_heard(generator: SequenceGenerator) -> None:
    given, other = conditions(), conditions(seed=2)
    other[1][0][1] = given[1][0][1]
    other[1][0][0, :3] = given[1][0][0, :3]
    assert not torch.equal(other[1][0], given[1][0])
    torch.testing.assert_close(generator.generate(other), generator.generate(given), rtol=1e-5, atol=1e-5)


def test_rows_do_not_depend_on_each_other(generator: SequenceGenerator) -> None:
    whole = generator.generate(conditions())
    for row in range(2):
        alone = [(sequence[row : row + 1], mask[row : row + 1]) for sequence, mask in conditions()]
        torch.testing.assert_close(generator.generate(alone)[0], whole[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("given", "count"), [(conditions()[:1], 3), (conditions(), 0), (conditions(), 40)])
def test_what_does_not_fit(generator: SequenceGenerator, given: list[Context], count: int) -> None:
    with pytest.raises(ConfigError, match="wanted are 2 conditions and 1 to 39 vectors"):
        generator.generate(given, count)


def test_masks_of_older_versions_are_dropped() -> None:
    names = ["model.h.0.attn.bias", "model.h.11.attn.masked_bias", "model.wte.weight", "model.h.0.attn.c_attn.bias"]
    found, unmapped = apply_rules(sequence_rules("", "x."), {name: torch.ones(2) for name in names}, {"x"})
    assert (list(found), unmapped) == (["x.model.h.0.attn.c_attn.bias"], [])


def test_loss_is_that_of_each_guess_from_the_truth_before_it(generator: SequenceGenerator) -> None:
    target = noise(2, 4, 16, seed=9)
    read, mask = generator.embed(conditions(), 4)
    errors = []
    for known in range(4):
        seen = torch.cat([read, target[:, :known]], 1)
        guess = generator(seen, torch.cat([mask, torch.ones(2, known)], 1))[:, -1]
        errors.append((guess - target[:, known]).abs().mean())
    torch.testing.assert_close(sequence_loss(generator, conditions(), target), torch.stack(errors).mean())
    perfect = generator.generate(conditions(), 4)
    assert sequence_loss(generator, conditions(), perfect) < 1e-5


def test_one_batch_can_be_learned() -> None:
    module = SequenceGenerator(SEQUENCE)
    fill(module)
    target = noise(2, 4, 16, seed=9)
    optimizer = torch.optim.AdamW(module.parameters(), 5e-3)
    losses = []
    for _ in range(60):
        loss = sequence_loss(module.eval(), conditions(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.25 * losses[0]
