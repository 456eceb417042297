"""The server's half of one connection, without a socket or a clock: bytes in, events and bytes out.

The shell calls :meth:`Connection.receive` with what the socket brings, :meth:`Connection.pull` while the socket can
take more, and :meth:`Connection.tick` now and then; it answers :class:`Asked` with :meth:`Connection.accept` or
:meth:`Connection.refuse`, and hands on the other events.  When :attr:`Connection.close` is set and nothing is left to
be pulled, it closes the socket with that code.  Time is nanoseconds; a clock that goes back stands still.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from semanticodec.errors import StreamError, WireError
from semanticodec.wire.blocks import Block, Chunk, frame_bytes
from semanticodec.wire.channel import Arrived
from semanticodec.wire.closing import Code
from semanticodec.wire.fields import Message, short
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import (
    MAX_MESSAGE,
    Ack,
    Audio,
    Bye,
    Codes,
    Error,
    Hello,
    Marker,
    Missing,
    Ping,
    Pong,
    Resume,
    Stats,
    Tune,
    Unknown,
    decode,
    encode,
)

from .limits import Limits, Throttle
from .session import Refused, Session


class State(Enum):
    """How far a connection has come."""

    WAITING = "waiting"
    ASKED = "asked"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


CONNECTION_MOVES = frozenset(
    {
        (State.WAITING, State.ASKED),
        (State.WAITING, State.CLOSING),
        (State.WAITING, State.CLOSED),
        (State.ASKED, State.OPEN),
        (State.ASKED, State.CLOSING),
        (State.ASKED, State.CLOSED),
        (State.OPEN, State.CLOSING),
        (State.OPEN, State.CLOSED),
        (State.CLOSING, State.CLOSED),
    }
)


@dataclass(frozen=True)
class Asked:
    """The client wants a session: accept or refuse."""

    request: Hello | Resume


@dataclass(frozen=True)
class Left:
    """The session has lost its connection, and ends unless it is ``resumable``."""

    code: Code | None
    reason: str
    resumable: bool


Event = Asked | Left | Arrived[Block] | Arrived[Chunk] | Lost | Marker | Tune | Stats | Bye
"""What happens: units, losses and markers of the client's stream, its wishes, its measurements, its going.

A transcoder's bye is answered when it has got what it has coming: when :meth:`Connection.finish` was called."""


