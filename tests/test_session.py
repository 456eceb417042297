"""Both halves of the protocol against each other and against strangers, without sockets and with time as a number."""

import dataclasses
import random
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peer import Peer
from test_messages import READY, mutate, some_message

from semanticodec.errors import StreamError
from semanticodec.wire import entropy, link, messages, prior
from semanticodec.wire.blocks import Block, Chunk, Geometry, agreed, coding_features
from semanticodec.wire.channel import Arrived
from semanticodec.wire.closing import Code
from semanticodec.wire.link import Lost
from semanticodec.wire.messages import (
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
from server.connection import Asked, Connection, Left, State, clip
from server.limits import SECOND, Limits, Throttle
from server.session import MAX_POSITION, Offer, Refused, Session, SessionState

MINI = Geometry(5120, (12, 13), (100, 50, 25))
OFFER = Offer(MINI, ("mini-100", "mini-50", "mini-25"), ("00000000", "11111111", "22222222"), 100)
SMALL = Limits(window=16, window_bytes=4096, high=8, low=2, slow_high=6, slow_low=2, messages=10**6, octets=10**9)
FREE = dataclasses.replace(SMALL, window=64, high=32, slow_high=48, window_bytes=1 << 20)
PUBLISH = Hello("publish", send="codes", room="den")
SUBSCRIBE = Hello("subscribe", receive=("codes",), room="den")
LOOP = Hello("transcode", send="audio", receive=("audio", "codes"), features=("stats", "room"))


def block(seq: int, rate: int = 100) -> Block:
    return Block(seq.to_bytes(4, "big") + bytes(MINI.block_bytes(rate) - 4), rate, seq * 5120)


def number(item: Block) -> int:
    return int.from_bytes(item.data[:4], "big")


class Hub:
    """The least that a server needs around its connections: one room, and an engine that echoes."""

    def __init__(self, limits: Limits = FREE):
        self.limits = limits
        self.sessions: dict[bytes, Session] = {}
        self.holders: dict[bytes, Connection] = {}
        self.room_next = 0
        self.working = True
        self.queue: deque[tuple[Session, Arrived[Block] | Arrived[Chunk]]] = deque()

    def receive(self, connection: Connection, data: bytes, now: int):
        self.handle(connection, connection.receive(data, now), now)

    def handle(self, connection: Connection, events: list, now: int):
        for event in events:
            if isinstance(event, Asked):
                self.asked(connection, event.request, now)
            elif isinstance(event, Arrived):
                self.queue.append((connection.session, event))
            elif isinstance(event, Lost) and connection.session.hello.role == "publish":
                self.each(lambda s, lost=event: s.send_lost("codes", lost.stop - lost.seq, lost.reason))
                self.room_next += event.stop - event.seq
            elif isinstance(event, Marker) and connection.session.hello.role == "publish":
                self.each(lambda s, mark=event: s.mark("codes", flush=mark.flush, tag=mark.tag))
            elif isinstance(event, Marker):
                connection.session.mark("audio", flush=event.flush, at=event.at, tag=event.tag)
            elif isinstance(event, Bye):
                connection.finish()
        if self.working:
            self.work(now)

    def work(self, now: int):
        while self.queue:
            session, event = self.queue.popleft()
            session.done(1, len(event.item.data))
            if isinstance(event.item, Block):
                self.each(lambda s, item=event.item: s.send_block(item, now))
                self.room_next += 1
            else:
                session.send_audio(event.item.data, event.item.at, now)

    def each(self, do):
        for session in self.sessions.values():
            if session.hello.role == "subscribe" and session.state is not SessionState.ENDED:
                do(session)

    def asked(self, connection: Connection, request: Hello | Resume, now: int):
        if isinstance(request, Hello):
            id = len(self.sessions).to_bytes(16, "big")
            session = Session(id, "me", request, OFFER, self.limits, now, codes_first=self.room_next)
            self.sessions[id] = session
        else:
            session = self.sessions.get(request.session)
            if session is None or session.expired(now) or not session.belongs_to(request.token or "me"):
                connection.refuse(Code.UNKNOWN_SESSION, "say hello")
                return
        connection.accept(session, request, now)
        if connection.state is State.OPEN:
            old = self.holders.get(session.id)
            self.holders[session.id] = connection
            if old is not None:
                old.bye(Code.REPLACED, "resumed elsewhere", now)


class Wire:
    """A client, and its connection to a hub if it has one: messages on their way in both directions."""

    def __init__(self, hub: Hub, hello: Hello):
        self.hub = hub
        self.client = Peer(hello)
        self.connection: Connection | None = None
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.found: list = []

    def connect(self, now: int):
        self.connection = Connection(self.hub.limits, now)
        self.up = deque([self.client.begin(now)])
        self.down.clear()

    def cut(self, now: int, *, half_open: bool = False):
        """Lose the connection and all that is on its way; ``half_open``: the server does not notice."""
        if self.connection is not None:
            self.client.open = False
            if not half_open:
                self.hub.handle(self.connection, self.connection.lost(now), now)
            self.connection = None
            self.up.clear()
            self.down.clear()

    def step(self, now: int, count: int = 1):
        """Move at most ``count`` messages in each direction."""
        connection = self.connection
        if connection is None:
            return
        while (data := self.client.pull(now)) is not None:
            self.up.append(data)
        for _ in range(min(count, len(self.up))):
            self.hub.receive(connection, self.up.popleft(), now)
        while (data := connection.pull(now)) is not None:
            self.down.append(data)
        for _ in range(min(count, len(self.down))):
            events = self.client.receive(self.down.popleft(), now)
            self.found += events
            if any(isinstance(event, Bye | Error) for event in events):
                self.cut(now)
                return

    def settle(self, now: int):
        if self.connection is None:
            self.connect(now)
        for _ in range(200):
            self.step(now, 1000)

    @property
    def told(self) -> list[int]:
        """The numbers that have come or are reported lost, in the order of their coming."""
        told: list[int] = []
        for event in self.found:
            if isinstance(event, Arrived):
                told.append(event.seq)
            elif isinstance(event, Lost):
                told += range(event.seq, event.stop)
        return told


def opened(hello: Hello, limits: Limits = SMALL, now: int = 0, **options: int) -> Connection:
    """A connection that is open, with ready pulled."""
    connection = Connection(limits, now)
    assert connection.receive(encode(hello), now) == [Asked(hello)]
    connection.accept(Session(bytes(16), "me", hello, OFFER, limits, now, **options), hello, now)
    ready = decode(connection.pull(now))
    assert isinstance(ready, Ready)
    return connection


def pulled(connection: Connection, now: int = 0) -> list[messages.Message]:
    found = []
    while (data := connection.pull(now)) is not None:
        found.append(decode(data))
    return found


def refusal(connection: Connection) -> Code:
    """Check that a connection closes as it should, and return the code."""
    assert connection.state is State.CLOSING
    last = pulled(connection)[-1]
    code, reason = connection.close
    assert isinstance(last, Error | Bye)
    assert last.code == code
    assert len(reason.encode()) <= 123
    assert connection.receive(encode(Ping()), 0) == []
    assert (connection.pull(0), connection.due()) == (None, None)
    return code


class TestHandshake:
    def test_ready_says_what_the_session_is(self):
        connection = Connection(SMALL, 0)
        hello = dataclasses.replace(SUBSCRIBE, latency=640, features=("stats", "telepathy"))
        connection.receive(encode(hello), 5)
        connection.accept(Session(bytes(16), "me", hello, OFFER, SMALL, 5, codes_first=7), hello, 5)
        assert pulled(connection) == [
            Ready(
                bytes(16),
                OFFER.presets,
                OFFER.weights,
                (100, 50, 25),
                100,
                5120,
                (12, 13),
                window=16,
                bundle=3,
                features=("stats",),
                codes_next=7,
                keep=60_000,
                idle=30_000,
            )
        ]

    @pytest.mark.parametrize(("allowed", "agreed"), [(True, coding_features(["mini-50"])), (False, ())])
    def test_entropy_coding_is_for_who_asks_and_where_it_is_allowed(self, allowed: bool, agreed: tuple[str, ...]):
        hello = dataclasses.replace(SUBSCRIBE, features=(*coding_features(["mini-50"]), "entropy-00000000"))
        limits = dataclasses.replace(SMALL, entropy=allowed)
        session = Session(bytes(16), "me", hello, OFFER, limits, 5)
        assert session.attach(None, 5).features == agreed
        frames = MINI.frames(50)
        likely = entropy.decode(prior.current("mini-50"), bytes(range(100)), frames)[0]
        session.send_block(Block(MINI.pack(likely, 50), 50, 0), 5)
        message = session.codes_out.pull(10**9)
        assert (len(message.data) < MINI.block_bytes(50)) is allowed

    @pytest.mark.parametrize("likely", [True, False], ids=["coded", "packed"])
    def test_a_publisher_may_entropy_code_within_its_grant(self, likely: bool):
        hello = dataclasses.replace(PUBLISH, features=coding_features(["mini-100"]))
        session = Session(bytes(16), "me", hello, OFFER, dataclasses.replace(SMALL, entropy=True), 5)
        agreed_on = agreed(MINI, OFFER.presets, session.attach(None, 5).features)
        data = bytes(range(100)) if likely else np.random.default_rng(0).bytes(10_000)
        codes = entropy.decode(prior.current("mini-100"), data, MINI.frames(100))[0]
        codes = codes if likely else np.random.default_rng(0).integers(0, 4096, codes.shape)
        packed = MINI.pack(codes, 100)
        one, nine = agreed_on.join([packed], 100), agreed_on.join([packed] * 9, 100)
        assert (len(one) < len(packed)) is likely
        assert [part.item.data for part in session.take(Codes(0, one))] == [packed]
        assert session.take(Codes(0, one)) == []
        with pytest.raises(Refused, match="unit 9 was sent"):
            session.take(Codes(1, nine))

    @pytest.mark.parametrize(
        ("message", "code"),
        [
            (Ack(0), Code.WRONG_ORDER),
            (Bye(), Code.WRONG_ORDER),
            (READY, Code.WRONG_ORDER),
            (Audio(0, 0, b"ab"), Code.WRONG_ORDER),
        ],
        ids=["ack", "bye", "ready", "audio"],
    )
    def test_wrong_order(self, message: messages.Message, code: Code):
        connection = Connection(SMALL, 0)
        assert connection.receive(encode(message), 0) == []
        assert refusal(connection) is code

    def test_pings_are_answered_and_unknown_types_ignored_at_any_time(self):
        connection = Connection(SMALL, 0)
        for _ in range(3):
            connection.receive(encode(Ping(7)), 0)
            connection.receive(b"\x81\x00\x63", 0)
        assert pulled(connection) == [Pong(7)]
        assert connection.ignored == 3
        assert connection.state is State.WAITING

    @pytest.mark.parametrize("again", [PUBLISH, Resume(bytes(16)), Ack(0)], ids=["hello", "resume", "ack"])
    def test_nothing_may_be_sent_before_the_answer(self, again: messages.Message):
        connection = Connection(SMALL, 0)
        connection.receive(encode(PUBLISH), 0)
        connection.receive(encode(again), 0)
        assert refusal(connection) is Code.WRONG_ORDER

    def test_refused(self):
        connection = Connection(SMALL, 0)
        connection.receive(encode(PUBLISH), 0)
        connection.refuse(Code.FULL, "full, retry after 2 s", 2000)
        assert pulled(connection) == [Error(4503, "full, retry after 2 s", 2000)]
        assert connection.close == (Code.FULL, "full, retry after 2 s")

    def test_too_slow(self):
        connection = Connection(SMALL, 10)
        assert connection.due() == 10 + SMALL.handshake
        connection.tick(9 + SMALL.handshake)
        assert connection.state is State.WAITING
        connection.tick(10 + SMALL.handshake)
        assert refusal(connection) is Code.SLOW_HANDSHAKE

    def test_answers_out_of_order_are_the_shells_mistake(self):
        connection = Connection(SMALL, 0)
        with pytest.raises(StreamError, match="waiting cannot become open"):
            connection.accept(Session(bytes(16), "me", PUBLISH, OFFER, SMALL, 0), PUBLISH, 0)

    def test_reasons_fit(self):
        assert clip("\x00ü" * 300, 123).encode()[:3] == "?ü".encode()
        assert len(clip("\x00ü" * 300, 123).encode()) <= 123
        assert clip("\ud800") == "?"


class TestStrangers:
    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (b"", Code.BAD_MESSAGE),
            ("text", Code.BAD_MESSAGE),
            (b"\x81\x00" * 1000, Code.BAD_MESSAGE),
            (bytes(messages.MAX_MESSAGE + 1), Code.TOO_BIG),
            (encode(READY), Code.WRONG_ORDER),
            (encode(Room(True)), Code.WRONG_ORDER),
            (encode(PUBLISH), Code.WRONG_ORDER),
            (encode(Audio(0, 0, b"ab")), Code.WRONG_ORDER),
            (encode(Marker(1, 0, kind="audio")), Code.WRONG_ORDER),
            (encode(Ack(0)), Code.WRONG_ORDER),
            (encode(Codes(8, bytes(50))), Code.OVERRUN),
            (encode(Codes(0, bytes(51))), Code.BAD_MESSAGE),
            (encode(Missing(1 << 40, 1 << 41)), Code.BAD_MESSAGE),
            (encode(Error(4000, "no")), Code.INTERNAL),
        ],
        ids=range(14),
    )
    def test_a_publisher_of_codes_that_misbehaves(self, data: bytes | str, code: Code):
        connection = opened(PUBLISH)
        events = connection.receive(data, 0)
        assert [type(event) for event in events] == [Left]
        resumable = code.retry == "resume"
        assert events[0].resumable == resumable
        assert connection.session.state is (SessionState.DETACHED if resumable else SessionState.ENDED)
        assert refusal(connection) is code

    def test_half_a_sample(self):
        connection = opened(dataclasses.replace(LOOP, sample_format="f32"))
        connection.receive(encode(Audio(0, 0, bytes(6))), 0)
        assert refusal(connection) is Code.BAD_MESSAGE

    @pytest.mark.parametrize("rate", [8000, 16000, 192000])
    def test_positions_that_do_not_fit_at_every_rate(self, rate: int):
        last = MAX_POSITION * rate // 16000
        hello = dataclasses.replace(LOOP, sample_rate=rate)
        audio = [Audio(0, last, b"ab"), Marker(1, 0, at=last, kind="audio")]
        codes = [Codes(0, bytes(50), at=MAX_POSITION), Marker(1, 0, at=MAX_POSITION)]
        for hello, good in [*((hello, m) for m in audio), *((PUBLISH, m) for m in codes)]:
            connection = opened(hello)
            assert [type(event) for event in connection.receive(encode(good), 0)] != [Left]
            connection = opened(hello)
            connection.receive(encode(dataclasses.replace(good, at=good.at + 1)), 0)
            assert refusal(connection) is Code.BAD_MESSAGE

    def test_acks_of_what_was_never_sent(self):
        connection = opened(SUBSCRIBE)
        connection.session.send_block(block(0), 0)
        connection.receive(encode(Ack(1)), 0)
        assert refusal(connection) is Code.BAD_MESSAGE

    def test_floods(self):
        limits = Limits(messages=10, burst=2)
        connection = opened(PUBLISH, limits)
        for _ in range(19):
            connection.receive(encode(Ping()), 0)
        assert connection.state is State.OPEN
        connection.receive(encode(Ping()), SECOND)
        connection.receive(encode(Ping()), 0)  # a clock that goes back earns nothing
        for _ in range(8):
            connection.receive(encode(Ping()), SECOND)
        assert connection.state is State.OPEN
        connection.receive(encode(Ping()), SECOND)
        assert refusal(connection) is Code.TOO_MANY

    def test_bytes_that_wait(self):
        connection = opened(LOOP, dataclasses.replace(SMALL, pending_bytes=1000))
        connection.receive(encode(Audio(0, 0, bytes(1000))), 0)
        assert connection.state is State.OPEN
        connection.receive(encode(Audio(1, 500, bytes(2))), 0)
        assert refusal(connection) is Code.OVERRUN

    def test_answers_do_not_pile_up(self):
        connection = opened(LOOP, SMALL)
        for i in range(1000):
            connection.receive(encode(Ping(i)), 0)
            connection.receive(encode(Tune(rate=50)), 0)
            connection.receive(encode(Tune(rate=51)), 0)
            connection.session.tell(Room(True, i))
        assert len(pulled(connection)) == 4

    @pytest.mark.parametrize("seed", range(5))
    def test_mutated_streams_never_raise(self, seed: int):
        """4,000 messages, most of them mutated, per kind of session: each connection lives or closes with a code."""
        rng = random.Random(seed)
        hello = [PUBLISH, SUBSCRIBE, LOOP, dataclasses.replace(LOOP, send="codes", receive=("audio",)), PUBLISH][seed]
        seeds = [
            *(encode(Codes(i, bytes(50))) for i in range(3)),
            *(encode(Audio(i, 960 * i, bytes(60))) for i in range(3)),
            encode(Ack(1, 3, "audio", 2)),
            encode(Marker(1, 1, True, 5120)),
            encode(Missing(1, 3)),
            encode(Tune(50, 640, 1400, 2, 3)),
            encode(Stats(1250, 1400)),
            encode(Ping(7)),
        ]
        connection = opened(hello)
        closed = 0
        for i in range(4_000):
            data = seeds[i % len(seeds)]
            events = connection.receive(mutate(data, rng) if rng.random() < 0.7 else data, i)
            for event in events:
                if isinstance(event, Arrived):
                    connection.session.done(1, len(event.item.data))
            pulled(connection, i)
            if connection.state is State.CLOSING:
                closed += 1
                connection = opened(hello, now=i)
        assert closed > 50


