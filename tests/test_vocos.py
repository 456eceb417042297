"""The inverse-STFT vocoder: exact length, declared context, alignment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import fill, noise
from torch import Tensor

from semanticodec.config import VocosConfig, preset
from semanticodec.nn.vocos import Vocos

NARROW = replace(VocosConfig(), dim=8, hidden=12)
CONFIGS = [NARROW, replace(NARROW, layers=2, right=(2, 0, 1), kernel=5, n_fft=1024), replace(NARROW, right=(0,) * 7)]


def vocoder(config: VocosConfig) -> Vocos:
    module = Vocos(config)
    fill(module)
    return module.requires_grad_(False).eval()


@pytest.mark.parametrize("rows", [1, 2, 50])
def test_length(rows: int) -> None:
    wave = vocoder(NARROW)(noise(2, 64, rows))
    assert wave.shape == (2, 160 * rows)
    assert torch.isfinite(wave).all()


def test_mini_declares_its_context() -> None:
    vocos = preset("mini-100").decoder.vocoder
    assert isinstance(vocos, VocosConfig)
    with torch.device("meta"):
        module = Vocos(vocos)
    assert (module.history, module.lookahead) == (40, 6)


@pytest.mark.parametrize("config", CONFIGS)
class TestContext:
    ROW = 60

    def changed(self, config: VocosConfig, rows: slice) -> Tensor:
        """Return which samples of the middle row change with the given mel rows."""
        module, mel = vocoder(config), noise(1, 64, 120)
        for block in module.blocks:
            block.gamma.fill_(4.0)  # so that the way through all layers is not lost in rounding
        other = mel.clone()
        other[:, :, rows] += 5
        span = slice(160 * self.ROW, 160 * (self.ROW + 1))
        return (module(mel) != module(other))[0, span]

    def test_nothing_outside_is_heard(self, config: VocosConfig) -> None:
        module = vocoder(config)
        assert not self.changed(config, slice(0, self.ROW - module.history)).any()
        assert not self.changed(config, slice(self.ROW + module.lookahead + 1, None)).any()

    def test_both_ends_are_heard(self, config: VocosConfig) -> None:
        module = vocoder(config)
        assert self.changed(config, slice(self.ROW - module.history, self.ROW - module.history + 1)).any()
        assert self.changed(config, slice(self.ROW + module.lookahead, self.ROW + module.lookahead + 1)).any()

    def test_a_piece_with_its_context_is_enough(self, config: VocosConfig) -> None:
        module, mel = vocoder(config), noise(1, 64, 120)
        back, ahead = module.history, module.lookahead
        whole = module(mel)
        piece = module(mel[:, :, 50 - back : 70 + ahead])[:, 160 * back : 160 * (back + 20)]
        torch.testing.assert_close(piece, whole[:, 160 * 50 : 160 * 70], rtol=1e-4, atol=1e-5)


def test_a_spectrum_becomes_its_sound() -> None:
    """Row t is the spectrum around sample 160 t + 80; a steady sine's spectra add up to that sine."""
    module = vocoder(replace(NARROW, n_fft=640))
    rows, samples = 40, torch.arange(-240, 160 * 40 + 240, dtype=torch.float64)
    sine = torch.sin(2 * torch.pi * 500 / 16000 * samples + 0.3)
    frames = sine.unfold(0, 640, 160) * module.window.double()
    spectrum = torch.fft.rfft(frames).T[None].to(torch.complex64)
    assert spectrum.shape == (1, 321, rows)
    module.spectrum = lambda _mel: spectrum  # type: ignore[method-assign]
    wave = module(noise(1, 64, rows))[0]
    torch.testing.assert_close(wave, sine[240:-240].float(), rtol=0, atol=1e-4)


def test_magnitudes_are_bounded() -> None:
    module = vocoder(NARROW)
    module.head.bias.fill_(1e4)
    assert module.spectrum(noise(1, 64, 3)).abs().max() <= 149  # e^5


def test_half_precision_works_inside_only() -> None:
    module = vocoder(NARROW).bfloat16()
    wave = module(noise(1, 64, 9))
    assert wave.dtype == torch.float32
    assert torch.isfinite(wave).all()


def test_rows_do_not_depend_on_each_other() -> None:
    module, mel = vocoder(NARROW), noise(3, 64, 30)
    whole = module(mel)
    for row in range(3):
        torch.testing.assert_close(module(mel[row : row + 1])[0], whole[row], rtol=1e-4, atol=1e-6)
