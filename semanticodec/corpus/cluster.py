"""The Ray engine: a streaming Ray Data pipeline of decoding tasks and a pool of encoding actors.

The driver hands chunks in and puts codes together; only it writes.  Sound goes from decoding to encoding through Ray's
object store, in blocks that Ray holds back when encoding cannot follow.  Tasks and actors that die, with their node or
alone, are done again by Ray; a chunk whose decoding died once is decoded in a process of its own the next time, so that
an input that kills its decoder is found and listed instead of killing for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..config import SAMPLE_RATE
from ..errors import ConfigError
from .encoding import WindowEncoder
from .local import read_apart
from .options import CorpusOptions
from .plan import from_table, to_table
from .reading import Reading
from .records import Assembler, Coded, Event, Finished, Item, ItemDone, ItemFailed, RowFacts, Span
from .worker import Work, read_all

ANSWER = 10.0
"""Seconds in which the head of a cluster has to take a call."""
WAVE = 20_000
"""Chunks that one Ray Data pipeline is made for: the list of a corpus may be larger than the driver's memory."""
DECODER_CPUS, ENCODER_CPUS = 0.1, 0.9
"""Shares of a core that a decoder and an encoder take where both run on CPUs."""
SMALLEST_BLOCK = 16 << 20
"""Bytes of decoded sound in a block, at least."""
EVENTS = pa.schema(
    [
        ("chunk", pa.int64()),
        ("item", pa.int32()),
        ("row", pa.int32()),
        ("index", pa.int32()),
        ("end", pa.bool_()),
        ("wave", pa.binary()),
        ("codes", pa.binary()),
        ("features", pa.binary()),
        ("facts", pa.string()),
    ]
)
"""An event: a span (``wave``), its codes, or the JSON of anything else."""
_KINDS = {kind.__name__: kind for kind in (RowFacts, ItemDone, ItemFailed)}


def run(chunks: Iterator[tuple[int, list[Item]]], options: CorpusOptions) -> Iterator[Finished]:
    """Work through chunks on a Ray cluster.

    Args:
        chunks: number and items of each.
        options: say which cluster, and how.

    Yields:
        The chunks as they are done, in any order.
    """
    with _connected(options.address), _quiet(options):
        while wave := list(itertools.islice(chunks, WAVE)):
            yield from _run_wave(wave, options)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """Use the cluster that this process is connected to, or connect it for a while."""
    if ray.is_initialized():
        yield
        return
    _call(address)
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _call(address: str | None) -> None:
    """Make sure that somebody is at an address: Ray tries for many minutes.

    Raises:
        ConfigError: nobody answers.
    """
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()
        except OSError as error:
            raise ConfigError(f"no Ray cluster answers at {address}: {error}; `ray start --head` starts one") from error


@contextlib.contextmanager
def _quiet(options: CorpusOptions) -> Iterator[None]:
    """Set what Ray Data takes from its context, and let it say no more than errors, for a while."""
    context = DataContext.get_current()
    logger = logging.getLogger("ray.data")
    level = logger.level
    wanted = {
        "enable_progress_bars": False,
        "target_max_block_size": max(SMALLEST_BLOCK, int(4 * options.seconds * SAMPLE_RATE * 4)),
    }
    before = {name: getattr(context, name) for name in wanted}
    for name, value in wanted.items():
        setattr(context, name, value)
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _run_wave(wave: list[tuple[int, list[Item]]], options: CorpusOptions) -> Iterator[Finished]:
    work = options.work(options.devices[0], 0)
    config = work.load_config()
    how = Reading(config, work.channels, work.vad, work.keep_features)
    assemblers = {chunk: Assembler(chunk, items, config, keep_features=work.keep_features) for chunk, items in wave}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    ledger = _Ledger.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    try:
        decoded = _pipeline(wave, how, work, options, ledger)
        for batch in decoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            touched = set()
            rows: list[dict[str, Any]] = batch.to_pylist()  # type: ignore[union-attr]
            for row in rows:
                # An actor that died may have delivered what its successor delivers again.
                if row["chunk"] in assemblers:
                    assemblers[row["chunk"]].add(_event(row))
                    touched.add(row["chunk"])
            for chunk in sorted(touched):
                if assemblers[chunk].complete:
                    yield assemblers.pop(chunk).finish()
    finally:
        ray.kill(ledger)  # it would live as long as the connection


