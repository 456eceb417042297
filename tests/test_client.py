"""The client: its session over an in-memory pipe, then over real sockets, against a scripted server made of wire."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result
from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from semanticodec.errors import AudioError, CodesError, StreamError, WireError
from semanticodec.wire.blocks import Block, Chunk, Geometry
from semanticodec.wire.channel import Arrived, AudioOut, CodesOut, Inlet
from semanticodec.wire.closing import Code
from semanticodec.wire.fields import Message
from semanticodec.wire.link import Lost, Sender
from semanticodec.wire.messages import (
    SUBPROTOCOL,
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
    decode,
    encode,
)
from semanticodec_client import ConnectionEnded, Refused, Retry, connect, sync
from semanticodec_client.__main__ import app
from semanticodec_client.events import (
    AudioChunk,
    CodesBlock,
    Drained,
    Ended,
    Event,
    Gap,
    Left,
    Opened,
    Refusal,
    Restarted,
)
from semanticodec_client.inbox import Inbox
from semanticodec_client.session import ASK, GIVE_UP, HANDSHAKE, MAX_FAULTS, SECOND, Session, State
from semanticodec_client.sound import microphone

GEOMETRY = Geometry(block=5120, code_bits=(12, 13), rates=(100, 50, 25))
PUBLISH = Hello("publish", send="audio", room="den")
PUBLISH_CODES = Hello("publish", send="codes", room="den")
SUBSCRIBE = Hello("subscribe", receive=("codes",), room="den")
TRANSCODE = Hello("transcode", send="audio", receive=("audio",))


def pcm(number: int) -> np.ndarray:
    """A chunk that tells its number, and survives 16 bits."""
    return np.array([number % 30_000, number // 30_000], np.float32) / 32768


def number_of(data: bytes) -> int:
    low, high = np.frombuffer(data, "<i2").tolist()
    return low + 30_000 * high


def block(number: int, rate: int = 100) -> np.ndarray:
    codes = np.zeros((2, GEOMETRY.frames(rate)), np.int64)
    codes[:, 0] = number % 4096, number // 4096
    return codes


@dataclass
class Kept:
    """What the scripted server keeps of a session."""

    hello: Hello
    inlet: Inlet | None
    codes: CodesOut | None
    audio: AudioOut | None
    got: list[Arrived[Block] | Arrived[Chunk] | Lost | Marker] = field(default_factory=list)
    granted: int = 0

    @property
    def numbers(self) -> list[int]:
        """The numbers in the units that came."""
        return [number_of(part.item.data) for part in self.got if isinstance(part, Arrived)]


class Server:
    """A server that sends audio back, and remembers sessions until told otherwise."""

    def __init__(self, window: int = 16, high: int = 8) -> None:
        self.window, self.high = window, high
        self.sessions: dict[bytes, Kept] = {}
        self.refuse: list[Message] = []
        self.answers: dict[type[Message], Message | None] = {}
        self.heard: list[Message] = []
        self.made = 0

    def last(self) -> Kept:
        return next(reversed(self.sessions.values()))


class End:
    """The server's end of one connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.session: Kept | None = None
        self.out: deque[Message] = deque()
        self.closing: int | None = None

    def receive(self, data: bytes) -> None:
        message = decode(data)
        self.server.heard.append(message)
        if self.closing is not None:
            return
        if isinstance(message, Ping):
            self.out.append(Pong(message.nonce))
        elif isinstance(message, Hello | Resume):
            self._begin(message)
        elif isinstance(message, Audio | Codes | Marker | Missing):
            self._take(message)
        elif isinstance(message, Ack):
            assert self.session is not None
            outlet = self.session.codes if message.kind == "codes" else self.session.audio
            assert outlet is not None
            outlet.sender.ack(message.next, message.marker)
        elif type(message) in self.server.answers:
            answer = self.server.answers[type(message)]
            if answer is not None:
                self.out.append(answer)
        elif isinstance(message, Bye):
            self.closing = Code.DONE

    def _begin(self, message: Hello | Resume) -> None:
        server = self.server
        if server.refuse:
            self._close(server.refuse.pop(0))
        elif isinstance(message, Hello):
            server.made += 1
            name = server.made.to_bytes(16, "big")
            self.session = server.sessions[name] = self._made(message)
            self.out.append(self._ready(name))
        elif (kept := server.sessions.get(message.session)) is None:
            self._close(Error(int(Code.UNKNOWN_SESSION), "who?"))
        else:
            self.session = kept
            for outlet, first in ((kept.codes, message.codes_next), (kept.audio, message.audio_next)):
                if outlet is not None:
                    outlet.sender.rewind(first)
            self.out.append(self._ready(message.session, resumed=True))

    def _made(self, hello: Hello) -> Kept:
        window = self.server.window
        return Kept(
            hello,
            None if hello.send is None else Inlet(hello.send, GEOMETRY, 100, window),
            CodesOut(GEOMETRY, 100, Sender(window, 1 << 20, overflow="window")) if "codes" in hello.receive else None,
            AudioOut(Sender(window, 1 << 20, overflow="window")) if "audio" in hello.receive else None,
        )

    def _ready(self, name: bytes, *, resumed: bool = False) -> Ready:
        kept = self.server.sessions[name]
        first = 0 if kept.inlet is None else kept.inlet.receiver.next
        kept.granted = max(kept.granted, first + self.server.high)
        return Ready(
            session=name,
            presets=("mini-100", "mini-50", "mini-25"),
            weights=("0123abcd", "4567cdef", "89abcdef"),
            rates=GEOMETRY.rates,
            rate=100,
            block=GEOMETRY.block,
            code_bits=GEOMETRY.code_bits,
            window=self.server.window,
            features=kept.hello.features,
            resumed=resumed,
            next=first,
            limit=kept.granted,
            codes_next=0 if kept.codes is None else kept.codes.sender.cursor,
            audio_next=0 if kept.audio is None else kept.audio.sender.cursor,
        )

    def _take(self, message: Audio | Codes | Marker | Missing) -> None:
        kept = self.session
        assert kept is not None
        assert kept.inlet is not None
        for part in kept.inlet.take(message):
            kept.got.append(part)
            if isinstance(part, Arrived):
                assert part.seq < kept.granted, "beyond the limit"
            if isinstance(part, Marker):
                for outlet in filter(None, (kept.codes, kept.audio)):
                    outlet.mark(flush=part.flush, at=part.at, tag=part.tag)
            elif kept.audio is not None and isinstance(part, Arrived) and isinstance(part.item, Chunk):
                kept.audio.push(part.item, 0)
            elif kept.audio is not None and isinstance(part, Lost):
                kept.audio.sender.lose(part.stop - part.seq, "source")
        if kept.inlet.ack_due or kept.granted - kept.inlet.receiver.next < self.server.high // 2:
            kept.granted = kept.inlet.receiver.next + self.server.high
            self.out.append(kept.inlet.ack(kept.granted))

    def _close(self, message: Message) -> None:
        assert isinstance(message, Error | Bye)
        self.out.append(message)
        self.closing = message.code

    def pull(self) -> bytes | None:
        if self.out:
            return encode(self.out.popleft())
        for outlet in () if self.session is None else (self.session.codes, self.session.audio):
            message = None if outlet is None else outlet.pull(1 << 62)
            if message is not None:
                return encode(message)
        return None


