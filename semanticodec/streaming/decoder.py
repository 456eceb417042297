"""Codes to samples, block by block.  B rows, F frames, S samples at 16 kHz."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..codec import SemantiCodec
from ..diffusion import SamplerOptions
from ..errors import ConfigError, StreamError
from ..windows import State
from .encoder import Encoder, Sliding
from .joins import Fade, Join, Prefix, Slide
from .rows import masked


class Decoder:
    """A codec's decoder as steps of one block, with the state outside.

    Attributes:
        block: samples that a step makes.
        frames: frames of codes that a step consumes.
        ahead: frames after those that a step has to see as well.
        lag: samples by which what a step makes lies behind what it consumes; the first ``lag`` samples of a recording
            are from before its beginning and are to be dropped.
        lookahead: samples after a sample whose codes it may depend on (rounded up to the end of a block).
        latency: samples from the arrival of a sample's code to that of the sample, at worst: ``block + lookahead``.
    """

    def __init__(
        self, codec: SemantiCodec, options: SamplerOptions | None = None, sliding: Sliding | None = None
    ) -> None:
        """Prepare to step.

        Args:
            codec: with its decoder half.
            options: solver, steps, guidance; None takes the preset's.
            sliding: for official presets; None makes windows of 10.24 s, as a file is decoded.

        Raises:
            ConfigError: the decoder half was not loaded, or ``sliding`` does not fit the preset.
        """
        if codec.model.latent is None:
            raise ConfigError("only the encoder half is loaded; use parts='all' or 'decoder' to decode")
        options = options or SamplerOptions()
        self.codec = codec
        self._join: Join[Any]
        if sliding is not None:
            sliding.check(codec.config)
            self._join = Slide(codec.model, options, sliding)
        elif codec.config.decoder.join == "prefix":
            self._join = Prefix(codec.model, options)
        else:
            self._join = Fade(codec.model, options)
        self.frames, self.ahead, self.lag = self._join.frames, self._join.ahead, self._join.lag
        self.block = codec.config.samples(self.frames)
        self.lookahead = codec.config.samples(self.ahead) + self.lag
        self.latency = self.block + self.lookahead

    def begin(self, batch: int) -> State:
        """Return the state of ``batch`` rows before any code."""
        state: State = self._join.begin(batch)
        return state

    def reset(self, state: State, rows: Tensor) -> State:
        """Let the rows that are true in ``rows`` (bool ``[B]``) begin again."""
        return self.begin(len(state)).where(rows, state)

    def step(
        self, codes: Tensor, state: State, seeds: Sequence[int], active: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Make the next block.

        Args:
            codes: int ``[B, 2, frames + ahead]``; the last ``ahead`` are given again at the beginning of the next step.
                -1 marks a code that was lost: what is there comes from its neighbours and the unconditional embedding.
            state: from :meth:`begin` or the step before; left as it is.
            seeds: of the noise, one per row; a row keeps its own.
            active: bool ``[B]`` on the CPU; rows that are false take no part: their state stays, their codes need only
                be in range.  None: all rows.

        Returns:
            float32 samples ``[B, block]``, ``lag`` behind the codes (silence in inactive rows), and the new state.

        Raises:
            StreamError: shapes do not fit.
            CodesError: codes are out of range.
        """
        wanted = (len(state), 2, self.frames + self.ahead)
        if codes.shape != wanted or len(seeds) != len(state):
            raise StreamError(
                f"a step takes codes {wanted} (rows, 2, frames + ahead) and a seed per row, "
                f"seen {tuple(codes.shape)} and {len(seeds)} seeds"
            )

        def advance(codes: Tensor, state: State, rows: Sequence[int]) -> tuple[Tensor, State]:
            return self._join.advance(codes, state, [seeds[row] for row in rows])

        device = self.codec.device
        blank = torch.zeros(1, self.block, device=device)
        call: Literal["each", "all"] = "each" if device.type == "cpu" else "all"
        return masked(advance, self.codec.checked_codes(codes), state, active, blank, call)

    def finish(self, codes: Tensor, state: State, seeds: Sequence[int]) -> Tensor:
        """Make what is left at the end.

        Args:
            codes: int ``[B, 2, F]``, ``F < frames + ahead``: all that the steps have not consumed.
            state: from the last step.
            seeds: as in :meth:`step`.

        Returns:
            float32 samples ``[B, config.samples(F) + lag]``.

        Raises:
            StreamError: shapes do not fit.
            CodesError: codes are out of range.
        """
        if codes.ndim != 3 or len(codes) != len(state) or not codes.shape[2] < max(self.frames + self.ahead, 1):
            raise StreamError(
                f"codes [{len(state)}, 2, fewer than {self.frames + self.ahead}] are left to decode, "
                f"seen {tuple(codes.shape)}"
            )
        if codes.shape[2]:
            codes = self.codec.checked_codes(codes)
        rows = zip(codes.split(1), state.rows(), seeds, strict=True)
        wave = torch.cat([self._join.finish(row, own, seed) for row, own, seed in rows])
        return wave[:, : self.codec.config.samples(codes.shape[2]) + self.lag]

    def delay(self, encoder: Encoder) -> int:
        """Return the algorithmic latency in samples from microphone to loudspeaker, behind ``encoder``.

        Computing and sending take no time here: a block is coded when its look-ahead is there, and decoded when its
        codes are.
        """
        ahead = self.codec.config.samples(self.ahead)

        def wait(block: int) -> int:
            needed = (block + 1) * self.block + ahead
            return -(-needed // encoder.block) * encoder.block + encoder.lookahead - (block * self.block - self.lag)

        return max(wait(block) for block in range(math.lcm(encoder.block, self.block) // self.block))
