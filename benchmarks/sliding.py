"""How many codes of a sliding encoder are those of the file: ``python -m benchmarks.sliding``.

The published weights cannot be reached from where this was built.  With random weights of full size, as here, the
figures show that the machinery works, and nothing about how much the real codes would differ; with ``--model FOLDER``
they would.
"""

import argparse
import json
from pathlib import Path

import torch

from semanticodec import SemantiCodec
from semanticodec.config import PRESETS, SAMPLE_RATE
from semanticodec.model import CodecModel
from semanticodec.streaming import Encoder, Sliding, agreement

from .measure import company, machine, randomise
from .serving import RESULTS, voice


def synthetic(preset: str, seed: int = 0) -> SemantiCodec:
    """Return the encoder of a preset with random weights."""
    config = PRESETS[preset]
    model = CodecModel(config, encoder=True, decoder=False).eval()
    randomise(model.state_dict().values(), seed)
    return SemantiCodec.from_model(config, model)


def main() -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="semanticodec-100-4096")
    parser.add_argument("--model", help="name or folder of real weights")
    parser.add_argument("--seconds", type=float, default=12.8)
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 2, 8], help="columns (160 ms) of look-ahead")
    parser.add_argument("--hop", type=int, default=8, help="new columns per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}/sliding.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    codec = synthetic(given.preset) if given.model is None else SemantiCodec.from_pretrained(given.model)
    wave = torch.from_numpy(voice()).repeat(4)[: int(given.seconds * SAMPLE_RATE)]
    beside, origin, rows = company(), machine(), []
    for ahead in given.ahead:
        sliding = Sliding(hop=given.hop, ahead=ahead)
        semantic, acoustic = agreement(codec, wave, SAMPLE_RATE, sliding)
        latency = Encoder(codec, sliding).latency
        rows.append({"hop": given.hop, "ahead": ahead, "latency": latency, "semantic": semantic, "acoustic": acoustic})
        print(f"{latency / 16:.0f} ms: {semantic:.1%} of the semantic codes, {acoustic:.1%} of the acoustic ones")
    if given.write:
        weights = "random" if given.model is None else given.model
        found = {"machine": origin, "company": beside, "preset": codec.config.name, "weights": weights}
        Path(RESULTS / "sliding.json").write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
