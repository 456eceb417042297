"""The server's half of a session: its streams with their windows, and so what can be resumed.

A :class:`Session` outlives its connections (:mod:`.connection`).  It knows neither sockets nor the engine nor a clock;
time is nanoseconds, passed in.  ``PROTOCOL.md`` has the state diagram.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace
from enum import Enum

from semanticodec.errors import StreamError, WireError
from semanticodec.wire.blocks import Block, Chunk, Geometry, Meter, agreed, choose_bundle, coding_features
from semanticodec.wire.channel import Arrived, AudioOut, CodesOut, Inlet
from semanticodec.wire.closing import Code
from semanticodec.wire.fields import Message
from semanticodec.wire.link import Lost, Sender
from semanticodec.wire.messages import (
    FEATURES,
    MAX_AUDIO_BYTES,
    MAX_SEQ,
    Ack,
    Audio,
    Codes,
    Hello,
    Kind,
    Loss,
    Marker,
    Missing,
    Ready,
    Resume,
    Room,
    Stats,
    Tune,
)

from .limits import RATE, SECOND, Limits

MAX_POSITION = MAX_SEQ // 16
"""Where a client's stream may stand at 16 kHz: from there it still fits into a message at every listener's rate."""


class SessionState(Enum):
    """Whether a session has a connection."""

    ATTACHED = "attached"
    DETACHED = "detached"
    ENDED = "ended"


SESSION_MOVES = frozenset(
    {
        (SessionState.ATTACHED, SessionState.ATTACHED),
        (SessionState.ATTACHED, SessionState.DETACHED),
        (SessionState.ATTACHED, SessionState.ENDED),
        (SessionState.DETACHED, SessionState.ATTACHED),
        (SessionState.DETACHED, SessionState.ENDED),
    }
)


class Refused(WireError):
    """What a client sent is not allowed; ``code`` says why."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Offer:
    """What the server serves to a session.

    Args:
        geometry: of the codes; its rates are those of ``presets``.
        presets: names, one per rate.
        weights: first 8 hexadecimal digits of the SHA-256 of each preset's codebooks.
        rate: token rate to begin with.
    """

    geometry: Geometry
    presets: tuple[str, ...]
    weights: tuple[str, ...]
    rate: int


