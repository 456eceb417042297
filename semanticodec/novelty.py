"""How new generated sounds are: which training clip each comes nearest to, and a page to hear the nearest pairs.

G generated clips, N training clips, D channels.

Source: MusicLDM's measure of plagiarism (spec 5.5): the cosine of CLAP embeddings of 10 s clips.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from .audio import load, resample
from .codec import SemantiCodec
from .conditioners.clap import CLAP, RATE
from .config import BANDS, SAMPLE_RATE
from .errors import AudioError, ConfigError

SECONDS = 10
"""Length of a clip; longer files are cut into clips, of which the last may be shorter."""
SHORTEST = 0.5
"""Seconds below which the rest of a longer file is left out."""
FEWEST = 10
"""Training clips below which their mean says more about each of them than about what they share."""
THRESHOLDS = (0.90, 0.95)
BINS = 40
"""Of the histogram, between cosines of -1 and 1."""
_AT_ONCE = 1024


@dataclass(frozen=True)
class Embedder:
    """What turns a clip into a vector.

    Args:
        name: of the model and its weights; embeddings are kept under this name.
        sample_rate: that ``embed`` wants, in Hz.
        embed: maps mono samples ``[1, S]``, at most 10 s, to ``[1, D]``.
        standardised: the training clips' mean is taken away and every channel divided by their spread first.  Vectors
            that were not trained to be compared by their cosine all point the same way: every clip would be a copy.
    """

    name: str
    sample_rate: int
    embed: Callable[[Tensor], Tensor]
    standardised: bool = False


@dataclass(frozen=True)
class Clip:
    """A piece of a sound file: ``samples`` samples from ``start`` on, at the embedder's sample rate."""

    file: Path
    start: int
    samples: int


class Embedded(NamedTuple):
    """The clips of one file, and their vectors ``[clips, D]``."""

    clips: tuple[Clip, ...]
    vectors: Tensor