def _pipeline(
    wave: list[tuple[int, list[Item]]], how: Reading, work: Work, options: CorpusOptions, ledger: Any
) -> ray.data.Dataset:
    on_cpu = options.kind == "cpu"
    tables = [
        to_table(items).append_column("chunk", pa.array([chunk] * len(items), pa.int64())) for chunk, items in wave
    ]
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)))
    pool = ActorPoolStrategy(min_size=1, max_size=options.encoders or (cores if on_cpu else None))
    decode: Any = _decode  # Ray's types know no Arrow tables
    decoded = ray.data.from_arrow(tables).map_batches(
        decode,
        batch_size=None,
        batch_format="pyarrow",
        fn_args=(how, ledger),
        num_cpus=DECODER_CPUS if on_cpu else 1,
        concurrency=options.workers,
        max_retries=-1,  # of nodes that are lost; the ledger sees to items that kill their worker
    )
    return decoded.map_batches(
        _Encoder,
        batch_size=None,
        batch_format="pyarrow",
        fn_constructor_args=(work,),
        compute=pool,
        num_cpus=ENCODER_CPUS if on_cpu else 0,
        num_gpus=0 if on_cpu else 1,
    )


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)  # counting twice only makes a chunk read apart
class _Ledger:
    """Counts how often the decoding of a chunk was begun."""

    def __init__(self) -> None:
        self._begun: dict[int, int] = {}

    def begin(self, chunk: int) -> int:
        """Count one more."""
        self._begun[chunk] = self._begun.get(chunk, 0) + 1
        return self._begun[chunk]


def _decode(table: pa.Table, how: Reading, ledger: Any) -> Iterator[pa.Table]:
    """Turn the items of chunks into spans and facts."""
    for chunk in sorted(set(table.column("chunk").to_pylist())):
        mine = table.filter(pc.equal(table.column("chunk"), chunk))
        items = from_table(mine.drop_columns(["chunk"]))
        fresh = ray.get(ledger.begin.remote(chunk)) == 1
        for event in read_all(items, how) if fresh else read_apart(items, how):
            yield _table([_row(chunk, event)])


class _Encoder:
    """An actor that turns the spans of a block into codes."""

    def __init__(self, work: Work) -> None:
        self._encoder = WindowEncoder(work.load(), work.batch_seconds, keep_features=work.keep_features)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        # Chunks share blocks: while they are encoded, spans are called by their place in the block.
        spans = [
            Span(at, row["row"], row["index"], np.frombuffer(row["wave"], np.float32), row["end"])
            for at, row in enumerate(rows)
            if row["wave"] is not None
        ]
        done = [row for row in rows if row["wave"] is None]
        for coded in self._encoder.encode(spans):
            assert isinstance(coded, Coded)
            row = rows[coded.item]
            done.append(_row(row["chunk"], dataclasses.replace(coded, item=row["item"])))
        return _table(done)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, EVENTS)


def _row(chunk: int, event: Event) -> dict[str, Any]:
    """Write an event as a row."""
    row: dict[str, Any] = {"chunk": chunk, "item": event.item}
    match event:
        case Span():
            wave = np.ascontiguousarray(event.wave).tobytes()
            return row | {"row": event.row, "index": event.index, "end": event.end, "wave": wave}
        case Coded():
            kept = None if event.features is None else event.features.tobytes()
            row |= {"row": event.row, "index": event.index, "codes": event.codes.tobytes(), "features": kept}
            return row | {"facts": json.dumps([None if event.features is None else event.features.shape[1]])}
        case _:
            return row | {"facts": json.dumps({type(event).__name__: dataclasses.asdict(event)})}


def _event(row: dict[str, Any]) -> Event:
    """Read what :func:`_row` has written of anything but a span."""
    facts = json.loads(row["facts"])
    if row["codes"] is not None:
        codes = np.frombuffer(row["codes"], np.uint16).reshape(2, -1)
        kept = None if row["features"] is None else np.frombuffer(row["features"], np.float16).reshape(-1, facts[0])
        return Coded(row["item"], row["row"], row["index"], codes, kept)
    ((name, fields),) = facts.items()
    event: Event = _KINDS[name](**fields)
    return event
