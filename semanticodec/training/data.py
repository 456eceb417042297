"""Recordings for training: decoded once into one memory-mapped file, then cropped at random by (seed, step, rank)."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..audio import load, resample
from ..config import SAMPLE_RATE
from ..errors import AudioError
from .loop import tracked

log = logging.getLogger(__name__)
KIND_SHARE = {"speech": 0.5, "music": 0.3, "sound": 0.2}
"""How often a crop is taken from each kind of recording."""
HELD_OUT = 40
"""One recording in this many (chosen by name) is never trained on and gives the held-out losses."""


@dataclass(frozen=True)
class Clip:
    """One recording inside the memory-mapped file; times in samples."""

    name: str
    kind: str
    start: int
    length: int

    @property
    def held_out(self) -> bool:
        """Whether this recording is kept for the held-out losses."""
        return zlib.crc32(self.name.encode()) % HELD_OUT == 0


class Corpus:
    """All recordings of ``folder`` at one rate, as one int16 memory map under ``cache``."""

    def __init__(self, samples: np.ndarray, clips: list[Clip]) -> None:
        self.samples = samples
        self.clips = clips

    @classmethod
    def open(cls, folder: Path, cache: Path, rate: int = SAMPLE_RATE, *, optional: bool = False) -> Corpus:
        """Open the corpus, decoding ``folder``'s shards into ``cache`` the first time.

        Args:
            folder: holds ``train_manifest.csv`` and the tar shards it names.
            cache: where ``audio.i16`` and ``clips.json`` are kept.
            rate: in Hz; recordings stored at a lower rate are left out.
            optional: take the recordings of the kind "optional" as well, whose licence has a clause of its own.

        Raises:
            AudioError: the folder has no manifest.
        """
        index = cache / "clips.json"
        if not index.exists():
            cache.mkdir(parents=True, exist_ok=True)
            clips = _decode(folder, cache / "audio.i16", rate, optional)
            part = index.with_suffix(".part")
            part.write_text(json.dumps([vars(clip) for clip in clips]))
            part.replace(index)
        clips = [Clip(**entry) for entry in json.loads(index.read_text())]
        return cls(np.memmap(cache / "audio.i16", np.int16, "r"), clips)

    def split(self, *, held_out: bool) -> list[Clip]:
        """Return the clips of one side of the training / held-out split."""
        return [clip for clip in self.clips if clip.held_out == held_out]

    def wave(self, clip: Clip, start: int = 0, length: int | None = None) -> Tensor:
        """Return float32 samples in [-1, 1] of a clip; zeros where the range leaves it."""
        length = clip.length - start if length is None else length
        out = np.zeros(length, np.float32)
        first, last = max(start, 0), min(start + length, clip.length)
        if last > first:
            out[first - start : last - start] = self.samples[clip.start + first : clip.start + last] / 32768.0
        return torch.from_numpy(out)


class Crops:
    """Random crops of a fixed length, a pure function of (seed, step, rank)."""

    def __init__(self, corpus: Corpus, length: int, batch: int, *, seed: int, held_out: bool = False) -> None:
        self.corpus, self.length, self.batch, self.seed = corpus, length, batch, seed
        self.clips: dict[str, list[Clip]] = {}
        for clip in corpus.split(held_out=held_out):
            self.clips.setdefault(clip.kind, []).append(clip)
        self.chance = {
            kind: np.array([clip.length for clip in clips]) / sum(clip.length for clip in clips)
            for kind, clips in self.clips.items()
        }

    def __call__(self, step: int, rank: int = 0) -> Tensor:
        """Return ``[batch, length]`` float32 samples, each at a random level between -15 and +3 dB of the original."""
        rng = np.random.default_rng((self.seed, step, rank))
        kinds = [kind for kind in KIND_SHARE if kind in self.clips]
        share = np.array([KIND_SHARE[kind] for kind in kinds])
        rows = []
        for kind in rng.choice(kinds, self.batch, p=share / share.sum()):
            clip = self.clips[kind][rng.choice(len(self.clips[kind]), p=self.chance[kind])]
            start = int(rng.integers(-self.length // 8, max(clip.length - self.length * 7 // 8, 1)))
            wave = self.corpus.wave(clip, start, self.length) * 10 ** (rng.uniform(-15, 3) / 20)
            rows.append(wave / max(1.0, float(wave.abs().max())))
        return torch.stack(rows)


def manifest(folder: Path) -> list[dict[str, str]]:
    """Read what is known of every recording: file, source, repo, licence, kind, seconds, shard.

    Raises:
        AudioError: the folder has no manifest.
    """
    path = folder / "train_manifest.csv"
    if not path.exists():
        raise AudioError(f"{path} is missing; point --audio at a folder with a manifest and its tar shards")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _decode(folder: Path, target: Path, rate: int, optional: bool) -> list[Clip]:
    rows = {row["file"]: row for row in manifest(folder) if optional or row["kind"] != "optional"}
    clips: list[Clip] = []
    position = 0
    with target.open("wb") as out:
        for shard in sorted({row["shard"] for row in rows.values()}):
            with tarfile.open(folder / shard) as tar:
                members = [m for m in tar.getmembers() if _key(m.name, rows) is not None]
                for member in tracked(members, shard):
                    key, stream = _key(member.name, rows), tar.extractfile(member)
                    assert key is not None
                    assert stream is not None
                    wave, stored = load(io.BytesIO(stream.read()))
                    if stored < rate:
                        continue
                    wave = resample(wave.mean(0), stored, rate)
                    data = (wave.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
                    data.tofile(out)
                    clips.append(Clip(key, rows[key]["kind"], position, len(data)))
                    position += len(data)
    log.info("decoded %d recordings, %.2f hours", len(clips), position / rate / 3600)
    return clips


def _key(name: str, rows: dict[str, dict[str, str]]) -> str | None:
    """Return the manifest's name of a tar member, or None for one that the manifest does not list."""
    name = name.removeprefix("./")
    return name if name in rows else None
