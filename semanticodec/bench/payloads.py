"""What of a coded file is payload: packets of Ogg, frames of AAC and MP3 without headers, frames of Codec 2."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Literal

from ..errors import AudioError

Codec2 = Literal["codec2-700c", "codec2-1200", "codec2-1300", "codec2-1600", "codec2-2400", "codec2-3200"]
Payload = Literal["file", "ogg", "adts", "mp3", Codec2]


def ogg_packets(data: bytes) -> list[bytes]:
    """Return the packets of an Ogg stream, its two header packets first.

    Args:
        data: pages of one stream.

    Raises:
        AudioError: it is none.
    """
    packets, at, open_packet = [bytearray()], 0, True
    while at < len(data):
        if data[at : at + 4] != b"OggS" or at + 27 > len(data):
            raise AudioError(f"no Ogg page at byte {at}")
        lacing = data[at + 27 : at + 27 + data[at + 26]]
        at += 27 + len(lacing)
        for size in lacing:
            if not open_packet:
                packets.append(bytearray())
            packets[-1] += data[at : at + size]
            at += size
            open_packet = size == 255
    return [bytes(packet) for packet in packets]


def adts_payload(data: bytes) -> int:
    """Count the bytes of an AAC stream without the header of each frame.

    Args:
        data: ADTS frames.

    Returns:
        Bytes.

    Raises:
        AudioError: something else than a frame is among them.
    """
    at = payload = 0
    while at < len(data):
        if len(data) - at < 7 or data[at] != 0xFF or data[at + 1] >> 4 != 0xF:
            raise AudioError(f"no ADTS frame at byte {at}")
        header = 7 if data[at + 1] & 1 else 9
        length = struct.unpack(">I", data[at + 3 : at + 7])[0] >> 13 & 0x1FFF
        payload += length - header
        at += length
    return payload


def mp3_payload(data: bytes) -> int:
    """Count the bytes of an MP3 stream without the header of each frame.

    Args:
        data: frames of layer III.

    Returns:
        Bytes; a last frame that is cut short counts as far as it goes.

    Raises:
        AudioError: something else than a frame is among them.
    """
    at = payload = 0
    while at < len(data):
        head = int.from_bytes(data[at : at + 4])
        version, kbps = head >> 19 & 3, MP3_KBPS[head >> 19 & 3 == 3][head >> 12 & 15]
        if head >> 21 != 0x7FF or version == 1 or head >> 17 & 3 != 1 or not kbps or head >> 10 & 3 == 3:
            raise AudioError(f"no MP3 frame at byte {at}")
        rate = (44_100, 48_000, 32_000)[head >> 10 & 3] >> {3: 0, 2: 1, 0: 2}[version]
        length = (144 if version == 3 else 72) * 1000 * kbps // rate + (head >> 9 & 1)
        payload += min(length, len(data) - at) - (4 if head >> 16 & 1 else 6)
        at += length
    return payload


def _frames(bits: int, data: bytes) -> list[int]:
    return [bits] * (len(data) // -(-bits // 8))


MP3_KBPS = (
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
)
"""Of layer III by the number in a frame's header: at the low sample rates of MPEG-2 and 2.5, and of MPEG-1."""
CODEC2: dict[Codec2, tuple[int, int]] = {
    "codec2-700c": (28, 320),
    "codec2-1200": (48, 320),
    "codec2-1300": (52, 320),
    "codec2-1600": (64, 320),
    "codec2-2400": (48, 160),
    "codec2-3200": (64, 160),
}
"""Bits of a frame, each of which begins at a byte of the file, and its samples at 8 kHz."""
NET_BITS: dict[Payload, Callable[[bytes], list[int]]] = {
    "file": lambda data: [8 * len(data)],
    "ogg": lambda data: [8 * len(packet) for packet in ogg_packets(data)[2:]],
    "adts": lambda data: [8 * adts_payload(data)],
    "mp3": lambda data: [8 * mp3_payload(data)],
    **{name: functools.partial(_frames, bits) for name, (bits, _) in CODEC2.items()},
}
"""Net bits of a coded file: of each of its frames where they are counted apart."""
