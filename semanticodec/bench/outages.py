"""Other codecs on a link that fails for stretches of time: Opus conceals the gap by itself, Codec 2 holds a frame."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import SAMPLE_RATE
from ..errors import AudioError, ConfigError
from .clips import Clip, Wave
from .codecs import About, Coded, sources
from .commands import Command, classical
from .payloads import CODEC2, ogg_packets

FRAMES: dict[str, tuple[int, float]] = {name: (-(-bits // 8), frame / 8000) for name, (bits, frame) in CODEC2.items()}
"""Bytes and seconds of a frame of Codec 2, which has no concealment of its own."""
OPUS_RATE = 48_000
"""Samples per second that an Opus header counts in."""
LONGEST = SAMPLE_RATE * 120 // 1000
"""Samples of an Opus packet at most."""


@dataclass(frozen=True)
class Interrupted:
    """A program's codec whose packets of some stretches of time do not arrive, as an adapter of the bench.

    A packet is lost if the sound that it brings begins in a lost stretch.  libopus is told which, and conceals them; of
    Codec 2 the last frame that arrived is decoded again, as radios do, after silence until the first one.

    Args:
        codec: Opus or Codec 2.
        lost: of each stretch.
        stretch: how many samples it is long.
    """

    codec: Command
    lost: tuple[bool, ...]
    stretch: int

    @property
    def name(self) -> str:
        """Of the codec."""
        return self.codec.name

    def missing(self) -> str | None:
        """Say which program or library is not installed."""
        if self.codec.name not in FRAMES and ctypes.util.find_library("opus") is None:
            return "libopus is not installed"
        return self.codec.missing()

    def about(self) -> About:
        """Say which commands it is."""
        return self.codec.about()

    def fingerprint(self) -> str:
        """Name the codec, what decodes it, and the losses."""
        decoder = "held" if self.codec.name in FRAMES else _libopus().opus_get_version_string().decode()
        lost = "".join("-x"[gone] for gone in self.lost)
        return "/".join((self.codec.fingerprint(), sources("bench/outages"), decoder, lost, str(self.stretch)))

    def encode(self, clip: Clip) -> Coded:
        """Code the clip, as if nothing was going to be lost.

        Args:
            clip: any.

        Returns:
            What the codec makes of it.

        Raises:
            AudioError: as :meth:`.commands.Command.encode`.
        """
        return _coded(self.codec, clip)

    def decode(self, coded: Coded, clip: Clip) -> Wave:
        """Decode what arrived.

        Args:
            coded: what :meth:`encode` returned.
            clip: the same.

        Returns:
            Samples ``[S']`` at 16 kHz.

        Raises:
            AudioError: the program failed, or libopus did.
        """
        if self.codec.name not in FRAMES:
            return concealed(ogg_packets(coded.data), self._gone)
        size, seconds = FRAMES[self.codec.name]
        frames = [coded.data[at : at + size] for at in range(0, len(coded.data), size)]
        samples = round(seconds * SAMPLE_RATE)
        gone = [self._gone(place * samples) for place in range(len(frames))]
        first = gone.index(False) if False in gone else len(gone)
        silence = np.zeros(first * samples, np.float32)
        if first == len(gone):
            return silence
        data = b"".join(held(frames[first:], gone[first:]))
        return np.concatenate([silence, self.codec.decode(Coded(data, coded.net_bits), clip)])

    def _gone(self, sample: int) -> bool:
        """Tell whether a packet whose sound begins there is lost; what fills up the last stretch shares its fate."""
        return self.lost[min(max(sample, 0) // self.stretch, len(self.lost) - 1)]


def interruptible(names: Sequence[str]) -> list[Command]:
    """Return the classical codecs of these names.

    Args:
        names: each once.

    Raises:
        ConfigError: one of them is none that losses are known for, or comes twice.
    """
    known = {codec.name: codec for codec in classical() if codec.family == "Opus" or codec.name in FRAMES}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"no codec {', '.join(unknown)} whose packets could be lost; there are {', '.join(known)}")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"{', '.join(sorted(twice))} comes twice")
    return [known[name] for name in names]


def held(frames: Sequence[bytes], gone: Sequence[bool]) -> Iterator[bytes]:
    """Put the last frame that arrived in the place of lost ones.

    Args:
        frames: at least one.
        gone: which of them are lost; not the first.
    """
    last = frames[0]
    for frame, lost in zip(frames, gone, strict=True):
        last = last if lost else frame
        yield last


@functools.lru_cache(4)
def _coded(codec: Command, clip: Clip) -> Coded:
    """Code a clip once for everything that it may lose."""
    return codec.encode(clip)


def concealed(packets: Sequence[bytes], gone: Callable[[int], bool]) -> Wave:
    """Decode an Opus stream of one channel at 16 kHz, lost packets by libopus's concealment.

    Args:
        packets: of an Ogg file, its two headers among them.
        gone: tells of the sample that a packet's sound begins at whether it is lost.

    Returns:
        Samples ``[S']``, without those that the header says to skip.

    Raises:
        AudioError: libopus is not installed, or cannot decode it.
    """
    library = _libopus()
    head, _, *sound = packets
    skip = int.from_bytes(head[10:12], "little") * SAMPLE_RATE // OPUS_RATE
    error = ctypes.c_int()
    decoder = library.opus_decoder_create(SAMPLE_RATE, 1, ctypes.byref(error))
    if error.value:
        raise AudioError(f"libopus made no decoder: error {error.value}")
    pieces, buffer, at = [], np.zeros(LONGEST, np.float32), -skip
    try:
        for packet in sound:
            samples = library.opus_decoder_get_nb_samples(decoder, packet, len(packet))
            data = (None, 0) if gone(at) else (packet, len(packet))
            made = library.opus_decode_float(decoder, *data, buffer.ctypes.data, samples, 0)
            if made != samples:
                raise AudioError(f"libopus decoded {made} of {samples} samples")
            pieces.append(buffer[:made].copy())
            at += made
    finally:
        library.opus_decoder_destroy(decoder)
    result: Wave = np.concatenate(pieces)[skip:]
    return result


@functools.cache
def _libopus() -> ctypes.CDLL:
    """Load libopus, which opus-tools bring along."""
    name = ctypes.util.find_library("opus")
    if name is None:
        raise AudioError("libopus is not installed; Debian's opus-tools bring it along")
    library, pointer, number = ctypes.CDLL(name), ctypes.c_void_p, ctypes.c_int32
    for function, result, arguments in (
        ("opus_get_version_string", ctypes.c_char_p, []),
        ("opus_decoder_create", pointer, [number, ctypes.c_int, pointer]),
        ("opus_decoder_get_nb_samples", ctypes.c_int, [pointer, ctypes.c_char_p, number]),
        ("opus_decode_float", ctypes.c_int, [pointer, ctypes.c_char_p, number, pointer, ctypes.c_int, ctypes.c_int]),
        ("opus_decoder_destroy", None, [pointer]),
    ):
        getattr(library, function).restype, getattr(library, function).argtypes = result, arguments
    return library
