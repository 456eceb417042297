"""How windows become one sound: where each lies, what noise it gets, and that nothing drifts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import codec, config, noise, random_codes
from torch import Tensor

from semanticodec import diffusion, published, windows
from semanticodec.config import CodecConfig, preset
from semanticodec.diffusion import INITIAL, SamplerOptions
from semanticodec.latent import Conditioning, Known
from semanticodec.model import CodecModel
from semanticodec.nn.vocos import Memory, Vocos
from semanticodec.windows import Past, begin, decode_crossfade, decode_prefix, finish, generate_windows, step

OPTIONS = SamplerOptions(steps=1, guidance=1.0)


def counting(frames: int, batch: int = 1) -> Tensor:
    """Return codes whose values are the positions of their frames."""
    return torch.arange(frames).expand(batch, 2, frames)


def split(codes: Tensor, cuts: list[int]) -> list[Tensor]:
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < codes.shape[2]}), codes.shape[2]]
    return [codes[:, :, a:b] for a, b in itertools.pairwise(edges)]


@cache
def shell(small: CodecConfig) -> CodecModel:
    """Return a model without values, for tests that put something else in their place."""
    with torch.device("meta"):
        return CodecModel(small, encoder=False)


# --- cross-fade


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Let every window sound like a clock that started with the file; return a list of (index, first, last frame)."""
    seen: list[tuple[int, int, int]] = []

    def clock(model: CodecModel, codes: list[Tensor], indices: range, *_: object) -> Tensor:
        waves = []
        for index, window in zip(indices, codes, strict=True):
            first = int(window[0, 0, 0])
            seen.append((index, first, first + window.shape[2]))
            start = first // model.config.group * model.config.group_samples
            length = model.config.decoder.columns * 2560
            waves += [torch.arange(start, start + length, dtype=torch.float64)] * len(window)
        return torch.stack(waves)

    monkeypatch.setattr(windows, "generate_windows", clock)
    return seen


def join(model: CodecModel, pieces: list[Tensor], at_once: int = 4) -> Iterator[Tensor]:
    return decode_crossfade(model, pieces, 0, OPTIONS, at_once)


