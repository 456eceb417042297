"""How well mini-gen follows a loudness curve through its ControlNet: ``python -m benchmarks.control --train FOLDER``.

The curves are those of recordings that training held out; mini-gen is told the recording's label, from noise that is
the same with and without control.  Figures, after the vocoder, at several scales of the control: the correlation of
the loudness of what was generated with the curve, and the mean distance between the two.  At scale 0 the result has to
be that of no control, bit for bit.  Intervals are 95 %, by bootstrap over clips.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from semanticodec import checkpoints, controls
from semanticodec.audio import log_mel
from semanticodec.bench.statistics import interval
from semanticodec.conditioners.prompts import Prompts
from semanticodec.config import SAMPLE_RATE
from semanticodec.diffusion import SamplerOptions, noise
from semanticodec.generation import Generator
from semanticodec.nn.controlnet import ControlNet

from .generation import Piece, pieces
from .measure import machine

ROOT = Path(__file__).resolve().parent
SCALES = (None, 0.0, 0.5, 1.0)
"""None is without control."""
DECIBELS = 20 / math.log(10)


def made(generator: Generator, network: ControlNet, piece: Piece, scale: float | None, seed: int) -> Tensor:
    """Generate a window ``[S]`` with the label of a recording, as loud as the recording at every moment."""
    latent, mel = generator.latent, log_mel(piece.wave[None])
    told, untold = generator.prompts(Prompts([piece.label])), generator.prompts.unconditional(1, "zeros", None)
    if scale is not None:  # in both halves, as Generator.generate does
        control = controls.follow(network, controls.loudness(mel), mel.shape[2], scale)
        told, untold = (replace(each, controls=(control,)) for each in (told, untold))
    shape = (1, latent.config.vae.latent_channels, generator.window, latent.config.cells)
    with torch.inference_mode():
        z = latent.generate(told, untold, lambda step: noise(seed, 0, step, shape[1:])[None], SamplerOptions())
        return latent.wave(latent.mel(z))[0]


def scored(wanted: Tensor, heard: Tensor) -> tuple[float, float]:
    """Return correlation and mean distance (dB) of the loudness of two recordings ``[S]``."""
    a, b = (controls.loudness(log_mel(wave[None]))[0] for wave in (wanted, heard))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1]), float((a - b).abs().mean()) * DECIBELS


def name_of(scale: float | None) -> str:
    """Return what the figures call a scale."""
    return "no control" if scale is None else f"scale {scale}"


def picture(rows: Sequence[tuple[Piece, dict[str, Tensor]]], path: Path) -> None:
    """Draw recordings, what was generated without and with control, and their loudness."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 2.6 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for line, (piece, heard) in zip(grid, rows, strict=True):
        shown = {f"recording: {piece.label}": piece.wave, **heard}
        for axis, (title, wave), style in zip(line, shown.items(), ("-", ":", "--"), strict=False):
            extent = (0, len(wave) / SAMPLE_RATE, 0, 64)
            axis.imshow(
                log_mel(wave[None])[0].T.numpy(), origin="lower", aspect="auto", vmin=-10, vmax=1, extent=extent
            )
            axis.set_title(title, fontsize=9)
            curve = controls.loudness(log_mel(wave[None]))[0].numpy()
            line[3].plot(np.linspace(0, extent[1], len(curve)), curve, style, label=title.split(":")[0])
        line[0].set_ylabel("mel band")
        line[3].set_title("loudness", fontsize=9)
        line[3].set_ylabel("nats")
        line[3].legend(fontsize=7)
    for axis in grid[-1]:
        axis.set_xlabel("seconds")
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print, draw and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-gen", help="mini-gen or a folder with weights")
    parser.add_argument("--audio", type=Path, default=ROOT.parent.parent / "shared" / "audio")
    parser.add_argument("--train", type=Path, required=True, help="decoded training audio (runs/mini-gen/audio)")
    parser.add_argument("--clips", type=int, default=32, help="at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "control.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    generator = Generator.from_pretrained(given.model)
    own = checkpoints.WEIGHTS / given.model
    network = controls.read(own if own.is_dir() else Path(given.model))
    found: defaultdict[str, list[float]] = defaultdict(list)
    shown = []
    every = pieces(given.audio / "train", given.train, 4, held_out=True)
    for seed, piece in enumerate(track(every[:: max(1, len(every) // given.clips)][: given.clips], "clips")):
        heard = {name_of(scale): made(generator, network, piece, scale, seed) for scale in SCALES}
        for name, wave in heard.items():
            correlation, distance = scored(piece.wave, wave)
            found[f"{name}: correlation"].append(correlation)
            found[f"{name}: distance, dB"].append(distance)
        found["scale 0.0: largest difference to no control"].append(
            float((heard["scale 0.0"] - heard["no control"]).abs().max())
        )
        shown.append((piece, {name: heard[name] for name in ("no control", "scale 1.0")}))
    lines = {}
    for name, values in found.items():
        mean = interval([(value, 1.0) for value in values])
        assert mean is not None
        print(f"{name:45} {mean}  ({mean.clips})")
        lines[name] = {"mean": mean.mean, "low": mean.low, "high": mean.high, "clips": mean.clips}
    given.out.write_text(json.dumps({"machine": machine(), "model": given.model, "outcome": lines}, indent=1) + "\n")
    picture(shown[:: max(1, len(shown) // 4)][:4], given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
