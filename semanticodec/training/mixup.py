"""Beat-synchronous mixup: pairs of recordings in step with each other, mixed as sound or as latents.

B batch, S samples, C channels, T latent steps.

Source: MusicLDM (spec 5.4): recordings of alike tempo, both cut to start on a downbeat, mixed by Beta(5, 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..compiled import import_librosa
from ..errors import AudioError, ConfigError
from ..latent import LatentDiffusion
from .data import Clip, Corpus

BAR = 4
"""Beats per bar, where only beats are known."""
GROUP = 3
"""Beats per minute that share a group."""
LOW_FRAMES = 4
"""Onset frames around a beat that tell whether it is the strong one."""


class Beats(NamedTuple):
    """Where a recording's beats and downbeats (first beats of bars) are, in seconds."""

    beats: tuple[float, ...]
    downbeats: tuple[float, ...]


def read_beats(path: Path) -> Beats:
    """Read an annotation as beat trackers write it: a line per beat, its time in seconds and its place in the bar.

    Args:
        path: of the text file; places count from 1.

    Raises:
        AudioError: a line holds something else, or the times do not rise.
    """
    beats: list[float] = []
    downbeats: list[float] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        try:
            time, place = float(fields[0]), int(float(fields[1]))
        except (ValueError, IndexError) as error:
            raise AudioError(f"{path}, line {number}: wanted a time and a place in the bar, seen {line!r}") from error
        if not time > (beats[-1] if beats else -1.0):
            raise AudioError(f"{path}, line {number}: the time {time} does not come after the one before")
        beats.append(time)
        if place == 1:
            downbeats.append(time)
    return Beats(tuple(beats), tuple(downbeats))


def track_beats(wave: Tensor, sample_rate: int) -> Beats:
    """Find beats with librosa's tracker, and take for downbeats that quarter of them that is struck hardest.

    Args:
        wave: ``[S]``.
        sample_rate: in Hz.

    Returns:
        The beats; none if nothing is struck.  Bars are taken to have four beats: annotations know better.
    """
    librosa = import_librosa()
    samples = wave.numpy()
    onsets = librosa.onset.onset_strength(y=samples, sr=sample_rate)
    _, frames = librosa.beat.beat_track(onset_envelope=onsets, sr=sample_rate)
    if len(frames) < BAR:
        return Beats((), ())
    energy = librosa.feature.rms(y=samples)[0]
    loud = [float((onsets * energy[: len(onsets)])[max(f - 1, 0) : f + LOW_FRAMES].max()) for f in frames]
    phase = int(np.argmax([np.mean(loud[start::BAR]) for start in range(BAR)]))
    times = librosa.frames_to_time(frames, sr=sample_rate)
    return Beats(tuple(map(float, times)), tuple(map(float, times[phase::BAR])))


def tempo(beats: Sequence[float]) -> int:
    """Return whole beats per minute of beat times in seconds; 0 for fewer than two beats.

    Raises:
        AudioError: a time does not come after the one before.
    """
    for before, after in pairwise(beats):
        if not before < after:
            raise AudioError(f"seen a beat at {after} s after one at {before} s; beat times must rise: sort them")
    if len(beats) < 2:
        return 0
    return round((len(beats) - 1) / (beats[-1] - beats[0]) * 60)


