"""The autoencoder's encoder for a codec whose weights hold only its decoder: editing recordings needs both ways.

It was trained against that very decoder, standing still, and lies beside it in the native folder.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from . import checkpoints
from .config import VAEConfig
from .errors import CheckpointError
from .nn.vae import AutoencoderKL
from .values import to_json

FILE = "vae_encoder.safetensors"
PARTS = ("encoder.", "quant_conv.")


def save(folder: Path, vae: AutoencoderKL) -> None:
    """Write the encoder of ``vae`` beside the weights it was trained for, in half precision.

    Raises:
        CheckpointError: the folder has no decoder.
    """
    tensors = {name: value.half() for name, value in vae.state_dict().items() if name.startswith(PARTS)}
    checkpoints.save_model(folder, _identity(folder, vae.config), tensors, FILE)


def attach(vae: AutoencoderKL, folder: Path) -> None:
    """Give an autoencoder that holds only its decoder the encoder that lies in ``folder``.

    Args:
        vae: of a codec that was loaded from there; keeps its device and dtype.
        folder: the native folder.

    Raises:
        CheckpointError: there is no such file, it is damaged, or was trained for another decoder.
    """
    if not (folder / FILE).is_file():
        raise CheckpointError(
            f"{folder / FILE} is missing: these weights only decode; make it with "
            "`python -m semanticodec.training inverse --weights FOLDER`"
        )
    identity, tensors = checkpoints.read_model(folder, FILE)
    if identity != _identity(folder, vae.config):
        raise CheckpointError(f"{folder / FILE} was trained for another decoder than the one beside it; train it again")
    whole = AutoencoderKL(vae.config)
    state = {name: value for name, value in whole.state_dict().items() if name.startswith(PARTS)}
    found = checkpoints.matched(tensors, [], state, str(folder / FILE))
    whole.load_state_dict(found, strict=False)
    weight = vae.post_quant_conv.weight
    whole.to(weight.device, weight.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    vae.encoder, vae.quant_conv = whole.encoder, whole.quant_conv


def _identity(folder: Path, config: VAEConfig) -> str:
    """Say which decoder the one in ``folder`` is."""
    digest = checkpoints.file_digest(folder / "decoder.safetensors")
    return json.dumps({"vae": json.loads(to_json(config)), "decoder_sha256": digest}, sort_keys=True)
