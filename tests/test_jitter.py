"""The jitter buffer, played against simulated networks with a simulated clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semanticodec_client.jitter import JitterBuffer, Policy

RATE = 16_000
MS = 1_000_000
SECOND = 1000 * MS


def sound(first: int, count: int) -> np.ndarray:
    """Samples that tell their position, as long as they are played at the right speed."""
    return ((np.arange(first, first + count) % 1000 + 1) / 2000).astype(np.float32)


@dataclass
class Heard:
    samples: np.ndarray
    delays: np.ndarray  # ms, one per 100 ms
    targets: np.ndarray  # ms
    underruns: np.ndarray  # so far


def play(
    buffer: JitterBuffer, arrivals: Iterable[tuple[int, int, int]], seconds: float, clock: Callable[[int], int] = int
) -> Heard:
    """Feed (time, position, samples) and take 10 ms every 10 ms of the player's clock."""
    waiting = sorted(arrivals)
    pieces, delays, targets, underruns = [], [], [], []
    step = RATE // 100
    for i in range(int(seconds * 100)):
        now = clock(i * 10 * MS)
        while waiting and waiting[0][0] <= now:
            time, at, count = waiting.pop(0)
            buffer.put(at, sound(at, count), time)
        pieces.append(buffer.get(step, now))
        if i % 10 == 9:
            delays.append(buffer.delay / MS)
            targets.append(buffer.target / MS)
            underruns.append(buffer.underruns)
    return Heard(np.concatenate(pieces), *(np.array(x, float) for x in (delays, targets, underruns)))


def network(seconds: float, late: Callable[[int], float], size: int = 320) -> list[tuple[int, int, int]]:
    """Chunks of ``size`` samples, in order; chunk i is ``late(i)`` ms later than the fastest could be."""
    arrivals, last = [], 0
    for i in range(int(seconds * RATE / size)):
        sent = (i + 1) * size * SECOND // RATE
        last = max(last, sent + int((50 + late(i)) * MS))
        arrivals.append((last, i * size, size))
    return arrivals


