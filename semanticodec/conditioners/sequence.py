"""GPT-2 that writes vectors: AudioLDM 2's guess at AudioMAE features.  B batch, L positions, D channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .config import SequenceConfig
from .hub import transformers

Context = tuple[Tensor, Tensor]
"""A sequence ``[B, L, D]`` and its mask ``[B, L]``: 1 where there is something."""


class SequenceGenerator(nn.Module):
    """Continues [start, condition, end] of every condition by vectors that are fed back as they come out.

    Built by the caller under ``torch.device("meta")``, then filled (:func:`semanticodec.conditioners.keys.fill`).

    Source: behaves as AudioLDM 2's sequence model (spec 4.3).
    """

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.config = config
        library = transformers()
        self.model = library.GPT2Model(
            library.GPT2Config(
                vocab_size=1,
                bos_token_id=None,
                eos_token_id=None,
                n_positions=config.positions,
                n_embd=config.dim,
                n_layer=config.depth,
                n_head=config.heads,
            )
        )
        self.model.set_input_embeddings(nn.Identity())  # there are no words
        self.start, self.end = (nn.Parameter(torch.randn(config.rows, config.dim) * 0.02) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(width, config.dim) for width in config.inputs)

    def embed(self, conditions: Sequence[Context], count: int) -> Context:
        """Join the conditions to what GPT-2 reads first.

        Args:
            conditions: one sequence and mask per entry of ``config.inputs``.
            count: how many vectors will follow; what leaves them no room is cut from the end.

        Returns:
            ``[B, L, D]`` and its mask, at most ``config.positions - count`` positions.

        Raises:
            ConfigError: there are more or fewer conditions than projections, or no room for ``count`` vectors.
        """
        if len(conditions) != len(self.project) or not 0 < count < self.config.positions:
            raise ConfigError(
                f"seen {len(conditions)} conditions and {count} vectors to generate; wanted are {len(self.project)} "
                f"conditions and 1 to {self.config.positions - 1} vectors"
            )
        vectors, masks = [], []
        for index, ((sequence, mask), project) in enumerate(zip(conditions, self.project, strict=True)):
            batch = len(sequence)
            ends = [edge[index].expand(batch, 1, -1) for edge in (self.start, self.end)]
            one = mask.new_ones(batch, 1)
            vectors += [ends[0], project(sequence.to(self.start.dtype)), ends[1]]
            masks += [one, mask, one]
        room = self.config.positions - count
        return torch.cat(vectors, 1)[:, :room], torch.cat([m.to(self.start.device) for m in masks], 1)[:, :room]

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        """Run GPT-2 once over ``[B, L, D]``: after each position, the guess at the next one."""
        result: Tensor = self._run(vectors, mask, None)
        return result

    def generate(self, conditions: Sequence[Context], count: int | None = None, *, cached: bool = True) -> Tensor:
        """Write the sequence.

        Args:
            conditions: as for :meth:`embed`.
            count: vectors to generate; the configuration's if None.
            cached: keep the keys and values of what was read; otherwise everything is read again for each vector, as
                published, with the same result.

        Returns:
            ``[B, count, D]`` in the dtype of the weights.

        Raises:
            ConfigError: as for :meth:`embed`.
        """
        count = self.config.count if count is None else count
        vectors, mask = self.embed(conditions, count)
        cache = transformers().DynamicCache(config=self.model.config) if cached else None
        length, fed = vectors.shape[1], vectors
        for _ in range(count):
            new = self._run(fed, mask, cache)[:, -1:]
            vectors = torch.cat([vectors, new], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            fed = new if cached else vectors
        return vectors[:, length:]

    def _run(self, vectors: Tensor, mask: Tensor, cache: Any) -> Tensor:
        # The cache has no keyword that all versions of the library know.
        out: Tensor = self.model(
            None, cache, mask, inputs_embeds=vectors, use_cache=cache is not None
        ).last_hidden_state
        return out