class TestPublishing:
    def test_units_losses_and_markers_come_out_once(self):
        connection = opened(PUBLISH)
        assert connection.receive(encode(Codes(0, block(0).data)), 0) == [Arrived(0, block(0))]
        assert connection.receive(encode(Codes(0, block(0).data)), 0) == []
        assert connection.receive(encode(Codes(3, block(3).data)), 0) == [Lost(1, 3, "source"), Arrived(3, block(3))]
        assert connection.receive(encode(Missing(3, 6, "overload")), 0) == [Lost(4, 6, "overload")]
        marker = Marker(1, 6, True, 30_000, tag=5)
        assert connection.receive(encode(marker), 0) == [marker]
        assert connection.receive(encode(marker), 0) == []
        assert connection.session.stats(0).lost == 4

    def test_a_slow_server_pauses_the_publisher(self):
        """Credit is used up at the high-water mark and given again at the low one; what waits is bounded throughout."""
        connection = opened(PUBLISH)
        session = connection.session
        for seq in range(8):
            connection.receive(encode(Codes(seq, block(seq).data)), 0)
        assert [m.limit for m in pulled(connection)] == [8]
        session.done(5, 250)
        assert pulled(connection) == []
        session.done(1, 50)
        assert pulled(connection) == [Ack(8, 14)]
        connection.receive(encode(Codes(13, block(13).data)), 0)
        assert connection.state is State.OPEN
        connection.receive(encode(Codes(14, block(14).data)), 0)
        assert refusal(connection) is Code.OVERRUN

    def test_only_what_came_can_be_done(self):
        connection = opened(PUBLISH)
        with pytest.raises(StreamError, match="1 units"):
            connection.session.done(1, 0)

    def test_rates_of_audio_are_tuned_and_those_of_codes_say_themselves(self):
        connection = opened(LOOP)
        assert connection.receive(encode(Tune(rate=50, gross=1400)), 0) == [Tune(rate=50, gross=1400)]
        assert pulled(connection) == [Tune(rate=50, copies=0, bundle=1)]
        assert connection.session.rate == 50
        connection.receive(encode(Tune(rate=99)), 0)
        assert [m.code for m in pulled(connection)] == [Code.BAD_REQUEST]
        assert (connection.session.rate, connection.state) == (50, State.OPEN)
        publisher = opened(PUBLISH)
        for wish in (Tune(rate=50), Tune(bundle=3)):
            assert publisher.receive(encode(wish), 0) == []
            assert [m.code for m in pulled(publisher)] == [Code.BAD_REQUEST]
        assert publisher.receive(encode(Codes(0, bytes(25), rate=50)), 0) == [Arrived(0, Block(bytes(25), 50, 0))]


