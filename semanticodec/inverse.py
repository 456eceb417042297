"""The autoencoder's encoder, which a codec does without until a recording is edited.

Official weights hold it beside its decoder.  In a native folder it is a file of its own that names the decoder it
belongs to: mini's was trained later, against that very decoder, standing still.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoints
from .config import VAEConfig
from .errors import CheckpointError
from .loading import matched
from .nn.vae import AutoencoderKL
from .values import to_json

FILE = "vae_encoder.safetensors"
PARTS = ("encoder.", "quant_conv.")


def save(folder: Path, config: VAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write an encoder beside the decoder it belongs to.

    Args:
        folder: native, with the decoder.
        config: of the autoencoder.
        tensors: by the autoencoder's names; the decoder's own are left out.

    Raises:
        CheckpointError: the folder has no decoder.
    """
    own = {name: value for name, value in tensors.items() if name.startswith(PARTS)}
    checkpoints.save_model(folder, _identity(folder, config), own, FILE)


def attach(vae: AutoencoderKL, source: checkpoints.Source) -> None:
    """Give an autoencoder that holds only its decoder the encoder that belongs to it.

    Args:
        vae: of a codec that was loaded from there; keeps its device and dtype.
        source: of the codec's weights.

    Raises:
        CheckpointError: there is no such file, it is damaged, or was made for another decoder.
    """
    tensors = read(source)
    whole = AutoencoderKL(vae.config)
    state = {name: value for name, value in whole.state_dict().items() if name.startswith(PARTS)}
    found = matched(tensors, [], state, str(source))
    for part in PARTS:
        own = {name.removeprefix(part): value for name, value in found.items() if name.startswith(part)}
        whole.get_submodule(part.removesuffix(".")).load_state_dict(own)
    weight = vae.post_quant_conv.weight
    whole.to(weight.device, weight.dtype, memory_format=torch.channels_last).eval().requires_grad_(False)  # type: ignore[call-overload]
    vae.encoder, vae.quant_conv = whole.encoder, whole.quant_conv


def present(source: checkpoints.Source) -> bool:
    """Tell whether weights come with an encoder."""
    return source.layout == "official" or (source.folder is not None and (source.folder / FILE).is_file())


def read(source: checkpoints.Source) -> dict[str, Tensor]:
    """Return the encoder that belongs to a codec's weights, by the autoencoder's names.

    Raises:
        CheckpointError: as for :func:`attach`.
    """
    if source.layout == "official":
        return checkpoints.read_inverse(source)
    folder, config = source.folder, source.config.decoder.latent.vae
    assert folder is not None
    if not (folder / FILE).is_file():
        raise CheckpointError(
            f"{folder / FILE} is missing: these weights only decode; make it with "
            "`python -m semanticodec.training inverse --weights FOLDER`"
        )
    identity, tensors = checkpoints.read_model(folder, FILE)
    if identity != _identity(folder, config):
        raise CheckpointError(f"{folder / FILE} was trained for another decoder than the one beside it; train it again")
    return tensors


def _identity(folder: Path, config: VAEConfig) -> str:
    """Say which decoder the one in ``folder`` is."""
    digest = checkpoints.file_digest(folder / "decoder.safetensors")
    return json.dumps({"vae": json.loads(to_json(config)), "decoder_sha256": digest}, sort_keys=True)
