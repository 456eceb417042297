"""How one decoded block follows another: three ways, one shape.  B rows, F frames, S samples at 16 kHz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from .. import windows
from ..config import COLUMN, HOP, LATENT_ROWS, MEL_BINS
from ..diffusion import Draw, SamplerOptions, noise
from ..errors import StreamError
from ..model import MISSING, CodecModel
from ..nn.vocos import Vocos
from ..windows import STEPS, Past, State, draw_windows, faded, generate_rows
from .encoder import Sliding

S = TypeVar("S", bound=State)


class Join(Protocol[S]):
    """What :class:`~semanticodec.streaming.Decoder` needs of a way to join blocks; see its attributes."""

    frames: int
    ahead: int
    lag: int

    def begin(self, batch: int) -> S:
        """Return the state before any code."""

    def advance(self, codes: Tensor, state: S, seeds: Sequence[int]) -> tuple[Tensor, S]:
        """Decode ``[B, 2, frames + ahead]`` to ``[B, block]`` and the new state."""

    def finish(self, codes: Tensor, state: S, seed: int) -> Tensor:
        """Decode the rest ``[1, 2, F]`` of one row, and at least as many samples as that and the lag stand for."""


class Prefix:
    """Mini: every block is given the latents before it; the vocoder lags behind."""

    def __init__(self, model: CodecModel, options: SamplerOptions) -> None:
        assert model.latent is not None
        assert isinstance(model.latent.vocoder, Vocos)
        self.frames, self.ahead = model.config.hop_frames, 0
        self.lag = model.latent.vocoder.lookahead * HOP
        self._model, self._options = model, options

    def begin(self, batch: int) -> Past:
        """Return the state before any code."""
        return windows.begin(self._model, batch)

    def advance(self, codes: Tensor, state: Past, seeds: Sequence[int]) -> tuple[Tensor, Past]:
        """Decode one block."""
        return windows.step(self._model, codes, state, seeds, self._options)

    def finish(self, codes: Tensor, state: Past, seed: int) -> Tensor:
        """Decode the rest, filled up with missing codes, and what the vocoder holds back."""
        if not codes.shape[2]:
            return windows.finish(self._model, state)
        wave, state = self.advance(_filled(codes, self.frames), state, [seed])
        return torch.cat([wave, windows.finish(self._model, state)], 1)


@dataclass(frozen=True)
class Tail(State):
    """What a decoder of cross-faded windows remembers.

    Args:
        wave: the end of the last window ``[B, fade]``, to be faded out.
        codes: codes ``[B, 2, F]`` that the next window needs again, the newest last.
        window: index of the next window, int64 ``[B]`` on the CPU, where noise is drawn.
    """

    wave: Tensor
    codes: Tensor
    window: Tensor


def _begin(batch: int, fade: int, frames: int, device: torch.device) -> Tail:
    codes = torch.full((batch, 2, frames), MISSING, device=device)
    return Tail(torch.zeros(batch, fade, device=device), codes, torch.zeros(batch, dtype=torch.int64))


def _enter(state: Tail, head: Tensor) -> Tensor:
    """Fade in the beginning of a window, unless it is a row's first."""
    first = (state.window == 0).to(head.device)
    return torch.where(first[:, None], head, faded(state.wave, head))