class Pipe:
    """A client's session and a server, and what is on its way between them."""

    def __init__(self, hello: Hello, server: Server | None = None) -> None:
        self.server = server or Server()
        self.now = 0
        self.client = Session(hello, 0)
        self.end: End | None = None
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.events: list[Event] = []

    def open(self) -> None:
        self.client.opened(self.now)
        self.end = End(self.server)

    def send(self, most: int = 1 << 30) -> None:
        """Let both ends write up to ``most`` messages."""
        for _ in range(most):
            data = self.client.pull(self.now)
            if data is None:
                break
            self.up.append(data)
        for _ in range(most):
            answer = None if self.end is None else self.end.pull()
            if answer is None:
                break
            self.down.append(answer)

    def carry(self, up: int = 1 << 30, down: int = 1 << 30) -> None:
        """Deliver so many messages in each direction."""
        for _ in range(min(up, len(self.up))):
            assert self.end is not None
            self.end.receive(self.up.popleft())
        for _ in range(min(down, len(self.down))):
            self.events += self.client.receive(self.down.popleft(), self.now)

    def push(self, first: int, count: int) -> int:
        """Push as a client does that is not live: no more than is kept; return the next number."""
        while count and self.client.room:
            self.client.push_samples(pcm(first), self.now)
            first, count = first + 1, count - 1
        return first

    def cut(self, code: int | None = None) -> list[Event]:
        """Lose the connection, and all that was on its way."""
        self.up.clear()
        self.down.clear()
        self.end = None
        events = self.client.disconnected(code, "cut", self.now)
        self.events += events
        return events

    def settle(self) -> None:
        """Exchange until nobody has anything to say, and the connection if it is being closed."""
        while True:
            self.send()
            if not self.up and not self.down:
                break
            self.carry()
        if self.end is not None and (self.client.close is not None or self.end.closing is not None):
            self.cut(self.end.closing)

    def start(self) -> Pipe:
        self.open()
        self.settle()
        assert self.client.state is State.OPEN
        return self

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


# The session


def test_a_session_begins_sends_and_ends():
    pipe = Pipe(PUBLISH).start()
    assert pipe.of(Opened)[0].resumed is False
    for i in range(20):
        pipe.client.push_samples(pcm(i), 0)
        pipe.settle()
    pipe.client.flush()
    pipe.client.drain()
    pipe.settle()
    assert pipe.of(Drained) == [Drained(1)]
    kept = pipe.server.last()
    assert kept.numbers == list(range(20))
    assert kept.got[-1] == Marker(id=1, seq=20, flush=True, at=40, kind="audio", tag=1)
    assert pipe.client.bye(0) == []
    pipe.settle()
    assert pipe.of(Ended) == [Ended(Code.DONE, "the session has ended as agreed")]
    assert isinstance(pipe.server.heard[-1], Bye)
    assert (pipe.client.stats(0).sent, pipe.client.stats(0).lost) == (20, 0)


def test_a_client_sends_no_more_than_it_may():
    pipe = Pipe(PUBLISH, Server(high=4)).start()
    pipe.end.receive = lambda data: pipe.server.heard.append(decode(data))  # takes, but never grants
    for i in range(10):
        pipe.client.push_samples(pcm(i), 0)
    pipe.settle()
    assert [message.seq for message in pipe.server.heard if isinstance(message, Audio)] == [0, 1, 2, 3]
    assert pipe.client.stats(0).queued == 6


def test_a_live_client_that_runs_dry_keeps_the_newest_and_says_what_is_lost():
    pipe = Pipe(PUBLISH, Server(window=16, high=8)).start()
    assert pipe.client.room
    for i in range(40):
        pipe.client.push_samples(pcm(i), 0)
    assert not pipe.client.room
    pipe.settle()
    kept = pipe.server.last()
    assert kept.numbers == list(range(24, 40))
    assert kept.got[0] == Lost(0, 24, "overload")
    assert pipe.client.stats(0).lost == 24


