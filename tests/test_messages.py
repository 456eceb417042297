"""Session messages: round trips, bounds, and what strangers may send."""

import dataclasses
import random
import re
import time
import tracemalloc
from binascii import crc_hqx

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from semanticodec.errors import CorruptedError, TruncatedError, VersionError, WireError
from semanticodec.wire import messages
from semanticodec.wire.closing import Code, what_next
from semanticodec.wire.fields import layout
from semanticodec.wire.messages import (
    MESSAGES,
    Ack,
    Audio,
    Bye,
    Codes,
    Hello,
    Marker,
    Missing,
    Ping,
    Ready,
    Room,
    Unknown,
    decode,
    encode,
    negotiate,
)

READY = Ready(bytes(16), ("mini-100", "mini-25"), ("0123abcd",) * 2, (100, 25), 100, 5120, (12, 13), 64)


def values(wanted: str) -> st.SearchStrategy:
    """Values of a field, made from the words that describe them."""
    if match := re.fullmatch(r"array of (\d+)(?:\.\.(\d+))?( different)?: (.*)", wanted):
        low, high, different, inner = match.groups()
        return st.lists(values(inner), min_size=int(low), max_size=int(high or low), unique=bool(different)).map(tuple)
    if match := re.fullmatch(r"integer (\d+)\.\.(\d+)", wanted):
        return st.integers(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)(?:\.\.(\d+))? bytes", wanted):
        return st.binary(min_size=int(match[1]), max_size=min(200, int(match[2] or match[1])))
    if match := re.fullmatch(r"text of at most (\d+) bytes(?:, (.*))?", wanted):
        plain = st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), max_size=40)
        made = st.from_regex(match[2], fullmatch=True, alphabet=st.characters(max_codepoint=126)) if match[2] else plain
        return made.filter(lambda value: len(value.encode()) <= int(match[1]))
    if wanted == "boolean":
        return st.booleans()
    assert wanted.startswith("one of ")
    return st.sampled_from(wanted.removeprefix("one of ").split(", "))


@st.composite
def some_message(draw: st.DrawFn) -> messages.Message:
    kind = draw(st.sampled_from(MESSAGES))
    chosen = {}
    for field in layout(kind):
        absent = st.just(field.default) if field.default is not dataclasses.MISSING else st.nothing()
        chosen[field.name] = draw(absent | values(field.rule.wanted))
    if kind is Hello:
        role = chosen["role"]
        chosen["send"] = None if role == "subscribe" else chosen["send"] or "audio"
        both = chosen["receive"] or ("audio",)
        chosen["receive"] = () if role == "publish" else ("audio",) if chosen["send"] == "codes" else both
        chosen["room"] = None if role == "transcode" else "den"
    if kind is Ready:
        count = min(len(chosen[name]) for name in ("presets", "weights", "rates"))
        chosen |= {name: chosen[name][:count] for name in ("presets", "weights", "rates")}
        chosen["rate"] = chosen["rates"][0]
    if kind is Codes:
        chosen["copy_rate"] = 25 if chosen["copies"] else None
    if kind is Missing:
        chosen["first"], chosen["stop"] = sorted((chosen["first"], chosen["stop"]))
        chosen["stop"] += chosen["first"] == chosen["stop"]
    return kind(**chosen)


@given(some_message())
def test_round_trip(message: messages.Message):
    data = encode(message)
    assert decode(data) == message
    assert len(data) <= messages.MAX_MESSAGE
    assert set(msgpack.unpackb(data, strict_map_key=False)) <= {0, *(field.key for field in layout(type(message)))}


