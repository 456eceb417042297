"""The published systems: the facts of the spec's tables, and that every tensor of their files has a place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from golden import Goldens, places

from semanticodec.config import LatentConfig
from semanticodec.errors import ConfigError
from semanticodec.family import SystemModel, average, system_rules
from semanticodec.keymap import apply_rules, dotted_averages
from semanticodec.systems import SYSTEMS, SystemConfig, system
from semanticodec.values import from_json, to_json

# in/out channels, base, head width, contexts, depth, film, parameters in millions, published steps, guidance (spec 2.1)
TABLE = {
    "audioldm-s-full": (8, 8, 128, 32, (None,), 1, 512, 185.04, 200, 2.5),
    "audioldm-s-full-v2": (8, 8, 128, 32, (None,), 1, 512, 185.04, 200, 2.5),
    "audioldm-m-full": (8, 8, 192, 32, (None,), 1, 512, 415.95, 200, 2.5),
    "audioldm-l-full": (8, 8, 256, 64, (None,), 1, 512, 739.14, 200, 2.5),
    "audioldm-m-text-ft": (8, 8, 192, 32, (None,), 1, 512, 415.95, 200, 2.5),
    "audioldm-s-text-ft": (8, 8, 128, 32, (None,), 1, 512, 185.04, 200, 2.5),
    "audioldm2-full": (8, 8, 128, 32, (None, 768, 1024), 1, None, 346.94, 200, 3.5),
    "audioldm2-music-665k": (8, 8, 128, 32, (None, 768, 1024), 1, None, 346.94, 200, 3.5),
    "audioldm2-full-large-1150k": (8, 8, 128, 32, (None, 768, 1024, None), 2, None, 718.01, 200, 3.5),
    "audioldm2-speech-gigaspeech": (8, 8, 128, 32, (None, 768), 1, None, 261.93, 200, 3.5),
    "audioldm2-speech-ljspeech": (8, 8, 128, 32, (None, 768), 1, None, 261.93, 200, 3.5),
    "audioldm_48k": (16, 16, 128, 32, (None, None), 1, 512, 262.70, 200, 3.5),
    "audioldm_16k_crossattn_t5": (8, 8, 128, 32, (None, 1024), 1, None, 265.53, 200, 3.5),
    "musicldm": (8, 8, 128, 32, (None,), 1, 512, 185.04, 200, 2.0),
    "audiosr-basic": (32, 16, 128, 32, (None, None), 1, None, 258.20, 50, 3.5),
    "audiosr-speech": (32, 16, 128, 32, (None, None), 1, None, 258.20, 50, 3.5),
}
RECORDED = {
    "audioldm-s-full-v2": "audioldm-s-full",
    "audioldm-s-text-ft": "audioldm-s-full",
    "audioldm-m-text-ft": "audioldm-m-full",
    "audioldm2-music-665k": "audioldm2-full",
    "audioldm2-speech-ljspeech": "audioldm2-speech-gigaspeech",
    "audiosr-basic": "audiosr_basic",
    "audiosr-speech": "audiosr_basic",
}
"""Systems whose file has the names and shapes of another's."""
SMALL = {"audioldm-s-full", "audioldm2-full", "audioldm_48k", "audiosr-basic", "musicldm"}
"""Of each kind of file one is looked at in every run."""


def systems() -> list[object]:
    return [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in SYSTEMS]


def test_every_published_preset_has_its_row() -> None:
    assert set(SYSTEMS) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_rows_are_those_of_the_tables(name: str) -> None:
    row = SYSTEMS[name]
    latent, unet = row.latent, row.latent.unet
    facts = (unet.in_channels, unet.out_channels, unet.base, unet.head_dim, unet.contexts, unet.depth, unet.film_dim)
    assert facts == TABLE[name][:7]
    assert (row.published_steps, latent.guidance) == TABLE[name][8:]
    assert (unet.mults, unet.res_blocks, unet.attention_levels, unet.heads) == ((1, 2, 3, 5), 2, (1, 2, 3), None)
    wide = name.startswith(("audiosr", "audioldm_48k"))
    assert (latent.mel.sample_rate, latent.vae.factor, latent.cells) == ((48_000, 8, 32) if wide else (16_000, 4, 16))
    assert latent.vae.latent_channels == unet.out_channels
    assert row.samples == 1024 * latent.mel.hop
    audiosr = name.startswith("audiosr")
    assert (latent.prediction, latent.schedule.kind) == (("v", "cosine") if audiosr else ("eps", "linear"))
    assert row.weights.average == name.startswith(("audioldm-", "musicldm"))
    assert row.weights.commercial == audiosr
    assert ("CC-BY-NC" in row.weights.licence) != audiosr
    assert (row.prompts is None) == audiosr
    assert row.weights.source.startswith("https://")
    assert row.weights.hub is None or row.weights.source.endswith(row.weights.hub)


def test_systems_are_values() -> None:
    for row in SYSTEMS.values():
        assert from_json(SystemConfig, to_json(row)) == row
        assert from_json(LatentConfig, to_json(row.latent)) == row.latent
    assert system("musicldm") is SYSTEMS["musicldm"]
    with pytest.raises(ConfigError, match=r"'audioldm3'.*audioldm2-full.*musicldm"):
        system("audioldm3")
    with pytest.raises(dataclasses.FrozenInstanceError):
        SYSTEMS["musicldm"].candidates = 1  # type: ignore[misc]


@pytest.mark.parity
@pytest.mark.parametrize("name", systems())
def test_every_tensor_has_a_place_and_every_place_a_tensor(
    family: Path, request: pytest.FixtureRequest, name: str
) -> None:
    """On the meta device: names and shapes of the whole published file (spec 10.2)."""
    row, golden = SYSTEMS[name], Goldens(family)
    with torch.device("meta"):
        model = SystemModel(row)
    assert sum(p.numel() for p in model.latent.unet.parameters()) / 1e6 == pytest.approx(TABLE[name][7], abs=0.005)
    published = golden.checkpoint(RECORDED.get(name, name))
    targets = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    dotted = dotted_averages(published, model.latent.unet.state_dict())
    assert len(dotted) == len(published)
    for which in ("average", "reference"):
        found, unmapped = apply_rules(system_rules(row, which), dotted, {"latent", "prompts"})
        unfilled = [key for key in targets if key not in found]
        assert (unmapped, unfilled) == ([], [])
        assert {key: tuple(tensor.shape) for key, tensor in found.items()} == targets
    mapped = places(system_rules(row, "reference"), dotted)
    row_of_table = (name, len(published), mapped, len(unmapped), len(unfilled))
    request.node.user_properties.append(("coverage", row_of_table))


def test_the_published_choice_of_weights() -> None:
    assert average(SYSTEMS["audioldm-s-full"], "reference")
    assert not average(SYSTEMS["audioldm2-full"], "reference")
    assert average(SYSTEMS["audioldm2-full"], "average")
    assert not average(SYSTEMS["audioldm-s-full"], "raw")
