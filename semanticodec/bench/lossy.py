"""Our own codecs on a link that loses blocks of codes, as adapters of the bench."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import SAMPLE_RATE
from ..model import MISSING
from ..streaming import Decoder
from .clips import Clip, Wave
from .codecs import About, Coded, Semanticodec, loaded, sources


def masked(codes: Tensor, lost: Sequence[bool], frames: int) -> Tensor:
    """Mark the codes ``[1, 2, F]`` of lost blocks as missing.

    Args:
        codes: of a clip.
        lost: per block.
        frames: of a block.
    """
    gone = torch.tensor(lost).repeat_interleave(frames)[: codes.shape[2]]
    return torch.where(gone, MISSING, codes)


def repeated(codes: Tensor, lost: Sequence[bool], frames: int) -> Tensor:
    """Put the last block that arrived in the place of lost ones; before the first there is nothing to repeat.

    Args:
        codes: ``[1, 2, F]`` of a clip.
        lost: per block.
        frames: of a block.
    """
    blocks = list(codes.split(frames, 2))
    last = torch.full_like(blocks[0], MISSING)
    for index, block in enumerate(blocks):
        if lost[index]:
            blocks[index] = last[:, :, : block.shape[2]]
        else:
            last = block
    return torch.cat(blocks, 2)


def muted(wave: Tensor, lost: Sequence[bool], block: int) -> Tensor:
    """Silence the samples ``[S]`` of lost blocks.

    Args:
        wave: of a clip.
        lost: per block.
        block: samples of one.
    """
    gone = torch.tensor(lost).repeat_interleave(block)[: len(wave)]
    return torch.where(gone, 0.0, wave)


@dataclass(frozen=True)
class Lossy:
    """A preset with some blocks of a clip lost on the way.

    Args:
        codec: the preset.
        method: what stands in for lost blocks: "model", "silence" or "repetition".
        lost: per block of the clip.
    """

    codec: Semanticodec
    method: str
    lost: tuple[bool, ...]

    @property
    def name(self) -> str:
        """Preset and method."""
        return f"{self.codec.name} {self.method}"

    def missing(self) -> str | None:
        """Say whether the weights are here."""
        return self.codec.missing()

    def about(self) -> About:
        """Say what the preset is."""
        return self.codec.about()

    def fingerprint(self) -> str:
        """Name the preset, the method and the lost blocks, and the code that fills them."""
        lost = "".join("-x"[gone] for gone in self.lost)
        return "/".join((self.codec.fingerprint(), sources("bench/lossy", "streaming"), self.method, lost))

    def encode(self, clip: Clip) -> Coded:
        """Code the clip, as if nothing was going to be lost."""
        codes = _coded(self.codec, clip)[0].cpu().numpy()
        config = loaded(self.codec)[0].config
        return Coded(b"", codes.shape[1] * sum(config.code_bits), codes)

    def decode(self, coded: Coded, clip: Clip) -> Wave:  # noqa: ARG002
        """Decode what arrived."""
        frames, block = geometry(self.codec)
        if self.method == "repetition":
            wave = _decoded(self.codec, clip, repeated(_coded(self.codec, clip), self.lost, frames))
        else:
            wave = _generated(self.codec, clip, self.lost)
        if self.method == "silence":
            wave = muted(wave, self.lost, block)
        result: Wave = wave.numpy()
        return result


def geometry(codec: Semanticodec) -> tuple[int, int]:
    """Return frames and samples of a block.

    Args:
        codec: a preset whose weights are here.
    """
    decoder = Decoder(*loaded(codec))
    return decoder.frames, decoder.block


@functools.lru_cache(1)
def _coded(codec: Semanticodec, clip: Clip) -> Tensor:
    return loaded(codec)[0].encode(torch.from_numpy(clip.wave), SAMPLE_RATE)


def _decoded(codec: Semanticodec, clip: Clip, codes: Tensor) -> Tensor:
    model, options = loaded(codec)
    return model.decode(codes, seed=codec.seed, length=len(clip.wave), options=options)[0].float().cpu()


@functools.lru_cache(1)
def _generated(codec: Semanticodec, clip: Clip, lost: tuple[bool, ...]) -> Tensor:
    """Decode with lost codes missing; silence is put into the same decode."""
    return _decoded(codec, clip, masked(_coded(codec, clip), lost, geometry(codec)[0]))