class TestSubscribing:
    def test_bundles_and_their_change(self):
        connection = opened(dataclasses.replace(SUBSCRIBE, latency=320))
        for seq in range(3):
            connection.session.send_block(block(seq), 0)
        assert [(m.seq, len(m.data)) for m in pulled(connection)] == [(0, 100)]
        assert connection.due() == 2 * MINI.block_ns
        connection.receive(encode(Tune(bundle=1, copies=2)), 0)
        assert pulled(connection) == [Tune(rate=100, copies=2, bundle=1), Codes(2, block(2).data)]

    def test_a_slow_client_is_dropped_to_live_and_told(self):
        connection = opened(SUBSCRIBE)
        session = connection.session
        for seq in range(40):
            session.send_block(block(seq), 0)
            assert session.codes_out.sender.waiting <= SMALL.slow_high
        found = pulled(connection)
        missing = found[0]
        assert isinstance(missing, Missing)
        assert (missing.first, missing.reason, missing.total) == (0, "slow", missing.stop)
        assert [m.seq for m in found[1:]] == list(range(missing.stop, 40))
        assert session.dropped == missing.stop == session.stats(0).lost

    def test_what_gathers_without_a_connection_is_kept_for_it(self):
        """The window is for that, and the mark for slow clients is not."""
        connection = opened(SUBSCRIBE)
        session = connection.session
        connection.lost(0)
        for seq in range(15):
            session.send_block(block(seq), 0)
        again = Connection(SMALL, 0)
        again.receive(encode(Resume(bytes(16))), 0)
        again.accept(session, Resume(bytes(16)), 0)
        session.send_block(block(15), 0)
        assert [m.seq for m in pulled(again)[1:]] == list(range(16))

    def test_codes_and_audio_take_turns(self):
        hello = dataclasses.replace(SUBSCRIBE, receive=("codes", "audio"))
        connection = opened(hello, FREE)
        for seq in range(4):
            connection.session.send_block(block(seq), 0)
            connection.session.send_audio(bytes(10), 5 * seq, 0)
        kinds = [type(m).__name__ for m in pulled(connection)]
        assert kinds in (["Codes", "Audio"] * 4, ["Audio", "Codes"] * 4)

    def test_long_audio_is_cut(self):
        connection = opened(
            dataclasses.replace(LOOP, sample_format="f32"), dataclasses.replace(FREE, window_bytes=1 << 22)
        )
        connection.session.send_audio(bytes(messages.MAX_AUDIO_BYTES + 8), 100, 0)
        found = pulled(connection)
        assert [(m.seq, m.at, len(m.data)) for m in found] == [(0, 100, 262144), (1, 100 + 65536, 8)]

    def test_only_what_is_received_can_be_sent(self):
        with pytest.raises(StreamError, match="no audio"):
            opened(SUBSCRIBE).session.send_audio(b"ab", 0, 0)
        with pytest.raises(StreamError, match="no codes"):
            opened(PUBLISH).session.send_block(block(0), 0)

    def test_features_decide_what_is_told(self):
        curious, plain = opened(LOOP), opened(SUBSCRIBE)
        for connection in (curious, plain):
            connection.session.tell(Room(True, 2))
            connection.tick(SMALL.stats)
        assert [type(m) for m in pulled(curious)] == [Room, Stats]
        assert pulled(plain) == []


