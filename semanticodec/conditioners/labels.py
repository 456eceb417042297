"""Labels as prompts: one vector per name.  B batch, D channels."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..latent import Conditioning

if TYPE_CHECKING:
    from .prompts import Policy, Prompts


class LabelConditioner(nn.Module):
    """Turns names of labels into FiLM's vector; the last row of the table stands for no label.

    Args:
        labels: the names, different.
        dim: channels of the vectors.
    """

    def __init__(self, labels: Sequence[str], dim: int) -> None:
        super().__init__()
        self.labels = tuple(labels)
        self._rows = {name: row for row, name in enumerate(self.labels)}
        self.table = nn.Embedding(len(self.labels) + 1, dim)

    def forward(self, prompts: Prompts) -> Conditioning:
        """Return what the U-Net is told about labels.

        Raises:
            ConfigError: a text is no label, or transcriptions were given.
        """
        if prompts.transcriptions:
            raise ConfigError("this model reads no transcriptions; its prompts are labels")
        return self.told(self.rows(prompts.texts))

    def unconditional(
        self,
        batch: int,
        policy: Policy = "zeros",  # noqa: ARG002 - there is one policy here
        negatives: Sequence[str] | None = None,
    ) -> Conditioning:
        """Return what guidance steers away from: no label, or the given ones.

        Raises:
            ConfigError: a text is no label.
        """
        absent = torch.full((batch,), len(self.labels))
        rows = absent if negatives is None else self.rows(negatives)
        return self.told(rows)

    def rows(self, names: Sequence[str]) -> Tensor:
        """Return where labels stand in the table, int64 ``[B]``; the empty text is no label."""
        return torch.tensor([len(self.labels) if not name else self._row(name) for name in names])

    def told(self, rows: Tensor) -> Conditioning:
        """Return the conditioning of rows of the table, int64 ``[B]``."""
        vectors: Tensor = self.table(rows.to(self.table.weight.device))
        return Conditioning(film=vectors)

    def _row(self, name: str) -> int:
        found = self._rows.get(name.strip().lower())
        if found is None:
            near = difflib.get_close_matches(name.strip().lower(), self.labels, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(self.labels)}"
            raise ConfigError(f"{name!r} is no label of this model, which reads labels only; {hint}")
        return found
