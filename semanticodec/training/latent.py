"""Stage 5: residual encoder, acoustic codebook, conditioner and latent-diffusion U-Net, together, for all token rates.

One network serves the three rates; each rate has its own semantic centroids, residual encoder and acoustic codebook.
B blocks, F frames, D channels.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from einops import rearrange
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from vector_quantize_pytorch import VectorQuantize

from ..config import LATENT_ROWS, RATES, CodecConfig, GridConditioning
from ..latent import Conditioning, Known, LatentDiffusion
from ..model import CodecModel
from ..nn.conditioners import GridConditioner
from ..nn.quantize import nearest, stack
from .blocks import Blocks
from .diffusion import denoising_loss, timesteps
from .loop import Logs, RunOptions, adamw, channels_last, descend, follow, mean_logs
from .losses import mel_error

DROP_STREAM = 0.08
"""Chance that a block's semantic codes are hidden, and the same for its acoustic codes, and for both at once."""
DROP_PAST = 0.12
"""Chance that a block is generated without the latents before it, as at the start of a stream or after a loss."""
PAST_NOISE = 0.15
"""Most noise mixed into the given latents: in use they are the model's own, not the truth."""
PURE_NOISE = 0.4
"""Share of the blocks denoised from the noisiest timestep, where every decode starts and a fast one also ends."""
SKETCH_WEIGHT = 1.0
FREEZE_CODES_AT = 0.8
"""Share of the run after which codes stand still and only conditioner and U-Net go on."""
DENOISED_SHARE = 3
"""Every so many blocks of a batch go through the U-Net; all of them train the codes, which is much cheaper."""
AVERAGE = 0.999
TURNS = (100, 50, 100, 25)
"""Token rates by step: the highest, the default one, has most to learn."""


class RateCodes(nn.Module):
    """What belongs to one token rate: centroids, residual encoder and the codebook while it trains."""

    def __init__(self, model: CodecModel, batch: int) -> None:
        super().__init__()
        config = model.config
        assert model.residual is not None
        self.config = config
        self.residual = model.residual
        self.codebooks = model.codebooks
        per_step = batch * 2 * config.coded_columns // config.stack[0] * config.group
        self.quantizer = VectorQuantize(
            dim=config.encoder.acoustic_dim,
            codebook_size=config.encoder.acoustic_size,
            decay=0.97,
            threshold_ema_dead_code=0.1 * per_step / config.encoder.acoustic_size,
            commitment_weight=0.25,
        )

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (acoustic, semantic) embeddings ``[B, F, D]`` and the commitment loss of features ``[B, P, D]``."""
        # Codes are decided in full precision, as in use.
        with torch.autocast(patches.device.type, enabled=False):
            features = stack(patches, self.config.stack)
            semantic = self.codebooks.semantic[nearest(features, self.codebooks.semantic)]
            acoustic, _, commitment = self.quantizer(self.residual(features, semantic))
        return acoustic, semantic, commitment.sum()

    @torch.no_grad()
    def start(self, patches: Tensor) -> None:
        """Place the codebook on outputs of the untrained encoder for features ``[N, P, D]``, slightly scattered."""
        features = stack(patches, self.config.stack)
        semantic = self.codebooks.semantic[nearest(features, self.codebooks.semantic)]
        x = self.residual(features, semantic).flatten(0, 1)
        size = self.config.encoder.acoustic_size
        generator = torch.Generator().manual_seed(0)
        chosen = x[torch.randint(0, len(x), (size,), generator=generator)]
        chosen = chosen + 0.1 * x.std(0) * torch.randn(chosen.shape, generator=generator)
        book = self.quantizer._codebook
        book.embed.copy_(chosen[None])
        book.embed_avg.copy_(chosen[None])
        book.cluster_size.fill_(1.0)

    def store(self) -> None:
        """Copy the trained codebook to where inference reads it."""
        self.codebooks.acoustic.copy_(self.quantizer.codebook.reshape(self.codebooks.acoustic.shape))


class Sketch(nn.Module):
    """A guess of the mel straight from the grid: a cheap, noise-free gradient that tells the codes what is heard."""

    MEAN, SPREAD = -5.5, 3.0
    """Of log-mels in nats, roughly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1), nn.SiLU(), nn.Conv2d(64, LATENT_ROWS * LATENT_ROWS, 1)
        )

    def forward(self, grid: Tensor) -> Tensor:
        """Map ``[B, channels, T, 16]`` to log-mel ``[B, 4 * T, 64]``."""
        cells: Tensor = rearrange(self.layers(grid), "b (i j) t f -> b (t i) (f j)", i=LATENT_ROWS)
        return self.MEAN + self.SPREAD * cells


