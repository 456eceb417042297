"""Coding on this machine, for clients on links that carry codes only.  The one place here that needs the codec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from semanticodec.errors import ConfigError
from semanticodec.wire.blocks import Geometry
from semanticodec.wire.messages import Marker, Ready
from semanticodec.wire.packing import Codes

from .events import AudioChunk, CodesBlock, Event, Gap, Restarted, Samples

if TYPE_CHECKING:
    from semanticodec import SemantiCodec, StreamDecoder, StreamEncoder

RATE = 16_000
"""Samples per second of the codec."""
CONCEAL = 8
"""Lost blocks in a row that the model makes up for; after more the sound breaks off and begins anew."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A block of codes ``[n_q, frames]``, and the same packed at the lowest rate (or nothing)."""

    codes: Codes
    rate: int
    copy: bytes = b""


class Codec:
    """Weights for coding here; made by :func:`load`.

    Args:
        preset: the one to begin with.
        weights: first 8 hexadecimal digits of its hash; the server must have the same.
        models: those that are loaded, by preset; others of the session's are loaded when they are needed.
    """

    def __init__(self, preset: str, weights: str, models: dict[str, SemantiCodec]) -> None:
        self.preset = preset
        self.weights = weights
        self._models = models

    def model(self, ready: Ready, rate: int) -> SemantiCodec:
        """Return the model for a token rate of a session.

        Raises:
            ConfigError: the session has no such rate.
            CheckpointError: its weights cannot be had.
        """
        if rate not in ready.rates:
            raise ConfigError(f"rate {rate}; this session has {list(ready.rates)}")
        preset = ready.presets[ready.rates.index(rate)]
        if preset not in self._models:
            from semanticodec import SemantiCodec

            self._models[preset] = SemantiCodec.from_pretrained(preset)
        return self._models[preset]

    def encoder(self, ready: Ready, sample_rate: int, copies: bool) -> Encoder:
        """Return an encoder for a session."""
        return Encoder(self, ready, sample_rate, copies)

    def decoder(self, ready: Ready) -> Decoder:
        """Return a decoder for a session."""
        return Decoder(self, ready)


def load(preset: str = "mini-100") -> Codec:
    """Load weights for coding here.

    Raises:
        ConfigError: there is no such preset.
        CheckpointError: its weights cannot be had.
    """
    from semanticodec import SemantiCodec

    model = SemantiCodec.from_pretrained(preset)
    return Codec(preset, model.weights_hash[:8], {preset: model})