def tempo_groups(tracks: Mapping[str, Sequence[float]]) -> dict[int, list[str]]:
    """Return the names of recordings by group, three beats per minute each, of their beat times in seconds."""
    groups: dict[int, list[str]] = {}
    for name, beats in tracks.items():
        groups.setdefault(tempo(beats) // GROUP, []).append(name)
    return groups


class Pairs(NamedTuple):
    """Crops to be mixed: ``first`` and ``second`` ``[B, S]``, and the weight of the first, ``[B]``.

    A weight of 1 means that the first crop stays as it is.
    """

    first: Tensor
    second: Tensor
    weight: Tensor


class BeatPairs:
    """Random pairs of equal tempo that start on a downbeat: a pure function of (seed, step, rank)."""

    def __init__(
        self,
        corpus: Corpus,
        beats: Mapping[str, Beats],
        sample_rate: int,
        length: int,
        batch: int,
        *,
        seed: int,
        share: float = 1.0,
        alpha: float = 5.0,
    ) -> None:
        """Begin.

        Args:
            corpus: the recordings.
            beats: of each clip by its name; clips without are left out.
            sample_rate: of the corpus, in Hz.
            length: samples of a crop.
            batch: pairs at a time.
            seed: of all choices.
            share: how often a crop is mixed at all.
            alpha: both parameters of the Beta distribution of the weight.

        Raises:
            AudioError: the times of a clip's beats do not rise.
            ConfigError: no clip has beats.
        """
        self.corpus, self.length, self.batch, self.seed = corpus, length, batch, seed
        self.share, self.alpha = share, alpha
        self.clips = [clip for clip in corpus.clips if clip.name in beats]
        if not self.clips:
            raise ConfigError(f"none of {len(corpus.clips)} clips has beats; annotate them, or track them")
        self.starts = {
            clip.name: _fitting([round(t * sample_rate) for t in beats[clip.name].downbeats], clip.length, length)
            for clip in self.clips
        }
        by_name = {clip.name: clip for clip in self.clips}
        # No tempo, that is 0, is not a tempo that recordings share.
        timed = {name: found for name in by_name if self.starts[name] and tempo(found := beats[name].beats)}
        groups = tempo_groups(timed)
        self.partners = {
            name: [by_name[other] for other in names if other != name] for names in groups.values() for name in names
        }

    def __call__(self, step: int, rank: int = 0) -> Pairs:
        """Return the pairs of one step.

        A clip with no tempo, with no downbeat, or alone in its group is not mixed; with no downbeat it starts anywhere.
        """
        rng = np.random.default_rng((self.seed, step, rank))
        rows = [self._pair(rng) for _ in range(self.batch)]
        first, second, weight = zip(*rows, strict=True)
        return Pairs(torch.stack(first), torch.stack(second), torch.tensor(weight))

    def _pair(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
        clip = self.clips[rng.integers(len(self.clips))]
        partners = self.partners.get(clip.name)
        mixed = rng.random() < self.share
        weight = float(rng.beta(self.alpha, self.alpha))
        first = self._crop(clip, rng)
        if not partners or not mixed:
            return first, first, 1.0
        return first, self._crop(partners[rng.integers(len(partners))], rng), weight

    def _crop(self, clip: Clip, rng: np.random.Generator) -> Tensor:
        starts = self.starts[clip.name]
        start = (
            starts[rng.integers(len(starts))] if starts else int(rng.integers(max(clip.length - self.length, 0) + 1))
        )
        return self.corpus.wave(clip, start, self.length)


def _fitting(starts: Iterable[int], have: int, wanted: int) -> list[int]:
    """Return the downbeats from which a whole crop is left, or the first one if none has."""
    inside = [start for start in starts if 0 <= start < have]
    return [start for start in inside if start + wanted <= have] or inside[:1]


def mix(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Mix row by row: ``weight`` ``[B]`` of ``first``, the rest of ``second``; sounds ``[B, S]``, or latents."""
    weight = weight.to(first).reshape(-1, *[1] * (first.dim() - 1))
    return weight * first + (1 - weight) * second


def mixed_sound(pairs: Pairs) -> Tensor:
    """Return ``[B, S]`` for MusicLDM's BAM: mel, latent and CLAP's embedding are then all of the mixed sound."""
    return mix(*pairs)


def mixed_latents(
    latent: LatentDiffusion, first: Tensor, second: Tensor, weight: Tensor, noise: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mix in the latent space, MusicLDM's BLM.

    Args:
        latent: with the encoder of its autoencoder.
        first: log-mel ``[B, M, bins]`` of the first crops.
        second: of the second ones.
        weight: of the first latents, ``[B]``; rows of 1 are not mixed.
        noise: standard normal, of the latents' shape, for the posterior of the first and of the second.

    Returns:
        Latents ``[B, C, T, F]`` on the scale of the denoiser, and the sound ``[B, S]`` to embed as their condition.

    Source: spec 5.4.  Where the vocoder gives more samples than wanted the published code keeps nine tenths of them;
    here it is all of them.
    """
    a, b = (latent.encode(mel).sample(n) for mel, n in zip((first, second), noise, strict=True))
    z = mix(a, b, weight)
    return z, latent.wave(latent.mel(z))
