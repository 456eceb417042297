"""What one connection and one session may take: queues, time-outs, rates."""

from __future__ import annotations

from dataclasses import dataclass

SECOND = 1_000_000_000
"""Nanoseconds."""
RATE = 16_000
"""Samples per second inside."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one session and its connection; times in nanoseconds.

    Args:
        handshake: from the WebSocket's opening to hello or resume.
        idle: silence of the client after which it is given up.
        ping: silence after which the client is asked.
        keep: how long a session without a connection can be resumed.
        finish: how long what was sent before a bye may take to be worked off.
        stats: between stats messages, for clients that want them.
        window: units kept per stream until they are acknowledged.
        window_bytes: bytes kept per stream.
        high: units from the client that may wait to be worked off; it is paused then.
        low: it may go on when so few are left.
        pending_bytes: bytes that may wait to be worked off.
        slow_high: units that may wait for a slow client; it is dropped to live then.
        slow_low: units that are kept when it is.
        messages: per second, from the client.
        octets: per second, from the client.
        burst: seconds' worth of both that may come at once.
        entropy: whether clients may have codes entropy-coded; coding, and
            decoding what publishers send, costs some 5 ms of a processor per block, on the server's own thread.
    """

    handshake: int = 5 * SECOND
    idle: int = 30 * SECOND
    ping: int = 10 * SECOND
    keep: int = 60 * SECOND
    finish: int = 30 * SECOND
    stats: int = 5 * SECOND
    window: int = 256
    window_bytes: int = 1 << 21
    high: int = 128
    low: int = 32
    pending_bytes: int = 1 << 23
    slow_high: int = 32
    slow_low: int = 2
    messages: int = 200
    octets: int = 1 << 20
    burst: int = 4
    entropy: bool = False


class Throttle:
    """Allow ``rate`` things per second, and ``burst`` seconds' worth of them at once (a token bucket)."""

    def __init__(self, rate: int, burst: int, now: int) -> None:
        self._rate = rate
        self._most = rate * burst * SECOND
        self._left = self._most
        self._then = now

    def take(self, count: int, now: int) -> bool:
        """Tell whether ``count`` more are allowed now."""
        elapsed = max(0, now - self._then)
        self._then = max(now, self._then)
        self._left = min(self._most, self._left + elapsed * self._rate)
        if self._left < count * SECOND:
            return False
        self._left -= count * SECOND
        return True
