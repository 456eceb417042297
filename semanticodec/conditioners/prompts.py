"""From what a person asks for to what a U-Net is told: all encoders of one system, each loaded once.  B batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..latent import Conditioning
from ..ranking import rank
from .clap import CLAP
from .config import PromptConfig
from .phonemes import Phonemes
from .sequence import Context, SequenceGenerator
from .text import T5

Policy = Literal["zeros", "negative_prompt"]
"""What stands for no condition (spec 4.4).  "zeros": as AudioLDM 2, zeros for the generated sequence and the encoding
of the empty text elsewhere.  "negative_prompt": as diffusers, what the whole chain makes of the negative prompts."""


@dataclass(frozen=True)
class Prompts:
    """What is asked for, one row per result.

    Args:
        texts: descriptions.
        transcriptions: what is said, for speech models; none means nothing in particular.
    """

    texts: Sequence[str]
    transcriptions: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.texts, str) or isinstance(self.transcriptions, str) or not len(self.texts):
            raise ConfigError("prompts are a list of at least one text, and one transcription for each or none")
        if self.transcriptions and len(self.transcriptions) != len(self.texts):
            raise ConfigError(
                f"seen {len(self.transcriptions)} transcriptions for {len(self.texts)} texts; give one for each or none"
            )


class PromptConditioner(nn.Module):
    """Turns prompts, or sounds, into conditioning.

    Built by the caller under ``torch.device("meta")``, then filled (:func:`semanticodec.conditioners.keys.fill`).
    A row's conditioning does not depend on its batch-mates: prompts of different lengths reach the sequence generator
    one length after the other, where the published code lets the padding of the longest move their ends.
    """

    def __init__(self, config: PromptConfig) -> None:
        super().__init__()
        self.config = config
        self.clap = CLAP(config.clap)
        self.t5 = None if config.t5 is None else T5(config.t5)
        self.phonemes = None if config.phonemes is None else Phonemes(config.phonemes)
        self.sequence = None if config.sequence is None else SequenceGenerator(config.sequence)

    def forward(self, prompts: Prompts) -> Conditioning:
        """Return what the U-Net is told about prompts.

        Raises:
            CheckpointError: a tokenizer's files cannot be found.
            ConfigError: a transcription was given to a model that does not read any, there is nothing in one that can
                be spoken, or a library is missing.
        """
        if prompts.transcriptions and self.phonemes is None:
            raise ConfigError("this model reads no transcriptions; describe the sound in the text instead")
        film = self.clap.text(prompts.texts) if self.config.film else None
        states = None if self.t5 is None else self.t5.text(prompts.texts)
        written: Context | None = None
        if self.sequence is not None:
            vector = self.clap.text(prompts.texts)
            if self.phonemes is not None:
                spoken = self.phonemes.text(prompts.transcriptions or [""] * len(prompts.texts))
                written = self._write(self.sequence, vector, spoken)
            else:
                assert states is not None
                written = self._write_by_length(self.sequence, vector, states)
        return self._conditioning(film, written, states)

    def sound(self, wave: Tensor, sample_rate: int) -> Conditioning:
        """Return what asks for a sound like the given ones: the embedding of a sound in the place of a text's.

        Args:
            wave: ``[B, S]`` in [-1, 1].
            sample_rate: in Hz.

        Raises:
            AudioError: the sounds cannot be used.
            ConfigError: this system reads more than CLAP's vector.
        """
        if not self.config.film or self.config.contexts:
            raise ConfigError("only systems whose one condition is CLAP's vector take a sound; give a text")
        return self._conditioning(self.clap.audio(wave, sample_rate), None, None)

    def unconditional(
        self, batch: int, policy: Policy = "zeros", negatives: Sequence[str] | None = None
    ) -> Conditioning:
        """Return what guidance steers away from.

        Args:
            batch: rows.
            policy: what stands for no condition.
            negatives: one negative prompt per row; the empty text if None.

        Raises:
            CheckpointError: a tokenizer's files cannot be found.
            ConfigError: there are more or fewer negative prompts than rows, or there are such with ``policy`` "zeros"
                and a generated sequence, which zeros would ignore.
        """
        texts = [""] * batch if negatives is None else list(negatives)
        if len(texts) != batch:
            raise ConfigError(f"seen {len(texts)} negative prompts for {batch} rows")
        if self.sequence is None or policy == "negative_prompt":
            return self.forward(Prompts(texts))
        if negatives is not None and any(negatives):
            raise ConfigError('a generated sequence follows negative prompts only with the policy "negative_prompt"')
        weight = self.sequence.start
        shape = (batch, self.sequence.config.count, self.sequence.config.dim)
        written = (torch.zeros(shape).to(weight), torch.ones(shape[:2]).to(weight))
        states = None if self.t5 is None else self.t5.unconditional(batch)
        film = self.clap.unconditional(batch) if self.config.film else None
        return self._conditioning(film, written, states)

    def check_duration(self, seconds: float, window: float) -> None:
        """Refuse speech that is longer than one window, whose sequence says in order what is heard when.

        Args:
            seconds: to be generated.
            window: seconds that the sequence stands for.

        Raises:
            ConfigError: every further window would say the same again.

        Source: spec 4.3: the 512 vectors of speech are 64 moments of 8 bands; published is 10.24 s alone.
        """
        if self.phonemes is not None and self.sequence is not None and seconds > window:
            raise ConfigError(
                f"{seconds:g} s of speech were asked for, and this model speaks for {window:g} s at a time; split the "
                "transcription into sentences and generate each"
            )

    def rank(self, waves: Tensor, sample_rate: int, wanted: Sequence[str] | Tensor) -> Tensor:
        """Tell how near candidates are to what was asked for.

        Args:
            waves: ``[n * B, S]``; candidate j of text i stands at ``i + j * B``.
            sample_rate: in Hz.
            wanted: the B descriptions, or B sounds ``[B, S']`` at the same rate.

        Returns:
            Cosines ``[B, n]`` of every candidate with its own description or sound.

        Raises:
            AudioError: the sounds cannot be used.
            ConfigError: their number is no multiple of the texts'.
        """
        asked = self.clap.audio(wanted, sample_rate) if isinstance(wanted, Tensor) else self.clap.text(wanted)
        return rank(self.clap.audio(waves, sample_rate), asked)

    def _write(self, sequence: SequenceGenerator, vector: Tensor, second: Context) -> Context:
        ones = torch.ones(len(vector), 1, dtype=sequence.start.dtype, device=sequence.start.device)
        written = sequence.generate([(vector[:, None].to(sequence.start), ones), second])
        return written, ones.expand(-1, written.shape[1])

    def _write_by_length(self, sequence: SequenceGenerator, vector: Tensor, states: Context) -> Context:
        lengths = states[1].sum(1).long()
        parts = {
            length: self._write(
                sequence,
                vector[lengths == length],
                (states[0][lengths == length, :length], states[1][lengths == length, :length]),
            )
            for length in lengths.unique().tolist()
        }
        order = torch.cat([(lengths == length).nonzero()[:, 0] for length in parts]).argsort()
        written, mask = (torch.cat(x)[order] for x in zip(*parts.values(), strict=True))
        return written, mask

    def _conditioning(self, film: Tensor | None, written: Context | None, states: Context | None) -> Conditioning:
        available = {"sequence": written, "t5": states}
        contexts = tuple(context for name in self.config.contexts if (context := available[name]) is not None)
        return Conditioning(contexts=contexts, film=film)