def test_codes_are_bundled_and_carry_their_rate_and_copies():
    pipe = Pipe(PUBLISH_CODES, Server(window=64, high=64)).start()
    assert pipe.client.tune(Tune(latency=1000, copies=1)) == Tune(rate=100, copies=1, bundle=4)
    for i in range(8):
        pipe.client.push_codes(block(i), 0, copy=GEOMETRY.pack(block(i, 25), 25))
    assert pipe.client.tune(Tune(rate=50)).rate == 50
    pipe.client.push_codes(block(8, 50), 0)
    pipe.client.flush(padding=120)
    pipe.client.push_codes(block(9, 50), 0)
    pipe.now = 10 * SECOND
    pipe.settle()
    sent = [message for message in pipe.server.heard if isinstance(message, Codes)]
    assert [(m.seq, len(m.data), m.rate, m.at) for m in sent] == [
        (0, 200, None, None),
        (4, 200, None, None),
        (8, 25, 50, None),
        (9, 25, 50, 9 * 5120 - 120),
    ]
    assert (sent[1].copies, sent[1].copy_rate) == (GEOMETRY.pack(block(3, 25), 25), 25)
    arrived = [part for part in pipe.server.last().got if isinstance(part, Arrived)]
    for i in (3, 8):
        np.testing.assert_array_equal(
            GEOMETRY.unpack(arrived[i].item.data, arrived[i].item.rate), block(i, 50 if i == 8 else 100)
        )
    with pytest.raises(WireError, match="rate 99"):
        pipe.client.tune(Tune(rate=99))


def test_what_is_received_comes_as_codes_gaps_and_markers():
    pipe = Pipe(SUBSCRIBE).start()
    codes = pipe.server.last().codes
    codes.push(Block(GEOMETRY.pack(block(7), 100), 100, 0), 0)
    codes.sender.lose(2, "source")
    codes.push(Block(GEOMETRY.pack(block(8, 50), 50), 50, 3 * 5120), 0)
    codes.mark(flush=True, at=4 * 5120 - 10)
    pipe.settle()
    first, gap, second, marker = pipe.events[1:]
    assert (first.seq, first.at, first.rate, second.seq, second.at, second.rate) == (0, 0, 100, 3, 15360, 50)
    np.testing.assert_array_equal(second.codes, block(8, 50))
    assert gap == Gap("codes", 1, 3, "source")
    assert (marker.flush, marker.at) == (True, 4 * 5120 - 10)


def test_received_units_are_acknowledged_every_quarter_window():
    pipe = Pipe(SUBSCRIBE, Server(window=16)).start()
    for i in range(40):
        pipe.server.last().codes.push(Block(GEOMETRY.pack(block(i), 100), 100, i * 5120), 0)
        pipe.settle()
    assert pipe.server.last().codes.sender.kept < 16 // 4
    assert [event.seq for event in pipe.of(CodesBlock)] == list(range(40))


@given(st.data())
def test_nothing_is_lost_or_doubled_however_often_the_connection_is_cut(data: st.DataObject):
    pipe = Pipe(TRANSCODE, Server(window=16, high=8))
    pushed = 0
    for _ in range(data.draw(st.integers(1, 40), label="steps")):
        match data.draw(st.sampled_from(["push", "send", "carry", "carry", "cut"]), label="step"):
            case "push":
                pushed = pipe.push(pushed, data.draw(st.integers(1, 8)))
            case "send" if pipe.client.state is not State.DETACHED:
                pipe.send(data.draw(st.integers(1, 5)))
            case "carry":
                if pipe.end is None:
                    pipe.open()
                    pipe.send()
                pipe.carry(data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6)))
            case "cut" if pipe.end is not None:
                pipe.cut()
    if pipe.end is None:
        pipe.open()
    pipe.settle()
    assert pipe.server.last().numbers == list(range(pushed))
    assert not any(isinstance(part, Lost) for part in pipe.server.last().got)
    # The server keeps 16 units for us; what it forgot while we were away is announced, all else came once.
    heard = [number_of((event.samples * 32768).astype("<i2").tobytes()) for event in pipe.of(AudioChunk)]
    gone = [number for gap in pipe.of(Gap) for number in range(gap.seq, gap.stop)]
    assert sorted(heard + gone) == list(range(pushed))
    assert heard == sorted(heard)


def test_five_hundred_cuts_and_every_unit_arrives_once():
    rng = random.Random(0)
    pipe = Pipe(TRANSCODE, Server(window=64, high=64)).start()
    pushed = cuts = 0
    while cuts < 500:
        pushed = pipe.push(pushed, rng.randrange(3))
        pipe.send(rng.randrange(4))
        pipe.carry(rng.randrange(4), rng.randrange(4))
        if rng.random() < 0.2:
            assert isinstance(pipe.cut()[0], Left)
            cuts += 1
            pipe.open()
    pipe.settle()
    heard = [number_of((event.samples * 32768).astype("<i2").tobytes()) for event in pipe.of(AudioChunk)]
    assert pushed > 500
    assert pipe.server.last().numbers == list(range(pushed))
    assert heard == list(range(pushed))
    assert len(pipe.server.sessions) == 1


def test_a_forgotten_session_begins_anew_and_says_what_is_unsure():
    pipe = Pipe(TRANSCODE, Server(high=8)).start()
    for i in range(3):
        pipe.client.push_samples(pcm(i), 0)
    pipe.send()  # 0 to 2 are on their way
    for i in range(3, 6):
        pipe.client.push_samples(pcm(i), 0)
    pipe.client.flush()
    pipe.server.sessions.clear()
    pipe.cut()
    pipe.open()
    pipe.settle()
    assert pipe.of(Left)[-1] == Left(Code.UNKNOWN_SESSION, "who?", wait=0)
    pipe.open()
    pipe.settle()
    assert [event.unsure for event in pipe.of(Restarted)] == [3]
    assert pipe.server.last().numbers == [3, 4, 5]
    assert [part.item.at for part in pipe.server.last().got[:3]] == [0, 2, 4]
    assert pipe.server.last().got[3] == Marker(id=1, seq=3, flush=True, at=6, kind="audio", tag=1)
    assert [event.at for event in pipe.of(AudioChunk)] == [0, 2, 4]
    assert (pipe.client.restarts, pipe.client.unsure, pipe.client.stats(0).lost) == (1, 3, 3)


