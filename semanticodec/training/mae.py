"""Stage 1: AudioMAE by masked autoencoding.  B batch, N patches, D channels."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ..audio import FBANK_BINS, FBANK_LOOKAHEAD, fbank
from ..config import BANDS, COLUMN, PATCH, AudioMAEConfig
from ..nn.audiomae import AudioMAE, Block, position_table
from .data import Corpus, Crops
from .loop import Logs, RunOptions, adamw, descend, mean_logs

MASKED = 0.7
VISIBLE_WEIGHT = 0.3
"""Weight of the visible patches' error: the features must also keep what they see, because the codes come from them."""


class MaskedAutoencoder(nn.Module):
    """The encoder with the light decoder that exists only here."""

    positions: Tensor

    def __init__(self, config: AudioMAEConfig) -> None:
        super().__init__()
        self.mae = AudioMAE(config)
        nn.init.normal_(self.mae.cls_token, std=0.02)
        width = config.decoder_dim
        self.widen = nn.Linear(config.dim, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.register_buffer("positions", position_table(config.columns, width)[:, 1:], persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.decoder_heads) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.predict = nn.Linear(width, PATCH * PATCH)

    def forward(self, rows: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct patches from the visible part of them.

        Args:
            rows: normalised filter bank ``[B, columns * 16, 128]``.
            order: a permutation of the patches per row, ``[B, N]``; the first ``1 - MASKED`` of them stay visible.

        Returns:
            Squared error per value over the masked patches, over the visible ones, and the reconstruction.
        """
        tokens = self.mae.embed(rows)
        count = round(tokens.shape[1] * (1 - MASKED))
        seen, hidden = order[:, :count, None], order[:, count:, None]
        visible = self.mae.transform(tokens.gather(1, seen.expand(-1, -1, tokens.shape[2])))
        visible = self.widen(visible)
        x = self.mask_token.expand(len(tokens), tokens.shape[1], -1).to(visible.dtype)
        x = x.scatter(1, seen.expand(-1, -1, x.shape[2]), visible) + self.positions
        for block in self.blocks:
            x = block(x)
        predicted = self.predict(self.norm(x))
        target = rearrange(rows, "b (t p) (f q) -> b (t f) (p q)", p=PATCH, q=PATCH)
        error = (predicted - target).square().mean(-1)
        picture = rearrange(predicted, "b (t f) (p q) -> b (t p) (f q)", f=BANDS, p=PATCH)
        return error.gather(1, hidden[..., 0]).mean(), error.gather(1, seen[..., 0]).mean(), picture


class MAEStage:
    """Train :class:`MaskedAutoencoder` on random crops of one encoder window."""

    name = "mae"

    def __init__(self, corpus: Corpus, config: AudioMAEConfig, options: RunOptions) -> None:
        self.options = options
        self.columns = config.columns
        self.raw: nn.Module = MaskedAutoencoder(config)
        length = config.columns * COLUMN + FBANK_LOOKAHEAD
        self.crops = Crops(corpus, length, options.batch, seed=options.seed)
        self.held_out = Crops(corpus, length, 64, seed=1, held_out=True)

    def setup(self, fabric: Fabric) -> None:
        """Wrap the model and its optimiser."""
        self.fabric = fabric
        if self.options.compile:
            self.raw.compile()
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the model and the optimiser."""
        return {"model": self.raw, "optimizer": self.optimizer}

    def _run(self, wave: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = fbank(wave.to(self.fabric.device))
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(len(rows), self.columns * BANDS, generator=generator).argsort(1).to(rows.device)
        return (*self.model(rows, order), rows)

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step."""
        del progress
        masked, visible, _, _ = self._run(self.crops(index, fabric.global_rank), index)
        descend(fabric, masked + VISIBLE_WEIGHT * visible, self.model, self.optimizer)
        return {"masked": masked.detach(), "visible": visible.detach()}

    def evaluate(self) -> Logs:
        """Return the held-out squared errors (the data has variance of about 0.25)."""

        def one(index: int) -> Logs:
            masked, visible, _, _ = self._run(self.held_out(index), index)
            return {"masked": masked, "visible": visible}

        return mean_logs(one, 4)

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write four windows above their reconstructions."""
        with torch.no_grad():
            _, _, picture, rows = self._run(self.held_out(0)[:4], 0)
        image = torch.cat([rows, picture], 2).reshape(1, -1, 2 * FBANK_BINS).mT
        writer.add_image("filter bank and reconstruction", (image.cpu() / 2 + 0.7).clamp(0, 1), index)
