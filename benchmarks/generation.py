"""How much mini-gen's clips are what their labels say: ``python -m benchmarks.generation --train runs/mini-gen/audio``.

A linear probe (logistic regression on the mean and spread of mini's AudioMAE features, per band) learns the labels from
recordings that training used.  Five folds that share no original recording say how often it is right on real sound; the
probe of all of it says how often a generated clip is taken for its label.  Labels of two or more originals count.

* **generation**: clips of 2.56 s per label, from other seeds each.
* **transfer**: held-out recordings become another label at several strengths: how often the probe takes them for it,
  and the correlation of their loudness with that of the source.
* **gap**: half a second of a held-out recording is generated anew: log-mel L1 (nats) to the recording, beside that of
  half a second of another recording with that label, and the samples changed outside the gap.

Intervals are 95 %, by bootstrap over clips.  Recordings come from the training set; no development clip is looked at.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from semanticodec import SemantiCodec
from semanticodec.audio import log_mel
from semanticodec.bench.statistics import interval
from semanticodec.config import BANDS, HOP, SAMPLE_RATE
from semanticodec.controls import loudness
from semanticodec.editing import Region
from semanticodec.generation import Generator

from .measure import machine

ROOT = Path(__file__).resolve().parent
SECONDS = 2.56
GENERAL = ("speech", "music", "instrument", "sound")
GAP = (1.0, 1.5)
STRENGTHS = (0.4, 0.7)
TARGETS = ("rain", "music-game", "speech-de", "flute")
PICTURED = ("speech-de", "music-game", "beat", "cello", "rain", "dog")
Found = defaultdict[str, list[float]]


@dataclass(frozen=True)
class Piece:
    """A window of a recording."""

    label: str
    original: str
    wave: Tensor


def pieces(audio: Path, cache: Path, count: int, *, held_out: bool, seed: int = 0) -> list[Piece]:
    """Return up to ``count`` windows per label, of as many recordings."""
    from semanticodec.training.data import Corpus, manifest
    from semanticodec.training.labels import LabelledCrops

    corpus = Corpus.open(audio, cache, optional=True)
    crops = LabelledCrops(corpus, audio, round(SECONDS * SAMPLE_RATE), 1, seed=0, held_out=held_out)
    originals = {row["file"]: row["orig"].split("@")[0] for row in manifest(audio)}
    rng, found = np.random.default_rng(seed), []
    for label, clips in crops.clips.items():
        if label in GENERAL:
            continue
        for index in rng.permutation(len(clips))[:count]:
            found.append(Piece(label, originals[clips[index].name], crops.crop([clips[index]], rng)))
    return found


def described(codec: SemantiCodec, waves: Sequence[Tensor]) -> np.ndarray:
    """Return what the probe sees of each recording."""
    rows = []
    for wave in waves:
        patches = codec.features(wave, SAMPLE_RATE)[0].reshape(-1, BANDS, codec.config.encoder.mae.dim)
        rows.append(torch.cat([patches.mean(0).flatten(), patches.std(0).flatten()]).numpy())
    return np.stack(rows)


def probe() -> Any:
    """Return an untrained probe."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500, class_weight="balanced"))


