"""The stream that a client sends: positions, flushes, and what of it survives a server that forgot the session."""

from __future__ import annotations

from dataclasses import replace

from semanticodec.errors import StreamError, WireError
from semanticodec.wire.blocks import Block, Chunk, Geometry, choose_bundle, chunk_of
from semanticodec.wire.channel import AudioOut, CodesOut
from semanticodec.wire.link import Lost, Sender
from semanticodec.wire.messages import Ack, Audio, Codes, Hello, Kind, Marker, Missing, Ready, Tune
from semanticodec.wire.packing import Codes as CodesArray

from .events import Samples

WINDOW_BYTES = 1 << 22
"""Bytes of units that are kept until they are acknowledged."""


class Outgoing:
    """Samples or blocks of codes in, messages out.

    Args:
        kind: what is sent.
        hello: what the client asked for.
        geometry: of the session's codes.
        ready: the session.

    Attributes:
        kind: what is sent.
        rate: token rate of blocks of codes.
        acked: everything before it has arrived.
        flushes: tag of the last flush.
    """

    def __init__(self, kind: Kind, hello: Hello, geometry: Geometry, ready: Ready) -> None:
        self.kind = kind
        self.rate = ready.rate
        self.acked = ready.next
        self.flushes = 0
        self._form, self._geometry = hello.sample_format, geometry
        self._wish = Tune(latency=hello.latency, gross=hello.gross, copies=hello.copies)
        self._position = 0
        self._outlet: CodesOut | AudioOut
        if kind == "codes":
            blocks = Sender[Block](ready.window, WINDOW_BYTES, ready.next, ready.limit)
            self._outlet = CodesOut(geometry, ready.rate, blocks, copies=hello.copies)
            self._outlet.bundle = self._bundle()
        else:
            self._outlet = AudioOut(Sender[Chunk](ready.window, WINDOW_BYTES, ready.next, ready.limit))

    @property
    def room(self) -> bool:
        """Whether a unit can be pushed and nothing is forgotten for it."""
        sender = self._outlet.sender
        return sender.kept < sender.window and sender.kept_bytes < WINDOW_BYTES

    @property
    def empty(self) -> bool:
        """Whether all has been sent."""
        return self._outlet.sender.front() is None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Units that were sent, are lost, and wait."""
        sender = self._outlet.sender
        return sender.cursor, sender.lost, sender.waiting

    def push_samples(self, samples: Samples, now: int) -> None:
        """Queue samples in [-1, 1] as one chunk.

        Raises:
            StreamError: codes are sent.
            WireError: they are too many for a message, or none.
        """
        if not isinstance(self._outlet, AudioOut):
            raise StreamError("this session sends codes; samples cannot be pushed")
        self._outlet.push(Chunk(chunk_of(samples, self._form), self._position), now)
        self._position += len(samples)

    def push_codes(self, codes: CodesArray, rate: int, copy: bytes, now: int) -> None:
        """Queue a block of codes ``[n_q, frames]``; ``copy`` is the same packed at the lowest rate, or nothing.

        Raises:
            StreamError: audio is sent.
            CodesError, CorruptedError: it is no block of this session.
        """
        if not isinstance(self._outlet, CodesOut):
            raise StreamError("this session sends audio; codes cannot be pushed")
        self._outlet.push(Block(self._geometry.pack(codes, rate), rate, self._position, copy), now)
        self._position += self._geometry.block

    def flush(self, padding: int) -> int:
        """Mark a flush; the last ``padding`` samples of the last block stand for nothing.  Return the marker's tag."""
        self._position -= padding
        self.flushes += 1
        self._outlet.mark(flush=True, at=self._position, tag=self.flushes)
        return self.flushes

    def tune(self, wanted: Tune) -> Tune:
        """Choose rate, bundling and redundancy of codes; return what holds now.

        Raises:
            WireError: there is no such rate.
        """
        assert isinstance(self._outlet, CodesOut)
        if wanted.rate is not None and wanted.rate not in self._geometry.rates:
            raise WireError(f"rate {wanted.rate}; this session has {list(self._geometry.rates)}")
        self.rate = wanted.rate or self.rate
        self._wish = merged(self._wish, wanted)
        self._outlet.copies = self._wish.copies or 0
        self._outlet.bundle = self._bundle()
        return Tune(rate=self.rate, copies=self._outlet.copies, bundle=self._outlet.bundle)

    def due(self) -> int | None:
        """Return when :meth:`pull` will have a message if nothing else happens; None for never."""
        return self._outlet.due()

    def pull(self, now: int) -> Codes | Audio | Missing | Marker | None:
        """Return the next message, if one is due."""
        return self._outlet.pull(now)

    @property
    def oldest(self) -> int:
        """The first unit that may have to be sent again."""
        return self._outlet.sender.oldest

    def ack(self, message: Ack) -> int:
        """Take an acknowledgement; return how many units it is about.

        Raises:
            WireError: it is of another stream, or of units that were never sent.
        """
        if message.kind != self.kind:
            raise WireError(f"units of {message.kind} are acknowledged; this session sends {self.kind}")
        self._outlet.sender.ack(message.next, message.marker, message.limit)
        before, self.acked = self.acked, max(self.acked, message.next)
        return self.acked - before

    def resume(self, ready: Ready) -> None:
        """Send again what the server lacks.

        Raises:
            WireError: it claims to have what was never sent.
        """
        self._outlet.sender.rewind(ready.next)
        self._outlet.sender.limit = ready.limit
        self.acked = max(self.acked, ready.next)

    def inherit(self, old: Outgoing, flushed: int | None) -> int:
        """Go on with what was never sent in an old session; positions begin at 0.

        Args:
            old: its stream, which is used up.
            flushed: tag of the last flush that was answered; None if no answers are wanted.

        Returns:
            How many units may or may not have arrived there; they are not sent again.
        """
        sender = old._outlet.sender
        unsure = sender.cursor - old.acked
        base, marked = None, False
        while sender.front() is not None:
            entry = sender.take()
            if isinstance(entry, Lost):
                self._outlet.sender.lose(entry.stop - entry.seq, entry.reason)
                continue
            at = (entry.at or 0) if isinstance(entry, Marker) else entry.item.at
            base = at if base is None else base
            if isinstance(entry, Marker):
                self._outlet.mark(flush=entry.flush, at=at - base, tag=entry.tag)
                marked = True
            else:
                self._push(replace(entry.item, at=at - base), entry.since)
        # What was lost there is counted there.
        self._outlet.sender.lost = 0
        self._position = 0 if base is None else old._position - base
        self.flushes = old.flushes
        self._wish = old._wish
        self.rate = old.rate if old.rate in self._geometry.rates else self.rate
        if isinstance(self._outlet, CodesOut):
            self._outlet.copies, self._outlet.bundle = self._wish.copies or 0, self._bundle()
        if flushed is not None and flushed < self.flushes and not marked:
            # The old session took the answer to the last flush with it.
            self._outlet.mark(flush=True, at=self._position, tag=self.flushes)
        return unsure

    def _push(self, item: Block | Chunk, since: int) -> None:
        if isinstance(self._outlet, CodesOut):
            assert isinstance(item, Block)
            self._outlet.push(item, since)
        else:
            assert isinstance(item, Chunk)
            self._outlet.push(item, since)

    def _bundle(self) -> int:
        wish = self._wish
        return wish.bundle or choose_bundle(
            self._geometry, self.rate, latency=wish.latency, gross=wish.gross, copies=wish.copies or 0, masked=True
        )


def merged(old: Tune, new: Tune) -> Tune:
    """Let what ``new`` asks for replace what ``old`` did; latency and gross belong together, and replace bundle."""
    if new.latency is not None or new.gross is not None:
        old = replace(old, latency=None, gross=None, bundle=None)
    return replace(old, **{name: value for name, value in vars(new).items() if value is not None})
