"""What one address may take, all its connections together."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import islice

from .limits import Throttle


@dataclass(frozen=True)
class AddressLimits:
    """Bounds of an address; each server has its own count.

    Args:
        connections: WebSockets at a time.
        others: TCP connections besides, at a time: requests, and handshakes under way.
        sessions: at a time.
        opens: WebSockets per second.
        requests: of plain HTTP per second.
        messages: per second; a live session sends 50, and acknowledges.
        octets: bytes of messages per second.
        failures: bad tokens per second.
        burst: seconds' worth of all these that may come at once.
        known: addresses without a connection that are remembered.
    """

    connections: int = 64
    others: int = 64
    sessions: int = 64
    opens: int = 16
    requests: int = 32
    messages: int = 64 * 64
    octets: int = 64 << 18
    failures: int = 1
    burst: int = 8
    known: int = 4096


class _Address:
    def __init__(self, limits: AddressLimits, now: int) -> None:
        self.sockets = self.connections = self.sessions = 0
        self.opens = Throttle(limits.opens, limits.burst, now)
        self.requests = Throttle(limits.requests, limits.burst, now)
        self.messages = Throttle(limits.messages, limits.burst, now)
        self.octets = Throttle(limits.octets, limits.burst, now)
        self.failures = Throttle(limits.failures, limits.burst, now)
        self.banned = False

    @property
    def idle(self) -> bool:
        return not (self.sockets or self.connections or self.sessions)


class Gate:
    """Count what addresses do, and say when it is too much.  Time is nanoseconds."""

    def __init__(self, limits: AddressLimits) -> None:
        self._limits = limits
        self._addresses: OrderedDict[str, _Address] = OrderedDict()

    def connect(self, address: str, now: int) -> bool:
        """Note a new TCP connection, and tell whether it may stay; :meth:`disconnect` has to follow either way."""
        entry = self._entry(address, now)
        entry.sockets += 1
        return entry.sockets <= self._limits.connections + self._limits.others

    def disconnect(self, address: str) -> None:
        """Note that a TCP connection is gone."""
        self._addresses[address].sockets -= 1
        self._forget()

    def request(self, address: str, now: int) -> bool:
        """Note a request of plain HTTP, and tell whether it is to be answered."""
        return self._entry(address, now).requests.take(1, now)

    def enter(self, address: str, now: int) -> bool:
        """Note a new WebSocket, and tell whether it may stay; :meth:`leave` has to follow either way."""
        entry = self._entry(address, now)
        entry.connections += 1
        return entry.opens.take(1, now) and entry.connections <= self._limits.connections

    def leave(self, address: str) -> None:
        """Note that a WebSocket is gone."""
        self._addresses[address].connections -= 1
        self._forget()

    def message(self, address: str, size: int, now: int) -> bool:
        """Note a message, and tell whether it may be taken."""
        entry = self._entry(address, now)
        return entry.messages.take(1, now) and entry.octets.take(size, now)

    def guess(self, address: str, now: int) -> bool:
        """Tell whether an address may try a token: not after too many bad ones."""
        entry = self._entry(address, now)
        entry.banned = entry.banned and not entry.failures.take(1, now)
        return not entry.banned

    def failed(self, address: str, now: int) -> None:
        """Note a bad token."""
        entry = self._entry(address, now)
        entry.banned = not entry.failures.take(1, now)

    def begin(self, address: str, now: int) -> bool:
        """Note a new session if there is room for it; tell so."""
        entry = self._entry(address, now)
        if entry.sessions >= self._limits.sessions:
            return False
        entry.sessions += 1
        return True

    def end(self, address: str) -> None:
        """Note that a session is gone."""
        self._addresses[address].sessions -= 1

    def _entry(self, address: str, now: int) -> _Address:
        entry = self._addresses.get(address)
        if entry is None:
            entry = self._addresses[address] = _Address(self._limits, now)
        self._addresses.move_to_end(address)
        return entry

    def _forget(self) -> None:
        """Keep the table small: those that come back as strangers have waited for a long time, or are many."""
        surplus = len(self._addresses) - self._limits.known
        if surplus > 0:
            idle = (name for name, entry in self._addresses.items() if entry.idle)
            for name in list(islice(idle, surplus)):
                del self._addresses[name]
