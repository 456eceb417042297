"""Cost of a guided solver step of a published system, with random weights: ``python -m benchmarks.family``.

A step is one U-Net pass over both halves of a guided pair, at the length the system was made for (10.24 s), contexts
projected beforehand.  Speed is given as GFLOP/s over this machine's own 2048^3 float32 matrix product, measured in the
same run; the published SemantiCodec U-Net reaches 0.43 of it on one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from semanticodec.config import LatentConfig
from semanticodec.latent import Conditioning, LatentDiffusion
from semanticodec.systems import SYSTEMS, SystemConfig, system

from .measure import Sgemm, gflop, machine, randomise, timed
from .speed import HEADER, RESULTS, Row

TOKENS = {768: 8, 1024: 24}
"""Width of a context -> its length: the generated sequence, and a text of some twenty words."""
LONGEST = 512
"""Length of a speech system's generated sequence, its only context."""


class Step:
    """One guided step of a system on random weights; on the "meta" device nothing is computed, only counted."""

    def __init__(self, row: SystemConfig, device: str) -> None:
        config = row.latent
        with torch.device(device):
            self.latent = LatentDiffusion(config).eval()
            self.x = torch.empty(2, config.vae.latent_channels, row.samples // config.step_samples, config.cells)
            self.t = torch.full((2,), 500)
            self.conditioning = _conditioning(config, self.x.shape[2], speech=row.task == "text to speech")
        given = (*(c for c, _ in self.conditioning.contexts), self.conditioning.concat, self.conditioning.film)
        randomise([*self.latent.parameters(), self.x, *(x for x in given if x is not None)], seed=0)
        self.prepared = self.latent.prepare(self.conditioning)

    def parts(self) -> dict[str, Callable[[], object]]:
        """Return what is timed."""
        return {
            "contexts": lambda: self.latent.prepare(self.conditioning),
            "guided step": lambda: self.latent.predict(self.x, self.t, self.prepared),
        }


def _conditioning(config: LatentConfig, steps: int, *, speech: bool) -> Conditioning:
    def some(*size: int) -> Tensor:
        return torch.empty(2, *size)

    widths = [width for width in config.unet.contexts if width is not None]
    extra = config.unet.in_channels - config.vae.latent_channels
    return Conditioning(
        contexts=tuple((some(LONGEST if speech else TOKENS[width], width), None) for width in widths),
        concat=some(extra, steps, config.cells) if extra else None,
        film=None if config.unet.film_dim is None else some(config.unet.film_dim),
    )


def measure(row: SystemConfig, sgemm: Sgemm, repeats: int) -> dict[str, Row]:
    """Count and time the parts of a system's step."""
    counts = {part: gflop(run) for part, run in Step(row, "meta").parts().items()}
    rows, step = {}, Step(row, "cpu")
    with torch.inference_mode():
        for part, run in step.parts().items():
            timing = timed(run, repeats)
            sgemm.measure()
            rows[part] = (counts[part], timing)
    return {part: Row.of(part, count, timing, sgemm) for part, (count, timing) in rows.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=list(SYSTEMS), default="audioldm2-full")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/ as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sgemm, row = Sgemm(), system(options.system)
    sgemm.measure()
    rows = measure(row, sgemm, options.repeats)
    who, seconds = machine(), row.samples / row.sample_rate
    print(f"{who['cpu']}, {who['threads']} of {who['cores']} threads, torch {who['torch']}, commit {who['commit']}")
    print(f"SGEMM {sgemm.size}^3: {sgemm.gflops:.1f} GFLOP/s, {sgemm.gflops_cpu:.1f} per CPU second")
    print(f"{row.name}, random weights, float32, {seconds:.2f} s of sound")
    print(HEADER.partition("  |")[0])
    for part in rows.values():
        print(str(part).partition("  |")[0])
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / f"family-{row.name}.json"
        result = {"machine": who, "system": row.name, "sgemm_gflops": sgemm.gflops}
        result |= {"rows": [dataclasses.asdict(part) for part in rows.values()]}
        target.write_text(json.dumps(result, indent=2) + "\n")
        print(f"written to {target}")


if __name__ == "__main__":
    main()
