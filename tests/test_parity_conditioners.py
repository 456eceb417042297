"""The conditioners against recorded outputs of the published ones, with synthetic weights (spec 2.8 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from golden import Goldens, check, places
from torch import Tensor, nn

from semanticodec.conditioners.audiomae import pool, window
from semanticodec.conditioners.clap import CLAP, log_mel, prepare
from semanticodec.conditioners.config import CLAP_BASE, CLAP_TINY, PhonemeConfig, SequenceConfig, T5Config
from semanticodec.conditioners.keys import (
    audiomae_rules,
    clap_rules,
    fill,
    phoneme_rules,
    select,
    sequence_rules,
    t5_rules,
)
from semanticodec.conditioners.sequence import Context, SequenceGenerator
from semanticodec.conditioners.text import T5
from semanticodec.config import AudioMAEConfig
from semanticodec.errors import CheckpointError
from semanticodec.keymap import Rule
from semanticodec.nn.audiomae import AudioMAE
from semanticodec.nn.phonemes import PhonemeEncoder

pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("inference")]

SEQUENCES = {"seqgen_audioldm2": SequenceConfig(), "seqgen_audioldm2_speech": SequenceConfig((512, 192), 512)}
PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[Rule, ...]]] = {
    "clap_tiny": (lambda: CLAP(CLAP_TINY), clap_rules()),
    "clap_base": (lambda: CLAP(CLAP_BASE), clap_rules()),
    "t5_encoder": (lambda: T5(T5Config()), t5_rules()),
    "phoneme_encoder": (lambda: PhonemeEncoder(**asdict(PhonemeConfig())), phoneme_rules()),
    "audiomae": (lambda: AudioMAE(AudioMAEConfig()), audiomae_rules()),
    **{
        name: (lambda config=config: SequenceGenerator(config), sequence_rules("cond_stage_models.0."))
        for name, config in SEQUENCES.items()
    },
}


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def golden(family: Path) -> Goldens:
    return Goldens(family)


def build(golden: Goldens, name: str, zeros: str = "none") -> nn.Module:
    """Build a published component; tensors whose names begin with ``zeros`` are not worth their time."""
    make, rules = PARTS[name]
    with torch.device("meta"):
        module = make()
    tensors = {
        entry["key"]: torch.zeros(entry["shape"])
        if entry["key"].startswith(zeros)
        else torch.from_numpy(np.asarray(golden.synth.fill(entry)))
        for entry in golden.entries(name)
    }
    fill(module, tensors, rules)
    return module


def deviation(seen: Tensor, recorded: np.ndarray) -> float:
    """Return the largest deviation from a whole recorded array, relative to its standard deviation."""
    return float(np.abs(seen.numpy() - recorded).max() / recorded.std())


# --- every tensor of every file has a place or a reason


@pytest.mark.parametrize("name", PARTS)
def test_every_tensor_has_a_place(golden: Goldens, request: pytest.FixtureRequest, name: str) -> None:
    make, rules = PARTS[name]
    with torch.device("meta"):
        module = make()
    tensors = {
        entry["key"]: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for entry in golden.entries(name)
    }
    found = select(module, tensors, rules)
    assert found.keys() == module.state_dict().keys()
    request.node.user_properties.append(
        ("coverage", (f"conditioners: {name}", len(tensors), places(rules, tensors), 0, 0))
    )
    with pytest.raises(CheckpointError, match=r"without a place in the model: odd\..*not fill: none\..*shapes: none\."):
        select(module, tensors | {"odd": torch.empty(1, device="meta")}, rules)


def test_what_does_not_fit_is_named(golden: Goldens) -> None:
    make, rules = PARTS["phoneme_encoder"]
    with torch.device("meta"):
        module = make()
    tensors = {e["key"]: torch.empty(e["shape"], device="meta") for e in golden.entries("phoneme_encoder")}
    lost = tensors.pop("text_encoder.emb.weight")
    with pytest.raises(CheckpointError, match=r"PhonemeEncoder.*not fill: embed\.weight\."):
        select(module, tensors, rules)
    with pytest.raises(CheckpointError, match=r"shapes: embed\.weight"):
        select(module, tensors | {"text_encoder.emb.weight": lost[1:]}, rules)


# --- CLAP


def sounds(golden: Goldens) -> dict[str, Tensor]:
    wave = torch.from_numpy(golden.synth.signal48("full", 10.24) / np.float32(32768))[None]
    return {"exact_10s": wave[:, :480_000], "short_3.3s": wave[:, :158_400], "long_10.24s": wave}


def check_sounds(golden: Goldens, request: pytest.FixtureRequest, clap: CLAP, name: str) -> None:
    """Both published preparations of three lengths; the random crop is told where it was drawn."""
    recorded = golden.arrays(name)
    errors = {}
    for case, wave in sounds(golden).items():
        start = int(recorded.get(f"audio_v1.{case}.crop_start", 0))
        v1, v2 = prepare(wave, start=start), prepare(wave, repeat=False)
        errors[f"v1.{case}.logmel"] = golden.error(recorded, f"audio_v1.{case}.logmel", log_mel(v1)[:, None])
        errors[f"v1.{case}"] = deviation(clap.prepared(v1), recorded[f"audio_v1.{case}.embedding"])
        errors[f"v2.{case}"] = deviation(clap.prepared(v2), recorded[f"audio_v2.{case}.embedding"])
    check(request, errors, part=("audioldm, musicldm", name))


@pytest.fixture(scope="module")
def deaf_to_text(golden: Goldens) -> CLAP:
    clap = build(golden, "clap_tiny", zeros="text_branch")
    assert isinstance(clap, CLAP)
    return clap


def test_clap_tiny_hears(golden: Goldens, request: pytest.FixtureRequest, deaf_to_text: CLAP) -> None:
    clap = deaf_to_text
    check_sounds(golden, request, clap, "clap_tiny")
    recorded = golden.arrays("clap_tiny")
    narrow = torch.from_numpy(golden.synth.signal16("C") / np.float32(32768))[None]
    start = int(recorded["audio_v1.conditioner_16k_C.crop_start"])
    wide = torchaudio.functional.resample(narrow, 16_000, 48_000)
    published = torch.from_numpy(recorded["audio_v1.conditioner_16k_C.embedding"])[0]
    heard = clap.prepared(prepare(wide, start=start))
    check(
        request, {"conditioner_16k_C": deviation(heard, published.numpy())}, part=("audioldm", "clap_tiny, from 16 kHz")
    )
    torch.testing.assert_close(clap.audio(narrow, 16_000), clap.prepared(prepare(wide)), rtol=0, atol=1e-5)


def test_the_lowest_frequency_matters(golden: Goldens, monkeypatch: pytest.MonkeyPatch, deaf_to_text: CLAP) -> None:
    """A spectrogram from 0 Hz, as transformers' feature extractor has by default, is heard as another sound."""
    clap = deaf_to_text
    wave = prepare(sounds(golden)["exact_10s"])
    right = clap.prepared(wave)
    monkeypatch.setattr("semanticodec.conditioners.clap.LOWEST", 0.0)
    assert 0.9 < float((clap.prepared(wave) * right).sum()) < 0.995


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clap_tiny", "clap_base"])
def test_clap_whole(golden: Goldens, request: pytest.FixtureRequest, name: str) -> None:
    clap = build(golden, name)
    assert isinstance(clap, CLAP)
    recorded = golden.arrays(name)
    ids, mask = map(torch.from_numpy, golden.synth.clap_text_ids())
    texts = clap.tokens(ids, mask)
    errors = {
        "text.embedding": deviation(texts, recorded["text.embedding"]),
        "text.trimmed": deviation(clap.tokens(ids[:, :77], mask[:, :77]), recorded["text.embedding"]),
        "uncond_embedding": deviation(texts[2], recorded["uncond_embedding"][0, 0]),
    }
    check(request, errors, part=("audioldm, audioldm2", f"{name}, texts"))
    check_sounds(golden, request, clap, name)
    cosine = texts @ clap.prepared(sounds(golden)["exact_10s"])[0]
    assert np.abs(cosine.numpy() - recorded["cosine.text_rows_vs_audio_exact"]).max() < 1e-5


