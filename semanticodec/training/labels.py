"""What a recording is called: labels from the manifest, and crops of the recordings that carry each.

A recording has a general label (its kind, or "instrument") and up to one that says more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .data import Clip, Corpus, manifest

SOURCES = {
    "ancientbeast_music": "music-epic",
    "tuxemon_music": "music-game",
    "megaglest_music": "music-world",
    "cc0_beats": "beat",
    "freedoom": "effects",
    "megaglest_sounds": "effects",
    "opendungeons_sounds": "effects",
    "uh_sounds": "effects",
    "valyria_sounds": "effects",
}
"""Label by source."""
WORDS = {
    "esc10/001": "dog",
    "esc10/002": "rain",
    "esc10/003": "waves",
    "esc10/004": "baby",
    "esc10/005": "clock",
    "esc10/006": "sneeze",
    "esc10/007": "helicopter",
    "esc10/008": "chainsaw",
    "esc10/009": "rooster",
    "esc10/010": "fire",
    "sounds/rain": "rain",
    "sounds/waves": "waves",
    "sounds/fireplace": "fire",
    "sounds/birds": "birds",
    "-noise.ogg": "noise",
    "samples/drum_": "drums",
    "samples/bd_": "drums",
    "samples/sn_": "drums",
    "samples/tabla_": "drums",
}
"""Label by what the original file's name contains."""
INSTRUMENTS = {
    "cello": "cello",
    "double-bass": "double-bass",
    "guitar": "guitar",
    "flute": "flute",
    "oboe": "oboe",
    "clarinet": "clarinet",
    "bass-clarinet": "clarinet",
    "saxophone": "saxophone",
    "bassoon": "bassoon",
    "contrabassoon": "bassoon",
    "french-horn": "french-horn",
    "trombone": "trombone",
}
"""Label by what the original file's name begins with, of the recordings of single instruments."""
ORCHESTRA = "philharmonia"
"""Source of those recordings."""
LANGUAGES = ("en", "de", "nl", "es", "gd", "zh")
_SPOKEN = tuple(f"speech-{language}" for language in LANGUAGES)
LABELS = tuple(
    dict.fromkeys(
        ["speech", *_SPOKEN, "music", "instrument", *INSTRUMENTS.values(), "sound", *SOURCES.values(), *WORDS.values()]
    )
)
BALANCE = 0.3
"""A label is drawn in proportion to this power of its minutes: 1 would forget the rare ones, 0 wear them out."""
PLACES = 3
"""Places of a recording that are looked at, of which the loudest becomes the crop: pauses teach little."""
PEAK = 0.5
"""Level of the recordings, as editing and generation have it."""


class Labelled(NamedTuple):
    """Crops ``[B, S]`` and the index of each one's label in :data:`LABELS`, ``[B]``."""

    wave: Tensor
    label: Tensor


def labels_of(row: Mapping[str, str]) -> tuple[str, ...]:
    """Return the labels of a recording, by its row of the manifest; none if its kind has no label."""
    if row["source"] == ORCHESTRA:
        names = {original.split("/")[-1].partition("_")[0] for original in row["orig"].split(";")}
        played = {INSTRUMENTS[name] for name in names if name in INSTRUMENTS}
        return ("instrument", *(played if len(played) == 1 else ()))
    if row["kind"] not in LABELS:
        return ()
    language = row.get("lang", "").split("-")[0]
    named = [label for word, label in WORDS.items() if word in row.get("orig", "")]
    more = [f"speech-{language}"] if language in LANGUAGES else named or [SOURCES.get(row["source"], "")]
    return (row["kind"], *(label for label in more[:1] if label))


class LabelledCrops:
    """Random crops of a fixed length by label, a pure function of (seed, step, rank)."""

    def __init__(
        self, corpus: Corpus, folder: Path, length: int, batch: int, *, seed: int, held_out: bool = False
    ) -> None:
        """Sort the recordings; ``folder`` holds the manifest."""
        self.corpus, self.length, self.batch, self.seed = corpus, length, batch, seed
        rows = {row["file"]: row for row in manifest(folder)}
        self.clips: dict[str, list[Clip]] = {}
        for clip in corpus.split(held_out=held_out):
            for label in labels_of(rows[clip.name]):
                self.clips.setdefault(label, []).append(clip)
        self.present = [label for label in LABELS if label in self.clips]
        weight = np.array([sum(clip.length for clip in self.clips[label]) for label in self.present]) ** BALANCE
        self.chance = weight / weight.sum()

    def __call__(self, step: int, rank: int = 0) -> Labelled:
        """Return a batch."""
        rng = np.random.default_rng((self.seed, step, rank))
        labels = [self.present[i] for i in rng.choice(len(self.present), self.batch, p=self.chance)]
        waves = [self.crop(self.clips[label], rng) for label in labels]
        return Labelled(torch.stack(waves), torch.tensor([LABELS.index(label) for label in labels]))

    def crop(self, clips: list[Clip], rng: np.random.Generator) -> Tensor:
        """Return one crop ``[S]`` of one of ``clips``."""
        lengths = np.array([clip.length for clip in clips])
        clip = clips[rng.choice(len(clips), p=lengths / lengths.sum())]
        starts = rng.integers(0, max(clip.length - self.length, 0) + 1, PLACES)
        pieces = [self.corpus.wave(clip, int(start), self.length) for start in starts]
        loudest = max(pieces, key=lambda piece: float(piece.square().sum()))
        return loudest * (PEAK / max(float(self.corpus.wave(clip).abs().max()), 1e-3))