@given(some_message(), st.data())
def test_every_cut_is_refused(message: messages.Message, data: st.DataObject):
    whole = encode(message)
    with pytest.raises(WireError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(some_message(), st.integers(1000, 1 << 40), st.integers() | st.text() | st.none() | st.lists(st.booleans()))
def test_unknown_fields_are_ignored(message: messages.Message, key: int, value: object):
    if isinstance(value, int):
        value %= 1 << 64
    fields = {key: value} | msgpack.unpackb(encode(message), strict_map_key=False)
    data = msgpack.packb(fields)
    if isinstance(message, Codes):
        data = data[:-2] + crc_hqx(data[:-2], 0xFFFF).to_bytes(2, "big")
    assert decode(data) == message


def test_unknown_types_are_ignored():
    assert decode(msgpack.packb({0: 99, 1: [1, 2], 7: "new"})) == Unknown(99)


def test_types_and_keys_are_unique():
    assert sorted(kind.type for kind in MESSAGES) == list(range(1, len(MESSAGES) + 1))
    for kind in MESSAGES:
        keys = [field.key for field in layout(kind)]
        assert sorted(keys) == list(range(1, len(keys) + 1)), kind
        assert kind.sender in ("client", "server", "both")


def test_a_block_of_mini_takes_60_bytes():
    assert len(encode(Codes(1000, bytes(50)))) == 60
    assert len(encode(Ack(1000))) <= 9


OUT_OF_RANGE = [
    (lambda: Ping(-1), "ping.nonce is -1; wanted integer"),
    (lambda: Ping(True), "ping.nonce is True"),
    (lambda: Ping(1 << 48), "wanted integer"),
    (lambda: Ping(1.0), "wanted integer"),
    (lambda: Audio(0, 0, b"x"), "wanted 2..262144 bytes"),
    (lambda: Audio(0, 0, bytearray(4)), "bytes"),
    (lambda: Hello("listen"), "one of publish, subscribe, transcode"),
    (lambda: Hello("publish", room="den"), "sends None"),
    (lambda: Hello("publish", send="audio"), "names room None"),
    (lambda: Hello("publish", send="audio", room="a b"), "hello.room"),
    (lambda: Hello("publish", send="audio", room="a\n"), "hello.room"),
    (lambda: Hello("publish", send="audio", room="x" * 65), "at most 64 bytes"),
    (lambda: Hello("publish", send="audio", receive=("audio",), room="den"), "receives"),
    (lambda: Hello("subscribe", room="den"), "receives"),
    (lambda: Hello("subscribe", send="codes", receive=("codes",), room="den"), "sends codes"),
    (lambda: Hello("subscribe", receive=("codes", "codes"), room="den"), "different"),
    (lambda: Hello("transcode", send="audio", receive=("codes",), room="den"), "names room"),
    (lambda: Hello("transcode", send="codes", receive=("codes",)), "do not come back"),
    (lambda: Hello("transcode", send="audio", receive=("audio",), token="x" * 513), "at most 512"),
    (lambda: Bye(reason="bell \x07"), "bye.reason"),
    (lambda: Bye(reason="\ud800"), "bye.reason"),
    (lambda: Bye(url="http://a"), "wss?://"),
    (lambda: dataclasses.replace(READY, rate=50), "disagree"),
    (lambda: dataclasses.replace(READY, rates=(100,)), "disagree"),
    (lambda: Codes(0, bytes(50), copies=b"x"), "come together"),
    (lambda: Codes(0, b""), "codes.data"),
    (lambda: Missing(5, 5), "first before stop"),
    (lambda: Room(1), "wanted boolean"),
]


@pytest.mark.parametrize(("make", "complaint"), OUT_OF_RANGE, ids=range(len(OUT_OF_RANGE)))
def test_values_out_of_range_are_refused(make, complaint: str):
    with pytest.raises(WireError, match=re.escape(complaint)):
        make()


HOSTILE = [
    (b"", "incomplete"),
    (b"\xc0", "a NoneType; wanted a map"),
    (b"\x91\x01", "a tuple; wanted a map"),
    (b"\x80", "codes need data"),
    (b"\x81\x00\xc3", "type True"),
    (b"\x81\x00\x00", "type 0"),
    (b"\x81\x00\x0c\x00", "1 bytes after the message"),
    (b"\x82\x00\x0c\x00\x0c", "different integers"),
    (b"\x81\xa1t\x0c", "different integers"),
    (b"\x82\x00\x0c\xff\x00", "different integers"),
    (b"\x82\x00\x0c\xc2\x00", "different integers"),
    (b"\x82\x00\x0c\x01\xc0", "ping.nonce is None"),
    (b"\x82\x00\x0c\x01\xcb" + bytes(8), "ping.nonce is 0.0"),
    (b"\x82\x00\x0c\x01\xd6\xff" + bytes(4), "max_ext_len"),
    (b"\x82\x00\x0e\x02\xa1x", "error lacks code (key 1)"),
    (b"\x83\x00\x0e\x01\xcd\x0f\xa0\x02\xa1\xff", "utf-8"),
    (b"\x81\x81\x00\x01\x01", "unhashable"),
    (b"\xdf\xff\xff\xff\xff", "max_map_len"),
    (b"\xdd\xff\xff\xff\xff", "max_array_len"),
    (b"\x82\x00\x63\x01" + b"\x91" * 3 + b"\x00", None),
    (b"\x82\x00\x63\x01" + b"\x91" * 4 + b"\x00", "nested more than 4 deep"),
    (b"\x82\x00\x63\x01" + b"\x81\x01" * 4 + b"\x00", "nested more than 4 deep"),
    (b"\x82\x00\x63\x01" + b"\x91" * 100_000 + b"\x00", "too deep"),
    (b"\x81\x00" * 100_000, "too deep"),
    (bytes(messages.MAX_MESSAGE + 1), "262401 bytes; at most 262400"),
    (b"\x83\x00\x05\x01\x00\x02\xc4\x02" + bytes(2), "codes need data of more than 2 bytes"),
    (b"\x83\x00\x05\x02\xc4\x05" + bytes(5) + b"\x01\x00", "last in the map"),
    (b"\x82\x00\x05\x01\x00", "codes need data"),
    (b"\x83\x00\x05\x01\x00\x02\xc4\x05" + bytes(5), "CRC"),
]


@pytest.mark.parametrize(("data", "complaint"), HOSTILE, ids=range(len(HOSTILE)))
def test_what_strangers_send(data: bytes, complaint: str | None):
    if complaint is None:
        assert decode(data) == Unknown(99)
    else:
        with pytest.raises(WireError, match=re.escape(complaint)):
            decode(data)


def test_errors_are_told_apart():
    whole = encode(Codes(7, bytes(50)))
    with pytest.raises(TruncatedError):
        decode(whole[:-1])
    for i in range(len(whole) - 52, len(whole)):
        with pytest.raises(CorruptedError):
            decode(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])


