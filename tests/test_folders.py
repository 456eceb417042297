"""Folders that transformers and diffusers wrote, with the same results as theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from diffusers import AudioLDM2ProjectionModel
from prompting import CLAP as SMALL
from prompting import conditioner, save_tokenizer
from safetensors.torch import load_file, save_file
from tiny import fill, noise
from transformers import ClapModel, ClapTextModelWithProjection, GPT2Config, GPT2Model, T5Config, T5EncoderModel

from semanticodec.conditioners.clap import _configuration
from semanticodec.conditioners.folders import load_clap, load_prompts
from semanticodec.conditioners.prompts import Prompts
from semanticodec.errors import CheckpointError, ConfigError

TEXTS = ["bells ring", "a dog barks twice while rain"]


def save(folder: Path, module: torch.nn.Module) -> None:
    fill(module)
    module.save_pretrained(folder)


def pipeline(folder: Path, *, hears: bool = True, sequence: bool = True) -> Path:
    """Write what a diffusers pipeline keeps of its conditioners."""
    settings = _configuration(SMALL)
    text = settings.text_config
    text.projection_dim = SMALL.dim
    save(folder / "text_encoder", ClapModel(settings) if hears else ClapTextModelWithProjection(text))
    save_tokenizer(folder / "tokenizer", "roberta")
    if sequence:
        t5 = T5Config(
            vocab_size=17, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
        save(folder / "text_encoder_2", T5EncoderModel(t5))
        save_tokenizer(folder / "tokenizer_2", "t5")
        gpt2 = GPT2Config(
            vocab_size=11, n_positions=40, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
        )
        save(folder / "language_model", GPT2Model(gpt2))
        projection = AudioLDM2ProjectionModel(SMALL.dim, 16, 16)
        for number, parameter in enumerate(projection.parameters()):
            parameter.data = noise(*parameter.shape, seed=number)
        projection.save_pretrained(folder / "projection_model")
    return folder


def test_clap(tmp_path: Path) -> None:
    folder = pipeline(tmp_path, sequence=False) / "text_encoder"
    save_tokenizer(folder, "roberta")
    clap = load_clap(folder)
    reference = ClapModel.from_pretrained(folder).eval()
    ids, mask = clap.tokenizer(TEXTS)
    want = reference.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(clap.text(TEXTS), want, rtol=1e-4, atol=1e-5)
    assert clap.audio(noise(1, 5000), 16_000).shape == (1, 12)


def test_audioldm2(tmp_path: Path) -> None:
    """The whole chain, against diffusers' projection model and transformers' models step by step."""
    folder = pipeline(tmp_path)
    module = load_prompts(folder)
    (written, _), (states, mask) = module(Prompts(TEXTS[:1])).contexts
    assert mask is not None
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_2").eval()
    assert module.t5 is not None
    ids, seen = module.t5.tokenizer(TEXTS[:1])
    torch.testing.assert_close(states, encoder(input_ids=ids, attention_mask=seen)[0], rtol=1e-4, atol=1e-5)
    projection = AudioLDM2ProjectionModel.from_pretrained(folder / "projection_model")
    vector = module.clap.text(TEXTS[:1])[:, None]
    joined = projection(vector, states, torch.ones(1, 1), mask)
    gpt2 = GPT2Model.from_pretrained(folder / "language_model").eval()
    fed, seen = joined.hidden_states, joined.attention_mask
    for _ in range(written.shape[1]):
        new = gpt2(inputs_embeds=fed, attention_mask=seen).last_hidden_state[:, -1:]
        fed, seen = torch.cat([fed, new], 1), torch.cat([seen, torch.ones(1, 1)], 1)
    assert written.shape == (1, 8, 16)
    torch.testing.assert_close(written, fed[:, -8:], rtol=1e-4, atol=1e-4)


def test_audioldm_has_only_the_half_that_reads(tmp_path: Path) -> None:
    module = load_prompts(pipeline(tmp_path, hears=False, sequence=False))
    film = module(Prompts(TEXTS)).film
    assert film is not None
    reference = ClapTextModelWithProjection.from_pretrained(tmp_path / "text_encoder").eval()
    ids, mask = module.clap.tokenizer(TEXTS)
    want = torch.nn.functional.normalize(reference(input_ids=ids, attention_mask=mask).text_embeds, dim=-1)
    torch.testing.assert_close(film, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="only reads"):
        module.rank(noise(2, 5000), 16_000, TEXTS)


def test_settings_are_those_of_the_folder(tmp_path: Path) -> None:
    config = load_prompts(pipeline(tmp_path)).config
    own = asdict(conditioner("sequence", tmp_path / "own").config)
    seen = asdict(config)
    for table in (own, seen):
        for part in ("clap", "t5"):
            table[part] = {k: v for k, v in table[part].items() if k not in ("tokenizer", "max_tokens")}
    assert seen == own | {"sequence": own["sequence"] | {"rows": 2, "count": 8}}


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("text_encoder/text_config", "hidden_act", "relu", "hidden_act = 'relu'; only 'gelu'"),
        ("text_encoder/text_config", "layer_norm_eps", 1e-3, "layer_norm_eps = 0.001; only 1e-05"),
        ("text_encoder/text_config", "pad_token_id", 0, "pad_token_id = 0; only 1"),
        ("text_encoder", "projection_hidden_act", "gelu", "projection_hidden_act = 'gelu'; only 'relu'"),
        ("text_encoder/audio_config", "hidden_act", "relu", "hidden_act = 'relu'; only 'gelu'"),
        ("text_encoder/audio_config", "layer_norm_eps", 1e-12, "layer_norm_eps = 1e-12; only 1e-05"),
        ("text_encoder/audio_config", "window_size", 4, "window_size = 4; only 8"),
        ("text_encoder/audio_config", "mlp_ratio", 2.0, "mlp_ratio = 2.0; only 4"),
        ("text_encoder/audio_config", "patch_stride", [2, 2], r"patch_stride = .2, 2.; only \(4, 4\)"),
        ("text_encoder_2", "relative_attention_max_distance", 64, "relative_attention_max_distance = 64; only 128"),
        ("text_encoder_2", "feed_forward_proj", "gated-relu", "feed_forward_proj = 'gated-relu'; only 'gated-gelu'"),
        ("text_encoder_2", "feed_forward_proj", None, "feed_forward_proj = 'relu'; only 'gated-gelu'"),
        ("text_encoder_2", "dense_act_fn", "relu", "dense_act_fn = 'relu'; only 'gelu_new'"),
        ("text_encoder_2", "is_decoder", True, "is_decoder = True; only False"),
        ("text_encoder_2", "layer_norm_epsilon", 1e-3, "layer_norm_epsilon = 0.001; only 1e-06"),
        ("language_model", "activation_function", "relu", "activation_function = 'relu'; only 'gelu_new'"),
        ("language_model", "layer_norm_epsilon", 1e-3, "layer_norm_epsilon = 0.001; only 1e-05"),
        ("language_model", "scale_attn_by_inverse_layer_idx", True, "inverse_layer_idx = True; only False"),
    ],
)
def test_networks_that_compute_something_else_are_refused(
    whole: Path, part: str, name: str, value: object, message: str
) -> None:
    """Weights fit all of these; None stands for a field left out, which counts as transformers' default."""
    place, _, table = part.partition("/")
    with edited(whole / place / "config.json", table, name, value), pytest.raises(CheckpointError, match=message):
        load_prompts(whole)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("text_encoder", "text_projection.linear1.weight"),
        ("text_encoder", "audio_model.audio_encoder.batch_norm.running_mean"),
        ("text_encoder_2", "encoder.block.1.layer.1.layer_norm.weight"),
        ("language_model", "ln_f.bias"),
    ],
)
def test_tensors_that_a_file_lacks_are_not_made_up(tmp_path: Path, part: str, name: str) -> None:
    folder = pipeline(tmp_path)
    file = folder / part / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not fill: .*" + name.removeprefix("encoder.")):
        load_prompts(folder)


