"""Models larger than a device: only the part that is running is on it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Offload:
    """Brings parts of a model to a device when one of their methods is called, and sends the part before it back.

    Args:
        device: where to compute.
        home: where parts wait.
    """

    def __init__(self, device: torch.device, home: torch.device | str = "cpu") -> None:
        self.device, self._home = device, torch.device(home)
        self._here: nn.Module | None = None

    def watch(self, part: nn.Module, *methods: str) -> None:
        """Take care of a part whose weights are needed by ``methods`` alone."""
        for name in methods:
            vars(part)[name] = self._wrapped(part, getattr(part, name))

    def _wrapped(self, part: nn.Module, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            if self._here is not part:
                if self._here is not None:
                    self._here.to(self._home)
                part.to(self.device)
                self._here = part
            return method(*arguments, **options)

        return call
