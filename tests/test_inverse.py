"""The encoder that comes later than its decoder: kept beside it, and never mixed up with another's."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import codec as tiny_codec
from tiny import config, fill, noise, random_codes

from semanticodec import CheckpointError, CodesError, ConfigError, SemantiCodec, checkpoints, inverse
from semanticodec.model import CodecModel
from semanticodec.nn.vae import AutoencoderKL

CONFIG = config("mini")


def folder(path: Path, seed: int = 0) -> Path:
    model = CodecModel(CONFIG)
    fill(model, seed)
    checkpoints.save(path, {CONFIG: model.state_dict()})
    return path


@cache
def whole() -> AutoencoderKL:
    vae = AutoencoderKL(CONFIG.decoder.latent.vae)
    fill(vae, 7)
    return vae.half().float()


def test_the_encoder_comes_back(tmp_path: Path) -> None:
    inverse.save(folder(tmp_path), whole())
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
    inverse.save(folder(tmp_path), whole())
    folder(tmp_path, seed=1)
    with pytest.raises(CheckpointError, match="for another decoder than the one beside it; train it again"):
        SemantiCodec.from_pretrained(tmp_path).editor(random_codes(CONFIG, 16))


def test_weights_without_one_say_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"vae_encoder.safetensors is missing.*training inverse"):
        SemantiCodec.from_pretrained(folder(tmp_path)).editor(random_codes(CONFIG, 16))
    with pytest.raises(CheckpointError, match="only native weights"):
        tiny_codec("official").editor(random_codes(config("official"), 16))


def test_an_editor_needs_codes_and_a_decoder(tmp_path: Path) -> None:
    inverse.save(folder(tmp_path), whole())
    with pytest.raises(CodesError, match="seen 2 rows"):
        SemantiCodec.from_pretrained(tmp_path).editor(random_codes(CONFIG, 16, batch=2))
    with pytest.raises(ConfigError, match="decoder"):
        SemantiCodec.from_pretrained(tmp_path, parts="encoder").editor(random_codes(CONFIG, 16))
