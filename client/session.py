"""The client's half of a session, without sockets or a clock: bytes in, events and bytes out.

A :class:`Session` outlives its connections.  The shell calls :meth:`Session.opened` when a socket is open,
:meth:`Session.receive` with what it brings, :meth:`Session.pull` while it can take more, :meth:`Session.tick` when
:meth:`Session.due` says so, and :meth:`Session.disconnected` when it is gone; the answer to that says what to do next.
Time is nanoseconds, passed in.  ``server/PROTOCOL.md`` has the state diagrams.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum

from semanticodec.errors import StreamError, WireError
from semanticodec.wire.blocks import Geometry, Meter, agreed, frame_bytes
from semanticodec.wire.closing import Code
from semanticodec.wire.fields import Message
from semanticodec.wire.messages import (
    KINDS,
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
    Ready,
    Resume,
    Room,
    Stats,
    Tune,
    Unknown,
    decode,
    encode,
)
from semanticodec.wire.packing import Codes as CodesArray

from .events import (
    AudioChunk,
    CodesBlock,
    Drained,
    Ended,
    Event,
    Left,
    Opened,
    Refusal,
    Restarted,
    Samples,
)
from .incoming import Incoming
from .outgoing import Outgoing, merged

SECOND = 1_000_000_000
"""Nanoseconds."""
HANDSHAKE = 10 * SECOND
"""From a socket's opening to ready."""
ASK = 10 * SECOND
"""Silence of the server after which it is asked whether it is there."""
GIVE_UP = 20 * SECOND
"""Silence after which the connection counts as lost (half-open)."""
REPORT = 5 * SECOND
"""Between stats messages, for servers that want them."""
MAX_FAULTS = 4
"""Connections that end over a malformed message, ours or theirs, with no progress between them, until we give up."""


_CODES = {int(code): code for code in Code}


class State(Enum):
    """What has become of a session."""

    DETACHED = "detached"
    ASKED = "asked"
    OPEN = "open"
    CLOSING = "closing"
    ENDED = "ended"


MOVES = frozenset(
    {
        (State.DETACHED, State.ASKED),
        (State.ASKED, State.OPEN),
        *((state, State.CLOSING) for state in (State.ASKED, State.OPEN)),
        *((state, State.DETACHED) for state in (State.ASKED, State.OPEN, State.CLOSING)),
        *((state, State.ENDED) for state in (State.DETACHED, State.ASKED, State.OPEN, State.CLOSING)),
    }
)


