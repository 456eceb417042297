"""How windows of codes become one continuous sound: cross-faded (official) or each given the latents before it (mini).

B rows, F frames, D channels, T latent steps, M mel rows, S samples at 16 kHz.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from .config import COLUMN, HOP, LATENT_ROWS, MEL_BINS, PATCH, CodecConfig, GridConditioning
from .diffusion import Draw, SamplerOptions, noise
from .latent import Conditioning, Known, LatentDiffusion
from .model import MISSING, CodecModel
from .nn.conditioners import ContextConditioner, GridConditioner
from .nn.vocos import Memory, Vocos

SILENCE = -11.512925464970229
"""Log-mel of digital silence, ln(1e-5)."""
STEPS = PATCH // LATENT_ROWS
"""Latent steps per patch column."""


@dataclass(frozen=True)
class State:
    """What something remembers between steps: tensors with one entry per row; a value, owned by whoever steps.

    Rows are sessions that know nothing of each other: they can be taken apart, moved and put together again.
    """

    @property
    def _parts(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def __len__(self) -> int:
        return len(self._parts[0])

    def rows(self) -> list[Self]:
        """Split into the states of single rows."""
        return [type(self)(*row) for row in zip(*(part.split(1) for part in self._parts), strict=True)]

    @classmethod
    def joined(cls, rows: Sequence[Self]) -> Self:
        """Put states together, one after the other; undoes :meth:`rows`."""
        return cls(*(torch.cat(parts) for parts in zip(*(row._parts for row in rows), strict=True)))

    def where(self, rows: Tensor, other: Self) -> Self:
        """Keep the rows that are true in ``rows`` (bool ``[B]``) and take the others from ``other``."""
        pairs = zip(self._parts, other._parts, strict=True)
        return type(self)(*(torch.where(rows.to(a.device).reshape(-1, *[1] * (a.ndim - 1)), a, b) for a, b in pairs))


def draw_windows(config: CodecConfig, seeds: Sequence[int], windows: Sequence[int], device: torch.device) -> Draw:
    """Return the noise of rows that stand for the given windows; one seed and one index per row."""
    decoder = config.decoder
    shape = (decoder.latent.vae.latent_channels, decoder.columns * STEPS, MEL_BINS // LATENT_ROWS)
    pairs = list(zip(seeds, windows, strict=True))

    def draw(step: int) -> Tensor:
        distinct = {(seed, window): noise(seed, window, step, shape) for seed, window in set(pairs)}
        return torch.stack([distinct[pair] for pair in pairs]).to(device)

    return draw


# --- cross-fade ---------------------------------------------------------------------------------------------------


def decode_crossfade(
    model: CodecModel, pieces: Iterable[Tensor], seed: int, options: SamplerOptions, at_once: int
) -> Iterator[Tensor]:
    """Decode windows independently, ``at_once`` rows per network call, and fade each into the next.

    Args:
        model: with its decoder half.
        pieces: consecutive codes ``[B, 2, F]``.
        seed: of the noise.
        options: the caller's dials.
        at_once: windows per call of the networks.

    Yields:
        Consecutive samples ``[B, S]``.

    Source: the published windows (spec 4.1) and linear ramps (4.7).  The 32 samples that the published vocoder adds to
    every window are cut, so that windows lie exactly 9.6 s apart and nothing drifts.
    """
    config = model.config
    fade = config.decoder.overlap * COLUMN
    tail: Tensor | None = None
    index = 0
    for group in _grouped(_overlapping(pieces, config.window_frames, config.hop_frames), at_once):
        batch = len(group[0])
        for wave in generate_windows(model, group, range(index, index + len(group)), seed, options, at_once).split(
            batch
        ):
            head = wave[:, :fade]
            if tail is not None:
                head = faded(tail, head)
            yield torch.cat([head, wave[:, fade:-fade]], 1)
            tail = wave[:, -fade:]
        index += len(group)
    if tail is not None:
        yield tail


def faded(tail: Tensor, head: Tensor) -> Tensor:
    """Fade the end of one window into the beginning of the next, both ``[B, S]``."""
    rising = torch.linspace(0, 1, head.shape[1], dtype=torch.float64).to(head)
    return head * rising + tail * rising.flip(0)


def generate_windows(
    model: CodecModel, codes: list[Tensor], windows: Iterable[int], seed: int, options: SamplerOptions, at_once: int
) -> Tensor:
    """Decode single windows.

    Args:
        model: with its decoder half.
        codes: one window ``[B, 2, F]`` each, F at most a window.
        windows: their indices since the start of the file, for the noise.
        seed: of the noise.
        options: the caller's dials.
        at_once: rows that one call of the networks may see.

    Returns:
        Samples ``[len(codes) * B, S]``, window-major.
    """
    rows: list[tuple[int, Tensor]] = [
        (window, row) for window, batch in zip(windows, codes, strict=True) for row in batch.split(1)
    ]
    waves = []
    for first in range(0, len(rows), at_once):
        indices, parts = zip(*rows[first : first + at_once], strict=True)
        draw = draw_windows(model.config, [seed] * len(parts), indices, _decoder(model).scale.device)
        waves.append(generate_rows(model, parts, draw, options))
    return torch.cat(waves)


def generate_rows(model: CodecModel, codes: Sequence[Tensor], draw: Draw, options: SamplerOptions) -> Tensor:
    """Decode windows of codes (each ``[1, 2, F]``, F at most a window) in one call, to ``[len(codes), S]``."""
    latent, conditioner = _decoder(model), model.conditioner
    assert isinstance(conditioner, ContextConditioner)
    with torch.inference_mode():
        context = torch.cat([conditioner(model.embed(row)) for row in codes])
        empty = conditioner(torch.zeros_like(context[..., : -conditioner.positions.shape[1]]))
        conditioning, unconditional = (Conditioning(contexts=((c, None),)) for c in (context, empty))
        latents = latent.generate(conditioning, unconditional, draw, options)
        return torch.cat([latent.wave(latent.mel(z)) for z in latents.split(1)])


def _overlapping(pieces: Iterable[Tensor], window: int, hop: int) -> Iterator[Tensor]:
    """Cut codes into windows; the last one is what is left, and never only frames that the one before already had."""
    held: Tensor | None = None
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], 2)
        while held.shape[2] > window:
            yield held[:, :, :window]
            held = held[:, :, hop:]
    if held is not None:
        yield held


def _grouped(items: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for item in items:
        group.append(item)
        if len(group) * len(item) >= size:
            yield group
            group = []
    if group:
        yield group


# --- prefix -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Past(State):
    """All that a prefix decoder remembers between blocks.

    Args:
        features: grid ``[B, channels, overlap steps, 16]`` of the codes just before the block.
        latents: their latents ``[B, C, overlap steps, 16]``.
        present: bool ``[B]``, false where nothing came before.
        context: this, ``magnitude`` and ``wave`` are the vocoder's, see :class:`.nn.vocos.Memory`.
        magnitude: see there.
        wave: see there.
        window: index of the next block, int64 ``[B]`` on the CPU, where noise is drawn.
    """

    features: Tensor
    latents: Tensor
    present: Tensor
    context: Tensor
    magnitude: Tensor
    wave: Tensor
    window: Tensor

    @property
    def vocoder(self) -> Memory:
        """The vocoder's part."""
        return Memory(self.context, self.magnitude, self.wave)


