"""Group normalisation: torch's numbers in every memory format, and the format stays."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import noise
from torch import Tensor, nn

from semanticodec.nn.norm import GroupNorm


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 48, 24, 32), (1, 48, 32, 32), (2, 64, 12, 16), (3, 12, 1, 1), (2, 36, 5, 1)])
def test_it_is_torch_s(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Whole vectors of channels per group or not, on either side of the size from which it does not matter."""
    ours, theirs = GroupNorm(4, shape[1], eps=1e-6), nn.GroupNorm(4, shape[1], eps=1e-6)
    theirs.load_state_dict({"weight": noise(shape[1]), "bias": noise(shape[1], seed=1)})
    ours.load_state_dict(theirs.state_dict())
    x = noise(*shape, seed=2).contiguous(memory_format=memory_format).requires_grad_()
    y = x.detach().clone().requires_grad_()
    out, wanted = ours(x), theirs(y)
    assert out.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    (out * x.detach()).sum().backward()
    (wanted * y.detach()).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("shape", "plain"), [((1, 48, 24, 32), True), ((1, 48, 32, 32), False), ((1, 64, 12, 16), False)]
)
def test_only_small_images_with_ragged_groups_take_the_detour(
    shape: tuple[int, ...], plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    norm = F.group_norm

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.is_contiguous())
        return norm(x, *rest)

    monkeypatch.setattr(F, "group_norm", watched)
    GroupNorm(16 if shape[1] == 48 else 8, shape[1])(noise(*shape).contiguous(memory_format=torch.channels_last))
    assert seen == [plain]


def test_neither_format_is_left_as_it_is() -> None:
    x = noise(2, 12, 6, 5)[:, :, ::2]
    assert GroupNorm(4, 12)(x).stride() == nn.GroupNorm(4, 12)(x).stride()