def out_of_fold(features: np.ndarray, labels: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Return what a probe that never heard a recording's original takes it for."""
    from sklearn.model_selection import GroupKFold, cross_val_predict

    guessed: np.ndarray = cross_val_predict(probe(), features, labels, groups=originals, cv=GroupKFold(5))
    return guessed


def kind(label: str) -> str:
    """Return the general label of a label."""
    from semanticodec.training.labels import INSTRUMENTS

    if label in INSTRUMENTS.values():
        return "instrument"
    if label.startswith("speech"):
        return "speech"
    return "music" if label.startswith("music") or label in ("beat", "drums") else "sound"


def scored(found: Found, name: str, wanted: Sequence[str], guessed: Sequence[str]) -> None:
    """Count how often labels, and their kinds, are right."""
    found[f"{name}: label"] += [float(a == b) for a, b in zip(wanted, guessed, strict=True)]
    found[f"{name}: kind"] += [float(kind(a) == kind(b)) for a, b in zip(wanted, guessed, strict=True)]


def mel_distance(a: Tensor, b: Tensor) -> float:
    """Return the log-mel L1 of ``[S]`` and ``[S]`` over the gap."""
    rows = slice(*(round(edge * SAMPLE_RATE / HOP) for edge in GAP))
    return float((log_mel(a[None]) - log_mel(b[None]))[0, rows].abs().mean())


def alike(a: Tensor, b: Tensor) -> float:
    """Return the correlation of the loudness of two recordings."""
    curves = [loudness(log_mel(wave[None]))[0] for wave in (a, b)]
    return float(torch.corrcoef(torch.stack(curves))[0, 1])


class Listener:
    """Mini's ears and the probe of all recordings."""

    def __init__(self, codec: SemantiCodec, known: Sequence[Piece], found: Found) -> None:
        """Learn, and find out how often a recording is taken for what it is."""
        self.codec = codec
        features = described(codec, [piece.wave for piece in track(known, "recordings")])
        labels = np.array([piece.label for piece in known])
        guessed = out_of_fold(features, labels, np.array([piece.original for piece in known]))
        scored(found, "recordings", labels.tolist(), guessed.tolist())
        self.right = {label: float((guessed[labels == label] == label).mean()) for label in sorted(set(labels))}
        self.probe = probe().fit(features, labels)

    @property
    def labels(self) -> list[str]:
        """What there is to tell apart."""
        return list(self.right)

    def __call__(self, waves: Sequence[Tensor]) -> list[str]:
        """Say what sounds are taken for."""
        guessed: list[str] = self.probe.predict(described(self.codec, waves)).tolist()
        return guessed


def generation(generator: Generator, listener: Listener, count: int, found: Found) -> dict[str, list[str]]:
    """Generate ``count`` clips per label; return what they are taken for."""
    taken = {}
    for label in track(listener.labels, "generation"):
        waves = generator.generate(label, duration=SECONDS, n=count, seed=1)[0]
        taken[label] = listener(list(waves))
        scored(found, "generated", [label] * count, taken[label])
    return taken


def transfer(generator: Generator, listener: Listener, sources: Sequence[Piece], found: Found) -> None:
    """Give recordings other labels."""
    for index, source in enumerate(track(sources, "transfer")):
        target = [label for label in TARGETS if label != source.label][index % (len(TARGETS) - 1)]
        own = generator.editor(target)
        heard = {0.0: source.wave}
        heard |= {each: own.transfer(source.wave, SAMPLE_RATE, strength=each, seed=index) for each in STRENGTHS}
        for strength, taken in zip(heard, listener(list(heard.values())), strict=True):
            found[f"transfer, strength {strength}: taken for the target"].append(float(taken == target))
            found[f"transfer, strength {strength}: loudness, correlation"].append(alike(source.wave, heard[strength]))


def gap(generator: Generator, sources: Sequence[Piece], found: Found) -> None:
    """Generate half a second of recordings anew."""
    first, last = (round(edge * SAMPLE_RATE) for edge in GAP)
    for index, source in enumerate(track(sources, "gap")):
        heard = generator.editor(source.label).inpaint(source.wave, SAMPLE_RATE, [Region(*GAP)], seed=index)
        found["gap: generated"].append(mel_distance(source.wave, heard))
        alike = [piece for piece in sources if piece.label == source.label and piece is not source] or list(sources)
        found["gap: another recording"].append(mel_distance(source.wave, alike[index % len(alike)].wave))
        outside = torch.cat([heard[:first] != source.wave[:first], heard[last:] != source.wave[last:]])
        found["gap: changed outside"].append(float(outside.sum()))


def picture(generator: Generator, source: Piece, path: Path) -> None:
    """Draw generated clips, and a recording, its transfers, and its gap filled."""
    from matplotlib.figure import Figure

    shown = [(label, generator.generate(label, duration=SECONDS, seed=1)[0, 0]) for label in PICTURED]
    shown.append((f"recording: {source.label}", source.wave))
    other = generator.editor(TARGETS[0])
    for strength in STRENGTHS:
        name = f"transfer to {TARGETS[0]}, strength {strength}"
        shown.append((name, other.transfer(source.wave, SAMPLE_RATE, strength=strength)))
    hole = source.wave.clone()
    hole[slice(*(round(edge * SAMPLE_RATE) for edge in GAP))] = 0.0
    own = generator.editor(source.label)
    shown += [("a gap", hole), ("filled", own.inpaint(hole, SAMPLE_RATE, [Region(*GAP)]))]
    shown.append(("going on for 1.5 s", own.outpaint(source.wave, SAMPLE_RATE, after=1.5)))
    figure = Figure(figsize=(14, 7), layout="constrained")
    grid = figure.subplots(3, 4)
    for axis, (title, wave) in zip(grid.flat, shown, strict=True):
        extent = (0, len(wave) / SAMPLE_RATE, 0, 64)
        axis.imshow(log_mel(wave[None])[0].T.numpy(), origin="lower", aspect="auto", vmin=-10, vmax=1, extent=extent)
        axis.set_title(title, fontsize=9)
    for axis in grid[:, 0]:
        axis.set_ylabel("mel band")
    for axis in grid[-1]:
        axis.set_xlabel("seconds")
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-gen", help="mini-gen or a folder with weights")
    parser.add_argument("--audio", type=Path, default=ROOT.parent.parent / "shared" / "audio")
    parser.add_argument("--train", type=Path, required=True, help="decoded training audio (runs/mini-gen/audio)")
    parser.add_argument("--recordings", type=int, default=24, help="per label, for the probe")
    parser.add_argument("--count", type=int, default=8, help="generated clips per label")
    parser.add_argument("--edits", type=int, default=32, help="held-out recordings to edit, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "generation.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    generator = Generator.from_pretrained(given.model)
    found: Found = defaultdict(list)
    known = pieces(given.audio / "train", given.train, given.recordings, held_out=False)
    several = {piece.label for piece in known}
    several = {label for label in several if len({piece.original for piece in known if piece.label == label}) > 1}
    listener = Listener(SemantiCodec.from_pretrained(), [piece for piece in known if piece.label in several], found)
    taken = generation(generator, listener, given.count, found)
    sources = pieces(given.audio / "train", given.train, 3, held_out=True)[: given.edits]
    transfer(generator, listener, sources, found)
    gap(generator, sources, found)
    lines = {}
    for name, values in found.items():
        mean = interval([(value, 1.0) for value in values])
        assert mean is not None
        print(f"{name:60} {mean}  ({mean.clips})")
        lines[name] = {"mean": mean.mean, "low": mean.low, "high": mean.high, "clips": mean.clips}
    for label, guessed in taken.items():
        share = guessed.count(label) / len(guessed)
        print(f"{label:12} recordings {listener.right[label]:.2f}  generated {share:.2f}  {', '.join(guessed)}")
    labels = {
        label: {"recordings": right, "generated": taken[label].count(label) / len(taken[label])}
        for label, right in listener.right.items()
    }
    result = {"machine": machine(), "chance": 1 / len(labels), "outcome": lines, "labels": labels}
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    picture(generator, sources[0], given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
