"""What can be done to codes without decoding them: ``python -m benchmarks.codes``.

Three experiments with a shipped mini on development clips, measured as log-mel L1 (nats) between decodes:

* **repair**: groups of codes are lost (and known to be), or damaged (replaced by random ones).  The lost are left to
  the model (-1), or the group before is held; the damaged are decoded as they are.  Distance to the decode of all
  codes, over the rows of the groups concerned.
* **crossfade**: one stream goes over into another, at once or group by group in turns.  The figure is the largest
  change between neighbouring rows around the seam, over the 95th percentile of such changes in the two decodes.
* **swap**: semantic codes of one clip with acoustic codes of another.  The figure is how much nearer the decode comes
  to the clip that gave the semantic codes than to the other: in AudioMAE features (cosine), in the mean log-mel (L1).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semanticodec import SemantiCodec
from semanticodec.audio import log_mel
from semanticodec.bench.clips import find
from semanticodec.bench.statistics import interval
from semanticodec.config import HOP, SAMPLE_RATE

from .measure import machine

ROOT = Path(__file__).resolve().parent
MISSING = -1
SECONDS = 4
LOSS = (0.05, 0.2)
Found = defaultdict[str, list[float]]


def repair(codec: SemantiCodec, codes: Tensor, rng: np.random.Generator, found: Found) -> None:
    """Lose or damage groups of codes, and measure what each remedy leaves."""
    config = codec.config
    whole, groups = log_mel(codec.decode(codes))[0], codes.shape[2] // config.group
    rows = config.group_samples // HOP
    for share in LOSS:
        hit = rng.random(groups) < share
        hit[0] = False
        if not hit.any():
            continue
        frames = torch.from_numpy(hit.repeat(config.group))
        missing = torch.where(frames, MISSING, codes)
        held = codes.clone()
        for group in np.flatnonzero(hit):
            at = group * config.group
            held[:, :, at : at + config.group] = held[:, :, at - config.group : at]
        wrong = torch.stack([torch.from_numpy(rng.integers(0, size, codes.shape[2])) for size in config.codebook_sizes])
        remedies = {
            "lost, left to the model": missing,
            "lost, held": held,
            "damaged, decoded": torch.where(frames, wrong[None], codes),
        }
        concerned = torch.from_numpy(hit.repeat(rows))
        for name, remedy in remedies.items():
            error = (log_mel(codec.decode(remedy))[0] - whole).abs().mean(1)[: len(concerned)]
            found[f"repair {share:.0%}: {name}"].append(float(error[concerned[: len(error)]].mean()))


def crossfade(codec: SemantiCodec, a: Tensor, b: Tensor, found: Found) -> None:
    """Go over from one stream to another in the middle."""
    group = codec.config.group
    groups = min(a.shape[2], b.shape[2]) // group
    middle, width = groups // 2, 4
    a, b = a[:, :, : groups * group], b[:, :, : groups * group]
    decodes = {name: log_mel(codec.decode(codes))[0] for name, codes in (("a", a), ("b", b))}
    usual = torch.cat([mel.diff(dim=0).abs().mean(1) for mel in decodes.values()]).quantile(0.95)
    rising = (np.arange(groups) - middle + width) / (2 * width)
    # A group comes from the second stream whenever the running share says that one is due.
    turns = np.diff(np.floor(np.cumsum(np.clip(rising, 0, 1)) + 0.5), prepend=0) > 0
    for name, second in (("at once", np.arange(groups) >= middle), ("in turns", turns)):
        mixed = torch.where(torch.from_numpy(second.repeat(group)), b, a)
        mel = log_mel(codec.decode(mixed))[0]
        rows = codec.config.group_samples // HOP
        around = mel[(middle - width - 1) * rows : (middle + width + 1) * rows].diff(dim=0).abs().mean(1)
        found[f"crossfade {name}"].append(float(around.max() / usual))


def swap(codec: SemantiCodec, semantic: Tensor, acoustic: Tensor, found: Found) -> None:
    """Join the semantic codes of one clip to the acoustic codes of another."""
    frames = min(semantic.shape[2], acoustic.shape[2])
    mixed = torch.stack([semantic[:, 0, :frames], acoustic[:, 1, :frames]], 1)
    heard, first, second = (codec.decode(codes[:, :, :frames]) for codes in (mixed, semantic, acoustic))
    vectors = [codec.features(wave, SAMPLE_RATE)[0] for wave in (heard, first, second)]
    near = [float(torch.cosine_similarity(vectors[0], other, dim=1).mean()) for other in vectors[1:]]
    found["swap: features, cosine to the semantic side minus to the acoustic side"].append(near[0] - near[1])
    colour = [log_mel(wave)[0].mean(0) for wave in (heard, first, second)]
    far = [float((colour[0] - other).abs().mean()) for other in colour[1:]]
    found["swap: mean log-mel, distance to the acoustic side minus to the semantic side"].append(far[1] - far[0])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments, print and keep what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini-100")
    parser.add_argument("--audio", type=Path, default=ROOT.parent.parent / "shared" / "audio")
    parser.add_argument("--every", type=int, default=15, help="take every n-th development clip")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "codes.json")
    given = parser.parse_args(arguments)
    codec = SemantiCodec.from_pretrained(given.model)
    clips = find(given.audio / "dev")[:: given.every]
    coded = [codec.encode(torch.from_numpy(clip.wave[: SECONDS * SAMPLE_RATE]), SAMPLE_RATE) for clip in clips]
    found: Found = defaultdict(list)
    rng = np.random.default_rng(0)
    for codes in coded:
        repair(codec, codes, rng, found)
    for a, b in itertools.pairwise(coded):
        crossfade(codec, a, b, found)
        swap(codec, a, b, found)
    lines = {}
    for name, values in found.items():
        mean = interval([(value, 1.0) for value in values])
        assert mean is not None
        print(f"{name:80} {mean}  ({mean.clips})")
        lines[name] = {"mean": mean.mean, "low": mean.low, "high": mean.high, "clips": mean.clips}
    result = {"machine": machine(), "model": given.model, "clips": [clip.name for clip in clips], "outcome": lines}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