# --- the sequence generator and its conditions


def film(golden: Goldens, batch: int) -> Context:
    return torch.from_numpy(golden.synth.film(batch)), torch.ones(batch, 1)


def check_sequence(
    golden: Goldens,
    request: pytest.FixtureRequest,
    generator: SequenceGenerator,
    conditions: Sequence[Context],
    name: str,
    count: int | None = None,
) -> None:
    recorded = golden.arrays("seqgen")
    vectors, mask = generator.embed(conditions, generator.config.count)
    assert vectors.shape[1] == recorded[f"{name}.cond_length"]
    assert np.array_equal(mask.numpy(), recorded[f"{name}.input_mask"])
    written = generator.generate(conditions, count)
    errors = {
        f"{name}.input_embeds": golden.error(recorded, f"{name}.input_embeds", vectors),
        f"{name}.gpt2_first_pass": golden.error(recorded, f"{name}.gpt2_first_pass", generator(vectors, mask)),
        f"{name}.generated": golden.error(recorded, f"{name}.generated", written),
    }
    check(request, errors, part=("audioldm2", f"sequence generator, {name}"))


def test_sequences(golden: Goldens, request: pytest.FixtureRequest) -> None:
    generator = build(golden, "seqgen_audioldm2")
    assert isinstance(generator, SequenceGenerator)
    states = golden.normal("t5:seq", (2, 14, 1024)), torch.from_numpy(golden.synth.mask_rows([9, 14], 14))
    check_sequence(golden, request, generator, [film(golden, 2), states], "text")
    nothing = golden.normal("ctx1024:uncond", (1, 1, 1024)), torch.ones(1, 1)
    check_sequence(golden, request, generator, [film(golden, 1), nothing], "uncond_like")


