"""Code one recording, decode it again, and show what that cost and what came out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import audio, wire
from .config import SAMPLE_RATE
from .errors import AudioError

if TYPE_CHECKING:
    from .codec import SemantiCodec
    from .diffusion import SamplerOptions

RECORDING = Path(__file__).parent / "assets" / "demo.flac"
"""A voice that no model was trained on; assets/ATTRIBUTION.md says whose."""

N_FFT, HOP, BANDS = 1024, 160, 64


@dataclass(frozen=True)
class Report:
    """What a run cost and what came out; ``stoi`` is None where pystoi is not installed."""

    model: str
    seconds: float
    net_kbps: float
    file_bytes: int
    encode_seconds: float
    decode_seconds: float
    mel_l1: float
    stoi: float | None
    files: tuple[Path, ...]

    def __str__(self) -> str:
        gross = self.file_bytes * 8 / self.seconds / 1000
        encode, decode = self.encode_seconds / self.seconds, self.decode_seconds / self.seconds
        lines = [
            f"model             {self.model}",
            f"recording         {self.seconds:.2f} s",
            f"net bitrate       {self.net_kbps:.3f} kbps",
            f"file              {self.file_bytes} bytes, {gross:.3f} kbps with all framing",
            f"real-time factor  {encode:.3f} encode + {decode:.3f} decode = {encode + decode:.3f}",
            f"log-mel L1        {self.mel_l1:.3f}",
            f"STOI              {'pystoi is not installed' if self.stoi is None else format(self.stoi, '.3f')}",
        ]
        return "\n".join([*lines, *(f"wrote             {file}" for file in self.files)])


def run(codec: SemantiCodec, recording: Path, out: Path, *, seed: int, options: SamplerOptions) -> Report:
    """Encode and decode a recording; write the code file, the decoded sound and, given matplotlib, a picture.

    Args:
        codec: with both halves loaded.
        recording: a sound file; its channels are averaged.
        out: folder for the results, made if it does not exist.
        seed: of the decoder's noise.
        options: the decoder's dials.

    Raises:
        AudioError: the recording is not readable audio, or the decoded sound would overwrite it.
        OSError: there is no recording, or the folder cannot be written to.
    """
    code_file, sound, picture = (out / (recording.stem + ending) for ending in (".scodec", ".wav", ".png"))
    if sound.resolve() == recording.resolve():
        raise AudioError(f"{sound} would be overwritten; choose another folder for the results")
    recording.open("rb").close()
    wave, rate = audio.load(recording)
    wave = audio.mono(wave[None])
    started = time.perf_counter()
    codes = codec.encode(wave, rate).cpu().numpy()
    encoded = time.perf_counter()
    original = audio.resample(wave, rate, SAMPLE_RATE)
    decoding = time.perf_counter()
    decoded = codec.decode(codes, seed=seed, length=original.shape[1], options=options).float().cpu()
    finished = time.perf_counter()

    out.mkdir(parents=True, exist_ok=True)
    with code_file.open("wb") as file:
        wire.write_codes(file, wire.Header.of(codec.config, codec.weights_hash, rate, 1, wave.shape[1]), codes)
    audio.save(sound, audio.resample(decoded, SAMPLE_RATE, rate)[:, : wave.shape[1]], rate)
    seconds = wave.shape[1] / rate
    net = codes.shape[2] * sum(codec.config.code_bits) / seconds / 1000
    drawn = draw(picture, original[0], decoded[0], f"{codec.config.name}, {net:.3f} kbps")
    return Report(
        model=codec.config.name,
        seconds=seconds,
        net_kbps=net,
        file_bytes=code_file.stat().st_size,
        encode_seconds=encoded - started,
        decode_seconds=finished - decoding,
        mel_l1=mel_l1(original[0], decoded[0]),
        stoi=stoi(original[0], decoded[0]),
        files=(code_file, sound, *([picture] if drawn else [])),
    )


def log_mel(wave: Tensor) -> Tensor:
    """Compute the log-mel that quality is measured on, ``[rows, 64]``, of samples ``[S]`` at 16 kHz."""
    window = torch.hann_window(N_FFT)
    spectrum = torch.stft(wave, N_FFT, HOP, window=window, pad_mode="constant", return_complex=True).abs()
    mel: Tensor = spectrum.mT @ audio.slaney_filters()
    return mel.clamp_min(1e-5).log()


def mel_l1(original: Tensor, decoded: Tensor) -> float:
    """Return the mean absolute difference of the log-mels of two mono signals ``[S]`` at 16 kHz, over common samples.

    Args:
        original: ``[S]`` at 16 kHz.
        decoded: ``[S]`` at 16 kHz.

    Source: the definition under which the published codecs were scored: 64 Slaney-normalised bands from 0 to 8000 Hz
    of the magnitude STFT (FFT 1024, hop 160, Hann, centred), natural logarithm, floor 1e-5; no gain or delay is undone.
    """
    length = min(len(original), len(decoded))
    return float((log_mel(original[:length]) - log_mel(decoded[:length])).abs().mean())


def stoi(original: Tensor, decoded: Tensor) -> float | None:
    """Return the short-time objective intelligibility (0 to 1), or None if pystoi is not installed.

    Args:
        original: ``[S]`` at 16 kHz.
        decoded: ``[S]`` at 16 kHz.
    """
    try:
        import pystoi
    except ImportError:
        return None
    length = min(len(original), len(decoded))
    return float(pystoi.stoi(original[:length].double().numpy(), decoded[:length].double().numpy(), SAMPLE_RATE))


def draw(path: Path, original: Tensor, decoded: Tensor, title: str) -> bool:
    """Draw waveform and mel of both signals side by side.

    Args:
        path: of the picture; its ending names the format.
        original: ``[S]`` at 16 kHz, in [-1, 1].
        decoded: ``[S]`` at 16 kHz.
        title: what to write above the decoded one.

    Returns:
        False if matplotlib is not installed, so that nothing was drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    seconds = len(original) / SAMPLE_RATE
    peak = max(float(original.abs().max()), float(decoded.abs().max()), 1e-3)
    for column, (name, wave) in enumerate((("original", original), ("decoded", decoded))):
        top, bottom = axes[:, column]
        top.plot(np.arange(len(wave)) / SAMPLE_RATE, wave.numpy(), linewidth=0.4)
        top.set(title=f"{name}: {title}" if column else name, ylim=(-peak, peak))
        bottom.imshow(
            log_mel(wave).mT.numpy(), origin="lower", aspect="auto", extent=(0, seconds, 0, BANDS), vmin=-11.5, vmax=2
        )
        bottom.set(xlabel="seconds")
    axes[0, 0].set(ylabel="amplitude")
    axes[1, 0].set(ylabel="mel band")
    figure.savefig(path, dpi=110)
    return True
