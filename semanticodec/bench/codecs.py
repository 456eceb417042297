"""The adapter behind which every codec stands, and this package's codec."""

from __future__ import annotations

import functools
import hashlib
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from .. import checkpoints, wire
from ..codec import SemantiCodec
from ..config import PRESETS, SAMPLE_RATE, preset
from ..diffusion import FAST, SamplerOptions
from ..errors import AudioError, CheckpointError, SemantiCodecError
from ..wire import entropy, messages, prior
from ..wire.blocks import frame_bytes
from .clips import Clip, Wave

MESSAGE = 0.32
"""Seconds of sound per message when the gross bitrate is counted, for codecs that have no longer blocks."""
READING = ("audio", "bench/clips")
"""Sources that read and resample what every codec is given, and what programs give back."""
OURS = (
    *READING,
    "bench/codecs",
    "checkpoints",
    "codec",
    "config",
    "diffusion",
    "keymap",
    "latent",
    "loading",
    "model",
    "nn",
    "schedule",
    "values",
    "windows",
    "wire",
)
"""Sources between samples and files of this package's codec, and of what fills its networks."""
LIBRARIES = ("numpy", "soundfile", "soxr", "torch")
"""Distributions that :data:`READING` computes with."""


@dataclass(frozen=True)
class Coded:
    """What coding a clip gave.

    Args:
        data: the file as it would be stored; empty for decodes that others have made.
        net_bits: bits of the packed codes, without any container.
        codes: ``[n_q, F]`` for codecs that have codes.
        entropy_bits: bits after lossless coding of the codes, where the codec has such a thing.
    """

    data: bytes
    net_bits: float
    codes: NDArray[np.int64] | None = None
    entropy_bits: float | None = None


@dataclass(frozen=True)
class About:
    """What is known of a codec beside its scores.

    Args:
        family: curves of the rate-distortion plots join codecs of one family.
        what: one line for readers.
        rate: sample rate in Hz that it works at; nothing above half of it can come back.
        delay: algorithmic delay in seconds from a sample to its decoded self, where it is known.
        block: seconds of sound that are sent together.
        parameters: of all its networks.
        measured: False if the bitrate is what somebody stated.
        block_bits: of every block, the last one too, where the codec sends none but whole ones.
        packet: seconds of a packet, where packets vary in length and a message with several has to say their lengths.
    """

    family: str
    what: str
    rate: int
    delay: float | None = None
    block: float = MESSAGE
    parameters: int | None = None
    measured: bool = True
    block_bits: int | None = None
    packet: float | None = None


class Codec(Protocol):
    """One codec at one setting; a small value that can be sent to another process, where it loads what it needs."""

    @property
    def name(self) -> str:
        """Of this codec at this setting; unique in a run."""

    def missing(self) -> str | None:
        """Say what is needed and not there, or nothing."""

    def about(self) -> About:
        """Say what it is."""

    def fingerprint(self) -> str:
        """Return what its output depends on beside the clip: cached results of another fingerprint are not used."""

    def encode(self, clip: Clip) -> Coded:
        """Code a clip.

        Args:
            clip: any.

        Returns:
            Its bits.
        """

    def decode(self, coded: Coded, clip: Clip) -> Wave:
        """Decode a clip.

        Args:
            coded: what :meth:`encode` returned.
            clip: the same; it tells only its length, and its name to codecs whose bitrate is not measured.

        Returns:
            Samples ``[S']`` at 16 kHz.
        """


def checked(decoded: Wave) -> Wave:
    """Return what a codec decoded, if it can be kept and compared.

    Args:
        decoded: wanted is ``[S']`` of finite numbers.

    Raises:
        AudioError: it is something else.
    """
    if decoded.ndim != 1 or not len(decoded):
        raise AudioError(f"decoded to an array of shape {decoded.shape}; wanted are samples of one channel")
    if wrong := np.count_nonzero(~np.isfinite(decoded)):
        raise AudioError(f"{wrong} of {len(decoded)} decoded samples are no finite numbers")
    return np.ascontiguousarray(decoded)