class TestLiveliness:
    def test_silence(self):
        connection = opened(SUBSCRIBE)
        connection.tick(SMALL.ping)
        assert pulled(connection, SMALL.ping) == [Ping()]
        connection.tick(SMALL.ping + 1)
        assert pulled(connection, SMALL.ping + 1) == []
        connection.receive(encode(Pong()), 2 * SMALL.ping)
        connection.tick(SMALL.idle)
        assert connection.state is State.OPEN
        events = connection.tick(2 * SMALL.ping + SMALL.idle)
        assert events == [Left(Code.IDLE, "nothing was heard for too long", True)]
        assert refusal(connection) is Code.IDLE

    def test_the_clock_goes_back(self):
        connection = opened(SUBSCRIBE, now=100 * SECOND)
        connection.receive(encode(Pong()), 0)
        assert connection.tick(50 * SECOND) == []
        assert connection.state is State.OPEN

    def test_due(self):
        connection = opened(dataclasses.replace(SUBSCRIBE, latency=320))
        assert connection.due() == SMALL.stats
        connection.session.send_block(block(0), 0)
        assert connection.due() == 2 * MINI.block_ns
        assert connection.pull(2 * MINI.block_ns - 1) is None
        assert connection.pull(2 * MINI.block_ns) is not None


class TestResuming:
    def test_a_session_is_kept_for_a_while(self):
        connection = opened(PUBLISH)
        assert connection.lost(5) == [Left(None, "the connection was lost", True)]
        assert connection.lost(6) == []
        session = connection.session
        assert not session.expired(4 + SMALL.keep)
        assert session.expired(5 + SMALL.keep)

    @pytest.mark.parametrize("closing", [False, True])
    def test_a_lost_connection_has_nothing_to_say(self, closing: bool):
        connection = opened(PUBLISH)
        connection.receive(encode(Ping()), 0)
        if closing:
            connection.bye(Code.DONE, "", 0)
        connection.lost(0)
        assert (connection.pull(0), connection.due(), connection.tick(SMALL.idle)) == (None, None, [])

    def test_its_owner_only(self):
        session = opened(PUBLISH).session
        assert session.belongs_to("me")
        assert not session.belongs_to("")

    def test_claims_beyond_what_was_sent_change_nothing(self):
        hello = dataclasses.replace(SUBSCRIBE, receive=("codes", "audio"))
        session = opened(hello).session
        session.send_block(block(0), 0)
        before = session.stats(0)
        connection = Connection(SMALL, 0)
        resume = Resume(bytes(16), codes_next=0, audio_next=5)
        connection.receive(encode(resume), 0)
        assert connection.accept(session, resume, 0) == []
        assert refusal(connection) is Code.UNKNOWN_SESSION
        assert (session.state, session.stats(0), session.attachments) == (SessionState.ATTACHED, before, 1)

    def test_on_another_server(self):
        """What a backplane knows is enough: how far each side had come, and the room's last blocks."""
        codes = opened(SUBSCRIBE, codes_first=90).session
        for seq in range(90, 100):
            codes.send_block(block(seq), 0)
        resume = Resume(bytes(16), codes_next=97)
        connection = Connection(SMALL, 0)
        connection.receive(encode(resume), 0)
        connection.accept(codes, resume, 0)
        assert [m.seq for m in pulled(connection)[1:]] == [97, 98, 99]
        publisher = Connection(SMALL, 0)
        publisher.receive(encode(resume), 0)
        publisher.accept(Session(bytes(16), "me", PUBLISH, OFFER, SMALL, 0, received=97), resume, 0)
        ready = decode(publisher.pull(0))
        assert (ready.resumed, ready.next, ready.limit) == (True, 97, 97 + SMALL.high)
        assert publisher.receive(encode(Codes(96, block(96).data)), 0) == []
        assert publisher.receive(encode(Codes(97, block(97).data)), 0) == [Arrived(97, block(97))]

    def test_an_ended_session_stays_ended(self):
        old = opened(PUBLISH)
        old.receive(encode(Bye()), 0)
        assert pulled(old) == [Bye()]
        connection = Connection(SMALL, 0)
        connection.receive(encode(Resume(bytes(16))), 0)
        connection.accept(old.session, Resume(bytes(16)), 0)
        assert refusal(connection) is Code.UNKNOWN_SESSION

    @pytest.mark.parametrize("first", ["old", "new"])
    def test_a_half_open_connection_is_replaced(self, first: str):
        """Whichever side the shell hears of first, the session belongs to the new connection."""
        old = opened(SUBSCRIBE)
        session = old.session
        new = Connection(SMALL, 0)
        new.receive(encode(Resume(bytes(16))), 0)
        if first == "old":
            assert old.bye(Code.REPLACED, "resumed", 0) == []
        new.accept(session, Resume(bytes(16)), 0)
        if first == "new":
            assert old.lost(0) == []
        session.send_block(block(0), 0)
        assert [type(m) for m in pulled(new)] == [Ready, Codes]
        assert session.state is SessionState.ATTACHED

    def test_a_replaced_connection_takes_nothing_away(self):
        old = opened(SUBSCRIBE)
        new = Connection(SMALL, 0)
        new.receive(encode(Resume(bytes(16))), 0)
        new.accept(old.session, Resume(bytes(16)), 0)
        old.session.send_block(block(0), 0)
        assert old.pull(0) is None
        assert old.receive(encode(Tune(bundle=3)), 0) == []
        assert old.session.codes_out.bundle == 1
        assert [type(m) for m in pulled(new)] == [Ready, Codes]

    def test_drain(self):
        connection = opened(PUBLISH)
        events = connection.bye(Code.ELSEWHERE, "restart", 0, retry=500, url="wss://b.example/")
        assert events == [Left(Code.ELSEWHERE, "restart", True)]
        assert pulled(connection) == [Bye(4001, "restart", 500, "wss://b.example/")]
        assert connection.session.state is SessionState.DETACHED
        assert connection.bye(Code.DONE, "", 0) == []


