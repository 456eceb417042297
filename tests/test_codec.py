"""The codec's promises: exact lengths, independent windows and rows, seeds, typed errors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import FLAVOURS, codec, config, fill, noise, random_codes
from torch import Tensor

from semanticodec.audio import log_mel, resample
from semanticodec.codec import SemantiCodec, _mono16k
from semanticodec.config import RATES, CodecConfig, TokenRate
from semanticodec.diffusion import PUBLISHED, SamplerOptions
from semanticodec.errors import AudioError, CodesError, ConfigError
from semanticodec.model import CodecModel
from semanticodec.nn.quantize import nearest, stack

FAST = SamplerOptions(steps=1, guidance=1.0)
PAIRS = list(itertools.product(FLAVOURS, RATES))

flavours = pytest.mark.parametrize("flavour", FLAVOURS)
pairs = pytest.mark.parametrize(("flavour", "rate"), PAIRS)


@cache
def sound(samples: int, seed: int = 0) -> Tensor:
    """Return noise whose level keeps changing, so that codes do too."""
    level = torch.sin(torch.arange(samples) / 900) * torch.sin(torch.arange(samples) / 7001)
    return noise(samples, seed=seed, scale=0.3) * level


def in_range(codes: Tensor, small: CodecConfig, frames: int) -> None:
    assert codes.dtype == torch.int64
    assert codes.shape[1:] == (2, frames)
    for stream, size in zip(codes.unbind(1), small.codebook_sizes, strict=True):
        assert stream.min() >= 0
        assert stream.max() < size


class TestLengths:
    @pairs
    @settings(max_examples=8)
    @given(samples=st.one_of(st.integers(1, 6000), st.integers(1, 480_000)))
    @example(480_000)
    @example(1)
    def test_frames(self, flavour: str, rate: TokenRate, samples: int) -> None:
        small = codec(flavour, rate)
        frames = -(-samples // small.config.group_samples) * small.config.group
        in_range(small.encode(sound(480_000)[:samples], 16000), small.config, frames)

    @pairs
    @settings(max_examples=5)
    @given(samples=st.integers(1, 45_000))
    @example(1)
    @example(20_480)
    @example(20_481)
    @example(5120)
    def test_as_many_samples_as_went_in(self, flavour: str, rate: TokenRate, samples: int) -> None:
        small = codec(flavour, rate)
        codes = small.encode(sound(480_000)[:samples], 16000)
        wave = small.decode(codes, length=samples, options=FAST)
        assert (wave.shape, wave.dtype) == ((1, samples), torch.float32)
        assert torch.isfinite(wave).all()

    @flavours
    @pytest.mark.parametrize("rate", [100, 25])
    def test_thirty_seconds_there_and_back(self, flavour: str, rate: TokenRate) -> None:
        small = codec(flavour, rate)
        codes = small.encode(sound(480_000), 16000)
        assert small.decode(codes, length=480_000, options=FAST).shape == (1, 480_000)

    @flavours
    def test_a_started_group_is_whole(self, flavour: str) -> None:
        small = codec(flavour)
        for frames in (1, 8, 9, small.config.window_frames + 1):
            wave = small.decode(random_codes(small.config, frames), options=FAST)
            assert wave.shape == (1, -(-frames // 8) * 2560)

    @flavours
    @pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 96000])
    @settings(max_examples=5)
    @given(samples=st.integers(1, 30_000), channels=st.integers(1, 8))
    def test_any_rate_and_channels(self, flavour: str, rate: int, samples: int, channels: int) -> None:
        small = codec(flavour)
        frames = small.config.frames(math.ceil(samples * 16000 / rate))
        wave = sound(240_000)[: samples * channels].reshape(1, channels, samples)
        mixed = small.encode(wave, rate)
        in_range(mixed, small.config, frames)
        assert len(mixed) == 1
        apart = small.encode(wave[0], rate)
        in_range(apart, small.config, frames)
        assert len(apart) == channels


class TestInput:
    @flavours
    def test_channels_are_averaged_or_apart(self, flavour: str) -> None:
        small = codec(flavour)
        wave = torch.stack([sound(30_000), sound(30_000, 1)])
        mixed = small.encode(wave[None], 16000)
        assert torch.equal(mixed, small.encode(wave.mean(0), 16000))
        apart = small.encode(wave, 16000)
        assert torch.equal(apart, torch.cat([small.encode(row, 16000) for row in wave]))
        assert not torch.equal(apart[:1], mixed)
        assert not torch.equal(apart[:1], apart[1:])

    @flavours
    def test_arrays_and_dtypes(self, flavour: str) -> None:
        small = codec(flavour)
        wave = sound(9000)
        want = small.encode(wave, 16000)
        locked = wave.numpy().copy()
        locked.setflags(write=False)
        backwards = wave.numpy()[::-1].copy()[::-1]
        for same in (wave.double(), wave.numpy(), wave.double().numpy(), locked, backwards):
            assert torch.equal(small.encode(same, 16000), want)
        assert small.encode(wave.half(), 16000).shape == want.shape

    def test_other_rates_are_resampled(self) -> None:
        small = codec("mini")
        wave = sound(40_000)
        assert torch.equal(small.encode(wave, 44100), small.encode(resample(wave, 44100, 16000), 16000))

    @flavours
    def test_silence_and_clipping(self, flavour: str) -> None:
        small = codec(flavour)
        for wave in (torch.zeros(30_000), torch.ones(30_000), 100 * sound(30_000), sound(30_000).sign()):
            codes = small.encode(wave, 16000)
            in_range(codes, small.config, small.config.frames(30_000))
            assert torch.isfinite(small.decode(codes, options=FAST)).all()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_is_not_finite(self, bad: float) -> None:
        wave = torch.zeros(2, 9000)
        wave[1, 700] = bad
        for call in (codec("mini").encode, codec("mini").features):
            for given_wave in (wave, wave[None], wave.numpy()):
                with pytest.raises(AudioError, match="1 of 18000 samples are NaN or infinite"):
                    call(given_wave, 44100)
        with pytest.raises(AudioError, match="NaN or infinite"):
            codec("mini").encode([wave[0], wave[1]], 16000)
        with pytest.raises(AudioError, match="NaN or infinite"):
            codec("mini").encode(np.array([1e300]), 16000)

    @pytest.mark.parametrize("level", [1e19, 3e38])
    def test_refuses_what_would_overflow(self, level: float) -> None:
        for wave in (torch.full((900,), level), torch.full((2, 900), level), torch.full((1, 2, 900), -level)):
            with pytest.raises(AudioError, match="largest sample is"):
                codec("mini").encode(wave, 16000)
        assert torch.isfinite(codec("mini").features(sound(9000).clamp(-1, 1) * 1e9, 16000)).all()

    @pytest.mark.parametrize("wave", ["a.wav", None, Path("a.wav"), {"a": 1}, np.array(["a"]), [["x"]]])
    def test_refuses_what_is_no_sound(self, wave: object) -> None:
        for call in (codec("mini").encode, codec("mini").features):
            with pytest.raises(AudioError, match="seen"):
                call(wave, 16000)  # type: ignore[operator]

    @pytest.mark.parametrize("rate", [44100.0, "16000", None, True])
    def test_refuses_rates_that_are_no_whole_numbers(self, rate: object) -> None:
        with pytest.raises(AudioError, match="must be a whole number"):
            codec("mini").encode(torch.zeros(500), rate)  # type: ignore[call-overload]

    @pytest.mark.parametrize("shape", [(), (0,), (0, 5), (2, 0), (1, 0, 5), (1, 1, 1, 5)])
    def test_refuses_empty_and_odd_shapes(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(AudioError, match=r"\[S\], \[B, S\] or \[B, C, S\]"):
            codec("mini").encode(torch.zeros(shape), 16000)

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8, torch.bool, torch.complex64])
    def test_refuses_integers(self, dtype: torch.dtype) -> None:
        with pytest.raises(AudioError, match=f"floating point .* {dtype}"):
            codec("mini").encode(torch.zeros(500, dtype=dtype), 16000)
        with pytest.raises(AudioError, match="floating point"):
            codec("mini").encode(torch.zeros(500, dtype=dtype).numpy(), 16000)

    @pytest.mark.parametrize("rate", [0, -1, 10])
    def test_refuses_odd_rates(self, rate: int) -> None:
        with pytest.raises(AudioError, match=f"{rate}.*Hz"):
            codec("mini").encode(torch.zeros(500), rate)

    def test_a_sequence_holds_recordings_not_channels(self) -> None:
        """Taking the first row of each in silence would lose sound."""
        with pytest.raises(AudioError, match=r"recordings \[S\], seen \(2, 500\)"):
            codec("mini").encode([torch.zeros(500), torch.zeros(2, 500)], 16000)


class TestIndependence:
    @pairs
    def test_rows_of_a_batch(self, flavour: str, rate: TokenRate) -> None:
        small = codec(flavour, rate)
        waves = torch.stack([sound(50_000, seed) for seed in range(3)])
        codes = small.encode(waves, 16000)
        assert torch.equal(codes, torch.cat([small.encode(row, 16000) for row in waves]))
        options = SamplerOptions(guidance=2.0)
        whole = small.decode(codes, options=options)
        with_others = codes.clone()
        with_others[1:] = random_codes(small.config, codes.shape[2], 2)
        other = small.decode(with_others, options=options)
        assert torch.equal(other[0], whole[0])
        assert not torch.equal(other[1], whole[1])
        # A batch of another size rounds differently.  That is nothing at first, but mini's phase iterations continue
        # from their own past and enlarge it with time: the phases drift, the spectrogram does not.
        alone = small.decode(codes[:1], options=options)
        torch.testing.assert_close(alone[:, :4000], whole[:1, :4000], rtol=0, atol=1e-5)
        near, far = ((log_mel(wave) - log_mel(whole[:1])).abs().mean() for wave in (alone, whole[1:2]))
        assert near < 0.02 * far
        if flavour == "official":
            torch.testing.assert_close(alone, whole[:1], rtol=0, atol=1e-5)

    @pairs
    def test_recordings_of_different_lengths(self, flavour: str, rate: TokenRate) -> None:
        small = codec(flavour, rate)
        waves = [sound(n, n) for n in (1, 41_000, 2560, 20_480, 20_481, 163_840)]
        coded = small.encode(waves, 16000)
        assert isinstance(coded, list)
        for wave, codes in zip(waves, coded, strict=True):
            assert torch.equal(codes, small.encode(wave, 16000))
        assert small.encode([], 16000) == []

    @pairs
    def test_windows_do_not_know_the_rest_of_the_file(self, flavour: str, rate: TokenRate) -> None:
        """A window of codes hears its own samples, 240 after them and mini's context before them."""
        small = codec(flavour, rate)
        block, context = small.config.block, 2560 * small.config.encoder.context
        frames = small.config.frames(block)
        wave = sound(6 * block)
        want = small.encode(wave, 16000)
        later = wave.clone()
        later[3 * block + 240 :] = sound(6 * block, 9)[3 * block + 240 :]
        codes = small.encode(later, 16000)
        assert torch.equal(codes[..., : 3 * frames], want[..., : 3 * frames])
        assert not torch.equal(codes[..., 3 * frames :], want[..., 3 * frames :])
        earlier = wave.clone()
        earlier[: 4 * block - context] = sound(6 * block, 9)[: 4 * block - context] + 0.2
        codes = small.encode(earlier, 16000)
        assert torch.equal(codes[..., 4 * frames :], want[..., 4 * frames :])
        assert not torch.equal(codes[..., : 3 * frames], want[..., : 3 * frames])
        if flavour == "mini":
            part = small.encode(wave[: 4 * block + 240], 16000)
            assert torch.equal(part[..., : 4 * frames], want[..., : 4 * frames])

    def test_mini_hears_its_whole_context(self) -> None:
        small = codec("mini")
        wave = sound(3 * 5120)
        before = small.features(wave, 16000)[0, -16:]
        wave = wave.clone()
        wave[2 * 5120 - 4 * 2560 : 2 * 5120 - 4 * 2560 + 400] += 1
        assert (small.features(wave, 16000)[0, -16:] != before).any()

    @pairs
    def test_no_window_is_wasted(self, flavour: str, rate: TokenRate) -> None:
        small, windows = codec(flavour, rate), 0
        assert small.model.mae is not None

        def count(_module: object, args: tuple[Tensor]) -> None:
            nonlocal windows
            windows += len(args[0])

        handle = small.model.mae.register_forward_pre_hook(count)
        block = small.config.block
        for samples, want in ((1, 1), (block - 1, 1), (block, 1), (block + 1, 2), (7 * block, 7), (7 * block + 1, 8)):
            windows = 0
            small.encode(sound(480_000)[:samples], 16000)
            assert windows == want
        handle.remove()


