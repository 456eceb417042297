"""The codecs that a server serves: one family, one codec for each token rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from semanticodec import SemantiCodec
from semanticodec.errors import ConfigError
from semanticodec.wire.blocks import Geometry


@dataclass(frozen=True)
class Models:
    """The codecs of one family, and what their codes look like.

    Args:
        codecs: by token rate.
        weights: first 8 hexadecimal digits of the hash of each one's weights, by token rate.

    Raises:
        ConfigError: they cannot serve one session together.
    """

    codecs: Mapping[int, SemantiCodec]
    weights: Mapping[int, str]

    def __post_init__(self) -> None:
        configs = [codec.config for codec in self.codecs.values()]
        if len({(config.block, config.codebook_sizes) for config in configs}) != 1:
            raise ConfigError(
                f"{', '.join(config.name for config in configs)} differ in their blocks; serve them apart"
            )

    @property
    def presets(self) -> tuple[str, ...]:
        """Names, in the order of the codecs."""
        return tuple(codec.config.name for codec in self.codecs.values())

    @property
    def geometry(self) -> Geometry:
        """What blocks of codes look like."""
        config = next(iter(self.codecs.values())).config
        return Geometry(config.block, config.code_bits, tuple(self.codecs))

    @property
    def offered(self) -> tuple[str, ...]:
        """The weights' hashes, in the order of the codecs."""
        return tuple(self.weights[rate] for rate in self.codecs)

    @property
    def sizes(self) -> tuple[int, int]:
        """Entries of the (semantic, acoustic) codebook."""
        return next(iter(self.codecs.values())).config.codebook_sizes

    @property
    def carries(self) -> bool:
        """Whether a decoder's state may pass from one rate to another."""
        return all(codec.config.decoder.join == "prefix" for codec in self.codecs.values())


def load_models(names: Sequence[str], device: str) -> Models:
    """Load presets; on a GPU their networks run as CUDA graphs, since blocks come in few shapes and are small.

    Args:
        names: presets or folders, the default one first.
        device: to compute on.

    Raises:
        CheckpointError: weights are missing or damaged.
        ConfigError: unknown presets, or such as cannot be served together.
        RuntimeError: there is no such device.
    """
    codecs = [SemantiCodec.from_pretrained(name, device=device) for name in names]
    for codec in codecs:
        if codec.device.type == "cuda":
            codec.record()
    by_rate = {int(codec.config.token_rate): codec for codec in codecs}
    if not codecs or len(by_rate) < len(codecs):
        raise ConfigError(f"presets {', '.join(names) or 'none'} were named; serve one for each token rate")
    return Models(by_rate, {rate: codec.weights_hash[:8] for rate, codec in by_rate.items()})
