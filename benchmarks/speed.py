"""Decode speed of the official 100-token preset with synthetic weights, and real-time factors of mini.

``make bench`` prints it.  Speed is given as GFLOP/s over this machine's own 2048^3 float32 matrix product, measured in
the same run, so that figures of different machines can be compared, and as seconds per 10.24 s window for DDIM-50 with
guidance, beside the published implementation's.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor

import semanticodec
from semanticodec import SemantiCodec
from semanticodec.audio import load
from semanticodec.config import LATENT_ROWS, MEL_BINS, PATCH, CodecConfig, preset
from semanticodec.diffusion import PUBLISHED, noise
from semanticodec.latent import Conditioning, LatentDiffusion

from .measure import Sgemm, Timing, gflop, machine, randomise, timed

OFFICIAL = "semanticodec-100-4096"
STEPS = 50
ASSETS = Path(semanticodec.__file__).parent / "assets"
RESULTS = Path(__file__).parent / "results"

PUBLISHED_CPU = {
    "guided step": (3.68, 0.43),
    "VAE decoder": (11.7, 0.85),
    "vocoder": (20.4, 0.75),
    "window": (216, 0.48),
}
"""Part -> (processor seconds, share of SGEMM) of the published implementation with synthetic weights, one 10.24 s
window, one thread of a 2-core AMD EPYC whose SGEMM reached 67-69 GFLOP/s in the same run.  A guided step there is two
U-Net passes of 1.84 s."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what a part computes, how long it takes, and how close to the peak that is.

    The two shares divide by the SGEMM rate per elapsed second and per second of processor time; the second hardly
    feels other programs on the machine.
    """

    part: str
    gflop: float
    timing: Timing
    share: float
    share_cpu: float

    @classmethod
    def of(cls, part: str, gflop: float, timing: Timing, sgemm: Sgemm) -> "Row":
        """Relate a measured time to the peak."""
        return cls(part, gflop, timing, gflop / timing.wall / sgemm.gflops, gflop / timing.cpu / sgemm.gflops_cpu)

    def __str__(self) -> str:
        rate = self.gflop / self.timing.wall
        ours = f"{self.part:<14}{self.gflop:9.1f}{self.timing.wall:9.2f}{self.timing.cpu:9.2f}{rate:9.1f}"
        seconds, share = PUBLISHED_CPU.get(self.part, ("", ""))
        return f"{ours}{self.share:8.2f}{self.share_cpu:8.2f}  |{seconds:>8}{share:>8}"


HEADER = (
    f"{'part':<14}{'GFLOP':>9}{'wall s':>9}{'CPU s':>9}{'GFLOP/s':>9}{'share':>8}{'(CPU)':>8}"
    f"  |{'CPU s':>8}{'share':>8}"
)


class Window:
    """One window of an official preset's decoder on random weights and inputs, whole and in parts.

    On the "meta" device nothing is computed, which is enough to count operations.
    """

    def __init__(self, config: CodecConfig, device: str) -> None:
        decoder = config.decoder
        width = next(width for width in decoder.latent.unet.contexts if width is not None)
        rows, frames = decoder.columns * PATCH, decoder.columns // config.stack[0] * config.group
        self.shape = decoder.latent.vae.latent_channels, rows // LATENT_ROWS, MEL_BINS // LATENT_ROWS
        with torch.device(device):
            self.latent = LatentDiffusion(decoder.latent).eval()
            self.context = torch.empty(1, frames, width)
            self.z = torch.empty(1, *self.shape)
            self.rows = torch.empty(1, rows, MEL_BINS)
            self.t = torch.full((2,), 500)
        randomise([*self.latent.parameters(), self.context, self.z, self.rows], seed=0)
        self.both = self.latent.prepare(Conditioning(((self.context.expand(2, -1, -1), None),)))

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return what decoding consists of, each ready to be run."""
        pair = self.z.expand(2, -1, -1, -1)
        conditioning = Conditioning(((self.context.expand(2, -1, -1), None),))
        return {
            "contexts": lambda: self.latent.prepare(conditioning),
            "guided step": lambda: self.latent.predict(pair, self.t, self.both),
            "VAE decoder": lambda: self.latent.mel(self.z),
            "vocoder": lambda: self.latent.wave(self.rows),
        }

    def decode(self) -> Tensor:
        """Decode as the published implementation does: DDIM, 50 steps, guidance 2."""
        conditioning = Conditioning(((self.context, None),))
        away = Conditioning(((torch.zeros_like(self.context), None),))
        latents = self.latent.generate(conditioning, away, lambda step: noise(0, 0, step, self.shape)[None], PUBLISHED)
        return self.latent.wave(self.latent.mel(latents))


