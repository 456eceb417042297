"""Spans to codes, in calls of one fixed shape.

Windows are what the codec encodes, and they all have one shape: they are the buckets, pooled across recordings, and no
batch is padded to its longest member however mixed the lengths.  The last call of a chunk is filled up with silence.
That every call has the same shape makes a window's codes independent of what else is encoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..audio import FBANK_LOOKAHEAD, PADDING_ROW, fbank
from ..codec import SemantiCodec
from ..config import COLUMN, SAMPLE_RATE
from .records import Coded, Event, Span

CPU_SECONDS = 13.44
"""Sound in one call on a CPU: 42 of mini's windows, one of the official ones."""
GPU_SECONDS = 655.36
"""Sound in one call on a GPU: 2048 of mini's windows, 64 of the official ones."""


@dataclass
class _Pending:
    """A span whose windows are being encoded."""

    span: Span
    windows: int
    codes: list[np.ndarray] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)


class WindowEncoder:
    """Encodes spans, many windows at a time."""

    def __init__(self, codec: SemantiCodec, batch_seconds: float, *, keep_features: bool) -> None:
        """Begin.

        Args:
            codec: with its encoder half.
            batch_seconds: of sound in one call.
            keep_features: return the continuous features too.
        """
        self._codec, self._keep = codec, keep_features
        config = codec.config
        self._block = config.block
        self._size = config.encoder.context * COLUMN + config.block + FBANK_LOOKAHEAD
        self._at_once = max(1, round(batch_seconds * SAMPLE_RATE / config.block))

    def encode(self, events: Iterable[Event]) -> Iterator[Event]:
        """Replace every span by its codes, which may come later; everything else passes."""
        pending: list[_Pending] = []
        waiting: Tensor | None = None
        for event in events:
            if not isinstance(event, Span):
                yield event
                continue
            windows = self._windows(event)
            pending.append(_Pending(event, len(windows)))
            waiting = windows if waiting is None else torch.cat([waiting, windows])
            while len(waiting) >= self._at_once:
                yield from self._run(waiting[: self._at_once], pending)
                waiting = waiting[self._at_once :]
        if waiting is not None and len(waiting):
            padded = functional.pad(waiting, (0, 0, 0, 0, 0, self._at_once - len(waiting)))
            yield from self._run(padded, pending)

    def _windows(self, span: Span) -> Tensor:
        """Return the filter banks ``[windows, rows, 128]`` of a span."""
        wave = torch.from_numpy(span.wave)
        banks = torch.stack([fbank(window) for window in wave.unfold(0, self._size, self._block)])
        if span.end and self._codec.config.encoder.mask_padding:
            banks[-1, -2:] = PADDING_ROW
        return banks

    def _run(self, banks: Tensor, pending: list[_Pending]) -> Iterator[Coded]:
        """Encode a full batch and yield the spans that it completes."""
        features = self._codec.window_features(banks)
        codes = self._codec.quantise(features, banks).cpu().numpy().astype(np.uint16)
        patches = features.to("cpu", torch.float16).numpy() if self._keep else None
        at = 0
        while pending and at < len(banks):
            first = pending[0]
            take = min(first.windows - len(first.codes), len(banks) - at)
            first.codes += list(codes[at : at + take])
            if patches is not None:
                first.features += list(patches[at : at + take])
            at += take
            if len(first.codes) < first.windows:
                break
            span = pending.pop(0).span
            kept = np.concatenate(first.features) if first.features else None
            yield Coded(span.item, span.row, span.index, np.concatenate(first.codes, 1), kept)
