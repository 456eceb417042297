"""The latent-diffusion core: conditioning in, latents out, and from there to mel and samples.

B batch, C latent channels, T latent steps, M mel rows, S samples; at 16 kHz a step is 4 rows and a row 160 samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from .config import HiFiGANConfig, LatentConfig
from .diffusion import INITIAL, Draw, Masked, Partial, SamplerOptions, from_eps, from_v, guided, sample
from .errors import ConfigError
from .nn.controlnet import ControlNet
from .nn.hifigan import HiFiGAN
from .nn.unet import ContextCache, Residuals, UNet
from .nn.vae import AutoencoderKL
from .nn.vocos import Vocos
from .offload import Offload
from .schedule import make_schedule


@dataclass(frozen=True)
class Control:
    """An image to follow, and the network that tells the U-Net about it.

    Args:
        network: trained for this U-Net, whose weights it leaves alone.
        hint: ``[B, channels, M, bins]``, of the mel's size; a latent step is as many rows as the autoencoder merges.
        scales: what each of its outputs is multiplied with, one per skip and the last for the middle; a number is for
            all.  :func:`guess_scales` gives those of guess mode.

    Raises:
        ConfigError: there are more or fewer scales than outputs, or they are not finite.
    """

    network: ControlNet
    hint: Tensor
    scales: float | tuple[float, ...] = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.scales, int | float) and len(self.scales) != self.network.outputs:
            raise ConfigError(
                f"{len(self.scales)} scales were given for the {self.network.outputs} outputs of a ControlNet; give "
                "one number for all, or one each (guess_scales)"
            )
        if not torch.tensor(self.scales).isfinite().all():
            raise ConfigError(f"the scales of a control are {self.scales}; finite numbers are needed, 0 is no control")


def guess_scales(outputs: int) -> tuple[float, ...]:
    """Return the scales of guess mode, where the deepest of ``outputs`` counts whole and each shallower one less.

    Source: ControlNet's guess mode, whose other half is to leave the control out of the unconditional conditioning.
    """
    return tuple(0.825 ** (outputs - 1 - i) for i in range(outputs))


@dataclass(frozen=True)
class Posterior:
    """What the autoencoder makes of a mel: normal distributions of latents, on the scale of the denoiser.

    Args:
        mean: ``[B, C, T, F]``.
        std: of the same shape.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Return the latents that standard normal noise picks (the published code always samples)."""
        return self.mean + self.std * noise.to(self.mean)


@dataclass(frozen=True)
class Conditioning:
    """Everything the denoiser is told besides the noisy latent; all parts have the same batch.

    Args:
        contexts: (sequence ``[B, L, D]``, mask ``[B, L]`` or None) per cross-attention context, in the U-Net's order.
        concat: channels joined to the noisy latent, ``[B, channels, T, F]``, or None.
        film: one vector per row that stands beside the time embedding, ``[B, D]``, or None.
        controls: what ControlNets add.  Where the unconditional conditioning has none, they add nothing to that half.
    """

    contexts: tuple[tuple[Tensor, Tensor | None], ...] = ()
    concat: Tensor | None = None
    film: Tensor | None = None
    controls: tuple[Control, ...] = ()

    @property
    def count(self) -> int:
        """Rows; 0 if nothing is told."""
        parts = (self.film, self.concat, *(x for x, _ in self.contexts), *(control.hint for control in self.controls))
        return next((len(part) for part in parts if part is not None), 0)

    def rows(self, index: Sequence[int]) -> Conditioning:
        """Return the conditioning whose row i is row ``index[i]`` of this one."""
        picked = list(index)
        return Conditioning(
            tuple((x[picked], None if mask is None else mask[picked]) for x, mask in self.contexts),
            None if self.concat is None else self.concat[picked],
            None if self.film is None else self.film[picked],
            tuple(replace(control, hint=control.hint[picked]) for control in self.controls),
        )


@dataclass(frozen=True)
class Known:
    """A beginning of the window that is given, not generated.

    Args:
        latents: ``[B, C, P, F]``, the first P steps.
        present: bool ``[B]``; false where a row has no past: its beginning is zeros, and the network is told so.
    """

    latents: Tensor
    present: Tensor

    def place(self, x: Tensor) -> Tensor:
        """Replace the first P steps of ``x`` ``[B, C, T, F]``."""
        steps = self.latents.shape[2]
        given = torch.where(self.present[:, None, None, None], self.latents, 0.0)
        return torch.cat([given.to(x), x[:, :, steps:]], 2)

    def mask(self, x: Tensor) -> Tensor:
        """Return where ``x`` is known, ``[B, 1, T, F]``, 1 or 0."""
        mask = torch.zeros_like(x[:, :1])
        mask[:, :, : self.latents.shape[2]] = self.present.to(x)[:, None, None, None]
        return mask


@dataclass(frozen=True)
class _PreparedControl:
    """A control whose constant parts have been computed; ``scales`` are ``[B, outputs]``."""

    network: ControlNet
    hint: Tensor
    scales: Tensor
    contexts: tuple[ContextCache, ...]
    film: Tensor | None

    def __call__(self, x: Tensor, t: Tensor) -> Residuals:
        raw = self.network(x, t, self.hint, self.contexts, self.film)
        *outputs, middle = (
            scale[:, None, None, None] * output
            for scale, output in zip(self.scales.to(x).unbind(1), (*raw.skips, raw.middle), strict=True)
        )
        return Residuals(tuple(outputs), middle)


@dataclass(frozen=True)
class _Prepared:
    """Conditioning whose constant parts have been computed."""

    contexts: tuple[ContextCache, ...]
    concat: Tensor | None
    film: Tensor | None
    controls: tuple[_PreparedControl, ...]


class LatentDiffusion(nn.Module):
    """U-Net, autoencoder and vocoder of one system."""

    scale: Tensor

    def __init__(self, config: LatentConfig, *, vae_encoder: bool = False) -> None:
        super().__init__()
        self.config = config
        self.schedule = make_schedule(config.schedule)
        self.unet = UNet(config.unet)
        self.vae = AutoencoderKL(config.vae, encoder=vae_encoder)
        hifigan = isinstance(config.vocoder, HiFiGANConfig)
        self.vocoder = HiFiGAN(config.vocoder, config.mel.bins) if hifigan else Vocos(config.vocoder, config.mel)  # type: ignore[arg-type]
        self.register_buffer("scale", torch.ones(()))

    def offload(self, turns: Offload) -> None:
        """Let the networks take turns on a device."""
        turns.watch(self.unet, "forward", "project_contexts", "project_film")
        turns.watch(self.vae, "encode", "decode")
        turns.watch(self.vocoder, "forward")
        # Whatever is computed outside of them follows this buffer.
        self.scale = self.scale.to(turns.device)

    def predict(self, x: Tensor, t: Tensor, conditioning: _Prepared, known: Known | None = None) -> Tensor:
        """Run the U-Net once on ``x`` ``[B, C, T, F]`` at timesteps ``t`` ``[B]``."""
        parts = [x]
        if known is not None:
            parts = [known.place(x), known.mask(x)]
        if conditioning.concat is not None:
            parts.append(conditioning.concat)
        joined = torch.cat(parts, 1) if len(parts) > 1 else x
        joined = joined.to(self.dtype, memory_format=torch.channels_last)
        residuals = None
        for control in conditioning.controls:
            residuals = control(joined, t) if residuals is None else residuals + control(joined, t)
        result: Tensor = self.unet(joined, t, conditioning.contexts, conditioning.film, residuals)
        return result

    def prepare(self, conditioning: Conditioning) -> _Prepared:
        """Compute what stays constant over the steps of a solver."""
        film = None if conditioning.film is None else conditioning.film.to(self.dtype)
        contexts = tuple((context.to(self.dtype), mask) for context, mask in conditioning.contexts)
        concat, factor = conditioning.concat, self.config.unet.factor
        controls = []
        for control in conditioning.controls:
            network = control.network
            scales = control.hint.new_tensor(control.scales, dtype=torch.float32)
            rows = scales.expand(len(control.hint), network.outputs)
            hint = _longer(control.hint.to(self.dtype), factor * self.config.vae.factor)
            hint, own = network.project_hint(hint), network.project_contexts(contexts)
            controls.append(_PreparedControl(network, hint, rows, own, network.project_film(film)))
        return _Prepared(
            self.unet.project_contexts(contexts),
            None if concat is None else _longer(concat, factor),
            self.unet.project_film(film),
            tuple(controls),
        )

    def check(
        self, conditioning: Conditioning, shape: Sequence[int], *, known: bool = False, name: str = "conditioning"
    ) -> None:
        """Refuse conditioning that does not fit this U-Net and its windows.

        Args:
            conditioning: for :meth:`prepare`, which refuses other widths or numbers of contexts.
            shape: of the noisy latents, ``[B, C, T, F]``.
            known: whether a beginning is given, of which a channel of its own tells the U-Net.
            name: of the conditioning in the message.

        Raises:
            ConfigError: a part is missing or not wanted, of other rows, or of another size.
        """
        batch, channels, steps, cells = shape
        unet, factor = self.config.unet, self.config.vae.factor
        extra = unet.in_channels - channels - known
        if extra < 0:
            raise ConfigError(
                f"a known beginning was given to a U-Net of {unet.in_channels} input channels, which has none to be "
                "told of it; give it as masked instead"
            )
        _fits(f"the concat of the {name}", conditioning.concat, (batch, extra, steps, cells) if extra else None)
        film = None if unet.film_dim is None else (batch, unet.film_dim)
        _fits(f"the film vector of the {name}", conditioning.film, film)
        for context, mask in conditioning.contexts:
            if context.ndim != 3 or len(context) != batch or not context.shape[1]:
                raise ConfigError(
                    f"a context of the {name} has the shape {list(context.shape)}; [{batch}, 1 or more, width] is due"
                )
            if mask is not None:
                _fits(f"a context's mask in the {name}", mask, tuple(context.shape[:2]))
        for control in conditioning.controls:
            made = control.network.control
            if (made.unet, made.hint_factor) != (unet, factor):
                raise ConfigError(
                    f"a ControlNet of the {name} was made for another U-Net or autoencoder; give one trained for this"
                )
            size = (batch, made.hint_channels, steps * factor, cells * factor)
            _fits(f"a control's hint in the {name}", control.hint, size, "(controls.following cuts one to each window)")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.scale.dtype

    def generate(
        self,
        conditioning: Conditioning,
        unconditional: Conditioning,
        draw: Draw,
        options: SamplerOptions,
        known: Known | None = None,
        *,
        masked: Masked | None = None,
        start: Partial | None = None,
    ) -> Tensor:
        """Sample the latents of one window per row.

        Args:
            conditioning: what to generate.
            unconditional: what guidance steers away from; only read if the guidance is not 1.
            draw: noise by solver step, see :func:`semanticodec.diffusion.sample`.  Its T may be any number: the U-Net
                sees windows of a multiple of ``config.unet.factor`` steps, of which the first T are returned.
            options: the caller's dials; the preset's values stand in for those left open.
            known: the beginning of the windows, if it is given.
            masked: latents that are partly given, for any U-Net.
            start: latents to change instead of beginning with noise.

        Returns:
            ``[B, C, T, F]`` float32, on the scale of the denoiser; the known beginning is returned unchanged.

        Raises:
            ConfigError: an option is out of range, or a conditioning that is read does not fit, see :meth:`check`.
        """
        guidance = self.config.guidance if options.guidance is None else options.guidance

        def network(x: Tensor, t: int, prepared: _Prepared) -> Tensor:
            given = known
            if given is not None and len(x) != len(given.present):
                given = Known(torch.cat([given.latents] * 2), torch.cat([given.present] * 2))
            return self.predict(x, torch.full((len(x),), t, device=x.device), prepared, given)

        first, factor = draw(INITIAL), self.config.unet.factor
        self.check(conditioning, first.shape, known=known is not None)
        if guidance != 1.0:
            self.check(unconditional, first.shape, known=known is not None, name="unconditional conditioning")

        def drawn(step: int) -> Tensor:
            noise = first if step == INITIAL else draw(step)
            # Noise begins again where it ends: numbers of the same law, at no cost in random ones.
            length, missing = noise.shape[2], -noise.shape[2] % factor
            if not missing:
                return noise
            return noise[:, :, torch.arange(length + missing, device=noise.device) % length]

        if masked is not None:
            masked = replace(masked, latents=_longer(masked.latents, factor), mask=_longer(masked.mask, factor))
        if start is not None:
            start = replace(start, latents=_longer(start.latents, factor))
        prepared = self.prepare(conditioning)
        other = prepared if guidance == 1.0 else self.prepare(unconditional)
        wrap = from_v if self.config.prediction == "v" else from_eps
        denoise = wrap(guided(network, prepared, other, guidance, _join), self.schedule)
        latents = sample(
            denoise,
            drawn,
            self.schedule,
            options,
            steps=self.config.steps,
            eta=self.config.eta,
            masked=masked,
            start=start,
        )[:, :, : first.shape[2]]
        return latents if known is None else known.place(latents)

    def encode(self, mel: Tensor) -> Posterior:
        """Encode log-mel ``[B, M, bins]``, M a multiple of what a latent step holds, to a distribution of latents.

        Raises:
            ConfigError: built without ``vae_encoder``, or M is no such multiple.
        """
        image = mel[:, None].to(self.dtype, memory_format=torch.channels_last)
        mean, logvar = (part.float() for part in self.vae.encode(image))
        scale = self.scale.float()
        return Posterior(mean * scale, (0.5 * logvar).exp() * scale)

    def mel(self, latents: Tensor) -> Tensor:
        """Decode latents ``[B, C, T, F]`` to log-mel ``[B, M, bins]``."""
        z = (latents.to(self.dtype) / self.scale).contiguous(memory_format=torch.channels_last)
        return self.vae.decode(z)[:, 0]

    def wave(self, mel: Tensor) -> Tensor:
        """Synthesise log-mel ``[B, M, bins]`` to float32 samples ``[B, hop * M]``."""
        samples: Tensor = self.vocoder(mel.mT.contiguous())
        return samples[:, : mel.shape[1] * self.config.mel.hop].float()


def _fits(what: str, given: Tensor | None, wanted: tuple[int, ...] | None, advice: str = "") -> None:
    """Refuse a part of a conditioning of another shape, or one that is missing or not wanted."""
    seen = None if given is None else tuple(given.shape)
    if seen != wanted:
        has = "is missing" if seen is None else f"has the shape {list(seen)}"
        todo = "does not take one; leave it out" if wanted is None else f"needs {list(wanted)}; give that"
        raise ConfigError(f"{what} {has}; this U-Net {todo} {advice}".rstrip())


def _longer(x: Tensor, factor: int) -> Tensor:
    """Repeat the last row of ``[B, C, T, F]`` until T is a multiple."""
    missing = -x.shape[2] % factor
    return functional.pad(x, (0, 0, 0, missing), mode="replicate") if missing else x


def _join(a: _Prepared, b: _Prepared) -> _Prepared:
    """Stack two batches of conditioning."""
    contexts = tuple(x.joined(y) for x, y in zip(a.contexts, b.contexts, strict=True))
    controls = _join_controls(a.controls, b.controls)
    return _Prepared(contexts, _cat(a.concat, b.concat), _cat(a.film, b.film), controls)


def _cat(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else torch.cat([a, b])


def _join_controls(a: tuple[_PreparedControl, ...], b: tuple[_PreparedControl, ...]) -> tuple[_PreparedControl, ...]:
    if not b:
        b = tuple(replace(control, scales=torch.zeros_like(control.scales)) for control in a)
    if [control.network for control in a] != [control.network for control in b]:
        raise ConfigError("the unconditional conditioning has other controls; give it the same, in this order, or none")
    return tuple(
        _PreparedControl(
            x.network,
            torch.cat([x.hint, y.hint]),
            torch.cat([x.scales, y.scales]),
            tuple(own.joined(other) for own, other in zip(x.contexts, y.contexts, strict=True)),
            _cat(x.film, y.film),
        )
        for x, y in zip(a, b, strict=True)
    )