def test_a_flush_whose_answer_died_with_the_session_is_repeated():
    pipe = Pipe(TRANSCODE).start()
    pipe.client.push_samples(pcm(0), 0)
    tag = pipe.client.flush()
    pipe.send()
    pipe.carry(down=0)
    pipe.server.sessions.clear()
    pipe.cut()
    for _ in range(2):
        pipe.open()
        pipe.settle()
    assert [marker.tag for marker in pipe.of(Marker)] == [tag]


def test_other_weights_after_a_restart_end_a_session_of_codes():
    pipe = Pipe(PUBLISH_CODES).start()
    pipe.cut(Code.TOO_MANY)  # begin anew
    pipe.open()
    made = pipe.end._ready
    pipe.end._ready = lambda name: Ready(**{**vars(made(name)), "weights": ("ffffffff",) * 3})
    pipe.settle()
    assert pipe.of(Ended)[-1].code == Code.BAD_PRESET


@pytest.mark.parametrize("code", list(Code))
def test_every_close_code_is_obeyed(code: Code):
    pipe = Pipe(PUBLISH).start()
    pipe.end._close(
        Bye(int(code), "so", retry=700) if code in (Code.DONE, Code.ELSEWHERE) else Error(int(code), "so", 700)
    )
    pipe.settle()
    last = pipe.events[-1]
    if code.retry == "no":
        assert last == Ended(code, "so")
        with pytest.raises(StreamError, match="ended cannot become asked"):
            pipe.open()
        return
    assert last == Left(code, "so", 0 if code is Code.UNKNOWN_SESSION else 700)
    pipe.open()
    pipe.settle()
    assert isinstance(pipe.server.heard[-1], Resume if code.retry == "resume" else Hello)


@pytest.mark.parametrize(("code", "ends"), [(1006, False), (None, False), (1001, False), (4401, True), (4999, False)])
def test_a_close_frame_alone_is_obeyed_too(code: int | None, ends: bool):
    pipe = Pipe(PUBLISH).start()
    assert isinstance(pipe.cut(code)[0], Ended if ends else Left)


def test_a_server_that_goes_away_says_where_to_go():
    pipe = Pipe(PUBLISH).start()
    pipe.end._close(Bye(int(Code.ELSEWHERE), "drain", 50, "wss://b.example/"))
    pipe.settle()
    assert pipe.events[-1] == Left(Code.ELSEWHERE, "drain", 50, "wss://b.example/")


def test_silence_is_asked_about_and_then_given_up():
    pipe = Pipe(PUBLISH).start()
    assert pipe.client.due() == ASK
    pipe.client.tick(ASK)
    assert decode(pipe.client.pull(ASK)) == Ping()
    assert pipe.client.due() == GIVE_UP
    pipe.client.tick(GIVE_UP)
    assert pipe.client.close == (Code.DONE, "")
    assert isinstance(pipe.cut()[0], Left)
    pipe.now = GIVE_UP
    pipe.open()
    pipe.send()
    assert pipe.client.due() == GIVE_UP + HANDSHAKE
    pipe.client.tick(GIVE_UP + HANDSHAKE)
    assert pipe.client.close is not None


@pytest.mark.parametrize(
    "data",
    [
        "text",
        b"\xc1",
        encode(Hello("publish", send="audio", room="den")),
        encode(Audio(0, 0, bytes(2))),
        encode(Ack(5, kind="audio")),
        encode(Ack(0, kind="codes")),
        encode(Ready(bytes(16), ("a",), ("00000000",), (100,), 100, 5120, (12, 13), 8)),
    ],
)
def test_a_server_that_breaks_the_protocol_is_told_and_at_last_given_up(data: bytes | str):
    pipe = Pipe(PUBLISH).start()
    for i in range(MAX_FAULTS):
        assert pipe.client.receive(data, 0) == []
        assert pipe.client.close == (Code.BAD_MESSAGE, "")
        assert decode(pipe.client.pull(0)).code == Code.BAD_MESSAGE
        last = pipe.cut()[0]
        assert isinstance(last, Ended if i == MAX_FAULTS - 1 else Left)
        if i < MAX_FAULTS - 1:
            pipe.start()


def test_a_server_that_refuses_the_same_again_and_again_is_given_up():
    pipe = Pipe(PUBLISH).start()
    for _ in range(MAX_FAULTS - 1):
        assert isinstance(pipe.cut(Code.BAD_MESSAGE)[0], Left)
        pipe.start()
    assert isinstance(pipe.cut(Code.BAD_MESSAGE)[0], Ended)


def test_half_a_sample_is_refused_before_it_counts():
    pipe = Pipe(TRANSCODE).start()
    pipe.client.receive(encode(Audio(0, 0, bytes(3))), 0)
    pipe.cut()
    pipe.open()
    assert decode(pipe.client.pull(0)).audio_next == 0


MESSAGES = [
    Audio(0, 0, bytes(4)),
    Codes(0, GEOMETRY.pack(block(0), 100)),
    Ack(0, 4, "audio"),
    Marker(1, 0, flush=True, kind="audio"),
    Missing(0, 3, kind="audio"),
    Tune(rate=50),
    Stats(net=1),
    Room(live=True),
    Ping(3),
    Pong(3),
    Error(int(Code.BAD_REQUEST), "no"),
    Bye(int(Code.ELSEWHERE), url="ws://x/"),
    Ready(bytes(16), ("a",), ("00000000",), (100,), 100, 5120, (12, 13), 8, resumed=True),
]


