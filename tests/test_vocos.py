"""The magnitude vocoder: exact length, declared context, sound that continues where the last block ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import fill, noise
from torch import Tensor

from semanticodec.config import VocosConfig, preset
from semanticodec.errors import ConfigError
from semanticodec.nn.vocos import Memory, Vocos

NARROW = replace(VocosConfig(), dim=8, hidden=12)
CONFIGS = [
    NARROW,
    replace(NARROW, layers=2, right=(2, 0, 1), kernel=5, n_fft=640, iterations=2),
    replace(NARROW, right=(0,) * 7),
]


def vocoder(config: VocosConfig = NARROW) -> Vocos:
    module = Vocos(config)
    fill(module)
    return module.requires_grad_(False).eval()


def history(config: VocosConfig) -> int:
    """Mel rows before a row that its magnitudes depend on."""
    return (config.kernel - 1) * len(config.right) - sum(config.right)


def given_magnitudes(module: Vocos, wave: Tensor) -> Tensor:
    """Return what a perfect network would say of ``[B, S]``: log-magnitudes ``[B, rows, bins]``."""
    frames = wave.unfold(1, module.config.n_fft, 160) * module.window
    return torch.fft.rfft(frames).abs().clamp_min(1e-6).log()


def test_official_numbers_of_mini() -> None:
    vocos = preset("mini-100").decoder.latent.vocoder
    assert isinstance(vocos, VocosConfig)
    module = Vocos(vocos)
    memory = module.begin(1, -11.5)
    assert (module.margin, module.overhang, module.anchor, module.lookahead) == (432, 3, 4, 6)
    assert [tuple(part.shape) for part in memory] == [(1, 64 + 6 * 256, 6), (1, 4 + 3, 513), (1, 432 + 4 * 160)]


@pytest.mark.parametrize("wrong", [{"kernel": 1, "right": (0,) * 7}, {"right": (1,) * 7}])
def test_no_context_or_more_than_one_kernel_of_future_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="kernels have at least 2 rows"):
        Vocos(replace(NARROW, **wrong))


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_length(rows: int) -> None:
    wave = vocoder()(noise(2, 64, rows))
    assert (wave.shape, wave.dtype) == ((2, 160 * rows), torch.float32)
    assert torch.isfinite(wave).all()


@pytest.mark.parametrize("config", CONFIGS)
class TestContext:
    ROW = 60

    def changed(self, config: VocosConfig, row: int) -> bool:
        """Tell whether the middle row's magnitudes change with the given mel row."""
        module, mel = vocoder(config), noise(1, 64, 120)
        for block in module.blocks:
            block.gamma.fill_(4.0)  # so that the way through all layers is not lost in rounding
        other = mel.clone()
        other[:, :, row] += 5
        return bool((module.magnitude(mel) != module.magnitude(other))[0, self.ROW].any())

    def test_magnitudes_see_what_is_declared(self, config: VocosConfig) -> None:
        first, last = self.ROW - history(config), self.ROW + sum(config.right)
        assert [self.changed(config, row) for row in (first - 1, first, last, last + 1)] == [False, True, True, False]

    def test_rows_in_pieces_are_those_of_the_whole(self, config: VocosConfig) -> None:
        """After silence that filled all context, whatever the pieces."""
        module, lag = vocoder(config), sum(config.right)
        for block in module.blocks:
            block.gamma.fill_(1.0)
        mel = noise(2, 64, 40)
        silence = torch.full((2, 64, 2 * history(config)), -9.0)
        whole = module.magnitude(torch.cat([silence, mel], 2))[:, silence.shape[2] - lag : -lag or None]
        context, rows = module.begin(2, -9.0).context, []
        for piece in mel.split([1, 2, 17, 3, 16, 1], 2):
            row, context = module.next_magnitude(piece, context)
            assert row.shape == (2, piece.shape[2], config.n_fft // 2 + 1)
            rows.append(row)
        torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-4, atol=1e-4)

    def test_extending(self, config: VocosConfig) -> None:
        """A block takes its rows and a memory, and knows nothing else."""
        module = vocoder(config)
        mel, memory = noise(2, 64, 7), module.begin(2, -11.5)
        _, memory = module.extend(noise(2, 64, 30, seed=2), memory)
        assert memory.wave.any()
        wave, after = module.extend(mel, memory)
        assert (wave.shape, wave.dtype) == ((2, 7 * 160), torch.float32)
        assert torch.isfinite(wave).all()
        again, same = module.extend(mel, memory)
        assert torch.equal(wave, again)
        assert all(map(torch.equal, after, same))
        start = module.begin(2, -11.5)
        assert [(part.shape, part.stride()) for part in after] == [(part.shape, part.stride()) for part in start]
        for row in range(2):
            alone, _ = module.extend(mel[row : row + 1], Memory(*(part[row : row + 1] for part in memory)))
            torch.testing.assert_close(alone[0], wave[row], rtol=1e-3, atol=1e-4 * float(wave.abs().max()))
        for field, part in memory._asdict().items():
            assert not torch.equal(module.extend(mel, memory._replace(**{field: 0.5 * part}))[0], wave)


