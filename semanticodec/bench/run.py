"""Run codecs on clips and measure; everything is cached by content, so that a run that was killed goes on.

Three rounds: every codec codes every clip; each codec's delay is found; every decode is scored.  What is found is
kept in one small file per (codec, clip), written as soon as it is known, beside the decode.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..audio import save
from ..config import SAMPLE_RATE
from ..demo import RECORDING
from ..errors import AudioError, ConfigError
from .align import Delay, align, bandwidth, chosen, delays_of, find_delay
from .clips import KINDS, Clip, thin
from .codecs import About, Codec, checked, found_by, gross_bits, sources
from .decodes import Decodes
from .entries import Entry, hashed
from .listening import ANCHORS, REFERENCE
from .machine import machine
from .metrics import METRICS, Value, release
from .pool import Advance, Each, workers
from .results import Results
from .sounds import Sound
from .timing import TIMING, spent_on, timer

ALIGNED = "+".join((sources("bench/align")[:16], release("pyloudnorm"), release("numpy")))
"""What undoes delay and level, and takes gain and band: values that other sources or versions found are not used."""
DELAY = f"delay@{ALIGNED}"
VOICE = Clip("demo", KINDS[0], RECORDING)
ENOUGH = 8
"""Clips of speech that tell a codec's delay better than those of all kinds do."""
RESERVED = {"original", REFERENCE, *ANCHORS}
"""Names of other things than codecs in the gallery and in listening tests."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        codecs: whose names differ.
        clips: whose names differ.
        cache: folder for decodes and scores.
        metrics: names from :data:`.metrics.METRICS`.
        costly_every: costly metrics are taken on every n-th clip of each kind.
        compensate: whether delay and level are undone first.
        jobs: processes, of one thread each.
    """

    codecs: Sequence[Codec]
    clips: Sequence[Clip]
    cache: Path
    metrics: Sequence[str] = tuple(METRICS)
    costly_every: int = 1
    compensate: bool = True
    jobs: int = 1

    def __post_init__(self) -> None:
        for what, names in (("codecs", [c.name for c in self.codecs]), ("clips", [c.name for c in self.clips])):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ConfigError(
                    f"{what} need names of their own (of clips: paths without endings); "
                    f"{', '.join(sorted(twice))} comes twice"
                )
            unsafe = [name for name in names if what == "codecs" and not _names_a_file(name)]
            if unsafe:
                raise ConfigError(
                    f"a codec's name is a file's too; wanted is one without / and \\, not empty, not "
                    f"{', '.join(sorted(RESERVED))}, at most 200 bytes, seen is {unsafe[0]!r}"
                )
        unknown = set(self.metrics) - METRICS.keys()
        if unknown:
            raise ConfigError(f"unknown metrics {', '.join(sorted(unknown))}; there are {', '.join(METRICS)}")


