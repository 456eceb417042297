"""From what the user names to a list of items, in an order that depends on nothing but the names and the contents.

A folder or a glob gives sound files, tar archives (WebDataset) and Parquet or Arrow tables (Hugging Face ``datasets``);
a manifest gives what its lines name (JSON lines as NeMo and Kyutai write them, or Lhotse cuts).  Everything may be a
local path or a URL that fsspec knows.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import ConfigError
from .manifests import IDS, LINES, LISTS, metadata, read_manifest
from .records import Item, irregular, is_local, locate, printable

SOUNDS = frozenset(
    f".{ending}"
    for group in ("wav wave flac ogg oga opus mp3 aif aiff aifc au snd caf w64 rf64", "m4a aac wma webm mp4")
    for ending in group.split()
)
"""Endings that folders are searched for; those that libsndfile cannot read are listed as failures."""
TABLES = {".parquet": "parquet", ".arrow": "arrow"}
FOLDER_ENDINGS = SOUNDS | TABLES.keys() | {".tar", ".tgz"}


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
        if empty and _ours(name):
            raise ConfigError(f"{printable(name)} is what a tokenisation has made; name what holds the sound")
        if empty:
            raise ConfigError(f"{printable(name)} holds no sound: wanted are {', '.join(sorted(FOLDER_ENDINGS))}")


def _expand(name: str) -> Iterator[Item]:
    try:
        file_system, path = locate(name)
        folder, there = file_system.isdir(path), file_system.exists(path)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"{printable(name)} cannot be opened: {error}") from error
    if folder:
        yield from _folder(file_system, path, path)
    elif there or (is_local(file_system) and os.path.lexists(path)):
        yield from _file(_address(file_system, path), posixpath.basename(path))
    elif any(mark in path for mark in "*?["):
        yield from _glob(file_system, path)
    else:
        raise ConfigError(f"{printable(name)} does not exist")


def _address(file_system: fsspec.AbstractFileSystem, path: str) -> str:
    return path if is_local(file_system) else str(file_system.unstrip_protocol(path))


def _glob(file_system: fsspec.AbstractFileSystem, pattern: str) -> Iterator[Item]:
    """Return the items of every match, named relative to the folder that the pattern begins with."""
    fixed = pattern[: min(pattern.find(mark) for mark in "*?[" if mark in pattern)]
    base = posixpath.dirname(fixed) or "."
    walked: set[str] = set()
    for found in sorted(str(match).rstrip("/") for match in file_system.glob(pattern)):
        if walked.intersection(_parents(found)):
            continue  # ** matches a folder and what is in it
        if file_system.isdir(found):
            walked.add(found)
            yield from _folder(file_system, found, base)
        else:
            yield from _file(_address(file_system, found), posixpath.relpath(found, base))


def _folder(file_system: fsspec.AbstractFileSystem, folder: str, base: str) -> Iterator[Item]:
    """Return the items of a folder, named relative to ``base``."""
    walk = _walk(folder) if is_local(file_system) else _walk_remote(file_system, folder)
    for found, error in walk:
        name = posixpath.relpath(found, base)
        if error is None:
            yield from _file(_address(file_system, found), name)
        else:
            yield _unsearchable(found, name, error)


def _parents(path: str) -> Iterator[str]:
    while path != (path := posixpath.dirname(path)):
        yield path


def _walk(folder: str) -> Iterator[tuple[str, OSError | None]]:
    """Return the files of a local folder in order, entering each folder once, however symbolic links go round.

    A folder that cannot be read comes with its error.
    """
    entered = set()
    closed: list[OSError] = []
    for root, folders, files in os.walk(folder, followlinks=True, onerror=closed.append):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        if _ours(root):
            folders.clear()
            continue
        folders.sort(key=os.fsencode)
        for file in sorted(files, key=os.fsencode):
            if _wanted(file):
                yield os.path.join(root, file), None
    for error in sorted(closed, key=lambda one: os.fsencode(one.filename)):
        yield error.filename, error


def _wanted(name: str) -> bool:
    return posixpath.splitext(name.lower())[1] in FOLDER_ENDINGS or name.lower().endswith(".tar.gz")


def _ours(folder: str) -> bool:
    """Tell whether a folder is the output of a tokenisation, finished or not: no input of another."""
    try:
        manifest = json.loads(Path(folder, "manifest.json").read_text())
        return isinstance(manifest, dict) and manifest.get("format") == "semanticodec-corpus"
    except (OSError, ValueError):
        return Path(folder, "_work", "run.json").is_file()


def _walk_remote(file_system: fsspec.AbstractFileSystem, folder: str) -> Iterator[tuple[str, OSError | None]]:
    """Return the files of a remote folder in order, and the folders in it that cannot be read with their errors.

    fsspec's own ``find`` and ``walk`` pass over those without a word.
    """
    found: list[str] = []
    closed: list[tuple[str, OSError]] = []
    left = [folder]
    while left:
        here = left.pop()
        try:
            entries = file_system.ls(here, detail=True)
        except OSError as error:
            closed.append((here, error))
            continue
        for entry in entries:
            name = str(entry["name"]).rstrip("/")
            if entry["type"] == "directory":
                left += [name] if name != here else []
            elif _wanted(name):
                found.append(name)
    yield from ((name, None) for name in sorted(found))
    yield from sorted(closed, key=lambda one: one[0])


def _file(source: str, name: str) -> Iterator[Item]:
    """Return the items of one file."""
    stem, ending = posixpath.splitext(source.lower())
    packed = ending == ".gz"
    ending = posixpath.splitext(stem)[1] if packed else ending
    try:
        file_system, path = locate(source)
        if is_local(file_system) and irregular(path):
            raise OSError("this is no regular file")
        if ending in LINES | LISTS:
            yield from read_manifest(source)
        elif ending == ".tgz" or (ending == ".tar" and packed):
            raise OSError("compressed archives cannot be read in place: gunzip it")
        elif ending == ".tar":
            yield from _archive(source)
        elif ending in TABLES:
            yield from _table(source, TABLES[ending])
        else:
            yield Item(printable(name), "file", source, size=_size(source))
    except Exception as error:
        # A damaged file may raise anything in the libraries that open it, and must not end the listing of the others.
        yield _unsearchable(source, name, error)


def _unsearchable(source: str, name: str, error: Exception) -> Item:
    return Item(printable(name), "bad", source, extra=f"cannot be searched for sound: {error}")


def _size(source: str) -> int:
    try:
        file_system, path = locate(source)
        return int(file_system.size(path) or 0)
    except Exception:
        return 0  # reading it will tell, whatever it is


# --- archives and tables ------------------------------------------------------------------------------------------


def _archive(source: str) -> Iterator[Item]:
    """Return the sounds of a WebDataset shard with the .json and .txt of the same key.

    A link stands for the member before it that it names.  What cannot be used is listed, and so is damage, behind which
    nothing can be found.
    """
    file_system, path = locate(source)
    with file_system.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        key, damage = "", ""
        sounds: list[tuple[str, tarfile.TarInfo]] = []
        about: dict[str, bytes] = {}
        files: dict[str, tarfile.TarInfo] = {}
        members = iter(tar)
        while True:
            try:
                member = next(members, None)
            except (tarfile.TarError, OSError, EOFError, ValueError) as error:
                damage = f": {error}"
                break
            if member is None:
                break
            folder, base = posixpath.split(member.name)
            stem, _, ending = base.partition(".")
            own = posixpath.join(folder, stem)
            if own != key:
                yield from _sample(source, key, sounds, about)
                key, sounds, about = own, [], {}
            last = f".{ending.lower().rpartition('.')[2]}"
            ending = ending.lower()
            if member.isdir() or not (last in SOUNDS or ending in ("json", "txt", "text", "cls")):
                continue
            stored = files.get(_linked(member)) if member.issym() or member.islnk() else member
            if stored is None or not stored.isfile() or stored.issparse():
                extra = "neither a plain file nor a link to one before it in the archive"
                yield Item(printable(member.name), "bad", source, member=member.name, extra=extra)
                continue
            files[posixpath.normpath(member.name)] = stored
            if last in SOUNDS:
                sounds.append((member.name, stored))
            else:
                content = tar.extractfile(stored)
                about[ending] = content.read() if content else b""
        yield from _sample(source, key, sounds, about)
        if damage or not _ends(file, tar.offset):
            extra = f"damaged at byte {tar.offset}{damage}: what follows, if anything, is lost"
            yield Item(printable(posixpath.basename(source)), "bad", source, extra=extra)


def _linked(member: tarfile.TarInfo) -> str:
    """Return the name that a link in an archive leads to: from the root if it is a hard one, else from its folder."""
    folder = posixpath.dirname(member.name) if member.issym() else ""
    return posixpath.normpath(posixpath.join(folder, member.linkname))


def _ends(file: BinaryIO, offset: int) -> bool:
    """Return whether an archive ends here, with a block of zeros and nothing but zeros behind.

    tarfile takes a damaged header, or a file that ends at a member, for the end.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    while block and not block.strip(b"\0"):
        if not (block := file.read(1 << 20)):
            return True
    return False


