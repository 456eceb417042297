"""What a codec costs beside bits: memory, operations, and the wait for the first sound."""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..config import SAMPLE_RATE
from .clips import Clip
from .codecs import Codec, Semanticodec, loaded
from .commands import Command


@dataclass(frozen=True)
class Cost:
    """Of one codec on one thread, on one clip: in a survey the longest that it coded.

    Args:
        peak_memory_mb: most resident memory of the process that codes, Python and libraries with it for networks;
            of programs below 1 MB nothing is known: the shell that starts them takes that much.
        gflop_per_second: operations (a multiply-add is two) of matrix products and convolutions per second of sound;
            None for programs.
        first_block_ms: from the first sample of a stream to the first decoded one that can be heard: of this package's
            presets as measured, with the time that coding and decoding the first blocks took; of programs the delay of
            their method, where it is known; None where the clip is shorter.
    """

    peak_memory_mb: float
    gflop_per_second: float | None
    first_block_ms: float | None


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _recurrent(x: torch.Size, inputs: torch.Size, states: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(x[:2]) * (math.prod(inputs) + math.prod(states))


def _recurrent_cuda(x: torch.Size, weights: Sequence[torch.Size], *_: object, **__: object) -> int:
    """Count the matrices, which are all that has two dimensions; every row meets each of them once per frame."""
    return 2 * math.prod(x[:2]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


UNCOUNTED: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent,
    torch.ops.aten._cudnn_rnn: _recurrent_cuda,
}
"""What PyTorch's counter does not know: fused attention on a CPU, and recurrent layers."""


def gflop(run: Callable[[], object]) -> float:
    """Count the multiply-adds (as two operations each) of one run, in GFLOP; meta tensors cost nothing.

    Args:
        run: what is counted; it runs once.
    """
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


def cost(codec: Codec, clip: Clip) -> Cost:
    """Measure in a fresh process, so that memory is the codec's own.

    Args:
        codec: any that can run here.
        clip: that it codes and decodes.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(_cost, codec, clip).result()


def _cost(codec: Codec, clip: Clip) -> Cost:
    if isinstance(codec, Command):
        delay = codec.about().delay
        return Cost(codec.peak_memory(clip) / 1e6, None, None if delay is None else 1000 * delay)
    codec.decode(codec.encode(clip), clip)
    peak_mb = _peak_memory() / 1e6
    operations = gflop(lambda: codec.decode(codec.encode(clip), clip)) / clip.seconds
    return Cost(peak_mb, operations, _first_block(codec, clip) if isinstance(codec, Semanticodec) else None)


def _peak_memory() -> int:
    """Return the most resident memory of this process in bytes.

    On Linux ``ru_maxrss`` begins with that of the process that started this one, and tells nothing here.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _first_block(codec: Semanticodec, clip: Clip) -> float | None:
    """Push 10 ms at a time until sound comes out; return the sound that it took, and the work of the last push.

    None if the clip is over before.
    """
    from ..streaming import StreamDecoder, StreamEncoder

    model, options = loaded(codec)
    wave = torch.from_numpy(clip.wave)
    for _ in range(2):  # the first time warms up
        encoder, decoder = StreamEncoder(model, SAMPLE_RATE), StreamDecoder(model, seed=codec.seed, options=options)
        for start in range(0, len(wave), 160):
            began = time.perf_counter()
            heard = decoder.push(encoder.push(wave[start : start + 160]))
            spent = time.perf_counter() - began
            if heard.shape[-1]:
                break
        else:
            return None
    return 1000 * ((start + 160) / SAMPLE_RATE + spent)