class TestInversion:
    """With the right magnitudes, phases that continue a known sound must bring back what follows."""

    @staticmethod
    def tones(samples: int) -> Tensor:
        time = torch.arange(samples, dtype=torch.float64)
        partials = ((437.0, 0.3), (1251.0, 0.2), (2903.0, 0.1))
        return sum(a * torch.sin(2 * torch.pi * f / 16000 * time + f) for f, a in partials).float()[None]

    def test_tones_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The wave itself at first; phases may drift away from it slowly, the spectrogram may not."""
        module, rows = vocoder(), 32
        before = module.anchor + module.overhang
        wave = self.tones((before + rows - 1) * 160 + module.config.n_fft)
        asked, memory = given_magnitudes(module, wave), module.begin(1, -11.5)
        known = memory.wave.shape[1]
        monkeypatch.setattr(module, "next_magnitude", lambda _mel, context: (asked[:, before:], context))
        got, _ = module.extend(
            torch.zeros(1, 64, rows), memory._replace(magnitude=asked[:, :before].exp(), wave=wave[:, :known])
        )
        want = wave[:, known : known + rows * 160]
        assert got.shape == want.shape
        assert (got - want)[:, :160].square().mean() < 0.03 * want[:, :160].square().mean()
        heard = given_magnitudes(module, torch.cat([wave[:, :known], got], 1)).exp()
        asked = asked[:, : heard.shape[1]].exp()
        errors = (heard - asked).square().sum(-1) / asked.square().sum(-1)
        assert errors.shape[1] > rows
        assert errors.max() < 0.03

    def test_magnitudes_come_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From silence, where no phase is known, the spectrogram is what was asked for within a few dB."""
        module = vocoder(replace(NARROW, iterations=16))
        wave = self.tones(module.margin * 2 + 60 * 160)
        asked = given_magnitudes(module, wave)
        monkeypatch.setattr(module, "magnitude", lambda _mel: asked)
        got = module(torch.zeros(1, 64, asked.shape[1]))
        heard = given_magnitudes(module, got).exp()
        inside = asked.exp()[:, 3:-3][:, : heard.shape[1]]
        error = (heard[:, : inside.shape[1]] - inside).square().mean() / inside.square().mean()
        assert error < 0.1

    def test_silence_is_silent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = vocoder()
        monkeypatch.setattr(module, "_head", lambda x, _mel: torch.full((1, x.shape[2], 513), -12.0))
        wave, _ = module.extend(torch.zeros(1, 64, 10), module.begin(1, -11.5))
        assert wave.abs().max() < 1e-4


def test_magnitudes_are_bounded() -> None:
    module = vocoder()
    module.head.bias.fill_(1e4)
    assert module.magnitude(noise(1, 64, 3)).max() <= 8


def test_half_precision_works_inside_only() -> None:
    module = vocoder().bfloat16()
    extended, memory = module.extend(noise(1, 64, 50), module.begin(1, -11.5))
    assert {part.dtype for part in memory} == {torch.float32}
    for wave in (module(noise(1, 64, 9)), extended):
        assert wave.dtype == torch.float32
        assert torch.isfinite(wave).all()


def test_rows_do_not_depend_on_each_other() -> None:
    module, mel = vocoder(), noise(3, 64, 30)
    whole = module(mel)
    for row in range(3):
        alone = module(mel[row : row + 1])[0]
        torch.testing.assert_close(alone, whole[row], rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_constants_are_rebuilt_not_stored() -> None:
    assert not {"window", "start"} & set(vocoder().state_dict())
