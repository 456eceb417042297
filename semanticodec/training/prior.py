"""The prior of entropy-coded codes: the networks of :mod:`semanticodec.wire.prior`, trained on the recordings' codes.

They are trained as the integers that they will be: weights and activations are rounded in every step and gradients pass
through the rounding (Bengio et al. 2013), so that nothing is lost when they are written down.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from ..codec import SemantiCodec
from ..config import CodecConfig
from ..wire.prior import BIAS, FRACTION, HIDDEN_MAX, MARGIN, OUTPUT_MAX, SLOTS, STREAMS, TENSORS, WEIGHT
from .data import Corpus
from .loop import Logs, RunOptions, adamw, descend, mean_logs, tracked

log = logging.getLogger(__name__)
WIDTH, HIDDEN, OUTPUT = 24, 128, 40
PLACES = {
    "embedding": FRACTION,
    "first": WEIGHT,
    "first_bias": FRACTION + WEIGHT,
    "second": WEIGHT,
    "second_bias": FRACTION + WEIGHT,
    "output": FRACTION,
    "bias": BIAS,
}
"""Binary places of each tensor."""
WIDE = ("first_bias", "second_bias")
"""Tensors that need more than 8 bits."""
WIDEST = 1 << 23
"""Largest number in these; what is added to them stays below as much, so that float32 holds the sums."""
REMEMBERED = (0.15, 0.15, 0.7)
"""How often 0, 1 or 2 steps are known before a code: messages and segments begin without any."""


def _through(rounded: Tensor, value: Tensor) -> Tensor:
    """Return ``rounded``, with the gradient of ``value``."""
    return value + (rounded - value).detach()


class LayersNet(nn.Module):
    """The network of one stream with the values that its integers will stand for."""

    def __init__(self, vectors: Tensor, slots: int, bands: int, counts: Tensor) -> None:
        """Begin with an ``embedding`` ``[size + 1, WIDTH]`` and the bias of how often codes were seen [bands, size]."""
        super().__init__()
        inputs, size = slots * WIDTH, len(vectors) - 1
        share = (counts + 0.5 * counts.sum(1, keepdim=True) / size) / (1.5 * counts.sum(1, keepdim=True))
        self.embedding = nn.Parameter(vectors)
        self.first = nn.Parameter(torch.randn(inputs, HIDDEN) * inputs**-0.5)
        self.first_bias = nn.Parameter(torch.zeros(bands, HIDDEN))
        self.second = nn.Parameter(torch.randn(HIDDEN, OUTPUT) * HIDDEN**-0.5)
        self.second_bias = nn.Parameter(torch.zeros(bands, OUTPUT))
        self.output = nn.Parameter(torch.randn(size, OUTPUT) * 0.1)
        self.bias = nn.Parameter((share * size).log())

    def integer(self, name: str) -> Tensor:
        """Return a tensor in units of its last binary place."""
        limit = WIDEST if name in WIDE else 127
        value: Tensor = getattr(self, name)
        return (value * (1 << PLACES[name])).round().clamp(-limit, limit)

    def rounded(self, name: str) -> Tensor:
        """Return a tensor as it will be, with gradients."""
        value: Tensor = getattr(self, name)
        return _through(self.integer(name) / (1 << PLACES[name]), value)

    def forward(self, seen: Tensor, band: Tensor) -> Tensor:
        """Map vectors of what came before ``[N, slots * WIDTH]`` and bands ``[N]`` to logits ``[N, size]``."""
        x = seen @ self.rounded("first") + self.rounded("first_bias")[band]
        x = _floored(x).clamp(0, HIDDEN_MAX / (1 << FRACTION))
        x = x @ self.rounded("second") + self.rounded("second_bias")[band]
        x = _floored(x).clamp(-OUTPUT_MAX / (1 << FRACTION), OUTPUT_MAX / (1 << FRACTION))
        logits: Tensor = x @ self.rounded("output").T + self.rounded("bias")[band]
        return logits


def _floored(x: Tensor) -> Tensor:
    return _through((x * (1 << FRACTION)).floor() / (1 << FRACTION), x)


class PriorNet(nn.Module):
    """The networks of both streams."""

    def __init__(self, books: list[Tensor], counts: list[Tensor]) -> None:
        super().__init__()
        self.streams = nn.ModuleList(
            LayersNet(_principal(book), len(SLOTS[q]), len(counts[q]), counts[q]) for q, book in enumerate(books)
        )

    def forward(self, grids: list[Tensor], step: Tensor, band: Tensor, remembered: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean bits per (semantic, acoustic) code at places ``[N]``.

        Args:
            grids: per stream, int64 ``[steps, bands + 2 * MARGIN]``.
            step: of each place, at least ``MARGIN``.
            band: of each place, without the margin.
            remembered: how many steps before it are known.
        """
        nets = self._nets()
        vectors = [layers.rounded("embedding") for layers in nets]
        bits = []
        for q, layers in zip(STREAMS, nets, strict=True):
            seen = []
            for other, dt, db in SLOTS[q]:
                codes = grids[other][step + dt, band + MARGIN + db]
                seen.append(
                    functional.embedding(codes.masked_fill(remembered < -dt, len(vectors[other]) - 1), vectors[other])
                )
            logits = layers(torch.cat(seen, 1), band)
            bits.append(functional.cross_entropy(logits, grids[q][step, band + MARGIN]) / math.log(2))
        semantic, acoustic = bits
        return semantic, acoustic

    def _nets(self) -> list[LayersNet]:
        return [layers for layers in self.streams if isinstance(layers, LayersNet)]

    def tensors(self) -> dict[str, np.ndarray]:
        """Return the integers, as :func:`semanticodec.wire.prior.parse` takes them."""
        return {
            f"{q}.{name}": layers.integer(name).detach().cpu().numpy().astype(np.int32 if name in WIDE else np.int8)
            for q, layers in enumerate(self._nets())
            for name in TENSORS
        }