class LatentLoss(nn.Module):
    """The joint objective of one batch at one token rate."""

    scale: Tensor

    def __init__(self, models: dict[int, CodecModel], batch: int) -> None:
        super().__init__()
        first = models[RATES[0]]
        assert first.latent is not None
        self.models = models
        # Not a child: of the decoder only the U-Net trains here, and a checkpoint holds nothing else of it.
        self._latent = (first.latent,)
        self.unet = first.latent.unet
        self.register_buffer("scale", first.latent.scale.clone())
        self.rates = nn.ModuleDict({str(rate): RateCodes(model, batch) for rate, model in models.items()})
        self.conditioners = nn.ModuleDict({str(rate): _grid(model) for rate, model in models.items()})
        conditioning = first.config.decoder.conditioning
        assert isinstance(conditioning, GridConditioning)
        self.sketch = Sketch(conditioning.channels)

    @property
    def latent(self) -> LatentDiffusion:
        """The decoder whose U-Net this trains."""
        return self._latent[0]

    def codes(self, rate: int) -> RateCodes:
        """Return what belongs to one rate."""
        module = self.rates[str(rate)]
        assert isinstance(module, RateCodes)
        return module

    def conditioner(self, rate: int) -> GridConditioner:
        """Return the conditioner of a rate (they share their weights)."""
        module = self.conditioners[str(rate)]
        assert isinstance(module, GridConditioner)
        return module

    def forward(
        self,
        patches: Tensor,
        latents: Tensor,
        mels: Tensor,
        known: Known,
        keep: Tensor,
        rate: int,
        noise: Tensor,
        t: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the velocity, sketch and commitment losses.

        Args:
            patches: features ``[2B, P, D]``: the blocks before, then the blocks.
            latents: scaled latents ``[n, C, T, F]`` of the n <= B blocks that are denoised.
            mels: log-mels of the blocks ``[B, M, 64]``.
            known: latents before the n blocks.
            keep: bool ``[2B, 2]``, whether each block's (acoustic, semantic) embeddings are shown.
            rate: token rate of this batch.
            noise: ``[n, C, overlap + T, F]``.
            t: timesteps ``[n]``.
        """
        acoustic, semantic, commitment = self.codes(rate)(patches)
        shown = keep.to(acoustic)[:, :, None, None]
        grid = self.conditioner(rate)(torch.cat([acoustic * shown[:, 0], semantic * shown[:, 1]], -1))
        before, now = grid.chunk(2)
        both = keep[len(mels) :].all(1).to(grid)
        sketch = (mel_error(self.sketch(now), mels) * both).sum() / both.sum().clamp_min(1)
        conditioning = window_conditioning(before[: len(noise)], now[: len(noise)], known)
        return denoising_loss(self.latent, conditioning, latents, noise, t, known), sketch, commitment


def window_conditioning(before: Tensor, now: Tensor, known: Known) -> Conditioning:
    """Join the grid of a block ``[B, channels, T, 16]`` to the end of the one before it, where that is known."""
    past = before[:, :, -known.latents.shape[2] :] * known.present[:, None, None, None]
    return Conditioning(concat=torch.cat([past, now], 2))


def _grid(model: CodecModel) -> GridConditioner:
    assert isinstance(model.conditioner, GridConditioner)
    return model.conditioner


def share_decoder(models: dict[int, CodecModel]) -> None:
    """Let the models of all rates use the first one's decoder, AudioMAE and conditioner weights."""
    first = models[RATES[0]]
    assert isinstance(first.conditioner, GridConditioner)
    for model in models.values():
        model.latent, model.mae = first.latent, first.mae
        assert isinstance(model.conditioner, GridConditioner)
        model.conditioner.enter, model.conditioner.leave = first.conditioner.enter, first.conditioner.leave
        model.conditioner.bands, model.conditioner.rates = first.conditioner.bands, first.conditioner.rates


class LatentStage:
    """Train on precomputed blocks; AudioMAE and the autoencoder stand still."""

    name = "latent"

    def __init__(self, blocks: Blocks, models: dict[int, CodecModel], options: RunOptions) -> None:
        self.blocks, self.models, self.options = blocks, models, options
        share_decoder(models)
        first = models[RATES[0]]
        assert first.latent is not None
        self.config: CodecConfig = first.config
        assert blocks.latents is not None
        assert blocks.mels is not None
        self.latents, self.mels = blocks.latents, blocks.mels
        sample = torch.from_numpy(blocks.latents[:: max(1, len(blocks.latents) // 2000)].astype(np.float32))
        first.latent.scale.fill_(1 / float(sample.std()))
        first.latent.vae.requires_grad_(False)
        first.latent.vocoder.requires_grad_(False)
        self.pool = {held: blocks.chains(2, held_out=held) for held in (False, True)}
        self.raw = LatentLoss(models, options.batch * options.devices)
        count = min(1024, len(self.pool[False]))
        some = np.sort(np.random.default_rng(options.seed).choice(self.pool[False], count, replace=False))
        patches = torch.from_numpy(blocks.features[some].astype(np.float32))
        for rate in RATES:
            self.raw.codes(rate).start(patches)
        self.average = copy.deepcopy(first.latent.unet).requires_grad_(False)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the objective and its optimiser."""
        self.fabric = fabric
        latent = self.models[RATES[0]].latent
        assert latent is not None
        latent.to(fabric.device)
        channels_last(latent.unet)
        if self.options.compile:
            latent.unet.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))
        self.average.to(fabric.device)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the objective with all modules, the averaged U-Net and the optimiser."""
        return {"model": self.raw, "average": self.average, "optimizer": self.optimizer}

    def _run(
        self, rng: np.random.Generator, rate: int, batch: int, count: int, *, held_out: bool, dropout: bool
    ) -> tuple[Tensor, ...]:
        """Return the three losses of ``batch`` blocks, ``count`` of which are denoised."""
        chosen = rng.choice(self.pool[held_out], batch)
        device = self.fabric.device
        indices = np.concatenate([chosen - 1, chosen])
        patches = torch.from_numpy(self.blocks.features[indices].astype(np.float32)).to(device)
        latent = self.models[RATES[0]].latent
        assert latent is not None
        mels = torch.from_numpy(self.mels[chosen].astype(np.float32)).to(device)
        denoised = np.concatenate([chosen[:count] - 1, chosen[:count]])
        latents = torch.from_numpy(self.latents[denoised].astype(np.float32)).to(device) * latent.scale
        before, now = latents.chunk(2)
        overlap = self.config.decoder.overlap * 4
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        past = before[:, :, -overlap:]
        level = torch.rand(count, 1, 1, 1, generator=generator) * (PAST_NOISE if dropout else 0.0)
        past = past + (level * torch.randn(past.shape, generator=generator)).to(device)
        present = torch.rand(count, generator=generator) >= (DROP_PAST if dropout else 0.0)
        keep = kept(torch.rand(2 * batch, generator=generator), DROP_STREAM if dropout else 0.0)
        noise = torch.randn((count, now.shape[1], overlap + now.shape[2], now.shape[3]), generator=generator)
        t = timesteps(count, self.config.decoder.latent.schedule.steps, generator, PURE_NOISE)
        known = Known(past, present.to(device))
        result: tuple[Tensor, ...] = self.model(
            patches, now, mels, known, keep.to(device), rate, noise.to(device), t.to(device)
        )
        return result

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step at one token rate; the rates take turns."""
        rate = TURNS[index % len(TURNS)]
        count = max(1, self.options.batch // DENOISED_SHARE)
        batch = self.options.batch
        if progress >= FREEZE_CODES_AT:
            batch = count
            for each in RATES:
                self.raw.codes(each).eval().requires_grad_(False)
        rng = np.random.default_rng((self.options.seed, index, fabric.global_rank))
        velocity, sketch, commitment = self._run(rng, rate, batch, count, held_out=False, dropout=True)
        descend(fabric, velocity + SKETCH_WEIGHT * sketch + commitment, self.model, self.optimizer)
        follow(self.average, self.raw.unet, index, AVERAGE)
        return {
            f"velocity_{rate}": velocity.detach(),
            f"sketch_{rate}": sketch.detach(),
            f"commit_{rate}": commitment.detach(),
        }

    def evaluate(self) -> Logs:
        """Return held-out losses per rate without dropout, and how many acoustic codes are in use."""
        self.raw.eval()
        logs: Logs = {}
        for rate in RATES:

            def one(index: int, rate: int = rate) -> Logs:
                rng = np.random.default_rng((1, index, rate))
                velocity, sketch, _ = self._run(rng, rate, 128, 64, held_out=True, dropout=False)
                return {f"velocity_{rate}": velocity, f"sketch_{rate}": sketch}

            logs |= mean_logs(one, 2)
            sizes = self.raw.codes(rate).quantizer._codebook.cluster_size
            share = sizes / sizes.sum()
            logs[f"perplexity_{rate}"] = (-(share * share.clamp_min(1e-12).log()).sum()).exp()
        self.raw.train()
        return logs

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write the mel of eight held-out blocks above what the sketch makes of their codes."""
        indices = self.pool[True][:: max(1, len(self.pool[True]) // 8)][:8]
        self.raw.eval()
        with torch.no_grad():
            patches = torch.from_numpy(self.blocks.features[indices].astype(np.float32)).to(self.fabric.device)
            truth = torch.from_numpy(self.mels[indices].astype(np.float32)).to(self.fabric.device)
            acoustic, semantic, _ = self.raw.codes(RATES[0])(patches)
            grid = self.raw.conditioner(RATES[0])(torch.cat([acoustic, semantic], -1))
            pictures = [truth, self.raw.sketch(grid)]
        self.raw.train()
        image = torch.cat(pictures, 2).reshape(1, -1, 2 * pictures[0].shape[2]).mT
        writer.add_image("mel and sketch", ((image.cpu() + 11.5) / 13).clamp(0, 1), index)


def kept(chance: Tensor, drop: float) -> Tensor:
    """Turn uniform numbers ``[N]`` into which of (acoustic, semantic) is shown, bool ``[N, 2]``."""
    whole = chance >= 3 * drop
    return torch.stack([whole | (chance < drop), whole | ((chance >= drop) & (chance < 2 * drop))], 1)
