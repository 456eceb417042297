"""Manifests: what their entries name, as JSON lines of NeMo, Kyutai and Hugging Face, or as Lhotse's cuts."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import math
import os
import posixpath
from collections.abc import Iterator
from typing import Any

from .records import Item, locate, printable

LINES = frozenset({".jsonl", ".ndjson", ".jl"})
LISTS = frozenset({".json", ".yaml", ".yml"})
"""Endings of manifests; a ``.json`` may hold lines as well."""
PATHS = ("audio_filepath", "path", "audio_path", "wav", "audio", "file", "file_name")
"""Fields that may name the sound in a line of a manifest."""
IDS = ("id", "utt_id", "key", "__key__")
STARTS = ("offset", "start")
LONGEST = 1e9
"""Seconds; more is a mistake, and would overflow."""
CUTS = frozenset({"MonoCut", "MultiCut", "MixedCut", "PaddingCut"})


def read_manifest(source: str) -> Iterator[Item]:
    """Return the items of a manifest: one per line of JSON, or per element of a JSON or YAML list.

    A list is read as a whole, lines are not: for millions of entries those are the better form.
    """
    file_system, path = locate(source)
    packed = source.lower().endswith(".gz")
    ending = posixpath.splitext(source.lower().removesuffix(".gz"))[1]
    with file_system.open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if packed else raw
        if ending in LISTS:
            if (data := file.read()).lstrip()[:1] == b"[" or ending != ".json":
                yield from (_item(source, number, entry) for number, entry in enumerate(_elements(data, ending), 1))
                return
            file = io.BytesIO(data)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _item(source, number, line)


def _elements(data: bytes, ending: str) -> list[Any]:
    if ending == ".json":
        elements = json.loads(data)
    else:
        import yaml  # type: ignore[import-untyped]

        elements = yaml.safe_load(data)
    if not isinstance(elements, list):
        raise ValueError(f"this holds a {type(elements).__name__}; a manifest is a list, or lines of JSON")
    return elements


def _item(source: str, number: int, entry: Any) -> Item:
    where = f"{printable(posixpath.basename(source))}:{number}"
    try:
        entry = json.loads(entry) if isinstance(entry, bytes) else entry
        if not isinstance(entry, dict):
            raise ValueError(f"an object is wanted, seen {type(entry).__name__}")
        item = _cut(source, entry) if entry.get("type") in CUTS else _entry(source, entry)
        os.fsencode(item.source)  # raises for half a surrogate pair, which JSON may hold and no file name can
        return item
    except Exception as error:
        # The fields of a line may be of any type and depth; what that raises must not end the listing of the others.
        told = f"entry {number} is none of a manifest: {type(error).__name__}: {error}"
        return Item(where, "bad", source, member=str(number), extra=told)


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not math.isfinite(seconds) or abs(seconds) > LONGEST:
        raise ValueError(f"{seconds:g} s is no time in a recording")
    return seconds


def _entry(source: str, entry: dict[str, Any]) -> Item:
    field = next((name for name in PATHS if isinstance(entry.get(name), str)), None)
    if field is None:
        raise ValueError(f"none of {', '.join(PATHS)} names the sound")
    start = next((name for name in STARTS if entry.get(name) is not None), None)
    identity = next((name for name in IDS if entry.get(name) is not None), None)
    path = entry[field]
    begin = 0.0 if start is None else _seconds(entry[start])
    # Without a start the duration describes the file, and may be rounded: all of it is meant.
    stated = None if entry.get("duration") is None else _seconds(entry["duration"])
    duration = None if start is None else stated
    text = entry.get("text")
    default = path if start is None else f"{path}@{begin!r}" + ("" if duration is None else f"+{duration!r}")
    used = {field, start, identity, "text" if isinstance(text, str) else None}
    return Item(
        printable(str(entry[identity])) if identity else printable(default),
        "file",
        beside(source, path),
        start=begin,
        duration=duration,
        text=text if isinstance(text, str) else None,
        metadata=metadata({name: value for name, value in entry.items() if name not in used}),
        size=max(0, int((stated or 0) * 32_000)),
    )


def _cut(source: str, cut: dict[str, Any]) -> Item:
    """Return a Lhotse cut as a segment of a file if it is no more than that, else as what Lhotse is to load."""
    supervisions = cut.get("supervisions") or []
    texts = [one["text"] for one in supervisions if one.get("text")]
    recording = cut.get("recording") or {}
    about = {"custom": cut.get("custom"), "supervisions": supervisions, "recording_id": recording.get("id")}
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
        metadata=metadata({name: value for name, value in about.items() if value}),
        extra=json.dumps(_placed(source, cut)),
        size=max(0, int(_seconds(cut.get("duration") or 0) * 32_000)),
    )
    if not plain:
        return item
    channels = sources[0]["channels"]
    return dataclasses.replace(
        item,
        kind="file",
        source=beside(source, sources[0]["source"]) if sources[0]["type"] == "file" else sources[0]["source"],
        member="",
        start=_seconds(cut["start"]),
        duration=_seconds(cut["duration"]),
        channel=channels.index(cut["channel"]) if len(channels) > 1 else None,
        extra="",
    )


def _placed(source: str, part: Any) -> Any:
    """Return what a cut says, with the paths in it as :func:`beside` has them.

    Raises:
        ValueError: its sound is what a command prints: a manifest is no place to run commands from.
    """
    if isinstance(part, list):
        return [_placed(source, one) for one in part]
    if not isinstance(part, dict):
        return part
    if "channels" in part and part.get("type") == "command":
        raise ValueError("its sound is what a command prints, and commands are not run; write the sound to a file")
    if "channels" in part and part.get("type") == "file":
        return part | {"source": beside(source, part["source"])}
    return {name: _placed(source, one) for name, one in part.items()}


def beside(source: str, path: str) -> str:
    """Return where a path in a file lies: relative ones are relative to that file."""
    if "://" in path or os.path.isabs(path):
        return path
    return posixpath.join(posixpath.dirname(source), path)


def metadata(fields: dict[str, Any]) -> str | None:
    """Return fields as strict JSON that is valid Unicode, None if there are none; what is no number becomes null."""
    return json.dumps(_plain(fields), ensure_ascii=True, sort_keys=True, allow_nan=False) if fields else None


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {_plain(str(name)): _plain(one) for name, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int():
            return value
    return _plain(str(value))