def begin(model: CodecModel, batch: int) -> Past:
    """Return the state of ``batch`` rows before any sound: no codes, no latents, silence."""
    config, latent = model.config, _decoder(model)
    assert isinstance(config.decoder.conditioning, GridConditioning)
    steps, cells, device = config.decoder.overlap * STEPS, MEL_BINS // LATENT_ROWS, latent.scale.device
    return Past(
        torch.zeros(batch, config.decoder.conditioning.channels, steps, cells, device=device, dtype=latent.dtype),
        torch.zeros(batch, config.decoder.latent.vae.latent_channels, steps, cells, device=device),
        torch.zeros(batch, dtype=torch.bool, device=device),
        *_vocoder(model).begin(batch, SILENCE),
        torch.zeros(batch, dtype=torch.int64),
    )


def step(
    model: CodecModel, codes: Tensor, past: Past, seeds: Sequence[int], options: SamplerOptions
) -> tuple[Tensor, Past]:
    """Generate one block after ``past``.

    Args:
        model: with its decoder half.
        codes: one block ``[B, 2, block frames]``.
        past: from :func:`begin` or the step before.
        seeds: of the noise, one per row.
        options: the caller's dials.

    Returns:
        Samples ``[B, block]``, which lag the codes by the vocoder's look-ahead, and the new state.
    """
    if codes.device.type == "cpu" and len(codes) > 1:
        # Products of another batch size round differently, and the phase iterations amplify that block after block.  On
        # the CPU, where a row is promised not to depend on its neighbours, each is computed alone.
        rows = zip(codes.split(1), past.rows(), seeds, strict=True)
        pairs = [step(model, row, own, [seed], options) for row, own, seed in rows]
        return torch.cat([wave for wave, _ in pairs]), Past.joined([own for _, own in pairs])
    latent, conditioner = _decoder(model), model.conditioner
    assert isinstance(conditioner, GridConditioner)
    with torch.inference_mode():
        features = model.embed(codes)
        grid = conditioner(features)
        empty = conditioner(torch.zeros_like(features))
        known = Known(past.latents, past.present)
        conditioning, unconditional = (
            Conditioning(concat=torch.cat([past.features, part], 2)) for part in (grid, empty)
        )
        draw = draw_windows(model.config, seeds, past.window.tolist(), grid.device)
        latents = latent.generate(conditioning, unconditional, draw, options, known)
        overlap = past.latents.shape[2]
        mel = latent.mel(latents).float()[:, overlap * LATENT_ROWS :]
        wave, memory = _vocoder(model).extend(mel.mT, past.vocoder)
        return wave, Past(
            grid[:, :, -overlap:],
            latents[:, :, -overlap:],
            torch.ones_like(past.present),
            *memory,
            past.window + 1,
        )


