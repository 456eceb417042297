"""Listening tests in the manner of MUSHRA (ITU-R BS.1534-3): export for webMUSHRA, and analysis of its answers."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..audio import resample, save
from ..config import SAMPLE_RATE
from ..errors import ConfigError
from .align import Samples, align, loudness
from .statistics import Comparison, Interval, interval, paired

ANCHORS = {"anchor35": 3500, "anchor70": 7000}
"""Low and mid anchor: the original through a low-pass filter, by its cut-off in Hz."""
RATE = 48_000
"""Browsers play at this rate; webMUSHRA refuses files of another."""
LONGEST = 12
"""Seconds that BS.1534 allows per stimulus."""
LOUDNESS = -26.0
"""LUFS that every stimulus is brought to, lower where a peak would clip."""
REFERENCE = "reference"


@dataclass(frozen=True)
class Item:
    """One trial: an original and what the systems made of it, all ``[S]`` at 16 kHz."""

    name: str
    original: Samples
    decodes: Mapping[str, Samples]


def low_pass(wave: Samples, cutoff: float) -> Samples:
    """Remove what lies above ``cutoff`` Hz, with the steep filter that BS.1534 asks for (over 40 dB within 500 Hz)."""
    from scipy.signal import firwin, oaconvolve

    taps = firwin(511, cutoff, fs=SAMPLE_RATE, window=("kaiser", 8.0))
    result: Samples = oaconvolve(wave, taps, "same")
    return result


def export(items: Sequence[Item], folder: Path, *, seed: int = 0, title: str = "Audio quality") -> None:
    """Write stimuli, ``config.yaml`` for webMUSHRA, and ``key.json`` that says which stimulus is what.

    Trials come in an order drawn from the seed, stimuli have names that tell nothing (webMUSHRA shuffles them for each
    listener and adds the hidden reference), and everything has one loudness.

    Args:
        items: trials, of at most 12 s and 10 systems.
        folder: to be put into webMUSHRA's ``configs/``.
        seed: of the order and of the names.
        title: of the test.

    Raises:
        ConfigError: there is nothing, or a trial has more conditions than BS.1534 allows.
    """
    if not items:
        raise ConfigError("a listening test needs recordings")
    crowded = next((item for item in items if len(item.decodes) + 1 + len(ANCHORS) > 12), None)
    if crowded:
        raise ConfigError(
            f"{crowded.name} has {len(crowded.decodes)} systems; BS.1534 allows 12 signals with reference and anchors, "
            "so choose 9 or fewer"
        )
    test, draw = folder.resolve().name, random.Random(seed)
    order = draw.sample(list(items), len(items))
    names = draw.sample(range(1000, 10_000), sum(len(i.decodes) + len(ANCHORS) for i in items))
    pages: list[Any] = []
    key: dict[str, Any] = {"seed": seed, "trials": {}}
    for number, item in enumerate(order, 1):
        trial = f"trial{number:03d}"
        anchors = {name: low_pass(item.original, cutoff) for name, cutoff in ANCHORS.items()}
        conditions = list((anchors | dict(item.decodes)).items())
        draw.shuffle(conditions)
        stimuli, meaning = {}, {}
        waves = {REFERENCE: item.original} | {f"s{names.pop()}": wave for _, wave in conditions}
        prepared = {name: _prepared(wave, item.original) for name, wave in waves.items()}
        # One factor for all, so that a peak in one of them leaves the others as loud as it.
        loudest = max(1.0, *(float(np.abs(wave).max()) / 0.99 for wave in prepared.values()))
        for name, condition in zip(prepared, (REFERENCE, *(c for c, _ in conditions)), strict=True):
            path = folder / "stimuli" / trial / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, torch.from_numpy(prepared[name] / loudest), RATE)
            if condition != REFERENCE:
                stimuli[name] = f"configs/{test}/stimuli/{trial}/{name}.wav"
                meaning[name] = condition
        key["trials"][trial] = {"clip": item.name, "stimuli": meaning}
        pages.append(
            {
                "type": "mushra",
                "id": trial,
                "name": f"Recording {number} of {len(order)}",
                "content": "How good is each signal beside the reference?  One of them is the reference itself.",
                "showWaveform": True,
                "enableLooping": True,
                "reference": f"configs/{test}/stimuli/{trial}/{REFERENCE}.wav",
                "createAnchor35": False,
                "createAnchor70": False,
                "stimuli": stimuli,
            }
        )
    welcome = {
        "type": "generic",
        "id": "welcome",
        "name": title,
        "content": "Please wear headphones in a quiet room, set a comfortable level and leave it there.",
    }
    finish = {
        "type": "finish",
        "name": "Thank you",
        "content": "Please send your answers.",
        "showResults": False,
        "writeResults": True,
        "questionnaire": [{"type": "text", "label": "Your initials", "name": "listener"}],
    }
    config = {
        "testname": title,
        "testId": test,
        "bufferSize": 2048,
        "stopOnErrors": True,
        "showButtonPreviousPage": True,
        "remoteService": "service/write.php",
        "pages": [welcome, *pages, finish],
    }
    # JSON is YAML
    (folder / "config.yaml").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "key.json").write_text(json.dumps(key, indent=1) + "\n")


def _prepared(wave: Samples, original: Samples) -> NDArray[np.float32]:
    """Bring a stimulus to the common loudness, length and rate, with 5 ms of fade at both ends."""
    wave = align(original, wave, level=False).wave[: LONGEST * SAMPLE_RATE].copy()
    level = loudness(wave)
    if np.isfinite(level):
        wave *= 10 ** ((LOUDNESS - level) / 20)
    fade = np.linspace(0, 1, min(80, len(wave) // 2))
    wave[: len(fade)] *= fade
    wave[len(wave) - len(fade) :] *= fade[::-1]
    result: NDArray[np.float32] = resample(torch.from_numpy(wave), SAMPLE_RATE, RATE).numpy()
    return result


@dataclass(frozen=True)
class Verdict:
    """What listeners said.

    Args:
        means: condition -> mean over clips and listeners, with its interval over listeners (over trials, of one alone).
        comparisons: pairs of conditions, on (listener, trial).
        kept: listeners whose answers count.
        excluded: listener -> why theirs do not.
    """

    means: dict[str, Interval]
    comparisons: list[Comparison]
    kept: list[str]
    excluded: dict[str, str]


def analyse(answers: Path, key: Path, *, listener: str = "listener") -> Verdict:
    """Read webMUSHRA's ``mushra.csv`` and the key of the export.

    Listeners are left out, as BS.1534-3 says, who rate the hidden reference below 90, or the mid anchor above 90, in
    more than 15 % of their trials.

    Args:
        answers: the CSV that webMUSHRA's service wrote.
        key: ``key.json`` of :func:`export`.
        listener: column that tells listeners apart.

    Raises:
        ConfigError: a column is missing, or a trial or stimulus is not in the key.
    """
    trials = json.loads(key.read_text())["trials"]
    with answers.open(newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {listener, "trial_id", "rating_stimulus", "rating_score"}
    if not rows or not needed <= rows[0].keys():
        raise ConfigError(f"{answers} needs the columns {', '.join(sorted(needed))}; pass the listener's as listener")
    ratings: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        trial, stimulus = row["trial_id"], row["rating_stimulus"]
        meaning = trials.get(trial, {}).get("stimuli", {})
        if stimulus != REFERENCE and stimulus not in meaning:
            raise ConfigError(f"{answers}: {stimulus} of {trial} is not in {key}")
        condition = REFERENCE if stimulus == REFERENCE else meaning[stimulus]
        # Two people may have the same initials, and nobody has to give any.
        who = " ".join(filter(None, (row[listener], row.get("session_uuid"))))
        ratings.setdefault(who, {}).setdefault(trial, {})[condition] = float(row["rating_score"])

    excluded = _screened(ratings)
    scores: dict[str, dict[str, float]] = {}
    for who, theirs in ratings.items():
        if who not in excluded:
            for trial, given in theirs.items():
                for condition, score in given.items():
                    scores.setdefault(condition, {})[f"{who}/{trial}"] = score
    means = {c: mean for c, found in scores.items() if (mean := interval(_by_listener(found)))}
    means = dict(sorted(means.items(), key=lambda pair: -pair[1].mean))
    kept = [who for who in ratings if who not in excluded]
    return Verdict(means, paired({condition: scores[condition] for condition in means}), kept, excluded)


def _by_listener(scores: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return each listener's mean and number of scores: their own scores are no independent ones."""
    own: dict[str, list[float]] = {}
    for name, score in scores.items():
        own.setdefault(name.rpartition("/")[0], []).append(score)
    if len(own) == 1:
        return [(score, 1.0) for score in scores.values()]
    return [(sum(found) / len(found), float(len(found))) for found in own.values()]


def _screened(ratings: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, str]:
    """Return listener -> why their answers do not count."""
    excluded = {}
    for who, theirs in ratings.items():
        low = sum(scores.get(REFERENCE, 100) < 90 for scores in theirs.values()) / len(theirs)
        high = sum(scores.get("anchor70", 0) > 90 for scores in theirs.values()) / len(theirs)
        if low > 0.15:
            excluded[who] = f"rated the hidden reference below 90 in {low:.0%} of the trials"
        elif high > 0.15:
            excluded[who] = f"rated the 7 kHz anchor above 90 in {high:.0%} of the trials"
    return excluded
