"""From prompts to conditioning: every assembly of the family, both kinds of nothing, and ranking."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prompting import SYSTEMS, T5, conditioner
from tiny import noise
from transformers import T5Config as Reference
from transformers import T5EncoderModel

from semanticodec.conditioners.config import PhonemeConfig, PromptConfig, SequenceConfig, T5Config
from semanticodec.conditioners.keys import COPIES, differing_copies
from semanticodec.conditioners.prompts import PromptConditioner, Prompts
from semanticodec.errors import ConfigError
from semanticodec.latent import Conditioning

TEXTS = ["bells ring", "a dog barks twice while rain", "bells and rain"]


@pytest.fixture(scope="module")
def systems(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PromptConditioner]:
    return {name: conditioner(name, tmp_path_factory.mktemp(name)) for name in SYSTEMS}


def parts(conditioning: Conditioning) -> list[torch.Tensor]:
    film = [] if conditioning.film is None else [conditioning.film]
    return [*film, *(x for context in conditioning.contexts for x in context if x is not None)]


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_film(systems: dict[str, PromptConditioner]) -> None:
    system = systems["film"]
    told = system(Prompts(TEXTS))
    assert told.contexts == ()
    assert told.film is not None
    assert torch.equal(told.film, system.clap.text(TEXTS))
    nothing = system.unconditional(2).film
    assert nothing is not None
    close(nothing, system.clap.text(["", ""]))
    wave = noise(2, 9000, scale=0.1)
    assert torch.equal(parts(system.sound(wave, 16_000))[0], system.clap.audio(wave, 16_000))


def test_t5(systems: dict[str, PromptConditioner]) -> None:
    system = systems["t5"]
    ((states, mask),) = system(Prompts(TEXTS)).contexts
    assert states.shape == (3, 7, 16)
    assert mask is not None
    assert mask.sum(1).tolist() == [3, 7, 4]
    ((empty, one),) = system.unconditional(2).contexts
    assert empty.shape == (2, 1, 16)
    assert one is not None
    assert one.tolist() == [[1], [1]]
    ((negative, _),) = system.unconditional(1, negatives=["rain"]).contexts
    assert negative.shape == (1, 2, 16)


def test_t5_is_the_encoder_of_transformers(systems: dict[str, PromptConditioner]) -> None:
    ours = systems["t5"].t5
    assert ours is not None
    whole = T5EncoderModel(
        Reference(
            vocab_size=T5.vocabulary, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    ).eval()  # fmt: skip
    whole.load_state_dict({f"encoder.{k}": v for k, v in ours.model.state_dict().items()} | {
        "shared.weight": ours.model.embed_tokens.weight
    })  # fmt: skip
    ids, mask = ours.tokenizer(TEXTS)
    states, seen = ours.tokens(ids, mask)
    assert torch.equal(seen, mask.float())
    close(states, whole(input_ids=ids, attention_mask=mask).last_hidden_state)


def test_sequence_in_the_order_of_the_unet(systems: dict[str, PromptConditioner]) -> None:
    system = systems["sequence"]
    assert system.t5 is not None
    assert system.sequence is not None
    (written, ones), (states, mask) = system(Prompts(TEXTS)).contexts
    want = system.t5.text(TEXTS)
    assert torch.equal(states, want[0])
    assert mask is not None
    assert torch.equal(mask, want[1])
    assert ones is not None
    assert torch.equal(ones, torch.ones(3, 3))
    for row, length in enumerate((3, 7, 4)):
        vector = system.clap.text(TEXTS[row : row + 1])[:, None]
        second = states[row : row + 1, :length], torch.ones(1, length)
        close(system.sequence.generate([(vector, torch.ones(1, 1)), second])[0], written[row])


@pytest.mark.parametrize("name", ["film", "t5", "sequence"])
def test_a_row_does_not_depend_on_its_batch_mates(systems: dict[str, PromptConditioner], name: str) -> None:
    together = parts(systems[name](Prompts(TEXTS)))
    for row, text in enumerate(TEXTS):
        for whole, alone in zip(together, parts(systems[name](Prompts([text]))), strict=True):
            close(whole[row, : alone.shape[1]], alone[0])


def test_both_kinds_of_nothing(systems: dict[str, PromptConditioner]) -> None:
    system = systems["sequence"]
    (zeros, ones), (states, mask) = system.unconditional(2).contexts
    assert torch.equal(zeros, torch.zeros(2, 3, 16))
    assert ones is not None
    assert torch.equal(ones, torch.ones(2, 3))
    assert states.shape == (2, 1, 16)
    chain = system.unconditional(2, "negative_prompt").contexts
    close(chain[1][0], states)
    assert mask is not None
    assert chain[0][0].abs().max() > 0.1
    for a, b in zip(parts(system(Prompts(["", ""]))), parts(Conditioning(contexts=chain)), strict=True):
        assert torch.equal(a, b)
    told = system.unconditional(3, "negative_prompt", TEXTS)
    for a, b in zip(parts(system(Prompts(TEXTS))), parts(told), strict=True):
        assert torch.equal(a, b)


def test_zeros_would_ignore_negative_prompts(systems: dict[str, PromptConditioner]) -> None:
    with pytest.raises(ConfigError, match='policy "negative_prompt"'):
        systems["sequence"].unconditional(1, negatives=["rain"])
    with pytest.raises(ConfigError, match="seen 1 negative prompts for 2 rows"):
        systems["film"].unconditional(2, negatives=["rain"])


def test_speech(systems: dict[str, PromptConditioner], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semanticodec.conditioners.phonemes.phonemize", lambda text: text)
    system = systems["speech"]
    said = ["one", "", "seven words"]
    ((written, ones),) = system(Prompts(TEXTS, said)).contexts
    assert ones is not None
    assert torch.equal(ones, torch.ones(3, 3))
    for row in range(3):
        ((alone, _),) = system(Prompts(TEXTS[row : row + 1], said[row : row + 1])).contexts
        close(alone[0], written[row])
    ((other, _),) = system(Prompts(TEXTS, ["two", "", "seven words"])).contexts
    assert (other - written).abs().amax((1, 2)).gt(1e-3).tolist() == [True, False, False]
    ((silent, _),) = system(Prompts(TEXTS)).contexts
    close(silent[1], written[1])
    ((zeros, _),) = system.unconditional(1).contexts
    assert not zeros.any()


@pytest.mark.parametrize("name", ["film", "sequence", "speech"])
def test_bfloat16(systems: dict[str, PromptConditioner], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("semanticodec.conditioners.phonemes.phonemize", lambda text: text)
    half = copy.deepcopy(systems[name]).bfloat16()
    for whole, told in ((systems[name](Prompts(TEXTS)), half(Prompts(TEXTS))), (None, half.unconditional(2))):
        for index, part in enumerate(parts(told)):
            assert torch.isfinite(part).all()
            if whole is not None:
                assert (part.float() - parts(whole)[index]).abs().max() < 0.15


def test_candidates_are_ranked_by_the_shared_clap(systems: dict[str, PromptConditioner]) -> None:
    for system in systems.values():
        waves = noise(4, 5000, scale=0.1)
        scores = system.rank(waves, 16_000, TEXTS[:2])
        sounds, texts = system.clap.audio(waves, 16_000), system.clap.text(TEXTS[:2])
        for i in range(2):
            for j in range(2):
                close(scores[i, j], sounds[i + 2 * j] @ texts[i])
        assert sum(name.endswith("word_embeddings.weight") for name in system.state_dict()) == 1


def test_prompts_that_make_no_sense(systems: dict[str, PromptConditioner]) -> None:
    for wrong in (lambda: Prompts("bells"), lambda: Prompts([]), lambda: Prompts(["a"], ["b", "c"])):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="reads no transcriptions"):
        systems["film"](Prompts(["a"], ["b"]))
    with pytest.raises(ConfigError, match="give a text"):
        systems["sequence"].sound(noise(1, 5000), 16_000)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"contexts": ("t5",)}, "needs T5"),
        ({"contexts": ("sequence",)}, "go together"),
        ({"sequence": SequenceConfig()}, "go together"),
        ({"sequence": SequenceConfig(), "contexts": ("sequence",)}, "either T5 or phonemes"),
        (
            {"sequence": SequenceConfig(), "contexts": ("sequence",), "t5": T5Config(), "phonemes": PhonemeConfig()},
            "either T5 or phonemes",
        ),
    ],
)
def test_configurations_that_make_no_sense(wrong: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        replace(PromptConfig(), **wrong)


def test_second_copies_that_differ_are_named() -> None:
    (first, second), *_ = COPIES
    same = {f"{first}a": torch.ones(2), f"{second}a": torch.ones(2), f"{first}alone": torch.ones(1)}
    same |= {f"{first}wide": torch.ones(2, 2), f"{second}wide": torch.zeros(2, 2)}
    assert differing_copies(same) == []
    assert differing_copies(same | {f"{first}b": torch.ones(1), f"{second}b": torch.zeros(1)}) == [f"{second}b"]


def test_tokenizers_of_a_folder(tmp_path: Path) -> None:
    """What the tests read is what a user's folder holds: special tokens around, padding after."""
    module = conditioner("sequence", tmp_path)
    assert module.clap.tokenizer(["a dog", "a"])[0].tolist() == [[0, 4, 5, 2], [0, 4, 2, 1]]
    assert module.t5 is not None
    assert module.t5.tokenizer(["a dog", ""])[0].tolist() == [[4, 5, 1], [1, 0, 0]]


def test_speech_is_one_window_long(tmp_path: Path) -> None:
    """Its sequence says when what is heard; that of other systems does so for sounds that may come again."""
    speech = conditioner("speech", tmp_path)
    speech.check_duration(10.24, 10.24)
    with pytest.raises(ConfigError, match=r"12.5 s of speech.*10.24 s at a time; split.*into sentences"):
        speech.check_duration(12.5, 10.24)
    conditioner("sequence", tmp_path).check_duration(12.5, 10.24)
