"""SemantiCodec: samples to codes and codes to samples.

Everything works in windows of a fixed shape, each a function of its own input alone (and, in mini's decoder, of the
latents just before it), so that a file, a batch and a stream give the same codes and the same sound.
B rows, n_q = 2 (semantic, acoustic), F frames, S samples at 16 kHz, D channels.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self, get_args, overload

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from . import checkpoints, inverse
from .audio import Resampler, as_tensor, fbank_windows, resample
from .audio import mono as mono
from .config import BANDS, COLUMN, DEFAULT_PRESET, RATES, SAMPLE_RATE, VOCABULARIES, CodecConfig, TokenRate
from .devices import usable_device, usable_dtype
from .diffusion import SamplerOptions, is_whole
from .errors import AudioError, CheckpointError, CodesError, ConfigError
from .graphs import Graphed, Recorder, cuda_recorder
from .model import MISSING, CodecModel
from .nn.quantize import nearest, stack
from .nn.vocos import Vocos
from .windows import decode_crossfade, decode_prefix

if TYPE_CHECKING:
    from .editing import Editor
    from .superres import SuperResolution

Parts = Literal["all", "encoder", "decoder"]
Streams = Literal["both", "semantic", "acoustic"]


class SemantiCodec:
    """A codec for speech, music and any sound at 0.3 to 1.4 kbps.

    Source: SemantiCodec (Liu et al., 2024).  Differences from the published implementation, all tested: lengths are
    exact, windows do not depend on the rest of the file, none is spent on padding alone, noise follows from a seed.
    """

    columns_at_once: int = 256
    """Patch columns up to which windows are pooled for one call of the decoder's networks, the memory budget: 4
    official windows.  More is faster on a large GPU (4096 are 64 official windows).

    Decoding an official window takes 558 MiB above the weights (float32, guidance 2, measured on a CPU), so 4 about
    2.2 GiB.  On a CPU windows and rows are decoded one by one.  Encoding takes far less and pools four times as many:
    16 official windows, whose recurrent network reads its weights once for all of them, or 170 of mini's.
    """

    def __init__(
        self,
        token_rate: TokenRate = 100,
        semantic_vocab_size: int = 16384,
        *,
        checkpoint_path: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Load an official preset by the published spelling; :meth:`from_pretrained` is the general way.

        Args:
            token_rate: 25, 50 or 100 tokens per second.
            semantic_vocab_size: 4096, 8192, 16384 or 32768.
            checkpoint_path: folder with the official files; None takes them from the hub.
            device: where to compute.

        Raises:
            CheckpointError: weights are missing, damaged or of another architecture.
            ConfigError: there is no such rate, vocabulary or device.
        """
        if token_rate not in RATES or semantic_vocab_size not in VOCABULARIES:
            raise ConfigError(
                f"token_rate={token_rate!r}, semantic_vocab_size={semantic_vocab_size!r}: the rates are "
                f"{', '.join(map(str, RATES))}, the vocabularies {', '.join(map(str, VOCABULARIES))}"
            )
        name = f"semanticodec-{token_rate}-{semantic_vocab_size}"
        source = checkpoints.locate(name) if checkpoint_path is None else checkpoints.locate(checkpoint_path, name)
        self._load(source, "all", usable_device(device), torch.float32)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str] = DEFAULT_PRESET,
        *,
        preset: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        parts: Parts = "all",
    ) -> SemantiCodec:
        """Load a codec.

        Args:
            name_or_folder: a preset ("mini-100", "semanticodec-50-8192"), or a folder in the official or our layout.
            preset: which preset to take from a folder that holds several; beside a preset's name it must be that one.
            device: where to compute.
            dtype: of the weights, floating point.
            parts: "encoder" or "decoder" loads only that half.

        Raises:
            CheckpointError: weights are missing, damaged or of another architecture.
            ConfigError: no preset has that name, there is no such device here, or nothing computes in the dtype.
        """
        if parts not in get_args(Parts):
            raise ConfigError(f"parts {parts!r} are unknown; choose one of {', '.join(get_args(Parts))}")
        dtype = usable_dtype(dtype)
        codec = cls.__new__(cls)
        codec._load(checkpoints.locate(name_or_folder, preset), parts, usable_device(device), dtype)
        return codec

    def _load(self, source: checkpoints.Source, parts: Parts, device: torch.device, dtype: torch.dtype) -> None:
        with torch.device("meta"):
            model = CodecModel(source.config, encoder=parts != "decoder", decoder=parts != "encoder")
        checkpoints.load(model, source, device=device, dtype=dtype)
        self._adopt(source.config, model, source)

    def _adopt(self, config: CodecConfig, model: CodecModel, source: checkpoints.Source | None) -> None:
        self.config = config
        self._source = source
        # Images have their channels innermost: convolutions would copy other weights in every call.
        self.model = model.eval().requires_grad_(False)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_model(cls, config: CodecConfig, model: CodecModel) -> SemantiCodec:
        """Wrap modules that are already filled (training, tests)."""
        codec = cls.__new__(cls)
        codec._adopt(config, model, None)
        return codec

    def record(self, recorder: Recorder = cuda_recorder) -> Self:
        """Run the networks as CUDA graphs from now on, one for each batch size that comes.

        Worth it where launching kernels takes longer than running them: on a GPU, at small batches.  Results are the
        same to the bit.

        Args:
            recorder: :func:`.graphs.cuda_recorder`, or another for other devices.

        Returns:
            This codec.

        Raises:
            ConfigError: CUDA graphs of a codec that is not on a GPU, or it runs recordings already.
        """
        if recorder is cuda_recorder and self.device.type != "cuda":
            raise ConfigError(f"the codec is on {self.device}; CUDA graphs need device='cuda'")
        if any(isinstance(found, Graphed) for module in self.model.modules() for found in vars(module).values()):
            raise ConfigError("the networks of this codec are recorded already; call record() once")
        latent = self.model.latent
        vocoder = None if latent is None else latent.vocoder
        places: list[tuple[nn.Module | None, str]]
        places = [(self.model.mae, "forward"), (self.model.residual, "forward"), (vocoder, "forward")]
        if latent is not None:
            places += [(latent.unet, "forward"), (latent.vae, "decode")]
        if isinstance(vocoder, Vocos):
            places += [(vocoder, "extend")]
        for module, name in places:
            if module is not None:
                vars(module)[name] = Graphed(getattr(module, name), recorder)
        return self

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 (hexadecimal) of what gives codes their meaning: the codebooks, as they are stored."""
        return checkpoints.weights_hash(self._source or self.model.state_dict())

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.codebooks.semantic.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.codebooks.semantic.dtype

    # --- encoding -------------------------------------------------------------------------------------------------

    @overload
    def encode(self, wave: Tensor | np.ndarray, sample_rate: int) -> Tensor: ...
    @overload
    def encode(self, wave: Sequence[Tensor], sample_rate: int) -> list[Tensor]: ...

    def encode(self, wave: Tensor | np.ndarray | Sequence[Tensor], sample_rate: int) -> Tensor | list[Tensor]:
        """Turn samples into codes.

        Args:
            wave: samples in [-1, 1]: ``[S]``; ``[B, S]``, one row per recording (or per channel); ``[B, C, S]``, whose
                channels are averaged; or a sequence of ``[S]`` of different lengths.
            sample_rate: of ``wave`` in Hz; anything but 16000 is resampled.

        Returns:
            Codes int64 ``[B, 2, F]`` on the codec's device, row 0 semantic and row 1 acoustic,
            ``F = config.frames(ceil(S * 16000 / sample_rate))``; for a sequence, a list of ``[1, 2, F]``.

        Raises:
            AudioError: no samples, NaN, infinite or huge samples (over 1e9), or a shape that is none of these.
            ConfigError: the encoder half was not loaded.
        """
        if isinstance(wave, Sequence):
            return [codes[None] for codes in self._encode([_single(row, sample_rate) for row in wave])]
        return torch.stack(self._encode(list(_mono16k(wave, sample_rate))))

    def iter_encode(self, pieces: Iterable[Tensor | np.ndarray], sample_rate: int) -> Iterator[Tensor]:
        """Encode a long recording piece by piece in constant memory.

        Args:
            pieces: consecutive samples of any length, each as in :meth:`encode` but no sequence.
            sample_rate: of the pieces in Hz.

        Yields:
            Consecutive codes ``[B, 2, F]``; together they are what :meth:`encode` returns for all samples at once.

        Raises:
            AudioError: as :meth:`encode`, or the pieces differ in their number of rows.
            ConfigError: the encoder half was not loaded.
        """
        samples = frames = rows = 0

        def resampled() -> Iterator[Tensor]:
            nonlocal samples, rows
            stream: Resampler | None = None
            for piece in pieces:
                wave = mono(piece)
                if rows not in (0, len(wave)):
                    raise AudioError(f"a piece of {len(wave)} rows follows pieces of {rows}; keep the batch together")
                rows = len(wave)
                stream = stream or Resampler(sample_rate, SAMPLE_RATE, rows)
                ready = stream.push(wave)
                samples += ready.shape[1]
                yield ready
            if stream is not None:
                ready = stream.flush()
                samples += ready.shape[1]
                yield ready

        windows = (window for windows in self._windows(resampled()) for window in windows)
        coded: list[Tensor] = []
        for chunk in _chunks(windows, self._windows_at_once):
            coded += self.encode_windows(chunk)
            whole = len(coded) // rows * rows
            if whole:
                codes = rearrange(torch.stack(coded[:whole]), "(n b) q f -> b q (n f)", b=rows)
                codes = codes[:, :, : self.config.frames(samples) - frames]
                frames += codes.shape[2]
                coded = coded[whole:]
                yield codes

    def features(self, wave: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        """Compute the continuous AudioMAE features that the codes quantise.

        Args:
            wave: as in :meth:`encode`.
            sample_rate: of ``wave`` in Hz.

        Returns:
            float ``[B, columns * 8, dim]``, time-major: entry ``8 t + f`` is the patch at step t, band f;
            ``dim`` is 768 for official presets.

        Raises:
            AudioError: as :meth:`encode`.
        """
        rows = []
        for row in _mono16k(wave, sample_rate):
            windows = (window for (window,) in self._windows([row[None]]))
            patches = torch.cat([self.window_features(chunk) for chunk in _chunks(windows, self._windows_at_once)])
            columns = self.config.columns(self.config.frames(len(row)))
            rows.append(patches.flatten(0, 1)[: columns * BANDS])
        return torch.stack(rows)

    @property
    def _windows_at_once(self) -> int:
        return max(1, 4 * self.columns_at_once // self.config.encoder.mae.columns)

    def _encode(self, rows: list[Tensor]) -> list[Tensor]:
        """Encode rows ``[S]`` of any lengths to codes ``[2, F]``, pooling their windows."""
        per_window = self.config.coded_columns // self.config.stack[0] * self.config.group
        pieces: list[Tensor] = []
        windows = (window for row in rows for (window,) in self._windows([row[None]]))
        for chunk in _chunks(windows, self._windows_at_once):
            pieces += self.encode_windows(chunk)
        results, first = [], 0
        for row in rows:
            frames = self.config.frames(len(row))
            last = first + -(-frames // per_window)
            results.append(torch.cat(pieces[first:last], 1)[:, :frames])
            first = last
        return results

    def _windows(self, pieces: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        """Cut consecutive samples ``[B, S]`` into windows: per window B filter banks ``[columns * 16, 128]``."""
        encoder = self.config.encoder
        return fbank_windows(pieces, encoder.context * COLUMN, self.config.block, mark_end=encoder.mask_padding)

    def window_features(self, windows: Tensor) -> Tensor:
        """Turn filter banks of single windows into features of their coded columns.

        Args:
            windows: ``[N, columns * 16, 128]``.

        Returns:
            ``[N, coded columns * 8, D]``, as :meth:`features` lays them out.

        Raises:
            ConfigError: the encoder half was not loaded.
        """
        if self.model.mae is None:
            raise ConfigError("only the decoder half is loaded; use parts='all' or 'encoder' to encode")
        with torch.inference_mode():
            features: Tensor = self.model.mae(windows.to(self.device, self.dtype))
        return features[:, self.config.encoder.context * BANDS :]

    def encode_windows(self, windows: Tensor) -> Tensor:
        """Turn filter banks ``[N, columns * 16, 128]`` of single windows into codes ``[N, 2, F]``."""
        return self.quantise(self.window_features(windows), windows)

    def quantise(self, patches: Tensor, windows: Tensor) -> Tensor:
        """Turn the features of windows into codes ``[N, 2, F]``; the filter banks tell where padding begins."""
        with torch.inference_mode():
            features = stack(patches, self.config.stack)
            books = self.model.codebooks
            semantic = nearest(features, books.semantic)
            padding = self._padding(windows, features.shape[1]) if self.config.encoder.mask_padding else None
            assert self.model.residual is not None  # the two come together, and whoever has patches has the other
            residual = self.model.residual(features, books.semantic[semantic], padding)
            return torch.stack([semantic, nearest(residual, books.acoustic, root=True)], 1)

    def _padding(self, windows: Tensor, frames: int) -> Tensor:
        """Mark the frames after the last filter-bank row that is not constant, bool ``[N, frames]`` (spec 3.1)."""
        alive = windows.std(-1) > 1e-7
        rows = alive.shape[1]
        last = (alive * torch.arange(1, rows + 1, device=alive.device)).amax(1)
        first_padded = -(-(last * frames) // rows)
        return (torch.arange(frames, device=alive.device) >= first_padded[:, None]).to(self.device)

    # --- decoding -------------------------------------------------------------------------------------------------

    def decode(
        self,
        codes: Tensor | np.ndarray,
        *,
        seed: int = 0,
        length: int | None = None,
        options: SamplerOptions | None = None,
        streams: Streams = "both",
        upsample: SuperResolution | str | None = None,
    ) -> Tensor:
        """Turn codes into samples.

        Args:
            codes: int ``[B, 2, F]``; -1 marks a code that is missing and is filled in by the model.
            seed: of the decoder's noise; the same seed, codes, weights and options give the same samples, row by row.
            length: samples to return at 16 kHz; None returns the whole last group.
            options: solver, steps, guidance; None takes the preset's.
            streams: "semantic" or "acoustic" ignores the other stream.
            upsample: a loaded model of super-resolution, or the name of one ("mini-sr", "audiosr-basic"), which is
                loaded once and shared: each row is brought to its sample rate, the upper band generated.

        Returns:
            float32 ``[B, length]`` at 16 kHz on the codec's device; with ``upsample`` at that model's rate, on the CPU.

        Raises:
            CodesError: wrong shape, dtype or range, or ``length`` is more than the codes stand for.
            ConfigError: the decoder half was not loaded.
        """
        codes = self.checked_codes(codes, streams)
        whole = self.config.samples(codes.shape[2])
        if length is not None and (not is_whole(length) or not 0 <= length <= whole):
            raise CodesError(f"{length!r} samples asked for; {codes.shape[2]} frames stand for {whole}")
        pieces = list(self._decode([codes], seed, options or SamplerOptions()))
        wave = torch.cat(pieces, 1)[:, :length]
        if upsample is None or not wave.shape[1]:
            return wave
        from .superres import shared  # which needs scipy, slow to import

        restorer = shared(upsample, str(self.device), self.dtype) if isinstance(upsample, str) else upsample
        return torch.stack([restorer.upsample(row, SAMPLE_RATE, seed=seed) for row in wave])

    def iter_decode(
        self, codes: Iterable[Tensor | np.ndarray], *, seed: int = 0, options: SamplerOptions | None = None
    ) -> Iterator[Tensor]:
        """Decode a long recording piece by piece in constant memory.

        Args:
            codes: consecutive pieces ``[B, 2, F]`` of any length.
            seed: as in :meth:`decode`.
            options: as in :meth:`decode`.

        Yields:
            Consecutive samples ``[B, S]``; together they are what :meth:`decode` returns for all codes at once.

        Raises:
            CodesError: as :meth:`decode`, or the pieces differ in their number of rows.
            ConfigError: the decoder half was not loaded.
        """
        yield from self._decode((self.checked_codes(piece) for piece in codes), seed, options or SamplerOptions())

    def _decode(self, pieces: Iterable[Tensor], seed: int, options: SamplerOptions) -> Iterator[Tensor]:
        """Decode consecutive pieces and cut off what the last window has beyond the codes."""
        if self.model.latent is None:
            raise ConfigError("only the encoder half is loaded; use parts='all' or 'decoder' to decode")
        frames = sent = rows = 0

        def counted() -> Iterator[Tensor]:
            nonlocal frames, rows
            for piece in pieces:
                if rows not in (0, len(piece)):
                    raise CodesError(f"a piece of {len(piece)} rows follows pieces of {rows}; keep the batch together")
                rows, frames = len(piece), frames + piece.shape[2]
                yield piece

        if self.config.decoder.join == "prefix":
            waves = decode_prefix(self.model, counted(), seed, options)
        else:
            # On the CPU a window sounds the same wherever it is decoded: alone in a stream, or in a batch of files.
            pooled = max(1, self.columns_at_once // self.config.decoder.columns)
            at_once = 1 if self.device.type == "cpu" else pooled
            waves = decode_crossfade(self.model, counted(), seed, options, at_once)
        for wave in waves:
            kept = wave[:, : self.config.samples(frames) - sent]
            sent += kept.shape[1]
            if kept.shape[1]:
                yield kept

    def embed(self, codes: Tensor | np.ndarray) -> Tensor:
        """Look up the vectors that codes stand for.

        Args:
            codes: int ``[B, 2, F]``; -1 marks a code that is missing.

        Returns:
            ``[B, F, acoustic_dim + feature_dim]`` (acoustic first), zeros for missing codes.

        Raises:
            CodesError: wrong shape, dtype or range.
        """
        return self.model.embed(self.checked_codes(codes))

    def editor(self, codes: Tensor | np.ndarray) -> Editor:
        """Return the editor of a recording whose codes are known: what they say is heard where nothing is kept.

        Args:
            codes: integers ``[1, 2, F]``; -1 leaves the choice to the model.

        Raises:
            CheckpointError: the weights have no encoder of the autoencoder.
            CodesError: wrong shape, dtype or range.
            ConfigError: the decoder half was not loaded.
        """
        from .editing import coded

        latent, codes = self.model.latent, self.checked_codes(codes)
        if latent is None:
            raise ConfigError("only the encoder half is loaded; use parts='all' or 'decoder' to edit")
        if len(codes) != 1:
            raise CodesError(
                f"an editor changes one recording; codes [1, 2, frames] are needed, seen {len(codes)} rows"
            )
        if latent.vae.encoder is None:
            if self._source is None:
                raise CheckpointError("a model put together by hand has no encoder of the autoencoder; load weights")
            inverse.attach(latent.vae, self._source)
        return coded(self.model, codes)

    def checked_codes(self, codes: Tensor | np.ndarray, streams: Streams = "both") -> Tensor:
        """Return ``codes`` as int64 ``[B, 2, F]`` on the codec's device, without the streams that are to be ignored.

        Raises:
            CodesError: wrong shape, dtype or range.
            ConfigError: ``streams`` is unknown.
        """
        if streams not in get_args(Streams):
            raise ConfigError(f"streams {streams!r} are unknown; choose one of {', '.join(get_args(Streams))}")
        codes = as_tensor(codes, CodesError)
        whole = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        if codes.ndim != 3 or codes.shape[1] != 2 or 0 in codes.shape or not whole:
            raise CodesError(f"codes must be integers [batch, 2, frames], seen {codes.dtype} {tuple(codes.shape)}")
        codes = codes.to(self.device, torch.int64)
        for name, stream, size in zip(
            ("semantic", "acoustic"), codes.unbind(1), self.config.codebook_sizes, strict=True
        ):
            low, high = int(stream.min()), int(stream.max())
            if low < MISSING or high >= size:
                raise CodesError(
                    f"{name} codes span {low}..{high}; {self.config.name} knows 0..{size - 1} (-1: missing)"
                )
        if streams != "both":
            keep = torch.tensor([streams == "semantic", streams == "acoustic"], device=codes.device)
            codes = torch.where(keep[:, None], codes, MISSING)
        return codes


def _single(wave: Tensor | np.ndarray, sample_rate: int) -> Tensor:
    """Return one recording ``[S]`` as checked samples at 16 kHz on the CPU."""
    wave = as_tensor(wave, AudioError)
    if wave.ndim != 1:
        raise AudioError(f"a sequence must hold recordings [S], seen {tuple(wave.shape)}; pass channels one by one")
    return _mono16k(wave, sample_rate)[0]


def _mono16k(wave: Tensor | np.ndarray, sample_rate: int) -> Tensor:
    """Return checked rows ``[B, S]`` at 16 kHz on the CPU."""
    return resample(mono(wave), sample_rate, SAMPLE_RATE)


def _chunks(items: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Stack consecutive items, ``size`` at a time."""
    while group := list(itertools.islice(items, size)):
        yield torch.stack(group)
