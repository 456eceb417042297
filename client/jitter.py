"""The playing side's buffer: chunks come when they come, samples go out steadily.

It learns how late chunks are and delays the sound by just so much that nearly all are in time.  No clock of its own:
time is nanoseconds, passed in; positions are samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from .events import Samples

_SECOND = 1_000_000_000
_MS = 1_000_000


@dataclass(frozen=True)
class Policy:
    """How a buffer behaves; times in milliseconds.

    Args:
        quantile: share of the chunks that should be in time.
        half_life: age at which an observation counts half.
        margin: added to the observed lateness.
        start: expected lateness before anything is known.
        slack: error of the delay that is left alone.
        speed: share by which sound is played faster or slower to correct the delay.
        jump: excess delay that is skipped at once.
        stall: what comes later than this, or this far ahead, begins a new timeline: the sender had paused.
        most: sound that is kept at most.
        fade: length of fades in, and of the sound that a loss fades out with.
    """

    quantile: float = 0.99
    half_life: int = 10_000
    margin: int = 10
    start: int = 60
    slack: int = 15
    speed: float = 0.02
    jump: int = 1_000
    stall: int = 3_000
    most: int = 30_000
    fade: int = 20


class JitterBuffer:
    """Buffer sound for a steady player.

    A position p is played at p / rate plus an offset.  Chunks that came so far needed offsets of (arrival - p / rate),
    their transits; the offset wanted is a high quantile of these, recent ones counting more.

    Args:
        sample_rate: in Hz.
        policy: how it behaves.

    Attributes:
        underruns: times the player ran dry.
        late: chunks that came after their time.
        concealed: samples made up, for want of real ones or because they were lost.
        repeated: samples that came again and were ignored.
        skipped: samples left out to reduce the delay.
    """

    def __init__(self, sample_rate: int, policy: Policy | None = None) -> None:
        self.sample_rate = sample_rate
        self.policy = policy or Policy()
        self.underruns = self.late = self.concealed = self.repeated = self.skipped = 0
        self._now = 0
        self._held: Samples = np.zeros(0, np.float32)
        self._first = 0  # position of the next sample to be played
        self._phase = 0.0  # how much of it has been played
        self._fade_out: Samples = np.zeros(0, np.float32)  # what is left to hear of a sound that broke off
        self._transits: deque[tuple[int, int]] = deque(maxlen=1024)
        self._wanted: int | None = None
        self._piece = 0  # the player takes so much at a time (ns): the last of it so much before it is heard
        self._shift: int | None = None  # from the sender's positions to ours; None: join the next chunk to the last
        self._playing = self._dry = self._over = self._correcting = False

    @property
    def level(self) -> int:
        """Samples that wait to be played."""
        return len(self._held)

    @property
    def target(self) -> int:
        """Delay between the arrival of the earliest chunks and their playing that is wanted now (ns)."""
        if self._wanted is None:
            return 0
        return self._wanted + self._piece - min(transit for _, transit in self._transits)

    @property
    def delay(self) -> int:
        """The same delay, as it was when samples were last taken (ns)."""
        return 0 if self._wanted is None else self.target + self._error(self._now)

    def restart(self) -> None:
        """Expect new positions: the next chunk follows on the last one."""
        self._shift = None

    def end(self) -> None:
        """Note that the sound is over, so that running dry is no under-run; the next chunk begins a new sound."""
        self._over = True
        self._shift = None

    def put(self, at: int, samples: Samples, now: int) -> None:
        """Take a chunk: ``samples`` in [-1, 1], the first of which has position ``at``, that arrives at ``now``."""
        self._now = now = max(now, self._now)
        end = self._first + len(self._held)
        if self._over and not len(self._held):
            self._transits.clear()
        self._over = False
        if self._shift is None:
            self._shift = end - at
        gap = at + self._shift - end
        if abs(gap) > self._samples(self.policy.stall):
            self._shift, gap = end - at, 0
        samples = samples[max(0, -gap) :]
        self.repeated += max(0, min(-gap, len(samples) + max(0, -gap)))
        if not len(samples):
            return
        place = end + max(0, gap)
        self._observe(now - self._ns(place), now)
        self.late += self._dry
        filling = self._filled(max(0, gap))
        self._held = np.concatenate([self._held, filling, samples.astype(np.float32)])
        surplus = len(self._held) - self._samples(self.policy.most)
        if surplus > 0:
            self._skip(surplus)

    def get(self, count: int, now: int) -> Samples:
        """Return the next ``count`` samples, to be played from ``now`` on."""
        self._now = now = max(now, self._now)
        self._piece = self._ns(count)
        out: Samples = np.zeros(count, np.float32)
        begin = 0 if self._playing else self._wait(count, now)
        self._conceal(out[:begin])
        if begin == count:
            return out
        if not self._playing and self._dry:
            self._fade_in()
        self._playing, self._dry = True, False
        self._fade_out = self._fade_out[:0]
        done = begin + self._play(out[begin:], now + self._ns(begin))
        if done < count:
            self._fade_out = self._mirrored(out[:done])
            self._playing = False
            self._dry = not self._over
            self.underruns += self._dry
            self._conceal(out[done:])
        return out

    def _wait(self, count: int, now: int) -> int:
        """Return for how many samples the player must wait, at most ``count``."""
        if self._wanted is None or not len(self._held):
            return count
        early = self._ns(self._first) + self._wanted + self._piece - now
        return max(0, min(count, -(-early * self.sample_rate // _SECOND)))

    def _play(self, out: Samples, now: int) -> int:
        """Fill ``out`` as far as there are samples, a little faster or slower if the delay is wrong."""
        error = self._error(now)
        if error > self.policy.jump * _MS:
            self._skip(min(error * self.sample_rate // _SECOND, max(0, len(self._held) - len(out))))
            error = self._error(now)
        # Too early costs under-runs, and is put right long before the margin is used up.
        low, high = -self.policy.margin * _MS // 2, self.policy.slack * _MS
        self._correcting = abs(error) > _MS if self._correcting else not low <= error <= high
        speed = 1 + self.policy.speed * (1 if error > 0 else -1) if self._correcting else 1.0
        if speed == 1:
            self._phase = 0.0
        used = self._phase + speed * len(out)
        if int(used) + 1 > len(self._held):
            # Too little is left for anything but to play it.
            speed, self._phase = 1.0, 0.0
            used = float(min(len(out), len(self._held)))
        if speed == 1:
            done = int(used)
            out[:done] = self._held[:done]
        else:
            done = len(out)
            places = self._phase + speed * np.arange(done)
            out[:] = np.interp(places, np.arange(int(used) + 1), self._held[: int(used) + 1])
        self._advance(int(used))
        self._phase = used - int(used)
        return done

    def _error(self, now: int) -> int:
        """Return by how much the sound is later than wanted (ns)."""
        return now - self._ns(self._first) - self._piece - (self._wanted or 0)

    def _observe(self, transit: int, now: int) -> None:
        if self._wanted is not None and abs(transit - self._wanted) > self.policy.stall * _MS:
            self._transits.clear()
        if not self._transits:
            self._transits.append((now, transit + self.policy.start * _MS))
        self._transits.append((now, transit))
        times, transits = np.array(self._transits, np.int64).T
        order = np.argsort(-transits, kind="stable")
        weights = 0.5 ** ((now - times[order]) / (self.policy.half_life * _MS))
        above = np.cumsum(weights)
        place = np.searchsorted(above, (1 - self.policy.quantile) * above[-1])
        self._wanted = int(transits[order][place]) + self.policy.margin * _MS

    def _skip(self, count: int) -> None:
        """Leave out ``count`` samples, with a cross-fade."""
        size = min(self._samples(self.policy.fade), len(self._held) - count)
        before = self._held[:size].copy()
        self._advance(count)
        ramp = np.linspace(0, 1, size, dtype=np.float32)
        self._held[:size] = before * (1 - ramp) + self._held[:size] * ramp
        self.skipped += count

    def _advance(self, count: int) -> None:
        self._held = self._held[count:].copy()
        self._first += count

    def _filled(self, count: int) -> Samples:
        """Return ``count`` samples in place of lost ones: the sound before them, fading out."""
        filling: Samples = np.zeros(count, np.float32)
        fading = self._mirrored(self._held)[:count]
        filling[: len(fading)] = fading
        self.concealed += count
        return filling

    def _mirrored(self, sound: Samples) -> Samples:
        last = sound[-self._samples(self.policy.fade) :][::-1]
        return last * np.linspace(1, 0, len(last), dtype=np.float32)

    def _conceal(self, out: Samples) -> None:
        size = min(len(out), len(self._fade_out))
        out[:size] = self._fade_out[:size]
        self._fade_out = self._fade_out[size:]
        self.concealed += len(out) if self._dry else 0

    def _fade_in(self) -> None:
        size = min(self._samples(self.policy.fade), len(self._held))
        self._held[:size] *= np.linspace(0, 1, size, dtype=np.float32)

    def _samples(self, ms: int) -> int:
        return ms * self.sample_rate // 1000

    def _ns(self, samples: int) -> int:
        return samples * _SECOND // self.sample_rate