def test_claimed_sizes_cost_no_memory():
    hostile = [b"\x82\x00\x04\x03\xc6\x00\x03\xff\xff", b"\x82\x00\x63\x01\xdc\x00\x40" + b"\xdc\x00\x40" * 80_000]
    tracemalloc.start()
    for data in hostile * 20:
        with pytest.raises(WireError):
            decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * messages.MAX_MESSAGE


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat, or splice bytes."""
    octets = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(octets) + 1)
        match rng.randrange(5):
            case 0 if octets:
                octets[min(at, len(octets) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del octets[at : at + rng.randint(1, 8)]
            case 2:
                octets[at:at] = rng.randbytes(rng.randint(1, 8))
            case 3:
                octets[at:at] = octets[max(0, at - rng.randint(1, 16)) : at]
            case _:
                octets[at : at + 1] = rng.choice(
                    (b"\x81", b"\x91", b"\xc6", b"\xdd", b"\xdf", b"\xff", b"\xc1", b"\xd9")
                )
    return bytes(octets)


def test_100_000_mutated_messages():
    """Each is a message or a WireError, and no codes get through that were not sent."""
    rng = random.Random(3)
    seeds = [
        encode(Hello("publish", send="audio", room="den", token="secret", features=("room", "stats"))),
        encode(READY),
        encode(Audio(7, 6720, bytes(40))),
        encode(Codes(300, bytes(range(50)), at=5, copies=bytes(13), copy_rate=25)),
        encode(Codes(301, bytes(range(50)))),
        encode(Ack(310, 342, "audio", 3)),
        encode(Marker(1, 310, True, 1586000)),
        encode(Missing(310, 325, "slow", total=15)),
        encode(Bye(4001, "later", 5, "wss://b.example/")),
    ]
    whole = {decode(data) for data in seeds}
    begun = time.perf_counter()
    counts = {"message": 0, "unknown": 0, "refused": 0}
    longest = 0
    for i in range(100_000):
        try:
            message = decode(mutate(seeds[i % len(seeds)], rng))
        except WireError as error:
            counts["refused"] += 1
            longest = max(longest, len(str(error)))
        else:
            counts["unknown" if isinstance(message, Unknown) else "message"] += 1
            assert not isinstance(message, Codes) or message in whole
    assert longest < 400
    assert min(counts.values()) > 100, counts
    assert time.perf_counter() - begun < 120


class TestNegotiation:
    def test_ours_is_chosen(self):
        assert negotiate(["semanticodec.v9", messages.SUBPROTOCOL]) == "semanticodec.v1"

    @pytest.mark.parametrize("offered", [[], ["semanticodec.v2"], ["chat", "x" * 10_000]])
    def test_others_are_refused_by_name(self, offered: list[str]):
        with pytest.raises(VersionError, match=re.escape("this end speaks semanticodec.v1")) as caught:
            negotiate(offered)
        assert all(name[:40] in str(caught.value) for name in offered)
        assert len(str(caught.value)) < 1000


class TestCloseCodes:
    def test_they_are_legal(self):
        """RFC 6455, section 7.4: applications use 4000-4999, and 1000 for a normal end."""
        assert all(code == 1000 or 4000 <= code <= 4999 for code in Code)
        assert {code.retry for code in Code} == {"no", "resume", "later"}

    def test_what_next(self):
        assert [what_next(code) for code in (1000, 4001, 4503, 4999)] == ["no", "resume", "later", "later"]