class Session:
    """One session of a client.

    Args:
        hello: what to ask the server for.
        now: nanoseconds.

    Attributes:
        state: see the state diagrams.
        ready: what the server said last.
        rate: token rate of the codes that are sent.
        underruns: what the player says; it goes into stats.
        delay: milliseconds, what the player says; it goes into stats.
        close: code and reason to close the socket with, when nothing is left to be pulled.
        restarts: how often the server had forgotten the session.
        unsure: units that may or may not have arrived before a restart, in all.
        openings: connections that came to be open, in all.
        progress: units that are known to have arrived, at either end; it grows while going on makes sense.
    """

    def __init__(self, hello: Hello, now: int) -> None:
        self.hello = hello
        self.state = State.DETACHED
        self.ready: Ready | None = None
        self.rate = self.underruns = self.delay = 0
        self.close: tuple[int, str] | None = None
        self.restarts = self.unsure = self.progress = self.openings = 0
        self.sent, self.received, self.net = Meter(), Meter(), Meter()
        self._now = self._opened = self._heard = self._reported = now
        self._id: bytes | None = None
        self._geometry: Geometry | None = None
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._drains = 0
        self._totals = {"sent": 0, "received": 0, "lost": 0, "recovered": 0, "repeated": 0}
        self._answers: dict[type[Message], Message] = {}
        self._last: Message | None = None
        self._verdict: Left | None = None
        self._leaving = self._pinged = False
        self._wanted: Tune | None = None
        self._tuned = Tune()
        self._drain: int | None = None
        self._asked_drain = False
        self._faults = 0

    # The socket's side

    def opened(self, now: int) -> None:
        """Note that a socket is open: ask for a session, or for the old one.

        Raises:
            StreamError: there is a connection already, or the session is over.
        """
        self._move(State.ASKED)
        self._now = self._opened = self._heard = max(now, self._now)
        for meter in (self.sent, self.received, self.net):
            meter.add(0, self._now)  # so that all divide by the same time
        self.close = self._last = self._verdict = None
        self._pinged = self._asked_drain = False
        self._answers.clear()
        if self._id is None:
            self._answers[Hello] = self.hello
        else:
            codes, audio = (0 if self._incoming is None else self._incoming.next(kind) for kind in KINDS)
            first = 0 if self._outgoing is None else self._outgoing.oldest
            self._answers[Resume] = Resume(self._id, codes, audio, self.hello.token, first)

    def receive(self, data: bytes | str, now: int) -> list[Event]:
        """Take one WebSocket message; never raises, whatever it is."""
        self._now = now = max(now, self._now)
        if self.state not in (State.ASKED, State.OPEN):
            return []
        self._heard = now
        self._pinged = False
        self.received.add(frame_bytes(len(data), masked=False), now)
        before = self.progress
        try:
            if isinstance(data, str):
                raise WireError("a text message; wanted binary ones")
            events = self._take(decode(data))
        except WireError as error:
            self._fault(str(error))
            return []
        self.progress += sum(isinstance(event, CodesBlock | AudioChunk) for event in events)
        self._faults = self._faults if self.progress == before else 0
        return events

    def disconnected(self, code: int | None, reason: str, now: int) -> list[Event]:
        """Note that the socket is gone.

        Args:
            code: of the close frame; None if there was none.
            reason: for people.
            now: nanoseconds.

        Returns:
            :class:`Left` if it is worth connecting again, or :class:`Ended`.
        """
        self._now = max(now, self._now)
        if self.state in (State.DETACHED, State.ENDED):
            return []
        verdict = self._verdict or Left(code, reason)
        if self._leaving:
            return self._end(Code.DONE, "the session has ended as agreed")
        known = _known(verdict.code)
        self._faults += known is Code.BAD_MESSAGE
        then = "resume" if known is None else known.retry
        if then == "no" or self._faults >= MAX_FAULTS:
            return self._end(verdict.code or Code.BAD_MESSAGE, verdict.reason)
        if then == "later":
            self._id = None
        self._move(State.DETACHED)
        return [replace(verdict, wait=0) if known is Code.UNKNOWN_SESSION else verdict]

    def tick(self, now: int) -> None:
        """Let time pass: time-outs, pings, measurements."""
        self._now = now = max(now, self._now)
        if self.state is State.ASKED and now - self._opened >= HANDSHAKE:
            self._shut(Left(None, "the server did not answer hello or resume in time"))
        if self.state is not State.OPEN:
            return
        if now - self._heard >= GIVE_UP:
            self._shut(Left(None, "nothing was heard from the server for too long"))
        elif now - self._heard >= ASK and not self._pinged:
            self._pinged = True
            self._answers[Ping] = Ping()
        if self._reports and now - self._reported >= REPORT:
            self._reported = now
            self._answers[Stats] = self.stats(now)

    def due(self) -> int | None:
        """Return when :meth:`pull` or :meth:`tick` will have something to do; None for never."""
        if self._answers or self._last is not None:
            return 0
        if self.state is State.ASKED:
            return self._opened + HANDSHAKE
        if self.state is not State.OPEN:
            return None
        if (self._incoming is not None and self._incoming.ack_due) or self._drainable:
            return 0
        times = [self._heard + (GIVE_UP if self._pinged else ASK)]
        if self._reports:
            times.append(self._reported + REPORT)
        if self._outgoing is not None and (due := self._outgoing.due()) is not None:
            times.append(due)
        return min(times)

    def pull(self, now: int) -> bytes | None:
        """Return the next message to be sent, if one is due.  Call it only when the socket can take one."""
        self._now = now = max(now, self._now)
        message: Message | None = None
        if self._answers:
            message = self._answers.pop(next(iter(self._answers)))
        elif self.state is State.OPEN:
            message = self._next(now)
        elif self._last is not None:
            message, self._last = self._last, None
        if message is None:
            return None
        if isinstance(message, Codes | Audio):
            self.net.add(len(message.data), now)
        data = encode(message)
        self.sent.add(frame_bytes(len(data), masked=True), now)
        return data

    # The user's side

    @property
    def geometry(self) -> Geometry:
        """What blocks of codes look like.

        Raises:
            StreamError: the server has not said so yet.
        """
        if self._geometry is None:
            raise StreamError("the session has not been open yet; wait for Opened")
        return self._geometry

    @property
    def room(self) -> bool:
        """Whether a unit can be pushed and nothing is forgotten for it."""
        return self._outgoing is not None and self.state is not State.ENDED and self._outgoing.room

    @property
    def flushes(self) -> int:
        """Tag of the last flush."""
        return 0 if self._outgoing is None else self._outgoing.flushes

    def push_samples(self, samples: Samples, now: int) -> None:
        """Queue samples in [-1, 1] at the session's rate as one chunk.

        Raises:
            StreamError: this session does not send audio, or was never open.
            WireError: they are too many for a message, or none.
        """
        self._stream.push_samples(samples, now)

    def push_codes(self, codes: CodesArray, now: int, *, rate: int | None = None, copy: bytes = b"") -> None:
        """Queue a block of codes ``[n_q, frames]``.

        Args:
            codes: as many frames as :attr:`geometry` says for ``rate``.
            now: nanoseconds.
            rate: token rate; None takes :attr:`rate`.
            copy: the same block packed at the lowest rate, for redundancy.

        Raises:
            StreamError: this session does not send codes, or was never open.
            CodesError, CorruptedError: they are no block of this session.
        """
        self._stream.push_codes(codes, self.rate if rate is None else rate, copy, now)

    def flush(self, *, padding: int = 0) -> int:
        """Mark that all that was pushed is to be coded without waiting for more.

        Args:
            padding: samples at 16 kHz at the end of the last block of codes that stand for nothing.

        Returns:
            The marker's tag; the marker that comes back with the last of the results has the same one.

        Raises:
            StreamError: this session sends nothing, or was never open.
        """
        return self._stream.flush(padding)

    def drain(self) -> int:
        """Ask for :class:`Drained`, with the number that is returned, when the server has all that is queued now."""
        self._drains += 1
        self._drain = self._drains
        self._asked_drain = False
        return self._drains

    def tune(self, wanted: Tune) -> Tune | None:
        """Ask for another rate, bundling or redundancy; a new request replaces one that has no answer yet.

        Returns:
            What holds now if that is for this end to say (it sends codes); else None, and a Tune or Refusal will come.

        Raises:
            WireError: there is no such rate.
        """
        if self._outgoing is not None and self._outgoing.kind == "codes":
            answer = self._outgoing.tune(wanted)
            self.rate = self._outgoing.rate
            return answer
        self._wanted = wanted
        if self.state is State.OPEN:
            self._answers[Tune] = wanted
        return None

    def bye(self, now: int) -> list[Event]:
        """End the session; what has not been received yet is lost.  Call :meth:`drain` before, and wait."""
        self._now = max(now, self._now)
        self._leaving = True
        if self.state is State.DETACHED:
            return self._end(Code.DONE, "the session has ended as agreed")
        if self.state in (State.ASKED, State.OPEN):
            self._shut(Left(Code.DONE, "bye"), Bye() if self.state is State.OPEN else None)
        return []

    def abandon(self, code: int, reason: str) -> list[Event]:
        """End a session that has no connection: the shell has given up connecting."""
        return [] if self.state is State.ENDED else self._end(code, reason)

    def stats(self, now: int) -> Stats:
        """Return what has been measured, restarts included."""
        totals = dict(self._totals)
        for name, count in self._counts().items():
            totals[name] += count
        return Stats(
            net=self.net.rate(now),
            gross_sent=self.sent.rate(now),
            gross_received=self.received.rate(now),
            delay=self.delay,
            underruns=self.underruns,
            queued=0 if self._outgoing is None else self._outgoing.counts[2],
            **totals,
        )

    # Inside

    @property
    def _stream(self) -> Outgoing:
        if self._outgoing is None:
            known = "has not been open yet" if self.ready is None else f"sends {self.hello.send}"
            raise StreamError(f"this session {known}; nothing can be pushed")
        return self._outgoing

    @property
    def _reports(self) -> bool:
        return self.ready is not None and "stats" in self.ready.features

    @property
    def _drainable(self) -> bool:
        idle = self._outgoing is None or self._outgoing.empty
        return self._drain is not None and not self._asked_drain and idle

    def _next(self, now: int) -> Message | None:
        if self._incoming is not None and self._incoming.ack_due:
            return self._incoming.ack()
        message = None if self._outgoing is None else self._outgoing.pull(now)
        if message is not None or not self._drainable:
            return message
        self._asked_drain = True
        return Ping(self._drain or 0)

    def _take(self, message: Message | Unknown) -> list[Event]:
        if isinstance(message, Unknown):
            return []
        if message.sender == "client":
            raise WireError(f"{type(message).__name__.lower()} is for clients to send")
        if isinstance(message, Ping):
            self._answers[Pong] = Pong(message.nonce)
            return []
        if isinstance(message, Error | Bye):
            return self._told(message)
        if isinstance(message, Ready) != (self.state is State.ASKED):
            raise WireError(f"{type(message).__name__.lower()} while {self.state.value}")
        return self._begin(message) if isinstance(message, Ready) else self._follow(message)

    def _follow(self, message: Message) -> list[Event]:
        """Take a message of an open session."""
        if isinstance(message, Codes | Audio | Marker | Missing):
            if self._incoming is None:
                raise WireError("units came before the session was open")
            return self._incoming.take(message)
        if isinstance(message, Ack):
            if self._outgoing is None:
                raise WireError(f"units of {message.kind} are acknowledged; this session sends none")
            self.progress += self._outgoing.ack(message)
        elif isinstance(message, Pong):
            if self._asked_drain and message.nonce == self._drain:
                self._drain = None
                return [Drained(message.nonce)]
        elif isinstance(message, Tune):
            return self._settled(message)
        elif isinstance(message, Room | Stats):
            return [message]
        return []

    def _told(self, message: Error | Bye) -> list[Event]:
        refused = isinstance(message, Error) and message.code == Code.BAD_REQUEST and self.state is State.OPEN
        if refused and self._wanted is not None:
            self._wanted = None
            return [Refusal(message.code, message.reason)]
        url = message.url if isinstance(message, Bye) else None
        self._shut(Left(message.code, message.reason, message.retry, url))
        return []

    def _settled(self, answer: Tune) -> list[Event]:
        if self._wanted is not None:
            self._tuned = merged(self._tuned, self._wanted)
            self._wanted = None
        self.rate = answer.rate or self.rate
        return [answer]

    def _begin(self, ready: Ready) -> list[Event]:
        """Open the session: the old one, or a new one in its place."""
        if self._id is not None:
            return self._go_on(ready)
        if ready.resumed:
            raise WireError("the server resumes a session; it was asked for a new one")
        geometry = agreed(Geometry(ready.block, ready.code_bits, ready.rates), ready.presets, ready.features)
        before = self.ready
        if before is not None and self._foreign(before, ready):
            self._shut(Left(Code.BAD_PRESET, "the server came back with other weights; begin anew"), Bye())
            return []
        self._move(State.OPEN)
        self._id, self.ready, self._geometry = ready.session, ready, geometry
        unsure = self._renew(ready, geometry)
        self.rate = ready.rate if self._outgoing is None else self._outgoing.rate
        if before is None:
            self._ask_tune(self._wanted)
            return [Opened(ready, resumed=False)]
        self.restarts += 1
        self.unsure += unsure
        self._totals["lost"] += unsure
        again = self._tuned if self._wanted is None else merged(self._tuned, self._wanted)
        self._ask_tune(None if again == Tune() else again)
        return [Restarted(ready, unsure)]

    def _foreign(self, before: Ready, ready: Ready) -> bool:
        """Tell whether codes of before mean something else now."""
        if "codes" not in (self.hello.send, *self.hello.receive):
            return False
        old, new = ((r.weights, r.rates, r.block, r.code_bits) for r in (before, ready))
        return old != new

    def _go_on(self, ready: Ready) -> list[Event]:
        """Resume."""
        try:
            if not ready.resumed or ready.session != self._id:
                raise WireError("the server answered resume with another session")
            if self._outgoing is not None:
                self._outgoing.resume(ready)
        except WireError:
            self._id = None
            raise
        self._move(State.OPEN)
        self.ready = ready
        self._ask_tune(self._wanted)
        return [Opened(ready, resumed=True)]

    def _ask_tune(self, wanted: Tune | None) -> None:
        self._wanted = wanted
        if wanted is not None:
            self._answers[Tune] = wanted

    def _renew(self, ready: Ready, geometry: Geometry) -> int:
        """Make the streams of a new session; return how many units of the old one may or may not have arrived."""
        for name, count in self._counts().items():
            self._totals[name] += count
        flushed = None if self._incoming is None or not self.hello.receive else self._incoming.flushed
        self._incoming = Incoming(self.hello, geometry, ready)
        old, self._outgoing = self._outgoing, None
        if self.hello.send is None:
            return 0
        self._outgoing = Outgoing(self.hello.send, self.hello, geometry, ready)
        return 0 if old is None else self._outgoing.inherit(old, flushed)

    def _counts(self) -> dict[str, int]:
        sent, lost, _ = (0, 0, 0) if self._outgoing is None else self._outgoing.counts
        counts = {} if self._incoming is None else self._incoming.counts()
        return counts | {"sent": sent, "lost": lost + counts.get("lost", 0)}

    def _fault(self, reason: str) -> None:
        self._shut(Left(Code.BAD_MESSAGE, reason), Error(int(Code.BAD_MESSAGE), "the message breaks the protocol"))

    def _shut(self, verdict: Left, last: Message | None = None) -> None:
        """Leave this connection, with ``last`` as the last message."""
        self._move(State.CLOSING)
        self._verdict = verdict
        self._answers.clear()
        self._last = last
        self.close = (Code.BAD_MESSAGE if isinstance(last, Error) else Code.DONE), ""

    def _end(self, code: int, reason: str) -> list[Event]:
        self._move(State.ENDED)
        self._answers.clear()
        self._last = None
        return [Ended(code, reason)]

    def _move(self, state: State) -> None:
        if (self.state, state) not in MOVES:
            raise StreamError(f"a session that is {self.state.value} cannot become {state.value}")
        self.state = state
        self.openings += state is State.OPEN


def _known(code: int | None) -> Code | None:
    return None if code is None else _CODES.get(code)