def run(plan: Plan, title: str, advance: Advance = lambda *_: None) -> Results:
    """Do what is not in the cache yet, and gather everything.

    A codec that cannot run at all, or a metric whose package is missing, is skipped with the reason; a codec that fails
    on one clip loses only that clip, a metric that does only its value, a clip that cannot be read only itself, and the
    reason is kept.

    Args:
        plan: what to run.
        title: of the results.
        advance: is told about progress.

    Raises:
        AudioError: none of the clips can be read.
    """
    clips, failed = readable(plan.clips)
    among = [codec.among(plan.clips) if isinstance(codec, Decodes) else codec for codec in plan.codecs]
    plan = dataclasses.replace(plan, clips=clips, codecs=among)
    skipped = {c.name: reason for c in plan.codecs if (reason := c.missing())}
    skipped |= {name: reason for name in plan.metrics if (reason := METRICS[name].missing())}
    codecs = [codec for codec in plan.codecs if codec.name not in skipped]
    metrics = [name for name in plan.metrics if name not in skipped]
    prints = {codec.name: hashed(codec) for codec in codecs}
    costly = {clip.name for clip in thin(plan.clips, plan.costly_every)}
    wanted = {clip.name: tuple(n for n in metrics if _applies(n, clip, clip.name in costly)) for clip in plan.clips}

    def entry(codec: Codec, clip: Clip) -> Entry:
        content = found_by(clip, by_name=isinstance(codec, Decodes))
        return Entry.of(plan.cache, prints[codec.name], content)

    with workers(plan.jobs) as each:
        pairs = [(codec, clip) for codec in codecs for clip in plan.clips]
        jobs = [(codec, clip, entry(codec, clip)) for codec, clip in pairs]
        for (codec, clip, _), wrong in each(code, jobs, "coding", advance):
            if wrong:
                failed[f"{codec.name} on {clip.name}"] = wrong
        pairs = [(codec, clip) for codec, clip in pairs if f"{codec.name} on {clip.name}" not in failed]

        delays: dict[str, Delays] = {codec.name: Delays() for codec in codecs}
        if plan.compensate:
            for codec in codecs:
                mine = [(clip, entry(codec, clip)) for one, clip in pairs if one is codec]
                delays[codec.name] = calibrate(mine, each, advance, partial(on_shipped_voice, codec, plan.cache))

        order = {clip.name: place for place, clip in enumerate(plan.clips)}
        scoring = [
            (clip, entry(codec, clip), names, delays[codec.name].of(clip), plan.compensate)
            for codec, clip in sorted(pairs, key=lambda pair: order[pair[1].name])
            if (names := wanted[clip.name])
        ]
        whose = {entry(codec, clip): codec.name for codec, clip in pairs}
        for (clip, place, *_), raised in each(score, scoring, "scoring", advance):
            failed |= {f"{whose[place]} on {clip.name}: {metric}": wrong for metric, wrong in raised.items()}
    values = {codec.name: _gather(plan, codec, wanted, delays[codec.name], entry, failed) for codec in codecs}
    return Results(
        title=title,
        machine=machine(),
        settings={
            "rate": SAMPLE_RATE,
            "timing": TIMING,
            "compensate": plan.compensate,
            "costly_every": plan.costly_every,
            "costly": [name for name in metrics if METRICS[name].costly],
        },
        clips=described(plan.clips),
        systems={
            codec.name: _facts(codec, prints[codec.name], delays[codec.name], [entry(codec, c) for c in plan.clips])
            for codec in codecs
        },
        values=values,
        skipped=skipped,
        failed=failed,
    )


@dataclass(frozen=True)
class Delays:
    """What is undone of a codec's delay, in samples.

    Args:
        clips: clip's name -> delay there.
        usual: the most common one; None where none could be told.
    """

    clips: Mapping[str, int] = field(default_factory=dict)
    usual: int | None = 0

    def of(self, clip: Clip) -> int:
        """Return the delay on one clip."""
        return self.clips.get(clip.name, self.usual or 0)


def calibrate(
    coded: Sequence[tuple[Clip, Entry]], each: Each, advance: Advance, shipped: Callable[[], Delay | None]
) -> Delays:
    """Find a codec's delay: from the clips of speech, which tell best, if they are enough, or else from all.

    Args:
        coded: clips and where their decodes are.
        each: does the work.
        advance: is told about progress.
        shipped: returns the codec's delay on the shipped voice, if it can code it; asked where the clips cannot tell.
    """
    told = [(clip, delay) for (clip, _), delay in each(_delay, coded, "aligning", advance)]
    speech = [delay for clip, delay in told if delay and clip.kind == KINDS[0]]
    delays = delays_of(speech) if len(speech) >= ENOUGH else []
    delays = delays or delays_of(delay for _, delay in told) or delays_of([shipped()])
    return Delays({clip.name: chosen(delays, delay) for clip, delay in told}, delays[0] if delays else None)


def on_shipped_voice(codec: Codec, cache: Path) -> Delay | None:
    """Return a codec's delay on the recording that the package ships.

    Args:
        codec: any that is not missing.
        cache: folder for its decode.

    Returns:
        Nothing for folders of decodes, or if it fails or cannot be told.
    """
    if isinstance(codec, Decodes):
        return None
    place = Entry.of(cache, hashed(codec), VOICE.digest)
    return None if code(codec, VOICE, place, timed=False) else _delay(VOICE, place)


