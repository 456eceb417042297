"""What is asked of whole systems after a run: their codes, their costs, and recordings for a listening test."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..demo import log_mel
from ..errors import ConfigError
from .clips import Clip, origin
from .codecs import Codec, Semanticodec
from .cost import cost
from .entries import aligned, entry
from .listening import LONGEST, Item
from .neural import Hub
from .probe import bag, probe, use
from .results import Results
from .run import Plan


def survey(results: Results, plan: Plan, *, costs: bool) -> Results:
    """Add codebook use, semantic probes and costs to the facts about each system.

    Args:
        results: of the plan.
        plan: that was run.
        costs: whether to measure memory, operations and latency, which takes a fresh process per codec.

    Returns:
        The results with them; costs that could not be measured are among what failed.
    """
    systems = {name: dict(facts) for name, facts in results.systems.items()}
    clips = {clip.name: clip for clip in plan.clips if clip.name in results.clips}
    baseline = {name: _mel_statistics(clip) for name, clip in clips.items()}
    settings = {**results.settings, "probe_baseline": _probes(baseline, clips)}
    failed = dict(results.failed)
    for codec in plan.codecs:
        facts = systems.get(codec.name)
        if facts is None:
            continue
        facts |= codes_facts(codec, results, clips, plan.cache)
        coded = [clips[name] for name in results.scores(codec.name, "kbps_net")]
        if costs and facts["measured"] and coded:
            try:
                facts |= dataclasses.asdict(cost(codec, max(coded, key=lambda clip: clip.seconds)))
            except Exception as error:  # of an adapter, as in the run
                failed[f"{codec.name}: costs"] = f"{type(error).__name__}: {error}"
    return dataclasses.replace(results, systems=systems, settings=settings, failed=failed)


def codes_facts(codec: Codec, results: Results, clips: Mapping[str, Clip], cache: Path) -> dict[str, Any]:
    """Count a system's codes and classify clips by them.

    Args:
        codec: the system.
        results: of a run of it.
        clips: of that run, by name.
        cache: of that run.

    Returns:
        Facts by name; none for codecs without codes.
    """
    coded: dict[str, NDArray[np.int64]] = {}
    for name in results.scores(codec.name, "kbps_net"):
        codes = entry(results, codec.name, clips[name], cache).codes()
        if codes is not None:
            coded[name] = codes
    if not coded:
        return {}
    assert isinstance(codec, Semanticodec | Hub)
    sizes = codec.codebook_sizes()
    seconds = sum(clips[name].seconds for name in coded)
    frames = sum(codes.size for codes in coded.values())
    books = use(coded.values(), sizes)
    features = {"codes": {name: bag(codes, sizes) for name, codes in coded.items()}}
    if isinstance(codec, Semanticodec):
        features["embedded"] = {name: codec.pool(codes) for name, codes in coded.items()}
    return {
        "tokens_per_second": round(frames / seconds, 2),
        "codebook_use": [f"{100 * book.used / book.size:.0f} % of {book.size}" for book in books],
        "entropy_bits": [round(book.entropy, 2) for book in books],
        "kbps_at_entropy": round(sum(b.entropy for b in books) * frames / len(sizes) / seconds / 1000, 3),
        **{f"probe_{name}": _probes(pooled, clips) for name, pooled in features.items()},
    }


def listening_items(
    results: Results, clips: Sequence[Clip], cache: Path, systems: Sequence[str], each: int, seed: int
) -> list[Item]:
    """Choose recordings of each kind by the seed, of 3 to 12 s, and gather their decodes.

    Args:
        results: of a run.
        clips: of the same folder.
        cache: of the same run.
        systems: to be heard.
        each: recordings of each kind.
        seed: of the choice.

    Returns:
        An item per recording, decodes aligned with the original.

    Raises:
        ConfigError: a system is not in the results, or comes twice, or none of the clips is in them.
    """
    if len(set(systems)) < len(systems):
        raise ConfigError(f"a listener hears each system once per trial; seen are {', '.join(systems)}")
    wrong = [name for name in systems if "fingerprint" not in results.systems.get(name, {})]
    if wrong:
        raise ConfigError(f"no decodes of {', '.join(map(repr, wrong))}; there are {', '.join(results.systems)}")
    draw, items = random.Random(seed), []
    for kind in results.kinds:
        fitting = [
            clip
            for clip in clips
            if clip.kind == kind
            and results.clips.get(clip.name, {}).get("digest") == clip.digest
            and 3 <= clip.seconds <= LONGEST
            and all(clip.name in results.scores(name, "kbps_net") for name in systems)
        ]
        for clip in draw.sample(fitting, min(each, len(fitting))):
            decodes = {name: aligned(results, name, clip, cache, level=True) for name in systems}
            items.append(Item(clip.name, clip.wave.astype(np.float64), decodes))
    if not items:
        raise ConfigError("none of the recordings of 3 to 12 s has been decoded by all of the systems")
    return items


def _mel_statistics(clip: Clip) -> NDArray[np.float32]:
    """Pool what needs no codec: mean and deviation of the original's log-mel over time."""
    rows = log_mel(torch.from_numpy(clip.wave))
    result: NDArray[np.float32] = torch.cat([rows.mean(0), rows.std(0, correction=0)]).numpy()
    return result


def _probes(pooled: Mapping[str, NDArray[np.float32]], clips: Mapping[str, Clip]) -> dict[str, str]:
    """Learn every label of the manifest that enough clips have; see :func:`.probe.probe`."""
    origins: dict[str, dict[str, str]] = {}
    for name in pooled:
        for level, group in origin(clips[name]).items():
            origins.setdefault(level, {})[name] = group
    results = ((label, probe(pooled, found, origins, label)) for label, found in _labels(clips, pooled).items())
    return {label: str(result) for label, result in results if result}


def _labels(clips: Mapping[str, Clip], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return column -> clip -> label, of what says something about many clips.

    Columns with another value for most clips name or measure them (checksums, durations); one that divides the clips
    as another before it does is the same label.
    """
    columns: dict[str, dict[str, str]] = {}
    for name in names:
        for column, label in {"kind": clips[name].kind, **clips[name].labels}.items():
            columns.setdefault(column, {})[name] = label
    found, seen = {}, []
    for column, labels in columns.items():
        parts: dict[str, set[str]] = {}
        for name, label in labels.items():
            parts.setdefault(label, set()).add(name)
        division = sorted(map(sorted, parts.values()))
        if 2 * len(parts) <= len(labels) and division not in seen:
            found[column] = labels
            seen.append(division)
    return found
