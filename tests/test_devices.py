"""Devices and dtypes that nobody can compute with are refused by name."""

from typing import Any

import numpy as np
import pytest
import torch

from semanticodec.devices import DTYPES, usable_device, usable_dtype
from semanticodec.errors import ConfigError


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta", 1.5])
def test_unusable_devices_are_refused(device: Any) -> None:
    with pytest.raises(ConfigError, match="device"):
        usable_device(device)


def test_the_cpu_is_always_there() -> None:
    assert usable_device("cpu") == usable_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, "float32", np.float64, None])
def test_unusable_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        usable_dtype(dtype)


def test_floating_point_is_usable() -> None:
    assert [usable_dtype(dtype) for dtype in DTYPES] == list(DTYPES)
