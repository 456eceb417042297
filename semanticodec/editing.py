"""Edits without training: a recording's latents are kept in part, or noised in part, and the model does the rest.

Style transfer noises the latents to a strength and denoises them under another condition; inpainting, outpainting and
super-resolution give the model what a mask keeps.  What was kept is put back in the end, sample by sample.
C channels of one recording, S samples, T latent steps, F latent cells per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .audio import log_mel, recording, resample
from .bandlimit import crossfade
from .config import COLUMN
from .diffusion import Draw, Masked, Partial, SamplerOptions, noise
from .errors import ConfigError
from .latent import Conditioning, Known, LatentDiffusion
from .model import MISSING, CodecModel
from .nn.conditioners import ContextConditioner, GridConditioner
from .regions import Region as Region
from .regions import cell_mask, composed, grid_spans, grid_windows, placed_windows

WINDOW, OVERLAP = 256, 64
"""Latent steps that are generated at once (10.24 s at 16 kHz, as trained), and given again to the next window."""

LONGEST = 3600.0
"""Seconds that are generated at once; what is longer is better generated in parts."""

Condition = Callable[[int, int], tuple[Conditioning, Conditioning]]
"""(first latent step, steps) -> what to generate there and what guidance steers away from: one row for all, or each."""
Draws = Callable[[int, Tensor], Draw]
"""(window, what its latents are like) -> its noise by solver step."""


@dataclass(frozen=True)
class Editor:
    """One system, and what it is told.

    Args:
        latent: its networks, with the autoencoder's encoder.
        condition: what it is told about each window.
        window: latent steps generated at once.
        overlap: of them, how many were generated before and are given.
        prefix: the U-Net is told the overlap by channels of its own (mini's codec) instead of by the mask.
        peak: level at which recordings are shown to the autoencoder, as published; None leaves theirs, as codes need.
        unit: windows begin at multiples of so many latent steps, all that the condition can be told apart.
        longest: latent steps that the condition tells of in order, as speech does; None: it fits any window.
    """

    latent: LatentDiffusion
    condition: Condition
    window: int = WINDOW
    overlap: int = OVERLAP
    prefix: bool = False
    peak: float | None = 0.5
    unit: int = 1
    longest: int | None = None

    @property
    def sample_rate(self) -> int:
        """Of what comes out, in Hz."""
        return self.latent.config.mel.sample_rate

    def transfer(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        *,
        strength: float = 0.5,
        seed: int = 0,
        options: SamplerOptions | None = None,
    ) -> Tensor:
        """Give a recording the style of the condition.

        Args:
            wave: samples in [-1, 1], ``[S]`` or the channels of one recording ``[C, S]``.
            sample_rate: of ``wave`` in Hz.
            strength: how far its latents are noised: from above 0 (little changes) to 1 (nothing is left of it).
            seed: of the noise.
            options: solver, steps, guidance; None takes the preset's.

        Returns:
            float32 ``[..., ceil(S * self.sample_rate / sample_rate)]`` on the CPU, at the recording's level.

        Raises:
            AudioError: ``wave`` is no recording.
            ConfigError: the strength or an option is out of range.

        Source: AudioLDM's style transfer (spec section 8.1), which starts one timestep below where it noised to and
        fails at strength 1, as options with the published path do here, and loses 0.12 s.
        """
        source = self._source(wave, sample_rate)
        return self._edited(source, None, strength, seed, options)

    def inpaint(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        regions: Sequence[Region],
        *,
        renew: bool = True,
        seed: int = 0,
        options: SamplerOptions | None = None,
    ) -> Tensor:
        """Generate regions of a recording anew, and leave the rest of it exactly as it is.

        A region is generated at once, between what is before and after it, if it fits into a window with the overlap on
        either side; a longer one from what is before it on, its last part between both.

        Args:
            wave: as in :meth:`transfer`.
            sample_rate: as in :meth:`transfer`.
            regions: what to generate; what lies in none of them is kept.
            renew: the published masking rule: fresh noise on the kept part before each step, by DDIM whatever the
                options name.  What is generated fits what is kept better than by the options' own sampler (False).
            seed: as in :meth:`transfer`.
            options: as in :meth:`transfer`.

        Returns:
            As :meth:`transfer`; outside the regions' time the samples of the (resampled) recording.

        Raises:
            AudioError: ``wave`` is no recording.
            ConfigError: there are no regions, one has no sample within the recording, or its band lies above half the
                sample rate.

        Source: AudioLDM's masked sampling (spec section 8.2), which returns the model's version of the kept part.
        """
        source = self._source(wave, sample_rate)
        seconds = source.shape[-1] / self.sample_rate
        spans = [region.samples(self.sample_rate, source.shape[-1]) for region in regions]
        if not spans or any(first >= last for first, last in spans):
            raise ConfigError(
                f"regions within 0 to {seconds:.3f} s, of a sample or more, are needed, seen {list(regions)}"
            )
        return self._edited(source, regions, None, seed, options, renew=renew)

    def outpaint(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        *,
        before: float = 0.0,
        after: float = 0.0,
        renew: bool = True,
        seed: int = 0,
        options: SamplerOptions | None = None,
    ) -> Tensor:
        """Let a recording begin earlier and go on longer, window by window out of it.

        Args:
            wave: as in :meth:`transfer`.
            sample_rate: as in :meth:`transfer`.
            before: seconds to generate before it.
            after: seconds to generate after it.
            renew: as in :meth:`inpaint`.
            seed: as in :meth:`transfer`.
            options: as in :meth:`transfer`.

        Returns:
            As :meth:`transfer`, longer by both times.

        Raises:
            AudioError: ``wave`` is no recording.
            ConfigError: a time is negative or longer than an hour, both are less than half a sample, or the model
                speaks for a shorter time than the result has.
        """
        asked = f"{before} s before and {after} s after were asked for"
        if not (0 <= before <= LONGEST and 0 <= after <= LONGEST):
            raise ConfigError(f"{asked}; times from 0 to {LONGEST:.0f} s are needed, and one of them above 0")
        lead, tail = (round(seconds * self.sample_rate) for seconds in (before, after))
        if not lead + tail:
            raise ConfigError(f"{asked}; at least one must be above 0, by a sample (1/{self.sample_rate} s) or more")
        source = self._source(wave, sample_rate)
        longer = functional.pad(source, (lead, tail))
        ends = []
        if lead:
            ends.append(Region(0.0, lead / self.sample_rate))
        if tail:
            ends.append(Region((lead + source.shape[-1]) / self.sample_rate))
        return self._edited(longer, ends, None, seed, options, renew=renew)

    def upsample(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        *,
        cutoff: float,
        renew: bool = True,
        seed: int = 0,
        options: SamplerOptions | None = None,
    ) -> Tensor:
        """Generate everything above ``cutoff`` Hz by a mask over frequency; otherwise as :meth:`inpaint`.

        Raises:
            AudioError: ``wave`` is no recording.
            ConfigError: the cutoff is below 0, or nothing lies above it.
        """
        source = self._source(wave, sample_rate)
        return self._edited(source, [Region(low=cutoff)], None, seed, options, renew=renew)

    def generate(
        self,
        samples: int,
        seeds: Sequence[int],
        *,
        options: SamplerOptions | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Generate from nothing; what does not fit into a window is generated as going on from the window before.

        Args:
            samples: how many, 1 or more.
            seeds: one per row of the condition (or any number if it has one row).
            options: as in :meth:`transfer`.
            progress: called with the share done, 0 to 1, after each window.

        Returns:
            float32 ``[len(seeds), samples]`` on the CPU.
        """
        config = self.latent.config
        steps = -(-samples // config.step_samples)
        shape = (len(seeds), config.vae.latent_channels, steps, config.cells)
        with torch.inference_mode():
            nothing = torch.zeros(shape, device=self.latent.scale.device)
            keep = torch.zeros(1, 1, *shape[2:]).to(nothing)
            latents = self._sample(nothing, keep, None, _own(seeds), options or SamplerOptions(), False, progress)
            return self._decode(latents)[:, :samples]

    def _source(self, wave: Tensor | np.ndarray, sample_rate: int) -> Tensor:
        return resample(recording(wave), sample_rate, self.sample_rate)

    def _edited(
        self,
        source: Tensor,
        regions: Sequence[Region] | None,
        strength: float | None,
        seed: int,
        options: SamplerOptions | None,
        *,
        renew: bool = False,
    ) -> Tensor:
        """Return the recording with its regions (or, for None, all of it) generated."""
        for region in regions or ():
            if 2 * region.low >= self.sample_rate:
                raise ConfigError(
                    f"a band from {region.low} Hz on was asked for, but sound of {self.sample_rate} Hz ends at "
                    f"{self.sample_rate / 2:.0f} Hz; begin lower"
                )
        whole = source.reshape(-1, source.shape[-1])
        loudest = float(whole.abs().max())
        gain = self.peak / loudest if self.peak and loudest else 1.0
        step = self.latent.config.step_samples
        steps = -(-whole.shape[1] // step)
        if self.longest is not None and steps > self.longest:
            raise ConfigError(
                f"{whole.shape[1] / self.sample_rate:g} s are to be edited, and this model speaks for "
                f"{self.longest * step / self.sample_rate:g} s at a time; edit that much of the recording"
            )
        options = options or SamplerOptions()
        if renew:
            options = replace(options, sampler="ddim", eta=1.0 if options.eta is None else options.eta)
        with torch.inference_mode():
            given = self._encode(functional.pad(whole * gain, (0, steps * step - whole.shape[1])))
            keep = torch.zeros(1, 1, steps, given.shape[3])
            if regions is not None:
                keep = cell_mask(self.latent.config, steps, regions)
            latents = self._sample(given, keep.to(given), strength, _shared(seed), options, renew)
            heard = self._decode(latents)[:, : whole.shape[1]] / gain
        result = heard.clone() if regions is None else composed(whole, heard, regions, self.sample_rate)
        return result.reshape(source.shape)

    def _encode(self, wave: Tensor) -> Tensor:
        """Return the mean latents ``[C, channels, T, F]`` of ``[C, S]``, S whole latent steps, window by window."""
        mel, device = self.latent.config.mel, self.latent.scale.device
        # A reflected edge longer than the sound has nothing to reflect.
        padded = functional.pad(wave, (0, max(0, mel.n_fft - wave.shape[1])))
        rows = log_mel(padded, mel)[:, : wave.shape[1] // mel.hop].to(device)
        factor = self.latent.config.vae.factor
        parts = []
        for first, last, own in grid_spans(rows.shape[1] // factor, self.window, self.overlap):
            mean = self.latent.encode(rows[:, first * factor : last * factor]).mean
            parts.append(mean[:, :, own:])
        return torch.cat(parts, 2)

    def _sample(
        self,
        given: Tensor,
        keep: Tensor,
        strength: float | None,
        draws: Draws,
        options: SamplerOptions,
        renew: bool,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Return latents ``[C, channels, T, F]`` that are ``given`` where ``keep`` ``[1, 1, T, F]`` is 1."""
        result, keep, lead = given.clone(), keep.clone(), 0
        if self.prefix:
            # The first window has no past, and all are of one length.
            lead = self.overlap
            hop = self.window - self.overlap
            missing = -given.shape[2] % hop
            result = functional.pad(result, (0, 0, lead, missing))
            keep = functional.pad(keep, (0, 0, lead, missing))
            windows = grid_windows(result.shape[2], self.window, self.overlap)
        else:
            windows = placed_windows(keep[0, 0], self.window, self.overlap, self.unit)
        for index, (first, last, begin, end) in enumerate(windows):
            mask, part = keep[:, :, first:last], result[:, :, first:last]
            if bool((mask == 1).all()):
                continue
            conditional, unconditional = (
                conditioning if conditioning.count == len(part) else conditioning.rows([0] * len(part))
                for conditioning in self.condition(first - lead, last - first)
            )
            known = None
            if self.prefix:
                known = Known(part[:, :, : self.overlap], torch.full((len(part),), index > 0, device=part.device))
            generated = self.latent.generate(
                conditional,
                unconditional,
                draws(index, part),
                options,
                known,
                masked=Masked(part, mask, renew=renew) if mask.any() else None,
                start=None if strength is None else Partial(part, strength, options.path == "published"),
            )
            result[:, :, begin:end] = generated[:, :, begin - first : end - first]
            keep[:, :, begin:end] = 1.0
            if progress:
                progress((index + 1) / len(windows))
        return result[:, :, lead : lead + given.shape[2]]

    def _decode(self, latents: Tensor) -> Tensor:
        """Return the samples ``[C, S]`` of latents, window by window, each faded into the next."""
        step = self.latent.config.step_samples
        result = torch.zeros(len(latents), latents.shape[2] * step)
        for first, last, own in grid_spans(latents.shape[2], self.window, self.overlap):
            piece = self.latent.wave(self.latent.mel(latents[:, :, first:last])).cpu()
            fade = own * step
            if fade:
                old = result[:, first * step :][:, :fade]
                piece = torch.cat([crossfade(old, piece[:, :fade], 0), piece[:, fade:]], 1)
            result[:, first * step : last * step] = piece
        return result


def _shared(seed: int) -> Draws:
    """Return the noise of edits: the same for all channels, so that equal channels stay equal."""
    return lambda window, like: lambda step: noise(seed, window, step, tuple(like.shape[1:])).to(like).expand_as(like)


def _own(seeds: Sequence[int]) -> Draws:
    """Return noise of which each row has its own."""

    def draws(window: int, like: Tensor) -> Draw:
        shape = tuple(like.shape[1:])
        return lambda step: torch.stack([noise(seed, window, step, shape) for seed in seeds]).to(like)

    return draws


def always(conditioning: Conditioning, unconditional: Conditioning) -> Condition:
    """Return the condition that is the same everywhere: a prompt, or a label."""
    return lambda first, steps: (conditioning, unconditional)  # noqa: ARG005


def coded(model: CodecModel, codes: Tensor) -> Editor:
    """Return the editor whose condition is codes: what they say is heard where nothing is kept.

    Args:
        model: a codec's decoder half, its autoencoder with the encoder.
        codes: int64 ``[1, 2, F]``; a code of -1 leaves the choice to the model, and so does what lies beyond the codes.
    """
    config, conditioner = model.config, model.conditioner
    assert model.latent is not None
    steps = COLUMN // model.latent.config.step_samples
    window, overlap = config.decoder.columns * steps, config.decoder.overlap * steps

    unit = steps * config.stack[0]

    def embedded(begin: int, end: int) -> Tensor:
        """Vectors of groups of codes, zeros where there are none."""
        first, last = (at * config.group for at in (begin, end))
        part = codes[:, :, max(first, 0) : last]
        missing = last - max(first, 0) - part.shape[2]
        return model.embed(functional.pad(part, (max(0, -first), missing), value=MISSING))

    def grid(first: int, count: int) -> tuple[Conditioning, Conditioning]:
        assert isinstance(conditioner, GridConditioner)
        begin = first // unit
        features = embedded(begin, -(-(first + count) // unit))
        told, untold = (
            conditioner(x)[:, :, first - begin * unit :][:, :, :count] for x in (features, torch.zeros_like(features))
        )
        past = told[:, :, :overlap] if first >= 0 else torch.zeros_like(told[:, :, :overlap])
        # Guidance is away from a block without codes after the same past.
        told, untold = (torch.cat([past, x[:, :, overlap:]], 2) for x in (told, untold))
        return Conditioning(concat=told), Conditioning(concat=untold)

    def context(first: int, count: int) -> tuple[Conditioning, Conditioning]:
        assert isinstance(conditioner, ContextConditioner)
        features = embedded(first // unit, -(-(first + count) // unit))
        told, untold = conditioner(features), conditioner(torch.zeros_like(features))
        return Conditioning(contexts=((told, None),)), Conditioning(contexts=((untold, None),))

    prefix = isinstance(conditioner, GridConditioner)
    return Editor(model.latent, grid if prefix else context, window, overlap, prefix, peak=None, unit=unit)