class Connection:
    """One WebSocket of a client.

    Args:
        limits: its bounds.
        now: nanoseconds.

    Attributes:
        state: how far it has come.
        session: once it is open.
        close: code and reason to close the socket with, when nothing is left to be pulled.
        ignored: messages of unknown types, in all.
    """

    def __init__(self, limits: Limits, now: int) -> None:
        self.state = State.WAITING
        self.session: Session | None = None
        self.close: tuple[Code, str] | None = None
        self.ignored = 0
        self._limits = limits
        self._now = self._opened = self._heard = self._reported = now
        self._pinged: int | None = None
        self._attachment = 0
        self._early = 0
        self._parting = self._finished = False
        # One of each, so that no flood of requests grows them: a later answer replaces an earlier one.
        self._answers: dict[type[Message], Message] = {}
        self._last: Message | None = None
        self._messages = Throttle(limits.messages, limits.burst, now)
        self._octets = Throttle(limits.octets, limits.burst, now)

    def receive(self, data: bytes | str, now: int) -> list[Event]:
        """Take one WebSocket message; never raises, whatever it is."""
        self._now = now = max(now, self._now)
        replaced = self.session is not None and not self._holds(self.session)
        if replaced or self.state in (State.CLOSING, State.CLOSED):
            return []
        self._heard = now
        self._pinged = None
        self._count(frame_bytes(len(data), masked=True))
        try:
            if not self._messages.take(1, now) or not self._octets.take(len(data), now):
                limits = self._limits
                raise Refused(
                    Code.TOO_MANY, f"more than {limits.messages} messages or {limits.octets} bytes per second"
                )
            if len(data) > MAX_MESSAGE:
                raise Refused(Code.TOO_BIG, f"a message of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
            if isinstance(data, str):
                raise WireError("a text message; wanted binary ones")
            return self._take(decode(data))
        except Refused as error:
            return self._end(error.code, str(error))
        except WireError as error:
            return self._end(Code.BAD_MESSAGE, str(error))

    def accept(self, session: Session, request: Hello | Resume, now: int) -> list[Event]:
        """Answer :class:`Asked`: let the client have a session, new or old.

        Returns:
            :class:`Left` if the client's claims contradict the session, which then is as it was.

        Raises:
            StreamError: nothing was asked.
        """
        self._now = now = max(now, self._now)
        self._move(State.OPEN, within=State.ASKED)
        try:
            ready = session.attach(request if isinstance(request, Resume) else None, now)
        except Refused as error:
            return self._end(error.code, str(error))
        self.session = session
        self._attachment = session.attachments
        self._count(0)
        self._answers[type(ready)] = ready
        return []

    def refuse(self, code: Code, reason: str, retry: int | None = None) -> None:
        """Answer :class:`Asked`: no.

        Args:
            code: why.
            reason: for people.
            retry: milliseconds after which it may ask again.
        """
        self._finish(Error(int(code), clip(reason), retry), code, reason)

    def bye(
        self, code: Code, reason: str, now: int, *, retry: int | None = None, url: str | None = None
    ) -> list[Event]:
        """Close from this side: drain, a session that ends or was taken over by another connection."""
        self._now = max(now, self._now)
        if self.state in (State.CLOSING, State.CLOSED):
            return []
        return self._end(code, reason, Bye(int(code), clip(reason), retry, url))

    def finish(self) -> None:
        """Answer a transcoder's bye when all that is queued now has been sent."""
        self._finished = True

    def lost(self, now: int) -> list[Event]:
        """Note that the socket is gone."""
        self._now = now = max(now, self._now)
        if self.state is State.CLOSED:
            return []
        closing = self.state is State.CLOSING
        self._move(State.CLOSED)
        self._answers.clear()
        self._last = None
        return [] if closing else self._leave(None, "the connection was lost", resumable=True)

    def tick(self, now: int) -> list[Event]:
        """Let time pass: time-outs, pings, measurements."""
        self._now = now = max(now, self._now)
        limits = self._limits
        if self._ends:
            return self._end(Code.DONE, "the client has said bye")
        if self.state is State.WAITING and now - self._opened >= limits.handshake:
            return self._end(Code.SLOW_HANDSHAKE, "no hello or resume in time")
        if self.state is not State.OPEN or self.session is None:
            return []
        if now - self._heard >= limits.idle:
            return self._end(Code.IDLE, "nothing was heard for too long")
        if now - self._heard >= limits.ping and self._pinged is None:
            self._pinged = now
            self._answers[Ping] = Ping()
        if now - self._reported >= limits.stats:
            self._reported = now
            self.session.tell(self.session.stats(now))
        return []

    def due(self) -> int | None:
        """Return when :meth:`pull` or :meth:`tick` will have something to do; None for never."""
        if self._answers or self._last is not None or self._ends:
            return 0
        if self.state is State.WAITING:
            return self._opened + self._limits.handshake
        if self.state is not State.OPEN or self.session is None:
            return None
        limits = self._limits
        times = [self._heard + (limits.ping if self._pinged is None else limits.idle), self._reported + limits.stats]
        stream = self.session.due()
        return min(times if stream is None else [*times, stream])

    def pull(self, now: int) -> bytes | None:
        """Return the next message to be sent, if one is due.  Call it only when the socket can take one."""
        self._now = now = max(now, self._now)
        message: Message | None = None
        if self._answers:
            message = self._answers.pop(next(iter(self._answers)))
        elif self.state is State.OPEN and self.session is not None and self._holds(self.session):
            message = self.session.pull(now)
        elif self._last is not None:
            message, self._last = self._last, None
        if message is None:
            return None
        data = encode(message)
        if self.session is not None:
            self.session.sent.add(frame_bytes(len(data), masked=False), now)
        return data

    def _take(self, message: Message | Unknown) -> list[Event]:
        if isinstance(message, Unknown):
            self.ignored += 1
            return []
        if isinstance(message, Ping):
            self._answers[Pong] = Pong(message.nonce)
            return []
        if message.sender == "server":
            raise Refused(Code.WRONG_ORDER, f"{_name(message)} is for servers to send")
        if self.state is State.WAITING and isinstance(message, Hello | Resume):
            self._move(State.ASKED)
            return [Asked(message)]
        if self.session is None or isinstance(message, Hello | Resume):
            raise Refused(Code.WRONG_ORDER, f"{_name(message)} while {self.state.value}")
        return self._take_open(self.session, message)

    @property
    def _ends(self) -> bool:
        return self._finished and self.state is State.OPEN and (self.session is None or not self.session.queued)

    def _take_open(self, session: Session, message: Message) -> list[Event]:
        if self._parting and not isinstance(message, Ack | Error):
            return []
        if isinstance(message, Codes | Audio | Marker | Missing):
            return [*session.take(message)]
        if isinstance(message, Ack):
            session.ack(message)
        elif isinstance(message, Tune):
            return self._tune(session, message)
        elif isinstance(message, Stats):
            return [message]
        elif isinstance(message, Bye) and session.hello.role == "transcode":
            self._parting = True
            return [message]
        elif isinstance(message, Bye):
            return self._end(Code.DONE, f"the client said bye {short(message.reason)}")
        elif isinstance(message, Error):
            return self._end(Code.INTERNAL, f"the client reports {message.code} {short(message.reason)}")
        return []

    def _tune(self, session: Session, wanted: Tune) -> list[Event]:
        try:
            self._answers[Tune] = session.tune(wanted)
        except Refused as error:
            self._answers[Error] = Error(int(error.code), clip(str(error)))
            return []
        return [wanted]

    def _end(self, code: Code, reason: str, last: Message | None = None) -> list[Event]:
        """Close the connection, and the session too if the code does not say that it may be resumed."""
        if last is None:
            last = Bye(int(code)) if code is Code.DONE else Error(int(code), clip(reason))
        self._finish(last, code, reason)
        return self._leave(code, reason, resumable=code.retry == "resume")

    def _finish(self, last: Message, code: Code, reason: str) -> None:
        self._move(State.CLOSING)
        self._answers.clear()
        self._last = last
        self.close = code, clip(reason, 123)

    def _leave(self, code: Code | None, reason: str, *, resumable: bool) -> list[Event]:
        session = self.session
        if session is None or not self._holds(session) or code is Code.REPLACED:
            return []
        resumable = resumable and not self._parting
        if resumable:
            session.detach(self._now)
        else:
            session.end(self._now)
        return [Left(code, reason, resumable)]

    def _count(self, octets: int) -> None:
        """Count bytes received; those that came before there was a session, when there is one."""
        self._early += octets
        if self.session is not None:
            self.session.received.add(self._early, self._now)
            self._early = 0

    def _holds(self, session: Session) -> bool:
        """Tell whether no other connection has taken the session over."""
        return session.attachments == self._attachment

    def _move(self, state: State, within: State | None = None) -> None:
        if (self.state, state) not in CONNECTION_MOVES or (within is not None and self.state is not within):
            raise StreamError(f"a connection that is {self.state.value} cannot become {state.value}")
        self.state = state


def clip(reason: str, size: int = 256) -> str:
    """Make a reason fit its field (or, with 123 bytes, a close frame)."""
    plain = "".join(c if c.isprintable() else "?" for c in reason)
    return plain.encode(errors="replace")[:size].decode(errors="ignore")


def _name(message: Message) -> str:
    return type(message).__name__.lower()