@pytest.mark.slow
def test_truncated_sequence(golden: Goldens, request: pytest.FixtureRequest) -> None:
    generator = build(golden, "seqgen_audioldm2")
    assert isinstance(generator, SequenceGenerator)
    states = golden.normal("t5:long", (1, 1100, 1024)), torch.ones(1, 1100)
    check_sequence(golden, request, generator, [film(golden, 1), states], "truncated")


@pytest.fixture(scope="module")
def phonemes(golden: Goldens) -> PhonemeEncoder:
    encoder = build(golden, "phoneme_encoder")
    assert isinstance(encoder, PhonemeEncoder)
    return encoder


def test_phonemes(golden: Goldens, request: pytest.FixtureRequest, phonemes: PhonemeEncoder) -> None:
    recorded = golden.arrays("seqgen")
    ids, mask = (torch.from_numpy(recorded[f"phoneme.{part}"].astype(np.int64)) for part in ("ids", "mask"))
    assert recorded["phoneme.uncond_mask_sum"] == 0
    nothing = phonemes(torch.zeros_like(ids[:1]), torch.zeros_like(mask[:1]))
    errors = {
        "phoneme.encoded": golden.error(recorded, "phoneme.encoded", phonemes(ids, mask)),
        "phoneme.uncond": golden.error(recorded, "phoneme.uncond", nothing),
    }
    check(request, errors, part=("audioldm2-speech", "phoneme encoder"))


@pytest.mark.slow
def test_spoken_sequence(golden: Goldens, request: pytest.FixtureRequest, phonemes: PhonemeEncoder) -> None:
    recorded = golden.arrays("seqgen")
    ids, mask = (torch.from_numpy(recorded[f"phoneme.{part}"].astype(np.int64)) for part in ("ids", "mask"))
    generator = build(golden, "seqgen_audioldm2_speech")
    assert isinstance(generator, SequenceGenerator)
    spoken = phonemes(ids, mask), mask.float()
    check_sequence(golden, request, generator, [film(golden, 2), spoken], "speech_first4_of_512", 4)


def test_audiomae(golden: Goldens, request: pytest.FixtureRequest) -> None:
    recorded = golden.arrays("audiomae")
    mae = build(golden, "audiomae", zeros="audiomae.model.decoder")
    signal = torch.from_numpy(golden.synth.signal16("A") / np.float32(32768))[None]
    inputs = {"signal_A": window(signal), "random": golden.normal("mae:input", (1, 1024, 128), -0.2, 0.6)}
    errors = {}
    for name, bank in inputs.items():
        features = mae(bank)
        for size, shape in (("8x8", (8, 8)), ("1x1", (1, 1)), ("2x4", (2, 4))):
            key = f"{name}.pooled_{size}"
            errors[key] = golden.error(recorded, key, pool(features, *shape))
    check(request, errors, part=("audioldm2", "audiomae, pooled"))
