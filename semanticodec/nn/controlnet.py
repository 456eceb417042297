"""ControlNets: what a U-Net is told about an image that its result must follow, such as a loudness curve.

Module names are those of published ControlNets, so that a key map is a table of prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from ..config import ControlNetConfig
from ..errors import ConfigError
from .unet import Builder, ContextCache, Contraction, Residuals, UNet, zeroed


class ControlNet(Contraction):
    """A trainable copy of a U-Net's way down, which tells the U-Net about an image that must be followed.

    Source: Zhang et al. 2023 (arXiv 2302.05543); the hint's convolutions as in diffusers' ControlNetModel, of which as
    many have stride 2 as lead from the mel to the latent.
    """

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__(config.unet, Builder(config.unet))
        self.control = config
        layers: list[nn.Module] = [nn.Conv2d(config.hint_channels, config.hint_widths[0], 3, padding=1), nn.SiLU()]
        factor = config.hint_factor
        for before, after in pairwise(config.hint_widths):
            stride = 2 if factor > 1 else 1
            factor //= stride
            layers += [nn.Conv2d(before, before, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(before, after, 3, padding=1, stride=stride), nn.SiLU()]
        if factor != 1:
            raise ConfigError(f"{len(config.hint_widths)} widths are too few to halve a hint {config.hint_factor} fold")
        layers.append(zeroed(nn.Conv2d(config.hint_widths[-1], config.unet.base, 3, padding=1)))
        self.input_hint_block = nn.Sequential(*layers)
        self.zero_convs = nn.ModuleList(nn.Sequential(zeroed(nn.Conv2d(c, c, 1))) for c in self.widths)
        self.middle_block_out = nn.Sequential(zeroed(nn.Conv2d(self.widths[-1], self.widths[-1], 1)))

    @property
    def outputs(self) -> int:
        """How many tensors it adds: one per skip, and one to the middle."""
        return len(self.zero_convs) + 1

    def copy_from(self, unet: UNet) -> None:
        """Start as the U-Net's own way down; what is added to it is nothing yet."""
        own = self.state_dict()
        own |= {name: tensor for name, tensor in unet.state_dict().items() if name in own}
        self.load_state_dict(own)

    def project_hint(self, hint: Tensor) -> Tensor:
        """Bring an image ``[B, hint_channels, rows, bins]`` of the mel's size to the latent's, once for all steps."""
        projected: Tensor = self.input_hint_block(hint)
        return projected

    def forward(
        self, x: Tensor, t: Tensor, hint: Tensor, contexts: Sequence[ContextCache] = (), film: Tensor | None = None
    ) -> Residuals:
        """Say what to add to the U-Net, which sees the same ``x`` and ``t``.

        Args:
            x: as for the U-Net.
            t: timesteps ``[B]``.
            hint: what :meth:`project_hint` made.
            contexts: what this network's own :meth:`project_contexts` made.
            film: what this network's own :meth:`project_film` made.
        """
        skips, x = self.contract(x, self.embed(t, film, x.dtype), contexts, hint)
        outputs = tuple(layer(skip) for layer, skip in zip(self.zero_convs, skips, strict=True))
        return Residuals(outputs, self.middle_block_out(x))
