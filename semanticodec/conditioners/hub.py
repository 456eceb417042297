"""The library transformers, imported when it is first needed, and its tokenizers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError


def transformers() -> ModuleType:
    """Import the library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers as library
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"text conditioning needs {error.name}; install the extra: pip install 'semanticodec[generation]'"
        ) from error
    return library


class Tokenizer:
    """Turns texts into ids; the files are looked for at the first text."""

    def __init__(self, place: str, max_tokens: int) -> None:
        """Begin.

        Args:
            place: a name on the hub, or a local folder.
            max_tokens: longer texts are cut.
        """
        self.place, self.max_tokens = place, max_tokens

    @functools.cached_property
    def _loaded(self) -> Any:
        try:
            return transformers().AutoTokenizer.from_pretrained(self.place)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"there is no tokenizer at {self.place} ({' '.join(str(error).split())[:200]}).  Without a network, "
                "put its files into a folder and give the folder instead"
            ) from error

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids int64 ``[B, L]``, padded to the longest text, and the mask ``[B, L]``: 1 where there is a token.

        Raises:
            CheckpointError: the files cannot be found.
        """
        out = self._loaded(list(texts), padding=True, truncation=True, max_length=self.max_tokens)
        return torch.tensor(out["input_ids"]), torch.tensor(out["attention_mask"])
