"""The figures of generation, edits and control, on sounds whose answer is known and on small models."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generator_training import CONFIG
from tiny import codec as tiny_codec
from tiny import fill
from torch import Tensor

from benchmarks import control, edits, generation
from benchmarks.generation import Found, Piece, kind
from semanticodec import SemantiCodec, controls, inverse
from semanticodec.config import SAMPLE_RATE
from semanticodec.generation import Generator, GeneratorModel
from semanticodec.nn.controlnet import ControlNet
from semanticodec.nn.vae import AutoencoderKL
from semanticodec.training.generator_stages import control_config

LABELS = ("dog", "rain")


def tone(seed: int) -> Tensor:
    time = torch.arange(round(generation.SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    return 0.3 * torch.sin(2 * torch.pi * (900 + 20 * seed) * time) * (1.2 + torch.sin(3 * time + seed))


def hiss(seed: int) -> Tensor:
    return 0.1 * torch.randn(round(generation.SECONDS * SAMPLE_RATE), generator=torch.Generator().manual_seed(seed))


def known(*_: Any, **__: Any) -> list[Piece]:
    dogs = [Piece("dog", f"dog {seed}", tone(seed)) for seed in range(6)]
    return [
        piece for dog, seed in zip(dogs, range(6), strict=True) for piece in (dog, Piece("rain", f"{seed}", hiss(seed)))
    ]


@pytest.fixture
def generator() -> Generator:
    model = GeneratorModel(replace(CONFIG, labels=LABELS))
    fill(model)
    model.requires_grad_(False).eval()
    return Generator("tiny-gen", model.latent, model.prompts, window=64, overlap=16)


def test_the_probe_tells_tones_from_noise() -> None:
    found: Found = defaultdict(list)
    listener = generation.Listener(tiny_codec("mini"), known(), found)
    assert found["recordings: label"] == [1.0] * 12
    assert listener.labels == ["dog", "rain"]
    assert listener([tone(20), hiss(20)]) == ["dog", "rain"]


def test_kinds_and_scores() -> None:
    assert [kind(label) for label in ("speech-de", "music-epic", "beat", "dog")] == [
        "speech",
        "music",
        "music",
        "sound",
    ]
    found: Found = defaultdict(list)
    generation.scored(found, "x", ["dog", "beat"], ["rain", "beat"])
    assert found == {"x: label": [0.0, 1.0], "x: kind": [1.0, 1.0]}


def test_loudness_is_compared_by_shape_and_by_level() -> None:
    wave = hiss(0) * torch.linspace(0.1, 1, len(hiss(0)))
    correlation, distance = control.scored(wave, 0.5 * wave)
    assert correlation > 0.99
    assert distance == pytest.approx(6.02, abs=0.1)
    assert control.scored(wave, wave.flip(0))[0] < 0


def test_the_generation_command_prints_writes_and_draws(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generation, "pieces", known)
    monkeypatch.setattr(generation, "TARGETS", LABELS)
    monkeypatch.setattr(generation, "PICTURED", LABELS * 3)
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: generator)
    monkeypatch.setattr(SemantiCodec, "from_pretrained", lambda *_, **__: tiny_codec("mini"))
    out = tmp_path / "figures.json"
    generation.main(["--train", "nowhere", "--count", "1", "--edits", "2", "--threads", "2", "--out", str(out)])
    assert "generated: label" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert result["chance"] == 0.5
    assert result["outcome"]["recordings: label"]["mean"] == 1.0
    assert result["outcome"]["gap: changed outside"]["mean"] == 0.0
    assert set(result["labels"]) == set(LABELS)
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_the_control_command_prints_writes_and_draws(
    generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = ControlNet(control_config(CONFIG))
    fill(network)
    controls.save(tmp_path, network)
    monkeypatch.setattr(control, "pieces", known)
    monkeypatch.setattr(control, "SCALES", (None, 0.0, 1.0))
    monkeypatch.setattr(Generator, "from_pretrained", lambda *_, **__: generator)
    out = tmp_path / "figures.json"
    control.main(["--model", str(tmp_path), "--train", "nowhere", "--clips", "2", "--threads", "2", "--out", str(out)])
    assert "scale 1.0: correlation" in capsys.readouterr().out
    outcome = json.loads(out.read_text())["outcome"]
    assert outcome["scale 0.0: largest difference to no control"]["mean"] == 0.0
    assert outcome["scale 0.0: correlation"] == outcome["no control: correlation"]
    assert outcome["scale 1.0: distance, dB"] != outcome["no control: distance, dB"]
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_edits_of_codes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small = tiny_codec("mini")
    assert small.model.latent is not None
    whole = AutoencoderKL(small.config.decoder.latent.vae)
    fill(whole)
    monkeypatch.setattr(small.model.latent.vae, "encoder", whole.encoder)
    monkeypatch.setattr(small.model.latent.vae, "quant_conv", whole.quant_conv)
    monkeypatch.setattr(inverse, "attach", None)
    found: edits.Found = defaultdict(list)
    wave = torch.cat([hiss(0), tone(0)])[: edits.SECONDS * SAMPLE_RATE]
    edits.measure(small, wave, found)
    assert found["gap: changed outside"] == [0.0, 0.0]
    assert len(found) == 7
    assert all(value > 0 for name, values in found.items() for value in values if "outside" not in name)
