"""Devices and dtypes that nobody can compute with are refused by name."""

from typing import Any

import numpy as np
import pytest
import torch

from semanticodec.devices import COLUMN_BYTES, DTYPES, columns_at_once, usable_device, usable_dtype
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


@pytest.mark.parametrize(
    ("columns", "dtype", "expected"),
    [(0, torch.float32, 64), (100, torch.float32, 64), (1000, torch.float32, 512), (1000, torch.bfloat16, 1024),
     (10**6, torch.float32, 4096)],
)  # fmt: skip
def test_a_gpu_takes_what_half_of_its_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, columns: int, dtype: torch.dtype, expected: int
) -> None:
    """A stand-in for the driver: no GPU is asked."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * columns * COLUMN_BYTES, 0))
    assert columns_at_once(torch.device("cuda", 0), dtype) == expected
    assert columns_at_once(torch.device("cpu"), dtype) == 256