class Session:
    """One client's streams.

    What the client sends becomes units (:meth:`take`), to be worked off and reported (:meth:`done`); what it is to
    receive is queued (:meth:`send_block`, :meth:`send_audio`, :meth:`send_lost`, :meth:`mark`) and leaves as messages
    (:meth:`pull`) when its connection asks for them.

    Args:
        id: 16 secret random bytes.
        owner: who may resume it (a token's name); compared in constant time.
        hello: what the client asked for; the caller has checked role, room and preset.
        offer: what it gets.
        limits: its bounds.
        now: nanoseconds.
        codes_first: number of the first block that it will receive.
        received: units of its stream that another server has received, if it comes from there.

    Attributes:
        state: attached to a connection, detached, or ended.
        attachments: how often it has been given to a connection; only the last of them may touch it.
        rate: token rate at which the client's audio is to be encoded.
        dropped: units that a slow client has missed.
        pending: units from the client that are not worked off.
    """

    def __init__(
        self,
        id: bytes,
        owner: str,
        hello: Hello,
        offer: Offer,
        limits: Limits,
        now: int,
        *,
        codes_first: int = 0,
        received: int = 0,
    ) -> None:
        self.id = id
        self.owner = owner
        self.hello = hello
        self.offer = offer
        self.limits = limits
        self.rate = offer.rate
        self.state = SessionState.ATTACHED
        self.attachments = 0
        self.dropped = 0
        self.pending = 0
        self.pending_bytes = 0
        self.sent = Meter()
        self.received = Meter()
        self.net = Meter()
        self._since = now
        self._latency, self._gross = hello.latency, hello.gross
        self._granted = received + limits.high
        self._paused = False
        self._catching_up: set[Kind] = set()
        self._news: dict[type[Message], Message] = {}
        self._turn = 0
        known = (*FEATURES, *(coding_features(offer.presets) if limits.entropy else ()))
        self._features = tuple(name for name in hello.features if name in known)
        self._geometry = agreed(offer.geometry, offer.presets, self._features)
        self._inlet = (
            None if hello.send is None else Inlet(hello.send, self._geometry, offer.rate, limits.window, received)
        )
        self.codes_out: CodesOut | None = None
        self.audio_out: AudioOut | None = None
        if "codes" in hello.receive:
            blocks = Sender[Block](limits.window, limits.window_bytes, codes_first, overflow="window")
            self.codes_out = CodesOut(self._geometry, offer.rate, blocks, copies=hello.copies)
            self._bundle(None)
        if "audio" in hello.receive:
            self.audio_out = AudioOut(Sender[Chunk](limits.window, limits.window_bytes, overflow="window"))

    # The connection's side

    @property
    def standing(self) -> Hello:
        """What a client would say hello with to get what holds now (it has shown its token, which is kept nowhere)."""
        copies = self.hello.copies if self.codes_out is None else self.codes_out.copies
        return replace(self.hello, token=None, latency=self._latency, gross=self._gross, copies=copies)

    def belongs_to(self, owner: str) -> bool:
        """Tell whether a client may resume this session."""
        return hmac.compare_digest(self.owner.encode(), owner.encode())

    def attach(self, resume: Resume | None, now: int) -> Ready:
        """Begin, or go on with another connection: return the message that says so.

        Raises:
            Refused: the client claims units that do not exist, or the session has ended.
        """
        if self.state is SessionState.ENDED:
            raise Refused(Code.UNKNOWN_SESSION, "the session has ended; say hello")
        if resume is not None:
            self._rewind(resume)
        self._move(SessionState.ATTACHED, now)
        self.attachments += 1
        self._news.clear()
        self._granted = max(self._granted, self._limit())
        codes, audio = self.codes_out, self.audio_out
        return Ready(
            session=self.id,
            presets=self.offer.presets,
            weights=self.offer.weights,
            rates=self.offer.geometry.rates,
            rate=self.offer.rate,
            block=self.offer.geometry.block,
            code_bits=self.offer.geometry.code_bits,
            window=self.limits.window,
            bundle=1 if codes is None else codes.bundle,
            copies=0 if codes is None else codes.copies,
            features=self._features,
            resumed=resume is not None,
            next=0 if self._inlet is None else self._inlet.receiver.next,
            limit=0 if self._inlet is None else self._granted,
            codes_next=0 if codes is None else codes.sender.cursor,
            audio_next=0 if audio is None else audio.sender.cursor,
            keep=self.limits.keep * 1000 // SECOND,
            idle=self.limits.idle * 1000 // SECOND,
        )

    def detach(self, now: int) -> None:
        """Note that the connection is lost; the session can be resumed for ``limits.keep``."""
        self._move(SessionState.DETACHED, now)

    def end(self, now: int) -> None:
        """Note that the session cannot be resumed any more."""
        if self.state is not SessionState.ENDED:
            self._move(SessionState.ENDED, now)

    def expired(self, now: int) -> bool:
        """Tell whether the session has been without a connection for too long."""
        return self.state is SessionState.DETACHED and now - self._since >= self.limits.keep

    def take(self, message: Audio | Codes | Marker | Missing) -> list[Arrived[Block] | Arrived[Chunk] | Lost | Marker]:
        """Take a message of the client's stream; return what is new in it.

        Raises:
            Refused: it is another stream's, or beyond what was granted.
            WireError: it makes no sense, or its position is beyond ``MAX_POSITION``.
        """
        kind = "audio" if isinstance(message, Audio) else "codes" if isinstance(message, Codes) else message.kind
        if self._inlet is None or self._inlet.kind != kind:
            raise Refused(Code.WRONG_ORDER, f"a {self.hello.role} client that sends {self.hello.send} sent {kind}")
        if not isinstance(message, Missing):
            self._check_position(message)
        if isinstance(message, Audio | Codes):
            stop = message.seq + self._inlet.units(message)
            if stop > self._granted:
                raise Refused(Code.OVERRUN, f"unit {stop - 1} was sent; those before {self._granted} are granted")
            if isinstance(message, Audio) and len(message.data) % (2 if self.hello.sample_format == "s16" else 4):
                raise WireError(f"{len(message.data)} bytes are no whole number of {self.hello.sample_format} samples")
        found = self._inlet.take(message)
        for part in found:
            if isinstance(part, Arrived):
                self.pending += 1
                self.pending_bytes += len(part.item.data)
        if self.pending_bytes > self.limits.pending_bytes:
            raise Refused(Code.OVERRUN, f"{self.pending_bytes} bytes wait; {self.limits.pending_bytes} may")
        return found

    def _check_position(self, message: Audio | Codes | Marker) -> None:
        audio = isinstance(message, Audio) or (isinstance(message, Marker) and message.kind == "audio")
        rate = self.hello.sample_rate if audio else RATE
        if message.at is not None and message.at * RATE > MAX_POSITION * rate:
            raise WireError(f"sample {message.at} at {rate} Hz; wanted a position up to {MAX_POSITION} at 16 kHz")

    def ack(self, message: Ack) -> None:
        """Take the client's word for what it has received.

        Raises:
            Refused: it receives no such stream.
            WireError: it never was sent so much.
        """
        outlet = self.codes_out if message.kind == "codes" else self.audio_out
        if outlet is None:
            raise Refused(Code.WRONG_ORDER, f"a client that receives {list(self.hello.receive)} acknowledged others")
        outlet.sender.ack(message.next, message.marker, message.limit)

    def tune(self, wanted: Tune) -> Tune:
        """Do what a client asks for, and return what holds now.

        Raises:
            Refused: it cannot be done; nothing has changed.
        """
        if wanted.rate is not None and (self.hello.send != "audio" or wanted.rate not in self.offer.geometry.rates):
            rates = list(self.offer.geometry.rates)
            raise Refused(Code.BAD_REQUEST, f"rate {wanted.rate}; those who send audio may choose one of {rates}")
        out = self.codes_out
        if out is None and any(v is not None for v in (wanted.latency, wanted.gross, wanted.copies, wanted.bundle)):
            raise Refused(Code.BAD_REQUEST, "a client that receives no codes cannot choose their bundling")
        if wanted.rate is not None:
            self.rate = wanted.rate
        if wanted.latency is not None or wanted.gross is not None:
            self._latency, self._gross = wanted.latency, wanted.gross
        if out is None:
            return Tune(rate=self.rate)
        if wanted.copies is not None:
            out.copies = wanted.copies
        self._bundle(wanted.bundle)
        return Tune(rate=self.rate, copies=out.copies, bundle=out.bundle)

    def pull(self, now: int) -> Message | None:
        """Return the next message for the client, if one is due."""
        if self._inlet is not None and (self._inlet.ack_due or self._grants()):
            self._granted = max(self._granted, self._limit())
            return self._inlet.ack(self._granted)
        if self._news and not self._parting:
            return self._news.pop(next(iter(self._news)))
        outlets = [outlet for outlet in (self.codes_out, self.audio_out) if outlet is not None]
        self._turn += 1
        for i in range(len(outlets)):
            outlet = outlets[(self._turn + i) % len(outlets)]
            message = outlet.pull(now)
            if message is not None:
                if isinstance(message, Codes | Audio):
                    self.net.add(len(message.data), now)
                if not outlet.sender.waiting:
                    self._catching_up.discard(outlet.kind)
                return message
        return self._news.pop(next(iter(self._news))) if self._news else None

    def due(self) -> int | None:
        """Return when :meth:`pull` will have a message if nothing else happens; None for never."""
        if self._news or (self._inlet is not None and (self._inlet.ack_due or self._grants())):
            return 0
        times = [outlet.due() for outlet in (self.codes_out, self.audio_out) if outlet is not None]
        return min((time for time in times if time is not None), default=None)

    @property
    def queued(self) -> bool:
        """Whether anything waits to be sent to the client."""
        return any(
            outlet.sender.front() is not None for outlet in (self.codes_out, self.audio_out) if outlet is not None
        )

    def stats(self, now: int) -> Stats:
        """Return what has been measured."""
        senders = [outlet.sender for outlet in (self.codes_out, self.audio_out) if outlet is not None]
        receiver = None if self._inlet is None else self._inlet.receiver
        lost = sum(sender.lost for sender in senders)
        return Stats(
            net=self.net.rate(now),
            gross_sent=self.sent.rate(now),
            gross_received=self.received.rate(now),
            sent=sum(sender.cursor - sender.first for sender in senders),
            received=0 if receiver is None else receiver.received,
            lost=lost if receiver is None else lost + receiver.lost,
            recovered=0 if receiver is None else receiver.recovered,
            repeated=0 if receiver is None else receiver.repeated,
            queued=self.pending + sum(sender.waiting for sender in senders),
        )

    # The engine's and the room's side

    def done(self, units: int, octets: int) -> None:
        """Note that units from the client have been worked off, which may let it send more.

        Raises:
            StreamError: there were not so many.
        """
        if not 0 <= units <= self.pending or not 0 <= octets <= self.pending_bytes:
            raise StreamError(f"{units} units ({octets} bytes) are done; {self.pending} ({self.pending_bytes}) wait")
        self.pending -= units
        self.pending_bytes -= octets

    def send_block(self, block: Block, now: int) -> None:
        """Queue a block of codes; a client that is too slow is dropped to live."""
        out = self._codes()
        out.push(block, now)
        self._keep_up(out)

    def send_audio(self, data: bytes, at: int, now: int) -> None:
        """Queue samples in the session's format; ``at`` is the position of the first one at the session's rate."""
        out = self._audio()
        width = 2 if self.hello.sample_format == "s16" else 4
        for begin in range(0, len(data), MAX_AUDIO_BYTES):
            out.push(Chunk(data[begin : begin + MAX_AUDIO_BYTES], at + begin // width), now)
        self._keep_up(out)

    def send_lost(self, kind: Kind, count: int, reason: Loss) -> None:
        """Tell the client that the next ``count`` units will never come."""
        out = self._codes() if kind == "codes" else self._audio()
        out.sender.lose(count, reason)

    def mark(self, kind: Kind, *, flush: bool = False, at: int | None = None, tag: int = 0) -> None:
        """Queue a marker."""
        out = self._codes() if kind == "codes" else self._audio()
        out.mark(flush=flush, at=at, tag=tag)

    def tell(self, news: Room | Stats | Tune) -> None:
        """Tell the client, if it wants to know; the latest news of a kind replaces what has not been sent."""
        feature = {Room: "room", Stats: "stats"}.get(type(news))
        if feature is None or feature in self.hello.features:
            self._news[type(news)] = news

    @property
    def _parting(self) -> bool:
        """Whether the publisher has left, which is told behind the last of what it has sent."""
        news = self._news.get(Room)
        return isinstance(news, Room) and not news.live

    def _move(self, state: SessionState, now: int) -> None:
        if (self.state, state) not in SESSION_MOVES:
            raise StreamError(f"a session that is {self.state.value} cannot become {state.value}")
        self.state = state
        self._since = now

    def _codes(self) -> CodesOut:
        if self.codes_out is None:
            raise StreamError("this session receives no codes")
        return self.codes_out

    def _audio(self) -> AudioOut:
        if self.audio_out is None:
            raise StreamError("this session receives no audio")
        return self.audio_out

    def _keep_up(self, outlet: CodesOut | AudioOut) -> None:
        # What gathers without a connection is not the client's slowness: the window bounds it.
        late = self.state is SessionState.ATTACHED and outlet.kind not in self._catching_up
        if late and outlet.sender.waiting > self.limits.slow_high:
            before = outlet.sender.lost
            outlet.sender.drop(self.limits.slow_low, "slow")
            self.dropped += outlet.sender.lost - before

    def _rewind(self, resume: Resume) -> None:
        wanted = {"codes": resume.codes_next, "audio": resume.audio_next}
        outlets = [outlet for outlet in (self.codes_out, self.audio_out) if outlet is not None]
        if any(wanted[outlet.kind] > outlet.sender.next for outlet in outlets):
            raise Refused(Code.UNKNOWN_SESSION, "the client has more than there is; say hello")
        for outlet in outlets:
            outlet.sender.rewind(wanted[outlet.kind])
            self._catching_up.add(outlet.kind)

    def _bundle(self, wanted: int | None) -> None:
        out = self._codes()
        out.bundle = wanted or choose_bundle(
            self._geometry,
            self.rate,
            latency=self._latency,
            gross=self._gross,
            copies=out.copies,
            masked=False,
        )

    def _limit(self) -> int:
        """Return what may be granted now; what has been granted is never taken back."""
        if self._inlet is None:
            return 0
        if self.pending >= self.limits.high:
            self._paused = True
        elif self.pending <= self.limits.low:
            self._paused = False
        return self._granted if self._paused else self._inlet.receiver.next + self.limits.high - self.pending

    def _grants(self) -> bool:
        """Tell whether the client should hear of a new limit before the next acknowledgement."""
        return self._limit() >= self._granted + max(1, self.limits.high // 4)