class Fade:
    """Official presets as files are decoded: whole windows, generated independently and cross-faded."""

    def __init__(self, model: CodecModel, options: SamplerOptions) -> None:
        config = model.config
        self.frames, self.ahead, self.lag = config.hop_frames, config.window_frames - config.hop_frames, 0
        self._fade = config.decoder.overlap * COLUMN
        self._model, self._options = model, options

    def begin(self, batch: int) -> Tail:
        """Return the state before any code."""
        return _begin(batch, self._fade, 0, self._model.codebooks.semantic.device)

    def advance(self, codes: Tensor, state: Tail, seeds: Sequence[int]) -> tuple[Tensor, Tail]:
        """Decode one window (the last may be short) and hold back its end."""
        draw = draw_windows(self._model.config, seeds, state.window.tolist(), codes.device)
        wave = generate_rows(self._model, codes.split(1), draw, self._options)
        out = torch.cat([_enter(state, wave[:, : self._fade]), wave[:, self._fade : -self._fade]], 1)
        return out, Tail(wave[:, -self._fade :].clone(), state.codes, state.window + 1)

    def finish(self, codes: Tensor, state: Tail, seed: int) -> Tensor:
        """Decode the rest; what the last window has already heard is only its end."""
        begun = int(state.window) > 0
        if begun and codes.shape[2] < self.ahead:
            raise StreamError(
                f"{codes.shape[2]} frames are left; the last step has seen {self.ahead} beyond its own: give them too"
            )
        if codes.shape[2] == self.ahead * begun:
            return state.wave
        wave, state = self.advance(codes, state, [seed])
        return torch.cat([wave, state.wave], 1)


class Slide:
    """Official presets with low delay: a window over the last codes, of which only the end is new and is heard.

    Early windows are short, as those of a short file.  A column of sound has the same noise in every window that
    covers it (that of the block it belongs to), so that windows agree where one fades into the next.
    """

    def __init__(self, model: CodecModel, options: SamplerOptions, sliding: Sliding) -> None:
        self.frames, self.ahead, self.lag = model.config.frames(sliding.hop * COLUMN), 0, sliding.fade * COLUMN
        self._hop, self._columns = sliding.hop, model.config.decoder.columns
        self._held = (self._columns // sliding.hop - 1) * self.frames
        self._model, self._options = model, options

    def begin(self, batch: int) -> Tail:
        """Return the state before any code."""
        return _begin(batch, self.lag, self._held, self._model.codebooks.semantic.device)

    def advance(self, codes: Tensor, state: Tail, seeds: Sequence[int]) -> tuple[Tensor, Tail]:
        """Decode the window that ends with these codes, and hold back its end."""
        indices: list[int] = state.window.tolist()
        blocks = [min(index, self._held // self.frames) + 1 for index in indices]
        joined = torch.cat([state.codes, codes], 2)
        rows = [row[:, :, -count * self.frames :] for row, count in zip(joined.split(1), blocks, strict=True)]
        first = [index + 1 - count for index, count in zip(indices, blocks, strict=True)]
        waves = generate_rows(self._model, rows, self._draw(seeds, first, codes.device), self._options)
        hop, ends = self._hop * COLUMN, [count * self._hop * COLUMN for count in blocks]
        # In front of a row's first window there is silence, which is never heard.
        padded = functional.pad(waves, (self.lag, 0))
        new = torch.stack([wave[end - hop : end + self.lag] for wave, end in zip(padded, ends, strict=True)])
        out = torch.cat([_enter(state, new[:, : self.lag]), new[:, self.lag : hop]], 1)
        return out, Tail(new[:, hop:].clone(), joined[:, :, self.frames :].clone(), state.window + 1)

    def finish(self, codes: Tensor, state: Tail, seed: int) -> Tensor:
        """Decode the rest, filled up with missing codes, and what was held back."""
        if not codes.shape[2]:
            return state.wave
        wave, state = self.advance(_filled(codes, self.frames), state, [seed])
        return torch.cat([wave, state.wave], 1)

    def _draw(self, seeds: Sequence[int], first: Sequence[int], device: torch.device) -> Draw:
        channels, cells = self._model.config.decoder.latent.vae.latent_channels, MEL_BINS // LATENT_ROWS
        shape = (channels, self._hop * STEPS, cells)
        blocks = range(-(-self._columns // self._hop))

        def draw(step: int) -> Tensor:
            rows = [
                torch.cat([noise(seed, start + block, step, shape) for block in blocks], 1)
                for seed, start in zip(seeds, first, strict=True)
            ]
            return torch.stack(rows)[:, :, : self._columns * STEPS].to(device)

        return draw


def _filled(codes: Tensor, frames: int) -> Tensor:
    return functional.pad(codes, (0, frames - codes.shape[2]), value=MISSING)
