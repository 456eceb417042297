"""The bench's measures: degradations order correctly, delay and level cost nothing, published values come out."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from semanticodec.audio import load, resample
from semanticodec.bench.align import Delay, align, bandwidth, chosen, delays_of, find_delay, loudness
from semanticodec.bench.clips import Clip, find, thin
from semanticodec.bench.codecs import gross_bits
from semanticodec.bench.listening import low_pass
from semanticodec.bench.metrics import METRICS
from semanticodec.bench.payloads import adts_payload, ogg_packets
from semanticodec.bench.probe import bag, probe, use
from semanticodec.bench.results import Results
from semanticodec.bench.sounds import Sound
from semanticodec.bench.statistics import Comparison, holm, interval, paired
from semanticodec.config import SAMPLE_RATE
from semanticodec.errors import AudioError

QUICK = ("pesq_wb", "pesq_nb", "stoi", "estoi", "visqol", "visqol_speech", "mel_l1", "stft", "lsd", "speaker")
SLOW = ("voicing", "dwer")
CUTOFFS = (7000, 3500, 1500, 700)


@pytest.fixture(scope="module")
def voice(root: Path) -> np.ndarray:
    wave, rate = load(root / "semanticodec" / "assets" / "demo.flac")
    return resample(wave.mean(0), rate, SAMPLE_RATE).double().numpy()[: 4 * SAMPLE_RATE]


def ordered(name: str, original: np.ndarray, ladder: list[np.ndarray]) -> list[float]:
    """Return values from the best to the worst rung; they must fall or rise all the way."""
    metric = METRICS[name]
    found = [metric.value(Sound(original), Sound(rung)) for rung in ladder]
    values = [value[0] for value in found if value is not None]
    assert len(values) == len(ladder)
    return values if metric.better == "low" else [-value for value in values]


def noise_ladder(wave: np.ndarray) -> list[np.ndarray]:
    noise = np.random.default_rng(0).standard_normal(len(wave)) * np.sqrt((wave**2).mean())
    return [wave + noise * 10 ** (-snr / 20) for snr in (40, 25, 10, -5)]


@pytest.mark.parametrize("name", QUICK)
def test_more_noise_is_worse(name: str, voice: np.ndarray):
    values = ordered(name, voice, noise_ladder(voice))
    assert values == sorted(values)
    assert values[-1] > values[0]


@pytest.mark.parametrize("name", [name for name in QUICK if name != "pesq_nb"])
def test_less_band_is_worse(name: str, voice: np.ndarray):
    rungs = CUTOFFS[:-1] if name == "visqol_speech" else CUTOFFS  # below 1.5 kHz all is equally bad to it
    values = ordered(name, voice, [low_pass(voice, cutoff) for cutoff in rungs])
    assert values == sorted(values)
    assert values[-1] > values[0]


@pytest.mark.parametrize("name", ["f0", "voicing"])
def test_pitch_needs_no_band(name: str, voice: np.ndarray):
    for value in ordered(name, voice, [low_pass(voice, cutoff) for cutoff in CUTOFFS]):
        assert value < 3  # cents, or percent of the frames


def told(metric: str, truth: str, heard: str) -> tuple[float, float] | None:
    """Return the word errors where the recogniser hears what it is told to."""
    original, decoded = Sound(np.zeros(1), truth), Sound(np.zeros(1))
    vars(original)["words"], vars(decoded)["words"] = truth, heard  # in the place of what is heard once
    return METRICS[metric].value(original, decoded)


@pytest.mark.parametrize("name", ["wer", "dwer"])
def test_wrong_words_are_counted(name: str):
    assert told(name, "one two three four", "one two three four") == (0, 4)
    assert told(name, "one two three four", "one too four") == (50, 4)
    assert told(name, "one two", "and one and two and") == (150, 2)
    assert told(name, "one two", "") == (100, 2)
    assert told(name, "", "one two") is None
    assert told(name, " - ... ' ", "one two") is None


@pytest.mark.parametrize("name", ["wer", "dwer"])
@pytest.mark.parametrize(
    ("truth", "heard", "words"),
    [
        ("Hello, world. It's Mr. O'Neil!", "hello world it's mr o'neil", 5),
        (
            "\u201cIt\u2019s well-known\u2009\u2014\tthe \u2018dogs\u2019 bark\u2026\u201d",
            "it's well known the dogs bark",
            6,
        ),
        ("(Rock 'n' roll)\n\n& ''more''?", "rock n roll more", 4),
        ("Cafe\u0301 STRA\u00dfE", "caf\u00e9 stra\u00dfe", 2),
        (
            "\u0928\u092e\u0938\u094d\u0924\u0947 \u0964",
            "\u0928\u092e\u0938\u094d\u0924\u0947",
            1,
        ),  # its vowels are marks
    ],
)
def test_what_is_not_spoken_is_no_error(name: str, truth: str, heard: str, words: int):
    assert told(name, truth, heard) == (0, words)
    assert told(name, truth, f"{heard} more") == (pytest.approx(100 / words), words)


def test_apostrophes_tell_words_apart():
    assert told("wer", "it's", "its") == (100, 1)
    assert told("wer", "we'll go", "well go") == (50, 2)


def test_what_is_heard_is_compared_with_the_transcript(voice: np.ndarray):
    clip = voice[:40_000]
    heard = Sound(clip).words.split()
    assert len(heard) > 3
    said = Sound(clip, f"\u201c{', '.join(heard).upper()}!\u201d")
    assert METRICS["wer"].value(said, Sound(clip)) == (0, len(heard))
    longer = Sound(clip, " ".join([*heard, "zebra"]))
    assert METRICS["wer"].value(longer, Sound(clip)) == (pytest.approx(100 / (len(heard) + 1)), len(heard) + 1)


@pytest.mark.parametrize("name", ["f0_share"])
def test_pitch_that_is_lost_is_told(name: str, voice: np.ndarray):
    """What F0 error leaves out, and so speaks well of, this does not."""
    original, metric = Sound(voice), METRICS[name]
    voiced = float(original.pitch[1].sum())
    half = Sound(np.where(np.arange(len(voice)) < len(voice) // 2, voice, 0))
    first = original.pitch[1][: len(original.pitch[1]) // 2].sum()
    assert metric.value(original, original) == (100, voiced)
    assert metric.value(original, half) == (pytest.approx(100 * first / voiced, abs=3), voiced)
    error = METRICS["f0"].value(original, half)
    assert error is not None
    assert error[0] < 1
    noise = Sound(np.random.default_rng(0).standard_normal(len(voice)) * 0.1)
    lost = metric.value(original, noise)
    assert lost is not None
    assert lost[0] < 5
    assert METRICS["f0"].value(original, Sound(0 * voice)) is None
    assert metric.value(original, Sound(0 * voice)) == (0, voiced)
    assert metric.value(Sound(0 * voice), original) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_slow_metrics_order_noise(name: str, voice: np.ndarray):
    values = ordered(name, voice, [voice, *noise_ladder(voice)[1:]])
    if name != "voicing":  # of a little noise pYIN may make more voiced frames or fewer
        assert values == sorted(values)
    assert values[-1] > values[0]


@pytest.mark.slow
def test_words_are_lost_with_the_band(voice: np.ndarray):
    values = ordered("dwer", voice, [low_pass(voice, cutoff) for cutoff in CUTOFFS])
    assert values == sorted(values)
    assert values[-1] > values[0]


def test_words_do_not_depend_on_what_was_heard_before(voice: np.ndarray):
    noise = np.random.default_rng(0).standard_normal(40_000)
    plain, other = voice[:40_000], voice[:40_000] + 0.03 * noise
    first = Sound(plain).words
    assert Sound(other).words != first
    assert Sound(plain.copy()).words == first


@pytest.mark.slow
@pytest.mark.parametrize("hertz", [120, 123, 130, 160])
def test_errors_of_pitch_are_found(hertz: int):
    seconds = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    low, high = (sum(np.sin(2 * np.pi * f0 * k * seconds) / k for k in range(1, 20)) for f0 in (120, hertz))
    found = METRICS["f0"].value(Sound(low), Sound(high))
    assert found is not None
    assert found[0] == pytest.approx(1200 * np.log2(hertz / 120), abs=15)  # pYIN's grid is 20 cents


def test_every_metric_is_tested():
    """Of each there is a test here, in every run, that takes its name."""
    named = set()
    for test in [value for name, value in globals().items() if name.startswith("test_")]:
        marks = getattr(test, "pytestmark", [])
        if not any(mark.name == "slow" for mark in marks):
            named |= {
                name for mark in marks if mark.name == "parametrize" and mark.args[0] == "name" for name in mark.args[1]
            }
    assert named == set(METRICS)


@pytest.mark.parametrize("name", ["mel_l1", "stft", "lsd"])
def test_nothing_is_lost_on_the_original(name: str, voice: np.ndarray):
    assert METRICS[name].value(Sound(voice), Sound(voice)) == (0.0, 1.0)


def test_silence_has_no_intelligibility(voice: np.ndarray):
    for name in ("pesq_wb", "stoi"):
        assert METRICS[name].value(Sound(np.zeros_like(voice)), Sound(voice)) is None


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("samples", [1, 3200])
def test_clips_that_are_too_short_are_no_error(name: str, samples: int, voice: np.ndarray):
    clip = voice[8000 : 8000 + samples]
    found = METRICS[name].value(Sound(clip), Sound(0.9 * clip))
    assert (found is None) == (name.startswith(("pesq", "stoi", "estoi", "visqol")))


@pytest.mark.parametrize("name", [*QUICK, "f0_share", "voicing"])
def test_silence_is_no_way_out(name: str, voice: np.ndarray):
    metric, original = METRICS[name], Sound(voice)
    silent, noisy = (metric.value(original, Sound(decoded)) for decoded in (0 * voice, noise_ladder(voice)[0]))
    assert silent is not None
    assert noisy is not None
    assert silent[0] > noisy[0] if metric.better == "low" else silent[0] < noisy[0]


@pytest.mark.parametrize("name", ["pesq_wb", "pesq_nb", "visqol_speech"])
def test_silence_may_decode_to_anything(name: str, voice: np.ndarray):
    for decoded in (0 * voice, voice):
        assert METRICS[name].value(Sound(0 * voice), Sound(decoded)) is None


@pytest.mark.parametrize("late", [4800, 6320, 15_000])
def test_long_delays_are_found(late: int, voice: np.ndarray):
    assert find_delay(voice, np.pad(voice, (late, 0))) == Delay(late)


def test_a_delay_beyond_the_search_is_not_made_up(voice: np.ndarray):
    tone = np.sin(np.arange(len(voice)) / 1e4)  # its correlation still rises at the edge
    assert find_delay(tone, np.pad(tone, (20_000, 0))) != Delay(SAMPLE_RATE)
    assert find_delay(voice[:100], voice[:100]) is None


@pytest.mark.parametrize("late", [-431, 0, 777])
@pytest.mark.parametrize("gain", [-9.0, 4.0])
def test_delay_and_level_are_not_punished(late: int, gain: float, voice: np.ndarray):
    decoded = (np.pad(voice, (late, 0)) if late >= 0 else voice[-late:]) * 10 ** (gain / 20)
    delay = find_delay(voice, decoded)
    assert delay == Delay(late)
    aligned = align(voice, decoded, delay=delay.samples)
    assert aligned.gain == pytest.approx(-gain, abs=0.3)
    inner = slice(500, -1000)
    assert np.abs(aligned.wave - voice)[inner].max() < 0.04 * np.abs(voice).max()
    as_it_is = align(voice, decoded, level=False)
    assert as_it_is.gain == 0
    assert len(as_it_is.wave) == len(voice)


def test_silence_is_not_levelled(voice: np.ndarray):
    assert align(0 * voice, voice).gain == 0
    assert align(voice, 0 * voice).gain == 0
    assert align(voice, 1e-2 * voice).gain == pytest.approx(20)


def test_a_vocoder_with_phases_of_its_own_is_aligned(voice: np.ndarray):
    spectrum = torch.stft(
        torch.from_numpy(voice), 1024, 256, window=torch.hann_window(1024, dtype=torch.float64), return_complex=True
    )
    turned = torch.polar(
        spectrum.abs(), 6.28 * torch.rand(spectrum.shape, generator=torch.Generator().manual_seed(0)).double()
    )
    made_up = torch.istft(turned, 1024, 256, window=torch.hann_window(1024, dtype=torch.float64), length=len(voice))
    delay = find_delay(voice, np.pad(made_up.numpy(), (800, 0)))
    assert delay is not None
    assert not delay.exact
    assert abs(delay.samples - 800) <= 160  # 10 ms: the frames that lost their phase are 64 ms long
    assert find_delay(voice, np.pad(made_up.numpy(), (48, 0))) == Delay(0, exact=False)  # within its noise


def test_a_codec_has_one_delay(voice: np.ndarray):
    heard = [Delay(n, exact=False) for n in (320, 304, 368, -2000, 336)]
    assert delays_of([*heard, None, Delay(400)]) == [320]
    assert chosen([320], Delay(7)) == chosen([320], heard[3]) == chosen([320], None) == 320
    assert delays_of([Delay(64)] * 5 + [Delay(0, exact=False)] * 5) == [64]  # envelopes that say nothing
    assert delays_of([Delay(160)]) == [160]
    assert delays_of([None]) == []
    assert delays_of([Delay(2192, exact=False), Delay(480, exact=False), Delay(10_256, exact=False)]) == []  # a guess
    assert delays_of([Delay(160), Delay(0)]) == []
    assert chosen([], None) == chosen([], Delay(7)) == 0
    noise = np.random.default_rng(1).standard_normal(len(voice))
    assert find_delay(voice, noise) is None


def test_a_program_that_cuts_some_files_has_two_delays():
    told = [*map(Delay, (160, 159, 0, 160, -4, 156, 480)), Delay(64, exact=False), None]
    delays = delays_of(told)
    assert delays == [159, -4]  # and not between them; 480 is told by one clip alone
    assert [chosen(delays, one) for one in told] == [159, 159, -4, 159, -4, 159, 159, 159, 159]


def test_loudness_is_that_of_the_standard():
    tone = np.sin(2 * np.pi * 997 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    assert loudness(tone) == pytest.approx(-3.01, abs=0.15)  # BS.1770: a full-scale sine of 997 Hz in one channel
    assert loudness(np.zeros(100)) == -math.inf


@pytest.mark.parametrize("cutoff", [1500, 3500, 6000])
def test_band_is_noted(cutoff: int):
    noise = np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE)
    assert bandwidth(noise, low_pass(noise, cutoff)) == pytest.approx(cutoff, abs=250)
    assert bandwidth(noise, noise) == 8000


@pytest.mark.parametrize("gain", [-10.0, -20.0])
def test_rounding_noise_is_no_band(gain: float, voice: np.ndarray):
    quiet = voice * 10 ** (gain / 20)
    rounded = np.round(low_pass(quiet, 3500) * 32768) / 32768
    assert bandwidth(quiet, rounded) == pytest.approx(3500, abs=500)
    assert bandwidth(quiet, quiet) >= 7500


def test_silence_has_no_band(voice: np.ndarray):
    assert bandwidth(0 * voice, voice) is None
    assert bandwidth(voice, 0 * voice) == 0


def test_intervals_cover_and_weigh():
    data = np.random.default_rng(0).standard_normal(400) + 5
    found = interval([(value, 1.0) for value in data])
    assert found is not None
    assert found.low < data.mean() < found.high
    assert found.high - found.low == pytest.approx(4 / 20, rel=0.2)
    weighted = interval([(0.0, 3.0), (1.0, 1.0)])
    assert weighted is not None
    assert weighted.mean == 0.25
    assert interval([]) is None


def test_clips_of_one_speaker_are_drawn_together():
    """Eight clips each of forty speakers who differ: the mean is as uncertain as that of forty, not of 320, clips."""
    speakers = np.random.default_rng(0).standard_normal(40)
    values = [(float(value), 1.0) for value in speakers.repeat(8)]
    groups = [f"speaker {n}" for n in range(40) for _ in range(8)]
    apart, together = interval(values), interval(values, groups)
    assert apart is not None
    assert together is not None
    assert (together.mean, together.clips, together.groups, apart.groups) == (apart.mean, 320, 40, 320)
    assert together.high - together.low == pytest.approx(4 / 40**0.5, rel=0.25)
    assert (together.high - together.low) / (apart.high - apart.low) == pytest.approx(8**0.5, rel=0.2)
    alone = interval(values, groups[:1] * 320)  # of one speaker nothing else can be told
    assert alone is not None
    assert (alone.low, alone.high, alone.groups) == (apart.low, apart.high, 1)
    heavy = interval([(0.0, 1.0), (0.0, 5.0), (1.0, 2.0)], ["a", "a", "b"])
    assert heavy is not None
    assert (heavy.mean, heavy.low, heavy.high) == (0.25, 0.0, 1.0)


def test_differences_are_drawn_by_groups():
    rng = np.random.default_rng(0)
    clips = [f"c{n}" for n in range(80)]
    first = dict.fromkeys(clips, 0.0)
    second = dict(zip(clips, map(float, rng.standard_normal(10).repeat(8)), strict=True))
    (apart,) = paired({"first": first, "second": second})
    (together,) = paired({"first": first, "second": second}, groups={clip: f"{n // 8}" for n, clip in enumerate(clips)})
    assert together.difference == apart.difference
    assert together.p == apart.p
    assert together.high - together.low > 2 * (apart.high - apart.low)


def test_differences_are_those_of_the_weighted_means():
    """One long clip outweighs three short ones, whose direction a count of clips would have."""
    names = ("a", "b", "c", "d")
    first = {"a": (10.0, 100.0), "b": (2.0, 1.0), "c": (2.0, 1.0), "d": (2.0, 2.0)}
    second = {"a": (7.0, 90.0), "b": (4.0, 1.0), "c": (4.0, 3.0), "d": (4.0, 1.0)}
    results = Results(
        title="",
        machine={},
        settings={},
        clips={name: {"kind": "speech", "group": name} for name in names},
        systems={"first": {}, "second": {}},
        values={
            system: {"f0": {clip: list(pair) for clip, pair in clips.items()}}
            for system, clips in (("first", first), ("second", second))
        },
    )
    (pair,) = results.compare("f0")
    means = [results.mean(system, "f0") for system in ("first", "second")]
    assert means[0]
    assert means[1]
    assert pair.difference == pytest.approx(means[0].mean - means[1].mean)
    assert pair.difference > 2.5
    assert (pair.low, pair.high) == (pytest.approx(-2), pytest.approx(3, abs=0.05))  # without the long one; alone
    plain = {name: {clip: value for clip, (value, _) in one.items()} for name, one in (("f", first), ("s", second))}
    (unweighted,) = paired(plain)
    assert unweighted.difference == pytest.approx(-0.75)


def test_weights_leave_the_test_on_clips_alone():
    rng = np.random.default_rng(0)
    clips = [f"c{n}" for n in range(30)]
    scores = {name: dict(zip(clips, map(float, rng.standard_normal(30)), strict=True)) for name in "ab"}
    heavy = {name: dict(zip(clips, map(float, rng.integers(1, 50, 30)), strict=True)) for name in "ab"}
    (plain,), (even,), (weighted,) = (
        paired(scores, weights=weights) for weights in (None, {n: dict.fromkeys(clips, 7.0) for n in "ab"}, heavy)
    )
    assert plain.p == even.p == weighted.p
    for mine, theirs in ((plain.difference, even.difference), (plain.low, even.low), (plain.high, even.high)):
        assert mine == pytest.approx(theirs)
    # Means of the same draws: a constant difference has no spread, whatever the weights.
    (shifted,) = paired(
        {"a": scores["a"], "b": {clip: value + 1 for clip, value in scores["a"].items()}},
        weights={"a": heavy["a"], "b": heavy["a"]},
    )
    assert (shifted.difference, shifted.low, shifted.high) == (pytest.approx(-1),) * 3


def test_pairs_are_tested_together():
    rng = np.random.default_rng(0)
    base = {f"c{n}": float(v) for n, v in enumerate(rng.standard_normal(20))}
    better = {clip: value + 1 + 0.1 * float(rng.standard_normal()) for clip, value in base.items()}
    same = {clip: value + 0.1 * float(rng.standard_normal()) for clip, value in base.items()}
    found = {(c.first, c.second): c for c in paired({"base": base, "better": better, "same": same})}
    assert found["base", "better"].difference == pytest.approx(-1, abs=0.1)
    better = found["base", "better"]
    assert better.low < better.difference < better.high < 0
    assert better.p is not None
    assert better.p_holm is not None
    assert better.p < better.p_holm < 1e-4
    assert found["base", "same"].verdict == f"{found['base', 'same'].p_holm:.2g}"
    assert float(found["base", "same"].verdict) > 0.05
    assert better.clips == 20


def test_too_few_clips_say_so():
    one = {f"c{n}": float(n) for n in range(8)}
    five = {f"c{n}": n + 0.5 for n in range(5)}
    (few,) = paired({"one": one, "five": five})
    assert (few.p, few.p_holm, few.clips, few.difference) == (None, None, 5, -0.5)
    assert few.verdict == "not tested: 5 clips cannot reach p < 0.05 among 1 pair"
    (six,) = paired({"one": one, "six": five | {"c5": 5.25}})
    assert six.p == pytest.approx(2 / 2**6)  # what six pairs can reach at best, and five cannot
    (alike,) = paired({"one": one, "alike": one | {"c0": 1.0}})
    assert alike.verdict == "not tested: 1 of 8 clips that differ cannot reach p < 0.05 among 1 pair"
    assert paired({"one": one, "other": {"d0": 1.0}}) == []


@pytest.mark.parametrize(("systems", "enough"), [(2, 6), (3, 7), (5, 9)])
def test_the_more_pairs_the_more_clips_it_takes(systems: int, enough: int):
    def apart(clips: int) -> list[Comparison]:
        # Always the same system first, and no difference twice: the clearest that so few clips can be.
        return paired({f"s{s}": {f"c{n}": s * (n + 1.0) for n in range(clips)} for s in range(systems)})

    pairs = systems * (systems - 1) // 2
    assert {pair.p for pair in apart(enough - 1)} == {None}
    assert all(f"{enough - 1} clips cannot reach p < 0.05 among {pairs} pair" in p.verdict for p in apart(enough - 1))
    assert {pair.p_holm for pair in apart(enough)} == {pairs * 2.0 ** (1 - enough)}
    assert pairs * 2.0 ** (1 - enough) < 0.05


def test_holm_is_as_published():
    # The example of a textbook: four tests, sorted, times 4, 3, 2, 1, and never falling.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


def test_codebooks_are_counted():
    (a, b) = use([np.array([[0, 0, 1, 1], [3, 3, 3, 3]])], (4, 8))
    assert (a.size, a.used, a.entropy) == (4, 2, 1.0)
    assert (b.size, b.used, b.entropy) == (8, 1, 0.0)
    assert bag(np.array([[0, 1], [1, 1]]), (2, 3)).tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 1, 0])


def test_labels_are_told_from_features_that_tell():
    rng = np.random.default_rng(0)
    labels = {f"c{n}": "ab"[n % 2] for n in range(24)} | {"odd": "c"}
    alone = {"recording": {clip: clip for clip in labels}}
    telling = {c: np.array([label == "a", rng.random()], np.float32) for c, label in labels.items()}
    blind = {c: rng.random(2).astype(np.float32) for c in labels}
    found, none = probe(telling, labels, alone, "letter"), probe(blind, labels, alone, "letter")
    assert found is not None
    assert none is not None
    assert (found.accuracy.mean, found.chance, found.classes, found.groups) == (100, 50, 2, 24)
    assert str(found) == "100 % [100, 100] of 2 (chance 50; by recording, 24 of them)"
    assert none.accuracy.mean < 80
    assert none.accuracy.low < 50 < none.accuracy.high
    assert probe({"c0": telling["c0"]}, labels, alone, "letter") is None


def test_recordings_are_not_told_by_their_other_half():
    """Each recording has a sound of its own and a label by chance: pieces of it would give the label away."""
    rng = np.random.default_rng(0)
    own = rng.standard_normal((30, 20))
    clips = [f"r{n}-{piece}" for n in range(30) for piece in range(6)]
    labels = {clip: "ab"[int(clip[1:].partition("-")[0]) * 7 % 30 % 2] for clip in clips}
    features = {
        clip: (own[int(clip[1:].partition("-")[0])] + 0.01 * rng.standard_normal(20)).astype(np.float32)
        for clip in clips
    }
    leaky = probe(features, labels, {"clip": {clip: clip for clip in clips}}, "letter")
    honest = probe(features, labels, {"recording": {clip: clip.partition("-")[0] for clip in clips}}, "letter")
    assert leaky is not None
    assert honest is not None
    assert leaky.accuracy.mean > 85
    assert honest.accuracy.mean < 65
    assert honest.groups == 30
    # Clips of a recording are no independent ones, and the interval knows.
    assert honest.accuracy.high - honest.accuracy.low > 2 * (leaky.accuracy.high - leaky.accuracy.low)


def test_groups_are_as_coarse_as_labels_allow():
    clips = [f"c{n}" for n in range(48)]
    features = {clip: np.array([n % 3, n], np.float32) for n, clip in enumerate(clips)}
    origins = {
        "source": {clip: f"s{n // 6}" for n, clip in enumerate(clips)},
        "recording": {clip: f"r{n // 2}" for n, clip in enumerate(clips)},
    }
    every = probe(features, {clip: "abc"[n % 3] for n, clip in enumerate(clips)}, origins, "everywhere")
    assert every is not None
    assert (every.level, every.groups, every.classes) == ("source", 8, 3)
    apart = probe(features, {clip: "ab"[n // 24] for n, clip in enumerate(clips)}, origins, "by halves")
    assert apart is not None
    assert (apart.level, apart.groups) == ("source", 8)
    rare = probe(features, {clip: "abc"[n // 16] for n, clip in enumerate(clips)}, origins, "of few sources")
    assert rare is not None
    assert (rare.level, rare.groups, rare.classes) == ("recording", 24, 3)
    assert probe(features, {clip: f"speaker{n // 2}" for n, clip in enumerate(clips)}, origins, "one each") is None


def test_framing_is_that_of_the_session_protocol():
    # 50 bytes per block of 0.32 s: the README's 1.55 kbit/s for mini-100 in messages of one block each
    assert gross_bits(1250 * 32, 32, 0.32) / 32 == pytest.approx(1550, abs=5)
    assert gross_bits(1250 * 32, 32, 1.28) < gross_bits(1250 * 32, 32, 0.32)


def test_ogg_packets_are_found_in_pages():
    def page(*packets: int) -> bytes:
        lacing = b"".join(bytes([255] * (size // 255) + [size % 255]) for size in packets)
        return b"OggS" + bytes(22) + bytes([len(lacing)]) + lacing + bytes(sum(packets))

    packets = ogg_packets(page(19) + page(60) + page(10, 300) + page(255))
    assert [len(packet) for packet in packets] == [19, 60, 10, 300, 255]
    with pytest.raises(AudioError, match="byte 47"):
        ogg_packets(page(19)[:47] + b"XXXX" + bytes(30))


def test_adts_headers_are_not_counted():
    def frame(payload: int) -> bytes:
        length = payload + 7
        return bytes([0xFF, 0xF1, 0, length >> 11, length >> 3 & 255, (length & 7) << 5, 0]) + bytes(payload)

    assert adts_payload(frame(100) + frame(2000)) == 2100
    with pytest.raises(AudioError, match="byte 107"):
        adts_payload(frame(100) + b"no frame")


def test_clips_are_found_and_thinned(root: Path, tmp_path: Path):
    recording = root / "semanticodec" / "assets" / "demo.flac"
    (tmp_path / "music").mkdir()
    shutil.copy(recording, tmp_path / "music" / "a.flac")
    shutil.copy(recording, tmp_path / "b.flac")
    assert [(clip.name, clip.kind) for clip in find(tmp_path)] == [("b", "sound"), ("music/a", "music")]
    (tmp_path / "manifest.csv").write_text("file,kind,text,spk\nmusic/a.flac,music,,x\nb.flac,speech,a word,\n")
    music, speech = find(tmp_path)
    assert (music.kind, music.text, dict(music.labels)) == ("music", None, {"kind": "music", "spk": "x"})
    assert (speech.text, speech.digest) == ("a word", music.digest)
    assert speech.seconds == pytest.approx(len(speech.wave) / SAMPLE_RATE)
    many = [Clip(str(n), kind, Path()) for n in range(6) for kind in ("speech", "music")]
    assert [(c.name, c.kind) for c in thin(many, 3)] == [(n, k) for n in "03" for k in ("speech", "music")]
    (tmp_path / "manifest.csv").write_text("file,kind\nb.flac,noise\n")
    with pytest.raises(AudioError, match="kind is noise"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        (b"file,kind,text\na.flac,speech,one, two\n", r"line 2 of .* has more fields than the 3 columns"),
        (b"file,kind,text\na.flac,speech\n", r"line 2 of .* has fewer fields than the 3 columns"),
        (b"file,kind\n/a.flac,speech\n", "line 2 of .*: wanted is a file in .*, seen is '/a.flac'"),
        (b"file,kind\n../a.flac,speech\n", "line 2 of .*: wanted is a file in .*, seen is '../a.flac'"),
        (b"file,kind\n,speech\n", "line 2 of .*: wanted is a file in .*, seen is ''"),
        (b"file,kind,file\na.flac,speech,b.flac\n", "has columns file, kind, file; .* each once"),
        (b"file,kind\na.flac,speech\xff\n", "is no CSV file in UTF-8"),
        (b"name,kind\na.flac,speech\n", "has columns name, kind; file and kind are needed, each once"),
        (b"", "has columns ; file and kind are needed"),
    ],
)
def test_manifests_that_cannot_be_read_say_why(tmp_path: Path, manifest: bytes, complaint: str):
    (tmp_path / "manifest.csv").write_bytes(manifest)
    with pytest.raises(AudioError, match=complaint):
        find(tmp_path)


def test_folders_above_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "manifest.csv").write_text("file,kind\na.flac,speech\n")
    monkeypatch.chdir(tmp_path / "here")
    assert [clip.path for clip in find(Path("../clips"))] == [Path("../clips/a.flac")]


def test_spreadsheets_begin_with_a_mark(tmp_path: Path):
    (tmp_path / "manifest.csv").write_bytes(b"\xef\xbb\xbffile,kind\nb.flac,music\n")
    assert [clip.name for clip in find(tmp_path)] == ["b"]


def test_published_scores_come_out_again(root: Path):
    """On the decodes that were published, our metrics give the recorded values."""
    shared = root.parent / "shared"
    if not (shared / "figures" / "published_scores.csv").is_file():
        pytest.skip("needs ../shared/figures and ../shared/audio/published")
    folders = {
        ("EnCodec 24k", "1.5"): "encodec24k_1.5kbps",
        ("SemantiCodec published", "0.35"): "semanticodec_0.35kbps",
    }
    columns = {"pesq_wb": "pesq", "stoi": "stoi", "estoi": "estoi", "visqol": "visqol", "mel_l1": "mel"}
    within = {"visqol": 1e-4}  # another resampler is 7e-3 to 0.1 off
    with (shared / "figures" / "published_scores.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["system"], row["nominal_kbps"]) in folders][::9]
    assert len(rows) == 6
    for place, row in enumerate(rows):
        published = shared / "audio" / "published"
        stem = Path(row["name"]).stem + ".flac"
        original = Clip("o", "music", published / "groundtruth" / stem).wave.astype(np.float64)
        decoded = Clip("d", "music", published / folders[row["system"], row["nominal_kbps"]] / stem).wave
        ours = align(original, decoded.astype(np.float64), level=False).wave
        for name, column in columns.items():
            if name == "visqol" and place % 2:  # seconds each: of every kind of sound one
                continue
            found = METRICS[name].value(Sound(original), Sound(ours))
            assert (found or (math.nan,))[0] == pytest.approx(
                float(row[column]), abs=within.get(name, 2e-3), nan_ok=True
            ), (row, name)
