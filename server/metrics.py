"""What the server counts, as Prometheus text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one server, in a registry of their own.

    Attributes:
        batch: streams per step, by side (encode, decode).
        step: seconds per step, by side.
        wait: seconds from ready to the beginning of the step, by side.
        streams: open in the engine, by side.
        failures: streams that ended because the engine could not work off what they were given, by side.
        upsets: decoder rows that were not finite and began again.
        load: share of the time that steps take if every stream goes on at its pace.
        connections: open WebSockets.
        sessions: attached and detached.
        rooms: with a publisher or listeners.
        messages: by direction (in, out).
        octets: bytes of messages, by direction.
        ignored: messages of unknown types, from connections that are gone.
        closed: connections that were closed from here, by code.
        resumed: sessions that went on with another connection.
        dropped: units that slow subscribers have missed.
        ready: whether clients are let in.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.batch = self._histogram("engine_batch_streams", "Streams per step.", _ROWS)
        self.step = self._histogram("engine_step_seconds", "Time of a step.", _SECONDS)
        self.wait = self._histogram("engine_wait_seconds", "Time from ready to the beginning of the step.", _SECONDS)
        self.streams = self._gauge("engine_streams", "Streams open in the engine.", "side")
        self.failures = self._counter("engine_failures", "Streams that failed.", "side")
        self.upsets = self._counter("engine_upsets", "Decoder rows that were not finite and began again.")
        self.load = self._gauge("engine_load", "Share of the time that steps take at the streams' pace.")
        self.connections = self._gauge("connections", "Open WebSockets.")
        self.sessions = self._gauge("sessions", "Sessions, attached and detached.")
        self.rooms = self._gauge("rooms", "Rooms with a publisher or listeners.")
        self.messages = self._counter("messages", "Messages.", "direction")
        self.octets = self._counter("message_bytes", "Bytes of messages.", "direction")
        self.ignored = self._counter("ignored_messages", "Messages of unknown types; counted as connections end.")
        self.closed = self._counter("closed", "Connections closed by the server.", "code")
        self.resumed = self._counter("resumed", "Sessions that went on with another connection.")
        self.dropped = self._counter("dropped_units", "Units that slow subscribers have missed.")
        self.ready = self._gauge("ready", "Whether clients are let in.")

    def text(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"semanticodec_{name}", what, ["side"], buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"semanticodec_{name}", what, labels, registry=self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"semanticodec_{name}", what, labels, registry=self._registry)