def compose(rows: dict[str, Row], sgemm: Sgemm) -> Row:
    """Add up one window from its parts; the solver's own arithmetic (four values per latent cell) is nothing beside."""
    step, once = rows["guided step"], [rows[part] for part in ("contexts", "VAE decoder", "vocoder")]
    count, timing = step.gflop * STEPS, step.timing * STEPS
    for row in once:
        count, timing = count + row.gflop, timing + row.timing
    return Row.of("window", count, timing, sgemm)


def official(config: CodecConfig, sgemm: Sgemm, *, full: bool) -> dict[str, Row]:
    """Measure the parts of an official preset's decoder, and a window: composed from them, or whole if ``full``."""
    counts = {part: gflop(run) for part, run in Window(config, "meta").parts().items()}
    window = Window(config, "cpu")
    timings = {}
    with torch.inference_mode():
        for part, run in window.parts().items():
            timings[part] = timed(run, repeats=5 if counts[part] < 100 else 2)
            sgemm.measure()
        if full:
            timings["window"] = timed(window.decode, repeats=1, warm_up=False)
            sgemm.measure()
    rows = {part: Row.of(part, counts[part], timings[part], sgemm) for part in counts}
    rows["window"] = compose(rows, sgemm)
    if full:
        rows["window"] = Row.of("window", rows["window"].gflop, timings["window"], sgemm)
    return rows


@dataclass(frozen=True)
class RealTime:
    """Seconds of work per second of sound."""

    clip: str
    seconds: float
    encode: float
    decode: float


def real_time(codec: SemantiCodec, clip: Path) -> RealTime:
    """Measure encoding and decoding of one recording with the preset's own sampler settings."""
    wave, rate = load(clip)
    seconds = float(Fraction(wave.shape[-1], rate))
    codes = codec.encode(wave, rate)
    encode = timed(lambda: codec.encode(wave, rate), repeats=2)
    decode = timed(lambda: codec.decode(codes, seed=0), repeats=2)
    return RealTime(clip.name, seconds, encode.wall / seconds, decode.wall / seconds)


def report(rows: dict[str, Row], sgemm: Sgemm, mini: RealTime | None, *, full: bool) -> str:
    """Lay the figures out for reading."""
    who, window = machine(), rows["window"]
    method = "run whole" if full else f"composed: contexts + {STEPS} guided steps + VAE decoder + vocoder"
    lines = [
        f"{who['cpu']}, {who['threads']} of {who['cores']} threads, torch {who['torch']}, commit {who['commit']}",
        f"SGEMM {sgemm.size}^3: {sgemm.gflops:.1f} GFLOP/s, {sgemm.gflops_cpu:.1f} per CPU second; shares are of this",
        "",
        f"{OFFICIAL}, random weights, float32, one 10.24 s window{'':<17}| published, 1 thread",
        HEADER,
        *map(str, rows.values()),
        f"window: DDIM-{STEPS} with guidance, {method}",
        f"{window.timing.wall:.1f} s ({window.timing.cpu:.1f} CPU s) per 10.24 s window; published 216 CPU s, "
        f"{216 / window.timing.cpu:.1f} times as many",
    ]
    if mini:
        total = mini.encode + mini.decode
        lines += [
            "",
            f"mini on {mini.clip} ({mini.seconds:.1f} s): real-time factor {mini.encode:.3f} to encode, "
            f"{mini.decode:.3f} to decode, {total:.3f} in all",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--full", action="store_true", help="run all 50 steps instead of composing a window from parts")
    parser.add_argument("--clip", type=Path, help="recording for mini (default: the first shipped one)")
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/ as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    sgemm = Sgemm()
    sgemm.measure()
    rows = official(preset(OFFICIAL), sgemm, full=options.full)
    mini = real_time(SemantiCodec.from_pretrained(), options.clip or min(ASSETS.glob("*.flac")))
    print(report(rows, sgemm, mini, full=options.full))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        result = {
            "machine": machine(),
            "sgemm_gflops": sgemm.gflops,
            "sgemm_gflops_per_cpu_second": sgemm.gflops_cpu,
            "preset": OFFICIAL,
            "window": "whole" if options.full else "composed",
            "rows": [dataclasses.asdict(row) for row in rows.values()],
            "mini": dataclasses.asdict(mini),
        }
        target = RESULTS / f"speed-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
