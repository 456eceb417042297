"""What describes a corpus: manifest.json, statistics.json, and the dataset card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..codec import SemantiCodec
from ..config import PRESETS, CodecConfig, config_from_json
from .options import CorpusOptions
from .records import printable
from .shards import Marker, Output, read_shards

VERSION = 1
PACKAGES = ("semanticodec", "torch", "numpy", "soxr", "soundfile", "pyarrow")
"""Packages that the codes, or the bytes of the shards, depend on."""
OPTIONAL = ("fsspec", "lhotse")
"""The same, where they are installed."""


def manifest(options: CorpusOptions, inputs: list[str]) -> dict[str, Any]:
    """Return all that decides what a corpus is made of; equal manifests of equal inputs mean equal corpora."""
    codec = options.work("cpu", 0).load()
    config = codec.config
    return {
        "format": "semanticodec-corpus",
        "version": VERSION,
        "model": config.name,
        "model_folder": _folder(options),
        "weights_sha256": codec.weights_hash,
        "encoder_sha256": encoder_hash(codec),
        "config": json.loads(config.to_json()),
        "codebook_sizes": list(config.codebook_sizes),
        "frame_rate": float(config.frame_rate),
        "dtype": options.dtype,
        "device_kind": options.kind,
        "windows": {
            "block_samples": config.block,
            "context_columns": config.encoder.context,
            "batch_seconds": options.seconds,
        },
        "seed": None,
        "channels": options.channels,
        "vad": f"webrtcvad {importlib.metadata.version('webrtcvad')}" if options.vad else None,
        "keep_features": options.keep_features,
        "shards": {"format": options.form, "megabytes": options.shard_mb},
        "packages": {name: importlib.metadata.version(name) for name in (*PACKAGES, *filter(_installed, OPTIONAL))},
        "python": platform.python_version(),
        "libsndfile": _libsndfile(),
        "inputs": [printable(name) for name in inputs],
    }


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _folder(options: CorpusOptions) -> str | None:
    """Return the folder that the weights are in, unless they are those that the preset's name stands for."""
    if isinstance(options.model, str) and (options.model in PRESETS or options.model == "mini"):
        return None
    return printable(os.path.abspath(options.model))


def seal(manifest: dict[str, Any], files: dict[str, str], markers: str) -> dict[str, Any]:
    """Return the manifest with the hashes of the files that describe the corpus, of its done-markers, and of itself."""
    sealed = manifest | {"files": files, "markers_sha256": markers}
    return sealed | {"manifest_sha256": manifest_hash(sealed)}


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 over everything that a manifest says, but that hash."""
    said = {name: value for name, value in manifest.items() if name != "manifest_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _libsndfile() -> str:
    import soundfile

    return str(soundfile.__libsndfile_version__)


def encoder_hash(codec: SemantiCodec) -> str:
    """Return the SHA-256 over the weights that encode, names and values, as they were loaded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codec.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def statistics(output: Output, markers: list[Marker], manifest: dict[str, Any]) -> dict[str, Any]:
    """Read the corpus through and describe it: size, use of the codebooks, bits, duplicates."""
    config = config_from_json(json.dumps(manifest["config"]))
    counts = [np.zeros(size, np.int64) for size in config.codebook_sizes]
    sounds: list[np.ndarray] = []
    ids: list[np.ndarray] = []
    rates: dict[int, int] = {}
    frames = 0
    numbers = [marker.shard for marker in markers if marker.rows]
    for batch in read_shards(output.folder, manifest["shards"]["format"], numbers):
        for count, name in zip(counts, ("semantic", "acoustic"), strict=True):
            count += np.bincount(batch.column(name).flatten().to_numpy(), minlength=len(count))
        frames += int(batch.column("frames").to_numpy().sum())
        for rate, number in zip(*np.unique(batch.column("sample_rate").to_numpy(), return_counts=True), strict=True):
            rates[int(rate)] = rates.get(int(rate), 0) + int(number)
        # The channels of a recording share its hash.
        pairs = zip(batch.column("audio_sha256").to_pylist(), batch.column("channel").to_pylist(), strict=True)
        sounds.append(_digests(f"{sound} {channel}" for sound, channel in pairs))
        ids.append(_digests(batch.column("id").to_pylist()))
    rows = sum(marker.rows for marker in markers)
    result: dict[str, Any] = {
        "rows": rows,
        "hours": round(sum(marker.seconds for marker in markers) / 3600, 6),
        "failures": sum(marker.failures for marker in markers),
        "shards": sum(bool(marker.files) for marker in markers),
    }
    if sounds:
        result |= {
            "frames": frames,
            "sample_rates": {str(rate): rates[rate] for rate in sorted(rates)},
            "codebooks": {
                name: _usage(count, bits)
                for name, count, bits in zip(("semantic", "acoustic"), counts, config.code_bits, strict=True)
            },
            "duplicates": rows - len(np.unique(np.concatenate(sounds))),
            "duplicate_ids": rows - len(np.unique(np.concatenate(ids))),
        }
        result["net_bits_per_second"] = float(config.frame_rate * sum(config.code_bits))
        entropy = sum(book["entropy_bits"] for book in result["codebooks"].values())
        result["entropy_bits_per_second"] = round(float(config.frame_rate) * entropy, 3)
    return result


