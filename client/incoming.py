"""The streams that a client receives: messages in, blocks, chunks, gaps and markers out."""

from __future__ import annotations

from semanticodec.errors import WireError
from semanticodec.wire.blocks import Block, Geometry, samples_of
from semanticodec.wire.channel import Inlet
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import KINDS, Ack, Audio, Codes, Hello, Kind, Marker, Missing, Ready

from .events import AudioChunk, CodesBlock, Event, Gap


class Incoming:
    """What comes from the server, each unit once.

    Args:
        hello: what the client asked for.
        geometry: of the session's codes.
        ready: the session.

    Attributes:
        flushed: tag of the last marker.
    """

    def __init__(self, hello: Hello, geometry: Geometry, ready: Ready) -> None:
        self.flushed = 0
        self._form, self._geometry = hello.sample_format, geometry
        first = {"codes": ready.codes_next, "audio": ready.audio_next}
        self._inlets: dict[Kind, Inlet] = {
            kind: Inlet(kind, geometry, ready.rate, ready.window, first[kind])
            for kind in KINDS
            if kind in hello.receive
        }

    def next(self, kind: Kind) -> int:
        """Return the first unit of a stream that has not been received; 0 if it is none of ours."""
        return self._inlets[kind].receiver.next if kind in self._inlets else 0

    def counts(self) -> dict[str, int]:
        """Return how many units were received, are lost, were recovered and were repeated."""
        receivers = [inlet.receiver for inlet in self._inlets.values()]
        names = ("received", "lost", "recovered", "repeated")
        return {name: sum(getattr(receiver, name) for receiver in receivers) for name in names}

    @property
    def ack_due(self) -> bool:
        """Whether so much has come that the server should know."""
        return any(inlet.ack_due for inlet in self._inlets.values())

    def ack(self) -> Ack:
        """Return an acknowledgement that is due."""
        return next(inlet.ack() for inlet in self._inlets.values() if inlet.ack_due)

    def take(self, message: Codes | Audio | Marker | Missing) -> list[Event]:
        """Return what is new in a message, in order.

        Raises:
            WireError: it is of another stream, or makes no sense.
        """
        kind: Kind = "audio" if isinstance(message, Audio) else "codes" if isinstance(message, Codes) else message.kind
        inlet = self._inlets.get(kind)
        if inlet is None:
            raise WireError(f"{kind} came; this session receives {list(self._inlets)}")
        # Before it counts as taken: it may be half a sample.
        samples = samples_of(message.data, self._form) if isinstance(message, Audio) else None
        events: list[Event] = []
        for part in inlet.take(message):
            if isinstance(part, Marker):
                self.flushed = max(self.flushed, part.tag)
                events.append(part)
            elif isinstance(part, Lost):
                events.append(Gap(kind, part.seq, part.stop, part.reason))
            elif samples is not None:
                events.append(AudioChunk(part.seq, part.item.at, samples))
            elif isinstance(part.item, Block):
                codes = self._geometry.unpack(part.item.data, part.item.rate)
                events.append(CodesBlock(part.seq, part.item.at, part.item.rate, codes, part.copy))
        return events
