"""Geometry, bitrates and JSON of the configuration values."""

import dataclasses
import json
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from semanticodec.config import (
    COLUMN,
    PRESETS,
    SAMPLE_RATE,
    AudioMAEConfig,
    CodecConfig,
    DecoderConfig,
    EncoderConfig,
    HiFiGANConfig,
    LatentConfig,
    ScheduleConfig,
    UNetConfig,
    VocosConfig,
    config_from_json,
    preset,
)
from semanticodec.errors import ConfigError

CONFIGS = st.sampled_from(list(PRESETS.values()))
SAMPLES = st.integers(0, 10 * 3600 * SAMPLE_RATE)

BITRATES = {
    100: {4096: 1250, 8192: 1300, 16384: 1350, 32768: 1400},
    50: {4096: 625, 8192: 650, 16384: 675, 32768: 700},
    25: {4096: 312.5, 8192: 325, 16384: 337.5, 32768: 350},
}
"""The published table (spec, section 1), in bits per second."""

WINDOWS = {100: (512, 768, 1728), 50: (256, 1536, 3264), 25: (128, 3072, 6336)}
"""Token rate -> tokens per 10.24 s window, feature width, context width (spec, first table)."""


@given(CONFIGS, SAMPLES)
def test_frames_cover_the_samples_and_no_group_more(config: CodecConfig, samples: int):
    frames = config.frames(samples)
    assert frames % config.group == 0
    assert samples <= config.samples(frames) < samples + config.group_samples


@given(CONFIGS, st.integers(0, 10**6))
def test_samples_of_frames_are_inverse_to_frames_of_samples(config: CodecConfig, groups: int):
    frames = groups * config.group
    assert config.frames(config.samples(frames)) == frames
    assert config.samples(frames) == config.columns(frames) * COLUMN
    assert Fraction(config.samples(frames), SAMPLE_RATE) * config.frame_rate == frames


@given(CONFIGS, SAMPLES, SAMPLES)
def test_geometry_is_monotone(config: CodecConfig, a: int, b: int):
    low, high = sorted((a, b))
    assert config.frames(low) <= config.frames(high)
    assert config.samples(low) <= config.samples(high)


@given(CONFIGS, st.integers(1, 10**6))
def test_a_broken_group_still_counts_whole(config: CodecConfig, frames: int):
    whole = config.samples(frames)
    assert whole % config.group_samples == 0
    assert config.samples(frames - 1) in (whole, whole - config.group_samples)


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_presets_hold_together(config: CodecConfig):
    assert preset(config.name) is config
    assert config.n_q == 2
    assert 300 <= config.bitrate <= 1400
    assert config.block == config.coded_columns * COLUMN
    assert config.block % config.group_samples == 0
    assert config.decoder.latent.unet.out_channels == config.decoder.latent.vae.latent_channels


@pytest.mark.parametrize("rate", BITRATES)
def test_official_presets_match_the_published_tables(rate: int):
    for vocabulary, bitrate in BITRATES[rate].items():
        config = preset(f"semanticodec-{rate}-{vocabulary}")
        tokens, width, context = WINDOWS[rate]
        assert config.bitrate == Fraction(bitrate)
        assert config.codebook_sizes == (vocabulary, 8192)
        assert config.frame_rate == Fraction(rate, 2)
        assert config.block == 163_840
        assert config.frames(config.block) == tokens
        assert config.feature_dim == config.encoder.acoustic_dim == width
        assert config.encoder.lstm_layers == {100: 4, 50: 3, 25: 2}[rate]
        assert config.decoder.latent.unet.contexts == (None, context)
        # windows of the decoder share 0.64 s
        assert config.decoder.overlap * COLUMN == 10_240


def test_code_bits_of_sizes_that_are_no_power_of_two():
    config = preset("mini")
    encoder = dataclasses.replace(config.encoder, semantic_size=1025, acoustic_size=1024)
    assert dataclasses.replace(config, encoder=encoder).code_bits == (11, 10)


def test_mini_is_the_default_mini():
    assert preset("mini") is preset("mini-100")


