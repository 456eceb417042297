"""Frozen configuration values, the geometry that follows from them, and the presets.

Everything about time is an integer number of samples, mel rows, patch columns or frames.  Words:

* row: one 10 ms hop of a mel spectrogram (160 samples at 16 kHz)
* patch: 16 rows x 16 filter-bank bins, one AudioMAE token; column: the 8 patches of one 160 ms step
* frame: one column of the codes tensor ``[B, n_q, F]``; a group is the frames of one time step of the stacked patches
* latent step: 4 mel rows (40 ms); a patch column is 4 latent steps
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from .errors import ConfigError
from .values import from_json, to_json

SAMPLE_RATE = 16_000
HOP = 160
"""Samples per mel row, at 16 kHz (10 ms)."""
PATCH = 16
"""Mel rows (and filter-bank bins) per AudioMAE patch."""
COLUMN = HOP * PATCH
"""Samples per patch column (160 ms)."""
BANDS = 8
"""Patches per column: 128 filter-bank bins / 16."""
LATENT_ROWS = 4
"""Mel rows per latent step."""
MEL_BINS = 64
"""Bins of the decoder's log-mel."""
MISSING = -1
"""A code that was lost or is to be ignored: its embedding is the unconditional one."""

STACKING: dict[int, tuple[int, int]] = {100: (1, 1), 50: (1, 2), 25: (2, 2)}
"""Token rate -> how many patches (in time, in frequency) share one pair of codes."""

TokenRate = Literal[25, 50, 100]


@dataclass(frozen=True)
class MelConfig:
    """Natural-log mel magnitudes: ``bins`` Slaney filters from ``fmin`` to ``fmax`` Hz, a row every ``hop`` samples."""

    sample_rate: int = SAMPLE_RATE
    n_fft: int = 1024
    hop: int = HOP
    bins: int = MEL_BINS
    fmin: float = 0.0
    fmax: float = 8000.0


@dataclass(frozen=True)
class AudioMAEConfig:
    """A ViT over one window of ``columns`` x 8 patches; the decoder half exists only for training."""

    columns: int = 64
    dim: int = 768
    depth: int = 12
    heads: int = 12
    pooled_blocks: int = 3
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16


@dataclass(frozen=True)
class EncoderConfig:
    """From filter bank to codes.

    ``context`` columns at the start of every window are only looked at; the remaining ones are coded.  The official
    models have none (windows of 64 columns side by side); mini slides a short window along, so that it streams.
    """

    mae: AudioMAEConfig = AudioMAEConfig()
    context: int = 0
    mask_padding: bool = True
    """Whether frames that stand for no audio are hidden from the residual encoder (and the rows that the zero padding
    leaves incomplete hold a constant), as published; otherwise padding is ordinary silence."""
    semantic_size: int = 4096
    acoustic_size: int = 8192
    acoustic_dim: int = 768
    lstm_layers: int = 4
    lstm_dim: int = 1536
    bidirectional: bool = True


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser's U-Net.

    Each attention site holds one transformer of ``depth`` blocks per entry of ``contexts``: ``None`` attends to itself
    twice, a number is the width of the context its second attention looks at.  A vector of ``film_dim`` channels may
    stand beside the time embedding ("concat") or be added to it ("add").
    """

    in_channels: int = 8
    out_channels: int = 8
    base: int = 64
    mults: tuple[int, ...] = (1, 2, 3, 5)
    res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1, 2, 3)
    head_dim: int = 32
    heads: int | None = None
    """The same number of heads at every site (as some diffusers folders say); None is width / ``head_dim``."""
    contexts: tuple[int | None, ...] = (None,)
    depth: int = 1
    film_dim: int | None = None
    film_mode: Literal["concat", "add"] = "concat"
    groups: int = 32

    @property
    def factor(self) -> int:
        """What both axes of the latent must be multiples of."""
        return 1 << (len(self.mults) - 1)


@dataclass(frozen=True)
class ControlNetConfig:
    """A copy of the contracting half of ``unet`` that follows an image ``hint_factor`` times the size of the latent."""

    unet: UNetConfig = UNetConfig()
    hint_channels: int = 1
    hint_factor: int = 4
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)


@dataclass(frozen=True)
class VAEConfig:
    """KL autoencoder over the log-mel image [rows, bins], reducing both by ``2 ** (len(mults) - 1)``."""

    base: int = 128
    mults: tuple[int, ...] = (1, 2, 4)
    res_blocks: int = 2
    latent_channels: int = 8
    groups: int = 32

    @property
    def factor(self) -> int:
        """Mel rows per latent step, and mel bins per latent column."""
        return 1 << (len(self.mults) - 1)


@dataclass(frozen=True)
class HiFiGANConfig:
    """HiFi-GAN v1 generator."""

    kind: Literal["hifigan"] = "hifigan"
    base: int = 1024
    rates: tuple[int, ...] = (5, 4, 2, 2, 2)
    kernels: tuple[int, ...] = (16, 16, 8, 4, 4)
    stack_kernels: tuple[int, ...] = (3, 7, 11)
    dilations: tuple[int, ...] = (1, 3, 5)


@dataclass(frozen=True)
class VocosConfig:
    """ConvNeXt trunk at the mel rate that predicts magnitudes; ``iterations`` of Griffin-Lim find the phases.

    Convolution i looks ``right[i]`` rows ahead.
    """

    kind: Literal["vocos"] = "vocos"
    dim: int = 256
    hidden: int = 768
    layers: int = 6
    kernel: int = 7
    right: tuple[int, ...] = (1, 1, 1, 0, 0, 0, 0)
    n_fft: int = 1024
    iterations: int = 8


@dataclass(frozen=True)
class ContextConditioning:
    """Codes enter by cross-attention: features plus a sinusoidal position of ``position_dim`` channels."""

    kind: Literal["context"] = "context"
    position_dim: int = 192


@dataclass(frozen=True)
class GridConditioning:
    """Codes enter by concatenation: features laid on their patch's cells of the latent grid."""

    kind: Literal["grid"] = "grid"
    hidden: int = 256
    channels: int = 32


