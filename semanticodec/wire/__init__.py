"""Everything that leaves the machine: packed codes, ``.scodec`` files, session messages and what keeps a session whole.

* :mod:`.packing`: codes <-> bits
* :mod:`.container`, :mod:`.reader`: the file format, written and read; their names are this package's
* :mod:`.messages`: what client and server say to each other (``server/PROTOCOL.md``)
* :mod:`.link`: sent windows, received exactly once, bundling, redundancy, bitrate; no sockets, no clock

Needs numpy and msgpack, never torch.
"""

from .container import (
    MAGIC,
    MAX_CHANNELS,
    MAX_RATE,
    MAX_SAMPLES,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENT_FRAMES,
    PRESET_NUMBERS,
    SEGMENT_SYNC,
    TAIL_SYNC,
    VERSION,
    Gap,
    Header,
    IndexEntry,
    Recording,
    Segment,
    Writer,
    write_codes,
)
from .packing import MAX_BITS, Codes, pack, packed_size, unpack
from .reader import MAX_LOST_FRAMES, MAX_RESYNC_BYTES, Reader, read_codes

__all__ = [
    "MAGIC",
    "MAX_BITS",
    "MAX_CHANNELS",
    "MAX_LOST_FRAMES",
    "MAX_RATE",
    "MAX_RESYNC_BYTES",
    "MAX_SAMPLES",
    "MAX_SEGMENT_BYTES",
    "MAX_SEGMENT_FRAMES",
    "PRESET_NUMBERS",
    "SEGMENT_SYNC",
    "TAIL_SYNC",
    "VERSION",
    "Codes",
    "Gap",
    "Header",
    "IndexEntry",
    "Reader",
    "Recording",
    "Segment",
    "Writer",
    "pack",
    "packed_size",
    "read_codes",
    "unpack",
    "write_codes",
]
