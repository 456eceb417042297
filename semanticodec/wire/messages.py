"""What client and server say to each other: typed messages, their bytes, and the table of close codes.

Every binary WebSocket message is one msgpack map with small integer keys; key 0 is the message's type, codes if there
is none.  A field that has its default is left out.  ``server/PROTOCOL.md`` is the specification; a test reads it and
this file side by side.

What a stranger sends is bounded before anything is built from it: bytes per message, entries per map and array, bytes
per text and binary, depth.  Unknown keys and unknown types are ignored, so that newer peers may say more.
"""

from __future__ import annotations

import dataclasses
import typing
from binascii import crc_hqx
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgpack

from ..errors import CorruptedError, TruncatedError, VersionError, WireError
from .closing import Code
from .fields import Message, choice, flag, layout, many, number, octets, short, text
from .packing import MAX_BITS

SUBPROTOCOL = "semanticodec.v1"
"""What both ends name in ``Sec-WebSocket-Protocol``."""

MAX_AUDIO_BYTES = 1 << 18
"""Bytes of samples in one message."""
MAX_MESSAGE = MAX_AUDIO_BYTES + 256
"""Bytes of any message."""
MAX_DEPTH = 4
"""Maps and arrays inside each other, the message itself included."""
MAX_ENTRIES = 64
"""Entries of one map or array."""
MAX_BUNDLE = 32
"""Blocks in one codes message."""
MAX_COPIES = 8
"""Redundant blocks in one codes message."""
MAX_CODES_BYTES = 1 << 15
CRC_BYTES, CRC_INIT = 2, 0xFFFF
"""Of the CRC behind codes: polynomial 0x1021, most significant bit first (CRC-16/IBM-3740)."""
MAX_GAP = 1 << 16
"""Units that may be skipped at once."""
FEATURES = ("room", "stats")
"""Optional abilities that this version knows, besides "entropy-" and the identity of each prior it has."""
MAX_SEQ = (1 << 48) - 1
"""Sequence numbers and sample positions, so that they are exact in JavaScript too."""
MAX_MS = 86_400_000
MIN_AUDIO_RATE, MAX_AUDIO_RATE = 8_000, 192_000

Kind = Literal["codes", "audio"]
Role = Literal["publish", "subscribe", "transcode"]
SampleFormat = Literal["s16", "f32"]
Loss = Literal["window", "slow", "source", "overload"]

KINDS: tuple[Kind, ...] = typing.get_args(Kind)
ROLES: tuple[Role, ...] = typing.get_args(Role)
FORMATS: tuple[SampleFormat, ...] = typing.get_args(SampleFormat)
LOSSES: tuple[Loss, ...] = typing.get_args(Loss)


_SEQ = number(0, MAX_SEQ)
_RATE = number(1, 10_000)
_BLOCKS = number(1, MAX_BUNDLE)
_COPIES = number(0, MAX_COPIES)
_MS = number(0, MAX_MS)
_BPS = number(0, 1 << 32)
_COUNT = number(0, 1 << 48)
_NAME = text(64, "[A-Za-z0-9._-]+")
_HASH = text(8, "[0-9a-f]{8}")
_ID = octets(16, 16)
_TOKEN = text(512)
_REASON = text(256)
_CODE = number(1000, 4999)
_FEATURES = many(text(32, "[a-z0-9-]+"), 0, 16)


@dataclass(frozen=True)
class Hello(Message):
    """Begin a session."""

    type = 1
    sender = "client"
    role: Annotated[Role, 1, choice(ROLES)]
    send: Annotated[Kind | None, 2, choice(KINDS)] = None
    receive: Annotated[tuple[Kind, ...], 3, many(choice(KINDS), 0, 2)] = ()
    room: Annotated[str | None, 4, _NAME] = None
    preset: Annotated[str | None, 5, text(128)] = None
    weights: Annotated[str | None, 6, _HASH] = None
    sample_rate: Annotated[int, 7, number(MIN_AUDIO_RATE, MAX_AUDIO_RATE)] = 16_000
    sample_format: Annotated[SampleFormat, 8, choice(FORMATS)] = "s16"
    latency: Annotated[int | None, 9, _MS] = None
    gross: Annotated[int | None, 10, _BPS] = None
    copies: Annotated[int, 11, _COPIES] = 0
    features: Annotated[tuple[str, ...], 12, _FEATURES] = ()
    token: Annotated[str | None, 13, _TOKEN] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        publishes, subscribes = self.role != "subscribe", self.role != "publish"
        if (self.send is not None) != publishes or bool(self.receive) != subscribes:
            raise WireError(f"a {self.role} hello sends {self.send} and receives {list(self.receive)}; see the roles")
        if (self.room is None) != (self.role == "transcode"):
            raise WireError(f"a {self.role} hello names room {self.room!r}; rooms are for publish and subscribe")
        if self.send == "codes" and "codes" in self.receive:
            raise WireError("codes that are sent do not come back; receive audio")