class TestEncodeInPieces:
    @pairs
    @pytest.mark.parametrize("rate_in", [16000, 44100])
    @settings(max_examples=4)
    @given(cuts=st.lists(st.integers(1, 89_999), max_size=6), samples=st.integers(1, 90_000))
    @example([], 40_960)
    @example([1, 2, 240, 20_480, 20_720, 20_721], 40_961)
    def test_equals_at_once(self, flavour: str, rate: TokenRate, rate_in: int, cuts: list[int], samples: int) -> None:
        small = codec(flavour, rate)
        wave = torch.stack([sound(90_000), sound(90_000, 1)])[:, :samples]
        edges = [0, *sorted({cut for cut in cuts if cut < samples}), samples]
        parts = [wave[:, a:b] for a, b in itertools.pairwise(edges)]
        codes = list(small.iter_encode(iter(parts), rate_in))
        assert torch.equal(torch.cat(codes, 2), small.encode(wave, rate_in))
        assert all(part.shape[2] for part in codes)

    def test_channels_and_single_rows(self) -> None:
        small = codec("mini")
        wave = torch.stack([sound(30_000), sound(30_000, 1)])
        mixed = torch.cat(list(small.iter_encode((part[None] for part in wave.split(7000, 1)), 8000)), 2)
        assert torch.equal(mixed, small.encode(wave[None], 8000))
        alone = torch.cat(list(small.iter_encode((part.numpy() for part in wave[0].split(7000)), 8000)), 2)
        assert torch.equal(alone, small.encode(wave[0], 8000))

    @flavours
    def test_without_end(self, flavour: str) -> None:
        """Constant memory: codes come out while sound goes in, and only so much is ahead."""
        small, pulled = codec(flavour), 0

        def endless() -> Iterator[Tensor]:
            nonlocal pulled
            for index in itertools.count():
                pulled += 5000
                yield sound(5000, index % 7)

        for columns in (64, SemantiCodec.columns_at_once):  # the memory budget, which a caller may change
            small.columns_at_once, pulled, frames = columns, 0, 0
            for codes in itertools.islice(small.iter_encode(endless(), 16000), 3):
                frames += codes.shape[2]
            at_once = 4 * columns // small.config.encoder.mae.columns
            assert frames == 3 * at_once * small.config.frames(small.config.block)
            assert pulled - small.config.samples(frames) <= 5000 + 240

    def test_refusals(self) -> None:
        small = codec("mini")
        assert list(small.iter_encode([], 16000)) == []
        with pytest.raises(AudioError, match="1 rows follows pieces of 2"):
            list(small.iter_encode([torch.zeros(2, 500), torch.zeros(1, 500)], 16000))
        with pytest.raises(AudioError, match="NaN"):
            list(small.iter_encode([torch.zeros(500), torch.full((500,), math.nan)], 16000))
        with pytest.raises(AudioError, match="whole number"):
            list(small.iter_encode([torch.zeros(500)], 16000.5))  # type: ignore[arg-type]