def _digests(texts: Iterable[str]) -> np.ndarray:
    """Return 8 bytes per value, enough to count duplicates among billions: one false one in 40 at 10^9 rows."""
    short = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(short), np.uint64)


def _usage(counts: np.ndarray, bits: int) -> dict[str, Any]:
    total = int(counts.sum())
    p = counts[counts > 0] / max(1, total)
    entropy = float(-(p * np.log2(p)).sum())
    return {
        "entries": len(counts),
        "used": int((counts > 0).sum()),
        "entropy_bits": round(entropy, 6),
        "perplexity": round(2**entropy, 3),
        "bits": bits,
    }


def _configuration(name: str, files: str) -> list[str]:
    return [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {files}"]


def readme(manifest: dict[str, Any], statistics: dict[str, Any]) -> str:
    """Write the dataset card."""
    config: CodecConfig = config_from_json(json.dumps(manifest["config"]))
    form, rows, hours = manifest["shards"]["format"], statistics["rows"], statistics["hours"]
    data = {"parquet": "data/*.parquet", "webdataset": "data/*.tar"}  # what datasets can read
    head = ["---", "pretty_name: Audio tokens", "tags: [audio, audio-tokens, semanticodec]", "configs:"]
    if rows and form in data:
        head += _configuration("default", data[form])
    if form != "webdataset" or not rows:  # datasets reads all of a folder with one reader
        head += _configuration("failures", "failures.parquet")
    lines = [
        *head,
        "---",
        "",
        f"# {hours:,.2f} hours of sound as {config.name} codes",
        "",
        f"{rows:,} rows, {config.token_rate} tokens per second ({float(config.bitrate) / 1000:g} kbit/s net), made by "
        f"semanticodec {manifest['packages']['semanticodec']} in {manifest['dtype']} on {manifest['device_kind']}.  "
        f"{statistics['failures']:,} inputs could not be read and are listed in `failures.parquet`.",
        "",
        "| column | what it is |",
        "|---|---|",
        "| `id` | name of the recording |",
        f"| `semantic`, `acoustic` | codes, uint16, {float(Fraction(config.frame_rate)):g} of each per second |",
        "| `frames` | length of either |",
        "| `samples`, `sample_rate` | of the recording, per channel |",
        "| `source`, `offset` | where it came from, first sample |",
        "| `channel` | null: channels were averaged |",
        "| `text`, `metadata` | transcript, and a JSON object with every other field of the input |",
        "| `audio_sha256` | of the samples as read (float32, interleaved) |",
        *(
            ["| `features` | before quantising, float16, a patch after the other |"]
            if manifest["keep_features"]
            else []
        ),
        "",
        *(["Lhotse reads it: `CutSet.from_shar(in_dir='data')`.", ""] if form == "shar" else []),
    ]
    if "codebooks" in statistics:
        lines += ["| stream | entries | used | perplexity | bits | entropy |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {book['entries']} | {book['used']} | {book['perplexity']:.1f} | {book['bits']} | "
            f"{book['entropy_bits']:.2f} |"
            for name, book in statistics["codebooks"].items()
        ]
        lines += [
            "",
            f"{statistics['duplicates']} rows repeat the sound of another row, {statistics['duplicate_ids']} its id.",
            "",
        ]
    if rows and form == "parquet":
        lines += [
            "```python",
            "import datasets, numpy, semanticodec",
            "",
            'row = datasets.load_dataset("FOLDER", split="train")[0]',
            'codes = numpy.stack([row["semantic"], row["acoustic"]])[None]',
            f'codec = semanticodec.SemantiCodec.from_pretrained("{config.name}")',
            'samples = -(-row["samples"] * 16000 // row["sample_rate"])',
            "sound = codec.decode(codes, length=samples)  # float32 [1, samples] at 16 kHz",
            "```",
            "",
        ]
    lines += [
        f"Weights: codebooks `{manifest['weights_sha256']}`, encoder `{manifest['encoder_sha256']}`.  "
        "`semanticodec tokenize verify` checks the files.",
        "",
    ]
    return "\n".join(lines)
