"""One training step of every system on tiny networks: its published condition and objective, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from prompting import conditioner
from test_mixup import click_track
from tiny import codec, config, fill, noise
from torch import Tensor

from semanticodec.audio import log_mel
from semanticodec.bandlimit import lowpass
from semanticodec.conditioners.audiomae import context
from semanticodec.conditioners.prompts import PromptConditioner, Prompts
from semanticodec.config import AudioMAEConfig, LatentConfig, VAEConfig
from semanticodec.errors import ConfigError
from semanticodec.latent import LatentDiffusion
from semanticodec.nn.audiomae import AudioMAE
from semanticodec.superres import UNKNOWN
from semanticodec.systems import SYSTEMS
from semanticodec.training.data import Clip, Corpus
from semanticodec.training.diffusion import Batch, DiffusionStage
from semanticodec.training.family import coded, described, heard, levelled, mixed, restored
from semanticodec.training.loop import RunOptions
from semanticodec.training.mixup import BeatPairs, Pairs, mix

SAMPLES = 128 * 160
TEXTS = ("a dog barks twice", "rain falls on tin roofs", "bells ring")


def small(name: str, film: int | None = None, contexts: tuple[int | None, ...] = (None,)) -> LatentConfig:
    """Return a system's configuration with small networks."""
    row = SYSTEMS[name].latent
    unet = replace(
        row.unet, base=16, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4,
        film_dim=film, contexts=contexts,
    )  # fmt: skip
    tiny = config("official").decoder.latent
    return replace(row, unet=unet, vae=tiny.vae, vocoder=tiny.vocoder, steps=2)


def core(latent: LatentConfig) -> LatentDiffusion:
    """Return the core with a random autoencoder, whose latents have a spread of about 1."""
    torch.manual_seed(0)
    made = LatentDiffusion(latent, vae_encoder=True)
    fill(made.vae)
    fill(made.vocoder)
    with torch.no_grad():
        mean, _ = made.vae.encode(log_mel(sounds(latent.mel.sample_rate), latent.mel)[:, None])
    made.scale.fill_(1 / float(mean.std()))
    return made


def sounds(rate: int = 16_000) -> Tensor:
    """Three sounds that are told apart easily: tones over some noise."""
    samples = 64 * 480 if rate == 48_000 else SAMPLES
    time = torch.arange(samples) / rate
    tones = [
        torch.sin(2 * torch.pi * f * time) * (1 + torch.sin(2 * torch.pi * r * time))
        for f, r in ((300, 2), (900, 5), (2500, 9))
    ]
    return 0.2 * torch.stack(tones) + 0.01 * noise(3, samples)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learns(latent: LatentDiffusion, batch: Batch, folder: Path, steps: int = 40) -> float:
    """Return which share of the loss is left after learning from one batch; then the average lags behind."""
    options = RunOptions(folder, steps=steps, minutes=60, batch=len(batch.latents), learning_rate=5e-3)
    stage = DiffusionStage(latent, latent.unet, lambda *_: batch, lambda _: batch, options)
    fabric = Fabric(accelerator="cpu", devices=1)
    stage.setup(fabric)
    before = float(stage.evaluate()["loss"])
    first = {name: value.clone() for name, value in stage.average.state_dict().items()}
    for index in range(steps):
        stage.step(fabric, index, 0.0)
    moved = {name for name, value in stage.average.state_dict().items() if not torch.equal(value, first[name])}
    assert moved == {name for name, value in latent.unet.state_dict().items() if not torch.equal(value, first[name])}
    return float(stage.evaluate()["loss"]) / before


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def clap(tokenizers: Path) -> PromptConditioner:
    """Return conditioners whose one condition is CLAP's vector."""
    return conditioner("film", tokenizers)


