"""From what the user names to a list of items, in an order that depends on nothing but the names and the contents.

A folder or a glob gives sound files, tar archives (WebDataset) and Parquet or Arrow tables (Hugging Face ``datasets``);
a manifest gives what its lines name (JSON lines as NeMo and Kyutai write them, or Lhotse cuts).  Everything may be a
local path or a URL that fsspec knows.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from ..errors import ConfigError
from .records import Item, printable

SOUNDS = frozenset(
    f".{ending}"
    for group in ("wav wave flac ogg oga opus mp3 aif aiff aifc au snd caf w64 rf64", "m4a aac wma webm mp4")
    for ending in group.split()
)
"""Endings that folders are searched for; those that libsndfile cannot read are listed as failures."""
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
MANIFESTS = frozenset({".jsonl", ".json", ".ndjson", ".jl"})
FOLDER_ENDINGS = SOUNDS | TABLES.keys() | {".tar"}
PATHS = ("audio_filepath", "path", "audio_path", "wav", "audio", "file")
"""Fields that may name the sound in a line of a manifest."""
STARTS = ("offset", "start")
IDS = ("id", "utt_id", "key", "__key__")
CUTS = frozenset({"MonoCut", "MultiCut", "MixedCut", "PaddingCut"})


def find_items(inputs: Iterable[str]) -> Iterator[Item]:
    """Return everything that the inputs stand for.

    Args:
        inputs: files, folders, globs and manifests; local paths or URLs.

    Raises:
        ConfigError: an input does not exist, or holds nothing to tokenise.
    """
    for name in inputs:
        empty = True
        for item in _expand(name):
            empty = False
            yield item
        if empty:
            raise ConfigError(f"{printable(name)} holds no sound: wanted are {', '.join(sorted(FOLDER_ENDINGS))}")


def _expand(name: str) -> Iterator[Item]:
    file_system, path = url_to_fs(name)
    remote = "file" not in file_system.protocol

    def address(found: str) -> str:
        return str(file_system.unstrip_protocol(found)) if remote else found

    if file_system.isdir(path):
        walk = _walk_remote(file_system, path) if remote else _walk(path)
        for found in walk:
            yield from _file(address(found), posixpath.relpath(found, path))
    elif file_system.exists(path) or (not remote and os.path.lexists(path)):
        yield from _file(address(path), posixpath.basename(path))
    elif any(mark in path for mark in "*?["):
        for found in sorted(str(match) for match in file_system.glob(path)):
            if not file_system.isdir(found):
                yield from _file(address(found), posixpath.basename(found))
    else:
        raise ConfigError(f"{printable(name)} does not exist")


def _walk(folder: str) -> Iterator[str]:
    """Return the files of a local folder in order, entering each folder once, however symbolic links go round."""
    entered = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders.sort(key=os.fsencode)
        for file in sorted(files, key=os.fsencode):
            if os.path.splitext(file)[1].lower() in FOLDER_ENDINGS:
                yield os.path.join(root, file)


def _walk_remote(file_system: fsspec.AbstractFileSystem, folder: str) -> Iterator[str]:
    for file in sorted(file_system.find(folder)):
        if posixpath.splitext(file)[1].lower() in FOLDER_ENDINGS:
            yield file


def _file(source: str, name: str) -> Iterator[Item]:
    """Return the items of one file."""
    stem, ending = posixpath.splitext(source.lower())
    packed = ending == ".gz"
    ending = posixpath.splitext(stem)[1] if packed else ending
    try:
        if ending in MANIFESTS:
            yield from _manifest(source)
        elif ending == ".tar" and packed:
            raise OSError("compressed archives cannot be read in place: gunzip it")
        elif ending == ".tar":
            yield from _archive(source)
        elif ending in TABLES:
            yield from _table(source, TABLES[ending])
        else:
            yield Item(printable(name), "file", source, size=_size(source))
    except (OSError, tarfile.TarError, pa.ArrowException, UnicodeDecodeError, EOFError) as error:
        yield Item(printable(name), "bad", source, extra=f"cannot be searched for sound: {error}")


def _size(source: str) -> int:
    file_system, path = url_to_fs(source)
    try:
        return int(file_system.size(path) or 0)
    except OSError:
        return 0  # reading it will tell


# --- manifests ----------------------------------------------------------------------------------------------------


def _manifest(source: str) -> Iterator[Item]:
    with fsspec.open(source, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if source.lower().endswith(".gz") else raw
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _line(source, number, line)


def _line(source: str, number: int, line: bytes) -> Item:
    where = f"{posixpath.basename(source)}:{number}"
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("a line must be a JSON object")
        if entry.get("type") in CUTS:
            return _cut(source, entry)
        return _entry(source, entry)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return Item(where, "bad", source, member=str(number), extra=f"line {number} is no entry of a manifest: {error}")


def _entry(source: str, entry: dict[str, Any]) -> Item:
    field = next((name for name in PATHS if isinstance(entry.get(name), str)), None)
    if field is None:
        raise ValueError(f"none of {', '.join(PATHS)} names the sound")
    start = next((name for name in STARTS if entry.get(name) is not None), None)
    identity = next((name for name in IDS if entry.get(name) is not None), None)
    path = entry[field]
    begin = 0.0 if start is None else float(entry[start])
    # Without a start the duration describes the file, and may be rounded: all of it is meant.
    duration = None if start is None or entry.get("duration") is None else float(entry["duration"])
    text = entry.get("text")
    default = path if start is None else f"{path}@{begin:g}"
    used = {field, start, identity, "text" if isinstance(text, str) else None}
    return Item(
        printable(str(entry[identity])) if identity else printable(default),
        "file",
        _beside(source, path),
        start=begin,
        duration=duration,
        text=text if isinstance(text, str) else None,
        metadata=_metadata({name: value for name, value in entry.items() if name not in used}),
        size=int(float(entry.get("duration") or 0) * 32_000),
    )


def _cut(source: str, cut: dict[str, Any]) -> Item:
    """Return a Lhotse cut as a segment of a file if it is no more than that, else as what Lhotse is to load."""
    supervisions = cut.get("supervisions") or []
    texts = [one["text"] for one in supervisions if one.get("text")]
    about = {"custom": cut.get("custom"), "supervisions": supervisions}
    recording = cut.get("recording") or {}
    sources = recording.get("sources") or []
    plain = (
        cut["type"] == "MonoCut"
        and len(sources) == 1
        and sources[0]["type"] in ("file", "url")
        and not recording.get("transforms")
    )
    item = Item(
        printable(str(cut["id"])),
        "cut",
        source,
        member=printable(str(cut["id"])),
        text=" ".join(texts) or None,
        metadata=_metadata({name: value for name, value in about.items() if value}),
        extra=json.dumps(cut),
        size=int(float(cut.get("duration") or 0) * 32_000),
    )
    if not plain:
        return item
    channels = sources[0]["channels"]
    return dataclasses.replace(
        item,
        kind="file",
        source=sources[0]["source"],
        member="",
        start=float(cut["start"]),
        duration=float(cut["duration"]),
        channel=channels.index(cut["channel"]) if len(channels) > 1 else None,
        extra="",
    )


def _beside(source: str, path: str) -> str:
    """Return where a path of a manifest lies: relative ones are relative to the manifest."""
    if "://" in path or os.path.isabs(path):
        return path
    return posixpath.join(posixpath.dirname(source), path)


def _metadata(fields: dict[str, Any]) -> str | None:
    return json.dumps(fields, ensure_ascii=True, sort_keys=True, default=str) if fields else None


# --- archives and tables ------------------------------------------------------------------------------------------


def _archive(source: str) -> Iterator[Item]:
    """Return the sounds of a WebDataset shard with the .json and .txt of the same key."""
    with fsspec.open(source, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        key = ""
        sounds: list[tarfile.TarInfo] = []
        about: dict[str, bytes] = {}
        for member in tar:
            if not member.isfile():
                continue
            folder, base = posixpath.split(member.name)
            stem, _, ending = base.partition(".")
            own = posixpath.join(folder, stem)
            if own != key:
                yield from _sample(source, key, sounds, about)
                key, sounds, about = own, [], {}
            last = f".{ending.lower().rpartition('.')[2]}"
            if last in SOUNDS:
                sounds.append(member)
            elif ending in ("json", "txt", "text"):
                content = tar.extractfile(member)
                about[ending] = content.read() if content else b""
        yield from _sample(source, key, sounds, about)


def _sample(source: str, key: str, sounds: list[tarfile.TarInfo], about: dict[str, bytes]) -> Iterator[Item]:
    for member in sounds:
        fields: dict[str, Any] = {}
        with_text = about.get("txt", about.get("text"))
        try:
            fields = dict(json.loads(about["json"])) if "json" in about else {}
        except (ValueError, TypeError) as error:
            fields = {"json_error": str(error)}
        text = fields.pop("text", None) if isinstance(fields.get("text"), str) else None
        if with_text is not None:
            text = with_text.decode("utf-8", "backslashreplace").strip()
        yield Item(
            printable(key if len(sounds) == 1 else member.name),
            "tar",
            source,
            member=member.name,
            place=(member.offset_data, member.size),
            text=text,
            metadata=_metadata(fields),
            size=member.size,
        )


def _table(source: str, kind: str) -> Iterator[Item]:
    """Return the rows of a Parquet file, or of an Arrow stream as ``datasets`` keeps them, with sound as bytes."""
    with fsspec.open(source, "rb") as file:
        if kind == "parquet":
            parquet = pq.ParquetFile(file)
            column = _sound_column(parquet.schema_arrow)
            others = [name for name in parquet.schema_arrow.names if name != column]
            for group in range(parquet.num_row_groups):
                about = parquet.metadata.row_group(group)
                size = about.total_byte_size // max(1, about.num_rows)
                rows = parquet.read_row_group(group, others).to_pylist() if others else [{}] * about.num_rows
                yield from _cells(source, "parquet", column, group, rows, size, sum_before(parquet, group))
        else:
            before = 0
            for group, batch in enumerate(pa.ipc.open_stream(file)):
                column = _sound_column(batch.schema)
                rest = batch.drop_columns([column])
                rows = rest.to_pylist() if rest.num_columns else [{}] * batch.num_rows
                yield from _cells(source, "arrow", column, group, rows, batch.nbytes // max(1, batch.num_rows), before)
                before += batch.num_rows


def sum_before(parquet: pq.ParquetFile, group: int) -> int:
    """Return how many rows stand before a row group."""
    return sum(parquet.metadata.row_group(one).num_rows for one in range(group))


def _cells(
    source: str, kind: Any, column: str, group: int, rows: list[dict[str, Any]], size: int, before: int
) -> Iterator[Item]:
    name = Path(source).name
    for row, fields in enumerate(rows):
        text = fields.pop("text", None) if isinstance(fields.get("text"), str) else None
        identity = next((one for one in IDS if fields.get(one) is not None), None)
        yield Item(
            printable(str(fields.pop(identity)) if identity else f"{name}#{before + row}"),
            kind,
            source,
            member=str(before + row),
            place=(group, row),
            text=text,
            metadata=_metadata(fields),
            extra=column,
            size=size,
        )


def _sound_column(schema: pa.Schema) -> str:
    """Find the column with sound: a struct with ``bytes``, as ``datasets`` writes it, or binary."""
    for name, kind in zip(schema.names, schema.types, strict=True):
        if pa.types.is_struct(kind) and any(field.name == "bytes" for field in kind):
            return str(name)
    binary = (pa.types.is_binary, pa.types.is_large_binary)
    for name, kind in zip(schema.names, schema.types, strict=True):
        if any(test(kind) for test in binary):
            return str(name)
    raise OSError(f"no column holds sound; seen: {', '.join(schema.names)}")


# --- the plan -----------------------------------------------------------------------------------------------------

PLAN_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("source", pa.binary()),
        ("member", pa.binary()),
        ("place", pa.list_(pa.int64())),
        ("start", pa.float64()),
        ("duration", pa.float64()),
        ("channel", pa.int16()),
        ("text", pa.string()),
        ("metadata", pa.string()),
        ("extra", pa.string()),
        ("size", pa.int64()),
    ]
)


def to_table(items: list[Item]) -> pa.Table:
    """Write items as a table: a row group of the plan, a block of Ray's."""
    rows = [dataclasses.asdict(item) for item in items]
    for row in rows:
        row["source"], row["member"] = os.fsencode(row["source"]), os.fsencode(row["member"])
        for name in ("text", "extra"):
            if row[name] is not None:
                row[name] = row[name].encode("utf-8", "backslashreplace").decode()
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def from_table(table: pa.Table) -> list[Item]:
    """Read what :func:`to_table` has written."""
    items = []
    for row in table.to_pylist():
        row["source"], row["member"] = os.fsdecode(row["source"]), os.fsdecode(row["member"])
        row["place"] = tuple(row["place"]) if row["place"] else None
        items.append(Item(**row))
    return items


class Plan:
    """The list of items on disk, one row group per chunk, so that it takes no memory however long it is."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)

    @staticmethod
    def write(path: Path, items: Iterable[Item], chunk_items: int, chunk_bytes: int) -> None:
        """Write the list; a chunk ends with the item that brings it to either limit."""
        draft = path.with_name(f".{path.name}.tmp")
        with pq.ParquetWriter(draft, PLAN_SCHEMA, compression="zstd") as writer:
            chunk: list[Item] = []
            for item in items:
                chunk.append(item)
                if len(chunk) >= chunk_items or sum(one.size for one in chunk) >= chunk_bytes:
                    writer.write_table(to_table(chunk))
                    chunk = []
            if chunk:
                writer.write_table(to_table(chunk))
        draft.replace(path)

    def __len__(self) -> int:
        return int(self._file.num_row_groups)

    @property
    def items(self) -> int:
        """How many items there are."""
        return int(self._file.metadata.num_rows)

    def __getitem__(self, chunk: int) -> list[Item]:
        return from_table(self._file.read_row_group(chunk))

    def size(self, chunk: int) -> int:
        """Return how many items a chunk has."""
        return int(self._file.metadata.row_group(chunk).num_rows)
