"""Tensors of any file into a module, strictly: what every system's weights have in common.

A name without a place, a parameter without a tensor, another shape or another forward process is an error.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import ScheduleConfig
from .errors import CheckpointError
from .schedule import make_schedule


def read_checkpoint(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Open a pickled checkpoint; its tensors stay on disk until they are used (but for files of PyTorch before 1.6).

    Args:
        path: of the file.
        key: where in the file's dictionary the tensors are; None for the whole dictionary.

    Raises:
        CheckpointError: the file is missing, damaged, not safe to read, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own words advise to run whatever code is in the file.
        told = f"{path} is not a readable checkpoint: it is damaged, or holds more than tensors, which may be code"
        raise CheckpointError(told) from error
    except Exception as error:  # a foreign or damaged pickle can fail in any way, none of which is ours
        raise CheckpointError(f"{path} is not a readable checkpoint: {type(error).__name__}: {error}") from error
    if key is not None:
        if not isinstance(state, dict) or key not in state:
            raise CheckpointError(f"{path} has no entry {key!r}; it is no checkpoint of this family")
        state = state[key]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
        for name, tensor in state.items()
    ):
        raise CheckpointError(f"{path} is not a plain dictionary of tensors")
    return {name: tensor.detach() for name, tensor in state.items()}


def matched(
    found: dict[str, Tensor], unmapped: list[str], targets: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """Return ``found`` if it is exactly what is wanted.

    Args:
        found: tensors by our names, from :func:`~semanticodec.keymap.apply_rules`.
        unmapped: names of the file without a place.
        targets: what there must be, on any device.
        where: what messages call the weights.

    Raises:
        CheckpointError: a name has no place, a target no tensor, or a tensor another shape.
    """
    unmapped = [*unmapped, *(name for name in found if name not in targets)]
    unfilled = [name for name in targets if name not in found]
    unlike = [
        f"{name} (file {_kind(found[name])}, model {_kind(target)})"
        for name, target in targets.items()
        if name in found and _kind(found[name]) != _kind(target)
    ]
    if unmapped or unfilled or unlike:
        raise CheckpointError(
            f"the weights of {where} do not fit its configuration.  Tensors of the file without a place in the model: "
            f"{_some(unmapped)}.  Parameters that the file does not fill: {_some(unfilled)}.  Different shapes: "
            f"{_some(unlike)}.  Choose the preset they were made for"
        )
    return found


def fill(module: nn.Module, found: dict[str, Tensor], *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Fill a module that was built on the meta device with exactly its tensors, from :func:`matched`.

    Args:
        module: may have any children; tables that are not in ``state_dict()`` must have been computed on a real
            device.
        found: by the module's names; emptied on the way, so that no tensor is held twice.
        device: where the module goes.
        dtype: of every floating-point tensor.

    Raises:
        CheckpointError: a tensor of the module is not in its ``state_dict()`` and was not computed.
    """
    filled = {}
    for name in list(found):
        tensor = found.pop(name)
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        filled[name] = tensor.to(device, kind, copy=True)
    module.load_state_dict(filled, strict=True, assign=True)
    lost = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if lost:
        raise CheckpointError(f"{_some(lost)} of the module is neither in the checkpoint nor computed when it is built")
    module.to(device, dtype)


def check_schedule(schedule: ScheduleConfig, seen: Tensor | None, where: str) -> None:
    """Refuse weights that were trained for another forward process.

    Args:
        schedule: the configured one.
        seen: the file's ``alphas_cumprod``, None if it has none.
        where: what messages call the weights.

    Raises:
        CheckpointError: it is missing or another one.
    """
    wanted = torch.tensor(make_schedule(schedule).alpha_bar)
    if seen is None or seen.shape != wanted.shape or not torch.allclose(seen.float(), wanted, rtol=1e-4, atol=1e-9):
        raise CheckpointError(
            f"alphas_cumprod of {where} is {'missing' if seen is None else 'another one'}; the decoder is wanted for "
            f"{schedule}"
        )


def _kind(tensor: Tensor) -> str:
    return f"{'' if tensor.is_floating_point() else 'integer '}{tuple(tensor.shape)}"


def _some(names: list[str], limit: int = 12) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