@dataclass(frozen=True)
class Ready(Message):
    """Answer hello and resume: what this session is."""

    type = 2
    sender = "server"
    session: Annotated[bytes, 1, _ID]
    presets: Annotated[tuple[str, ...], 2, many(text(128), 1, 8)]
    weights: Annotated[tuple[str, ...], 3, many(_HASH, 1, 8, distinct=False)]
    rates: Annotated[tuple[int, ...], 4, many(_RATE, 1, 8)]
    rate: Annotated[int, 5, _RATE]
    block: Annotated[int, 6, number(1, 1 << 24)]
    code_bits: Annotated[tuple[int, ...], 7, many(number(1, MAX_BITS), 2, 2, distinct=False)]
    window: Annotated[int, 8, number(1, 1 << 16)]
    bundle: Annotated[int, 9, _BLOCKS] = 1
    copies: Annotated[int, 10, _COPIES] = 0
    features: Annotated[tuple[str, ...], 11, _FEATURES] = ()
    resumed: Annotated[bool, 12, flag()] = False
    next: Annotated[int, 13, _SEQ] = 0
    limit: Annotated[int, 14, _SEQ] = 0
    codes_next: Annotated[int, 15, _SEQ] = 0
    audio_next: Annotated[int, 16, _SEQ] = 0
    keep: Annotated[int, 17, _MS] = 0
    idle: Annotated[int, 18, _MS] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.presets) == len(self.weights) == len(self.rates) or self.rate not in self.rates:
            raise WireError(
                f"ready has presets {self.presets}, rates {self.rates} and rate {self.rate}, which disagree"
            )


@dataclass(frozen=True)
class Resume(Message):
    """Go on with a session after its connection broke."""

    type = 3
    sender = "client"
    session: Annotated[bytes, 1, _ID]
    codes_next: Annotated[int, 2, _SEQ] = 0
    audio_next: Annotated[int, 3, _SEQ] = 0
    token: Annotated[str | None, 4, _TOKEN] = None
    first: Annotated[int, 5, _SEQ] = 0


@dataclass(frozen=True)
class Audio(Message):
    """A chunk of mono samples."""

    type = 4
    sender = "both"
    seq: Annotated[int, 1, _SEQ]
    at: Annotated[int, 2, _SEQ]
    data: Annotated[bytes, 3, octets(2, MAX_AUDIO_BYTES)]


@dataclass(frozen=True)
class Codes(Message):
    """Packed blocks of codes, one after the other; on the wire ``data`` ends with a CRC-16 of the message before it."""

    type = 5
    sender = "both"
    seq: Annotated[int, 1, _SEQ]
    data: Annotated[bytes, 2, octets(1, MAX_CODES_BYTES)]
    rate: Annotated[int | None, 3, _RATE] = None
    at: Annotated[int | None, 4, _SEQ] = None
    copies: Annotated[bytes, 5, octets(0, MAX_CODES_BYTES)] = b""
    copy_rate: Annotated[int | None, 6, _RATE] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.copies) != (self.copy_rate is not None):
            raise WireError("copies and copy_rate come together")


@dataclass(frozen=True)
class Ack(Message):
    """Everything before ``next`` has arrived, and everything before ``limit`` may be sent."""

    type = 6
    sender = "both"
    next: Annotated[int, 1, _SEQ]
    limit: Annotated[int | None, 2, _SEQ] = None
    kind: Annotated[Kind, 3, choice(KINDS)] = "codes"
    marker: Annotated[int, 4, _SEQ] = 0


@dataclass(frozen=True)
class Marker(Message):
    """A place in the stream, before unit ``seq``; ``flush`` asks that what came before is coded without waiting."""

    type = 7
    sender = "both"
    id: Annotated[int, 1, number(1, MAX_SEQ)]
    seq: Annotated[int, 2, _SEQ]
    flush: Annotated[bool, 3, flag()] = False
    at: Annotated[int | None, 4, _SEQ] = None
    kind: Annotated[Kind, 5, choice(KINDS)] = "codes"
    tag: Annotated[int, 6, _SEQ] = 0