class TestTogether:
    def test_loopback(self):
        """Audio goes up, comes back, and a marker follows it; both ends report what it took."""
        hub = Hub()
        wire = Wire(hub, LOOP)
        wire.settle(0)
        for i in range(20):
            wire.client.push(Chunk(bytes([i]) * 640, 320 * i))
        wire.client.outlet.mark(flush=True, tag=9)
        wire.settle(SECOND)
        chunks = [e.item for e in wire.found if isinstance(e, Arrived)]
        assert chunks == [Chunk(bytes([i]) * 640, 320 * i) for i in range(20)]
        assert [(e.tag, e.flush, e.kind) for e in wire.found if isinstance(e, Marker)] == [(9, True, "audio")]
        session = hub.sessions[bytes(16)]
        assert session.sent.total == wire.client.received.total
        assert session.received.total == wire.client.sent.total
        assert session.stats(2 * SECOND).gross_sent == wire.client.received.rate(2 * SECOND) > 0
        wire.client.said.append(Bye())
        wire.step(SECOND, 10)
        assert wire.connection.due() == 0
        hub.handle(wire.connection, wire.connection.tick(SECOND), SECOND)
        wire.step(SECOND, 10)
        assert wire.found[-1] == Bye()
        assert session.state is SessionState.ENDED

    def test_a_late_joiner_starts_at_the_next_block(self):
        hub = Hub()
        publisher, late = Wire(hub, PUBLISH), Wire(hub, SUBSCRIBE)
        publisher.settle(0)
        for seq in range(5):
            publisher.client.push(block(seq))
        publisher.settle(0)
        late.settle(0)
        publisher.client.push(block(5))
        publisher.settle(0)
        late.settle(0)
        assert late.told == [5]

    def test_a_server_that_forgot(self):
        """Killed and restarted: the client hears so, and starts anew."""
        hub = Hub()
        wire = Wire(hub, PUBLISH)
        wire.settle(0)
        wire.client.push(block(0))
        wire.step(0, 1)
        wire.cut(0)
        hub.sessions.clear()
        wire.connect(0)
        wire.step(0, 10)
        assert [m.code for m in wire.found if isinstance(m, Error)] == [Code.UNKNOWN_SESSION]
        wire.settle(0)
        assert wire.client.open
        assert not wire.client.ready.resumed

    @given(seed=st.integers(0, 2**32 - 1), bundle=st.sampled_from([None, 320, 1300]), copies=st.integers(0, 2))
    @settings(max_examples=25)
    def test_exactly_once_over_connections_that_break(self, seed: int, bundle: int | None, copies: int):
        """A publisher and a subscriber whose connections break at any moment, also unnoticed: within the window every
        block arrives once, beyond it the gap is reported."""
        rng = random.Random(seed)
        hub = Hub()
        up = Wire(hub, dataclasses.replace(PUBLISH, latency=bundle))
        down = Wire(hub, dataclasses.replace(SUBSCRIBE, latency=bundle, copies=copies))
        down.settle(0)
        up.settle(0)
        sent = now = 0
        for _ in range(300):
            now += MINI.block_ns // 8
            if rng.random() < 0.12:
                up.client.push(block(sent))
                sent += 1
            for wire in (up, down):
                if wire.connection is None:
                    if rng.random() < 0.3:
                        wire.connect(now)
                elif rng.random() < 0.05:
                    wire.cut(now, half_open=rng.random() < 0.3)
                else:
                    wire.step(now, rng.randint(0, 3))
        up.client.outlet.mark(flush=True)
        for wire in (up, down, up, down):
            wire.settle(now)
        assert down.told == list(range(sent))
        assert not [event for event in down.found if isinstance(event, Lost)]
        assert all(number(event.item) == event.seq for event in down.found if isinstance(event, Arrived))
        assert [event.flush for event in down.found if isinstance(event, Marker)] == [True]

    def test_500_cuts(self):
        rng = random.Random(5)
        hub = Hub()
        up, down = Wire(hub, PUBLISH), Wire(hub, SUBSCRIBE)
        down.settle(0)
        up.settle(0)
        sent = now = cuts = 0
        while cuts < 500:
            now += MINI.block_ns // 8
            if rng.random() < 0.12:
                up.client.push(block(sent))
                sent += 1
            for wire in (up, down):
                if wire.connection is None:
                    wire.connect(now)
                elif rng.random() < 0.2:
                    wire.cut(now)
                    cuts += 1
                wire.step(now, rng.randint(0, 2))
        for wire in (up, down):
            wire.settle(now)
        assert down.told == list(range(sent))
        assert sent > 100
        assert not [event for event in down.found if isinstance(event, Lost)]

    def test_an_absence_beyond_the_window_is_reported_in_full(self):
        hub = Hub(dataclasses.replace(SMALL, slow_high=16))
        up, down = Wire(hub, PUBLISH), Wire(hub, SUBSCRIBE)
        down.settle(0)
        up.settle(0)
        for seq in range(50):
            up.client.push(block(seq))
            up.settle(0)
            if seq == 9:
                down.settle(0)
                down.cut(0)
        down.settle(0)
        assert down.told == list(range(50))
        assert [e for e in down.found if isinstance(e, Lost)] == [Lost(10, 34, "window")]

    def test_a_server_that_stalls_bounds_what_the_client_may_send(self):
        hub = Hub(dataclasses.replace(SMALL, slow_high=10))
        wire, down = Wire(hub, PUBLISH), Wire(hub, SUBSCRIBE)
        wire.settle(0)
        down.settle(0)
        hub.working = False
        for seq in range(40):
            wire.client.push(block(seq))
            wire.settle(0)
            assert len(hub.queue) <= SMALL.high
            assert wire.client.outlet.sender.kept <= SMALL.window
        hub.working = True
        hub.work(0)
        for _ in range(100):
            down.step(0, 100)
            wire.step(0, 1)
        assert down.told == list(range(40))
        lost = [e for e in down.found if isinstance(e, Lost)]
        assert [e.reason for e in lost] == ["overload"]


