"""Streaming: the four laws for every stepping object, declared latency, concealment, refusals."""

from __future__ import annotations

import copy
import itertools
import math
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import pytest
import torch
from contracts import SEEDS, Subject, check_constant, check_cuts, check_rows, check_whole, pushed, tensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import codec, config, noise, random_codes
from torch import Tensor
from torch.nn import functional

from semanticodec import StreamDecoder, StreamEncoder, windows
from semanticodec.audio import fbank
from semanticodec.codec import SemantiCodec, mono
from semanticodec.config import COLUMN, RATES, TokenRate, preset
from semanticodec.diffusion import Draw, SamplerOptions
from semanticodec.diffusion import noise as gaussian
from semanticodec.errors import AudioError, CodesError, ConfigError, StreamError
from semanticodec.latent import Conditioning, Known
from semanticodec.model import CodecModel
from semanticodec.streaming import Decoder, Encoder, Sliding, agreement
from semanticodec.streaming.encoder import EncoderState
from semanticodec.streaming.rows import masked

FAST = SamplerOptions(steps=1, guidance=1.0)
SLIDING = Sliding(hop=2, ahead=2, fade=1)
MODES = ("mini", "exact", "sliding")
CASES = [(mode, side, rate) for mode in MODES for side in ("encoder", "decoder") for rate in (100, 25)]
cases = pytest.mark.parametrize(("mode", "side", "rate"), CASES)
modes = pytest.mark.parametrize("mode", MODES)


@cache
def sound(samples: int, seed: int = 0) -> Tensor:
    """Return noise whose level keeps changing, so that codes do too."""
    level = torch.sin(torch.arange(samples) / 900) * torch.sin(torch.arange(samples) / 7001)
    return noise(samples, seed=seed, scale=0.3) * level


