"""Audio in and out, resampling, and the two spectrograms: Kaldi filter bank (encoder) and log-mel (decoder)."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
from collections.abc import Iterable, Iterator
from numbers import Integral
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.nn import functional

from .config import HOP, SAMPLE_RATE, MelConfig
from .errors import AudioError, CodesError

FBANK_BINS = 128
FBANK_FRAME = 400
"""Samples per filter-bank row; the next row starts ``HOP`` later."""
FBANK_LOOKAHEAD = FBANK_FRAME - HOP
FBANK_MEAN, FBANK_SCALE = -4.2677393, 2 * 4.5689974
"""AudioMAE's normalisation: ``(x - mean) / scale``."""
PADDING_ROW = -FBANK_MEAN / FBANK_SCALE
"""Value of a row that stands for no audio at all."""
MEL_16K = MelConfig()
STFT_FLOOR = 1e-18
"""Added to the power before a mel's square root, which has no gradient at 0; far below the logarithm's own floor."""
LOG_FLOOR = 1.1920929e-07
LOWEST_RATE, HIGHEST_RATE = 1_000, 1_000_000
"""Sample rates in Hz that are resampled; a file whose header says otherwise is damaged, or meant to fill memory."""
HIGHEST_OGG_RATE = 200_000
MOST_CHANNELS = 64
"""Of one recording; more are samples and channels the wrong way round."""
LOUDEST = 1e9
"""Samples beyond this would overflow in the filter bank; nothing that is meant to lie in [-1, 1] gets near."""
PIECE = 1 << 20
"""Samples, all channels together, that are read from a file at once."""


def load(source: str | os.PathLike[str] | BinaryIO) -> tuple[Tensor, int]:
    """Read a sound file of any format libsndfile knows.

    Args:
        source: a path, or an open binary file.

    Returns:
        Samples in [-1, 1] as float32 ``[channels, samples]``, and the sample rate in Hz.

    Raises:
        AudioError: the file is not readable audio, or holds no samples.
    """
    with open_sound(source) as file:
        try:
            data = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _unreadable(source, error) from error
        if not len(data):
            raise AudioError(f"{_called(source)} holds no samples")
        return torch.from_numpy(np.ascontiguousarray(data.T)), int(file.samplerate)


@contextlib.contextmanager
def open_sound(source: str | os.PathLike[str] | BinaryIO) -> Iterator[soundfile.SoundFile]:
    """Open a sound file of any format libsndfile knows, to be read with :func:`pieces`.

    Args:
        source: a path, or an open binary file that can be seeked.

    Raises:
        AudioError: the file is not readable audio.
    """
    try:
        file = soundfile.SoundFile(source)
    except (soundfile.LibsndfileError, TypeError) as error:
        raise _unreadable(source, error) from error
    with file:
        yield file