@given(st.lists(st.tuples(st.sampled_from(MESSAGES), st.binary(max_size=3), st.integers(0, 60)), max_size=6))
def test_whatever_comes_the_session_stays_whole(script: list[tuple[Message, bytes, int]]):
    pipe = Pipe(Hello("transcode", send="audio", receive=("codes", "audio"))).start()
    for i, (message, noise, place) in enumerate(script):
        data = encode(message)
        place = min(place, len(data))
        pipe.client.receive(data[:place] + noise + data[place + len(noise) :], i)
        pipe.client.tick(i)
        if pipe.client.room:
            pipe.client.push_samples(pcm(i), i)
        while (out := pipe.client.pull(i)) is not None:
            decode(out)
        if pipe.client.close is not None:
            assert pipe.cut()
            if pipe.client.state is State.ENDED:
                return
            pipe.client.opened(i)
            pipe.client.pull(i)


def test_unknown_messages_are_ignored():
    pipe = Pipe(PUBLISH).start()
    assert pipe.client.receive(b"\x81\x00\xcc\xc8", 0) == []
    assert pipe.client.state is State.OPEN


def test_tune_is_answered_refused_and_repeated_after_a_cut():
    pipe = Pipe(PUBLISH).start()
    pipe.server.answers[Tune] = Tune(rate=50)
    assert pipe.client.tune(Tune(rate=50)) is None
    pipe.settle()
    assert pipe.of(Tune) == [Tune(rate=50)]
    assert pipe.client.rate == 50
    pipe.server.answers[Tune] = Error(int(Code.BAD_REQUEST), "no such rate")
    pipe.client.tune(Tune(rate=49))
    pipe.settle()
    assert pipe.of(Refusal) == [Refusal(Code.BAD_REQUEST, "no such rate")]
    assert pipe.client.state is State.OPEN
    pipe.client.tune(Tune(rate=25))
    pipe.send()
    pipe.cut()
    pipe.server.answers[Tune] = Tune(rate=25)
    pipe.start()
    assert pipe.of(Tune)[-1] == Tune(rate=25)
    # A new session is told what the old one had been.
    pipe.server.sessions.clear()
    pipe.cut()
    pipe.open()
    pipe.settle()
    pipe.start()
    assert pipe.server.heard[-1] == Tune(rate=25)


def test_drained_waits_for_the_server_and_survives_a_cut():
    pipe = Pipe(PUBLISH, Server(high=4)).start()
    for i in range(3):
        pipe.client.push_samples(pcm(i), 0)
    assert pipe.client.drain() == 1
    pipe.send()
    pipe.cut()
    assert pipe.of(Drained) == []
    pipe.start()
    assert pipe.of(Drained) == [Drained(1)]


def test_what_does_not_fit_the_session_is_refused():
    session = Session(PUBLISH, 0)
    with pytest.raises(StreamError, match="not been open"):
        session.push_samples(pcm(0), 0)
    with pytest.raises(StreamError, match="not been open"):
        _ = session.geometry
    client = Pipe(PUBLISH).start().client
    with pytest.raises(StreamError, match="sends audio"):
        client.push_codes(block(0), 0)
    with pytest.raises(StreamError, match="sends None"):
        Pipe(SUBSCRIBE).start().client.flush()
    with pytest.raises(CodesError):
        Pipe(PUBLISH_CODES).start().client.push_codes(block(0)[:, :3], 0)


def test_stats_and_rooms_are_passed_on_and_measured_at_the_socket():
    pipe = Pipe(Hello("publish", send="audio", room="den", features=("room", "stats"))).start()
    pipe.client.receive(encode(Room(live=True, listeners=2)), 0)
    pipe.events += pipe.client.receive(encode(Room(live=True, listeners=3)), 0)
    assert pipe.of(Room)[-1].listeners == 3
    pipe.client.underruns, pipe.client.delay = 3, 120
    pipe.server.answers[Stats] = None
    pipe.now = 6 * SECOND
    pipe.client.tick(pipe.now)
    pipe.settle()
    told = [message for message in pipe.server.heard if isinstance(message, Stats)]
    assert [(stats.underruns, stats.delay) for stats in told] == [(3, 120)]
    assert pipe.client.sent.total == sum(len(encode(m)) + 6 for m in pipe.server.heard)


def test_the_inbox_drops_the_oldest_and_says_so():
    inbox = Inbox(items=4, octets=1 << 20)
    for i in range(10):
        inbox.put(AudioChunk(i, 2 * i, pcm(i)))
    assert len(inbox) == 5
    assert inbox.get() == Gap("audio", 0, 6, "slow")
    assert [inbox.get().seq for _ in range(4)] == [6, 7, 8, 9]
    assert inbox.dropped == 6
    inbox = Inbox(items=100, octets=100)
    for i in range(30):
        inbox.put(AudioChunk(i, 2 * i, pcm(i)))
    assert inbox.get() == Gap("audio", 0, 18, "slow")


# Real sockets


class Host:
    """The scripted server behind real sockets on this machine."""

    def __init__(self, server: Server | None = None, **options: object) -> None:
        self.server = server or Server()
        self.ends: dict[ServerConnection, End] = {}
        self.connections = 0
        self.tokens: list[str | None] = []
        self._options = {"subprotocols": [SUBPROTOCOL], "compression": None} | options
        self._listener: Listener | None = None

    async def __aenter__(self) -> Host:
        self._listener = await serve(self._handle, "127.0.0.1", 0, **self._options)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        await self._listener.wait_closed()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/"

    def cut(self) -> None:
        for socket in list(self.ends):
            socket.transport.abort()

    async def poke(self) -> None:
        """Send what the test has queued."""
        for socket, end in list(self.ends.items()):
            await self._answer(socket, end)

    async def _handle(self, socket: ServerConnection) -> None:
        self.connections += 1
        self.tokens.append(socket.request.headers.get("Authorization"))
        end = self.ends[socket] = End(self.server)
        with contextlib.suppress(ConnectionClosed):
            async for data in socket:
                end.receive(data)
                await self._answer(socket, end)
        del self.ends[socket]

    async def _answer(self, socket: ServerConnection, end: End) -> None:
        while (data := end.pull()) is not None:
            await socket.send(data)
        if end.closing is not None:
            await socket.close(end.closing)