def test_levels_are_the_published_ones() -> None:
    wave = levelled(noise(2, 1000) * torch.tensor([[0.01], [3.0]]) + 0.2)
    torch.testing.assert_close(wave.mean(1), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(wave.abs().amax(1), torch.full((2,), 0.5))
    assert not levelled(torch.zeros(1, 10)).any()


def test_audioldm_hears_the_sound_itself(clap: PromptConditioner, tmp_path: Path) -> None:
    latent = core(small("audioldm-s-full", film=12))
    batch = heard(latent, clap, 0.1 * sounds(), seeded())
    with torch.no_grad():
        posterior = latent.encode(log_mel(levelled(sounds())))
        drawn = torch.randn(posterior.mean.shape, generator=seeded())
        torch.testing.assert_close(batch.latents, posterior.sample(drawn), rtol=1e-4, atol=1e-4)
        assert batch.conditioning.film is not None
        torch.testing.assert_close(batch.conditioning.film, clap.clap.audio(levelled(sounds()), 16_000))
        assert batch.unconditional.film is not None
        torch.testing.assert_close(batch.unconditional.film, clap.clap.text([""] * 3))
    assert latent.config.prediction == "eps"
    assert learns(latent, batch, tmp_path) < 0.75


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """Crops of three click tracks of one tempo group, drawn as MusicLDM draws them; the last one not mixed."""
    tracks = [click_track(bpm, 4, first) for bpm, first in ((120, 0.4), (121, 0.7), (122, 0.2))]
    clips = [Clip(str(i), "music", 64_000 * i, 64_000) for i in range(3)]
    samples = np.concatenate([(wave.numpy() * 32767).astype(np.int16) for wave, _ in tracks])
    beats = {str(i): beats for i, (_, beats) in enumerate(tracks)}
    drawn = BeatPairs(Corpus(samples, clips), beats, 16_000, SAMPLES, 3, seed=0)(0)
    return drawn._replace(weight=torch.tensor([*drawn.weight[:2], 1.0]))


def test_musicldm_mixes_sounds(clap: PromptConditioner, pairs: Pairs, tmp_path: Path) -> None:
    latent = core(small("musicldm", film=12))
    batch = mixed(latent, clap, pairs, seeded(), "sound")
    first, second = levelled(pairs.first), levelled(pairs.second)
    same = heard(latent, clap, mix(first, second, pairs.weight), seeded())
    assert torch.equal(batch.latents, same.latents)
    assert batch.conditioning.film is not None
    assert same.conditioning.film is not None
    assert torch.equal(batch.conditioning.film, same.conditioning.film)
    assert learns(latent, batch, tmp_path) < 0.75


def test_musicldm_mixes_latents(clap: PromptConditioner, pairs: Pairs, tmp_path: Path) -> None:
    latent = core(small("musicldm", film=12))
    batch = mixed(latent, clap, pairs, seeded(), "latent")
    first, second = levelled(pairs.first), levelled(pairs.second)
    with torch.no_grad():
        one, two = (latent.encode(log_mel(wave)) for wave in (first, second))
        drawn = torch.randn((2, *one.mean.shape), generator=seeded())
        z = mix(one.sample(drawn[0]), two.sample(drawn[1]), pairs.weight)
        torch.testing.assert_close(batch.latents, z, rtol=1e-4, atol=1e-4)
        told, film = clap.clap.audio(latent.wave(latent.mel(z)), 16_000), batch.conditioning.film
        assert film is not None
        torch.testing.assert_close(film[:2], told[:2], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(film[2:], clap.clap.audio(first[2:], 16_000), rtol=1e-4, atol=1e-4)
        assert (film[2] - told[2]).abs().max() > 1e-3
    assert learns(latent, batch, tmp_path) < 0.75


@pytest.fixture(scope="module")
def mae() -> AudioMAE:
    module = AudioMAE(AudioMAEConfig(columns=8, dim=16, depth=3, heads=2, pooled_blocks=2))
    fill(module)
    return module.requires_grad_(False).eval()


def test_audioldm2_reads_the_sequence_and_the_text(tokenizers: Path, mae: AudioMAE, tmp_path: Path) -> None:
    """Its sequence is now the generated one, now the truth in pieces of drawn sizes."""
    latent = core(small("audioldm2-full", contexts=(None, 16, 16)))
    prompts = conditioner("sequence", tokenizers)
    wave, asked = sounds(), Prompts(TEXTS)
    written = prompts(asked).contexts
    lengths = set()
    for seed in range(12):
        batch = described(latent, prompts, asked, wave, seeded(seed), mae)
        (sequence, mask), text = batch.conditioning.contexts
        assert mask is not None
        assert mask.shape == sequence.shape[:2]
        assert mask.all()
        torch.testing.assert_close(text[0], written[1][0])
        if sequence.shape == written[0][0].shape and torch.allclose(sequence, written[0][0], atol=1e-5):
            lengths.add("generated")
            continue
        lengths.add(str(sequence.shape[1]))
        sizes = [(t, f) for t in (1, 2, 4, 8) for f in (1, 2, 4, 8) if 64 // (t * f) == sequence.shape[1]]
        truths = [context(mae, levelled(wave), *size)[0] for size in sizes]
        assert any(torch.allclose(sequence, truth, atol=1e-5) for truth in truths)
    assert "generated" in lengths
    assert len(lengths) > 3
    assert [value.abs().max() > 0 for value, _ in batch.unconditional.contexts] == [False, True]
    generated = described(latent, prompts, asked, wave, seeded())
    assert torch.equal(generated.conditioning.contexts[0][0], written[0][0])
    assert learns(latent, batch, tmp_path) < 0.75


def test_a_speech_model_reads_every_patch(
    tokenizers: Path, mae: AudioMAE, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    latent, prompts = core(small("audioldm2-speech-ljspeech", contexts=(None, 16))), conditioner("speech", tokenizers)
    assert prompts.phonemes is not None
    spoken = noise(3, 4, 16), torch.ones(3, 4)
    monkeypatch.setattr(prompts.phonemes, "text", lambda _: spoken)
    batches = [described(latent, prompts, Prompts(TEXTS), sounds(), seeded(seed), mae) for seed in range(6)]
    by_length = {batch.conditioning.contexts[0][0].shape[1]: batch for batch in batches}
    assert by_length.keys() == {3, 64}
    assert (latent.config.prediction, latent.config.unet.film_dim) == ("eps", None)
    assert learns(latent, by_length[64], tmp_path) < 0.75


def test_audioldm_48k_reads_claps_vector_of_the_text(clap: PromptConditioner, tmp_path: Path) -> None:
    row = small("audioldm_48k", film=12, contexts=(None, None))
    vae = VAEConfig(base=4, mults=(1, 2, 2, 2), res_blocks=1, latent_channels=16, groups=2)
    latent = core(replace(row, vae=vae, mel=replace(row.mel, bins=64)))
    batch = described(latent, clap, Prompts(TEXTS), sounds(48_000), seeded())
    assert batch.conditioning.film is not None
    assert torch.equal(batch.conditioning.film, clap.clap.text(TEXTS))
    assert not batch.conditioning.contexts
    assert batch.unconditional.film is not None
    torch.testing.assert_close(batch.unconditional.film, clap.clap.text([""] * 3))
    assert batch.latents.shape == (3, 16, 8, 8)
    assert latent.config.prediction == "eps"
    assert learns(latent, batch, tmp_path) < 0.75


def test_audioldm_crossattn_reads_the_text(tokenizers: Path, tmp_path: Path) -> None:
    latent = core(small("audioldm_16k_crossattn_t5", contexts=(None, 16)))
    prompts = conditioner("t5", tokenizers)
    assert prompts.t5 is not None
    batch = described(latent, prompts, Prompts(TEXTS), sounds(), seeded())
    ((told, mask),), (states, seen) = batch.conditioning.contexts, prompts.t5.text(TEXTS)
    assert torch.equal(told, states)
    assert mask is not None
    assert torch.equal(mask, seen)
    assert batch.conditioning.film is None
    torch.testing.assert_close(batch.unconditional.contexts[0][0][0, :1], prompts.t5.text([""])[0][0])
    assert learns(latent, batch, tmp_path) < 0.75


def test_what_does_not_fit_is_said(tokenizers: Path, clap: PromptConditioner, mae: AudioMAE) -> None:
    latent = core(small("audioldm-s-full", film=12))
    with pytest.raises(ConfigError, match="seen 2 descriptions of 3 sounds"):
        described(latent, clap, Prompts(TEXTS[:2]), sounds(), seeded())
    with pytest.raises(ConfigError, match="reads no AudioMAE features"):
        described(latent, clap, Prompts(TEXTS), sounds(), seeded(), mae)
    with pytest.raises(ConfigError, match="only systems whose one condition is CLAP's vector"):
        heard(latent, conditioner("t5", tokenizers), sounds(), seeded())


def test_audiosr_hears_the_low_band(tmp_path: Path) -> None:
    row = small("audiosr-basic", contexts=(None, None))
    vae = VAEConfig(base=4, mults=(1, 2, 2, 2), res_blocks=1, latent_channels=16, groups=2)
    latent = core(replace(row, vae=vae, mel=replace(row.mel, bins=64)))
    wave = sounds(48_000)
    low = lowpass(wave, 48_000, 2000.0)
    batch = restored(latent, wave, low, seeded())
    with torch.no_grad():
        both = [latent.encode(log_mel(x, latent.config.mel)) for x in (wave, low)]
        generator = seeded()
        drawn = [torch.randn(each.mean.shape, generator=generator) for each in both]
    torch.testing.assert_close(batch.latents, both[0].sample(drawn[0]))
    assert batch.conditioning.concat is not None
    torch.testing.assert_close(batch.conditioning.concat, both[1].sample(drawn[1]))
    assert batch.unconditional.concat is not None
    assert batch.unconditional.concat.unique().tolist() == pytest.approx([UNKNOWN * float(latent.scale)], rel=1e-6)
    assert (latent.config.prediction, latent.config.schedule.kind) == ("v", "cosine")
    assert learns(latent, batch, tmp_path) < 0.75


def test_semanticodec_reads_its_codes(tmp_path: Path) -> None:
    model = codec("official")
    torch.manual_seed(0)
    own = config("official").decoder.latent
    latent = core(replace(own, unet=replace(own.unet, base=16)))
    batch = coded(latent, model, sounds(), seeded())
    embedded = model.embed(model.encode(sounds(), 16_000))
    (told, _), (untold, _) = batch.conditioning.contexts[0], batch.unconditional.contexts[0]
    positions = told[..., embedded.shape[2] :]
    torch.testing.assert_close(told[..., : embedded.shape[2]], embedded)
    assert torch.equal(untold[..., embedded.shape[2] :], positions)
    assert not untold[..., : embedded.shape[2]].any()
    assert (latent.config.prediction, latent.config.schedule.kind) == ("v", "linear")
    assert learns(latent, batch, tmp_path) < 0.75