def readable(clips: Sequence[Clip]) -> tuple[list[Clip], dict[str, str]]:
    """Part clips into those that can be read, and the others' name -> why not, before anything is done with them.

    Args:
        clips: any.

    Returns:
        Those that can be read, and name -> reason of the others.

    Raises:
        AudioError: there is none that can.
    """
    kept, failed = [], {}
    for clip in clips:
        try:
            clip.wave  # noqa: B018
        except (AudioError, OSError) as error:
            failed[clip.name] = f"{type(error).__name__}: {error}"
        else:
            kept.append(clip)
    if failed and not kept:
        name, reason = next(iter(failed.items()))
        raise AudioError(f"none of the {len(failed)} clips can be read; {name}: {reason}")
    return kept, failed


def described(clips: Iterable[Clip]) -> dict[str, dict[str, Any]]:
    """Return what results keep of clips: name -> kind, seconds, digest, group."""
    facts = ((clip.name, clip.kind, round(clip.seconds, 4), clip.digest, clip.group) for clip in clips)
    return {name: dict(zip(("kind", "seconds", "digest", "group"), rest, strict=True)) for name, *rest in facts}


def _names_a_file(name: str) -> bool:
    # Files are called what codecs are, and an ending; no disk takes more than 255 bytes.
    fits = name.isprintable() and 0 < len(name.encode()) <= 200
    return fits and not set("/\\") & set(name) and name not in RESERVED


def _applies(name: str, clip: Clip, costly: bool) -> bool:
    return clip.kind in METRICS[name].kinds and (costly or not METRICS[name].costly)


def _gather(
    plan: Plan,
    codec: Codec,
    wanted: Mapping[str, Sequence[str]],
    delays: Delays,
    entry: Callable[[Codec, Clip], Entry],
    failed: Mapping[str, str],
) -> dict[str, dict[str, list[float]]]:
    """Collect measure -> clip -> [value, weight] of one codec: what is wanted of each clip, whatever the cache has."""
    about, values = codec.about(), dict[str, dict[str, list[float]]]()
    for clip in plan.clips:
        if f"{codec.name} on {clip.name}" in failed:
            continue
        record, delay = entry(codec, clip).read(), delays.of(clip)
        names = {score_key(name, delay, plan.compensate, clip): name for name in wanted[clip.name]}
        found = {name: value for key, name in names.items() if (value := record["scores"].get(key))}
        notes = record["scores"].get(score_key("notes", delay, plan.compensate))
        if notes:
            found |= {"gain": (notes[0], 1), "late": (delay, 1)}
            if notes[1] is not None:
                found["band"] = min(notes[1], about.rate / 2), 1
        for name, (value, weight) in (_costs(record, about, clip.seconds) | found).items():
            values.setdefault(name, {})[clip.name] = [float(f"{value:.5g}"), float(f"{weight:.5g}")]
    return values


def _costs(record: Mapping[str, Any], about: About, seconds: float) -> dict[str, Value]:
    """Return bitrates and times of one clip, weighted by its length."""
    bits = {"net": record["net_bits"], "entropy": record["entropy_bits"]}
    found: dict[str, Value] = {}
    if about.measured:
        gross = gross_bits(record["net_bits"], seconds, about.block, about.block_bits, about.packet)
        bits |= {"file": 8 * record["bytes"], "gross": gross}
        found = {name: (spent / seconds, seconds) for name, spent in record.get("seconds", {}).items()}
    return {f"kbps_{name}": (n / seconds / 1000, seconds) for name, n in bits.items() if n is not None} | found