QUICK = Retry(base=0.005, cap=0.05, deadline=20, random=random.Random(0))
SPEECH = (np.random.default_rng(0).integers(-9000, 9000, 40_000) / 32768).astype(np.float32)


def pieces(wave: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(wave, np.cumsum(sizes))


def test_sound_comes_back_over_a_real_socket():
    async def run() -> None:
        async with Host() as host:
            options = {"role": "transcode", "token": "secret", "live": False, "retry": QUICK}
            async with connect(host.url, **options) as s:
                heard = []

                async def listen() -> None:
                    heard.extend([item async for item in s])

                listener = asyncio.create_task(listen())
                for piece in pieces(SPEECH, [1, 0, 999, 320, 7000]):
                    await s.push(piece)
                await s.finish()
                await listener
                chunks = [item for item in heard if isinstance(item, AudioChunk)]
                np.testing.assert_array_equal(np.concatenate([chunk.samples for chunk in chunks]), SPEECH)
                assert [chunk.at for chunk in chunks] == list(range(0, 40_000, 320))
                assert isinstance(heard[-1], Marker)
                assert s.stats.gross_sent > s.stats.net > 0
                assert (s.stats.sent, s.stats.received, s.stats.lost, s.reconnects) == (125, 125, 0, 0)
            assert host.tokens == ["Bearer secret"]
            assert isinstance(host.server.heard[-1], Bye)

    asyncio.run(run())


def test_a_client_that_is_cut_again_and_again_loses_nothing():
    async def run() -> None:
        async with Host(Server(window=64, high=32)) as host:

            async def cutter() -> None:
                while True:
                    await asyncio.sleep(0.03)
                    host.cut()

            async with connect(host.url, role="transcode", live=False, retry=QUICK) as s:
                cutting = asyncio.create_task(cutter())

                async def talk() -> None:
                    for piece in pieces(SPEECH, [320] * 124):
                        await s.push(piece)
                        await asyncio.sleep(0.003)
                    await s.finish()

                talking = asyncio.create_task(talk())
                chunks = [item.samples async for item in s if isinstance(item, AudioChunk)]
                await talking
                cutting.cancel()
                assert s.reconnects > 3
            np.testing.assert_array_equal(np.concatenate(chunks), SPEECH)
            assert len(host.server.sessions) == 1

    asyncio.run(run())


def test_a_subscriber_receives_codes_and_a_publisher_sends_them():
    async def run() -> None:
        async with Host() as host:
            async with connect(host.url, role="subscribe", room="den", receive=["codes"], retry=QUICK) as s:
                out = host.server.last().codes
                out.push(Block(GEOMETRY.pack(block(5), 100), 100, 0), 0)
                await host.poke()
                assert isinstance(await anext(s), Opened)
                item = await anext(s)
                np.testing.assert_array_equal(item.codes, block(5))
            async with connect(host.url, role="publish", room="den", send="codes", retry=QUICK) as s:
                await s.push(np.concatenate([block(1), block(2)], 1))
                assert (await s.tune(rate=25)).rate == 25
                await s.push(block(3, 25))
                await s.flush()
                with pytest.raises(CodesError, match="multiple of 4"):
                    await s.push(block(3, 25)[:, :3])
                with pytest.raises(StreamError, match="without a codec"):
                    await s.push(SPEECH)
            got = host.server.last().got
            assert [part.item.rate for part in got[:3]] == [100, 100, 25]

    asyncio.run(run())


def test_what_cannot_be_pushed_is_refused_and_nothing_breaks():
    async def run() -> None:
        async with Host() as host:
            async with connect(host.url, role="publish", room="den", retry=QUICK) as s:
                for data in (np.array([0.0, np.nan]), np.array([np.inf]), np.zeros((2, 2)), np.array(["a"])):
                    with pytest.raises(AudioError, match="finite floating point"):
                        await s.push(data)
                with pytest.raises(StreamError, match="sends audio"):
                    await s.push(block(0))
                await s.push([0.5] * 320)
            assert sum(isinstance(part, Arrived) for part in host.server.last().got) == 1
            async with connect(host.url, role="subscribe", room="den", retry=QUICK) as s:
                with pytest.raises(StreamError, match="only listens"):
                    await s.push(SPEECH)

    asyncio.run(run())


def test_tune_says_what_holds_or_why_not():
    async def run() -> None:
        async with Host() as host, connect(host.url, role="publish", room="den", retry=QUICK) as s:
            host.server.answers[Tune] = Tune(rate=50)
            assert await s.tune(rate=50) == Tune(rate=50)
            host.server.answers[Tune] = Error(int(Code.BAD_REQUEST), "no such rate")
            with pytest.raises(Refused, match="no such rate"):
                await s.tune(rate=51)

    asyncio.run(run())


@pytest.mark.parametrize("code", [Code.BAD_TOKEN, Code.BAD_PRESET])
def test_a_refusal_is_raised(code: Code):
    async def run() -> None:
        async with Host() as host:
            host.server.refuse.append(Error(int(code), "never"))
            with pytest.raises(ConnectionEnded, match="never") as caught:
                await connect(host.url, role="publish", room="den", retry=QUICK).__aenter__()
            assert caught.value.code == code
            assert host.connections == 1

    asyncio.run(run())


def test_a_full_server_is_tried_again_when_it_says():
    async def run() -> None:
        async with Host() as host:
            host.server.refuse += [Error(int(Code.FULL), "full", retry=100)] * 2
            begin = asyncio.get_running_loop().time()
            async with connect(host.url, role="publish", room="den", retry=QUICK):
                assert asyncio.get_running_loop().time() - begin >= 0.2
            assert host.connections == 3

    asyncio.run(run())


def test_a_server_that_drains_sends_its_clients_elsewhere():
    async def run() -> None:
        async with Host() as host, Host(host.server) as other, connect(host.url, role="transcode", retry=QUICK) as s:
            next(iter(host.ends.values()))._close(Bye(int(Code.ELSEWHERE), "drain", url=other.url))
            await host.poke()
            await s.push(SPEECH[:640])
            await s.finish()
            kinds = [type(item) async for item in s]
            assert kinds == [Opened, Left, Opened, AudioChunk, AudioChunk, Marker]
            assert other.connections == 1
            assert len(host.server.sessions) == 1

    asyncio.run(run())


def test_a_server_of_another_version_is_refused():
    async def run() -> None:
        async with Host(subprotocols=None) as host:
            with pytest.raises(ConnectionEnded) as caught:
                await connect(host.url, role="publish", room="den", retry=QUICK).__aenter__()
            assert caught.value.code == Code.BAD_VERSION

    asyncio.run(run())


@pytest.mark.parametrize(("status", "code"), [(401, Code.BAD_TOKEN), (403, Code.FORBIDDEN)])
def test_an_answer_of_http_that_will_not_change_is_final(status: int, code: Code):
    async def run() -> None:
        async with Host(process_request=lambda socket, _: socket.respond(status, "no")) as host:
            with pytest.raises(ConnectionEnded) as caught:
                await connect(host.url, role="publish", room="den", retry=QUICK).__aenter__()
            assert caught.value.code == code

    asyncio.run(run())


def test_nobody_there_is_given_up_at_the_deadline():
    async def run() -> None:
        async with Host() as host:
            url = host.url
        begin = asyncio.get_running_loop().time()
        with pytest.raises(ConnectionEnded, match="no session within"):
            await connect(url, role="publish", room="den", retry=Retry(0.01, 0.05, 0.3)).__aenter__()
        assert 0.2 < asyncio.get_running_loop().time() - begin < 2

    asyncio.run(run())


def test_a_session_that_cannot_be_had_again_wakes_all_who_wait():
    async def run() -> None:
        host = Host(Server(high=2))
        await host.__aenter__()
        s = connect(host.url, role="transcode", live=False, retry=Retry(0.01, 0.05, 0.3))
        await s.__aenter__()
        next(iter(host.ends.values())).receive = lambda _: None  # takes all and says nothing
        pushing = asyncio.create_task(s.push(SPEECH))
        await asyncio.sleep(0.05)
        assert not pushing.done()
        host.cut()
        await host.__aexit__()
        with pytest.raises(ConnectionEnded):
            await pushing
        with pytest.raises(ConnectionEnded):
            async for _ in s:
                pass
        with pytest.raises(ConnectionEnded):
            await s.close()

    asyncio.run(run())


def test_full_jitter_stays_below_the_doubling_bound():
    retry = Retry(base=0.5, cap=4, random=random.Random(1))
    for attempt in range(40):
        delays = [retry.delay(attempt) for _ in range(50)]
        bound = min(4, 0.5 * 2**attempt)
        assert 0 <= min(delays) < bound / 4
        assert bound * 3 / 4 < max(delays) <= bound


def test_without_asyncio():
    """The synchronous facade, against a server in another thread."""
    host = Host()
    with hosted(host):
        host.server.answers[Tune] = Tune(rate=50)
        with sync.connect(host.url, role="transcode", live=False, retry=QUICK) as s:
            for piece in pieces(SPEECH[:6400], [700, 3]):
                s.push(piece)
            assert s.tune(rate=50) == Tune(rate=50)
            s.finish()
            chunks = [item.samples for item in s if isinstance(item, AudioChunk)]
            assert s.ready.rate == 100
            assert s.stats.received == 20
        np.testing.assert_array_equal(np.concatenate(chunks), SPEECH[:6400])
        assert isinstance(host.server.heard[-1], Bye)
        host.server.refuse.append(Error(int(Code.BAD_TOKEN), "never"))
        with pytest.raises(ConnectionEnded), sync.connect(host.url, role="transcode", retry=QUICK):
            pass


# The command line


@contextlib.contextmanager
def hosted(host: Host) -> Iterator[Callable[[Coroutine], object]]:
    """Run a host in another thread; yields what runs a coroutine there."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def do(work: Coroutine) -> object:
        return asyncio.run_coroutine_threadsafe(work, loop).result(20)

    do(host.__aenter__())
    try:
        yield do
    finally:
        do(host.__aexit__())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def invoke(*arguments: str, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_send_publishes_a_file_in_its_own_time(tmp_path: Path):
    path = tmp_path / "in.wav"
    soundfile.write(path, SPEECH[:8000], 16_000, subtype="PCM_16")
    host = Host()
    with hosted(host):
        begin = time.monotonic()
        result = invoke("send", str(path), "--url", host.url, "--room", "den", "--token", "t")
        assert result.exit_code == 0, result.output
        assert time.monotonic() - begin >= 0.5
    kept = host.server.last()
    sent = b"".join(part.item.data for part in kept.got if isinstance(part, Arrived))
    np.testing.assert_array_equal(np.frombuffer(sent, "<i2"), np.rint(SPEECH[:8000] * 32768).astype("<i2"))
    assert (kept.hello.room, kept.got[-1].flush, host.tokens) == ("den", True, ["Bearer t"])
    assert "25 units sent" in result.stderr


def test_send_takes_samples_from_a_pipe():
    host = Host()
    with hosted(host):
        result = invoke("send", "-", "--url", host.url, "--sample-rate", "8000", stdin=bytes(1001))
        assert result.exit_code == 0, result.output
    assert sum(len(part.item.data) for part in host.server.last().got if isinstance(part, Arrived)) == 1000
    assert host.server.last().hello.sample_rate == 8000


@pytest.mark.parametrize("out", ["file", "pipe"])
def test_recv_writes_what_is_said_with_silence_for_what_is_lost(tmp_path: Path, out: str):
    path = str(tmp_path / "out.wav") if out == "file" else "-"
    host = Host()
    with hosted(host) as do, ThreadPoolExecutor(1) as pool:
        running = pool.submit(invoke, "recv", "--out", path, "--url", host.url)
        while not host.server.sessions:
            time.sleep(0.01)
        audio = host.server.last().audio
        end = next(iter(host.ends.values()))
        for first in (0, 640):  # 320 to 639 are lost
            audio.push(Chunk(np.rint(SPEECH[first : first + 320] * 32768).astype("<i2").tobytes(), first), 0)
            audio.sender.lose(1, "source")
        # The last 20 samples only fill up the last block.
        audio.mark(flush=True, at=940)
        # The news overtakes the sound.
        end.out.extend([Room(live=True), Room(live=False)])
        do(host.poke())
        result = running.result(20)
        assert result.exit_code == 0, result.output
    piped = np.frombuffer(result.stdout_bytes, "<i2") / 32768
    wave = soundfile.read(path, dtype="float32")[0] if out == "file" else piped
    end_ = 940 if out == "file" else 960  # a pipe has taken them already
    np.testing.assert_array_equal(wave, np.concatenate([SPEECH[:320], np.zeros(320), SPEECH[640:end_]]))


def test_loopback_measures(tmp_path: Path):
    path = tmp_path / "in.wav"
    soundfile.write(path, SPEECH[:4800], 16_000, subtype="PCM_16")
    host = Host()
    with hosted(host):
        result = invoke("loopback", str(path), "--url", host.url)
        assert result.exit_code == 0, result.output
    found = re.search(r"latency (\d+) / (\d+) / (\d+) ms \(p50 / p95 / p99 of 15 chunks\)", result.stderr)
    p50, p95, p99 = map(int, found.groups())
    assert 20 <= p50 <= p95 <= p99 < 5000  # each chunk lasts 20 ms
    assert re.search(r"gross [1-9]\d* bit/s sent, [1-9]\d* received", result.stderr)


class SoundCard:
    """What the client uses of sounddevice."""

    PortAudioError = type("PortAudioError", (Exception,), {})

    def __init__(self) -> None:
        self.played: list[np.ndarray] = []
        self.broken = False

    def InputStream(self, **options: Any) -> contextlib.AbstractContextManager:
        @contextlib.contextmanager
        def stream() -> Iterator[None]:
            for first in range(0, 3200, 320):
                options["callback"](SPEECH[first : first + 320, None], 320, None, None)
            yield

        if self.broken:
            raise self.PortAudioError("no device")
        return stream()

    def OutputStream(self, **options: Any) -> contextlib.AbstractContextManager:
        stop = threading.Event()

        def pull() -> None:
            while not stop.wait(0.01):
                out = np.zeros((160, 1), np.float32)
                options["callback"](out, 160, None, None)
                self.played.append(out[:, 0])

        @contextlib.contextmanager
        def stream() -> Iterator[None]:
            thread = threading.Thread(target=pull)
            thread.start()
            yield
            stop.set()
            thread.join()

        return stream()


def test_the_microphone_is_heard(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sounddevice", SoundCard())

    async def run() -> list[np.ndarray]:
        source = microphone(16_000)
        heard = [await anext(source) for _ in range(10)]
        await source.aclose()
        return heard

    np.testing.assert_array_equal(np.concatenate(asyncio.run(run())), SPEECH[:3200])


def test_recv_plays(monkeypatch: pytest.MonkeyPatch):
    card = SoundCard()
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    host = Host(Server(window=64))
    with hosted(host) as do, ThreadPoolExecutor(1) as pool:
        running = pool.submit(invoke, "recv", "--play", "--url", host.url)
        while not host.server.sessions:
            time.sleep(0.01)
        audio = host.server.last().audio
        for first in range(0, 6400, 320):
            audio.push(Chunk(np.rint(SPEECH[first : first + 320] * 32768).astype("<i2").tobytes(), first), 0)
        audio.mark(flush=True, at=6400)
        end = next(iter(host.ends.values()))
        end.out.extend([Room(live=True), Room(live=False)])
        do(host.poke())
        result = running.result(30)
        assert result.exit_code == 0, result.output
    assert np.abs(np.concatenate(card.played)).sum() == pytest.approx(np.abs(SPEECH[:6400]).sum(), rel=0.2)


def test_what_cannot_be_done_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    host = Host()
    with hosted(host):
        monkeypatch.setitem(sys.modules, "sounddevice", None)
        for command in (["send", "--mic"], ["recv", "--play"], ["loopback", "--mic"]):
            result = invoke(*command, "--url", host.url)
            assert (result.exit_code, "pip install 'semanticodec[mic]'" in result.stderr) == (1, True)
        card = SoundCard()
        card.broken = True
        monkeypatch.setitem(sys.modules, "sounddevice", card)
        assert "no device" in invoke("send", "--mic", "--url", host.url).stderr
        host.server.refuse.append(Error(int(Code.BAD_TOKEN), "never"))
        result = invoke("send", "-", "--url", host.url)
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "never" in result.stderr
    assert invoke("send", str(tmp_path / "none.wav")).exit_code == 1
    assert invoke("recv", "--out", str(tmp_path / "none" / "x.wav")).exit_code == 1
    assert invoke("send").exit_code == 2
    assert invoke("recv").exit_code == 2
    assert invoke("loopback", "a", "--mic").exit_code == 2
    assert invoke("send", "-", "--url", "ws://127.0.0.1:1/", "--deadline", "0").exit_code == 1


def test_the_client_needs_no_torch():
    names = ["connection", "jitter", "sync", "local", "sound", "__main__"]
    code = "".join(f"import semanticodec_client.{name}\n" for name in names)
    code += "import sys\nassert not {'torch', 'sounddevice', 'soundfile'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