def slid_codes(small: SemantiCodec, wave: Tensor) -> Tensor:
    """Define the sliding encoder: every hop, the codes of a whole window of which all but a few columns are kept."""
    columns, (hop, ahead) = small.config.encoder.mae.columns, (SLIDING.hop, SLIDING.ahead)
    count = -(-wave.shape[1] // (hop * COLUMN))
    before = (columns - hop - ahead) * COLUMN
    padded = functional.pad(wave[0], (before, count * hop * COLUMN + ahead * COLUMN + 240 - wave.shape[1]))
    kept = []
    for index in range(count):
        start = index * hop * COLUMN
        codes = small.encode_windows(fbank(padded[start : start + columns * COLUMN + 240])[None])
        last = small.config.frames((columns - ahead) * COLUMN)
        kept.append(codes[:, :, last - small.config.frames(hop * COLUMN) : last])
    return torch.cat(kept, 2)[:, :, : small.config.frames(wave.shape[1])]


def slid_wave(small: SemantiCodec, codes: Tensor, seed: int) -> Tensor:
    """Define the sliding decoder: the last columns of ever later windows, faded into each other."""
    settings_ = small.config.decoder
    per_hop = small.config.frames(SLIDING.hop * COLUMN)
    count = -(-codes.shape[2] // per_hop)
    filled = functional.pad(codes, (0, count * per_hop - codes.shape[2]), value=-1)
    fade, hop = SLIDING.fade * COLUMN, SLIDING.hop * COLUMN
    result = torch.zeros(1, count * hop)
    rising = torch.linspace(0, 1, fade, dtype=torch.float64).float()
    for end in range(1, count + 1):
        first = max(0, end - settings_.columns // SLIDING.hop)
        shape = (8, SLIDING.hop * 4, 16)
        many = -(-settings_.columns // SLIDING.hop)

        def draw(step: int, first: int = first, shape: tuple[int, ...] = shape, many: int = many) -> Tensor:
            blocks = [gaussian(seed, first + block, step, shape) for block in range(many)]
            return torch.cat(blocks, 1)[None, :, : settings_.columns * 4]

        window = windows.generate_rows(small.model, [filled[:, :, first * per_hop : end * per_hop]], draw, FAST)
        here = window[:, : (end - first) * hop]
        if end == 1:
            result[:, :hop] = here
        else:
            start = (end - 1) * hop - fade
            new = here[:, -hop - fade :]
            result[:, start : start + fade] = new[:, :fade] * rising + result[:, start : start + fade] * rising.flip(0)
            result[:, start + fade : end * hop] = new[:, fade:]
    return result[:, : small.config.samples(codes.shape[2])]


@cache
def subject(mode: str, side: str, rate: TokenRate) -> Subject:
    small = codec("mini" if mode == "mini" else "official", rate)
    sliding = SLIDING if mode == "sliding" else None
    if side == "encoder":
        return Subject(
            Encoder(small, sliding),
            lambda _: StreamEncoder(small, sliding=sliding),
            lambda samples, seed: sound(samples, seed)[None],
            lambda wave, _: slid_codes(small, wave) if sliding else small.encode(wave, 16000),
        )
    return Subject(
        Decoder(small, FAST, sliding),
        lambda seed: StreamDecoder(small, seed, FAST, sliding=sliding),
        lambda frames, seed: random_codes(small.config, frames, seed=seed),
        lambda codes, seed: slid_wave(small, codes, seed) if sliding else small.decode(codes, seed=seed, options=FAST),
    )


def units(one: Subject) -> st.SearchStrategy[int]:
    """Draw lengths around the edges of steps, and any others; long enough for sliding windows to slide (8 columns)."""
    edges = [hops * one.hop + rest for hops in range(7) for rest in (0, 1, one.span - one.hop, one.span - one.hop + 1)]
    return st.one_of(st.sampled_from([edge for edge in edges if edge]), st.integers(1, 6 * one.hop))


@cases
class TestLaws:
    @settings(max_examples=6)
    @given(data=st.data())
    def test_steps_and_flush_make_the_whole(self, mode: str, side: str, rate: TokenRate, data: st.DataObject) -> None:
        one = subject(mode, side, rate)
        check_whole(one, data.draw(units(one)))

    def test_a_long_signal(self, mode: str, side: str, rate: TokenRate) -> None:
        one = subject(mode, side, rate)
        check_whole(one, 6 * one.hop + 1)

    @settings(max_examples=6)
    @given(data=st.data())
    def test_any_cut_gives_the_same(self, mode: str, side: str, rate: TokenRate, data: st.DataObject) -> None:
        one = subject(mode, side, rate)
        length = data.draw(units(one))
        check_cuts(one, length, data.draw(st.lists(st.integers(0, length), max_size=9)))

    @settings(max_examples=4)
    @given(
        schedule=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=3, max_size=5),
        restart=st.integers(0, 4),
    )
    @example([[True, False, True], [True, True, True], [False, False, False], [True, True, False]], 2)
    def test_rows_are_alone(
        self, mode: str, side: str, rate: TokenRate, schedule: list[list[bool]], restart: int
    ) -> None:
        check_rows(subject(mode, side, rate), schedule, restart)

    def test_state_stays_as_it_is(self, mode: str, side: str, rate: TokenRate) -> None:
        check_constant(subject(mode, side, rate), 12)


class Broken(Encoder):
    """Law-breakers of several kinds, to see that the laws can fail."""

    def __init__(self, fault: str) -> None:
        super().__init__(codec("mini"))
        self.fault, self.shared = fault, 0

    def _advance(self, samples: Tensor, state: EncoderState, *, last: bool) -> tuple[Tensor, EncoderState]:
        codes, after = super()._advance(samples, state, last=last)
        if self.fault == "forgets":
            after = EncoderState(torch.zeros_like(after.before))
        if self.fault == "hides state":
            self.shared += 1
            codes = (codes + self.shared) % 50
        if self.fault == "mixes rows":
            codes = (codes + len(codes)) % 50
        if self.fault == "writes to the old state":
            state.before.zero_()
        if self.fault == "grows":
            after = EncoderState(torch.cat([state.before, samples], 1))
        return codes, after


@pytest.mark.parametrize("fault", ["forgets", "hides state", "mixes rows", "writes to the old state", "grows"])
def test_the_laws_can_fail(fault: str) -> None:
    def laws() -> None:
        for check in (
            lambda one: check_whole(one, 3 * one.hop),
            lambda one: check_rows(one, [[True, True], [False, True], [True, True], [True, False]], 9),
            lambda one: check_constant(one, 3),
        ):
            check(replace(subject("mini", "encoder", 100), steps=Broken(fault)))

    with pytest.raises((AssertionError, RuntimeError)):
        laws()


@pytest.mark.parametrize("call", ["each", "active", "all"])
def test_rows_that_take_no_part(call: Literal["each", "active", "all"]) -> None:
    """All ways to call a network agree; "all" is what happens on a GPU, where shapes stay the same."""
    given = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [5.0, 6.0]])
    state = EncoderState(torch.tensor([[10.0], [20.0], [30.0]]))
    batches = []

    def advance(given: Tensor, state: EncoderState, rows: Sequence[int]) -> tuple[Tensor, EncoderState]:
        batches.append(list(rows))
        return given.sum(1, keepdim=True) + state.before, EncoderState(state.before + given[:, :1])

    blank = torch.full((1, 1), -7.0)
    out, after = masked(advance, given, state, torch.tensor([True, False, True]), blank, call)
    assert out.tolist() == [[13.0], [-7.0], [41.0]]
    assert after.before.tolist() == [[11.0], [20.0], [35.0]]
    assert batches == {"each": [[0], [2]], "active": [[0, 2]], "all": [[0, 1, 2]]}[call]
    out, after = masked(advance, given, state, torch.zeros(3, dtype=torch.bool), blank, call)
    assert out.tolist() == [[-7.0]] * 3
    assert torch.equal(after.before, state.before)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_gpu_steps_what_the_cpu_steps(mode: str) -> None:
    """On another device results agree up to rounding, and rows that take no part stay exactly as they are."""
    for side in ("encoder", "decoder"):
        one = subject(mode, side, 100)
        small = SemantiCodec.from_model(one.steps.codec.config, copy.deepcopy(one.steps.codec.model).cuda())
        sliding = SLIDING if mode == "sliding" else None
        steps = Encoder(small, sliding) if side == "encoder" else Decoder(small, FAST, sliding)
        there = replace(one, steps=steps)
        given = torch.cat([one.make(one.span, row) for row in range(3)])
        active = torch.tensor([True, False, True])
        (a, after), (b, moved) = (x.step(given, x.steps.begin(3), SEEDS[:3], active) for x in (one, there))
        assert b.device.type == "cuda"
        if side == "encoder":
            assert (a == b.cpu()).float().mean() > 0.95
        else:
            torch.testing.assert_close(b.cpu(), a, rtol=0, atol=1e-2)
        for untouched, new in zip(tensors(steps.begin(1)), tensors(moved.rows()[1]), strict=True):
            assert torch.equal(untouched, new)
        assert len(after) == len(moved) == 3


class TestFront:
    """The ragged remainder: sample rates, channels, kinds of arrays."""

    @settings(max_examples=25)
    @given(
        rate=st.sampled_from([8000, 16000, 22050, 44100, 48000]),
        channels=st.integers(1, 8),
        samples=st.integers(1, 30_000),
        cuts=st.lists(st.integers(0, 30_000), max_size=6),
    )
    @example(44100, 2, 30_000, list(range(0, 30_000, 441)))
    @example(48000, 1, 1, [])
    def test_any_rate_and_channels(self, rate: int, channels: int, samples: int, cuts: list[int]) -> None:
        small = codec("mini")
        wave = sound(240_000)[: samples * channels].reshape(channels, samples)
        stream = StreamEncoder(small, rate, channels)
        want = small.encode(wave[None], rate)
        for _ in range(2):
            assert torch.equal(torch.cat(pushed(stream, wave, cuts), 2), want)

    def test_averages_samples_wherever_they_are_cut(self) -> None:
        """Sums over channels must not depend on how many samples are summed at once."""
        wave = noise(7, 4001)
        parts = [wave[:, a:b] for a, b in itertools.pairwise([0, 1, 9, 40, 111, 2048, 4001])]
        assert torch.equal(torch.cat([mono(part[None]) for part in parts], 1), mono(wave[None]))

    def test_takes_arrays(self) -> None:
        small = codec("mini")
        wave, codes = sound(9000), random_codes(small.config, 20)
        encoder, decoder = StreamEncoder(small), StreamDecoder(small, options=FAST)
        pieces = [encoder.push(wave.numpy()), encoder.push(np.zeros((1, 0), np.float32)), encoder.flush()]
        assert torch.equal(torch.cat(pieces, 2), small.encode(wave, 16000))
        waves = [decoder.push(codes.numpy().astype(np.uint16)), decoder.push(codes[:, :, :0]), decoder.flush()]
        assert torch.equal(torch.cat(waves, 1), small.decode(codes, options=FAST))

    @modes
    def test_nothing_gives_nothing(self, mode: str) -> None:
        encoder, decoder = (subject(mode, side, 100).stream(0) for side in ("encoder", "decoder"))
        assert encoder.flush().shape == (1, 2, 0)
        assert decoder.flush().shape == (1, 0)

    @pytest.mark.parametrize(("rate", "soxr"), [(16000, 0), (48000, 37), (44100, 40), (8000, 115)])
    def test_holds_no_more_than_it_says(self, rate: int, soxr: int) -> None:
        """Constant memory, and codes as soon as they can be: look-ahead and what the resampler holds back (in ms)."""
        stream = StreamEncoder(codec("mini"), rate)
        frames, piece = 0, rate // 100
        for pieces in range(1, 800):
            frames += stream.push(sound(piece, pieces % 10)).shape[2]
            assert stream._held.untyped_storage().nbytes() < 4 * stream.encoder.latency
            ready = 160 * pieces - stream.encoder.lookahead - 16 * soxr
            assert frames >= 16 * (ready // 5120)


class TestLatency:
    @modes
    @pytest.mark.parametrize("rate", [100, 25])
    def test_encoder_looks_as_far_ahead_as_declared(self, mode: str, rate: TokenRate) -> None:
        """Codes are decisions, which a small change may leave as they are: what they are made of shows every change."""
        one = subject(mode, "encoder", rate)
        model = one.steps.codec.model
        wave, edge = sound(4 * one.hop)[None], 2 * one.hop + one.steps.lookahead
        nearer, farther = wave.clone(), wave.clone()
        farther[:, edge:] = 100.0
        nearer[:, edge - 1] = 100.0
        features: list[Tensor] = []
        handle = model.residual.register_forward_pre_hook(lambda _, args: features.append(args[0]))
        codes = [stepped_codes(one, x, 2) for x in (wave, farther, nearer)]
        handle.remove()
        (first, base), (_, far), (same, near) = (features[2 * index : 2 * index + 2] for index in range(3))
        assert torch.equal(codes[1], codes[0])
        assert torch.equal(far, base)
        assert torch.equal(same, first)
        kept = slice(None, base.shape[1] - one.steps.codec.config.frames(one.steps.lookahead - 240))
        assert not torch.equal(near[:, kept][:, -one.steps.frames :], base[:, kept][:, -one.steps.frames :])

    @modes
    @pytest.mark.parametrize("rate", [100, 25])
    def test_decoder_looks_as_far_ahead_as_declared(self, mode: str, rate: TokenRate) -> None:
        one = subject(mode, "decoder", rate)
        frames, ahead = one.steps.frames, one.steps.ahead
        codes = random_codes(one.steps.codec.config, 4 * frames + ahead)
        other = random_codes(one.steps.codec.config, 4 * frames + ahead, seed=1)
        edge = 2 * frames + ahead
        farther, nearer = (torch.cat([codes[..., :at], other[..., at:]], 2) for at in (edge, edge - 1))
        whole, far, near = (one.whole(x, 0)[0] for x in (codes, farther, nearer))
        end = 2 * one.steps.block - one.steps.lag
        assert torch.equal(whole[:end], far[:end])
        assert not torch.equal(whole[:end], near[:end])
        differs = (whole != far).nonzero()
        assert end <= int(differs[0]) < end + 320

    @modes
    @pytest.mark.parametrize("rate", [100, 25])
    def test_delay_is_what_a_listener_hears(self, mode: str, rate: TokenRate) -> None:
        """Samples go in 80 at a time; the worst wait for any of them is the declared one, and no less."""
        encoder, decoder = (subject(mode, side, rate).stream(0) for side in ("encoder", "decoder"))
        total = 2 * math.lcm(encoder.encoder.block, decoder.decoder.block) + decoder.decoder.latency
        wave, heard, worst = sound(min(total, 330_000)), 0, 0
        for end in range(80, len(wave) + 1, 80):
            codes = encoder.push(wave[end - 80 : end])
            out = decoder.push(codes).shape[1]
            if out:
                worst = max(worst, end - heard)
            heard += out
        assert worst == decoder.decoder.delay(encoder.encoder)

    @pytest.mark.parametrize("rate", RATES)
    def test_mini_is_fast_enough(self, rate: TokenRate) -> None:
        small = shell(f"mini-{rate}")
        encoder, decoder = Encoder(small), Decoder(small)
        assert (encoder.block, encoder.lookahead, encoder.latency) == (5120, 240, 5360)
        assert (decoder.block, decoder.lookahead, decoder.latency) == (5120, 960, 6080)
        assert decoder.delay(encoder) == 6320 <= 16 * 400  # 395 ms; 640 are allowed, 400 are "low delay"

    @pytest.mark.parametrize("rate", RATES)
    def test_official(self, rate: TokenRate) -> None:
        small = shell(f"semanticodec-{rate}-4096")
        assert Decoder(small).delay(Encoder(small)) > 16 * 10_240
        encoder, decoder = Encoder(small, Sliding()), Decoder(small, sliding=Sliding())
        assert (encoder.block, encoder.lookahead, decoder.lookahead) == (5120, 5360, 2560)
        assert decoder.delay(encoder) == 13_040  # 815 ms


def shell(name: str) -> SemantiCodec:
    """Return a preset without values: only its geometry."""
    with torch.device("meta"):
        return SemantiCodec.from_model(preset(name), CodecModel(preset(name)))


def stepped_codes(one: Subject, wave: Tensor, steps: int) -> Tensor:
    state, codes = one.steps.begin(1), []
    for index in range(steps):
        block, state = one.step(wave[:, index * one.hop :][:, : one.span], state, [0])
        codes.append(block)
    return torch.cat(codes, 2)


class TestHours:
    def test_a_session_may_be_old(self) -> None:
        """Eleven years in, blocks still follow each other, and only the noise is another."""
        one = subject("mini", "decoder", 100)
        given = one.make(16, 0)
        _, state = one.step(given, one.steps.begin(1), [0])
        old = replace(state, window=state.window + 10**9)
        (young, _), (wave, after) = (one.step(given, x, [0]) for x in (state, old))
        assert after.window.tolist() == [10**9 + 2]
        assert torch.isfinite(wave).all()
        assert not torch.equal(young, wave)

    @pytest.mark.slow
    @pytest.mark.parametrize("side", ["encoder", "decoder"])
    def test_costs_stay_the_same(self, side: str) -> None:
        """Eight minutes of mini: processor time and memory of the last steps are those of the first."""
        one = subject("mini", side, 100)
        stream, pieces = one.stream(0), [one.make(one.hop, seed) for seed in range(10)]
        pieces = [piece[0] if side == "encoder" else piece for piece in pieces]

        def run(steps: int) -> tuple[float, int]:
            started = time.process_time()
            for step in range(steps):
                stream.push(pieces[step % 10])
            return time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        run(100)
        (first, before), (last, after) = run(300), [run(300) for _ in range(4)][-1]
        assert last < 1.3 * first
        assert after - before < 20_000  # kB


class TestLoss:
    def test_mini_conceals_with_its_past_and_the_unconditional_embedding(self) -> None:
        """A lost block is conditioned on nothing but the latents (and codes) before it: guidance has no say."""
        one = subject("mini", "decoder", 100)
        model = one.steps.codec.model
        latent = model.latent
        assert latent is not None
        _, state = one.step(one.make(16, 0), one.steps.begin(1), [1])
        lost, seen = torch.full((1, 2, 16), -1), []
        original = latent.generate

        def generate(asked: Conditioning, absent: Conditioning, draw: Draw, _: object, known: Known) -> Tensor:
            seen.append((asked, absent, known))
            return original(asked, absent, draw, FAST, known)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(latent, "generate", generate)
            wave, _ = one.step(lost, state, [1])
        asked, absent, known = seen[0]
        assert torch.equal(asked.concat, absent.concat)
        nothing = model.conditioner(torch.zeros(1, 16, sum(model.conditioner.widths)))
        assert torch.equal(asked.concat, torch.cat([state.features, nothing], 2))
        assert torch.equal(known.latents, state.latents)
        assert known.present.all()
        strong = Decoder(one.steps.codec, replace(FAST, guidance=3.0))
        torch.testing.assert_close(strong.step(lost, state, [1])[0], wave, rtol=0, atol=1e-4)
        received = one.make(16, 9)
        assert (strong.step(received, state, [1])[0] - one.step(received, state, [1])[0]).abs().max() > 1e-3

    @modes
    def test_what_is_lost_comes_from_its_neighbours_and_the_seed(self, mode: str) -> None:
        one = subject(mode, "decoder", 100)
        hop, span = one.hop, one.span
        streams = [one.make(2 * hop + span, row) for row in range(2)]
        lost = [codes.clone() for codes in streams]
        for codes in lost:
            codes[:, :, hop : 2 * hop] = -1
        at = slice(one.steps.block, 2 * one.steps.block - one.steps.lag)
        first, second, reseeded = (one.whole(*given)[:, at] for given in ((lost[0], 0), (lost[1], 0), (lost[0], 1)))
        again = torch.cat(pushed(one.stream(0), lost[0], [hop, 2 * hop]), 1)[:, at]
        assert torch.equal(first, again)
        for other in (second, reseeded, one.whole(streams[0], 0)[:, at]):
            assert not torch.equal(first, other)
            assert torch.isfinite(other).all()

    def test_losing_everything_is_survived(self) -> None:
        stream = StreamDecoder(codec("mini"), options=FAST)
        for _ in range(60):
            wave = stream.push(torch.full((1, 2, 16), -1))
            assert torch.isfinite(wave).all()
        assert wave.shape == (1, 5120)


def test_agreement_counts_equal_codes() -> None:
    """On random weights this says nothing of quality, only that the measure counts."""
    small, wave = codec("official"), sound(60_000)
    slid = slid_codes(small, wave[None])
    want = (slid == small.encode(wave, 16000)).double().mean((0, 2))
    seen = agreement(small, wave, 16000, SLIDING)
    assert seen == pytest.approx(tuple(want.tolist()))
    assert 0 < seen[0] < 1
    # One window, hop and look-ahead together as long as itself: the file's own first window but for the last rows.
    everything = Sliding(hop=8, ahead=0, fade=1)
    assert agreement(small, sound(8 * COLUMN), 16000, everything)[0] > 0.9


class TestRefusals:
    def test_half_a_codec(self) -> None:
        for half, build in (("encoder", StreamDecoder), ("decoder", StreamEncoder)):
            model = CodecModel(config("mini"), encoder=half == "encoder", decoder=half == "decoder")
            with pytest.raises(ConfigError, match=f"only the {half} half is loaded"):
                build(SemantiCodec.from_model(config("mini"), model))

    @pytest.mark.parametrize("values", [(0, 2, 1), (2, -1, 1), (2, 2, 0), (2, 2, 3)])
    def test_sliding_that_makes_no_sense(self, values: tuple[int, int, int]) -> None:
        with pytest.raises(ConfigError, match="makes no sense"):
            Sliding(*values)

    @pytest.mark.parametrize(
        ("flavour", "rate", "sliding", "complaint"),
        [
            ("mini", 100, SLIDING, "leave sliding out"),
            ("official", 25, Sliding(1, 2, 1), "multiples of 2"),
            ("official", 25, Sliding(2, 1, 1), "multiples of 2"),
            ("official", 100, Sliding(7, 2, 1), "hop at most 6"),
        ],
    )
    def test_sliding_that_does_not_fit(self, flavour: str, rate: TokenRate, sliding: Sliding, complaint: str) -> None:
        for build in (Encoder, Decoder):
            with pytest.raises(ConfigError, match=complaint):
                build(codec(flavour, rate), sliding=sliding)

    def test_samples(self) -> None:
        stream = StreamEncoder(codec("mini"), 16000, 2)
        want = codec("mini").encode(sound(12_000).reshape(1, 2, 6000), 16000)
        pieces = [stream.push(sound(12_000).reshape(2, 6000))]
        bad = torch.zeros(2, 10)
        bad[1, 3] = math.nan
        for wrong, complaint in (
            (torch.zeros(10), r"\[2, samples\] are expected, seen \(10,\)"),
            (torch.zeros(3, 10), r"seen \(3, 10\)"),
            (torch.zeros(1, 2, 10), r"seen \(1, 2, 10\)"),
            (torch.zeros(2, 10, dtype=torch.int16), "floating point"),
            (bad, "1 of 20 samples"),
        ):
            with pytest.raises(AudioError, match=complaint):
                stream.push(wrong)
        assert torch.equal(torch.cat([*pieces, stream.flush()], 2), want)
        with pytest.raises(AudioError, match=r"sample rate.* 10 "):
            StreamEncoder(codec("mini"), 10)

    def test_codes(self) -> None:
        codes = random_codes(config("mini"), 20)
        stream = StreamDecoder(codec("mini"), options=FAST)
        pieces = [stream.push(codes)]
        for wrong, complaint in (
            (codes[0], r"\[1, 2, frames\], seen \(2, 20\)"),
            (codes.expand(2, -1, -1), "one stream per row"),
            (codes + 70, "acoustic codes span|semantic codes span"),
            (codes.float(), "must be integers"),
        ):
            with pytest.raises(CodesError, match=complaint):
                stream.push(wrong)
        assert torch.equal(torch.cat([*pieces, stream.flush()], 1), codec("mini").decode(codes, options=FAST))

    def test_steps(self) -> None:
        encoder, decoder = Encoder(codec("mini")), Decoder(codec("mini"), FAST)
        with pytest.raises(StreamError, match=r"\(2, 5360\) \(rows, block \+ lookahead\), seen \(2, 5120\)"):
            encoder.step(torch.zeros(2, 5120), encoder.begin(2))
        with pytest.raises(StreamError, match="active must be bool"):
            encoder.step(torch.zeros(2, 5360), encoder.begin(2), torch.ones(2))
        with pytest.raises(StreamError, match="are left to code"):
            encoder.finish(torch.zeros(3, 10), encoder.begin(2))
        codes = random_codes(config("mini"), 16, 2)
        with pytest.raises(StreamError, match=r"seen .* and 1 seeds"):
            decoder.step(codes, decoder.begin(2), [0])
        with pytest.raises(StreamError, match="fewer than 16"):
            decoder.finish(codes, decoder.begin(2), [0, 0])
        exact = Decoder(codec("official"), FAST)
        _, state = exact.step(random_codes(config("official"), 64), exact.begin(1), [0])
        with pytest.raises(StreamError, match="give them too"):
            exact.finish(random_codes(config("official"), 15), state, [0])