def finish(model: CodecModel, past: Past) -> Tensor:
    """Return the samples ``[B, S]`` that still lag behind, as if silence followed."""
    vocoder = _vocoder(model)
    if past.wave.device.type == "cpu" and len(past) > 1:
        return torch.cat([finish(model, own) for own in past.rows()])
    with torch.inference_mode():
        silence = past.wave.new_full((len(past), MEL_BINS, vocoder.lookahead), SILENCE)
        return vocoder.extend(silence, past.vocoder)[0]


def decode_prefix(model: CodecModel, pieces: Iterable[Tensor], seed: int, options: SamplerOptions) -> Iterator[Tensor]:
    """Decode block after block.

    Args:
        model: with its decoder half.
        pieces: consecutive codes ``[B, 2, F]``.
        seed: of the noise.
        options: the caller's dials.

    Yields:
        Consecutive samples ``[B, S]``, together as many as the codes stand for (rounded up to a block).
    """
    past: Past | None = None
    first = True
    behind = _vocoder(model).lookahead * HOP
    block = model.config.hop_frames
    for codes in _overlapping(pieces, block, block):
        past = begin(model, len(codes)) if past is None else past
        padded = functional.pad(codes, (0, block - codes.shape[2]), value=MISSING)
        wave, past = step(model, padded, past, [seed] * len(codes), options)
        yield wave[:, behind:] if first else wave
        first = False
    if past is not None:
        yield finish(model, past)


def _decoder(model: CodecModel) -> LatentDiffusion:
    assert model.latent is not None
    return model.latent


def _vocoder(model: CodecModel) -> Vocos:
    vocoder = _decoder(model).vocoder
    assert isinstance(vocoder, Vocos)
    return vocoder