@pytest.mark.parametrize("value", [1e-12, None])
def test_the_epsilon_of_converted_folders_is_the_original_weights_own(whole: Path, value: float | None) -> None:
    with edited(whole / "text_encoder" / "config.json", "text_config", "layer_norm_eps", value):
        module = load_prompts(whole)
    assert module.clap.model.config.text_config.layer_norm_eps == 1e-5


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline(tmp_path_factory.mktemp("audioldm2"))


@contextmanager
def edited(file: Path, table: str, name: str, value: object) -> Iterator[None]:
    """Set a field of a configuration, or leave it out, until the end of the block."""
    before = file.read_text()
    settings = json.loads(before)
    fields = settings[table] if table else settings
    assert name in fields
    fields[name] = value
    if value is None:
        del fields[name]
    file.write_text(json.dumps(settings))
    try:
        yield
    finally:
        file.write_text(before)


def test_folders_that_hold_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable config.json"):
        load_prompts(tmp_path)
    folder = pipeline(tmp_path)
    file = folder / "text_encoder_2" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"architectures": ["VitsModel"]}))
    with pytest.raises(ConfigError, match="holds VitsModel; known here are T5EncoderModel"):
        load_prompts(folder)
    file.write_text(json.dumps(settings))
    save_file({"odd": torch.ones(1)}, folder / "projection_model" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="not AudioLDM 2's projection model"):
        load_prompts(folder)
    with pytest.raises(CheckpointError, match="cannot load ClapModel"):
        load_clap(tmp_path / "none")
    file = folder / "text_encoder" / "config.json"
    settings = json.loads(file.read_text())
    settings["audio_config"]["enable_fusion"] = True
    file.write_text(json.dumps(settings))
    with pytest.raises((ConfigError, CheckpointError)):
        load_clap(folder / "text_encoder")