def pieces(file: soundfile.SoundFile) -> Iterator[Tensor]:
    """Read a sound file in constant memory.

    Args:
        file: from :func:`open_sound`.

    Yields:
        Consecutive samples in [-1, 1] as float32 ``[channels, samples]``.

    Raises:
        AudioError: libsndfile finds damage, or the file holds no samples.
    """
    size = max(1, PIECE // file.channels)
    empty = True
    while True:
        try:
            data = file.read(size, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _unreadable(file.name, error) from error
        if not len(data):
            break
        empty = False
        yield torch.from_numpy(np.ascontiguousarray(data.T))
    if empty:
        raise AudioError(f"{_called(file.name)} holds no samples")


def _called(file: object) -> str:
    """Return what messages call a file: an open one may have no name, or an odd one."""
    return str(file) if isinstance(file, str | os.PathLike) else "this"


def _unreadable(source: object, error: Exception) -> AudioError:
    return AudioError(f"{_called(source)} is not audio that libsndfile can read: {_reason(error)}")


def _reason(error: Exception) -> str:
    # The whole text begins with the repr of an open file.
    text: str = error.error_string if isinstance(error, soundfile.LibsndfileError) else str(error)
    return text.rstrip(".")


def check_format(format: str, sample_rate: int, channels: int) -> None:
    """Refuse what libsndfile cannot write.

    Args:
        format: a libsndfile format name such as "WAV".
        sample_rate: in Hz.
        channels: of the file.

    Raises:
        AudioError: the format has no such files.
    """
    format = format.upper()
    what = f"cannot write {format} with {channels} channels at {sample_rate} Hz"
    # libsndfile notices only when it encodes the first samples, and then crashes when the file is closed.
    if format == "OGG" and sample_rate > HIGHEST_OGG_RATE:
        raise AudioError(f"{what}: OGG goes up to {HIGHEST_OGG_RATE} Hz; choose another format")
    try:
        soundfile.SoundFile(io.BytesIO(), "w", sample_rate, channels, format=format).close()
    except (soundfile.LibsndfileError, TypeError, ValueError) as error:
        raise AudioError(f"{what}: {_reason(error)}; choose another format") from error


def save(target: str | os.PathLike[str] | BinaryIO, wave: Tensor, sample_rate: int, format: str | None = None) -> None:
    """Write samples as 16-bit PCM, clipped to [-1, 1].

    Args:
        target: a path whose ending names the format, or an open binary file together with ``format``.
        wave: ``[samples]`` or ``[channels, samples]``.
        sample_rate: in Hz.
        format: a libsndfile format name such as "WAV"; only needed for an open file.

    Raises:
        AudioError: libsndfile cannot write this.
    """
    data = wave.detach().to("cpu", torch.float32).clamp(-1, 1).numpy().T
    named = Path(target).suffix[1:] if format is None and isinstance(target, str | os.PathLike) else format
    if named is None:
        raise AudioError("cannot write an open file without a format; give one, such as 'WAV'")
    check_format(named, sample_rate, 1 if data.ndim == 1 else data.shape[1])
    try:
        soundfile.write(target, data, sample_rate, format=format)
    except (soundfile.LibsndfileError, AssertionError, TypeError, ValueError) as error:
        raise AudioError(f"cannot write {_called(target)}: {_reason(error) or 'the disk is full'}") from error


def resample(wave: Tensor, source: int, target: int) -> Tensor:
    """Change the sample rate with soxr's high-quality resampler.

    Args:
        wave: ``[..., samples]`` at ``source`` Hz, on the CPU.
        source: sample rate of ``wave`` in Hz.
        target: wanted sample rate in Hz.

    Returns:
        ``[..., ceil(samples * target / source)]`` in float32, the sound followed by silence: exactly what
        ``soxr.ResampleStream`` gives for pieces of any size.

    Raises:
        AudioError: a rate is no whole number from 1 kHz to 1 MHz.
    """
    rows = wave.reshape(-1, wave.shape[-1])
    stream = Resampler(source, target, len(rows))
    out = torch.cat([stream.push(rows), stream.flush()], 1)
    return out.reshape(*wave.shape[:-1], out.shape[1])


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class Resampler:
    """:func:`resample` for pieces: together they give exactly what the whole gives."""

    def __init__(self, source: int, target: int, channels: int = 1) -> None:
        """Begin.

        Args:
            source: sample rate of what comes in, in Hz.
            target: sample rate of what comes out, in Hz.
            channels: rows of every piece.

        Raises:
            AudioError: a rate is no whole number from 1 kHz to 1 MHz.
        """
        for rate in (source, target):
            if not _is_whole(rate) or not LOWEST_RATE <= rate <= HIGHEST_RATE:
                raise AudioError(
                    f"the sample rate {rate!r} Hz was given; it must be a whole number in {LOWEST_RATE}..{HIGHEST_RATE}"
                )
        self.source, self.target = source, target
        self._stream = None if source == target else soxr.ResampleStream(source, target, channels)
        self._channels, self._seen, self._made = channels, 0, 0

    def push(self, wave: Tensor) -> Tensor:
        """Take ``[channels, samples]``, any number of them, and return those at the other rate that are ready."""
        self._seen += wave.shape[1]
        return self._resample(wave, last=False)

    def flush(self) -> Tensor:
        """Return what is left; all together ``ceil(samples * target / source)`` samples came out."""
        length = -(-self._seen * self.target // self.source)
        # soxr rounds the number of samples; enough silence behind the sound makes it at least ``length``.
        silence = torch.zeros(self._channels, self.source // self.target + 2)
        missing = length - self._made
        return self._resample(silence, last=True)[:, :missing]

    def _resample(self, wave: Tensor, *, last: bool) -> Tensor:
        wave = wave.to(torch.float32)
        if self._stream is None or not wave.shape[1]:
            self._made += wave.shape[1]
            return wave
        out = torch.from_numpy(self._stream.resample_chunk(wave.T.contiguous().numpy(), last=last)).T.contiguous()
        self._made += out.shape[1]
        return out


def checked(wave: Tensor) -> Tensor:
    """Return ``wave`` if every sample is finite and no larger than can be computed with.

    Raises:
        AudioError: there are NaN or infinite samples, or such of more than 1e9.
    """
    if not torch.isfinite(wave).all():
        bad = int((~torch.isfinite(wave)).sum())
        raise AudioError(f"{bad} of {wave.numel()} samples are NaN or infinite; repair the recording first")
    if (wave.abs() > LOUDEST).any():
        raise AudioError(
            f"the largest sample is {float(wave.abs().max()):.3g}; samples lie in [-1, 1], and more than {LOUDEST:g} "
            "cannot be coded: divide by the full scale"
        )
    return wave


def as_tensor(array: Tensor | np.ndarray, wrong: type[AudioError | CodesError]) -> Tensor:
    """Return a tensor, or raise ``wrong``; arrays are copied, since torch takes none that are reversed or read-only."""
    if isinstance(array, Tensor):
        return array
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError) as error:
        what = type(array).__name__
        raise wrong(
            f"wanted is a tensor or an array of numbers, seen {what}; semanticodec.audio.load reads files"
        ) from error


def mono(wave: Tensor | np.ndarray) -> Tensor:
    """Return checked rows ``[B, S]`` as float32 on the CPU, channels averaged.

    Raises:
        AudioError: no samples, integers, NaN, infinite or huge samples, or a shape that :meth:`SemantiCodec.encode`
            refuses.
    """
    wave = as_tensor(wave, AudioError)
    if not wave.is_floating_point():
        raise AudioError(
            f"samples must be floating point in [-1, 1], seen {wave.dtype}; divide integers by their range"
        )
    wave = wave.detach().to("cpu", torch.float32)
    if not 1 <= wave.ndim <= 3 or 0 in wave.shape:
        raise AudioError(f"samples must be [S], [B, S] or [B, C, S] and not empty, seen {tuple(wave.shape)}")
    wave = checked(wave)
    if wave.ndim == 1:
        wave = wave[None]
    if wave.ndim == 3:
        # One channel after the other: the order in which torch sums depends on how many samples there are.
        wave = functools.reduce(torch.add, wave.unbind(1)) / wave.shape[1]
    return wave


def recording(wave: Tensor | np.ndarray) -> Tensor:
    """Return the checked samples of one recording as float32 on the CPU.

    Args:
        wave: ``[S]`` or ``[channels, S]``.

    Raises:
        AudioError: no samples, integers, NaN, infinite or huge samples, too many channels, or another shape.
    """
    wave = as_tensor(wave, AudioError)
    if not wave.is_floating_point():
        raise AudioError(
            f"samples must be floating point in [-1, 1], seen {wave.dtype}; divide integers by their range"
        )
    if not 1 <= wave.ndim <= 2 or 0 in wave.shape:
        raise AudioError(f"a recording must be [S] or [channels, S] and not empty, seen {tuple(wave.shape)}")
    if wave.ndim == 2 and len(wave) > MOST_CHANNELS:
        raise AudioError(
            f"a recording must be [S] or [channels, S], seen {tuple(wave.shape)}: {len(wave)} channels are more than "
            f"{MOST_CHANNELS}; transpose it"
        )
    return checked(wave.detach().to("cpu", torch.float32))


@functools.cache
@torch.inference_mode(mode=False)  # whoever is first: training must be able to use it too
def _kaldi_filters() -> Tensor:
    """Triangles in the mel domain, ``[256, 128]`` (the bin at the Nyquist frequency has no weight)."""

    def mel(hertz: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(20.0), mel(SAMPLE_RATE / 2), FBANK_BINS + 2)
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = mel(np.arange(256) * (SAMPLE_RATE / 512))[:, None]
    triangles = np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    return torch.from_numpy(np.maximum(triangles, 0.0)).to(torch.float32)


@functools.cache
@torch.inference_mode(mode=False)
def _hann(size: int, *, periodic: bool = True) -> Tensor:
    return torch.hann_window(size, periodic=periodic)


def fbank(wave: Tensor) -> Tensor:
    """Compute AudioMAE's normalised log filter bank over the complete 25 ms frames of ``wave``.

    Args:
        wave: ``[..., samples]`` at 16 kHz, samples in [-1, 1].

    Returns:
        ``[..., 1 + (samples - 400) // 160, 128]``.

    Source: behaves as Kaldi's ``compute-fbank-feats`` as AudioMAE calls it (spec 2.2).  The published front end also
    removes the mean of the whole file first; each frame's own mean is removed in any case, so only rounding differs,
    and leaving it out keeps a frame independent of the rest of the file.
    """
    frames = wave.unfold(-1, FBANK_FRAME, HOP)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    window = _hann(FBANK_FRAME, periodic=False).to(wave)
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, n=512)
    power = spectrum.real.square() + spectrum.imag.square()
    energy = power[..., :256] @ _kaldi_filters().to(wave)
    result: Tensor = (energy.clamp_min(LOG_FLOOR).log() - FBANK_MEAN) / FBANK_SCALE
    return result


def fbank_windows(pieces: Iterable[Tensor], context: int, block: int, *, mark_end: bool) -> Iterator[list[Tensor]]:
    """Compute the filter banks of windows that advance by a block, silence before the first and after the last.

    Args:
        pieces: consecutive samples ``[B, S]`` at 16 kHz, any S.
        context: samples of a window before its block.
        block: samples by which windows advance.
        mark_end: the last two rows of the last window stand for no audio at all.

    Yields:
        Per window B filter banks ``[(context + block) / 160, 128]``.
    """
    size = context + block + FBANK_LOOKAHEAD
    held: Tensor | None = None
    for piece in pieces:
        held = torch.cat([piece.new_zeros(len(piece), context) if held is None else held, piece], 1)
        # More than a window is there, so that none of these is the last one.
        while held.shape[1] >= size:
            yield [fbank(row) for row in held[:, :size]]
            held = held[:, block:]
    while held is not None and held.shape[1] > context:
        rest = functional.pad(held[:, :size], (0, max(0, size - held.shape[1])))
        banks = [fbank(row) for row in rest]
        if mark_end and held.shape[1] <= context + block:
            for rows in banks:
                rows[-2:] = PADDING_ROW
        yield banks
        held = held[:, block:]


@functools.cache
@torch.inference_mode(mode=False)
def slaney_filters(mel: MelConfig = MEL_16K) -> Tensor:
    """Return Slaney-normalised mel filters over the bins of the FFT, ``[n_fft / 2 + 1, bins]``.

    Source: Slaney's Auditory Toolbox (1998), linear below 1 kHz; float64 rounded once, as published.  torchaudio's are
    computed in float32, which at 48 kHz changes the log-mel of quiet bins in the third digit.
    """

    def scale(hertz: float) -> float:
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    points = np.linspace(scale(mel.fmin), scale(mel.fmax), mel.bins + 2)
    edges = np.where(points < 15, 200 * points / 3, 1000 * 6.4 ** ((points - 15) / 27))
    bins = np.linspace(0, mel.sample_rate / 2, mel.n_fft // 2 + 1)[:, None]
    rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rise, fall)) * 2 / (edges[2:] - edges[:-2])
    return torch.from_numpy(triangles.astype(np.float32))


Framing = Literal["hifigan", "tacotron"]
"""Where rows lie: row t centred on sample ``hop * (t + 1/2)``, as the autoencoders were trained; or on ``hop * t``, one
row more, as AudioLDM, AudioLDM 2 and MusicLDM read the sounds they edit."""


def stft_magnitude(wave: Tensor, mel: MelConfig = MEL_16K, framing: Framing = "hifigan") -> Tensor:
    """Compute the magnitudes that :func:`log_mel` sums up.

    Args:
        wave: ``[batch, samples]`` at ``mel.sample_rate``, more than ``n_fft / 2`` samples.
        mel: says how.
        framing: where rows lie.

    Returns:
        ``[batch, samples // hop, n_fft / 2 + 1]``, one row more for "tacotron".
    """
    margin = (mel.n_fft - mel.hop if framing == "hifigan" else mel.n_fft) // 2
    rows = wave.shape[-1] // mel.hop + (framing == "tacotron")
    padded = functional.pad(wave[:, None], (margin, margin), mode="reflect")[:, 0]
    frames = padded.unfold(-1, mel.n_fft, mel.hop)[:, :rows]
    spectrum = torch.fft.rfft(frames * _hann(mel.n_fft).to(wave))
    result: Tensor = (spectrum.real.square() + spectrum.imag.square() + STFT_FLOOR).sqrt()
    return result


def log_mel(wave: Tensor, mel: MelConfig = MEL_16K, framing: Framing = "hifigan") -> Tensor:
    """Compute the decoder's log-mel spectrogram.

    Args:
        wave: ``[batch, samples]`` at ``mel.sample_rate``, more than ``n_fft / 2`` samples.
        mel: says how.
        framing: where rows lie.

    Returns:
        ``[batch, samples // hop, bins]``, one row more for "tacotron": natural logarithm of Slaney-normalised mel
        magnitudes, at least ln(1e-5).

    Source: the mel of HiFi-GAN's training code (at 16 kHz FFT and window 1024, hop 160, 0-8000 Hz), which AudioLDM and
    AudioSR inherited.
    """
    result: Tensor = (stft_magnitude(wave, mel, framing) @ slaney_filters(mel).to(wave)).clamp_min(1e-5).log()
    return result