class TestPadding:
    def masked(self, wave: Tensor) -> list[int]:
        """Return from which frame on each window's residual encoder is told that there is no sound."""
        small, seen = codec("official"), []
        assert small.model.residual is not None
        handle = small.model.residual.register_forward_pre_hook(lambda _m, args: seen.append(args[2]))
        small.encode(wave, 16000)
        handle.remove()
        padding = torch.cat(seen)
        assert (padding.diff(dim=1).int() >= 0).all()
        return (~padding).sum(1).tolist()

    def test_follows_the_published_rule(self) -> None:
        """Spec 3.1: up to the last row that varies; windows of 128 rows and 64 frames here."""
        assert self.masked(sound(20_480)) == [63]  # two rows have not enough samples: ceil(64 * 126 / 128)
        assert self.masked(sound(20_481)) == [64, 1]
        assert self.masked(torch.zeros(30_000)) == [0, 0]
        assert self.masked(sound(8000)[4000:]) == [math.ceil(64 * 25 / 128)]

    def test_silence_inside_is_sound(self) -> None:
        wave = sound(20_480).clone()
        wave[2000:16_000] = 0
        assert self.masked(wave) == [63]

    def test_mini_has_none(self) -> None:
        small, seen = codec("mini"), []
        assert small.model.residual is not None
        handle = small.model.residual.register_forward_pre_hook(lambda _m, args: seen.append(args[2]))
        small.encode(sound(3000), 16000)
        handle.remove()
        assert seen == [None]


