"""What mini's edits with the recording's own codes leave: ``python -m benchmarks.edits --train runs/mini/audio``.

Recordings that training held out, three seconds each.  Log-mel L1 (nats) to the recording:

* **autoencoding**: the mel through the autoencoder's encoder and decoder, window by window.
* **gap**: half a second is generated anew, told the codes of the whole recording or nothing (-1); beside it, the same
  half second of the codec's plain decode.  ``changed outside`` counts samples there that are not the recording's.
* **end**: the last second is generated from the codes after the two before it (outpainting).

Intervals are 95 %, by bootstrap over clips.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from semanticodec import SemantiCodec
from semanticodec.audio import log_mel
from semanticodec.bench.statistics import interval
from semanticodec.config import HOP, SAMPLE_RATE
from semanticodec.editing import Region

from .measure import machine

ROOT = Path(__file__).resolve().parent
SECONDS, GAP = 3, (1.2, 1.7)
Found = defaultdict[str, list[float]]


def held_out(audio: Path, cache: Path) -> Iterator[Tensor]:
    """Yield the recordings that training held out, as long as they are long enough."""
    from semanticodec.training.data import Corpus

    corpus = Corpus.open(audio / "train", cache)
    for clip in corpus.split(held_out=True):
        if clip.length >= SECONDS * SAMPLE_RATE:
            yield corpus.wave(clip, 0, SECONDS * SAMPLE_RATE)


def distance(a: Tensor, b: Tensor, start: float = 0.0, stop: float | None = None) -> float:
    """Return the log-mel L1 between two recordings ``[S]`` over a stretch in seconds."""
    rows = slice(round(start * SAMPLE_RATE / HOP), None if stop is None else round(stop * SAMPLE_RATE / HOP))
    return float((log_mel(a[None]) - log_mel(b[None]))[0, rows].abs().mean())


def measure(codec: SemantiCodec, wave: Tensor, found: Found) -> None:
    """Edit one recording in every way."""
    codes = codec.encode(wave, SAMPLE_RATE)
    editor, silent = codec.editor(codes), codec.editor(torch.full_like(codes, -1))
    length = len(wave) // editor.latent.config.step_samples * editor.latent.config.step_samples
    with torch.inference_mode():
        latents, rows = editor._encode(wave[None, :length]), log_mel(wave[None, :length])
        hop = editor.window - editor.overlap
        parts = [latents[:, :, at : at + editor.window] for at in range(0, latents.shape[2] - editor.overlap, hop)]
        heard = [editor.latent.mel(part)[:, editor.overlap * 4 * (at > 0) :] for at, part in enumerate(parts)]
    mel = torch.cat(heard, 1)
    found["autoencoding"].append(float((mel - rows[:, : mel.shape[1]]).abs().mean()))
    plain = codec.decode(codes, length=len(wave))[0]
    first, last = (round(edge * SAMPLE_RATE) for edge in GAP)
    found["gap: plain decode of the codes"].append(distance(wave, plain, *GAP))
    for name, own in (("its codes", editor), ("no codes", silent)):
        filled = own.inpaint(wave, SAMPLE_RATE, [Region(*GAP)])
        found[f"gap: generated from {name}"].append(distance(wave, filled, *GAP))
        outside = torch.cat([filled[:first] != wave[:first], filled[last:] != wave[last:]])
        found["gap: changed outside"].append(float(outside.sum()))
    longer = editor.outpaint(wave[: 2 * SAMPLE_RATE], SAMPLE_RATE, after=1.0)
    found["end: plain decode of the codes"].append(distance(wave, plain, 2.0))
    found["end: generated from its codes"].append(distance(wave, longer, 2.0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-100")
    parser.add_argument("--audio", type=Path, default=ROOT.parent.parent / "shared" / "audio")
    parser.add_argument("--train", type=Path, required=True, help="decoded training audio (runs/mini/audio)")
    parser.add_argument("--every", type=int, default=1, help="take every n-th recording")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "edits.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    codec = SemantiCodec.from_pretrained(given.model)
    found: Found = defaultdict(list)
    for wave in track(list(held_out(given.audio, given.train))[:: given.every], "clips"):
        measure(codec, wave, found)
    lines = {}
    for name, values in found.items():
        mean = interval([(value, 1.0) for value in values])
        assert mean is not None
        print(f"{name:40} {mean}  ({mean.clips})")
        lines[name] = {"mean": mean.mean, "low": mean.low, "high": mean.high, "clips": mean.clips}
    result = {"machine": machine(), "model": given.model, "outcome": lines}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
