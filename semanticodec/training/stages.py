"""The recipe of mini: which stage needs what, with which settings, in which order."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from .. import checkpoints
from ..config import PRESETS, RATES, CodecConfig
from ..errors import CheckpointError
from ..model import CodecModel
from ..nn.audiomae import AudioMAE
from ..nn.vae import AutoencoderKL
from .blocks import Blocks, kmeans, prepare
from .data import Corpus
from .latent import LatentLoss, LatentStage, share_decoder
from .loop import RunOptions, train
from .mae import MAEStage, MaskedAutoencoder
from .vae import VAELoss, VAEStage
from .vocoder import VocoderStage

log = logging.getLogger(__name__)
RECIPES = {
    "mae": RunOptions(Path(), steps=100_000, minutes=17, batch=48, learning_rate=1e-3),
    "vae": RunOptions(Path(), steps=100_000, minutes=30, batch=12, learning_rate=2e-3),
    "vocoder": RunOptions(Path(), steps=100_000, minutes=75, batch=8, learning_rate=1e-3),
    "latent": RunOptions(Path(), steps=100_000, minutes=70, batch=96, learning_rate=8e-4, evaluate_every=300),
}
"""What the shipped weights were trained with on two CPU cores; on a GPU give more steps, larger batches."""


@dataclass(frozen=True)
class Session:
    """One training run: where things are and how each stage runs."""

    audio: Path
    out: Path
    weights: Path
    options: Callable[[str], RunOptions]

    @cached_property
    def corpus(self) -> Corpus:
        """The recordings."""
        return Corpus.open(self.audio, self.out / "audio")

    @cached_property
    def configs(self) -> dict[int, CodecConfig]:
        """The mini preset of each token rate."""
        return {rate: PRESETS[f"mini-{rate}"] for rate in RATES}

    def device(self) -> str:
        """Where frozen networks compute."""
        return self.options("latent").accelerator

    def trained(self, stage: str, module: nn.Module, key: str = "model") -> None:
        """Fill ``module`` from a stage's checkpoint.

        Raises:
            CheckpointError: the stage has not been run.
        """
        path = self.out / f"{stage}.pt"
        if not path.exists():
            raise CheckpointError(f"{path} is missing; run the stage {stage!r} first")
        Fabric(accelerator="cpu", devices=1).load(path, {key: module})

    def mae(self) -> AudioMAE:
        """The trained AudioMAE."""
        module = MaskedAutoencoder(self.configs[RATES[0]].encoder.mae)
        self.trained("mae", module)
        return module.mae

    def vae(self) -> AutoencoderKL:
        """The trained autoencoder, both halves."""
        module = VAELoss(AutoencoderKL(self.configs[RATES[0]].decoder.vae))
        self.trained("vae", module)
        return module.vae

    def blocks(self, *, latents: bool) -> Blocks:
        """Features (and latents) of all blocks, from the trained AudioMAE and autoencoder."""
        vae = self.vae() if latents else None
        return prepare(self.corpus, self.configs[RATES[0]], self.mae(), vae, self.out, self.device())

    def models(self) -> dict[int, CodecModel]:
        """One model per token rate, sharing everything but codes, with AudioMAE, centroids, VAE and vocoder trained."""
        models = {rate: CodecModel(config) for rate, config in self.configs.items()}
        share_decoder(models)
        first = models[RATES[0]]
        assert first.latent is not None
        assert first.mae is not None
        first.mae.load_state_dict(self.mae().state_dict())
        wanted = first.latent.vae.state_dict()
        first.latent.vae.load_state_dict(
            {name: value for name, value in self.vae().state_dict().items() if name in wanted}
        )
        for rate, model in models.items():
            table = np.load(self.out / f"semantic_{rate}.npy")
            model.codebooks.semantic.copy_(torch.from_numpy(table))
        return models


def _mae(session: Session) -> None:
    options = session.options("mae")
    train(MAEStage(session.corpus, session.configs[RATES[0]].encoder.mae, options), options)


def _semantic(session: Session) -> None:
    blocks = session.blocks(latents=False)
    for rate, config in session.configs.items():
        np.save(session.out / f"semantic_{rate}.npy", kmeans(blocks, config).numpy())


def _vae(session: Session) -> None:
    options = session.options("vae")
    train(VAEStage(session.corpus, session.configs[RATES[0]], options), options)


def _vocoder(session: Session) -> None:
    options, config = session.options("vocoder"), session.configs[RATES[0]]
    train(VocoderStage(session.corpus, config, session.vae(), options), options)


def _latent(session: Session) -> None:
    options = session.options("latent")
    train(LatentStage(session.blocks(latents=True), session.models(), options), options)


def _export(session: Session) -> None:
    """Write the native folder, in half precision, with the averaged U-Net."""
    models = session.models()
    first = models[RATES[0]]
    assert first.latent is not None
    loss = LatentLoss(models, session.options("latent").batch)
    session.trained("latent", loss)
    session.trained("latent", first.latent.unet, "average")
    session.trained("vocoder", first.latent.vocoder)
    states = {}
    for rate, model in models.items():
        loss.codes(rate).store()
        states[session.configs[rate]] = {name: value.half() for name, value in model.state_dict().items()}
    checkpoints.save(session.weights, states)
    (session.weights / "README.md").write_text(_card(session))
    size = sum(path.stat().st_size for path in session.weights.glob("*.safetensors"))
    log.info("wrote %s, %.1f MB", session.weights, size / 1e6)


def _card(session: Session) -> str:
    """Return the model card: what the weights are and whose recordings they learnt from."""
    hours: Counter[tuple[str, str, str]] = Counter()
    names = {clip.name for clip in session.corpus.clips}
    with (session.audio / "train_manifest.csv").open() as file:
        for row in csv.DictReader(file):
            if row["file"] in names:
                hours[row["source"], row["repo"], row["licence"]] += float(row["seconds"]) / 3600  # type: ignore[assignment]
    lines = [
        f"| {source} | {repo} | {licence} | {time:.2f} |" for (source, repo, licence), time in sorted(hours.items())
    ]
    total = sum(hours.values())
    return "\n".join(
        [
            "# mini",
            "",
            f"Weights of the presets {', '.join(config.name for config in session.configs.values())}, half precision,",
            f"trained by `python -m semanticodec.training all` on {total:.1f} hours of recordings:",
            "",
            "| source | repository | licence | hours |",
            "|---|---|---|---|",
            *lines,
            "",
        ]
    )


STAGES: dict[str, Callable[[Session], None]] = {
    "mae": _mae,
    "semantic": _semantic,
    "vae": _vae,
    "vocoder": _vocoder,
    "latent": _latent,
    "export": _export,
}
