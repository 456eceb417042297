"""What the last stages train on: every block's AudioMAE features, latents and mel, once; and stage 2, k-means.

N blocks (0.32 s each), P patches per block, D feature channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..audio import FBANK_LOOKAHEAD, fbank, log_mel
from ..config import BANDS, COLUMN, HOP, LATENT_ROWS, PATCH, CodecConfig
from ..nn.audiomae import AudioMAE
from ..nn.quantize import nearest, stack
from ..nn.vae import AutoencoderKL
from .data import Clip, Corpus
from .loop import tracked

log = logging.getLogger(__name__)
BATCH = 64
STEPS = PATCH // LATENT_ROWS
EDGE = 3 * HOP
"""Samples after a block that its last rows of filter bank and mel look at."""


@dataclass(frozen=True)
class Blocks:
    """Consecutive blocks of all clips.

    Args:
        features: half precision ``[N, P, D]``.
        latents: half precision ``[N, C, steps, 16]``, unscaled; None before the autoencoder is trained.
        mels: half precision log-mel ``[N, rows, 64]``; None together with the latents.
        first: bool ``[N]``: the block begins a clip, so that the one before it belongs to another.
        held_out: bool ``[N]``.
    """

    features: np.ndarray
    latents: np.ndarray | None
    mels: np.ndarray | None
    first: np.ndarray
    held_out: np.ndarray

    def chains(self, length: int, *, held_out: bool) -> np.ndarray:
        """Return the second block of every chain of ``length`` consecutive blocks of one clip."""
        joined = ~self.first & (self.held_out == held_out)
        later = [np.append(joined[ahead:], np.zeros(ahead, bool)) for ahead in range(length - 1)]
        return np.flatnonzero(np.logical_and.reduce(later))


def prepare(
    corpus: Corpus, config: CodecConfig, mae: AudioMAE, vae: AutoencoderKL | None, out: Path, device: str
) -> Blocks:
    """Compute features and (given a ``vae``) latents and mels of the corpus into ``out``, or open what is there.

    Each clip is played at one random level, so that codes are learnt for quiet recordings too.
    """
    plan = [(clip, clip.length // config.block) for clip in corpus.clips if clip.length >= 2 * config.block]
    total = sum(count for _, count in plan)
    first, held_out = np.zeros(total, bool), np.zeros(total, bool)
    position = 0
    for clip, count in plan:
        first[position] = True
        held_out[position : position + count] = clip.held_out
        position += count
    context, overlap = config.encoder.context, config.decoder.overlap
    mae.to(device).eval()

    def features(wave: Tensor) -> Tensor:
        size = config.block + context * COLUMN + FBANK_LOOKAHEAD
        rows = fbank(wave.unfold(0, size, config.block))
        result: Tensor = mae(rows)[:, context * BANDS :]
        return result

    def heard(wave: Tensor, after: int = 0) -> Tensor:
        size = config.block + overlap * COLUMN + after
        return log_mel(wave[(context - overlap) * COLUMN :].unfold(0, size, config.block))

    def latents(wave: Tensor) -> Tensor:
        # The autoencoder sees what it was trained on: windows of the decoder's length.
        assert vae is not None
        return vae.to(device).eval().encode(heard(wave)[:, None])[0][:, :, overlap * STEPS :]

    def mels(wave: Tensor) -> Tensor:
        return heard(wave, EDGE)[:, overlap * PATCH : (overlap + config.coded_columns) * PATCH]

    arrays = []
    wanted: dict[str, Callable[[Tensor], Tensor]] = {"features": features}
    if vae is not None:
        wanted |= {"latents": latents, "mels": mels}
    for name, compute in wanted.items():
        path = out / f"{name}.npy"
        if not path.exists():
            _fill(corpus, config, plan, compute, path, device)
        arrays.append(np.load(path, mmap_mode="r"))
    found = dict(zip(wanted, arrays, strict=True))
    return Blocks(found["features"], found.get("latents"), found.get("mels"), first, held_out)


@torch.inference_mode()
def _fill(
    corpus: Corpus,
    config: CodecConfig,
    plan: list[tuple[Clip, int]],
    compute: Callable[[Tensor], Tensor],
    path: Path,
    device: str,
) -> None:
    """Write ``compute``'s result for every block, one clip after the other; the file appears when it is complete."""
    context = config.encoder.context * COLUMN
    total = sum(count for _, count in plan)
    rng = np.random.default_rng(7)
    array: np.ndarray | None = None
    position = 0
    part = path.with_suffix(".part.npy")
    for clip, count in tracked(plan, path.stem):
        gain = 10 ** (rng.uniform(-10, 3) / 20)
        wave = corpus.wave(clip, -context, count * config.block + context + EDGE) * gain
        wave = (wave / max(1.0, float(wave.abs().max()))).to(device)
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            piece = wave[start * config.block :][: size * config.block + context + EDGE]
            result = compute(piece)[:size].half().cpu().numpy()
            if array is None:
                array = np.lib.format.open_memmap(part, "w+", np.float16, (total, *result.shape[1:]))
            array[position : position + size] = result
            position += size
    part.replace(path)


def kmeans(blocks: Blocks, config: CodecConfig, *, rounds: int = 6, samples: int = 96_000, seed: int = 0) -> Tensor:
    """Cluster stacked features (Lloyd's algorithm): the semantic codebook ``[semantic_size, feature_dim]``.

    Args:
        blocks: where the features come from.
        config: says how many centroids, and how features are stacked.
        rounds: of assignment and averaging.
        samples: vectors to cluster, at most.
        seed: of the choice of vectors and of the starting centroids.
    """
    rng = np.random.default_rng(seed)
    per_block = config.coded_columns // config.stack[0] * config.group
    pool = np.flatnonzero(~blocks.held_out)
    chosen = np.sort(rng.choice(pool, min(len(pool), samples // per_block), replace=False))
    x = stack(torch.from_numpy(blocks.features[chosen].astype(np.float32)), config.stack).flatten(0, 1)
    size = config.encoder.semantic_size
    table = x[torch.from_numpy(rng.choice(len(x), size, replace=False))].clone()
    for index in range(rounds):
        codes = nearest(x, table)
        counts = torch.bincount(codes, minlength=size)
        sums = torch.zeros_like(table).index_add_(0, codes, x)
        table = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), table)
        lonely = torch.nonzero(counts == 0)[:, 0]
        table[lonely] = x[torch.from_numpy(rng.choice(len(x), len(lonely)))]
        error = (x - table[codes]).square().sum(1).mean() / (x - x.mean(0)).square().sum(1).mean()
        log.info("k-means %s round %d: unexplained variance %.4f, empty %d", config.name, index, error, len(lonely))
    return table
