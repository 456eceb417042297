"""What each system learns from, as published: latents of sounds, and what its U-Net is told about them.

B sounds, S samples.  All run without gradients and draw from the given generator; posteriors are sampled, as published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..audio import log_mel
from ..codec import SemantiCodec
from ..conditioners.audiomae import context
from ..conditioners.prompts import PromptConditioner, Prompts
from ..errors import ConfigError
from ..latent import Conditioning, LatentDiffusion
from ..nn.audiomae import AudioMAE
from ..published import conditioning
from ..superres import PEAK, UNKNOWN
from .diffusion import Batch
from .mixup import Pairs, mixed_latents, mixed_sound

POOLS = (1, 2, 4, 8)
"""Patch columns and bands of AudioMAE that AudioLDM 2's U-Net sees merged into one, drawn anew for each batch."""
TRUTH = 0.5
"""Share of the batches in which AudioLDM 2's U-Net reads AudioMAE's features instead of the generated guess at them."""


def levelled(wave: Tensor) -> Tensor:
    """Return sounds ``[B, S]`` as the published code shows them to the autoencoder: without mean, peak 0.5."""
    centred = wave - wave.mean(-1, keepdim=True)
    return PEAK * centred / centred.abs().amax(-1, keepdim=True).clamp_min(1e-8)


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def _encoded(latent: LatentDiffusion, wave: Tensor, generator: torch.Generator) -> Tensor:
    posterior = latent.encode(log_mel(wave.to(latent.scale.device), latent.config.mel))
    return posterior.sample(_normal(posterior.mean, generator))


@torch.no_grad()
def heard(latent: LatentDiffusion, prompts: PromptConditioner, wave: Tensor, generator: torch.Generator) -> Batch:
    """Return what AudioLDM and MusicLDM learn from: sounds, told by CLAP's embedding of the sounds themselves.

    No text is needed; that of a text stands in its place when something is generated (spec 3.2, 5.3).

    Args:
        latent: with the encoder of its autoencoder.
        prompts: whose one condition is CLAP's vector.
        wave: ``[B, S]`` at the mel's sample rate, whole latent steps.
        generator: on the CPU.

    Raises:
        AudioError: the sounds cannot be used.
        ConfigError: the system reads more than CLAP's vector, or its autoencoder has no encoder.
    """
    wave = levelled(wave)
    told = prompts.sound(wave, latent.config.mel.sample_rate)
    return Batch(_encoded(latent, wave, generator), told, prompts.unconditional(len(wave)))