@dataclass(frozen=True)
class Novelty:
    """What was found.

    Args:
        embedder: name of what was compared.
        generated: the G clips.
        training: the N clips.
        sample_rate: of the clips' times, in Hz.
        similarity: highest cosine of each generated clip with any training clip, float32 ``[G]``.
        nearest: index of that training clip, int64 ``[G]``.
        standardised: whether the embeddings were standardised by those of the training clips.
    """

    embedder: str
    generated: tuple[Clip, ...]
    training: tuple[Clip, ...]
    sample_rate: int
    similarity: Tensor
    nearest: Tensor
    standardised: bool = False

    def fraction(self, threshold: float) -> float:
        """Return the share of generated clips whose nearest training clip is at least as near as ``threshold``."""
        return float((self.similarity >= threshold).double().mean())

    @property
    def histogram(self) -> list[int]:
        """Number of generated clips in each of ``BINS`` equal ranges of cosines from -1 to 1."""
        places = ((self.similarity.clamp(-1, 1) + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        return torch.bincount(places, minlength=BINS).tolist()

    @property
    def closest(self) -> list[int]:
        """The generated clips, the one most like a training clip first."""
        return self.similarity.argsort(descending=True, stable=True).tolist()


def nearest(generated: Tensor, training: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest training clip of every generated one.

    Args:
        generated: embeddings ``[G, D]`` of any length.
        training: embeddings ``[N, D]``, N >= 1.

    Returns:
        The highest cosine ``[G]``, and its training clip, int64 ``[G]``.

    Raises:
        ConfigError: one of them is empty, or they are not embeddings of the same model.
    """
    if not len(training) or not len(generated) or generated.shape[1] != training.shape[1]:
        raise ConfigError(f"cannot compare embeddings {tuple(generated.shape)} with {tuple(training.shape)}")
    unit = functional.normalize(training.float(), dim=-1)
    found = [(functional.normalize(part.float(), dim=-1) @ unit.T).max(dim=-1) for part in generated.split(_AT_ONCE)]
    return torch.cat([x.values for x in found]), torch.cat([x.indices for x in found])


def compare(generated: Sequence[Embedded], training: Sequence[Embedded], embedder: Embedder) -> Novelty:
    """Compare sound files.

    Args:
        generated: from :func:`embed_file`.
        training: likewise, by the same embedder.
        embedder: what they were embedded by.

    Raises:
        ConfigError: there are no files on one side, or too few clips to know what all of them share.
    """
    if not generated or not training:
        raise ConfigError(f"seen {len(generated)} generated and {len(training)} training files; both need at least one")
    a, b = (torch.cat([file.vectors for file in side]) for side in (generated, training))
    if embedder.standardised:
        if len(b) < FEWEST:
            raise ConfigError(
                f"seen {len(b)} training clips; {embedder.name} compares how clips differ from all of them, for which "
                f"{FEWEST} are wanted: give more recordings, or CLAP"
            )
        mean, spread = b.mean(0), b.std(0).clamp_min(1e-6)
        a, b = ((x - mean) / spread for x in (a, b))
    similarity, index = nearest(a, b)
    made, known = (tuple(clip for file in side for clip in file.clips) for side in (generated, training))
    return Novelty(embedder.name, made, known, embedder.sample_rate, similarity, index, embedder.standardised)


def embed_file(file: Path, embedder: Embedder, cache: Path | None = None) -> Embedded:
    """Cut a sound file into clips and embed them.

    Args:
        file: of any rate and length; channels are averaged.
        embedder: what to compare by.
        cache: folder where embeddings are kept between calls, by the content of the files; None keeps none.

    Raises:
        AudioError: the file is not readable audio, or its embedding is not finite.
    """
    kept = None if cache is None else cache / f"{_key(file, embedder)}.safetensors"
    spans, vectors = _recall(kept) or _embed(file, embedder)
    if kept is not None and not kept.is_file():
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        save_file({"spans": spans, "vectors": vectors}, part)
        part.replace(kept)
    return Embedded(tuple(Clip(file, *span) for span in spans.tolist()), vectors)


def clap_embedder(clap: CLAP, name: str) -> Embedder:
    """Compare by what CLAP hears, as published.

    Args:
        clap: filled.
        name: of its weights.
    """
    return Embedder(f"CLAP ({name})", RATE, lambda wave: clap.audio(wave, RATE))


def mae_embedder(codec: SemantiCodec) -> Embedder:
    """Compare by the codec's AudioMAE features, where there is no CLAP: their mean and spread over time in each band.

    Args:
        codec: with its encoder half.
    """

    def embed(wave: Tensor) -> Tensor:
        features = codec.features(wave, SAMPLE_RATE).unflatten(1, (-1, BANDS))
        return torch.cat([features.mean(1), features.std(1, correction=0)], -1).flatten(1)

    name = f"AudioMAE features of {codec.config.name}, codebooks {codec.weights_hash[:8]}"
    return Embedder(name, SAMPLE_RATE, embed, standardised=True)


def read(clip: Clip, sample_rate: int) -> Tensor:
    """Return the samples ``[1, S]`` of a clip whose times are at ``sample_rate`` Hz."""
    return _mono(clip.file, sample_rate)[:, clip.start : clip.start + clip.samples]


def _mono(file: Path, sample_rate: int) -> Tensor:
    wave, rate = load(file)
    return resample(wave.mean(0, keepdim=True), rate, sample_rate)


def _spans(samples: int, sample_rate: int) -> Iterator[tuple[int, int]]:
    size = SECONDS * sample_rate
    for start in range(0, samples, size):
        length = min(size, samples - start)
        if not start or length >= SHORTEST * sample_rate:
            yield start, length


def _embed(file: Path, embedder: Embedder) -> tuple[Tensor, Tensor]:
    wave = _mono(file, embedder.sample_rate)
    spans = list(_spans(wave.shape[1], embedder.sample_rate))
    vectors = torch.cat([embedder.embed(wave[:, start : start + length]).float().cpu() for start, length in spans])
    if not torch.isfinite(vectors).all():
        raise AudioError(f"the embedding of {file} by {embedder.name} is not finite")
    return torch.tensor(spans), vectors


def _recall(kept: Path | None) -> tuple[Tensor, Tensor] | None:
    """Return what an earlier call computed; a damaged file is computed again."""
    if kept is None or not kept.is_file():
        return None
    try:
        found = load_file(kept)
        return found["spans"], found["vectors"]
    except (SafetensorError, KeyError):
        kept.unlink()
        return None


def _key(file: Path, embedder: Embedder) -> str:
    with file.open("rb") as opened:
        content = hashlib.file_digest(opened, "sha256").hexdigest()
    name = json.dumps([embedder.name, embedder.sample_rate, SECONDS, SHORTEST, content])
    return hashlib.sha256(name.encode()).hexdigest()


def summary(found: Novelty) -> str:
    """Return the figures as a few lines of text."""
    similarity = found.similarity.double().numpy()
    lines = [
        f"embedding   {found.embedder}" + (", standardised by the training clips" if found.standardised else ""),
        f"clips       {len(found.generated)} generated, {len(found.training)} of training, up to {SECONDS} s each",
        *(
            f"at {t:.2f}     {found.fraction(t):7.1%} of the generated clips have a training clip this near"
            for t in THRESHOLDS
        ),
        f"nearest     {similarity.max():.3f} at most, {np.median(similarity):.3f} in the median",
    ]
    return "\n".join(lines)