@dataclass(frozen=True)
class ScheduleConfig:
    """Variances of the forward process over ``steps`` timesteps.

    "linear": betas linear in their square roots.  "cosine": the signal falls as a squared cosine, to nothing at the
    last timestep (the betas are not clipped, and ``beta_start`` and ``beta_end`` say nothing).
    """

    kind: Literal["linear", "cosine"] = "linear"
    steps: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0195


@dataclass(frozen=True)
class LatentConfig:
    """One latent-diffusion system: its networks, what the U-Net predicts of which forward process, and its dials.

    ``steps``, ``guidance`` and ``eta`` hold where the caller says nothing, with the default sampler, which at 10 steps
    is well nearer to the solution of 200 than DDIM at the published 50 (``benchmarks.ratios solver``).
    """

    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    vocoder: HiFiGANConfig | VocosConfig = HiFiGANConfig()
    mel: MelConfig = MelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    prediction: Literal["v", "eps"] = "v"
    steps: int = 10
    guidance: float = 2.0
    eta: float = 0.0

    @property
    def cells(self) -> int:
        """Latent cells of one step, along frequency."""
        return self.mel.bins // self.vae.factor

    @property
    def step_samples(self) -> int:
        """Samples per latent step."""
        return self.mel.hop * self.vae.factor


@dataclass(frozen=True)
class DecoderConfig:
    """From codes to samples.

    A window of ``columns`` is generated at a time and shares ``overlap`` columns with the one before it: by fading the
    two waveforms into each other ("crossfade"), or by being given the earlier latents ("prefix").
    """

    columns: int = 64
    overlap: int = 4
    join: Literal["crossfade", "prefix"] = "crossfade"
    conditioning: ContextConditioning | GridConditioning = ContextConditioning()
    latent: LatentConfig = LatentConfig()


