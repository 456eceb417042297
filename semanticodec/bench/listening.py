"""Listening tests in the manner of MUSHRA (ITU-R BS.1534-3): export for webMUSHRA, and analysis of its answers."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
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
from .folders import emptied, is_ours
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
    """Remove what lies above ``cutoff`` Hz, with the steep filter that BS.1534 asks for (over 40 dB within 500 Hz).

    Args:
        wave: ``[S]`` at 16 kHz.
        cutoff: in Hz.

    Returns:
        ``[S]``, not delayed.
    """
    from scipy.signal import firwin, oaconvolve

    taps = firwin(511, cutoff, fs=SAMPLE_RATE, window=("kaiser", 8.0))
    result: Samples = oaconvolve(wave, taps, "same")
    return result


def key_of(folder: Path) -> Path:
    """Return where the key of an export lies, if nobody says otherwise: beside its folder.

    Args:
        folder: of the export.
    """
    folder = folder.resolve()
    return folder.with_name(f"{folder.name}-key.json")


def export(
    items: Sequence[Item], folder: Path, key: Path | None = None, *, seed: int = 0, title: str = "Audio quality"
) -> Path:
    """Write stimuli and ``config.yaml`` for webMUSHRA, and the key that says which stimulus is what.

    Trials come in an order drawn from the seed, stimuli have names that tell nothing (webMUSHRA shuffles them for each
    listener and adds the hidden reference), and everything has one loudness.  The names are drawn anew for each test,
    clips and systems, so that no answers fit another test's key.  The folder is published to listeners, so that the key
    may not lie in it.  What an earlier export put there goes.

    Args:
        items: trials, of at most 12 s and 9 systems.
        folder: to be put into webMUSHRA's ``configs/``.
        key: file to write; beside the folder if not given.
        seed: of the order and of the names.
        title: of the test.

    Returns:
        the key's path.

    Raises:
        ConfigError: there is nothing; a trial has more conditions than BS.1534 allows; the folder holds something of
            somebody else; or listeners could read the key.
    """
    if not items:
        raise ConfigError("a listening test needs recordings")
    crowded = next((item for item in items if len(item.decodes) + 1 + len(ANCHORS) > 12), None)
    if crowded:
        raise ConfigError(
            f"{crowded.name} has {len(crowded.decodes)} systems; BS.1534 allows 12 signals with reference and anchors, "
            "so choose 9 or fewer"
        )
    secret = (key or key_of(folder)).resolve()
    published = [folder.resolve(), *(path for path in folder.resolve().parents if path.name == "configs")]
    if any(secret.is_relative_to(path) for path in published):
        raise ConfigError(f"listeners could read the key at {secret}; give it another place (--key)")
    if secret.exists() and not is_ours(folder):
        raise ConfigError(
            f"{secret} is there, and may be needed for another test's answers; give the key another place"
        )
    emptied(folder)
    test = folder.resolve().name
    draw = random.Random(json.dumps([seed, test, [[item.name, *item.decodes] for item in items]]))
    order = draw.sample(list(items), len(items))
    names = draw.sample(range(1000, 10_000), sum(len(i.decodes) + len(ANCHORS) for i in items))
    pages: list[Any] = []
    meanings: dict[str, Any] = {"testId": test, "seed": seed, "trials": {}}
    for number, item in enumerate(order, 1):
        trial = f"trial{number:03d}"
        anchors = {name: low_pass(item.original, cutoff) for name, cutoff in ANCHORS.items()}
        conditions = list((anchors | dict(item.decodes)).items())
        draw.shuffle(conditions)
        meaning = {f"s{names.pop()}": name for name, _ in conditions}
        _write_stimuli(folder / "stimuli" / trial, item, dict(zip(meaning, (w for _, w in conditions), strict=True)))
        meanings["trials"][trial] = {"clip": item.name, "stimuli": meaning}
        place = f"configs/{test}/stimuli/{trial}"
        pages.append(_page(trial, f"Recording {number} of {len(order)}", place, meaning))
    # JSON is YAML
    (folder / "config.yaml").write_text(json.dumps(_config(test, title, pages), indent=1) + "\n")
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_text(json.dumps(meanings, indent=1) + "\n")
    return secret


def _write_stimuli(folder: Path, item: Item, waves: Mapping[str, Samples]) -> None:
    """Write the reference and what is compared with it, by their names."""
    heard = {REFERENCE: item.original, **waves}
    prepared = {name: _prepared(wave, item.original) for name, wave in heard.items()}
    # One factor for all, so that a peak in one of them leaves the others as loud as it.
    loudest = max(1.0, *(float(np.abs(wave).max()) / 0.99 for wave in prepared.values()))
    folder.mkdir(parents=True)
    for name, wave in prepared.items():
        save(folder / f"{name}.wav", torch.from_numpy(wave / loudest), RATE)


def _page(trial: str, title: str, place: str, names: Iterable[str]) -> dict[str, Any]:
    """Return the page of a trial whose stimuli lie in ``place``."""
    return {
        "type": "mushra",
        "id": trial,
        "name": title,
        "content": "How good is each signal beside the reference?  One of them is the reference itself.",
        "showWaveform": True,
        "enableLooping": True,
        "reference": f"{place}/{REFERENCE}.wav",
        "createAnchor35": False,
        "createAnchor70": False,
        "randomize": True,
        "showConditionNames": False,
        "stimuli": {name: f"{place}/{name}.wav" for name in names},
    }


def _config(test: str, title: str, pages: Sequence[Any]) -> dict[str, Any]:
    """Return webMUSHRA's configuration: the trials between a greeting and a form for the listener's name."""
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
    return {
        "testname": title,
        "testId": test,
        "bufferSize": 2048,
        "stopOnErrors": True,
        "showButtonPreviousPage": True,
        "remoteService": "service/write.php",
        "pages": [welcome, *pages, finish],
    }


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
        means: condition -> mean over trials and listeners; its interval is over listeners (over trials, of one alone).
        comparisons: pairs of systems and of these with the reference, on the same listeners' means (on trials, of one
            alone).
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
    more than 15 % of their trials.  A trial whose mid anchor more than 25 % of the listeners rate above 90 leaves
    nobody out on that ground: there was little to take away from it.

    Args:
        answers: the CSV that webMUSHRA's service wrote.
        key: that :func:`export` wrote.
        listener: column that tells listeners apart; who sends a second set of answers under one name is another.

    Raises:
        ConfigError: a column is missing, a score is none, the answers are another test's, or a trial or stimulus is not
            in the key.
    """
    ratings = _read(answers, key, listener)
    excluded = _screened(ratings)
    kept = {who: theirs for who, theirs in ratings.items() if who not in excluded}
    scores: dict[str, dict[str, list[float]]] = {}
    for who, theirs in kept.items():
        for trial, given in theirs.items():
            for condition, score in given.items():
                # A listener's own scores are not independent of each other, so that the listener is what counts.
                scores.setdefault(condition, {}).setdefault(who if len(kept) > 1 else trial, []).append(score)
    own = {condition: {who: sum(s) / len(s) for who, s in found.items()} for condition, found in scores.items()}
    means = {
        condition: mean
        for condition, found in own.items()
        if (mean := interval([(value, float(len(scores[condition][who]))) for who, value in found.items()]))
    }
    means = dict(sorted(means.items(), key=lambda pair: -pair[1].mean))
    # Nobody asks whether anchors differ, and more pairs would make every test blunter.
    unit = "listeners" if len(kept) > 1 else "trials"
    pairs = paired({condition: own[condition] for condition in means if condition not in ANCHORS}, unit)
    return Verdict(means, pairs, list(kept), excluded)


