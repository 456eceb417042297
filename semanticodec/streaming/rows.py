"""One step for many sessions: those that are ready advance, the others stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..errors import StreamError
from ..windows import State

S = TypeVar("S", bound=State)


def masked(
    advance: Callable[[Tensor, S, Sequence[int]], tuple[Tensor, S]],
    given: Tensor,
    state: S,
    active: Tensor | None,
    blank: Tensor,
    call: Literal["each", "active", "all"],
) -> tuple[Tensor, S]:
    """Advance the active rows and leave the others as they are.

    Args:
        advance: (given ``[N, ...]``, state, the numbers of these rows) -> (result ``[N, ...]``, new state).
        given: ``[B, ...]``.
        state: of B rows.
        active: bool ``[B]``, or None for all rows.
        blank: result ``[1, ...]`` of a row that takes no part.
        call: advance once for "each" active row (for networks that round differently in a larger batch), once for the
            "active" rows together, or once for "all" rows, so that shapes are always the same and can be captured.

    Returns:
        Results ``[B, ...]`` and the new state.

    Raises:
        StreamError: ``active`` is no mask of the rows.
    """
    if active is None:
        active = torch.ones(len(state), dtype=torch.bool)
    if active.shape != (len(state),) or active.dtype != torch.bool:
        raise StreamError(f"active must be bool [{len(state)}], seen {active.dtype} {tuple(active.shape)}")
    if call == "all":
        results, new = advance(given, state, range(len(state)))
        mask = active.to(given.device).reshape(-1, *[1] * (results.ndim - 1))
        return torch.where(mask, results, blank), new.where(active, state)
    chosen: list[int] = active.nonzero()[:, 0].tolist()
    outputs, states = list(blank.expand(len(state), *blank.shape[1:]).split(1)), state.rows()
    for group in [[row] for row in chosen] if call == "each" else [chosen] if chosen else []:
        results, new = advance(given[group], type(state).joined([states[row] for row in group]), group)
        for row, result, own in zip(group, results.split(1), new.rows(), strict=True):
            outputs[row], states[row] = result, own
    return torch.cat(outputs), type(state).joined(states)
