"""The encoder that comes later than its decoder: kept beside it, and never mixed up with another's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoints import TABLE, published_names, unused_tensors
from tiny import codec as tiny_codec
from tiny import config, fill, noise, random_codes
from torch import Tensor
from typer.testing import CliRunner

from semanticodec import CheckpointError, CodesError, ConfigError, SemantiCodec, checkpoints, inverse
from semanticodec.cli import app
from semanticodec.config import PRESETS
from semanticodec.editing import Region
from semanticodec.model import CodecModel
from semanticodec.nn.vae import AutoencoderKL

CONFIG = config("mini")


def folder(path: Path, seed: int = 0) -> Path:
    model = CodecModel(CONFIG)
    fill(model, seed)
    checkpoints.save(path, {CONFIG: model.state_dict()})
    return path


VAE = CONFIG.decoder.latent.vae


@cache
def whole() -> AutoencoderKL:
    vae = AutoencoderKL(CONFIG.decoder.latent.vae)
    fill(vae, 7)
    return vae.half().float()


def halves() -> dict[str, Tensor]:
    return {name: value.half() for name, value in whole().state_dict().items()}


def test_the_encoder_comes_back(tmp_path: Path) -> None:
    inverse.save(folder(tmp_path), VAE, halves())
    codec = SemantiCodec.from_pretrained(tmp_path)
    assert codec.model.latent is not None
    assert codec.model.latent.vae.encoder is None
    before = codec.weights_hash
    editor = codec.editor(random_codes(CONFIG, 16))
    mel = noise(1, 1, 48, 64)
    with torch.inference_mode():
        mean, logvar = editor.latent.vae.encode(mel)
        wanted = whole().encode(mel)
    torch.testing.assert_close(mean, wanted[0])
    torch.testing.assert_close(logvar, wanted[1])
    assert codec.weights_hash == before


def test_it_serves_one_decoder(tmp_path: Path) -> None:
    inverse.save(folder(tmp_path), VAE, halves())
    folder(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="for another decoder than the one beside it; train it again"):
        SemantiCodec.from_pretrained(tmp_path).editor(random_codes(CONFIG, 16))


@pytest.mark.parametrize("part", inverse.PARTS)
def test_every_part_is_filled_by_its_own_tensors(tmp_path: Path, part: str) -> None:
    tensors = halves()
    lost = next(name for name in tensors if name.startswith(part))
    inverse.save(folder(tmp_path), VAE, {name: value for name, value in tensors.items() if name != lost})
    with pytest.raises(CheckpointError, match=f"does not fill: {lost}"):
        SemantiCodec.from_pretrained(tmp_path).editor(random_codes(CONFIG, 16))


def test_weights_without_one_say_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vae_encoder.safetensors is missing.*training inverse"):
        SemantiCodec.from_pretrained(folder(tmp_path)).editor(random_codes(CONFIG, 16))
    with pytest.raises(CheckpointError, match="put together by hand"):
        tiny_codec("official").editor(random_codes(config("official"), 16))


@pytest.fixture
def official(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A small codec in the official layout, whose file holds both halves of the autoencoder."""
    small = config("official")
    monkeypatch.setitem(PRESETS, small.name, small)
    model, vae = CodecModel(small), AutoencoderKL(small.decoder.latent.vae)
    fill(model)
    fill(vae, 7)
    assert model.latent is not None
    vae.load_state_dict(vae.state_dict() | model.latent.vae.state_dict())
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("conditioner.")}
    both = {f"latent.vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    place = tmp_path / "official"
    (place / TABLE).parent.mkdir(parents=True)
    np.save(place / TABLE, model.codebooks.semantic.numpy())
    encoder = {name: tensor for name, tensor in state.items() if not name.startswith("latent.")}
    decoder = {name: tensor for name, tensor in (state | both).items() if name.startswith("latent.")}
    torch.save(published_names(encoder), place / "encoder.ckpt")
    torch.save(
        published_names(decoder) | {"alphas_cumprod": unused_tensors()[1]["alphas_cumprod"]}, place / "decoder.ckpt"
    )
    return place


def test_official_weights_hold_it_and_keep_it_when_converted(official: Path, tmp_path: Path) -> None:
    small = config("official")
    assert CliRunner().invoke(app, ["convert", str(official), str(tmp_path / "native")]).exit_code == 0
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "native"), str(tmp_path / "again")]).exit_code == 0
    codes, wave, heard = random_codes(small, 16), noise(20_480, scale=0.1), []
    for place in (official, tmp_path / "native", tmp_path / "again"):
        codec = SemantiCodec.from_pretrained(place)
        assert codec.model.latent is not None
        assert codec.model.latent.vae.encoder is None
        heard.append(codec.editor(codes).inpaint(wave, 16_000, [Region(0.4, 0.6)]))
        assert torch.equal(heard[-1][:6400], wave[:6400])
    assert not torch.equal(heard[0], wave)
    assert torch.equal(heard[0], heard[1])
    assert torch.equal(heard[0], heard[2])


def test_an_editor_needs_codes_and_a_decoder(tmp_path: Path) -> None:
    inverse.save(folder(tmp_path), VAE, halves())
    with pytest.raises(CodesError, match="seen 2 rows"):
        SemantiCodec.from_pretrained(tmp_path).editor(random_codes(CONFIG, 16, batch=2))
    with pytest.raises(ConfigError, match="decoder"):
        SemantiCodec.from_pretrained(tmp_path, parts="encoder").editor(random_codes(CONFIG, 16))
