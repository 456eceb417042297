"""Sound files that break what reads them without care: for the benchmark of corpora, and for its tests."""

import io
import os
import struct
from pathlib import Path

import numpy as np
import soundfile

RATE = 16_000


def sound(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return noise ``[samples, channels]``, a different one for every seed."""
    return np.random.default_rng(seed).normal(0, 0.1, (samples, channels)).astype(np.float32)


def wav(samples: int, rate: int = RATE, channels: int = 1, seed: int = 0, form: str = "WAV") -> bytes:
    """Return a sound file with that noise."""
    file = io.BytesIO()
    soundfile.write(file, sound(samples, channels, seed), rate, format=form)
    return file.getvalue()


def damaged() -> dict[str, bytes]:
    """Return sound files that cannot be read, by name."""
    whole = wav(16_000)
    zero_rate = bytearray(whole)
    zero_rate[24:28] = struct.pack("<I", 0)
    nan = io.BytesIO()
    soundfile.write(nan, np.full(100, np.nan, np.float32), RATE, format="WAV", subtype="FLOAT")
    return {
        "truncated.wav": whole[:10_000],
        "truncated.flac": wav(16_000, form="FLAC")[:9_000],
        "truncated.aiff": wav(16_000, form="AIFF")[:9_000],
        "empty.wav": b"",
        "header.wav": whole[:44],
        "text.wav": b"this is no sound",
        "zero.wav": bytes(zero_rate),
        "nan.wav": nan.getvalue(),
        "movie.mp4": b"\0\0\0\x20ftypisom" + bytes(100),
    }


def odd() -> dict[str, bytes]:
    """Return sound files that look wrong and are not, by name."""
    # what a program writes that does not know the length yet
    stream = bytearray(wav(5_000))
    stream[4:8] = stream[40:44] = b"\xff" * 4
    return {
        "flac.wav": wav(3_000, form="FLAC"),  # a wrong ending
        "one.wav": wav(1),
        "fast.wav": wav(5_000, rate=192_000),
        "wide.wav": wav(5_000, channels=8),
        os.fsdecode(b"caf\xe9.wav"): wav(4_000),
        "stream.wav": bytes(stream),
    }


def hostile_corpus(folder: Path) -> tuple[set[str], set[str]]:
    """Write odd and damaged files, and links that lead round or nowhere; return the names of the good and the bad."""
    good, bad = odd(), damaged()
    for name, data in (good | bad).items():
        (folder / name).write_bytes(data)
    (folder / "around").symlink_to(folder)
    (folder / "self.wav").symlink_to(folder / "self.wav")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    return set(good), {*bad, "self.wav", "gone.wav"}