@dataclass(frozen=True)
class Semanticodec:
    """A preset of this package, or of a folder, at a number of solver steps (None: the preset's own), or ``fast``."""

    preset: str
    steps: int | None = None
    folder: str | None = None
    seed: int = 0
    fast: bool = False

    @property
    def name(self) -> str:
        """Preset and setting."""
        if self.fast:
            return f"{self.preset}@fast"
        return self.preset if self.steps is None else f"{self.preset}@{self.steps}"

    def missing(self) -> str | None:
        """Say whether the weights are here; nothing is downloaded."""
        if not self._files():
            return f"no weights of {self.preset} in {self.folder or f'the Hugging Face cache of {checkpoints.HUB}'}"
        try:
            checkpoints.locate(self.folder or self.preset, self.preset)
        except SemantiCodecError as error:
            return str(error)
        return None

    def _files(self) -> tuple[Path, ...]:
        """Return the files of the weights that are on this machine."""
        if self.folder is None and not self.preset.startswith("mini"):
            import huggingface_hub

            names = checkpoints.official_files(preset(self.preset))
            cached = [huggingface_hub.try_to_load_from_cache(checkpoints.HUB, name) for name in names]
            paths = tuple(Path(path) for path in cached if isinstance(path, str))
            return paths if len(paths) == len(names) else ()
        folder = Path(self.folder) if self.folder else checkpoints.WEIGHTS / "mini"
        found = sorted(file for file in folder.glob("*") if file.suffix in (".safetensors", ".ckpt"))
        if (folder / "encoder.ckpt").is_file():  # the official layout, whose table may lie beside the folder
            table = checkpoints.official_files(preset(self.preset))[-1]
            found += [path for path in (folder / table, folder.resolve().parent / table) if path.is_file()]
        return tuple(found)

    def about(self) -> About:
        """Say what the preset is; delay is that of its streaming form."""
        from ..streaming import Decoder, Encoder

        codec, options = loaded(self)
        config = codec.config
        steps = options.steps or config.decoder.latent.steps
        guidance = ", no guidance" * self.fast
        what = f"{config.token_rate} tokens/s, {steps} solver step{'s' * (steps > 1)}{guidance}, seed {self.seed}"
        family = "mini" if config.name.startswith("mini") else "SemantiCodec"
        if self.fast or self.steps:
            family += ", fast" if self.fast else f", {steps} steps"
        return About(
            family,
            what,
            SAMPLE_RATE,
            Decoder(codec, options).delay(Encoder(codec)) / SAMPLE_RATE,
            config.block / SAMPLE_RATE,
            sum(p.numel() for p in codec.model.parameters()),
            block_bits=config.block * config.token_rate // (2 * SAMPLE_RATE) * sum(config.code_bits),
        )

    def fingerprint(self) -> str:
        """Name the weights' files and this package's code by their content, and the libraries by their versions."""
        made_by = sources(*OURS), versions(*LIBRARIES, "torchaudio", "constriction")
        return "/".join((self.name, str(self.seed), content(self._files()), *made_by, str(prior.presets())))

    def encode(self, clip: Clip) -> Coded:
        """Code into a ``.scodec`` file.

        Args:
            clip: any.

        Returns:
            The file, its packed bits, its codes ``[2, F]``, and their bits under the shipped prior.
        """
        codec, _ = loaded(self)
        codes = codec.encode(torch.from_numpy(clip.wave), SAMPLE_RATE).cpu().numpy()
        file = io.BytesIO()
        header = wire.Header.of(codec.config, codec.weights_hash, SAMPLE_RATE, 1, len(clip.wave))
        wire.write_codes(file, header, codes)
        net = codes.shape[2] * sum(codec.config.code_bits)
        return Coded(file.getvalue(), net, codes[0], self._entropy_bits(header, codes))

    def _entropy_bits(self, header: wire.Header, codes: NDArray[np.int64]) -> float | None:
        """Count bits of the shipped prior's range coding, in segments as files have them; None without a prior."""
        if self.folder is not None or self.preset not in prior.presets():
            return None
        book, size = prior.current(self.preset), header.segment_frames
        starts = range(0, codes.shape[2], size)
        return 8 * sum(len(entropy.encode(book, codes[:, :, start : start + size], start)) for start in starts)

    def decode(self, coded: Coded, clip: Clip) -> Wave:
        """Decode the file.

        Args:
            coded: what :meth:`encode` returned.
            clip: the same, for its length.

        Returns:
            As many samples ``[S]`` at 16 kHz as the clip has.
        """
        codec, options = loaded(self)
        wave = codec.decode(wire.read_codes(coded.data).codes, seed=self.seed, length=len(clip.wave), options=options)
        result: Wave = wave[0].float().cpu().numpy()
        return result

    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of the semantic and the acoustic codebook."""
        return loaded(self)[0].config.codebook_sizes

    def pool(self, codes: NDArray[np.int64]) -> NDArray[np.float32]:
        """Average what codes stand for, for the semantic probe.

        Args:
            codes: ``[2, F]``.

        Returns:
            The mean of their embeddings over time ``[D]``.
        """
        codec, _ = loaded(self)
        result: NDArray[np.float32] = codec.embed(torch.from_numpy(codes)[None])[0].mean(0).float().cpu().numpy()
        return result


@functools.lru_cache(1)
def loaded(spec: Semanticodec) -> tuple[SemantiCodec, SamplerOptions]:
    """Load what an adapter stands for, once per process.

    Args:
        spec: the adapter.

    Returns:
        The codec, on the CPU, and how it samples.

    Raises:
        CheckpointError: the weights are not here, or are not of this preset.
    """
    codec = SemantiCodec.from_pretrained(spec.folder or spec.preset, preset=spec.preset)
    return codec, FAST if spec.fast else SamplerOptions(steps=spec.steps)


@functools.cache
def sources(*names: str) -> str:
    """Return a digest of this package's code, for fingerprints.

    Args:
        names: of modules and of folders of modules, from the package's root ("audio", "bench/commands", "nn").

    Returns:
        SHA-256 of their source files, in hexadecimal.

    Raises:
        FileNotFoundError: there is no such module.
    """
    root = Path(__file__).parent.parent
    folders = ((name, root / name) for name in names)
    return content(
        tuple(
            file
            for name, folder in folders
            for file in (sorted(folder.glob("*.py")) if folder.is_dir() else [root / f"{name}.py"])
        )
    )


@functools.cache
def versions(*distributions: str) -> str:
    """Return what versions of libraries are installed, for fingerprints.

    Args:
        distributions: as package indexes name them.

    Returns:
        Names and versions.

    Raises:
        PackageNotFoundError: one of them is not installed.
    """
    return " ".join(f"{name}-{version(name)}" for name in distributions)


@functools.cache
def content(files: tuple[Path, ...]) -> str:
    """Return a digest of files, for fingerprints; each is read once per process.

    Args:
        files: at least one.

    Returns:
        SHA-256 of what is in them, in hexadecimal.

    Raises:
        CheckpointError: there are none.
    """
    if not files:
        raise CheckpointError("there are no files to take a fingerprint of")
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def ours(
    presets: tuple[str, ...] = tuple(PRESETS),
    steps: tuple[int | None, ...] = (None,),
    folder: str | None = None,
    *,
    fast: bool = False,
) -> Iterator[Semanticodec]:
    """Yield adapters of this package's presets, or of a folder with weights.

    Args:
        presets: names.
        steps: every number of solver steps to be taken; None is the preset's own.
        folder: of weights; None takes the published ones.
        fast: whether each preset comes with its fast setting as well.
    """
    for name in presets:
        for count in steps:
            yield Semanticodec(name, count, folder)
        if fast:
            yield Semanticodec(name, folder=folder, fast=True)


def found_by(clip: Clip, *, by_name: bool) -> str:
    """Return what of a clip a codec's work on it is found by in the cache.

    Args:
        clip: any.
        by_name: whether the codec is a folder of decodes, which clips of equal content have each under its own name.

    Returns:
        The digest of its content; with its name where decodes go by names.
    """
    return f"{clip.digest}/{clip.name}" if by_name else clip.digest


def gross_bits(
    net_bits: float, seconds: float, block: float, block_bits: int | None = None, packet: float | None = None
) -> float:
    """Count bits on the wire: codes messages of ``server/PROTOCOL.md`` in WebSocket frames, as a listener gets them.

    Every codec's bits are cut into messages of ``block`` seconds, a last one of what is left, whose payloads are whole
    bytes.  A codec that sends none but whole blocks has the packed bytes of one in every message; the bits of others
    are spread evenly over the messages, and where packets vary in length, a byte before each says it (two of packets
    that average more than 255 bytes).  What TLS, TCP and IP add depends on the link and is not counted.

    Args:
        net_bits: of the whole clip.
        seconds: its length.
        block: seconds per message.
        block_bits: of every block, the last one too, where the codec sends none but whole ones.
        packet: seconds of a packet, where packets vary in length.

    Returns:
        Bits of all messages with their frames: a whole number of bytes.
    """
    count = max(1, -(-round(seconds * SAMPLE_RATE) // round(block * SAMPLE_RATE)))
    octets = (net_bits / count if block_bits is None else block_bits) / 8
    if packet is not None:
        packets = max(1, -(-round(seconds * SAMPLE_RATE) // round(packet * SAMPLE_RATE)))
        octets += packets / count * (1 if net_bits <= 8 * 255 * packets else 2)
    # Sequence numbers grow with the session: this is one in the middle of five minutes.
    message = messages.encode(messages.Codes(seq=500, data=bytes(max(1, math.ceil(octets)))))
    return 8 * count * frame_bytes(len(message), masked=False)