class TestCrossfade:
    def test_the_clock_never_drifts(self, spans: list[tuple[int, int, int]]) -> None:
        """An hour of official windows: every sample lies where it belongs, across all 374 seams."""
        model, frames, at = shell(preset("semanticodec-100-4096")), 3600 * 50, 0
        for wave in join(model, split(counting(frames), list(range(0, frames, 997)))):
            want = torch.arange(at, at + wave.shape[1], dtype=torch.float64)
            assert (wave[0] - want).abs().max() < 1e-6
            at += wave.shape[1]
        assert at >= 3600 * 16000
        assert len(spans) == 375
        assert [index for index, *_ in spans] == list(range(375))

    @settings(max_examples=40)
    @given(
        frames=st.integers(1, 400), cuts=st.lists(st.integers(0, 400), max_size=9), rate=st.sampled_from([100, 50, 25])
    )
    def test_spans_are_the_published_ones(self, frames: int, cuts: list[int], rate: int) -> None:
        small = preset(f"semanticodec-{rate}-4096")
        frames = frames * small.window_frames // 100
        if not frames:
            return
        seen: list[tuple[int, int, int]] = []
        with pytest.MonkeyPatch.context() as patch:

            def record(model: CodecModel, codes: list[Tensor], indices: range, *_: object) -> Tensor:
                for index, window in zip(indices, codes, strict=True):
                    first = int(window[0, 0, 0])
                    assert torch.equal(window[0, 1], torch.arange(first, first + window.shape[2]))
                    seen.append((index, first, first + window.shape[2]))
                return torch.zeros(len(codes), model.config.decoder.columns * 2560)

            patch.setattr(windows, "generate_windows", record)
            for _ in join(shell(small), split(counting(frames), cuts)):
                pass
        assert [(first, last) for _, first, last in seen] == published.window_spans(frames, rate)
        assert [index for index, *_ in seen] == list(range(len(seen)))

    def test_a_constant_stays_constant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = config("official")
        monkeypatch.setattr(
            windows,
            "generate_windows",
            lambda _model, codes, *_: torch.full((sum(map(len, codes)), small.decoder.columns * 2560), 0.7),
        )
        wave = torch.cat(list(join(shell(small), [counting(5 * small.hop_frames, 2)])), 1)
        assert wave.dtype == torch.float32
        assert (wave - 0.7).abs().max() <= 2**-24

    def test_fade_is_the_published_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        small = config("official")
        made = [noise(1, 8 * 2560, seed=i) for i in range(3)]
        monkeypatch.setattr(
            windows, "generate_windows", lambda _m, _codes, indices, *_: torch.cat([made[i] for i in indices])
        )
        frames = 2 * small.hop_frames + small.window_frames
        wave = torch.cat(list(join(shell(small), [counting(frames)])), 1)
        want = published.cross_fade(made, 2 * 2560)
        torch.testing.assert_close(wave, want, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("batch", [1, 3])
    def test_takes_no_more_codes_than_it_needs(self, spans: list[tuple[int, int, int]], batch: int) -> None:
        small, at_once, pulled = config("official"), 4, 0

        def pieces() -> Iterator[Tensor]:
            nonlocal pulled
            while True:  # an endless recording
                yield counting(8, batch) + pulled
                pulled += 8

        sent = 0
        for wave in itertools.islice(join(shell(small), pieces(), at_once), 50):
            sent += wave.shape[1]
            held = small.samples(pulled + 8) - sent
            assert 0 < held <= at_once * small.decoder.columns * 2560
        assert len(spans) <= 50 + at_once
        assert spans[-1][0] == len(spans) - 1


class TestGenerateWindows:
    def test_rows_and_noise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Window-major, each row with the noise of its window and the context of its codes, chunk size regardless."""
        small = codec("official")
        latent = small.model.latent
        assert latent is not None
        codes = [random_codes(small.config, 64, 2, seed=i) for i in range(3)]
        calls: list[tuple[Conditioning, Conditioning, Tensor]] = []

        def generate(asked: Conditioning, absent: Conditioning, draw: diffusion.Draw, _: SamplerOptions) -> Tensor:
            calls.append((asked, absent, draw(INITIAL)))
            return draw(INITIAL)

        monkeypatch.setattr(latent, "generate", generate)
        monkeypatch.setattr(latent, "mel", lambda z: z)
        monkeypatch.setattr(latent, "wave", lambda mel: mel[:, 0, 0, :4])
        for at_once in (1, 4, 100):
            calls.clear()
            waves = generate_windows(small.model, codes, range(5, 8), 7, OPTIONS, at_once)
            want = torch.stack([diffusion.noise(7, window, INITIAL, (8, 32, 16)) for window in (5, 5, 6, 6, 7, 7)])
            assert torch.equal(waves, want[:, 0, 0, :4])
            assert [len(start) for *_, start in calls] == {1: [1] * 6, 4: [4, 2], 100: [6]}[at_once]
            contexts = torch.cat([asked.contexts[0][0] for asked, *_ in calls])
            assert torch.equal(contexts, small.model.conditioner(small.model.embed(torch.cat(codes))))
            absent = torch.cat([absent.contexts[0][0] for _, absent, _ in calls])
            assert not absent[..., :32].any()
            assert torch.equal(absent[..., 32:], contexts[..., 32:])

    def test_short_windows_differ_from_missing_ones(self) -> None:
        """Past the end the context is -1 (spec 4.2), where codes are missing it is 0: the unconditional embedding."""
        small = codec("official").model
        short = small.conditioner(small.embed(random_codes(small.config, 8)))
        assert (short[:, 8:, :32] == -1).all()
        missing = small.conditioner(small.embed(torch.full((1, 2, 64), -1)))
        assert not missing[..., :32].any()


# --- prefix


class Clock:
    """Latents, mel and samples that tell the time: a step's value is its number since the start of the file."""

    def __init__(self, vocoder: Vocos) -> None:
        self.vocoder = vocoder

    def generate(
        self, asked: Conditioning, _absent: Conditioning, draw: diffusion.Draw, _options: SamplerOptions, known: Known
    ) -> Tensor:
        shape = draw(INITIAL).shape
        overlap = known.latents.shape[2]
        first = torch.where(known.present, known.latents[:, 0, 0, 0], -float(overlap))
        assert asked.concat is not None
        assert asked.concat.shape[2] == shape[2]
        times = first.double()[:, None] + torch.arange(shape[2])
        return times[:, None, :, None].expand(shape)

    def mel(self, latents: Tensor) -> Tensor:
        rows = 4 * latents[:, 0, :, :1] + torch.arange(4)
        return rows.flatten(1)[..., None].expand(-1, -1, 64)

    def extend(self, mel: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Keep the rows that lag behind where the vocoder keeps its context."""
        ahead = self.vocoder.lookahead
        rows = torch.cat([memory.context[:, 0, -ahead:], mel[:, 0]], 1)
        wave = (160 * rows.double()[:, :-ahead, None] + torch.arange(160)).flatten(1)
        if (wave[:, 0] > 0).all():
            assert torch.equal(memory.wave[:, -1], wave[:, 0] - 1)
        context = rows[:, None, -ahead:].expand_as(memory.context[:, :, -ahead:])
        return wave, Memory(context, memory.magnitude, wave[:, -memory.wave.shape[1] :])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> CodecModel:
    model = codec("mini").model
    assert model.latent is not None
    fake = Clock(model.latent.vocoder)
    for name in ("generate", "mel"):
        monkeypatch.setattr(model.latent, name, getattr(fake, name))
    monkeypatch.setattr(model.latent.vocoder, "extend", fake.extend)
    return model


def lag(model: CodecModel) -> int:
    """Return by how many samples a block's sound lags behind its codes."""
    assert model.latent is not None
    return 160 * model.latent.vocoder.lookahead


class TestPrefix:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_the_clock_never_drifts(self, clock: CodecModel, batch: int) -> None:
        """A minute of blocks: latents follow the known ones, and the vocoder's lag is made up for exactly."""
        frames = 60 * 50 + 3
        codes = random_codes(clock.config, frames, batch)
        wave = torch.cat(list(decode_prefix(clock, split(codes, list(range(0, frames, 777))), 0, OPTIONS)), 1)
        blocks = -(-frames // 16)
        assert wave.shape == (batch, blocks * 5120)
        want = torch.arange(blocks * 5120, dtype=torch.float64)
        assert torch.equal(wave, want.expand(batch, -1))

    def test_blocks_get_their_own_noise(self, clock: CodecModel, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Tensor] = []

        def generate(_asked: object, _absent: object, draw: diffusion.Draw, *_: object) -> Tensor:
            seen.append(draw(INITIAL))
            return seen[-1]

        monkeypatch.setattr(clock.latent, "generate", generate)
        list(decode_prefix(clock, [random_codes(clock.config, 16 * 3 + 1, 2)], 9, OPTIONS))
        # On a CPU each of the two rows is generated alone.
        want = [diffusion.noise(9, window, INITIAL, (8, 12, 16))[None] for window in range(4) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(seen, want, strict=True))

    def test_takes_no_more_codes_than_it_needs(self, clock: CodecModel) -> None:
        pulled = 0

        def pieces() -> Iterator[Tensor]:
            nonlocal pulled
            while True:
                pulled += 8
                yield random_codes(clock.config, 8)

        sent = 0
        for wave in itertools.islice(decode_prefix(clock, pieces(), 0, OPTIONS), 40):
            sent += wave.shape[1]
            assert clock.config.samples(pulled) - sent <= 2560 + lag(clock)


@pytest.mark.parametrize("rate", [100, 50, 25])
class TestSteps:
    def test_make_the_whole(self, rate: int) -> None:
        model = codec("mini", rate).model
        block = model.config.hop_frames
        codes = random_codes(model.config, 3 * block, 2)
        whole = torch.cat(list(decode_prefix(model, [codes], 4, SamplerOptions())), 1)
        past, waves = begin(model, 2), []
        for part in codes.split(block, 2):
            wave, past = step(model, part, past, [4, 4], SamplerOptions())
            waves.append(wave)
        waves.append(finish(model, past))
        assert (past.window.tolist(), waves[-1].shape[1]) == ([3, 3], lag(model))
        stepped = torch.cat(waves, 1)
        assert torch.equal(stepped[:, lag(model) :], whole)
        assert torch.isfinite(stepped).all()

    def test_leave_the_past_alone(self, rate: int) -> None:
        model = codec("mini", rate).model
        codes = random_codes(model.config, 2 * model.config.hop_frames)
        first, second = codes.chunk(2, 2)
        _, past = step(model, first, begin(model, 1), [0], SamplerOptions())
        kept = Past(*(value.clone() for value in vars(past).values()))
        a, b = (step(model, second, past, [0], SamplerOptions()) for _ in range(2))
        assert torch.equal(a[0], b[0])
        assert all(torch.equal(x, y) for x, y in tensors(past, kept))
        assert past.latents.shape[2] == 4
        assert torch.equal(past.features, model.conditioner(model.embed(first))[:, :, -4:])

    def test_begin_is_what_training_calls_no_past(self, rate: int) -> None:
        """Training multiplies features and latents of a past that is absent with zero, and its mask is zero."""
        model = codec("mini", rate).model
        start = begin(model, 2)
        for value in (start.features, start.latents, start.present, start.wave):
            assert len(value) == 2
            assert not value.any()
        assert (start.context[:, :64] == torch.tensor(1e-5).log()).all()
        assert (start.magnitude == start.magnitude[:, :1]).all()
        _, after = step(model, random_codes(model.config, model.config.hop_frames, 2), start, [0, 0], SamplerOptions())
        assert after.present.all()
        assert [x.shape for x, _ in tensors(after, start)] == [y.shape for _, y in tensors(after, start)]


def tensors(a: Past, b: Past) -> list[tuple[Tensor, Tensor]]:
    return list(zip(vars(a).values(), vars(b).values(), strict=True))


def test_rows_of_different_age_and_seed_share_a_batch() -> None:
    """What a server needs: each row has its own past, or none, its own place in time and its own seed."""
    model = codec("mini").model
    codes = random_codes(model.config, 16, 2)
    _, old = step(model, random_codes(model.config, 16, 1, seed=5), begin(model, 1), [3], SamplerOptions())
    states = [old, begin(model, 1)]
    wave, after = step(model, codes, Past.joined(states), [3, 2**64 - 1], SamplerOptions())
    assert after.window.tolist() == [2, 1]
    for row, (past, seed) in enumerate(zip(states, (3, 2**64 - 1), strict=True)):
        alone, own = step(model, codes[row : row + 1], past, [seed], SamplerOptions())
        assert torch.equal(wave[row : row + 1], alone)
        assert all(torch.equal(x, y) for x, y in tensors(own, after.rows()[row]))


def test_states_are_chosen_row_by_row() -> None:
    model = codec("mini").model
    _, old = step(model, random_codes(model.config, 16, 3), begin(model, 3), [0] * 3, SamplerOptions())
    new = begin(model, 3)
    mixed = old.where(torch.tensor([True, False, True]), new)
    assert len(mixed) == 3
    for row, want in enumerate((old, new, old)):
        assert all(torch.equal(x, y) for x, y in tensors(mixed.rows()[row], want.rows()[row]))
