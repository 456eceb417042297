"""How windows of codes become one continuous sound: cross-faded (official) or each given the latents before it (mini).

B rows, F frames, D channels, T latent steps, M mel rows, S samples at 16 kHz.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .config import COLUMN, HOP, LATENT_ROWS, MEL_BINS, PATCH, CodecConfig, GridConditioning
from .diffusion import Draw, SamplerOptions, noise
from .latent import Conditioning, Known, LatentDiffusion
from .model import MISSING, CodecModel
from .nn.conditioners import ContextConditioner, GridConditioner
from .nn.vocos import Vocos

SILENCE = -11.512925464970229
"""Log-mel of digital silence, ln(1e-5)."""
STEPS = PATCH // LATENT_ROWS
"""Latent steps per patch column."""


def draw_windows(config: CodecConfig, seed: int, windows: list[int], device: torch.device) -> Draw:
    """Return the noise of rows that stand for the given window indices; one index per row."""
    decoder = config.decoder
    shape = (decoder.vae.latent_channels, decoder.columns * STEPS, MEL_BINS // LATENT_ROWS)

    def draw(step: int) -> Tensor:
        distinct = {window: noise(seed, window, step, shape) for window in set(windows)}
        return torch.stack([distinct[window] for window in windows]).to(device)

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
    ramp = torch.linspace(0, 1, fade, dtype=torch.float64)
    tail: Tensor | None = None
    index = 0
    for group in _grouped(_overlapping(pieces, config.window_frames, config.hop_frames), at_once):
        batch = len(group[0])
        for wave in generate_windows(model, group, range(index, index + len(group)), seed, options, at_once).split(
            batch
        ):
            head = wave[:, :fade]
            if tail is not None:
                rising = ramp.to(head)
                head = head * rising + tail * rising.flip(0)
            yield torch.cat([head, wave[:, fade:-fade]], 1)
            tail = wave[:, -fade:]
        index += len(group)
    if tail is not None:
        yield tail


def generate_windows(
    model: CodecModel, codes: list[Tensor], windows: Iterable[int], seed: int, options: SamplerOptions, at_once: int
) -> Tensor:
    """Decode single windows of codes (each ``[B, 2, F]``) to samples ``[len(codes) * B, window]``, window-major."""
    config, latent, conditioner = model.config, _decoder(model), model.conditioner
    assert isinstance(conditioner, ContextConditioner)
    rows: list[tuple[int, Tensor]] = [
        (window, row) for window, batch in zip(windows, codes, strict=True) for row in batch.split(1)
    ]
    waves = []
    with torch.inference_mode():
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            context = torch.cat([conditioner(model.embed(row)) for _, row in part])
            empty = conditioner(torch.zeros_like(context[..., : -conditioner.positions.shape[1]]))
            conditioning, unconditional = (Conditioning(contexts=((c, None),)) for c in (context, empty))
            draw = draw_windows(config, seed, [window for window, _ in part], context.device)
            latents = latent.generate(conditioning, unconditional, draw, options)
            waves += [latent.wave(latent.mel(z)) for z in latents.split(1)]
    return torch.cat(waves)


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
class Past:
    """All that a prefix decoder remembers between blocks; a value, owned by whoever decodes.

    Args:
        features: grid ``[B, channels, overlap steps, 16]`` of the codes just before the block.
        latents: their latents ``[B, C, overlap steps, 16]``.
        present: bool ``[B]``, false where nothing came before.
        mel: the rows ``[B, M, 64]`` that the vocoder still needs.
        wave: the samples ``[B, S]`` that it continues from.
        window: index of the next block.
    """

    features: Tensor
    latents: Tensor
    present: Tensor
    mel: Tensor
    wave: Tensor
    window: int

    def rows(self) -> list[Past]:
        """Split into the states of single rows."""
        parts = (self.features, self.latents, self.present, self.mel, self.wave)
        rows = zip(*(part.split(1) for part in parts), strict=True)
        return [
            Past(features, latents, present, mel, wave, self.window) for features, latents, present, mel, wave in rows
        ]

    @staticmethod
    def joined(rows: list[Past]) -> Past:
        """Undo :meth:`rows`."""
        return Past(
            torch.cat([row.features for row in rows]),
            torch.cat([row.latents for row in rows]),
            torch.cat([row.present for row in rows]),
            torch.cat([row.mel for row in rows]),
            torch.cat([row.wave for row in rows]),
            rows[0].window,
        )


def begin(model: CodecModel, batch: int) -> Past:
    """Return the state of ``batch`` rows before any sound: no codes, no latents, silence."""
    config, latent, vocoder = model.config, _decoder(model), _vocoder(model)
    assert isinstance(config.decoder.conditioning, GridConditioning)
    steps, cells, device = config.decoder.overlap * STEPS, MEL_BINS // LATENT_ROWS, latent.scale.device
    return Past(
        torch.zeros(batch, config.decoder.conditioning.channels, steps, cells, device=device, dtype=latent.dtype),
        torch.zeros(batch, config.decoder.vae.latent_channels, steps, cells, device=device),
        torch.zeros(batch, dtype=torch.bool, device=device),
        torch.full((batch, vocoder.history + vocoder.lookahead, MEL_BINS), SILENCE, device=device),
        torch.zeros(batch, vocoder.memory, device=device),
        0,
    )


def step(model: CodecModel, codes: Tensor, past: Past, seed: int, options: SamplerOptions) -> tuple[Tensor, Past]:
    """Generate one block after ``past``.

    Args:
        model: with its decoder half.
        codes: one block ``[B, 2, block frames]``.
        past: from :func:`begin` or the step before.
        seed: of the noise.
        options: the caller's dials.

    Returns:
        Samples ``[B, block]``, which lag the codes by the vocoder's look-ahead, and the new state.
    """
    if codes.device.type == "cpu" and len(codes) > 1:
        # Products of another batch size round differently, and the phase iterations amplify that block after block.  On
        # the CPU, where a row is promised not to depend on its neighbours, each is computed alone.
        pairs = [step(model, row, own, seed, options) for row, own in zip(codes.split(1), past.rows(), strict=True)]
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
        draw = draw_windows(model.config, seed, [past.window] * len(codes), grid.device)
        latents = latent.generate(conditioning, unconditional, draw, options, known)
        overlap = past.latents.shape[2]
        mel = torch.cat([past.mel, latent.mel(latents).float()[:, overlap * LATENT_ROWS :]], 1)
        wave = _vocoder(model).extend(mel.mT, past.wave)
        return wave, Past(
            grid[:, :, -overlap:],
            latents[:, :, -overlap:],
            torch.ones_like(past.present),
            mel[:, -past.mel.shape[1] :],
            torch.cat([past.wave, wave], 1)[:, -past.wave.shape[1] :],
            past.window + 1,
        )


def finish(model: CodecModel, past: Past) -> Tensor:
    """Return the samples ``[B, lookahead]`` that still lag behind, as if silence followed."""
    vocoder = _vocoder(model)
    if past.mel.device.type == "cpu" and len(past.mel) > 1:
        return torch.cat([finish(model, own) for own in past.rows()])
    with torch.inference_mode():
        mel = functional.pad(past.mel, (0, 0, 0, vocoder.lookahead), value=SILENCE)
        return vocoder.extend(mel.mT, past.wave)


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
    behind = _vocoder(model).lookahead * HOP
    block = model.config.hop_frames
    for codes in _overlapping(pieces, block, block):
        past = begin(model, len(codes)) if past is None else past
        wave, past = step(model, functional.pad(codes, (0, block - codes.shape[2]), value=MISSING), past, seed, options)
        yield wave[:, behind:] if past.window == 1 else wave
    if past is not None:
        yield finish(model, past)


def _decoder(model: CodecModel) -> LatentDiffusion:
    assert model.latent is not None
    return model.latent


def _vocoder(model: CodecModel) -> Vocos:
    vocoder = _decoder(model).vocoder
    assert isinstance(vocoder, Vocos)
    return vocoder
