"""The recipe of mini-gen: which stage needs what, with which settings, in which order.

Its autoencoder and vocoder are those of the shipped mini.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .. import checkpoints, controls, inverse
from ..codec import SemantiCodec
from ..conditioners.labels import LabelConditioner
from ..config import ControlNetConfig
from ..generation import MINI_GEN, GeneratorConfig, GeneratorModel
from ..latent import LatentDiffusion
from ..nn.controlnet import ControlNet
from ..values import to_json
from .generator import GeneratorStage, Told, Windows, window_samples
from .labels import LABELS, LabelledCrops
from .loop import RunOptions, train
from .stages import Session, card

log = logging.getLogger(__name__)

GENERATOR_RECIPES = {
    "generator": RunOptions(
        Path(), steps=100_000, minutes=60, batch=12, learning_rate=1e-3, precision="bf16-mixed", evaluate_every=250
    ),
    "control": RunOptions(
        Path(), steps=100_000, minutes=14, batch=4, learning_rate=1e-3, precision="bf16-mixed", evaluate_every=400
    ),
}
"""What the shipped weights were trained with on one CPU core: 3732 and 1774 steps; with more give more."""
HELD_OUT = 32
"""Windows of a held-out batch."""
CODEC = "mini-100"
"""The codec that lends its autoencoder and vocoder."""
Codec = str | os.PathLike[str]
HINT_WIDTHS = (8, 16, 32)


def _base(config: GeneratorConfig, codec: Codec) -> LatentDiffusion:
    """Return the core with the autoencoder and the vocoder of the codec that it grows out of."""
    source = checkpoints.locate(codec)
    found = SemantiCodec.from_pretrained(codec, parts="decoder").model.latent
    assert found is not None
    inverse.attach(found.vae, source)
    latent = LatentDiffusion(config.latent, vae_encoder=True)
    latent.vae.load_state_dict(found.vae.state_dict())
    latent.vocoder.load_state_dict(found.vocoder.state_dict())
    return latent.eval()


def _crops(session: Session, config: GeneratorConfig, options: RunOptions, *, held_out: bool) -> LabelledCrops:
    mel = config.latent.mel
    length = window_samples(config.window * config.latent.vae.factor, mel.hop)
    batch, seed = (HELD_OUT, 1) if held_out else (options.batch, options.seed + 40)
    return LabelledCrops(session.corpus, session.audio, length, batch, seed=seed, held_out=held_out)


def _told(latent: LatentDiffusion) -> Told:
    film = latent.config.unet.film_dim
    assert film is not None
    return Told(latent.unet, LabelConditioner(LABELS, film), latent.scale)


def _generator(session: Session, config: GeneratorConfig = MINI_GEN, codec: Codec = CODEC) -> None:
    options, fabric = session.start("generator")
    latent = _base(config, codec)
    told = _told(latent)
    windows, held_out = (
        Windows(_crops(session, config, options, held_out=held), latent, told.labels) for held in (False, True)
    )
    told.scale.copy_(1 / held_out(0).latents.std())
    train(GeneratorStage(told, windows, held_out, options, name="generator"), options, fabric)


def _trained(session: Session, config: GeneratorConfig, codec: Codec) -> tuple[LatentDiffusion, Told]:
    """Return the core with everything that was trained, and the labels."""
    latent = _base(config, codec)
    told = _told(latent)
    session.trained("generator", told, "average")
    return latent, told


def _control(session: Session, config: GeneratorConfig = MINI_GEN, codec: Codec = CODEC) -> None:
    options, fabric = session.start("control")
    latent, told = _trained(session, config, codec)
    network = ControlNet(control_config(config))
    network.copy_from(latent.unet)
    told.requires_grad_(False)
    windows, held_out = (
        Windows(_crops(session, config, options, held_out=held), latent, told.labels, network) for held in (False, True)
    )
    train(GeneratorStage(network, windows, held_out, options, name="control"), options, fabric)


def _export(session: Session, config: GeneratorConfig = MINI_GEN, codec: Codec = CODEC) -> None:
    """Write the native folder, in half precision; the ControlNet, if it was trained, is a file of its own."""
    _, fabric = session.start("export")
    if not fabric.is_global_zero:
        return
    latent, told = _trained(session, config, codec)
    config = replace(config, labels=LABELS)
    model = GeneratorModel(config)
    model.latent.load_state_dict(latent.state_dict())
    model.prompts.load_state_dict(told.labels.state_dict())
    state = {name: value.half() for name, value in model.state_dict().items()}
    checkpoints.save_model(session.weights, to_json(config), state)
    if (session.out / "control.pt").exists():
        network = ControlNet(control_config(config))
        session.trained("control", network, "average")
        controls.save(session.weights, network)
    title = (
        f"Weights of the preset {config.name}, half precision,\n"
        f"trained by `python -m semanticodec.training all --model {config.name}` on"
    )
    (session.weights / "README.md").write_text(card(config.name, title, session.audio, session.corpus.clips))
    for path in sorted(session.weights.glob("*.safetensors")):
        log.info("wrote %s, %.1f MB", path, path.stat().st_size / 1e6)


def control_config(config: GeneratorConfig) -> ControlNetConfig:
    """Return the ControlNet of a generator, whose hint is an image of the mel's size."""
    return ControlNetConfig(config.latent.unet, hint_factor=config.latent.vae.factor, hint_widths=HINT_WIDTHS)


GENERATOR_STAGES: dict[str, Callable[[Session], None]] = {
    "generator": _generator,
    "control": _control,
    "export": _export,
}
