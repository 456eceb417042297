"""Where to compute and in what: the caller's choice, checked."""

from __future__ import annotations

import torch

from .errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COLUMN_BYTES = 9 << 20
"""What a patch column takes above the weights in float32: an official window, 64 of them, measured 558 MiB (CPU, both
branches of guidance)."""


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device that can be computed on.

    Raises:
        ConfigError: there is none of that name here.
    """
    try:
        chosen = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(f"there is no device {device!r} here; cpu always is ({error})") from error
    if chosen.type == "meta":
        raise ConfigError("the device 'meta' computes nothing; choose cpu or a GPU")
    return chosen


def usable_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return a floating-point type that can be computed in.

    Raises:
        ConfigError: nothing computes in it.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"the dtype {dtype!r} cannot be computed in; choose one of {', '.join(map(str, DTYPES))}")
    return dtype


def columns_at_once(device: torch.device, dtype: torch.dtype) -> int:
    """Return up to how many patch columns windows are pooled for one call of the networks.

    On a CPU 256, which are 4 official windows or 42 of mini's to encode: more is no faster there.  On a GPU a power of
    two that half of the free memory holds, from 64, one official window, to 4096.
    """
    if device.type != "cuda":
        return 256
    free, _ = torch.cuda.mem_get_info(device)
    fits = free // 2 // (COLUMN_BYTES * dtype.itemsize // torch.float32.itemsize)
    return 1 << min(max(fits, 64), 4096).bit_length() - 1