def _sample(
    source: str, key: str, sounds: list[tuple[str, tarfile.TarInfo]], about: dict[str, bytes]
) -> Iterator[Item]:
    for name, member in sounds:
        fields: dict[str, Any] = {}
        with_text = about.get("txt", about.get("text"))
        try:
            fields = dict(json.loads(about["json"])) if "json" in about else {}
        except (ValueError, TypeError, RecursionError) as error:
            fields = {"json_error": str(error)}
        if "cls" in about:
            fields["cls"] = about["cls"].decode("utf-8", "backslashreplace").strip()
        text = fields.pop("text", None) if isinstance(fields.get("text"), str) else None
        if with_text is not None:
            text = with_text.decode("utf-8", "backslashreplace").strip()
        yield Item(
            printable(key if len(sounds) == 1 else name),
            "tar",
            source,
            member=name,
            place=(member.offset_data, member.size),
            text=text,
            metadata=metadata(fields),
            size=member.size,
        )


def _table(source: str, kind: str) -> Iterator[Item]:
    """Return the rows of a Parquet file, or of an Arrow stream as ``datasets`` keeps them, with sound as bytes."""
    file_system, path = locate(source)
    with file_system.open(path, "rb") as file:
        if kind == "parquet":
            parquet = pq.ParquetFile(file)
            column = _sound_column(parquet.schema_arrow)
            others = [name for name in parquet.schema_arrow.names if name != column]
            others += [f"{column}.path"] if _has_paths(parquet.schema_arrow, column) else []
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
                if _has_paths(batch.schema, column):
                    paths = batch.column(column).field("path")
                    rest = rest.append_column(column, pa.StructArray.from_arrays([paths], ["path"]))
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
        if fields.get(column) == {"path": None}:
            del fields[column]
        identity = next((one for one in IDS if fields.get(one) is not None), None)
        yield Item(
            printable(str(fields.pop(identity)) if identity else f"{name}#{before + row}"),
            kind,
            source,
            member=str(before + row),
            place=(group, row),
            text=text,
            metadata=metadata(fields),
            extra=column,
            size=size,
        )


def _has_paths(schema: pa.Schema, column: str) -> bool:
    """Tell whether a column with sound says what its files were called."""
    kind = schema.field(column).type
    return pa.types.is_struct(kind) and any(field.name == "path" for field in kind)


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
