"""What a codec costs beside bits: memory, operations, and the wait for the first sound."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..config import SAMPLE_RATE
from .clips import Clip
from .codecs import Codec, Semanticodec, loaded
from .commands import Command


@dataclass(frozen=True)
class Cost:
    """Of one codec on one clip, on one thread.

    Args:
        peak_memory_mb: most resident memory of the process that codes, Python and libraries with it for networks.
        gflop_per_second: operations (a multiply-add is two) of matrix products and convolutions per second of sound;
            None for programs.
        first_block_ms: from the first sample of a stream to the first decoded one that can be heard: the algorithmic
            delay, and for this package the time that coding and decoding the first blocks took as well.
    """

    peak_memory_mb: float
    gflop_per_second: float | None
    first_block_ms: float | None


def gflop(run: Callable[[], object]) -> float:
    """Count the multiply-adds (as two operations each) of one run, in GFLOP; meta tensors cost nothing."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops()) / 1e9


def cost(codec: Codec, clip: Clip) -> Cost:
    """Measure in a fresh process, so that memory is the codec's own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return pool.submit(_cost, codec, clip).result()


def _cost(codec: Codec, clip: Clip) -> Cost:
    codec.decode(codec.encode(clip), clip)
    program = isinstance(codec, Command)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN if program else resource.RUSAGE_SELF).ru_maxrss
    peak_mb = peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
    if program:
        delay = codec.about().delay
        return Cost(peak_mb, None, None if delay is None else 1000 * delay)
    operations = gflop(lambda: codec.decode(codec.encode(clip), clip)) / clip.seconds
    return Cost(peak_mb, operations, _first_block(codec, clip) if isinstance(codec, Semanticodec) else None)


def _first_block(codec: Semanticodec, clip: Clip) -> float:
    """Push 10 ms at a time until sound comes out; return the sound that it took, and the work of the last push."""
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
            raise ValueError(f"{clip.name} is too short for the first block")
    return 1000 * ((start + 160) / SAMPLE_RATE + spent)
