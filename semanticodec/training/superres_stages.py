"""The recipe of mini-sr: which stage needs what, with which settings, in which order."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from .. import checkpoints
from ..config import VocosConfig
from ..latent import LatentDiffusion
from ..nn.vae import AutoencoderKL
from ..nn.vocos import Vocos
from ..superres import MINI_SR, SuperResConfig
from ..values import to_json
from .data import Corpus
from .loop import RunOptions, train
from .stages import Session, card
from .superres import SuperResStage, VelocityLoss, wideband
from .vae import VAELoss, VAEStage
from .vocoder import MagnitudeLoss, VocoderStage

log = logging.getLogger(__name__)

SUPERRES_RECIPES = {
    "vae": RunOptions(Path(), steps=1400, minutes=60, batch=4, learning_rate=3e-3, evaluate_every=150),
    "vocoder": RunOptions(Path(), steps=100_000, minutes=8, batch=8, learning_rate=1.5e-3, evaluate_every=150),
    "superres": RunOptions(Path(), steps=100_000, minutes=13, batch=8, learning_rate=1.5e-3, evaluate_every=125),
}
"""What the shipped weights were trained with on one CPU core that others used as well: 1400, 1763 and 1283 steps, of
which the first half of "superres" as if for 22 minutes."""


def _corpus(session: Session, config: SuperResConfig) -> Corpus:
    return wideband(session.corpus, config.latent.mel.sample_rate)


def _trained_vae(session: Session, config: SuperResConfig) -> AutoencoderKL:
    module = VAELoss(AutoencoderKL(config.latent.vae))
    session.trained("vae", module)
    return module.vae


def _vae(session: Session, config: SuperResConfig = MINI_SR) -> None:
    options, fabric = session.start("vae")
    latent = config.latent
    train(VAEStage(_corpus(session, config), latent.vae, latent.mel, config.rows, options), options, fabric)


def _vocoder(session: Session, config: SuperResConfig = MINI_SR) -> None:
    options, fabric = session.start("vocoder")
    vae, latent = _trained_vae(session, config), config.latent
    assert isinstance(latent.vocoder, VocosConfig)
    train(VocoderStage(_corpus(session, config), latent.vocoder, latent.mel, vae, options), options, fabric)


def _superres(session: Session, config: SuperResConfig = MINI_SR) -> None:
    options, fabric = session.start("superres")
    train(SuperResStage(_corpus(session, config), config, _trained_vae(session, config), options), options, fabric)


def _export(session: Session, config: SuperResConfig = MINI_SR) -> None:
    """Write the native folder, in half precision."""
    _, fabric = session.start("export")
    if not fabric.is_global_zero:
        return
    latent = LatentDiffusion(config.latent, vae_encoder=True)
    latent.vae.load_state_dict(_trained_vae(session, config).state_dict())
    assert isinstance(latent.vocoder, Vocos)
    session.trained("vocoder", MagnitudeLoss(latent.vocoder, config.latent.mel))
    loss = VelocityLoss(config.latent)
    session.trained("superres", loss)
    session.trained("superres", latent.unet, "average")
    latent.scale.copy_(loss.scale)
    checkpoints.save_model(
        session.weights, to_json(config), {name: value.half() for name, value in latent.state_dict().items()}
    )
    clips = _corpus(session, config).clips
    title = (
        f"Weights of the preset {config.name}, half precision,\n"
        f"trained by `python -m semanticodec.training all --model {config.name}` on"
    )
    (session.weights / "README.md").write_text(card(config.name, title, session.audio, clips))
    log.info("wrote %s, %.1f MB", session.weights, (session.weights / checkpoints.MODEL).stat().st_size / 1e6)


SUPERRES_STAGES: dict[str, Callable[[Session], None]] = {
    "vae": _vae,
    "vocoder": _vocoder,
    "superres": _superres,
    "export": _export,
}