@dataclass(frozen=True)
class Tune(Message):
    """Ask for another rate, bundling or redundancy (client); say what holds from now on (server)."""

    type = 8
    sender = "both"
    rate: Annotated[int | None, 1, _RATE] = None
    latency: Annotated[int | None, 2, _MS] = None
    gross: Annotated[int | None, 3, _BPS] = None
    copies: Annotated[int | None, 4, _COPIES] = None
    bundle: Annotated[int | None, 5, _BLOCKS] = None


@dataclass(frozen=True)
class Missing(Message):
    """Units ``first`` to ``stop - 1`` will never come; ``total`` counts all that were lost in this stream."""

    type = 9
    sender = "both"
    first: Annotated[int, 1, _SEQ]
    stop: Annotated[int, 2, _SEQ]
    reason: Annotated[Loss, 3, choice(LOSSES)] = "window"
    kind: Annotated[Kind, 4, choice(KINDS)] = "codes"
    total: Annotated[int, 5, _COUNT] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first >= self.stop:
            raise WireError(f"missing.first is {self.first} and stop {self.stop}; wanted first before stop")


@dataclass(frozen=True)
class Room(Message):
    """Whether a room is live, and how many listen."""

    type = 10
    sender = "server"
    live: Annotated[bool, 1, flag()]
    listeners: Annotated[int, 2, number(0, 1 << 24)] = 0


@dataclass(frozen=True)
class Stats(Message):
    """What one end has measured since the session began."""

    type = 11
    sender = "both"
    net: Annotated[int, 1, _BPS] = 0
    gross_sent: Annotated[int, 2, _BPS] = 0
    gross_received: Annotated[int, 3, _BPS] = 0
    sent: Annotated[int, 4, _COUNT] = 0
    received: Annotated[int, 5, _COUNT] = 0
    lost: Annotated[int, 6, _COUNT] = 0
    recovered: Annotated[int, 7, _COUNT] = 0
    repeated: Annotated[int, 8, _COUNT] = 0
    queued: Annotated[int, 9, _COUNT] = 0
    delay: Annotated[int, 10, _MS] = 0
    underruns: Annotated[int, 11, _COUNT] = 0


@dataclass(frozen=True)
class Ping(Message):
    """Ask for a pong with the same number."""

    type = 12
    sender = "both"
    nonce: Annotated[int, 1, _SEQ] = 0


@dataclass(frozen=True)
class Pong(Message):
    """Answer a ping."""

    type = 13
    sender = "both"
    nonce: Annotated[int, 1, _SEQ] = 0


@dataclass(frozen=True)
class Error(Message):
    """Why the other end's last message was refused, or why the connection is about to be closed."""

    type = 14
    sender = "both"
    code: Annotated[int, 1, _CODE]
    reason: Annotated[str, 2, _REASON] = ""
    retry: Annotated[int | None, 3, _MS] = None


@dataclass(frozen=True)
class Bye(Message):
    """End the session as agreed; from the server with ``ELSEWHERE``, go on with it at ``url``."""

    type = 15
    sender = "both"
    code: Annotated[int, 1, _CODE] = int(Code.DONE)
    reason: Annotated[str, 2, _REASON] = ""
    retry: Annotated[int | None, 3, _MS] = None
    url: Annotated[str | None, 4, text(512, "wss?://[!-~]+")] = None


@dataclass(frozen=True)
class Unknown:
    """A message of a type that this version does not know; to be ignored."""

    type: int


MESSAGES: tuple[type[Message], ...] = (
    *(Hello, Ready, Resume, Audio, Codes, Ack, Marker, Tune),
    *(Missing, Room, Stats, Ping, Pong, Error, Bye),
)
_BY_TYPE = {kind.type: kind for kind in MESSAGES}


def negotiate(offered: Iterable[str]) -> str:
    """Choose a sub-protocol among those that a client offers.

    Raises:
        VersionError: none of them is known; close with ``Code.BAD_VERSION``.
    """
    names = list(offered)
    if SUBPROTOCOL not in names:
        seen = ", ".join(short(name) for name in names[:8]) or "none"
        raise VersionError(f"sub-protocols offered: {seen}; this end speaks {SUBPROTOCOL}")
    return SUBPROTOCOL