def test_unknown_presets_are_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'semanticodec-75'.*mini-100.*semanticodec-25-32768"):
        preset("semanticodec-75")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_rate": 75}, "token rate 75"),
        ({"encoder": EncoderConfig(context=64)}, "encoder windows advance by 0"),
        ({"decoder": DecoderConfig(overlap=64)}, "decoder windows advance by 0"),
        ({"token_rate": 25, "encoder": EncoderConfig(context=1)}, "encoder windows advance by 63"),
    ],
)
def test_values_that_do_not_fit_together_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(preset("semanticodec-100-4096"), **change)


SMALL = st.integers(1, 512)
GENERATED = st.builds(
    CodecConfig,
    name=st.text(),
    token_rate=st.sampled_from([25, 50, 100]),
    encoder=st.builds(
        EncoderConfig,
        mae=st.builds(AudioMAEConfig, columns=st.sampled_from([8, 64]), dim=SMALL),
        context=st.sampled_from([0, 2, 4]),
        bidirectional=st.booleans(),
    ),
    decoder=st.builds(
        DecoderConfig,
        overlap=st.sampled_from([0, 2, 4]),
        join=st.sampled_from(["crossfade", "prefix"]),
        latent=st.builds(
            LatentConfig,
            unet=st.builds(
                UNetConfig,
                mults=st.lists(SMALL, min_size=1, max_size=5).map(tuple),
                contexts=st.lists(st.none() | SMALL, max_size=3).map(tuple),
                film_dim=st.none() | SMALL,
                film_mode=st.sampled_from(["concat", "add"]),
            ),
            vocoder=st.builds(HiFiGANConfig, base=SMALL) | st.builds(VocosConfig, dim=SMALL),
            schedule=st.builds(ScheduleConfig, kind=st.sampled_from(["linear", "cosine"])),
            prediction=st.sampled_from(["v", "eps"]),
            guidance=st.floats(allow_nan=False, allow_infinity=False),
        ),
    ),
)


@given(CONFIGS | GENERATED)
def test_json_round_trip(config: CodecConfig):
    again = config_from_json(config.to_json())
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == config.to_json()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.text() | JSON.map(json.dumps))
def test_text_that_is_no_configuration_is_refused(text: str):
    with pytest.raises(ConfigError):
        config_from_json(text)


@given(CONFIGS, st.data())
def test_a_configuration_cut_short_is_refused(config: CodecConfig, data: st.DataObject):
    text = config.to_json()
    with pytest.raises(ConfigError, match="not JSON"):
        config_from_json(text[: data.draw(st.integers(0, len(text) - 1))])


def paths(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the way to every value inside JSON data."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in inner for path in paths(item, (*here, key)))]


@given(CONFIGS, JSON, st.data())
def test_any_value_replaced_gives_a_sound_configuration_or_an_error(
    config: CodecConfig, wrong: Any, data: st.DataObject
):
    document = json.loads(config.to_json())
    *way, last = data.draw(st.sampled_from(paths(document)[1:]))
    place = document
    for key in way:
        place = place[key]
    place[last] = wrong
    try:
        changed = config_from_json(json.dumps(document))
    except ConfigError:
        return
    assert config_from_json(changed.to_json()) == changed
    hash(changed)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("decoder", "latent", "vocoder", "kind"), "wavenet", "kind"),
        (("decoder", "join"), "splice", "splice"),
        (("encoder", "context"), "4", "int"),
        (("encoder", "bidirectional"), 1, "bool"),
        (("encoder", "context"), True, "int"),
        (("decoder", "latent", "unet", "mults"), 4, "list"),
        (("decoder", "latent", "unet", "mults"), [1, "2"], "int"),
        (("decoder", "latent", "unet", "base"), None, "int"),
        (("token_rate",), [100], "100"),
        (("decoder", "latent", "guidance"), "NaN", "float"),
        (("colour",), "red", "colour"),
    ],
)
def test_wrong_values_are_named(path: tuple[str, ...], value: Any, message: str):
    document = json.loads(preset("mini").to_json())
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        config_from_json(json.dumps(document))


def test_nesting_without_end_is_refused():
    with pytest.raises(ConfigError):
        config_from_json("[" * 100_000)