class Encoder:
    """Samples in, whole blocks of codes out.

    Args:
        codec: with the weights.
        ready: the session.
        sample_rate: of the samples in Hz.
        copies: whether each block needs a copy at the lowest rate; a change counts from the next recording on.
    """

    def __init__(self, codec: Codec, ready: Ready, sample_rate: int, copies: bool) -> None:
        self.copies = copies
        self._codec, self._ready, self._sample_rate = codec, ready, sample_rate
        self._geometry = Geometry(ready.block, ready.code_bits, ready.rates)
        self._main: StreamEncoder | None = None
        self._low: StreamEncoder | None = None
        self._rate = ready.rate
        self._samples = self._blocks = 0

    def push(self, samples: np.ndarray[Any, Any], rate: int) -> list[Coded]:
        """Take samples ``[S]``; return the blocks that are complete, at ``rate`` from the next one on.

        Raises:
            AudioError: samples that are not finite.
            ConfigError: the session has no such rate.
        """
        main = self._tuned(rate)
        self._samples += len(samples)
        codes = main.push(samples).cpu().numpy()[0]
        low = None if self._low is None else self._low.push(samples).cpu().numpy()[0]
        return self._cut(codes, low)

    def flush(self) -> tuple[list[Coded], int]:
        """End the recording: return its last blocks, and how many samples at 16 kHz at their end are padding."""
        if self._main is None:
            return [], 0
        block, length = self._geometry.block, self._samples * RATE // self._sample_rate
        count = -(-length // block)
        silence = np.zeros(max(0, -(-count * block * self._sample_rate // RATE) - self._samples), np.float32)
        codes, *low = (
            np.concatenate([part.cpu().numpy()[0] for part in (stream.push(silence), stream.flush())], 1)
            for stream in (self._main, self._low)
            if stream is not None
        )
        # Rounding in the resampler may have made one sample, and so one block, too many.
        left = count - self._blocks
        coded = self._cut(codes, low[0] if low else None)[:left]
        padding = count * block - length
        self._samples = self._blocks = 0
        self._main = self._low = None
        return coded, padding

    def _tuned(self, rate: int) -> StreamEncoder:
        """Return the stream, set to a rate: all presets of a session share what comes before the codes."""
        from semanticodec import Encoder as Steps
        from semanticodec import StreamEncoder

        if self._main is None:
            self._main = StreamEncoder(self._codec.model(self._ready, rate), self._sample_rate)
            lowest = self._geometry.copy_rate
            if self.copies:
                self._low = StreamEncoder(self._codec.model(self._ready, lowest), self._sample_rate)
        elif rate != self._rate:
            self._main.encoder = Steps(self._codec.model(self._ready, rate))
        self._rate = rate
        return self._main

    def _cut(self, codes: Codes, low: Codes | None) -> list[Coded]:
        geometry, coded = self._geometry, []
        frames, few = geometry.frames(self._rate), geometry.frames(geometry.copy_rate)
        for i in range(codes.shape[1] // frames):
            copy = b"" if low is None else geometry.pack(low[:, i * few : (i + 1) * few], geometry.copy_rate)
            coded.append(Coded(codes[:, i * frames : (i + 1) * frames], self._rate, copy))
        self._blocks += len(coded)
        return coded


class Decoder:
    """Blocks of codes in, samples at 16 kHz out; lost blocks are made up for by the model.

    Args:
        codec: with the weights.
        ready: the session.
    """

    def __init__(self, codec: Codec, ready: Ready) -> None:
        self._codec, self._ready = codec, ready
        self._geometry = Geometry(ready.block, ready.code_bits, ready.rates)
        self._stream: StreamDecoder | None = None
        self._rate = self._next = self._at = self._chunks = 0

    def push(self, event: Event) -> list[Event]:
        """Take what came; return sound in place of codes and gaps, and anything else behind the sound before it."""
        if isinstance(event, CodesBlock):
            return self._decode(event)
        if isinstance(event, Gap) and event.kind == "codes":
            return [*self._conceal(event), event]
        if isinstance(event, Restarted):
            return [*self.finish(), event]
        if isinstance(event, Marker) and event.kind == "codes":
            return [*(self.finish(event.at) if event.flush else []), event]
        return [event]

    def _decode(self, block: CodesBlock) -> list[Event]:
        before: list[Event] = []
        if self._stream is not None and (block.rate != self._rate or block.at != self._next):
            before = self.finish(block.at)
        if self._stream is None:
            from semanticodec import StreamDecoder

            self._stream = StreamDecoder(self._codec.model(self._ready, block.rate))
            self._rate, self._next, self._at = block.rate, block.at, block.at
        self._next += self._geometry.block
        return before + self._heard(self._stream.push(block.codes[None]).cpu().numpy()[0])

    def _conceal(self, gap: Gap) -> list[Event]:
        if self._stream is None:
            return []
        count = gap.stop - gap.seq
        if count > CONCEAL:
            return self.finish()
        self._next += count * self._geometry.block
        codes = np.full((1, 2, count * self._geometry.frames(self._rate)), -1, np.int64)
        return self._heard(self._stream.push(codes).cpu().numpy()[0])

    def finish(self, stop: int | None = None) -> list[Event]:
        """End the recording: return the rest of its sound, up to position ``stop`` if what lies behind is padding."""
        if self._stream is None:
            return []
        wave: Samples = self._stream.flush().cpu().numpy()[0]
        self._stream = None
        return self._heard(wave if stop is None else wave[: max(0, stop - self._at)])

    def _heard(self, wave: Samples) -> list[Event]:
        if not len(wave):
            return []
        chunk = AudioChunk(self._chunks, self._at, wave)
        self._chunks += 1
        self._at += len(wave)
        return [chunk]
