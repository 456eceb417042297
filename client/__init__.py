"""The streaming client of semanticodec (installed as ``semanticodec_client``).

``async with connect(url, role=...) as s``: push samples or codes, iterate over what comes back; :mod:`.sync` is the
same without asyncio.  Needs no torch unless it codes here (:mod:`.local`).
"""

from .carrier import Retry
from .connection import Connection, ConnectionEnded, Refused, connect
from .events import AudioChunk, CodesBlock, Ended, Gap, Left, Opened, Restarted
from .jitter import JitterBuffer

__all__ = [
    "AudioChunk",
    "CodesBlock",
    "Connection",
    "ConnectionEnded",
    "Ended",
    "Gap",
    "JitterBuffer",
    "Left",
    "Opened",
    "Refused",
    "Restarted",
    "Retry",
    "connect",
]
