"""The modules of one preset, put together.  B rows, F frames, D channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import MISSING as MISSING
from .config import CodecConfig, ContextConditioning, GridConditioning
from .latent import LatentDiffusion
from .nn.audiomae import AudioMAE
from .nn.conditioners import ContextConditioner, GridConditioner
from .nn.quantize import Codebooks, ResidualEncoder


class CodecModel(nn.Module):
    """The modules of one preset; either half may be absent (None)."""

    def __init__(self, config: CodecConfig, *, encoder: bool = True, decoder: bool = True) -> None:
        super().__init__()
        self.config = config
        self.codebooks = Codebooks(config)
        self.mae = AudioMAE(config.encoder.mae) if encoder else None
        self.residual = ResidualEncoder(config) if encoder else None
        self.latent = LatentDiffusion(config.decoder.latent) if decoder else None
        self.conditioner: ContextConditioner | GridConditioner | None = None
        conditioning = config.decoder.conditioning
        if decoder and isinstance(conditioning, ContextConditioning):
            self.conditioner = ContextConditioner(config.window_frames, conditioning.position_dim)
        if decoder and isinstance(conditioning, GridConditioning):
            self.conditioner = GridConditioner(config, conditioning)

    def embed(self, codes: Tensor) -> Tensor:
        """Return code embeddings ``[B, F, acoustic_dim + feature_dim]`` (acoustic first), zeros for missing codes."""
        semantic, acoustic = self.codebooks.embed(codes.clamp_min(0))
        present = (codes >= 0).to(semantic)
        return torch.cat([acoustic * present[:, 1, :, None], semantic * present[:, 0, :, None]], -1)