def _principal(book: Tensor) -> Tensor:
    """Return the first principal components of a codebook, scaled to one, and zeros for "no code"."""
    centred = book.float() - book.float().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    vectors = centred @ axes[:WIDTH].T
    vectors = functional.pad(vectors, (0, WIDTH - vectors.shape[1]))
    return functional.pad(vectors / vectors.std(0).mean(), (0, 0, 0, 1))


class CodedCorpus:
    """Codes of all recordings of one side as one grid per stream, recordings kept apart by steps without codes."""

    def __init__(self, codes: list[np.ndarray], config: CodecConfig) -> None:
        sizes, group = config.codebook_sizes, config.group
        parts: list[list[np.ndarray]] = [[], []]
        for recording in codes:
            for q, size in enumerate(sizes):
                grid = recording[q].astype(np.int64).reshape(-1, group)
                parts[q].append(np.pad(grid, ((MARGIN, 1), (MARGIN, MARGIN)), constant_values=size))
        self.grids = [torch.from_numpy(np.concatenate(part)) for part in parts]
        step, band = (self.grids[0][:, MARGIN:-MARGIN] < sizes[0]).nonzero().unbind(1)
        self.places = torch.stack([step, band])

    def batch(self, size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (step, band, steps remembered) of random places."""
        generator = torch.Generator().manual_seed(seed)
        step, band = self.places[:, torch.randint(self.places.shape[1], (size,), generator=generator)]
        chances = torch.tensor(REMEMBERED)
        return step, band, torch.multinomial(chances, size, replacement=True, generator=generator)

    def counts(self, config: CodecConfig) -> list[Tensor]:
        """Return how often each code was seen in each band, ``[bands, size]`` per stream."""
        step, band = self.places
        return [
            torch.zeros(config.group, size).index_put_(
                (band, grid[step, band + MARGIN]), torch.ones(()), accumulate=True
            )
            for grid, size in zip(self.grids, config.codebook_sizes, strict=True)
        ]


def coded(corpus: Corpus, codec: SemantiCodec, folder: Path) -> tuple[CodedCorpus, CodedCorpus]:
    """Return the codes of the recordings to train on and of those held out, encoding them the first time.

    Args:
        corpus: the recordings.
        codec: with its encoder half.
        folder: keeps ``codes-RATE-HASH.npz``.
    """
    path = folder / f"codes-{codec.config.token_rate}-{codec.weights_hash[:8]}.npz"
    if not path.exists():
        found = {
            str(index): codec.encode(corpus.wave(clip)[None], 16_000)[0].numpy().astype(np.uint16)
            for index, clip in enumerate(tracked(corpus.clips, codec.config.name))
        }
        part = path.with_suffix(".part.npz")
        np.savez(part, **found)  # type: ignore[arg-type]
        part.replace(path)
    with np.load(path, allow_pickle=False) as file:
        codes = [file[str(index)] for index in range(len(corpus.clips))]
    sides = [
        [one for one, clip in zip(codes, corpus.clips, strict=True) if clip.held_out == held_out]
        for held_out in (False, True)
    ]
    return CodedCorpus(sides[0], codec.config), CodedCorpus(sides[1], codec.config)


class PriorStage:
    """Train the prior of one preset."""

    def __init__(self, codec: SemantiCodec, sides: tuple[CodedCorpus, CodedCorpus], options: RunOptions) -> None:
        self.name = f"prior-{codec.config.token_rate}"
        self.options = options
        self.corpus, self.held_out = sides
        books = codec.model.codebooks
        self.raw = PriorNet([books.semantic.cpu(), books.acoustic.cpu()], self.corpus.counts(codec.config))

    def setup(self, fabric: Fabric) -> None:
        """Wrap the model and its optimiser."""
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))
        for side in (self.corpus, self.held_out):
            side.grids = [grid.to(fabric.device) for grid in side.grids]
        self.fabric = fabric

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the model and the optimiser."""
        return {"model": self.raw, "optimizer": self.optimizer}

    def _bits(self, side: CodedCorpus, size: int, seed: int) -> tuple[Tensor, Tensor]:
        places = (part.to(self.fabric.device) for part in side.batch(size, seed))
        bits: tuple[Tensor, Tensor] = self.model(side.grids, *places)
        return bits

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step."""
        del progress
        semantic, acoustic = self._bits(self.corpus, self.options.batch, 2 * (index + fabric.global_rank * 10**9))
        descend(fabric, semantic + acoustic, self.model, self.optimizer)
        return {"semantic": semantic.detach(), "acoustic": acoustic.detach()}

    def evaluate(self) -> Logs:
        """Return the held-out bits per code."""

        def one(index: int) -> Logs:
            semantic, acoustic = self._bits(self.held_out, 1024, 2 * index + 1)
            return {"semantic": semantic, "acoustic": acoustic}

        return mean_logs(one, 8)

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Codes have nothing to look at."""
