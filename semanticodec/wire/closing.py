"""The one table of close codes: why a connection ends, or why a request was refused."""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """Close codes: why a connection ends, or why a request was refused.

    ``retry`` says what a client should do: "no" (as it is, it will be refused again), "resume" (reconnect with the
    session id), "later" (start anew after the time given, or with back-off).
    """

    meaning: str
    retry: str

    def __new__(cls, value: int, meaning: str, retry: str) -> Code:
        """Make a member out of (code, meaning, what to do)."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        member.retry = retry
        return member

    DONE = 1000, "the session has ended as agreed (bye)", "no"
    ELSEWHERE = 4001, "this server is going away; resume here or at the address in bye", "resume"
    REPLACED = 4002, "the session was resumed on another connection", "no"
    BAD_MESSAGE = 4400, "a message is malformed or breaks a bound", "resume"
    BAD_TOKEN = 4401, "the token is missing or unknown", "no"
    FORBIDDEN = 4403, "the token does not allow this role or room", "no"
    UNKNOWN_SESSION = 4404, "no session has this id (any more); say hello", "later"
    WRONG_ORDER = 4405, "the message is not allowed in this state or role", "no"
    BAD_VERSION = 4406, "no sub-protocol in common", "no"
    SLOW_HANDSHAKE = 4408, "no hello or resume in time", "later"
    ROOM_TAKEN = 4409, "the room has a publisher", "later"
    IDLE = 4410, "nothing was heard for too long", "resume"
    BAD_REQUEST = 4411, "the fields of hello, resume or tune do not fit together", "no"
    TOO_BIG = 4413, "a message is larger than allowed", "no"
    BAD_PRESET = 4415, "the preset is not served here, or the codebooks are others", "no"
    OVERRUN = 4422, "units were sent beyond the granted limit", "resume"
    TOO_MANY = 4429, "too many messages, bytes or sessions", "later"
    BAD_ORIGIN = 4430, "pages of this origin may not connect", "no"
    INTERNAL = 4500, "the server failed", "resume"
    FULL = 4503, "the server is full", "later"


def what_next(code: int) -> str:
    """Return what a client should do after a code: "no", "resume" or, if it does not know the code, "later"."""
    return next((known.retry for known in Code if known == code), "later")