def encode(message: Message) -> bytes:
    """Return the bytes of a message.

    Raises:
        WireError: it is larger than any message may be.
    """
    # Codes are what a thin link carries: they need not say so.
    fields: dict[int, Any] = {} if isinstance(message, Codes) else {0: message.type}
    for field in layout(type(message)):
        value = getattr(message, field.name)
        if value != field.default:
            fields[field.key] = value
    if not isinstance(message, Codes):
        return bytes(msgpack.packb(fields))
    # Last in the map and with room for the CRC, which then covers every byte before it.
    fields[_DATA] = fields.pop(_DATA) + bytes(CRC_BYTES)
    body = msgpack.packb(fields)[:-CRC_BYTES]
    return bytes(body) + crc_hqx(body, CRC_INIT).to_bytes(CRC_BYTES, "big")


def decode(data: bytes) -> Message | Unknown:
    """Undo :func:`encode`.

    Args:
        data: one binary WebSocket message, by anybody.

    Raises:
        TruncatedError: the message ends too early.
        CorruptedError: the CRC of a codes message does not hold.
        WireError: anything else is wrong with it.
    """
    fields = _fields(data)
    tag = fields.pop(0, Codes.type)
    if type(tag) is not int or not 0 < tag <= MAX_SEQ:
        raise WireError(f"the message has type {short(tag)}; wanted a positive integer under key 0")
    kind = _BY_TYPE.get(tag)
    if kind is None:
        return Unknown(tag)
    if kind is Codes:
        _check_crc(data, fields)
    values = {}
    for field in layout(kind):
        if field.key in fields:
            values[field.name] = fields[field.key]
        elif field.default is dataclasses.MISSING:
            raise WireError(f"{kind.__name__.lower()} lacks {field.name} (key {field.key})")
    return kind(**values)


_DATA = next(field.key for field in layout(Codes) if field.name == "data")


def _fields(data: bytes) -> dict[int, Any]:
    """Parse the map, within bounds."""
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a message of {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    try:
        fields = msgpack.unpackb(
            data,
            use_list=False,
            strict_map_key=False,
            object_pairs_hook=_map,
            max_str_len=1024,
            max_bin_len=MAX_AUDIO_BYTES,
            max_array_len=MAX_ENTRIES,
            max_map_len=MAX_ENTRIES,
            max_ext_len=0,
        )
    except msgpack.ExtraData as error:
        raise WireError(f"{len(error.extra)} bytes after the message") from None
    # The last two: maps as keys, and deep nesting in some versions of msgpack.
    except (ValueError, TypeError, RecursionError) as error:
        kind = TruncatedError if "incomplete" in str(error) else WireError
        raise kind(f"the message is not msgpack within bounds: {short(str(error) or 'too deep')}") from None
    if type(fields) is not dict:
        raise WireError(f"the message is a {type(fields).__name__}; wanted a map")
    if not _shallow(fields, MAX_DEPTH):
        raise WireError(f"the message is nested more than {MAX_DEPTH} deep")
    return fields


def _map(pairs: list[tuple[Any, Any]]) -> dict[int, Any]:
    """Make a map, and refuse what would mean different things to different readers."""
    fields = dict(pairs)
    if len(fields) < len(pairs) or not all(type(key) is int and key >= 0 for key in fields):
        raise ValueError("keys must be different integers, 0 or more")
    return fields


def _shallow(value: object, depth: int) -> bool:
    if not isinstance(value, dict | tuple):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_shallow(item, depth - 1) for item in inner)


def _check_crc(data: bytes, fields: dict[int, Any]) -> None:
    """Check and remove the CRC at the end of a codes message."""
    payload = fields.get(_DATA)
    if type(payload) is not bytes or len(payload) <= CRC_BYTES or next(reversed(fields)) != _DATA:
        raise WireError(f"codes need data of more than {CRC_BYTES} bytes (key {_DATA}), last in the map")
    check, stored = crc_hqx(memoryview(data)[:-CRC_BYTES], CRC_INIT), int.from_bytes(data[-CRC_BYTES:], "big")
    if check != stored:
        raise CorruptedError(f"the codes message has CRC {check:04x}; {stored:04x} is stored")
    fields[_DATA] = payload[:-CRC_BYTES]
