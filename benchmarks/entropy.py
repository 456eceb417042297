"""What entropy coding saves: net, coded and container bitrate of mini on real recordings, and how fast it codes.

``python -m benchmarks.entropy``: coded as files (segments of 10.24 s) and as messages of 1, 2 and 4 blocks, each of
which stands for itself: their codes with the byte that says whether they are coded, and whole WebSocket frames from
a server.  What is written to files is decoded and compared.
"""

import argparse
import csv
import io
import json
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from semanticodec import SemantiCodec
from semanticodec.audio import load
from semanticodec.config import RATES, SAMPLE_RATE
from semanticodec.wire import Header, entropy, prior, read_codes, write_codes
from semanticodec.wire.blocks import Geometry, agreed, coding_features, frame_bytes
from semanticodec.wire.messages import Codes, encode

from .measure import machine

RESULTS = Path(__file__).resolve().parent / "results"
DEV = RESULTS.parent.parent.parent / "shared" / "audio" / "dev"
BUNDLES = (1, 2, 4)


@dataclass
class Sums:
    """Seconds of sound, and bits and seconds of work, of one preset and kind."""

    seconds: float = 0
    net: int = 0
    coded: int = 0
    file: int = 0
    packed_file: int = 0
    encode: float = 0
    decode: float = 0

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __str__(self) -> str:
        per = 1000 * self.seconds
        return (
            f"{self.net / per:8.3f}{self.coded / per:8.3f}{1 - self.coded / self.net:8.1%}{self.packed_file / per:8.3f}"
            f"{self.file / per:8.3f}{self.seconds / self.encode:8.0f}{self.seconds / self.decode:8.0f}"
        )


def measured(codec: SemantiCodec, codes: np.ndarray, samples: int, rate: int) -> Sums:
    """Code one recording, ``codes`` ``[1, 2, F]``, as a file.

    Raises:
        RuntimeError: other codes came back.
    """
    sizes = []
    times = []
    for coded in (False, True):
        file = io.BytesIO()
        begin = time.process_time()
        write_codes(file, Header.of(codec.config, codec.weights_hash, rate, 1, samples, entropy=coded), codes)
        middle = time.process_time()
        back = read_codes(file.getvalue()).codes
        times.append((middle - begin, time.process_time() - middle))
        sizes.append(8 * len(file.getvalue()))
        if not np.array_equal(back, codes):
            raise RuntimeError("other codes came back")
    net = codes.shape[2] * sum(codec.config.code_bits)
    frames = codes.shape[2]
    step = codec.config.token_rate * 512 // 100
    own = prior.current(codec.config.name)
    payload = sum(len(entropy.encode(own, codes[..., at : at + step], at)) for at in range(0, frames, step))
    return Sums(samples / rate, net, 8 * payload, sizes[1], sizes[0], *times[1])


def in_messages(codec: SemantiCodec, codes: np.ndarray, bundle: int) -> np.ndarray:
    """Return the bits of messages of ``bundle`` whole blocks: their codes packed and coded, whole frames with both."""
    config = codec.config
    rate, frames = config.token_rate, config.frames(config.block)
    plain = Geometry(config.block, config.code_bits, (rate,))
    either = plain, agreed(plain, [config.name], coding_features([config.name]))
    blocks = [plain.pack(codes[0, :, at : at + frames], rate) for at in range(0, codes.shape[2] - frames + 1, frames)]
    octets = np.zeros(4, int)
    for seq in range(0, len(blocks) - bundle + 1, bundle):
        data = [geometry.join(blocks[seq : seq + bundle], rate) for geometry in either]
        octets += [*map(len, data), *(frame_bytes(len(encode(Codes(seq, part))), masked=False) for part in data)]
    return 8 * octets


def main() -> None:
    """Measure, print, and with ``--write`` keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="preset; may be given several times (default: every mini)")
    parser.add_argument("--audio", type=Path, default=DEV, help="folder with manifest.csv (file, kind)")
    parser.add_argument("--every", type=int, default=1, help="take every n-th clip")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"keep the figures in {RESULTS.name}/entropy.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with (given.audio / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))[:: given.every]
    result: dict[str, object] = {"machine": machine(), "clips": len(rows)}
    heads = ("net", "coded", "saved", "file", "coded", "encode", "decode")
    print(f"kbit/s; file: all bytes; encode, decode: x real time\n{'':<16}" + "".join(f"{head:>8}" for head in heads))
    for name in given.model or [f"mini-{rate}" for rate in RATES]:
        codec = SemantiCodec.from_pretrained(name, parts="encoder")
        kinds: defaultdict[str, Sums] = defaultdict(Sums)
        messages = {bundle: np.zeros(4, int) for bundle in BUNDLES}
        for row in track(rows, description=name, disable=not sys.stderr.isatty()):
            wave, rate = load(given.audio / row["file"])
            codes = codec.encode(wave[None], rate).numpy()
            kinds[row["kind"]] += measured(codec, codes, wave.shape[-1], rate)
            for bundle in BUNDLES:
                messages[bundle] += in_messages(codec, codes, bundle)
        kinds["all"] = sum(kinds.values(), Sums())
        for kind, sums in kinds.items():
            print(f"{name:<10}{kind:<6}{sums}")
        saved, framed = (
            {bundle: float(1 - bits[i + 1] / bits[i]) for bundle, bits in messages.items()} for i in (0, 2)
        )
        block = codec.config.block / SAMPLE_RATE
        told = (f"{n * block:.2f} s: {saved[n]:.1%} of the codes, {framed[n]:.1%} of all bytes" for n in BUNDLES)
        print("  saved in messages of " + ", ".join(told))
        result[name] = {
            "prior": f"{prior.current(name).id:08x}",
            "kinds": {kind: asdict(sums) for kind, sums in kinds.items()},
            "saved_in_messages": saved,
            "saved_in_frames": framed,
        }
    if given.write:
        (RESULTS / "entropy.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