@torch.no_grad()
def mixed(
    latent: LatentDiffusion,
    prompts: PromptConditioner,
    pairs: Pairs,
    generator: torch.Generator,
    where: Literal["sound", "latent"],
) -> Batch:
    """Return what MusicLDM learns from: pairs in step with each other, mixed as sounds (BAM) or as latents (BLM).

    Args:
        latent: with the encoder of its autoencoder.
        prompts: whose one condition is CLAP's vector.
        pairs: of :class:`~semanticodec.training.mixup.BeatPairs`, whole latent steps.
        generator: on the CPU.
        where: latents are mixed; their condition is CLAP's embedding of what they sound like.

    Raises:
        AudioError: the sounds cannot be used.
        ConfigError: as for :func:`heard`.

    Source: MusicLDM (spec 5.4); rows of weight 1 stay what they are, sound and condition.
    """
    pairs = Pairs(levelled(pairs.first), levelled(pairs.second), pairs.weight)
    if where == "sound":
        return heard(latent, prompts, mixed_sound(pairs), generator)
    mel = latent.config.mel
    first, second = (log_mel(wave.to(latent.scale.device), mel) for wave in pairs[:2])
    rows, factor = first.shape[1], latent.config.vae.factor
    shape = (len(first), latent.config.vae.latent_channels, rows // factor, latent.config.cells)
    noise = torch.randn((2, *shape), generator=generator)
    z, wave = mixed_latents(latent, first, second, pairs.weight, (noise[0], noise[1]))
    plain = (pairs.weight == 1)[:, None].to(wave.device)
    told = prompts.sound(torch.where(plain, pairs.first.to(wave), wave), mel.sample_rate)
    return Batch(z, told, prompts.unconditional(len(z)))


@torch.no_grad()
def described(
    latent: LatentDiffusion,
    prompts: PromptConditioner,
    asked: Prompts,
    wave: Tensor,
    generator: torch.Generator,
    mae: AudioMAE | None = None,
) -> Batch:
    """Return what AudioLDM 2 and the other systems that read learn from: sounds and their descriptions.

    Args:
        latent: with the encoder of its autoencoder.
        prompts: of the system; its encoders and its sequence generator stand still
            (:func:`semanticodec.training.sequence.sequence_loss` is the latter's own objective).
        asked: one description, for speech with what is said, per sound.
        wave: ``[B, S]`` at the mel's sample rate, whole latent steps.
        generator: on the CPU.
        mae: its features take the place of the generated sequence in half of the batches, in 1 to 64 pieces merged to
            one of which the size is drawn (of speech each stays alone); None always generates.

    Raises:
        AudioError: the sounds cannot be used.
        CheckpointError: a tokenizer's files cannot be found.
        ConfigError: there is another number of descriptions than sounds, or features for a system without a sequence.

    Source: spec 4.3, which does not tell the share; one half is ours.
    """
    if len(asked.texts) != len(wave):
        raise ConfigError(f"seen {len(asked.texts)} descriptions of {len(wave)} sounds; give one for each")
    if mae is not None and prompts.sequence is None:
        raise ConfigError("this system reads no AudioMAE features; leave them out")
    wave = levelled(wave)
    told = prompts(asked)
    if mae is not None and torch.rand((), generator=generator) < TRUTH:
        time, bands = (POOLS[i] for i in torch.randint(len(POOLS), (2,), generator=generator).tolist())
        if prompts.phonemes is not None:
            time = bands = 1
        told = replace(told, contexts=(context(mae, wave, time, bands), *told.contexts[1:]))
    return Batch(_encoded(latent, wave, generator), told, prompts.unconditional(len(wave)))


@torch.no_grad()
def restored(latent: LatentDiffusion, wave: Tensor, low: Tensor, generator: torch.Generator) -> Batch:
    """Return what AudioSR learns from: sounds, told by the latents of what a low-pass left of them.

    Args:
        latent: with the encoder of its autoencoder.
        wave: ``[B, S]`` at the mel's sample rate, whole latent steps.
        low: of the same shape, from :func:`semanticodec.bandlimit.lowpass`.
        generator: on the CPU.

    Raises:
        ConfigError: the autoencoder has no encoder.

    Source: AudioSR (spec 6.3), the constant of its unconditional latent included.
    """
    whole, told = (_encoded(latent, x, generator) for x in (wave, low))
    unknown = torch.full_like(told, UNKNOWN) * latent.scale
    return Batch(whole, Conditioning(concat=told), Conditioning(concat=unknown))


@torch.no_grad()
def coded(latent: LatentDiffusion, codec: SemantiCodec, wave: Tensor, generator: torch.Generator) -> Batch:
    """Return what an official SemantiCodec decoder learns from: windows of sound, told by their codes.

    Args:
        latent: the decoder, with the encoder of its autoencoder.
        codec: whose codes it is to decode; an official preset.
        wave: ``[B, S]`` at 16 kHz, one window each.
        generator: on the CPU.

    Raises:
        AudioError: the sounds cannot be used.
        ConfigError: half of the codec or the autoencoder's encoder is missing.

    Source: SemantiCodec's decoder (spec 7); no condition is zeros beside the same positions.
    """
    told, untold = conditioning(codec, codec.encode(wave, latent.config.mel.sample_rate).mT)
    return Batch(_encoded(latent, wave, generator), told, untold)