def _facts(codec: Codec, fingerprint: str, delays: Delays, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return what results keep of a codec; also by whom clips were timed, if not only by this machine and commit."""
    facts = {**dataclasses.asdict(codec.about()), "delay_samples": delays.usual, "fingerprint": fingerprint}
    facts["by_name"] = isinstance(codec, Decodes)
    records = [record for entry in entries if "seconds" in (record := entry.read())]
    by = {record.get("timed_by", "an older version") for record in records}
    return facts | ({"timed_by": sorted(by)} if by - {timer()} else {})


def score_key(name: str, delay: int, compensate: bool, clip: Clip | None = None) -> str:
    """Return what a score is found by in its entry.

    Args:
        name: of the metric, or "notes" for gain and band.
        delay: samples that were undone.
        compensate: whether delay and level were undone at all.
        clip: whose transcript word errors depend on.
    """
    made_by = METRICS[name].made_by if name in METRICS else "notes"
    key = f"{name}@{made_by}+{ALIGNED}/{delay if compensate else 'as it is'}"
    if name == "wer" and clip is not None:  # what was said is in no other key
        key += f"/{hashlib.sha256((clip.text or '').encode()).hexdigest()[:16]}"
    return key


def code(codec: Codec, clip: Clip, entry: Entry, *, timed: bool = True) -> str | None:
    """Code and decode one clip, unless that is done; return what went wrong.  Times are as :data:`TIMING` says.

    Args:
        codec: to run.
        clip: to code.
        entry: where the decode goes.
        timed: whether seconds are kept.

    Returns:
        Nothing if all went well.
    """
    if entry.whole():
        return None
    try:
        codec.about()  # loads what must be loaded
        if timed and (name := codec.fingerprint()) not in _WARM:
            codec.decode(codec.encode(clip), clip)
            _WARM.add(name)
        coded, encoding = spent_on(lambda: codec.encode(clip))
        decoded, decoding = spent_on(lambda: codec.decode(coded, clip))
        wave = checked(decoded)
    except Exception as error:  # an adapter is anybody's code: one odd clip does not end a night's run
        return f"{type(error).__name__}: {error}"
    timing = {
        "seconds": {
            "encode_cpu": encoding[1],
            "decode_cpu": decoding[1],
            "encode_wall": encoding[0],
            "decode_wall": decoding[0],
        },
        "timed_by": timer(),
    }
    entry.path(".flac").parent.mkdir(parents=True, exist_ok=True)
    save(entry.path(".flac"), torch.from_numpy(wave), SAMPLE_RATE)
    if coded.codes is not None:
        np.save(entry.path(".npy"), coded.codes)
    entry.write(
        {
            "codec": codec.name,
            "clip": clip.name,
            "bytes": len(coded.data),
            "net_bits": coded.net_bits,
            "entropy_bits": coded.entropy_bits,
            **(timing if timed else {}),
            "scores": {},
        }
    )
    return None


_WARM: set[str] = set()
"""Fingerprints of what this process has used."""


def _delay(clip: Clip, entry: Entry) -> Delay | None:
    record = entry.read()
    if DELAY not in record:
        found = find_delay(_original(clip).wave, entry.decoded())
        record[DELAY] = found and dataclasses.astuple(found)
        entry.write(record)
    kept: list[Any] | None = record[DELAY]
    return None if kept is None else Delay(*kept)


def score(clip: Clip, entry: Entry, metrics: Sequence[str], delay: int, compensate: bool) -> dict[str, str]:
    """Take the metrics that are not known yet; each is written as soon as it is.  Return metric -> what went wrong.

    Args:
        clip: the original.
        entry: where its decode is and scores go.
        metrics: names.
        delay: samples to undo.
        compensate: whether to undo delay and level.
    """
    record = entry.read()
    scores: dict[str, Any] = record["scores"]
    notes = score_key("notes", delay, compensate)
    wanted = {name: key for name in metrics if (key := score_key(name, delay, compensate, clip)) not in scores}
    raised: dict[str, str] = {}
    if not wanted and notes in scores:
        return raised
    original = _original(clip)
    aligned = align(original.wave, entry.decoded(), delay=delay, level=compensate)
    decoded = Sound(aligned.wave)
    scores[notes] = aligned.gain, bandwidth(original.wave, aligned.wave)
    entry.write(record)
    for name, key in wanted.items():
        try:
            scores[key] = METRICS[name].value(original, decoded)
        except Exception as error:  # of other people's packages, on sounds that they did not think of
            raised[name] = f"{type(error).__name__}: {error}"
        else:
            entry.write(record)
    return raised


@functools.lru_cache(2)
def _original(clip: Clip) -> Sound:
    return Sound(clip.wave.astype(np.float64), clip.text)
