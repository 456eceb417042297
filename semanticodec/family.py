"""The published systems on disk: where their files are looked for, and the networks that they fill.

A system's file lies in the folder of its name inside :func:`models_folder`, or in the hub's cache, or where the caller
says.  Folders in diffusers' layout are read by :mod:`semanticodec.diffusers_layout`.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .conditioners.config import PROMPTS
from .conditioners.keys import differing_copies, prompt_rules
from .conditioners.prompts import PromptConditioner
from .errors import CheckpointError, LicenceWarning
from .keymap import DROP, Rule, apply_rules, dotted_averages, inside, latent_rules
from .latent import LatentDiffusion
from .loading import check_schedule, fill, matched, read_checkpoint
from .systems import SystemConfig

MODELS_VARIABLE = "SEMANTICODEC_MODELS"

Which = Literal["reference", "average", "raw"]
"""Weights of the U-Net: those the published code samples with, their moving average, or the raw ones."""

_PROMPTS = (Rule(r"(cond_stage_models?|clap)\..+", DROP, "conditioners: were not asked for"),)


def models_folder() -> Path:
    """Return where files are looked for: ``$SEMANTICODEC_MODELS``, by default ``~/.cache/semanticodec``."""
    return Path(os.environ.get(MODELS_VARIABLE) or Path.home() / ".cache" / "semanticodec")


def expected(system: SystemConfig) -> Path:
    """Return where a system's file is looked for first."""
    return models_folder() / system.name / system.weights.file


def present(system: SystemConfig) -> Path | None:
    """Return a system's file if it is on this machine, in the models' folder or in the hub's cache."""
    if expected(system).is_file():
        return expected(system)
    if system.weights.hub is None:
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(system.weights.hub, system.weights.file)
    return Path(cached) if isinstance(cached, str) else None


def locate(system: SystemConfig, place: str | os.PathLike[str] | None = None) -> Path:
    """Find the file of a system; one that only the hub has is downloaded.

    Args:
        system: a row of :data:`~semanticodec.systems.SYSTEMS`.
        place: the file, or a folder that holds it under its published name; None looks where :func:`present` does.

    Raises:
        CheckpointError: there is no such file; the message says where to fetch it and where to put it.
    """
    weights = system.weights
    if place is not None:
        path = Path(place)
        path = path / weights.file if path.is_dir() else path
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; it is {weights.file} of {weights.source}")
        return path
    found = present(system)
    if found is not None:
        return found
    advice = f"fetch {weights.file} from {weights.source} and put it at {expected(system)}, or give its path"
    if weights.hub is None:
        raise CheckpointError(f"the weights of {system.name} are not on this machine: {advice}")
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(weights.hub, weights.file))
    except Exception as error:  # the client raises errors of several unrelated libraries
        raise CheckpointError(
            f"cannot fetch the weights of {system.name} ({type(error).__name__}: {error}).  Without a network, {advice}"
        ) from error


def average(system: SystemConfig, which: Which) -> bool:
    """Tell whether ``which`` means the moving average."""
    return system.weights.average if which == "reference" else which == "average"


def system_rules(system: SystemConfig, which: Which = "reference", *, prompts: bool = True) -> tuple[Rule, ...]:
    """Return what becomes of every tensor of a system's file: the names of :class:`SystemModel`.

    Args:
        system: a row of :data:`~semanticodec.systems.SYSTEMS`.
        which: of the U-Net's weights.
        prompts: whether the conditioners are wanted.
    """
    networks = latent_rules(average=average(system, which), lowpass=system.prompts is None)
    if system.prompts is None:
        return (*networks, Rule(r"clap\..+", DROP, "CLAP: super-resolution reads no text and ranks nothing"))
    if not prompts:
        return (*networks, *_PROMPTS)
    return (*networks, *(inside("prompts", rule) for rule in prompt_rules(system.prompts)))


class SystemModel(nn.Module):
    """The modules of one published system; ``prompts`` is None where there are no conditioners, or none were wanted."""

    def __init__(self, system: SystemConfig, *, prompts: bool = True) -> None:
        super().__init__()
        self.config = system
        self.latent = LatentDiffusion(system.latent, vae_encoder=True)
        wanted = prompts and system.prompts is not None
        self.prompts = PromptConditioner(PROMPTS[system.prompts]) if wanted and system.prompts else None


def read(system: SystemConfig, path: Path, latent: LatentDiffusion) -> dict[str, Tensor]:
    """Open a system's file, check its schedule, and name the averaged weights after those they average.

    Raises:
        CheckpointError: the file is damaged, no checkpoint of this family, or of another schedule.
    """
    tensors = read_checkpoint(path, "state_dict")
    check_schedule(system.latent.schedule, tensors.get("alphas_cumprod"), f"{system.name} in {path}")
    return dotted_averages(tensors, latent.unet.state_dict())


def load_system(
    system: SystemConfig,
    place: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    which: Which = "reference",
    prompts: bool = True,
) -> SystemModel:
    """Load a published system.

    Args:
        system: a row of :data:`~semanticodec.systems.SYSTEMS`.
        place: see :func:`locate`.
        device: where the modules go.
        dtype: of every floating-point tensor.
        which: of the U-Net's weights.
        prompts: whether to load the conditioners as well (needs the extra ``generation``).

    Returns:
        The modules, ready for inference.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit in every name and shape.
        ConfigError: the conditioners need a library that is not installed.
    """
    remind(system)
    path = locate(system, place)
    with torch.device("meta"):
        model = SystemModel(system, prompts=prompts)
    rules = system_rules(system, which, prompts=prompts)
    tensors = read(system, path, model.latent)
    if prompts and (differing := differing_copies(tensors)):
        warnings.warn(
            f"{path} holds an encoder twice with different weights ({len(differing)} tensors, such as {differing[0]}); "
            "the copy for conditioning serves both",
            stacklevel=2,
        )
    found, unmapped = apply_rules(rules, tensors, {"latent", "prompts"})
    found = matched(found, unmapped, model.state_dict(), f"{system.name} in {path}")
    fill(model, found, device=device, dtype=dtype)
    return model.eval().requires_grad_(False)


def load_latent(
    system: SystemConfig,
    place: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    which: Which = "reference",
) -> LatentDiffusion:
    """Load the U-Net, the autoencoder and the vocoder of a system; see :func:`load_system`."""
    return load_system(system, place, device=device, dtype=dtype, which=which, prompts=False).latent


@functools.cache
def remind(system: SystemConfig) -> None:
    """Say once per process and system that its weights may not be used commercially."""
    if not system.weights.commercial:
        told = f"the weights of {system.name} are licensed {system.weights.licence}: not for commercial use"
        warnings.warn(told, LicenceWarning, stacklevel=3)