def test_a_steady_network_is_played_bit_for_bit_with_a_small_delay():
    buffer = JitterBuffer(RATE)
    heard = play(buffer, network(20, lambda _: 0), 20)
    assert buffer.underruns == buffer.late == buffer.concealed == 0
    assert heard.targets[-1] == pytest.approx(20, abs=1)  # the margin and one piece
    assert heard.delays[-1] < 40
    begin = int(np.flatnonzero(heard.samples)[0])
    assert begin <= 200 * RATE // 1000
    np.testing.assert_array_equal(heard.samples[begin : begin + RATE // 2], sound(0, RATE // 2))


@pytest.mark.parametrize(("spread", "low", "high"), [(20, 30, 55), (100, 100, 150), (300, 280, 370)])
def test_the_target_follows_the_jitter(spread: int, low: int, high: int):
    rng = np.random.default_rng(spread)
    lateness = rng.uniform(0, spread, 10_000)
    buffer = JitterBuffer(RATE)
    heard = play(buffer, network(40, lambda i: lateness[i], size=1600), 40)
    assert low <= heard.targets[200:].min() <= heard.targets[200:].max() <= high
    assert heard.delays[300:].max() <= high + 40
    # Once it has learned (20 s), hardly any chunk is late; before, some are.
    assert heard.underruns[-1] - heard.underruns[200] <= 4
    assert buffer.late <= buffer.underruns + 1


def test_the_target_comes_down_when_the_network_calms():
    rng = np.random.default_rng(0)
    lateness = rng.uniform(0, 300, 10_000)
    buffer = JitterBuffer(RATE)
    heard = play(buffer, network(100, lambda i: lateness[i] if i < 200 else 0, size=1600), 99)
    assert heard.targets[190] > 200
    assert heard.targets[-1] < 30
    assert heard.delays[-1] < 60
    assert heard.underruns[-1] == heard.underruns[200]


def test_bundles_are_expected_late_by_what_they_hold_back():
    # Four blocks of 320 ms at once: the first is 960 ms later than the last.
    size = 5120
    buffer = JitterBuffer(RATE)
    arrivals = [((i // 4 * 4 + 4) * size * SECOND // RATE + 50 * MS, i * size, size) for i in range(160)]
    heard = play(buffer, arrivals, 50)
    assert heard.targets[300:] == pytest.approx(980, abs=5)
    assert heard.underruns[-1] == heard.underruns[300]
    assert heard.underruns[-1] <= 2


@pytest.mark.parametrize("ppm", [-1000, 1000])
def test_clock_drift_is_followed_without_end(ppm: int):
    buffer = JitterBuffer(RATE)
    arrivals = network(100, lambda i: i % 7, size=1600)
    heard = play(buffer, arrivals, 98, clock=lambda now: now + now * ppm // 1_000_000)
    # Without correction the delay would be 100 ms off, or the player dry.
    assert heard.delays[100:].max() < 60
    assert heard.underruns[-1] == heard.underruns[100]


def test_underruns_are_counted_and_faded():
    buffer = JitterBuffer(RATE)
    for i in range(20):
        buffer.put(i * 320, np.full(320, 0.5, np.float32), i * 20 * MS)
    played = [buffer.get(160, i * 10 * MS) for i in range(60)]
    assert buffer.underruns == 1
    assert buffer.concealed > 0
    wave = np.concatenate(played)
    assert np.abs(np.diff(wave[np.flatnonzero(wave)[0] :])).max() < 0.01
    assert not wave[-160:].any()
    buffer.put(20 * 320, np.full(3200, 0.5, np.float32), 600 * MS)
    wave = np.concatenate([buffer.get(160, (600 + i * 10) * MS) for i in range(10)])
    assert buffer.late == 1
    assert np.abs(np.diff(wave)).max() < 0.01
    assert wave[-1] == 0.5


def test_the_end_of_the_sound_is_no_underrun():
    buffer = JitterBuffer(RATE)
    buffer.put(0, sound(0, 3200), 0)
    buffer.end()
    for i in range(60):
        buffer.get(160, i * 10 * MS)
    assert buffer.underruns == buffer.concealed == 0
    buffer.put(0, sound(0, 3200), 60 * SECOND)
    heard = np.concatenate([buffer.get(160, 60 * SECOND + i * 10 * MS) for i in range(30)])
    assert buffer.late == 0
    begin = int(np.flatnonzero(heard)[0])
    np.testing.assert_array_equal(heard[begin : begin + 3200], sound(0, 3200)[: len(heard) - begin])


def test_a_gap_keeps_the_time_and_a_repetition_is_ignored():
    buffer = JitterBuffer(RATE)
    buffer.put(0, sound(0, 1600), 0)
    buffer.put(2400, sound(2400, 1600), 60 * MS)
    assert (buffer.level, buffer.concealed) == (4000, 800)
    buffer.put(2400, sound(2400, 1600), 60 * MS)
    buffer.put(3200, sound(3200, 1600), 60 * MS)
    assert (buffer.level, buffer.repeated) == (4800, 1600 + 800)
    heard = np.concatenate([buffer.get(160, (60 + i * 10) * MS) for i in range(40)])
    begin = int(np.flatnonzero(heard)[0])
    np.testing.assert_array_equal(heard[begin + 2400 : begin + 4800], sound(2400, 2400))


def test_a_restart_joins_the_new_positions_to_the_old():
    buffer = JitterBuffer(RATE)
    buffer.put(160_000, sound(0, 1600), 0)
    buffer.restart()
    buffer.put(0, sound(1600, 1600), 100 * MS)
    assert (buffer.level, buffer.concealed, buffer.repeated) == (3200, 0, 0)


def test_a_pause_of_the_sender_is_no_lateness():
    buffer = JitterBuffer(RATE)
    arrivals = network(20, lambda _: 0) + [(t + 30 * SECOND, at, n) for t, at, n in network(40, lambda _: 0)[1000:]]
    heard = play(buffer, arrivals, 68)
    assert heard.underruns[-1] == 1
    assert heard.targets[-1] < 30
    assert heard.delays[-1] < 60


def test_a_flood_is_bounded_and_too_much_delay_is_skipped():
    policy = Policy(most=5_000)
    buffer = JitterBuffer(RATE, policy)
    for i in range(100):
        buffer.put(i * 1600, sound(i * 1600, 1600), i * 1000)
    assert buffer.level == 5 * RATE
    for i in range(300):
        buffer.get(160, SECOND + i * 10 * MS)
    assert buffer.skipped > 5 * RATE


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(-2000, 4000), st.integers(1, 2000)), max_size=40), st.data())
def test_whatever_comes_the_player_gets_finite_samples_and_memory_is_bounded(
    chunks: list[tuple[int, int, int]], data: st.DataObject
):
    buffer = JitterBuffer(RATE, Policy(most=1000, stall=200))
    now = at = 0
    for wait, jump, count in chunks:
        now += wait * MS
        at = max(0, at + jump)
        buffer.put(at, sound(at, count), now)
        at += count
        out = buffer.get(data.draw(st.integers(0, 1000)), now)
        assert np.isfinite(out).all()
        assert np.abs(out).max(initial=0) <= 1
        assert buffer.level <= RATE
        assert buffer.target >= 0
