"""The recipe of mini: which stage needs what, with which settings, in which order."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import nn

from .. import checkpoints, inverse
from ..codec import SemantiCodec
from ..config import PATCH, PRESETS, RATES, SAMPLE_RATE, CodecConfig, MelConfig, VocosConfig
from ..errors import CheckpointError
from ..model import CodecModel
from ..nn.audiomae import AudioMAE
from ..nn.vae import AutoencoderKL
from ..nn.vocos import Vocos
from ..wire import prior
from .blocks import Blocks, kmeans, prepare
from .data import Clip, Corpus, manifest
from .latent import LatentLoss, LatentStage, share_decoder
from .loop import RunOptions, launch, train
from .mae import MAEStage, MaskedAutoencoder
from .polish import PolishLoss, PolishStage
from .prior import PriorStage, coded
from .vae import InverseStage, VAELoss, VAEStage
from .vocoder import MagnitudeLoss, VocoderStage

log = logging.getLogger(__name__)
RECIPES = {
    "mae": RunOptions(Path(), steps=100_000, minutes=62, batch=48, learning_rate=1e-3),
    "vae": RunOptions(Path(), steps=100_000, minutes=66, batch=12, learning_rate=2e-3),
    "vocoder": RunOptions(Path(), steps=100_000, minutes=20, batch=10, learning_rate=1e-3),
    "latent": RunOptions(Path(), steps=100_000, minutes=40, batch=48, learning_rate=8e-4, evaluate_every=300),
    "polish": RunOptions(Path(), steps=100_000, minutes=32, batch=16, learning_rate=4e-4, evaluate_every=200),
    "prior": RunOptions(Path(), steps=100_000, minutes=15, batch=512, learning_rate=4e-3),
    "inverse": RunOptions(Path(), steps=100_000, minutes=10, batch=12, learning_rate=2e-3, evaluate_every=250),
}
"""What the shipped weights were trained with on two CPU cores ("latent" and "polish" as two processes, ``--devices 2``;
"inverse" on one core); on a GPU give more steps, larger batches."""


def mini() -> dict[int, CodecConfig]:
    """Return the mini preset of each token rate."""
    return {rate: PRESETS[f"mini-{rate}"] for rate in RATES}


@dataclass(frozen=True)
class Session:
    """One training run: where things are, how each stage runs, and what is trained."""

    audio: Path
    out: Path
    weights: Path
    options: Callable[[str], RunOptions]
    configs: dict[int, CodecConfig] = field(default_factory=mini)
    rate: int = SAMPLE_RATE
    """Of the recordings, in Hz."""
    optional: bool = False
    """Whether the recordings of the kind "optional" are learnt from."""

    @cached_property
    def corpus(self) -> Corpus:
        """The recordings."""
        return Corpus.open(self.audio, self.out / "audio", self.rate, optional=self.optional)

    def start(self, stage: str) -> tuple[RunOptions, Fabric]:
        """Start the processes of a stage; the recordings are decoded by the first of them."""
        options = self.options(stage)
        fabric = launch(options)
        with fabric.rank_zero_first():
            log.info("%s: %d recordings", stage, len(self.corpus.clips))
        return options, fabric

    def trained(self, stage: str, module: nn.Module, key: str = "model") -> None:
        """Fill ``module`` from a stage's checkpoint.

        Raises:
            CheckpointError: the stage has not been run.
        """
        path = self._made_by(stage, f"{stage}.pt")
        Fabric(accelerator="cpu", devices=1).load(path, {key: module}, weights_only=True)

    def _made_by(self, stage: str, name: str) -> Path:
        path = self.out / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing; run the stage {stage!r} first")
        return path

    def mae(self) -> AudioMAE:
        """The trained AudioMAE."""
        module = MaskedAutoencoder(self.configs[RATES[0]].encoder.mae)
        self.trained("mae", module)
        return module.mae

    def vae(self) -> AutoencoderKL:
        """The trained autoencoder, both halves."""
        module = VAELoss(AutoencoderKL(self.configs[RATES[0]].decoder.latent.vae))
        self.trained("vae", module)
        return module.vae

    def blocks(self, *, latents: bool) -> Blocks:
        """Features (and latents) of all blocks, from the trained AudioMAE and autoencoder."""
        mae, vae = self.mae(), self.vae() if latents else None
        for array, stage in (("features.npy", "mae"), ("latents.npy", "vae")):
            if _older(self.out / array, self.out / f"{stage}.pt"):
                log.info("%s is older than the stage %s: computing it again", array, stage)
                (self.out / array).unlink()
        return prepare(self.corpus, self.configs[RATES[0]], mae, vae, self.out, self.options("latent").accelerator)

    def models(self) -> dict[int, CodecModel]:
        """One model per token rate, sharing everything but codes, with AudioMAE, centroids, VAE and vocoder trained."""
        models = {rate: CodecModel(config) for rate, config in self.configs.items()}
        share_decoder(models)
        first = models[RATES[0]]
        assert first.latent is not None
        assert first.mae is not None
        first.mae.load_state_dict(self.mae().state_dict())
        wanted = first.latent.vae.state_dict()
        found = self.vae().state_dict()
        first.latent.vae.load_state_dict({name: found[name] for name in wanted})
        for rate, model in models.items():
            table = np.load(self._made_by("semantic", f"semantic_{rate}.npy"))
            model.codebooks.semantic.copy_(torch.from_numpy(table))
        return models

    def diffusion(self) -> LatentLoss:
        """The codes, conditioner and averaged U-Net of the stage "latent", around all that came before."""
        loss = LatentLoss(self.models(), 1)
        self.trained("latent", loss)
        self.trained("latent", loss.latent.unet, "average")
        loss.latent.scale.copy_(loss.scale)
        return loss


def _older(path: Path, source: Path) -> bool:
    """Tell whether ``path`` was made before the present version of what it is made from."""
    return path.exists() and source.exists() and path.stat().st_mtime < source.stat().st_mtime


def _mae(session: Session) -> None:
    options, fabric = session.start("mae")
    train(MAEStage(session.corpus, session.configs[RATES[0]].encoder.mae, options), options, fabric)


def _semantic(session: Session) -> None:
    _, fabric = session.start("semantic")
    with fabric.rank_zero_first():
        blocks = session.blocks(latents=False)
    for rate, config in session.configs.items() if fabric.is_global_zero else ():
        path = session.out / f"semantic_{rate}.npy"
        if not path.exists() or _older(path, session.out / "features.npy"):
            part = path.with_suffix(".part.npy")
            np.save(part, kmeans(blocks, config).numpy())
            part.replace(path)
    fabric.barrier()


def _vae(session: Session) -> None:
    options, fabric = session.start("vae")
    decoder = session.configs[RATES[0]].decoder
    stage = VAEStage(session.corpus, decoder.latent.vae, decoder.latent.mel, decoder.columns * PATCH, options)
    train(stage, options, fabric)


def _vocoder(session: Session) -> None:
    options, fabric = session.start("vocoder")
    vocoder = session.configs[RATES[0]].decoder.latent.vocoder
    assert isinstance(vocoder, VocosConfig)
    train(
        VocoderStage(session.corpus, vocoder, session.configs[RATES[0]].decoder.latent.mel, session.vae(), options),
        options,
        fabric,
    )


def _latent(session: Session) -> None:
    options, fabric = session.start("latent")
    with fabric.rank_zero_first():
        blocks = session.blocks(latents=True)
    train(LatentStage(blocks, session.models(), options), options, fabric)


def _polish(session: Session) -> None:
    options, fabric = session.start("polish")
    train(PolishStage(session.blocks(latents=True), session.diffusion(), options), options, fabric)


def _export(session: Session) -> None:
    """Write the native folder, in half precision."""
    _, fabric = session.start("export")
    if not fabric.is_global_zero:
        return
    presets = ", ".join(config.name for config in session.configs.values())
    title = f"Weights of the presets {presets}, half precision,\ntrained by `python -m semanticodec.training all` on"
    readme = card("mini", title, session.audio, session.corpus.clips)
    loss = session.diffusion()
    session.trained("polish", PolishLoss(loss))
    assert isinstance(loss.latent.vocoder, Vocos)
    session.trained("vocoder", MagnitudeLoss(loss.latent.vocoder, MelConfig()))
    states = {}
    for rate, model in loss.models.items():
        loss.codes(rate).store()
        states[session.configs[rate]] = {name: value.half() for name, value in model.state_dict().items()}
    checkpoints.save(session.weights, states)
    (session.weights / "README.md").write_text(readme)
    size = sum(path.stat().st_size for path in session.weights.glob("*.safetensors"))
    log.info("wrote %s, %.1f MB", session.weights, size / 1e6)


def _prior(session: Session) -> None:
    """Fit and write the priors of the codes that the exported weights give."""
    options, fabric = session.start("prior")
    for config in session.configs.values():
        codec = SemantiCodec.from_pretrained(session.weights, preset=config.name, parts="encoder")
        with fabric.rank_zero_first():
            sides = coded(session.corpus, codec, session.out)
        stage = PriorStage(codec, sides, options)
        train(stage, options, fabric)
        if fabric.is_global_zero:
            path = prior.save(stage.raw.tensors(), config.name, codec.weights_hash, session.weights.parent / "prior")
            log.info("wrote %s, %.2f MB", path, path.stat().st_size / 1e6)


def _inverse(session: Session) -> None:
    """Train and write the encoder of the exported autoencoder."""
    options, fabric = session.start("inverse")
    config = session.configs[RATES[0]]
    latent = SemantiCodec.from_pretrained(session.weights, preset=config.name, parts="decoder").model.latent
    assert latent is not None
    stage = InverseStage(session.corpus, latent.vae, latent.config.mel, config.decoder.columns * PATCH, options)
    train(stage, options, fabric)
    if fabric.is_global_zero:
        halves = {name: value.half() for name, value in stage.vae.state_dict().items()}
        inverse.save(session.weights, stage.vae.config, halves)
        log.info("wrote %s", session.weights / inverse.FILE)


def card(name: str, title: str, audio: Path, clips: Sequence[Clip]) -> str:
    """Return the model card: what the weights are and whose recordings they learnt from.

    Args:
        name: of the model.
        title: a sentence that goes on with the hours of recordings.
        audio: the folder with the manifest.
        clips: the recordings.
    """
    hours: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    names = {clip.name for clip in clips}
    for row in manifest(audio):
        if row["file"] in names:
            hours[row["source"], row["repo"], row["licence"]] += float(row["seconds"]) / 3600
    lines = [
        f"| {source} | {repo} | {licence} | {time:.2f} |" for (source, repo, licence), time in sorted(hours.items())
    ]
    clause = any("no-as-is-resale" in licence for _, _, licence in hours)
    note = "Recordings marked no-as-is-resale may not be sold as they are; the weights hold no recording."
    return "\n".join(
        [
            f"# {name}",
            "",
            f"{title} {sum(hours.values()):.1f} hours of recordings:",
            "",
            "| source | repository | licence | hours |",
            "|---|---|---|---|",
            *lines,
            *(["", note] if clause else []),
            "",
        ]
    )


STAGES: dict[str, Callable[[Session], None]] = {
    "mae": _mae,
    "semantic": _semantic,
    "vae": _vae,
    "vocoder": _vocoder,
    "latent": _latent,
    "polish": _polish,
    "export": _export,
    "prior": _prior,
    "inverse": _inverse,
}
