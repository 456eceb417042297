"""Where to compute and in what: the caller's choice, checked."""

from __future__ import annotations

import torch

from .errors import ConfigError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
