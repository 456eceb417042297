"""Generation: sound from texts, labels or other sound, of any length.

A system is asked once per prompt what its conditioners make of it; then the core of :mod:`.editing` generates window by
window, each after the first as a continuation of the one before.  B prompts, n results of each, S samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoints, controls, diffusers_layout
from .audio import recording, resample
from .conditioners.folders import load_prompts
from .conditioners.labels import LabelConditioner
from .conditioners.prompts import Policy, PromptConditioner, Prompts
from .config import LatentConfig, UNetConfig, VAEConfig, VocosConfig
from .devices import usable_device, usable_dtype
from .diffusion import SamplerOptions, is_whole
from .editing import LONGEST, OVERLAP, WINDOW, Editor, always
from .errors import CheckpointError, ConfigError
from .family import load_system
from .latent import Conditioning, LatentDiffusion
from .loading import fill, matched
from .nn.controlnet import ControlNet
from .offload import Offload
from .systems import SYSTEMS
from .values import from_json

ROWS_AT_ONCE = 8
"""Results that a GPU generates at once; a CPU takes one after the other, so that none depends on its company."""


class Conditioner(Protocol):
    """What turns prompts into conditioning."""

    def __call__(self, prompts: Prompts) -> Conditioning:
        """Return what the U-Net is told about prompts."""

    def unconditional(self, batch: int, policy: Policy, negatives: Sequence[str] | None) -> Conditioning:
        """Return what guidance steers away from."""


@dataclass(frozen=True)
class GeneratorConfig:
    """One model of our own that generates from labels.

    Windows of ``window`` latent steps share ``overlap`` of them with the one before.
    """

    name: str
    latent: LatentConfig
    labels: tuple[str, ...]
    window: int
    overlap: int


MINI_GEN = GeneratorConfig(
    "mini-gen",
    LatentConfig(
        unet=UNetConfig(
            base=32,
            mults=(1, 2, 4),
            res_blocks=1,
            attention_levels=(1, 2),
            groups=16,
            film_dim=64,
            film_mode="add",
        ),
        vae=VAEConfig(base=16, mults=(1, 2, 4), res_blocks=1, groups=8),
        vocoder=VocosConfig(),
        steps=25,
        guidance=2.5,
    ),
    labels=(),
    window=64,
    overlap=16,
)
"""The mini generator; its labels are those of the recordings it has learnt from."""


class GeneratorModel(nn.Module):
    """The modules of one of our own generators."""

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        assert config.latent.unet.film_dim is not None
        self.latent = LatentDiffusion(config.latent, vae_encoder=True)
        self.prompts = LabelConditioner(config.labels, config.latent.unet.film_dim)


class Generator:
    """Generate sound from prompts.

    Source: AudioLDM, AudioLDM 2 and MusicLDM (spec sections 2 to 4 and 8).  Deliberate differences: any duration, cut
    to the sample; what is longer than a window goes on from what came before; every result has noise of its own, which
    follows from its seed alone; speech is conditioned text by text.
    """

    def __init__(
        self,
        name: str,
        latent: LatentDiffusion,
        prompts: Conditioner,
        *,
        window: int,
        overlap: int,
        control: ControlNet | None = None,
    ) -> None:
        """Put together what :meth:`from_pretrained` loads.

        Args:
            name: of the model.
            latent: its networks.
            prompts: its conditioners.
            window: latent steps generated at once.
            overlap: of them, how many the next window is given.
            control: ControlNet that follows loudness, if it has one.
        """
        self.name, self.latent, self.prompts = name, latent, prompts
        self.window, self.overlap, self.control = window, overlap, control

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str] = MINI_GEN.name,
        *,
        weights: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        offload: bool = False,
    ) -> Generator:
        """Load a model that generates.

        Args:
            name_or_folder: "mini-gen", a system that reads prompts ("audioldm2-full"), or a folder: one that our
                training has written, or AudioLDM, AudioLDM 2 or MusicLDM as diffusers keeps them.
            weights: a system's file, or the folder that holds it; None looks where ``semanticodec models`` says.
            device: where to compute.
            dtype: of the weights, floating point; half precision is for GPUs.
            offload: keep everything in main memory but the part that is running (conditioners, U-Net, autoencoder,
                vocoder), so that a GPU needs room for the largest of them only.

        Raises:
            CheckpointError: weights are missing, damaged or of another architecture.
            ConfigError: no such model generates, ``weights`` are given to another than a published system, there is no
                such device here, or nothing computes in the dtype.
        """
        device, dtype = usable_device(device), usable_dtype(dtype)
        home = torch.device("cpu") if offload else device
        name = str(name_or_folder)
        prompts: Conditioner
        control: ControlNet | None = None
        if weights is not None and name not in SYSTEMS:
            raise ConfigError(
                f"weights {weights} are for a published system, {name} is none: give its folder as the name"
            )
        if diffusers_layout.is_folder(name):
            latent = diffusers_layout.load_latent(name, device=home, dtype=dtype)
            prompts, window, overlap = load_prompts(Path(name), device=home, dtype=dtype), WINDOW, OVERLAP
        elif name in SYSTEMS:
            row = SYSTEMS[name]
            if weights is not None and diffusers_layout.is_folder(weights):
                raise ConfigError(f"{weights} is a folder of diffusers, which says what it is; name it as the model")
            if row.prompts is None:
                raise ConfigError(f"{name} reads no prompts, it is for {row.task}; see `semanticodec models`")
            model = load_system(row, weights, device=home, dtype=dtype)
            assert model.prompts is not None
            latent, prompts = model.latent, model.prompts
            window = row.samples // row.latent.step_samples
            overlap = window // 4
        else:
            folder = checkpoints.WEIGHTS / name if name == MINI_GEN.name else Path(name)
            own, config = _own(folder, home, dtype)
            latent, prompts, window, overlap = own.latent, own.prompts, config.window, config.overlap
            if (folder / controls.LOUDNESS).is_file():
                control = controls.read(folder, device=device, dtype=dtype)
        if offload:
            _offloaded(latent, prompts, device)
        return cls(name, latent, prompts, window=window, overlap=overlap, control=control)

    @property
    def sample_rate(self) -> int:
        """Of what comes out, in Hz."""
        return self.latent.config.mel.sample_rate

    @property
    def ranks(self) -> bool:
        """Whether the model can tell which of its results fit a text best."""
        return isinstance(self.prompts, PromptConditioner) and self.prompts.clap.hears

    def generate(
        self,
        texts: str | Sequence[str],
        *,
        duration: float = 10.0,
        n: int = 1,
        candidates: int | None = None,
        seed: int = 0,
        negatives: str | Sequence[str] | None = None,
        transcriptions: str | Sequence[str] = (),
        policy: Policy = "zeros",
        loudness: Tensor | np.ndarray | None = None,
        loudness_scale: float = 1.0,
        options: SamplerOptions | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Generate sound from descriptions or labels.

        Args:
            texts: B prompts; one string is a list of one.
            duration: seconds of each result, from one sample to an hour; models that speak fill one window at most.
            n: results per prompt.
            candidates: how many to generate for the n that CLAP finds nearest to the prompt, best first; None generates
                n, in the order of their seeds.
            seed: candidate j has the seed ``seed + j``: its sound depends neither on n nor on other prompts.
            negatives: what guidance steers away from, one for all prompts or one each.
            transcriptions: what is said, for speech models; one per prompt.
            policy: what stands for no condition where the published codes differ, see
                :data:`~semanticodec.conditioners.prompts.Policy`; negative prompts take "negative_prompt" there.
            loudness: how loud to be from moment to moment, nats ``[M]``, a value per mel row (10 ms); the last
                holds on.  :func:`semanticodec.controls.loudness_of` gives that of a recording.  For mini-gen.
            loudness_scale: how strongly the curve is followed; 0 is not at all.
            options: solver, steps, guidance; None takes the preset's.
            progress: called with the share done, 0 to 1.

        Returns:
            float32 ``[B, n, round(duration * sample_rate)]`` on the CPU.

        Raises:
            CheckpointError: a tokenizer's files cannot be found.
            ConfigError: an argument is out of range, or is for other models.
        """
        prompts = Prompts(_several(texts), _several(transcriptions))
        count = len(prompts.texts)
        against = None if negatives is None else _several(negatives)
        if against is not None and len(against) == 1:
            against = against * count
        if against is not None and len(against) != count:
            raise ConfigError(f"seen {len(against)} negative prompts for {count} texts; give one for all or one each")
        kept = self._kept(n, candidates)
        if isinstance(self.prompts, PromptConditioner):
            self.prompts.check_duration(duration, self.window * self.latent.config.step_samples / self.sample_rate)
        curve = None if loudness is None else torch.as_tensor(loudness, dtype=torch.float32)
        if curve is not None and (
            self.control is None or curve.ndim != 1 or not len(curve) or not curve.isfinite().all()
        ):
            seen = f"a curve of shape {tuple(curve.shape)} is given to {self.name}, which has " + (
                "no ControlNet for loudness" if self.control is None else "one for finite curves of one dimension"
            )
            raise ConfigError(f"{seen}; leave it out, or take {MINI_GEN.name} and loudness_of(wave, rate, config)")

        def told(rows: slice) -> tuple[Conditioning, Conditioning]:
            some = Prompts(prompts.texts[rows], prompts.transcriptions[rows])
            own = None if against is None else against[rows]
            return self.prompts(some), self._absent(len(some.texts), policy, own)

        follow = None if curve is None else (curve, loudness_scale)
        waves = self._generate(told, count, duration, n, kept, seed, options, progress, follow)
        return waves if candidates is None else self._best(waves, n, prompts.texts)

    def similar(
        self,
        wave: Tensor | np.ndarray,
        sample_rate: int,
        *,
        duration: float | None = None,
        n: int = 1,
        candidates: int | None = None,
        seed: int = 0,
        negative: str | None = None,
        options: SamplerOptions | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Generate sounds like a given one.

        Args:
            wave: samples in [-1, 1], ``[S]`` or the channels of one recording ``[C, S]``, which are averaged.
            sample_rate: of ``wave`` in Hz.
            duration: as in :meth:`generate`; None takes the recording's.
            n: results.
            candidates: how many to generate for the n that CLAP finds nearest to the recording, best first.
            seed: as in :meth:`generate`.
            negative: what guidance steers away from.
            options: as in :meth:`generate`.
            progress: as in :meth:`generate`.

        Returns:
            float32 ``[n, round(duration * self.sample_rate)]`` on the CPU.

        Raises:
            AudioError: ``wave`` is no recording.
            ConfigError: an argument is out of range, or this model takes no sounds.
        """
        prompts = self.prompts
        if not isinstance(prompts, PromptConditioner):
            raise ConfigError(f"{self.name} reads labels only; AudioLDM and MusicLDM generate from sounds")
        heard = recording(wave)
        heard = heard.mean(0, keepdim=True) if heard.ndim > 1 else heard[None]
        seconds = heard.shape[1] / sample_rate if duration is None else duration
        kept = self._kept(n, candidates)

        def told(rows: slice) -> tuple[Conditioning, Conditioning]:  # noqa: ARG001 - there is one row
            return prompts.sound(heard, sample_rate), self._absent(1, "zeros", None if negative is None else [negative])

        waves = self._generate(told, 1, seconds, n, kept, seed, options, progress)
        if candidates is not None:
            waves = self._best(waves, n, resample(heard, sample_rate, self.sample_rate))
        return waves[0]

    def editor(
        self, text: str, *, transcription: str = "", negative: str | None = None, policy: Policy = "zeros"
    ) -> Editor:
        """Return the editor that generates what a prompt says where a recording is not kept.

        Args:
            text: a description, or a label.
            transcription: what is said, for speech models.
            negative: what guidance steers away from.
            policy: as in :meth:`generate`.

        Raises:
            CheckpointError: a tokenizer's files cannot be found.
            ConfigError: the text is no label, the policy is unknown, or a transcription was given to a model that
                reads none.
        """
        prompts = Prompts([text], [transcription] if transcription else ())
        negatives = None if negative is None else [negative]
        with torch.inference_mode():
            condition = always(self.prompts(prompts), self._absent(1, policy, negatives))
        return Editor(self.latent, condition, self.window, self.overlap, longest=self.window if self._speaks else None)

    @property
    def _speaks(self) -> bool:
        return isinstance(self.prompts, PromptConditioner) and self.prompts.phonemes is not None

    def _kept(self, n: int, candidates: int | None) -> int:
        """Return how many results of each to generate."""
        if candidates is not None and not self.ranks:
            raise ConfigError(f"{self.name} has no CLAP that hears, to choose {n} of {candidates}; ask for n alone")
        return n if candidates is None else candidates

    def _best(self, waves: Tensor, n: int, wanted: Sequence[str] | Tensor) -> Tensor:
        """Return the n of ``[B, candidates, S]`` that are nearest to texts, or to sounds ``[B, S']``, best first."""
        assert isinstance(self.prompts, PromptConditioner)
        with torch.inference_mode():
            scores = self.prompts.rank(waves.transpose(0, 1).flatten(0, 1), self.sample_rate, wanted)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :n].cpu()
        return torch.stack([row[order] for row, order in zip(waves, best, strict=True)])

    def _absent(self, count: int, policy: Policy, negatives: Sequence[str] | None) -> Conditioning:
        if policy not in get_args(Policy):
            raise ConfigError(f"the policy {policy!r} is unknown; choose one of {', '.join(get_args(Policy))}")
        if negatives is not None and getattr(self.prompts, "sequence", None) is not None:
            policy = "negative_prompt"  # the other one would ignore them
        return self.prompts.unconditional(count, policy, negatives)

    def _generate(
        self,
        told: Callable[[slice], tuple[Conditioning, Conditioning]],
        count: int,
        duration: float,
        n: int,
        kept: int,
        seed: int,
        options: SamplerOptions | None,
        progress: Callable[[float], None] | None,
        follow: tuple[Tensor, float] | None = None,
    ) -> Tensor:
        """Return ``[count, kept, S]``; ``follow`` is a loudness curve and the scale of its control."""
        samples = made = self._samples(duration)
        if self._speaks:  # the text fills a window, however much of it is wanted
            made = max(samples, self.window * self.latent.config.step_samples)
        if not (is_whole(n) and is_whole(kept) and 1 <= n <= kept):
            raise ConfigError(f"n = {n!r} of {kept!r} candidates were asked for; whole numbers from 1 up are needed")
        at_once = rows_at_once(self.latent.scale.device)
        # All prompts are read before anything is generated: one that is refused costs no time, and offloaded
        # conditioners move once.
        with torch.inference_mode():
            conditions = [told(slice(first, min(first + at_once, count))) for first in range(0, count, at_once)]
        pieces = []
        total, done = count * kept, 0
        for first, (asked, absent) in zip(range(0, count, at_once), conditions, strict=True):
            every = [(row, seed + j) for row in range(min(at_once, count - first)) for j in range(kept)]
            for some in _chunks(every, at_once):
                index = [row for row, _ in some]
                condition = always(asked.rows(index), absent.rows(index))
                if follow is not None:
                    assert self.control is not None
                    condition = controls.following(self.control, *follow, self.latent.config, condition)
                editor = Editor(self.latent, condition, self.window, self.overlap)

                def report(share: float, done: int = done, size: int = len(some)) -> None:
                    if progress:
                        progress((done + share * size) / total)

                waves = editor.generate(made, [own for _, own in some], options=options, progress=report)
                pieces.append(waves[:, :samples])
                done += len(some)
        return torch.cat(pieces).reshape(count, kept, samples)

    def _samples(self, duration: float) -> int:
        if not 0 < duration <= LONGEST or round(duration * self.sample_rate) < 1:
            raise ConfigError(f"{duration!r} s were asked for; from one sample to {LONGEST:.0f} s can be generated")
        return round(duration * self.sample_rate)


def rows_at_once(device: torch.device) -> int:
    """Return how many results are generated together."""
    return 1 if device.type == "cpu" else ROWS_AT_ONCE


def _several(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _chunks(items: Sequence[tuple[int, int]], size: int) -> Iterator[Sequence[tuple[int, int]]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]


def _own(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[GeneratorModel, GeneratorConfig]:
    """Load a generator of our own."""
    known = [MINI_GEN.name, *(name for name, row in SYSTEMS.items() if row.prompts is not None)]
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is neither a folder nor a model that generates: {', '.join(known)}")
    if not (folder / checkpoints.MODEL).is_file():
        raise CheckpointError(
            f"{folder / checkpoints.MODEL} is missing; make it with `python -m semanticodec.training all --model "
            f"{MINI_GEN.name}`, or name another model: {', '.join(known)}"
        )
    text, found = checkpoints.read_model(folder)
    config = from_json(GeneratorConfig, text)
    with torch.device("meta"):
        model = GeneratorModel(config)
    found = matched(found, [], model.state_dict(), str(folder))
    fill(model, found, device=device, dtype=dtype)
    return model.eval().requires_grad_(False), config


def _offloaded(latent: LatentDiffusion, prompts: Conditioner, device: torch.device) -> None:
    """Let the parts of a model take turns on a device."""
    turns = Offload(device)
    if isinstance(prompts, nn.Module):
        turns.watch(
            prompts, *(name for name in ("forward", "unconditional", "sound", "rank") if hasattr(prompts, name))
        )
    latent.offload(turns)