class Server(RuleBasedStateMachine):
    """Anything a client, the engine, the room, the network and the clock can do, in any order."""

    @initialize(hello=st.sampled_from([PUBLISH, SUBSCRIBE, LOOP, dataclasses.replace(LOOP, copies=2, latency=700)]))
    def start(self, hello: Hello):
        self.now = 0
        self.hello = hello
        self.limits = dataclasses.replace(SMALL, messages=2000, octets=1 << 20)
        self.session = Session(bytes(16), "me", hello, OFFER, self.limits, 0)
        self.connection = Connection(self.limits, 0)
        self.receive(encode(hello))
        self.next = 0
        self.made = 0
        self.last_told: Ready | None = None

    def receive(self, data: bytes):
        for event in self.connection.receive(data, self.now):
            self.handle(event)

    def handle(self, event: object):
        if isinstance(event, Asked):
            self.connection.accept(self.session, event.request, self.now)
        elif isinstance(event, Left):
            expected = SessionState.DETACHED if event.resumable else SessionState.ENDED
            assert self.session.state is expected
        elif isinstance(event, Bye):
            assert self.hello.role == "transcode"
            self.connection.finish()
        else:
            assert isinstance(event, Arrived | Lost | Marker | Tune | Stats)

    @rule(message=some_message())
    def say_anything(self, message: messages.Message):
        self.receive(encode(message))

    @rule(data=st.binary(max_size=40))
    def send_garbage(self, data: bytes):
        self.receive(data)

    @rule(skip=st.integers(0, 2), rate=st.sampled_from((100, 50, 25)))
    def send_a_unit(self, skip: int, rate: int):
        self.next += skip
        if self.hello.send == "codes":
            self.receive(encode(Codes(self.next, block(0, rate).data, rate=rate)))
        elif self.hello.send == "audio":
            self.receive(encode(Audio(self.next, self.next * 320, bytes(640))))
        self.next += 1

    @rule(back=st.integers(0, 3), kind=st.sampled_from(("codes", "audio")))
    def acknowledge(self, back: int, kind: str):
        outlet = {"codes": self.session.codes_out, "audio": self.session.audio_out}[kind]
        if outlet is not None:
            self.receive(encode(Ack(max(0, outlet.sender.cursor - back), kind=kind)))

    @rule()
    def work(self):
        if self.session.pending:
            self.session.done(1, min(self.session.pending_bytes, 25))

    @rule(count=st.integers(1, 4), loss=st.integers(0, 2), mark=st.booleans())
    def produce(self, count: int, loss: int, mark: bool):
        for _ in range(count):
            if self.session.codes_out is not None:
                self.session.send_block(dataclasses.replace(block(self.made), copy=bytes(13)), self.now)
            if self.session.audio_out is not None:
                self.session.send_audio(bytes(200), self.made * 100, self.now)
            self.made += 1
        for kind, outlet in (("codes", self.session.codes_out), ("audio", self.session.audio_out)):
            if outlet is not None:
                self.session.send_lost(kind, loss, "source")
                if mark:
                    self.session.mark(kind)
        self.session.tell(Room(True, count))

    @rule(ns=st.sampled_from((0, 1, SECOND // 3, 11 * SECOND, 3600 * SECOND, -5 * SECOND)))
    def time_passes(self, ns: int):
        self.now = max(0, self.now + ns)
        for event in self.connection.tick(self.now):
            self.handle(event)

    @rule(count=st.integers(1, 8))
    def pull(self, count: int):
        for _ in range(count):
            data = self.connection.pull(self.now)
            if data is None:
                break
            message = decode(data)
            assert not isinstance(message, messages.Unknown)
            assert message.sender != "client"

    @rule(noticed=st.booleans(), back=st.integers(0, 20))
    def reconnect(self, noticed: bool, back: int):
        old = self.connection
        if noticed:
            for event in old.lost(self.now):
                self.handle(event)
        self.connection = Connection(self.limits, self.now)
        codes, audio = self.session.codes_out, self.session.audio_out
        resume = Resume(
            bytes(16),
            0 if codes is None else max(0, codes.sender.cursor - back),
            0 if audio is None else max(0, audio.sender.cursor - back),
        )
        self.receive(encode(resume))
        for event in old.bye(Code.REPLACED, "resumed", self.now):
            self.handle(event)
        if self.connection.state is State.OPEN:
            ready = decode(self.connection.pull(self.now))
            assert isinstance(ready, Ready)
            assert ready.resumed
            self.next = ready.next

    @precondition(lambda self: self.session.state is SessionState.ENDED)
    @rule()
    def begin_anew(self):
        self.start(self.hello)

    @invariant()
    def everything_is_bounded(self):
        if not hasattr(self, "session"):
            return
        session, limits = self.session, self.limits
        assert session.pending <= limits.high + messages.MAX_COPIES
        for outlet in (session.codes_out, session.audio_out):
            if outlet is not None:
                assert outlet.sender.kept <= limits.window
                assert outlet.sender.kept_bytes <= limits.window_bytes
                assert outlet.sender.entries <= 2 * limits.window + 4 * link.MAX_MARKERS + 4
                assert outlet.sender.first <= outlet.sender.cursor <= outlet.sender.next
        assert len(session._news) <= 3
        assert len(self.connection._answers) <= 6
        if self.connection.state is State.CLOSING:
            assert self.connection.close is not None


Server.TestCase.settings = settings(max_examples=100, stateful_step_count=60)
TestStateMachine = Server.TestCase


def test_throttle():
    throttle = Throttle(10, 2, 0)
    assert throttle.take(20, 0)
    assert not throttle.take(1, 0)
    assert throttle.take(1, SECOND // 10)
    assert not throttle.take(1, SECOND // 10)
    assert throttle.take(20, 10 * SECOND)
    assert not throttle.take(1, 0)