@dataclass(frozen=True)
class CodecConfig:
    """One preset: a name, a token rate, and the values of both halves."""

    name: str
    token_rate: TokenRate
    encoder: EncoderConfig
    decoder: DecoderConfig

    n_q: typing.ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.token_rate not in STACKING:
            raise ConfigError(f"token rate {self.token_rate!r} is unknown; choose one of {sorted(STACKING)}")
        for side, hop in (("encoder", self.coded_columns), ("decoder", self.decoder.columns - self.decoder.overlap)):
            if hop <= 0 or hop % self.stack[0]:
                raise ConfigError(
                    f"{side} windows advance by {hop} columns, not a positive multiple of {self.stack[0]}"
                )

    @property
    def stack(self) -> tuple[int, int]:
        """Patches (in time, in frequency) that share one pair of codes."""
        return STACKING[self.token_rate]

    @property
    def feature_dim(self) -> int:
        """Channels of one stacked feature vector."""
        return self.encoder.mae.dim * self.stack[0] * self.stack[1]

    @property
    def frame_rate(self) -> Fraction:
        """Frames (pairs of codes) per second."""
        return Fraction(self.token_rate, 2)

    @property
    def group(self) -> int:
        """Frames per group: the pairs of codes of one time step."""
        return BANDS // self.stack[1]

    @property
    def group_samples(self) -> int:
        """Samples that one group of frames stands for."""
        return COLUMN * self.stack[0]

    @property
    def codebook_sizes(self) -> tuple[int, int]:
        """Entries of the (semantic, acoustic) codebook."""
        return self.encoder.semantic_size, self.encoder.acoustic_size

    @property
    def code_bits(self) -> tuple[int, int]:
        """Packed bits per (semantic, acoustic) code."""
        semantic, acoustic = self.codebook_sizes
        return (semantic - 1).bit_length(), (acoustic - 1).bit_length()

    @property
    def bitrate(self) -> Fraction:
        """Net bits per second."""
        return self.frame_rate * sum(self.code_bits)

    @property
    def coded_columns(self) -> int:
        """New patch columns per encoder window."""
        return self.encoder.mae.columns - self.encoder.context

    @property
    def block(self) -> int:
        """Samples coded per encoder window."""
        return self.coded_columns * COLUMN

    @property
    def window_frames(self) -> int:
        """Frames per decoder window."""
        return self.decoder.columns // self.stack[0] * self.group

    @property
    def hop_frames(self) -> int:
        """Frames from one decoder window to the next."""
        return (self.decoder.columns - self.decoder.overlap) // self.stack[0] * self.group

    def frames(self, samples: int) -> int:
        """Return how many frames code ``samples`` samples at 16 kHz."""
        return -(-samples // self.group_samples) * self.group

    def samples(self, frames: int) -> int:
        """Return how many samples at 16 kHz ``frames`` frames stand for."""
        return -(-frames // self.group) * self.group_samples

    def columns(self, frames: int) -> int:
        """Return how many patch columns ``frames`` frames stand for."""
        return -(-frames // self.group) * self.stack[0]

    def to_json(self) -> str:
        """Write the configuration as JSON; :func:`config_from_json` reads it back."""
        return to_json(self)


def config_from_json(text: str) -> CodecConfig:
    """Read a configuration written by :meth:`CodecConfig.to_json`.

    Raises:
        ConfigError: the text is not JSON, or its fields are not those of this version.
    """
    return from_json(CodecConfig, text)


def _official(rate: TokenRate, vocabulary: int) -> CodecConfig:
    time, frequency = STACKING[rate]
    dim = AudioMAEConfig().dim * time * frequency
    conditioning = ContextConditioning()
    return CodecConfig(
        name=f"semanticodec-{rate}-{vocabulary}",
        token_rate=rate,
        encoder=EncoderConfig(
            semantic_size=vocabulary,
            acoustic_dim=dim,
            lstm_layers={100: 4, 50: 3, 25: 2}[rate],
            lstm_dim=2 * dim,
        ),
        decoder=DecoderConfig(
            conditioning=conditioning,
            latent=LatentConfig(unet=UNetConfig(contexts=(None, 2 * dim + conditioning.position_dim))),
        ),
    )


def _mini(rate: TokenRate) -> CodecConfig:
    time, frequency = STACKING[rate]
    conditioning = GridConditioning()
    return CodecConfig(
        name=f"mini-{rate}",
        token_rate=rate,
        encoder=EncoderConfig(
            mae=AudioMAEConfig(columns=6, dim=192, depth=6, heads=6, decoder_dim=128, decoder_depth=2, decoder_heads=4),
            context=4,
            mask_padding=False,
            acoustic_dim=32 * time * frequency,
            lstm_layers=1,
            lstm_dim=256,
            bidirectional=False,
        ),
        decoder=DecoderConfig(
            columns=3,
            overlap=1,
            join="prefix",
            conditioning=conditioning,
            latent=LatentConfig(
                unet=UNetConfig(
                    in_channels=8 + 1 + conditioning.channels,
                    base=48,
                    mults=(1, 2, 4),
                    res_blocks=1,
                    attention_levels=(1, 2),
                    groups=16,
                ),
                vae=VAEConfig(base=16, mults=(1, 2, 4), res_blocks=1, groups=8),
                vocoder=VocosConfig(),
                steps=1,
                guidance=1.1,
            ),
        ),
    )


RATES: tuple[TokenRate, ...] = (100, 50, 25)
VOCABULARIES = (4096, 8192, 16384, 32768)
PRESETS: dict[str, CodecConfig] = {
    config.name: config
    for config in (
        *(_mini(rate) for rate in RATES),
        *(_official(rate, vocabulary) for rate in RATES for vocabulary in VOCABULARIES),
    )
}
DEFAULT_PRESET = "mini-100"


def preset(name: str) -> CodecConfig:
    """Return the configuration called ``name`` ("mini" is short for the default mini).

    Raises:
        ConfigError: no preset has that name.
    """
    config = PRESETS.get(DEFAULT_PRESET if name == "mini" else name)
    if config is None:
        raise ConfigError(f"no preset is called {name!r}; known presets: {', '.join(PRESETS)}")
    return config
