"""Samples to codes, block by block.  B rows, S samples at 16 kHz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..audio import FBANK_LOOKAHEAD, PADDING_ROW, fbank
from ..codec import SemantiCodec
from ..config import COLUMN, CodecConfig
from ..errors import ConfigError, StreamError
from ..model import MISSING
from ..windows import State
from .rows import masked


@dataclass(frozen=True)
class Sliding:
    """Low delay from an official preset, all in patch columns of 160 ms: its 10.24 s window slides along.

    Args:
        hop: new columns per step, for encoder and decoder; each step costs what a whole window costs.
        ahead: columns after the new ones that the encoder waits for.
        fade: columns over which the decoder fades one window into the next, at most ``hop``.

    Raises:
        ConfigError: the numbers do not fit together.
    """

    hop: int = 2
    ahead: int = 2
    fade: int = 1

    def __post_init__(self) -> None:
        if self.hop < 1 or self.ahead < 0 or not 1 <= self.fade <= self.hop:
            raise ConfigError(f"{self} makes no sense; choose hop >= 1, ahead >= 0 and 1 <= fade <= hop")

    def check(self, config: CodecConfig) -> None:
        """Refuse presets whose windows cannot slide like this."""
        if config.encoder.context or config.decoder.join == "prefix":
            raise ConfigError(f"{config.name} streams as it is; leave sliding out")
        time, columns = config.stack[0], min(config.encoder.mae.columns - self.ahead, config.decoder.columns)
        if self.hop % time or self.ahead % time or self.hop > columns:
            raise ConfigError(
                f"{self} does not fit {config.name}: hop and ahead must be multiples of {time}, hop at most {columns}"
            )


@dataclass(frozen=True)
class EncoderState(State):
    """What an encoder remembers: the samples ``[B, context]`` before the next block."""

    before: Tensor


class Encoder:
    """A codec's encoder as steps of one block, with the state outside.

    Attributes:
        block: samples that a step consumes.
        lookahead: samples after the block that a step has to see as well.
        latency: samples from the arrival of a sample to that of its codes, at worst: ``block + lookahead``.
        frames: frames of codes per block.
    """

    def __init__(self, codec: SemantiCodec, sliding: Sliding | None = None) -> None:
        """Prepare to step.

        Args:
            codec: with its encoder half.
            sliding: for official presets; None codes their windows of 10.24 s side by side, as a file is coded.

        Raises:
            ConfigError: the encoder half was not loaded, or ``sliding`` does not fit the preset.
        """
        if codec.model.mae is None:
            raise ConfigError("only the decoder half is loaded; use parts='all' or 'encoder' to encode")
        config = codec.config
        if sliding is None:
            context, hop, ahead = config.encoder.context, config.coded_columns, 0
        else:
            sliding.check(config)
            hop, ahead = sliding.hop, sliding.ahead
            context = config.encoder.mae.columns - hop - ahead
        self.codec = codec
        self.block = hop * COLUMN
        self.lookahead = ahead * COLUMN + FBANK_LOOKAHEAD
        self.latency = self.block + self.lookahead
        self.frames = config.frames(self.block)
        self._context = context * COLUMN
        self._ahead = config.frames(ahead * COLUMN)
        self._marks_end = config.encoder.mask_padding and sliding is None

    def begin(self, batch: int) -> EncoderState:
        """Return the state of ``batch`` rows before any sound: silence."""
        return EncoderState(torch.zeros(batch, self._context, device=self.codec.device))

    def reset(self, state: EncoderState, rows: Tensor) -> EncoderState:
        """Let the rows that are true in ``rows`` (bool ``[B]``) begin again."""
        return self.begin(len(state)).where(rows, state)

    def step(self, samples: Tensor, state: EncoderState, active: Tensor | None = None) -> tuple[Tensor, EncoderState]:
        """Code the next block.

        Args:
            samples: ``[B, block + lookahead]``; the last ``lookahead`` are given again at the beginning of the next
                step.
            state: from :meth:`begin` or the step before; left as it is.
            active: bool ``[B]`` on the CPU; rows that are false take no part: their samples are not looked at, their
                state stays.  None: all rows.

        Returns:
            Codes int64 ``[B, 2, frames]`` (missing in inactive rows), and the new state.

        Raises:
            StreamError: shapes do not fit.
        """
        if samples.shape != (len(state), self.latency):
            raise StreamError(
                f"a step takes samples {(len(state), self.latency)} (rows, block + lookahead), "
                f"seen {tuple(samples.shape)}"
            )

        def advance(samples: Tensor, state: EncoderState, _: Sequence[int]) -> tuple[Tensor, EncoderState]:
            return self._advance(samples, state, last=False)

        device = self.codec.device
        blank = torch.full((1, 2, self.frames), MISSING, device=device)
        call: Literal["active", "all"] = "active" if device.type == "cpu" else "all"
        return masked(advance, samples.to(device), state, active, blank, call)

    def finish(self, samples: Tensor, state: EncoderState) -> Tensor:
        """Code what is left at the end, as if silence followed.

        Args:
            samples: ``[B, S]``: all that the steps have not consumed.
            state: from the last step.

        Returns:
            Codes int64 ``[B, 2, config.frames(S)]``.

        Raises:
            StreamError: shapes do not fit.
        """
        if samples.ndim != 2 or len(samples) != len(state):
            raise StreamError(f"samples [{len(state)}, any] are left to code, seen {tuple(samples.shape)}")
        samples = samples.to(self.codec.device)
        codes = [torch.empty(len(state), 2, 0, dtype=torch.int64, device=self.codec.device)]
        for start in range(0, samples.shape[1], self.block):
            rest = samples[:, start : start + self.latency]
            padded = functional.pad(rest, (0, self.latency - rest.shape[1]))
            block, state = self._advance(padded, state, last=samples.shape[1] - start <= self.block)
            codes.append(block)
        return torch.cat(codes, 2)[:, :, : self.codec.config.frames(samples.shape[1])]

    def _advance(self, samples: Tensor, state: EncoderState, *, last: bool) -> tuple[Tensor, EncoderState]:
        with torch.inference_mode():
            window = torch.cat([state.before, samples], 1)
            rows = fbank(window)
            if last and self._marks_end:
                rows[:, -2:] = PADDING_ROW
            codes = self.codec.encode_windows(rows)
            before = window[:, self.block : self.block + self._context].clone()
        end = codes.shape[2] - self._ahead
        return codes[:, :, end - self.frames : end], EncoderState(before)
