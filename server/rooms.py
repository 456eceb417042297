"""Rooms: one publisher's codes for many, and the sound of them for those who do not decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from semanticodec.wire import messages
from semanticodec.wire.blocks import Block, chunk_of
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import Marker

from .lanes import Event, Failed, Fence, Mark, Resampler, Sound
from .limits import RATE
from .session import Session


class Handle(Protocol):
    """A stream of the engine."""

    @property
    def queued(self) -> int:
        """Units that wait."""

    def put(self, item: Block | Marker | Lost | Fence) -> None:
        """Append something."""

    def close(self) -> None:
        """End it."""


class Listener(Protocol):
    """Somebody in a room."""

    @property
    def session(self) -> Session:
        """What it is sent."""

    def wake(self) -> None:
        """Let its connection see what is new."""


class Tap:
    """Decoded sound in one sample rate and format, for all who want it so."""

    def __init__(self, sample_rate: int, form: str) -> None:
        self.listeners: dict[Listener, None] = {}
        self._sample_rate, self._form = sample_rate, form
        self._next: int | None = None
        self._begin(0)

    def _begin(self, at: int) -> None:
        self._resampler = Resampler(RATE, self._sample_rate)
        self._base = at * self._sample_rate // RATE

    def push(self, sound: Sound, now: int) -> None:
        """Send samples on, as far as the resampler has them ready."""
        if sound.at != self._next:
            self._flush(now)
            self._begin(sound.at)
        self._next = sound.at + len(sound.samples)
        at = self._base + self._resampler.made
        self._send(chunk_of(self._resampler.push(sound.samples), self._form), at, now)

    def mark(self, mark: Mark, now: int) -> None:
        """Send a marker on, behind what came before it."""
        if mark.flush:
            self._flush(now)
            self._next = None
        for listener in self.listeners:
            at = None if mark.at is None else mark.at * self._sample_rate // RATE
            listener.session.mark("audio", flush=mark.flush, at=at, tag=mark.tag)
            listener.wake()

    def _flush(self, now: int) -> None:
        if self._next is not None:
            at = self._base + self._resampler.made
            self._send(chunk_of(self._resampler.flush(), self._form), at, now)

    def _send(self, data: bytes, at: int, now: int) -> None:
        if data:
            for listener in self.listeners:
                listener.session.send_audio(data, at, now)
                listener.wake()


class Room:
    """One publisher and its listeners.

    Args:
        open_decoder: opens a stream of the engine that decodes for those who want sound.

    Attributes:
        publisher: who sends, if anybody here does.
        elsewhere: whether somebody on another server sends.
        next: number of the next block.
        decoder: open while somebody wants sound.
        coming: those who are about to enter.
    """

    def __init__(self, open_decoder: Callable[[Callable[[Event], None]], Handle], clock: Callable[[], int]) -> None:
        self.publisher: Listener | None = None
        self.elsewhere = False
        self.next = 0
        self.decoder: Handle | None = None
        self.coming = 0
        self._open_decoder, self._clock = open_decoder, clock
        self._codes: dict[Listener, None] = {}
        self._taps: dict[tuple[int, str], Tap] = {}
        self._then: Callable[[], None] | None = None

    @property
    def listeners(self) -> list[Listener]:
        """Those who listen, each once."""
        return list(dict.fromkeys([*self._codes, *(one for tap in self._taps.values() for one in tap.listeners)]))

    @property
    def empty(self) -> bool:
        """Whether nobody is here."""
        return self.publisher is None and not self.listeners and not self.coming

    @property
    def copies(self) -> bool:
        """Whether anybody wants redundant copies."""
        outs = (listener.session.codes_out for listener in self._codes)
        return any(out is not None and out.copies for out in outs)

    def join(self, listener: Listener) -> None:
        """Let somebody listen, from the next block on."""
        hello = listener.session.hello
        if "codes" in hello.receive:
            self._codes[listener] = None
        if "audio" in hello.receive:
            form = hello.sample_rate, hello.sample_format
            self._taps.setdefault(form, Tap(*form)).listeners[listener] = None
            self.decoder = self.decoder or self._open_decoder(self._decoded)
        self.announce()

    def leave(self, member: Listener) -> None:
        """Let somebody go, publisher or listener."""
        if self.publisher is member:
            self.publisher = None
        self._codes.pop(member, None)
        for form, tap in list(self._taps.items()):
            tap.listeners.pop(member, None)
            if not tap.listeners:
                del self._taps[form]
        deaf = None if self._taps else self.decoder
        if deaf is not None:
            deaf.close()
            self.decoder = None
        self.announce()
        if deaf is not None:
            self._settled()

    def settle(self, then: Callable[[], None]) -> None:
        """Call ``then`` when all that was taken has been sent to everybody."""
        self._then = then
        if self.decoder is None:
            self._settled()
        else:
            self.decoder.put(Fence(self._settled))

    def _settled(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()

    def announce(self) -> None:
        """Tell everybody who is here."""
        listeners = self.listeners
        news = messages.Room(self.publisher is not None or self.elsewhere, len(listeners))
        for member in [*listeners, *([self.publisher] if self.publisher else [])]:
            member.session.tell(news)
            member.wake()

    def take(self, unit: Block | Lost | Mark) -> None:
        """Send to everybody what a publisher has to say."""
        if isinstance(unit, Block):
            self._block(unit)
        elif isinstance(unit, Lost):
            self._lose(unit)
        else:
            self._mark(unit)

    def _block(self, block: Block) -> None:
        self.next += 1
        now = self._clock()
        for listener in self._codes:
            listener.session.send_block(block, now)
            listener.wake()
        if self.decoder is not None:
            self.decoder.put(block)

    def _lose(self, lost: Lost) -> None:
        count = lost.stop - lost.seq
        self.next += count
        for listener in self._codes:
            listener.session.send_lost("codes", count, "source")
            listener.wake()
        if self.decoder is not None:
            self.decoder.put(lost)

    def _mark(self, mark: Mark) -> None:
        for listener in self._codes:
            listener.session.mark("codes", flush=mark.flush, at=mark.at, tag=mark.tag)
            listener.wake()
        if self.decoder is not None:
            self.decoder.put(Marker(1, self.next, mark.flush, mark.at, "codes", mark.tag))

    def _decoded(self, event: Event) -> None:
        now = self._clock()
        if isinstance(event, Failed) and self.decoder is not None:
            self.decoder.close()
            self.decoder = self._open_decoder(self._decoded)
            self._settled()
        elif isinstance(event, Fence):
            event.then()
        for tap in self._taps.values():
            if isinstance(event, Sound):
                tap.push(event, now)
            elif isinstance(event, Mark):
                tap.mark(event, now)
        if self.publisher is not None:
            self.publisher.wake()