Ratings = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Listener -> trial -> condition -> score."""


def _read(answers: Path, key: Path, listener: str) -> Ratings:
    """Read answers and put conditions in place of the names of stimuli."""
    try:
        meanings = json.loads(key.read_text())
        test, trials = meanings["testId"], {trial: it["stimuli"] for trial, it in meanings["trials"].items()}
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(f"{key} is no key of `semanticodec bench listen`: {error}") from error
    try:
        with answers.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{answers} is no CSV file in UTF-8: {error}") from error
    needed = {listener, "session_test_id", "trial_id", "rating_stimulus", "rating_score"}
    if not rows or not needed <= rows[0].keys():
        raise ConfigError(
            f"{answers} needs the columns {', '.join(sorted(needed))}; say with --listener if listeners are in another"
        )
    ratings: dict[str, dict[str, dict[str, float]]] = {}
    sittings: dict[str, int] = {}
    for number, row in enumerate(rows, 2):
        trial, stimulus = row["trial_id"], row["rating_stimulus"]
        if row["session_test_id"] != test:
            raise ConfigError(f"{answers}, row {number}: of the test {row['session_test_id']!r}, {key} of {test!r}")
        if trial not in trials or stimulus not in (REFERENCE, *trials[trial]):
            raise ConfigError(f"{answers}, row {number}: {stimulus} of {trial} is not in {key}")
        condition = REFERENCE if stimulus == REFERENCE else trials[trial][stimulus]
        try:
            score = float(row["rating_score"])
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= 100:
            raise ConfigError(f"{answers}, row {number}: the score is {row['rating_score']!r}; wanted is 0 to 100")
        # Two people may have the same initials, and older versions tell sittings apart by nothing else.
        name = " ".join(filter(None, (row[listener], row.get("session_uuid"))))
        sitting = sittings.setdefault(name, 1)
        if condition in ratings.get(_sitting(name, sitting), {}).get(trial, {}):
            sittings[name] = sitting = sitting + 1
        ratings.setdefault(_sitting(name, sitting), {}).setdefault(trial, {})[condition] = score
    return ratings


def _sitting(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def _screened(ratings: Ratings) -> dict[str, str]:
    """Return listener -> why their answers do not count."""

    def loud(scores: Mapping[str, float]) -> bool:
        return scores.get("anchor70", 0) > 90

    trials = {trial for theirs in ratings.values() for trial in theirs}
    heard = {trial: [loud(theirs[trial]) for theirs in ratings.values() if trial in theirs] for trial in trials}
    telling = {trial for trial, found in heard.items() if sum(found) <= 0.25 * len(found)}
    excluded = {}
    for who, theirs in ratings.items():
        low = sum(scores.get(REFERENCE, 100) < 90 for scores in theirs.values()) / len(theirs)
        high = sum(loud(scores) for trial, scores in theirs.items() if trial in telling) / len(theirs)
        if low > 0.15:
            excluded[who] = f"rated the hidden reference below 90 in {low:.0%} of the trials"
        elif high > 0.15:
            excluded[who] = f"rated the 7 kHz anchor above 90 in {high:.0%} of the trials"
    return excluded
