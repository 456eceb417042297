"""Beat-synchronous mixup: tempo groups, crops that start on downbeats, and mixing as sound or as latents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import Goldens, check, check_equal
from tiny import config, fill, noise

from semanticodec.config import LatentConfig
from semanticodec.errors import AudioError, ConfigError
from semanticodec.latent import LatentDiffusion
from semanticodec.training.data import Clip, Corpus
from semanticodec.training.mixup import (
    BeatPairs,
    Beats,
    mix,
    mixed_latents,
    mixed_sound,
    read_beats,
    tempo,
    tempo_groups,
    track_beats,
)

RATE = 16_000


@pytest.fixture(scope="module")
def golden(family: Path) -> Goldens:
    return Goldens(family)


def click_track(bpm: float, seconds: float, first: float) -> tuple[torch.Tensor, Beats]:
    """Clicks in 4/4, the first of each bar twice as loud."""
    time = np.arange(round(seconds * RATE)) / RATE
    beats = np.arange(first, seconds - 0.05, 60 / bpm)
    wave = np.zeros_like(time)
    for index, beat in enumerate(beats):
        since = time - beat
        burst = (since >= 0) & (since < 0.03)
        loud, pitch = (0.8, 1500) if index % 4 == 0 else (0.4, 900)
        wave[burst] += loud * np.sin(2 * np.pi * pitch * since[burst]) * np.exp(-since[burst] / 0.008)
    return torch.from_numpy(wave).float(), Beats(tuple(beats), tuple(beats[::4]))


@pytest.fixture(scope="module")
def corpus() -> tuple[Corpus, dict[str, Beats]]:
    """Three tracks of one group, one alone in its own, one without beats, one that nobody annotated."""
    tempi = {"a": (120, 0.4), "b": (121, 0.7), "c": (122, 0.9), "alone": (90, 0.2), "none": (0, 0), "unknown": (120, 0)}
    waves, clips, beats, start = [], [], {}, 0
    for name, (bpm, first) in tempi.items():
        wave, found = click_track(bpm, 8, first) if bpm else (noise(8 * RATE, scale=0.1), Beats((), ()))
        if name != "unknown":
            beats[name] = found
        waves.append((wave.numpy() * 32767).astype(np.int16))
        clips.append(Clip(name, "music", start, len(wave)))
        start += len(wave)
    return Corpus(np.concatenate(waves), clips), beats


def test_tempo() -> None:
    assert tempo([]) == tempo([3.0]) == 0
    assert tempo([1.0, 1.5, 2.0]) == 120
    assert tempo_groups({"x": [0, 0.5], "y": [0, 0.4959], "z": [0, 0.49], "w": []}) == {40: ["x", "y", "z"], 0: ["w"]}


@pytest.mark.parametrize("wrong", [(1.0, 1.0), (0.0, 2.0, 1.5), (0.0, float("nan"), 1.0)], ids=str)
def test_beats_that_do_not_rise(corpus: tuple[Corpus, dict[str, Beats]], wrong: tuple[float, ...]) -> None:
    with pytest.raises(AudioError, match="must rise"):
        tempo(wrong)
    with pytest.raises(AudioError, match="must rise"):
        BeatPairs(corpus[0], {"a": Beats(wrong, (1.0,))}, RATE, 160, 1, seed=0)


@pytest.mark.parity
def test_tempo_groups_as_published(golden: Goldens, request: pytest.FixtureRequest) -> None:
    recorded = golden.arrays("musicldm")
    lengths = recorded["tempo.track_lengths"]
    tracks = np.split(recorded["tempo.beat_times"], np.cumsum(lengths)[:-1])
    groups = tempo_groups({str(i): track for i, track in enumerate(tracks)})
    seen = {int(name): group for group, names in groups.items() for name in names}
    ours = np.array([seen[i] for i in range(len(tracks))])
    check_equal(request, "groups", ours, recorded["tempo.group_of_track"], ("musicldm", "tempo groups"))


@pytest.mark.parametrize(("bpm", "first"), [(120, 0.5), (97, 1.1)])
def test_tracked_beats(bpm: int, first: float) -> None:
    wave, truth = click_track(bpm, 20, first)
    found = track_beats(wave, RATE)
    assert abs(tempo(found.beats) - bpm) <= 1
    near = [min(abs(t - d) for d in truth.downbeats) for t in found.downbeats]
    assert len(near) >= len(truth.downbeats) - 2
    assert max(near) < 0.06
    assert track_beats(torch.zeros(RATE), RATE) == Beats((), ())


def test_annotations(tmp_path: Path) -> None:
    file = tmp_path / "a.beats"
    file.write_text("0.5 4\n1.0\t1\n\n1.5 2.0\n2.0 1\n")
    assert read_beats(file) == Beats((0.5, 1.0, 1.5, 2.0), (1.0, 2.0))
    for text, line in (("0.5 1\n0.5 2\n", 2), ("0.5\n", 1), ("x 1\n", 1), ("nan 1\n", 1)):
        file.write_text(text)
        with pytest.raises(AudioError, match=f"line {line}"):
            read_beats(file)


def test_pairs_start_on_downbeats_of_one_group(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    whole, beats = corpus
    length = 2 * RATE
    pairs = BeatPairs(whole, beats, RATE, length, 200, seed=3)(0)
    assert pairs.first.shape == pairs.second.shape == (200, length)
    mixed = pairs.weight < 1
    assert 0.4 < mixed.float().mean() < 0.8, "three of five clips have partners"
    assert torch.equal(pairs.first[~mixed], pairs.second[~mixed])
    for crop in torch.cat([pairs.first[mixed], pairs.second[mixed]]):
        # A downbeat is loud at once: its click of 1500 Hz reaches its peak within a millisecond.
        assert crop[:24].abs().max() > 0.6
    assert not (pairs.first[mixed] == pairs.second[mixed]).all(1).any(), "partners are other recordings"


def test_weights_are_beta_five_five(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    whole, beats = corpus
    few = {name: beats[name] for name in "abc"}
    weight = torch.cat([BeatPairs(whole, few, RATE, 160, 500, seed=1)(step).weight for step in range(4)])
    assert abs(float(weight.mean()) - 0.5) < 0.015
    assert abs(float(weight.std()) - (1 / 44) ** 0.5) < 0.01
    assert abs(float((BeatPairs(whole, few, RATE, 160, 500, seed=1, alpha=50)(0).weight).std()) - 0.05) < 0.01


def test_choices_are_a_function_of_seed_step_and_rank(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    def draw(seed: int, step: int, rank: int) -> torch.Tensor:
        return torch.cat([x.flatten() for x in BeatPairs(*corpus, RATE, 400, 8, seed=seed)(step, rank)])

    first = draw(0, 0, 0)
    assert torch.equal(draw(0, 0, 0), first)
    for other in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert not torch.equal(draw(*other), first)


def test_share(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    whole, beats = corpus
    few = {name: beats[name] for name in "abc"}
    assert (BeatPairs(whole, few, RATE, 160, 50, seed=0, share=0.0)(0).weight == 1).all()
    some = (BeatPairs(whole, few, RATE, 160, 400, seed=0, share=0.3)(0).weight < 1).float().mean()
    assert 0.2 < some < 0.4


def test_crops_longer_than_what_follows_a_downbeat(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    whole, beats = corpus
    pairs = BeatPairs(whole, {"a": beats["a"]}, RATE, 9 * RATE, 2, seed=0)(0)
    start = round(0.4 * RATE)
    assert torch.equal(pairs.first[0, : 8 * RATE - start], whole.wave(whole.clips[0], start))
    assert not pairs.first[0, 8 * RATE - start :].any()


def test_clips_without_a_tempo_are_not_mixed(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    whole, beats = corpus
    struck_once = {name: Beats((t,), (t,)) for name, t in (("a", 0.4), ("b", 0.7))}
    pairs = BeatPairs(whole, struck_once | {"c": beats["c"]}, RATE, 160, 60, seed=0)(0)
    assert (pairs.weight == 1).all()
    assert torch.equal(pairs.first, pairs.second)


def test_no_beats_at_all(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    with pytest.raises(ConfigError, match="none of 6 clips has beats"):
        BeatPairs(corpus[0], {}, RATE, 160, 1, seed=0)


def test_mix(corpus: tuple[Corpus, dict[str, Beats]]) -> None:
    a, b = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    out = mix(a, b, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(out[0], 0.25 * a[0] + 0.75 * b[0])
    assert torch.equal(out[1], a[1])
    pairs = BeatPairs(*corpus, RATE, 400, 8, seed=0)(0)
    assert torch.equal(mixed_sound(pairs), mix(pairs.first, pairs.second, pairs.weight))


def test_mixed_latents_are_decoded_for_their_condition() -> None:
    latent = LatentDiffusion(dataclasses.replace(config("mini").decoder.latent), vae_encoder=True)
    fill(latent)
    latent.scale.fill_(0.7)
    mels = noise(2, 16, 64, seed=2), noise(2, 16, 64, seed=3)
    draws = noise(2, 8, 4, 16, seed=4), noise(2, 8, 4, 16, seed=5)
    weight = torch.tensor([0.4, 1.0])
    with torch.no_grad():
        z, sound = mixed_latents(latent, *mels, weight, draws)
        a, b = (latent.encode(mel).sample(n) for mel, n in zip(mels, draws, strict=True))
        torch.testing.assert_close(z[0], 0.4 * a[0] + 0.6 * b[0])
        torch.testing.assert_close(z[1], a[1])
        assert torch.equal(sound, latent.wave(latent.mel(z)))


@pytest.mark.slow
@pytest.mark.parity
def test_latent_mixup_as_published(golden: Goldens, request: pytest.FixtureRequest) -> None:
    recorded = golden.arrays("musicldm")
    with torch.device("meta"):
        latent = LatentDiffusion(dataclasses.replace(LatentConfig(), prediction="eps"), vae_encoder=True)
    state = {
        name.removeprefix("first_stage_model."): torch.from_numpy(golden.synth.fill(entry))
        for part in ("vae_16k", "vocoder_16k")
        for entry in golden.entries(part)
        for name in (entry["key"],)
    }
    vocoder = {k.removeprefix("vocoder."): v for k, v in state.items() if k.startswith("vocoder.")}
    latent.vae.load_state_dict({k: v for k, v in state.items() if not k.startswith("vocoder.")}, assign=True)
    latent.vocoder.load_state_dict(vocoder, assign=True)
    latent.scale = torch.tensor(0.8)
    plain, first, second = (golden.normal(f"mixup:{name}", (3, 256, 64), -3.0, 2.0) for name in ("mel", "mel1", "mel2"))
    selected = torch.from_numpy(recorded["latent_mixup.selected"])
    draw = golden.synth.NoiseStream("mixup:latent")
    one, two, whole = (torch.from_numpy(draw(shape)) for shape in ((2, 8, 64, 16), (2, 8, 64, 16), (3, 8, 64, 16)))
    weight = torch.from_numpy(recorded["latent_mixup.lambda"]).float()
    with torch.no_grad():
        z = latent.encode(plain).sample(whole)
        mixed, sound = mixed_latents(latent, first[selected], second[selected], weight, (one, two))
    z[selected] = mixed
    waves = golden.normal("mixup:wav", (3, 40_960), 0.0, 0.1)
    waves[selected] = sound
    waves[selected, 36_864:] = 0.0  # the published code keeps nine tenths
    check(
        request,
        {
            "latent_mixup.z": golden.error(recorded, "latent_mixup.z", z),
            "latent_mixup.cond_waveform": golden.error(recorded, "latent_mixup.cond_waveform", waves),
        },
        part=("musicldm", "latent mixup"),
    )
