"""Tokenised corpora as training data: shuffled, shared among processes, packed, and resumed to the token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .config import config_from_json
from .errors import CodesError, ConfigError
from .tokens import STREAMS, Vocabulary

FAILURES, MANIFEST = "failures.parquet", "manifest.json"
IGNORED = -100
"""Label that PyTorch's cross-entropy leaves out."""
POOL = 8
"""Row groups whose recordings are shuffled among each other."""


@dataclass(frozen=True)
class Position:
    """The next token of one reader: ``offset`` into the sequence ``row`` of the shuffled ``pool`` of an ``epoch``."""

    epoch: int = 0
    pool: int = 0
    row: int = 0
    offset: int = 0


class _Unit(NamedTuple):
    """One row group, the smallest part of a corpus that is read."""

    file: str
    group: int


class TokenDataset(IterableDataset[dict[str, Tensor]]):
    """Blocks of a fixed length out of a folder of Parquet shards, as `semanticodec tokenize` writes them.

    Sequences stand one behind the other and are cut at the block's end, so that no token is lost or padded.  Every
    epoch deals the row groups anew to the readers (all workers of all ranks), and shuffles the recordings of a few of
    them together.  What a reader gives is a function of (corpus, seed, number of readers), and a position in it is
    four numbers: see :meth:`state_dict`.

    With ``torch.utils.data.DataLoader`` and no workers, call :meth:`state_dict` between two batches; with workers, use
    ``torchdata.stateful_dataloader.StatefulDataLoader``, which does so in each of them.
    """

    def __init__(
        self,
        folder: str | Path,
        vocabulary: Vocabulary,
        length: int,
        *,
        seed: int | None = 0,
        epochs: int | None = None,
        rank: int = 0,
        world: int = 1,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        """Look at the shards of a corpus.

        Args:
            folder: local or an fsspec URL; every ``*.parquet`` file in its folder ``data``, or else in itself, but
                ``failures.parquet`` is a shard.
            vocabulary: turns codes into tokens.
            length: tokens per block; in the layout ``delay`` columns.
            seed: of the shuffling; None reads in the order of the shards.
            epochs: how often to go through the corpus; None: for ever.  Ranks do not get the same number of blocks per
                epoch, so let data-parallel training run for ever and count steps.
            rank: of this process among those that train together.
            world: how many processes there are.
            keep: tells by its id whether a recording is used, for instance to hold some out.  It must be importable to
                be used in workers that are not forked.

        Raises:
            ConfigError: no shards, a file without codes, codes of another model than the vocabulary's (as far as there
                is a ``manifest.json``), or arguments out of range.
        """
        super().__init__()
        if (
            length < 1
            or not 0 <= rank < world
            or (epochs is not None and epochs < 1)
            or (seed is not None and seed < 0)
        ):
            raise ConfigError(
                "wanted are length and epochs of at least 1, 0 <= rank < world and a seed from 0 on, "
                f"seen {length=}, {epochs=}, {rank=}, {world=}, {seed=}"
            )
        self.vocabulary, self.length, self.seed, self.epochs = vocabulary, length, seed, epochs
        self.rank, self.world, self.keep = rank, world, keep
        self._files, root = fsspec.core.url_to_fs(str(folder))
        found = self._files.glob(f"{root}/data/*.parquet") or self._files.glob(f"{root}/*.parquet")
        names = sorted(name for name in found if not name.endswith(f"/{FAILURES}"))
        self._units = [_Unit(name, group) for name in names for group in range(self._row_groups(name))]
        if not self._units:
            raise ConfigError(
                f"{folder} holds no recordings in *.parquet, the one format that is read; make some with "
                "`semanticodec tokenize`"
            )
        self._check_manifest(f"{root}/{MANIFEST}")
        self._start = self._position = Position()
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return where the reader of this process stands, as plain numbers."""
        return asdict(self._position) | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration continue where another one stood.

        Args:
            state: from :meth:`state_dict` of a dataset with the same corpus, seed and ``keep``; the iteration raises
                ConfigError if it comes from another seed, corpus size or number of readers.
        """
        self._resumed = {name: state[name] for name in state if name not in Position.__dataclass_fields__}
        self._start = self._position = Position(**{name: state[name] for name in Position.__dataclass_fields__})

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield blocks of the reader this process is.

        Yields:
            ``input_ids`` int64 ``[length]`` (layout ``delay``: ``[2, length]``), the last block filled up with PAD;
            ``labels``, the same with -100 in place of PAD; ``position_ids`` int64 ``[length]``, from 0 at the beginning
            of the block and of every sequence in it, by which transformers keeps attention inside a sequence (given no
            attention mask, and ``use_cache=False``).

        Raises:
            CodesError: a row's codes do not fit the vocabulary.
            ConfigError: there are more readers than row groups, or the state that was loaded belongs to another run.
        """
        identity, readers = self._identity(), self._identity()["readers"]
        if self._resumed not in (None, identity):
            raise ConfigError(
                f"the state is of {self._resumed}, this is {identity}; resume with what the run began with"
            )
        if readers > len(self._units):
            raise ConfigError(
                f"{readers} readers share {len(self._units)} row groups, each needs one: "
                "start fewer workers, or tokenise with a smaller --shard-mb"
            )
        start, self._start, self._resumed = self._start, Position(), None
        self._position = start
        pieces: list[np.ndarray] = []
        room = self.length
        for position, ids in self._sequences(start):
            taken = position.offset
            while taken < ids.shape[-1]:
                piece = ids[..., taken : taken + room]
                pieces.append(piece)
                taken, room = taken + piece.shape[-1], room - piece.shape[-1]
                if room == 0:
                    self._position = Position(position.epoch, position.pool, position.row, taken)
                    yield self._block(pieces)
                    pieces, room = [], self.length
        if pieces:
            padding = np.full((*pieces[0].shape[:-1], room), self.vocabulary.pad)
            self._position = Position(self.epochs or 0)
            yield self._block([*pieces, padding])

    def _block(self, pieces: list[np.ndarray]) -> dict[str, Tensor]:
        ids = torch.from_numpy(np.concatenate(pieces, -1))
        positions = torch.cat([torch.arange(piece.shape[-1]) for piece in pieces])
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(ids == self.vocabulary.pad, IGNORED),
            "position_ids": positions,
        }

    def _identity(self) -> dict[str, Any]:
        """Return what must be the same for a position to mean the same."""
        worker = get_worker_info()
        workers, index = (worker.num_workers, worker.id) if worker else (1, 0)
        return {
            "seed": self.seed,
            "row_groups": len(self._units),
            "readers": self.world * workers,
            "reader": self.rank * workers + index,
        }

    def _sequences(self, start: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """Yield this reader's sequences, each with where to begin in it."""
        identity = self._identity()
        for epoch in range(start.epoch, self.epochs) if self.epochs else count(start.epoch):
            order = self._shuffled(len(self._units), epoch)[identity["reader"] :: identity["readers"]]
            first_pool = start.pool if epoch == start.epoch else 0
            found = 0
            for pool in range(first_pool, -(-len(order) // POOL)):
                here = Position(epoch, pool)
                resumed = here == Position(start.epoch, start.pool)
                units = order[pool * POOL : (pool + 1) * POOL]
                rows = [row for unit in units for row in self._rows(self._units[unit])]
                found += len(rows)
                shuffled = self._shuffled(len(rows), epoch, 1 + int(units[0]))
                for row in range(start.row if resumed else 0, len(rows)):
                    offset = start.offset if resumed and row == start.row else 0
                    yield Position(epoch, pool, row, offset), self._encoded(*rows[shuffled[row]])
            if not found and first_pool == 0:
                raise ConfigError(f"reader {identity['reader']} keeps none of the recordings it was dealt; keep more")

    def _shuffled(self, items: int, *key: int) -> np.ndarray:
        """Return a permutation that is a function of the seed and ``key``."""
        return np.arange(items) if self.seed is None else np.random.default_rng((self.seed, *key)).permutation(items)

    def _encoded(self, name: str, codes: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        try:
            if len(codes[0]) != len(codes[1]):
                raise CodesError(f"there are {len(codes[0])} semantic and {len(codes[1])} acoustic codes")
            return self.vocabulary.encode(np.stack(codes))
        except CodesError as error:
            raise CodesError(f"recording {name!r}: {error}; `semanticodec tokenize verify` checks a corpus") from error

    def _check_manifest(self, path: str) -> None:
        """Compare the codec of a corpus, if its manifest is there, with the vocabulary's."""
        if not self._files.exists(path):
            return
        with self._files.open(path) as file:
            config = config_from_json(json.dumps(json.load(file).get("config")))
        seen = config.name if self.vocabulary.model else "", config.token_rate, config.codebook_sizes
        wanted = self.vocabulary.model, self.vocabulary.token_rate, self.vocabulary.codebook_sizes
        if seen != wanted:
            raise ConfigError(
                f"{path}: the codes are of (model, token rate, codebook sizes) {seen}, the vocabulary is for {wanted}; "
                f"use Vocabulary.of(preset({config.name!r}))"
            )

    def _row_groups(self, name: str) -> int:
        with self._files.open(name) as file:
            shard = pq.ParquetFile(file)
            missing = {"id", *STREAMS} - set(shard.schema_arrow.names)
            if missing:
                raise ConfigError(f"{name} has no column {', '.join(sorted(missing))}; keep only shards in this folder")
            return int(shard.num_row_groups)

    def _rows(self, unit: _Unit) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
        """Yield (id, codes of both streams) of every recording of a row group that is kept."""
        with self._files.open(unit.file) as file:
            table = pq.ParquetFile(file).read_row_group(unit.group, columns=["id", *STREAMS])
        semantic, acoustic = (_lists(table.column(stream).combine_chunks()) for stream in STREAMS)
        for index, name in enumerate(table.column("id").to_pylist()):
            if self.keep is None or self.keep(name):
                yield name, (semantic[index], acoustic[index])


def _lists(column: Any) -> list[np.ndarray]:
    """Split an Arrow array of lists without copying."""
    return np.split(column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()[1:-1])
