"""Quality of a preset on a folder of real recordings: ``python -m benchmarks.quality --model mini-100``.

Log-mel L1 as the published codecs were scored (../shared/figures), STOI for speech, means per kind of sound with a
bootstrap interval.  Bits are those of the packed codes that each clip really took.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from semanticodec import SamplerOptions, SemantiCodec
from semanticodec.audio import load, resample
from semanticodec.config import SAMPLE_RATE
from semanticodec.demo import mel_l1, stoi
from semanticodec.model import MISSING

from .measure import machine

ROOT = Path(__file__).resolve().parent
DEV = ROOT.parent.parent / "shared" / "audio" / "dev"
KINDS = ("speech", "music", "sound")


@dataclass(frozen=True)
class Score:
    """What one clip cost and how it came out."""

    file: str
    kind: str
    seconds: float
    bits: int
    mel_l1: float
    stoi: float | None


def clips(folder: Path, every: int) -> list[tuple[str, str, Tensor]]:
    """Return (file, kind, samples ``[S]`` at 16 kHz) of every ``every``-th clip of each kind in the manifest."""
    rows = list(csv.DictReader((folder / "manifest.csv").open()))
    result = []
    for kind in KINDS:
        for row in [row for row in rows if row["kind"] == kind][::every]:
            wave, rate = load(folder / row["file"])
            result.append((row["file"], kind, resample(wave.mean(0), rate, SAMPLE_RATE)))
    return sorted(result, key=lambda clip: len(clip[2]))


def scores(
    codec: SemantiCodec, chosen: list[tuple[str, str, Tensor]], options: SamplerOptions, seed: int, batch: int
) -> Iterator[Score]:
    """Code and decode clips, ``batch`` of similar length at a time (a row does not depend on its neighbours)."""
    groups = [chosen[start : start + batch] for start in range(0, len(chosen), batch)]
    for group in track(groups, description=codec.config.name, disable=not sys.stderr.isatty()):
        codes = codec.encode([wave for _, _, wave in group], SAMPLE_RATE)
        longest = max(row.shape[2] for row in codes)
        padded = torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[2]), value=MISSING) for row in codes])
        for (file, kind, wave), row, decoded in zip(
            group, codes, codec.decode(padded, seed=seed, options=options).cpu(), strict=True
        ):
            out = decoded[: len(wave)]
            heard = stoi(wave, out) if kind == "speech" else None
            bits = row.shape[2] * sum(codec.config.code_bits)
            yield Score(file, kind, len(wave) / SAMPLE_RATE, bits, mel_l1(wave, out), heard)


def interval(values: Sequence[float], rng: np.random.Generator) -> tuple[float, float, float]:
    """Return the mean and its bootstrap 95 % interval."""
    data = np.array(values)
    means = data[rng.integers(0, len(data), (2000, len(data)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(data.mean()), float(low), float(high)


def main() -> None:
    """Score presets and print one line per preset and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", help="preset or folder; may be given several times")
    parser.add_argument("--audio", type=Path, default=DEV, help="folder with manifest.csv")
    parser.add_argument("--every", type=int, default=1, help="take every n-th clip of each kind")
    parser.add_argument("--steps", type=int, default=None, help="solver steps; the preset's if left out")
    parser.add_argument("--guidance", type=float, default=None)
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/quality-MODEL.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = SamplerOptions(steps=given.steps, guidance=given.guidance, eta=given.eta)
    chosen = clips(given.audio, given.every)
    print(f"{'model':<16}{'kind':<8}{'clips':>6}{'kbps':>8}{'mel L1 [95 %]':>24}{'STOI [95 %]':>24}")
    for name in given.model or ["mini-100", "mini-50", "mini-25"]:
        codec = SemantiCodec.from_pretrained(name)
        rows = list(scores(codec, chosen, options, given.seed, given.batch))
        rng = np.random.default_rng(0)
        for kind in KINDS:
            part = [row for row in rows if row.kind == kind]
            if not part:
                continue
            kbps = sum(row.bits for row in part) / sum(row.seconds for row in part) / 1000
            mel = "{:.3f} [{:.3f}, {:.3f}]".format(*interval([row.mel_l1 for row in part], rng))
            values = [row.stoi for row in part if row.stoi is not None]
            heard = "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values, rng)) if values else ""
            print(f"{codec.config.name:<16}{kind:<8}{len(part):>6}{kbps:>8.3f}{mel:>24}{heard:>24}")
        if given.write:
            result = {"machine": machine(), "options": vars(options), "clips": [vars(row) for row in rows]}
            target = ROOT / "results" / f"quality-{codec.config.name}.json"
            target.parent.mkdir(exist_ok=True)
            target.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
