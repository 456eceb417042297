"""Pieces of any length in, what is ready out: one recording or call at a time.  F frames, S samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..audio import Resampler
from ..codec import SemantiCodec, mono
from ..config import SAMPLE_RATE
from ..diffusion import SamplerOptions
from ..errors import AudioError, CodesError
from .decoder import Decoder
from .encoder import Encoder, Sliding


class StreamEncoder:
    """Turn a stream of samples into codes; together they are what the codec gives for the whole, bit for bit (CPU).

    After :meth:`flush` it stands where it began: the next sample belongs to a new recording.

    Resampling waits as well: soxr's filter works in blocks of its own, which hold back up to 37 ms at 48 kHz, 40 ms at
    44.1 kHz and 115 ms at 8 kHz, and nothing at 16 kHz.

    Attributes:
        encoder: the steps it takes, with their declared block, look-ahead and latency.
    """

    def __init__(
        self, codec: SemantiCodec, sample_rate: int = SAMPLE_RATE, channels: int = 1, *, sliding: Sliding | None = None
    ) -> None:
        """Begin a recording.

        Args:
            codec: with its encoder half.
            sample_rate: of the samples in Hz.
            channels: rows of every piece, which are averaged.
            sliding: low delay for official presets, see :class:`Sliding`; other codes than those of the file.

        Raises:
            AudioError: the rate is outside 1 kHz to 1 MHz.
            ConfigError: the encoder half was not loaded, or ``sliding`` does not fit the preset.
        """
        self.encoder = Encoder(codec, sliding)
        self.sample_rate, self.channels = sample_rate, channels
        self._restart()

    def _restart(self) -> None:
        self._resampler = Resampler(self.sample_rate, SAMPLE_RATE)
        self._held = torch.zeros(1, 0)
        self._state = self.encoder.begin(1)

    def push(self, samples: Tensor | np.ndarray) -> Tensor:
        """Take some samples and return the codes that are complete.

        Args:
            samples: floating point in [-1, 1], ``[S]`` or ``[channels, S]``, any S.

        Returns:
            Codes int64 ``[1, 2, F]``; F may be 0.

        Raises:
            AudioError: another number of channels, integers, or samples that are not finite; none of them is taken.
        """
        if samples.ndim not in (1, 2) or (samples.shape[0] if samples.ndim == 2 else 1) != self.channels:
            raise AudioError(
                f"pieces [samples] or [{self.channels}, samples] are expected, seen {tuple(samples.shape)}; "
                f"say how many channels there are when the stream begins"
            )
        rows = mono(samples if samples.ndim == 1 else samples[None]) if samples.shape[-1] else torch.zeros(1, 0)
        return self._advance(self._resampler.push(rows))

    def flush(self) -> Tensor:
        """End the recording and return the rest of its codes ``[1, 2, F]``, as if silence followed."""
        codes = self._advance(self._resampler.flush())
        codes = torch.cat([codes, self.encoder.finish(self._held, self._state)], 2)
        self._restart()
        return codes

    def _advance(self, samples: Tensor) -> Tensor:
        held = torch.cat([self._held, samples], 1)
        codes = [torch.zeros(1, 2, 0, dtype=torch.int64, device=self.encoder.codec.device)]
        start = 0
        while held.shape[1] - start >= self.encoder.latency:
            block, self._state = self.encoder.step(held[:, start : start + self.encoder.latency], self._state)
            codes.append(block)
            start += self.encoder.block
        self._held = held[:, start:].clone()
        return torch.cat(codes, 2)


class StreamDecoder:
    """Turn a stream of codes into samples; together they are what the codec gives for the whole, bit for bit (CPU).

    After :meth:`flush` it stands where it began: the next code belongs to a new recording, with the same seed.

    Attributes:
        decoder: the steps it takes, with their declared block, look-ahead and latency.
    """

    def __init__(
        self,
        codec: SemantiCodec,
        seed: int = 0,
        options: SamplerOptions | None = None,
        *,
        sliding: Sliding | None = None,
    ) -> None:
        """Begin a recording.

        Args:
            codec: with its decoder half.
            seed: of the decoder's noise.
            options: solver, steps, guidance; None takes the preset's.
            sliding: low delay for official presets, see :class:`Sliding`; other samples than those of the file.

        Raises:
            ConfigError: the decoder half was not loaded, or ``sliding`` does not fit the preset.
        """
        self.decoder = Decoder(codec, options, sliding)
        self.seed = seed
        self._restart()

    def _restart(self) -> None:
        self._held = torch.zeros(1, 2, 0, dtype=torch.int64, device=self.decoder.codec.device)
        self._state = self.decoder.begin(1)
        self._before = self.decoder.lag

    def push(self, codes: Tensor | np.ndarray) -> Tensor:
        """Take some frames of codes and return the samples that are complete.

        Args:
            codes: int ``[1, 2, F]``, any F; -1 marks a code that was lost and is made up for by the model.

        Returns:
            float32 samples ``[1, S]`` at 16 kHz; S may be 0.

        Raises:
            CodesError: wrong shape, dtype or range; none of the frames is taken.
        """
        if codes.ndim != 3 or len(codes) != 1:
            raise CodesError(f"a stream takes codes [1, 2, frames], seen {tuple(codes.shape)}; use one stream per row")
        if not codes.shape[2]:
            return torch.zeros(1, 0, device=self.decoder.codec.device)
        held = torch.cat([self._held, self.decoder.codec.checked_codes(codes)], 2)
        waves = [torch.zeros(1, 0, device=self.decoder.codec.device)]
        span, start = self.decoder.frames + self.decoder.ahead, 0
        while held.shape[2] - start >= span:
            wave, self._state = self.decoder.step(held[:, :, start : start + span], self._state, [self.seed])
            waves.append(self._heard(wave))
            start += self.decoder.frames
        self._held = held[:, :, start:].clone()
        return torch.cat(waves, 1)

    def flush(self) -> Tensor:
        """End the recording and return the rest of its samples ``[1, S]``; a started group of frames is whole."""
        wave = self._heard(self.decoder.finish(self._held, self._state, [self.seed]))
        self._restart()
        return wave

    def _heard(self, wave: Tensor) -> Tensor:
        """Drop what is from before the beginning."""
        before = min(self._before, wave.shape[1])
        self._before -= before
        return wave[:, before:]


def agreement(
    codec: SemantiCodec, wave: Tensor | np.ndarray, sample_rate: int, sliding: Sliding
) -> tuple[float, float]:
    """Measure how many codes of a sliding encoder are those of the file.

    Args:
        codec: an official preset.
        wave: samples ``[S]`` in [-1, 1].
        sample_rate: of ``wave`` in Hz.
        sliding: what to compare.

    Returns:
        The share of equal (semantic, acoustic) codes.

    Raises:
        AudioError: as :meth:`SemantiCodec.encode`.
        ConfigError: ``sliding`` does not fit the preset.
    """
    stream = StreamEncoder(codec, sample_rate, sliding=sliding)
    codes = torch.cat([stream.push(wave), stream.flush()], 2)
    semantic, acoustic = (codes == codec.encode(wave, sample_rate)).float().mean((0, 2)).tolist()
    return semantic, acoustic