class TestFeatures:
    @pairs
    def test_are_what_the_codes_quantise(self, flavour: str, rate: TokenRate) -> None:
        small = codec(flavour, rate)
        waves = torch.stack([sound(30_000), sound(30_000, 1)])
        features = small.features(waves, 16000)
        columns = -(-30_000 // small.config.group_samples) * small.config.stack[0]
        assert features.shape == (2, columns * 8, 16)
        semantic = nearest(stack(features, small.config.stack), small.model.codebooks.semantic)
        assert torch.equal(semantic, small.encode(waves, 16000)[:, 0])


class TestDecode:
    @flavours
    def test_seeds(self, flavour: str) -> None:
        small = codec(flavour)
        codes = random_codes(small.config, 72)
        before = torch.get_rng_state()
        waves = [
            small.decode(codes, seed=seed, options=replace(FAST, eta=1.0, steps=2)) for seed in (3, 3, 4, 2**64 - 1)
        ]
        small.encode(sound(3000), 16000)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(waves[0], waves[1])
        for a, b in itertools.combinations(waves[1:], 2):
            assert (a - b).abs().max() > 1e-3
        for seed in (-1, 2**64):
            with pytest.raises(ConfigError, match="seed"):
                small.decode(codes, seed=seed)

    @pairs
    def test_streams_are_missing_codes(self, flavour: str, rate: TokenRate) -> None:
        small = codec(flavour, rate)
        codes = random_codes(small.config, 24, 2)
        whole = small.decode(codes, options=FAST)
        seen = [whole]
        for kept, lost in (("semantic", 1), ("acoustic", 0)):
            masked = codes.clone()
            masked[:, lost] = -1
            alone = small.decode(codes, options=FAST, streams=kept)  # type: ignore[arg-type]
            assert torch.equal(alone, small.decode(masked, options=FAST))
            seen.append(alone)
        seen.append(small.decode(torch.full_like(codes, -1), options=FAST))
        for a, b in itertools.combinations(seen, 2):
            assert not torch.equal(a, b)
            assert torch.isfinite(a).all()
        assert torch.equal(small.decode(codes, options=FAST, streams="both"), whole)
        with pytest.raises(ConfigError, match="streams 'sematic' are unknown"):
            small.decode(codes, streams="sematic")  # type: ignore[arg-type]

    @flavours
    def test_one_lost_code(self, flavour: str) -> None:
        small = codec(flavour)
        codes = random_codes(small.config, 24)
        lost = codes.clone()
        lost[0, 1, 20] = -1
        a, b = (small.decode(x, options=FAST) for x in (codes, lost))
        assert not torch.equal(a, b)

    @flavours
    @settings(max_examples=6)
    @given(cuts=st.lists(st.integers(1, 200), max_size=8))
    @example([8, 16, 24])
    @example([1, 2, 3, 199])
    def test_in_pieces_equals_at_once(self, flavour: str, cuts: list[int]) -> None:
        """Across several windows; pieces may end within a group or be empty of whole windows."""
        small = codec(flavour)
        codes, whole = self.long(flavour)
        edges = [0, *sorted({cut for cut in cuts if cut < codes.shape[2]}), codes.shape[2]]
        pieces = [codes[:, :, a:b] for a, b in itertools.pairwise(edges)]
        waves = list(small.iter_decode(iter(pieces), seed=5, options=FAST))
        assert torch.equal(torch.cat(waves, 1), whole)
        assert all(wave.shape[1] for wave in waves)

    @staticmethod
    @cache
    def long(flavour: str) -> tuple[Tensor, Tensor]:
        small = codec(flavour)
        codes = random_codes(small.config, 203, 2)
        return codes, small.decode(codes, seed=5, options=FAST)

    def test_in_pieces_of_nothing(self) -> None:
        assert list(codec("mini").iter_decode([])) == []

    @flavours
    def test_in_pieces_of_one_batch(self, flavour: str) -> None:
        small = codec(flavour)
        pieces = [random_codes(small.config, 8, batch) for batch in (2, 1)]
        with pytest.raises(CodesError, match="1 rows follows pieces of 2"):
            list(small.iter_decode(pieces, options=FAST))

    @flavours
    def test_without_end(self, flavour: str) -> None:
        """Constant memory: sound comes out while codes go in, and only so many are ahead."""
        small, pulled = codec(flavour), 0

        def endless() -> Iterator[Tensor]:
            nonlocal pulled
            for index in itertools.count():
                pulled += 8
                yield random_codes(small.config, 8, seed=index)

        waves = small.iter_decode(endless(), options=FAST)
        sent = 0
        at_once = {"official": 256 // 8, "mini": 2}[flavour]
        for wave in itertools.islice(waves, 3):
            sent += wave.shape[1]
        assert small.config.samples(pulled) - sent <= at_once * small.config.decoder.columns * 2560

    @flavours
    def test_guidance_and_the_published_sampler(self, flavour: str) -> None:
        small = codec(flavour)
        codes = random_codes(small.config, 24, 2)
        waves = [
            small.decode(codes, options=options)
            for options in (FAST, replace(FAST, guidance=3.0), replace(PUBLISHED, steps=3), SamplerOptions("ddim"))
        ]
        for a, b in itertools.combinations(waves, 2):
            assert torch.isfinite(a).all()
            assert not torch.equal(a, b)

    @pytest.mark.parametrize("frames", [1, 8, 16])
    def test_takes_arrays(self, frames: int) -> None:
        small = codec("mini")
        codes = random_codes(small.config, frames)
        want = small.decode(codes, options=FAST)
        for dtype in (np.int64, np.int32, np.uint16):
            assert torch.equal(small.decode(codes.numpy().astype(dtype), options=FAST), want)


class TestRefusals:
    @pytest.mark.parametrize(
        "codes",
        [
            torch.zeros(2, 8, dtype=torch.int64),
            torch.zeros(1, 3, 8, dtype=torch.int64),
            torch.zeros(1, 8, 2, dtype=torch.int64),
            torch.zeros(1, 2, 0, dtype=torch.int64),
            torch.zeros(0, 2, 8, dtype=torch.int64),
            torch.zeros(1, 2, 8),
            torch.zeros(1, 2, 8, dtype=torch.bool),
            torch.zeros(1, 2, 8, dtype=torch.complex64),
            np.zeros((1, 2, 8)),
        ],
    )
    def test_shape_and_dtype(self, codes: Tensor) -> None:
        with pytest.raises(CodesError, match=r"integers \[batch, 2, frames\], seen"):
            codec("mini").decode(codes)
        with pytest.raises(CodesError, match="seen"):
            list(codec("mini").iter_decode([codes]))
        with pytest.raises(CodesError, match="seen"):
            codec("mini").embed(codes)

    @pytest.mark.parametrize("codes", ["a.scodec", None, Path("a"), [[["x"]]]])
    def test_what_is_no_array(self, codes: object) -> None:
        for call in (codec("mini").decode, codec("mini").embed):
            with pytest.raises(CodesError, match="seen"):
                call(codes)  # type: ignore[operator]

    @pytest.mark.parametrize(("stream", "value"), [(0, 50), (1, 70), (0, -2), (1, -7), (0, 2**40)])
    def test_range(self, stream: int, value: int) -> None:
        codes = torch.zeros(1, 2, 8, dtype=torch.int64)
        codes[0, stream, 3] = value
        name, size = (("semantic", 50), ("acoustic", 70))[stream]
        with pytest.raises(CodesError, match=rf"{name} codes span .*{value}.* mini-100 knows 0..{size - 1}"):
            codec("mini").decode(codes)
        with pytest.raises(CodesError, match="span"):
            codec("mini").embed(codes)

    @pytest.mark.parametrize("length", [-1, 2561, 1.5, True, "9"])
    def test_length(self, length: Any) -> None:
        codes = torch.zeros(1, 2, 8, dtype=torch.int64)
        with pytest.raises(CodesError, match=f"{length!r} samples asked for; 8 frames stand for 2560"):
            codec("mini").decode(codes, length=length)
        assert codec("mini").decode(codes, length=0, options=FAST).shape == (1, 0)

    @pytest.mark.parametrize("seed", [1.5, True, "1", None, -1, 2**64])
    def test_seed(self, seed: Any) -> None:
        with pytest.raises(ConfigError, match="seed"):
            codec("mini").decode(torch.zeros(1, 2, 8, dtype=torch.int64), seed=seed)

    @pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", 1.5])
    def test_device(self, device: Any) -> None:
        with pytest.raises(ConfigError, match="device"):
            SemantiCodec.from_pretrained("mini-25", device=device)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "float32", np.float64, None])
    def test_dtype(self, dtype: Any) -> None:
        with pytest.raises(ConfigError, match="dtype"):
            SemantiCodec.from_pretrained("mini-25", dtype=dtype)

    @pytest.mark.parametrize("wrong", [{"token_rate": 99}, {"token_rate": "100"}, {"semantic_vocab_size": 5000}])
    def test_published_spelling(self, wrong: Any) -> None:
        with pytest.raises(ConfigError, match=r"the rates are 100, 50, 25, the vocabularies 4096, 8192"):
            SemantiCodec(**wrong)

    def test_two_presets(self) -> None:
        with pytest.raises(ConfigError, match="mini-100 was asked for, and the preset mini-25 too"):
            SemantiCodec.from_pretrained("mini-100", preset="mini-25")

    @flavours
    def test_half_a_codec(self, flavour: str) -> None:
        small = config(flavour)
        whole = codec(flavour)
        halves = {}
        for part in ("encoder", "decoder"):
            model = CodecModel(small, encoder=part == "encoder", decoder=part == "decoder")
            fill(model)
            model.load_state_dict({key: whole.model.state_dict()[key] for key in model.state_dict()})
            halves[part] = SemantiCodec.from_model(small, model)
        wave, codes = sound(3000), random_codes(small, 8)
        assert torch.equal(halves["encoder"].encode(wave, 16000), whole.encode(wave, 16000))
        assert torch.equal(halves["decoder"].decode(codes, options=FAST), whole.decode(codes, options=FAST))
        for call in (halves["decoder"].encode, halves["decoder"].features):
            with pytest.raises(ConfigError, match="only the decoder half is loaded"):
                call(wave, 16000)
        with pytest.raises(ConfigError, match="only the encoder half is loaded"):
            halves["encoder"].decode(codes)
        with pytest.raises(ConfigError, match="only the encoder half is loaded"):
            next(iter(halves["encoder"].iter_decode([codes])))
        assert halves["encoder"].model.latent is None
        assert {half.weights_hash for half in halves.values()} == {whole.weights_hash}
        assert whole.weights_hash != codec(flavour, 50).weights_hash
        assert halves["decoder"].model.mae is None


@pairs
def test_bfloat16(flavour: str, rate: TokenRate) -> None:
    small = codec(flavour, rate, torch.bfloat16)
    assert small.dtype == torch.bfloat16
    codes = small.encode(sound(24_000), 16000)
    in_range(codes, small.config, small.config.frames(24_000))
    wave = small.decode(codes, options=SamplerOptions(steps=1, guidance=2.0))
    assert wave.dtype == torch.float32
    assert torch.isfinite(wave).all()


def test_weights_do_not_learn() -> None:
    model = codec("mini").model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_mono_is_checked_before_it_is_mixed() -> None:
    wave = torch.zeros(1, 2, 100)
    wave[0, 0, 3], wave[0, 1, 3] = math.inf, -math.inf
    with pytest.raises(AudioError, match="2 of 200"):
        _mono16k(wave, 16000)
