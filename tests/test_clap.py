"""CLAP: preparation of sound, its spectrogram, and unit vectors for texts and sounds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from prompting import CLAP as SMALL
from prompting import save_tokenizer
from tiny import fill, noise
from transformers import ClapFeatureExtractor

from semanticodec.conditioners.clap import CLAP, WINDOW, log_mel, prepare
from semanticodec.conditioners.hub import Tokenizer
from semanticodec.errors import AudioError, CheckpointError, ConfigError


@pytest.fixture(scope="module")
def clap(tmp_path_factory: pytest.TempPathFactory) -> CLAP:
    folder = save_tokenizer(tmp_path_factory.mktemp("roberta"), "roberta")
    module = CLAP(SMALL, Tokenizer(folder, SMALL.max_tokens))
    fill(module)
    return module.requires_grad_(False).eval()


def test_long_sounds_are_cut() -> None:
    wave = torch.arange(WINDOW + 1000.0)[None]
    assert torch.equal(prepare(wave)[0], torch.arange(float(WINDOW)))
    assert torch.equal(prepare(wave, start=700)[0], 700 + torch.arange(float(WINDOW)))


def test_short_sounds_are_repeated_as_often_as_they_fit_whole() -> None:
    wave = torch.arange(1.0, 158_401.0)[None]
    out = prepare(wave)[0]
    assert out.shape == (WINDOW,)
    assert torch.equal(out[: 3 * 158_400], wave[0].repeat(3))
    assert not out[3 * 158_400 :].any()
    assert torch.equal(prepare(wave, repeat=False), wave)


def test_spectrogram_is_that_of_transformers_from_50_hz() -> None:
    wave = prepare(noise(1, 30_000, scale=0.1))
    extract = ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc")
    want = extract(wave[0].numpy().astype(np.float64), sampling_rate=48_000, return_tensors="np")["input_features"][0]
    assert log_mel(wave).shape == (1, 1001, 64)
    assert np.abs(log_mel(wave)[0].numpy() - want[0]).max() < 2e-3
    default = ClapFeatureExtractor(truncation="rand_trunc")
    other = default(wave[0].numpy().astype(np.float64), sampling_rate=48_000, return_tensors="np")["input_features"][0]
    assert np.abs(log_mel(wave)[0].numpy() - other[0]).max() > 1


def test_text_layer_norms_have_the_epsilon_of_roberta(clap: CLAP) -> None:
    norms = [m.eps for m in clap.model.text_model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 5
    assert set(norms) == {1e-5}


def test_embeddings_are_unit_vectors(clap: CLAP) -> None:
    for out in (clap.text(["a dog", "bells ring"]), clap.audio(noise(2, 8000, scale=0.1), 16_000)):
        assert out.shape == (2, 12)
        torch.testing.assert_close(out.norm(dim=-1), torch.ones(2))
        assert out[0] @ out[1] < 0.9999


def test_padding_and_batch_mates_do_not_change_a_text(clap: CLAP) -> None:
    texts = ["bells", "a dog barks twice while rain falls on tin roofs and bells ring", ""]
    together = clap.text(texts)
    for row, text in enumerate(texts):
        torch.testing.assert_close(clap.text([text])[0], together[row], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clap.unconditional(3), together[2:].expand(3, -1), rtol=1e-4, atol=1e-5)


def test_long_texts_are_cut(clap: CLAP) -> None:
    ids, mask = clap.tokenizer(["dog " * 50])
    assert ids.shape == mask.shape == (1, 16)
    assert ids[0, -1] == 2


def test_the_same_sound_has_the_same_embedding(clap: CLAP) -> None:
    """No random crop and no random drop: 200 rows are 200 times the same."""
    wave = noise(1, 11 * 16_000, scale=0.1)
    first = clap.audio(wave, 16_000)
    assert torch.equal(first, clap.audio(wave, 16_000))
    torch.testing.assert_close(clap.audio(wave[:, : 10 * 16_000], 16_000), first, rtol=0, atol=2e-3)
    rows = clap.text(["a dog"] * 200)
    torch.testing.assert_close(rows, rows[:1].expand(200, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0, 47_999])
def test_strange_sample_rates(clap: CLAP, rate: int) -> None:
    with pytest.raises(AudioError, match=f"48000 Hz, seen {rate}"):
        clap.audio(noise(1, 100), rate)


def test_damaged_and_empty_sounds(clap: CLAP) -> None:
    with pytest.raises(AudioError, match="NaN"):
        clap.audio(torch.full((1, 5000), torch.nan), 48_000)
    with pytest.raises(AudioError, match="without samples"):
        clap.audio(torch.zeros(1, 0), 48_000)


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="put its files into a folder"):
        Tokenizer(str(tmp_path / "none"), 4)(["a"])


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'semanticodec\[generation\]'"):
        CLAP(SMALL)
