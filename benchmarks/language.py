"""A tiny language model on mini's codes: how much it knows of held-out speech, and how it continues a prompt.

    semanticodec tokenize ../shared/audio/train/train_speech_*.tar --output corpus --model mini-25
    python -m benchmarks.language corpus --model mini-25 --minutes 10

A GPT-2 of two million parameters reads the codes frame by frame.  One recording in 40, chosen by its id, is held out;
its bits per code are set against those of a unigram, which only knows how often each code of each stream is used.  Then
the model continues the first seconds of a voice, and every block of codes becomes sound as soon as it is there.
"""

import argparse
import json
import logging
import math
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel

import semanticodec
from semanticodec import SemantiCodec, StreamDecoder, TokenDataset, TokenDecoder, Vocabulary
from semanticodec.audio import load, resample, save
from semanticodec.config import SAMPLE_RATE, preset
from semanticodec.demo import draw
from semanticodec.tokens import STREAMS
from semanticodec.training.loop import Logs, RunOptions, adamw, descend, launch, train

from .measure import machine

RESULTS = Path(__file__).resolve().parent / "results"
VOICE = Path(semanticodec.__file__).parent / "assets" / "demo.flac"
HELD_OUT = 40
"""One recording in this many is never trained on."""
Bits = dict[str, float]
"""Stream -> bits per code."""


def held_out(name: str) -> bool:
    """Tell by its id whether a recording is kept for the held-out loss."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def trained(name: str) -> bool:
    """Tell by its id whether a recording is trained on."""
    return not held_out(name)


def streams(vocabulary: Vocabulary) -> Iterator[tuple[str, range]]:
    """Yield the name and the ids of every stream."""
    yield from zip(STREAMS, (vocabulary.semantic, vocabulary.acoustic), strict=True)


def counts(data: TokenDataset) -> np.ndarray:
    """Count every id of one epoch, int64 ``[vocabulary.size]``."""
    total = np.zeros(data.vocabulary.size, np.int64)
    for block in data:
        total += np.bincount(block["input_ids"].numpy().reshape(-1), minlength=len(total))
    return total


def unigram_bits(vocabulary: Vocabulary, train: np.ndarray, test: np.ndarray) -> Bits:
    """Return the bits per held-out code if each costs what its frequency in training says, with one added to all."""
    bits = {}
    for name, ids in streams(vocabulary):
        seen, asked = train[ids.start : ids.stop] + 1, test[ids.start : ids.stop]
        bits[name] = float(-(asked * np.log2(seen / seen.sum())).sum() / asked.sum())
    return bits


@torch.no_grad()
def model_bits(model: GPT2LMHeadModel, data: TokenDataset, batch: int = 16) -> Bits:
    """Return the bits per code of one epoch under the model; the first id of a block is given, not predicted."""
    total, number = dict.fromkeys(STREAMS, 0.0), dict.fromkeys(STREAMS, 0)
    model.train(False)
    for block in DataLoader(data, batch):
        logits = model(**block, use_cache=False).logits[:, :-1]
        labels = block["labels"][:, 1:]
        nats = functional.cross_entropy(logits.mT, labels, reduction="none")
        for name, ids in streams(data.vocabulary):
            chosen = (labels >= ids.start) & (labels < ids.stop)
            total[name] += float(nats[chosen].sum()) / math.log(2)
            number[name] += int(chosen.sum())
    model.train()
    return {name: total[name] / number[name] for name in STREAMS}


class LanguageStage:
    """GPT-2 over packed blocks of tokens; the place in the corpus is part of the checkpoint."""

    name = "language"

    def __init__(self, corpus: Path, vocabulary: Vocabulary, length: int, width: int, options: RunOptions) -> None:
        self.options, self.vocabulary = options, vocabulary
        self.data = TokenDataset(corpus, vocabulary, length, seed=options.seed, keep=trained)
        self.test = TokenDataset(corpus, vocabulary, length, seed=None, epochs=1, keep=held_out)
        config = GPT2Config(
            vocab_size=vocabulary.size,
            n_positions=length,
            n_embd=width,
            n_layer=4,
            n_head=4,
            bos_token_id=vocabulary.bos,
            eos_token_id=vocabulary.eos,
            pad_token_id=vocabulary.pad,
        )
        self.raw = GPT2LMHeadModel(config)
        self._batches: Iterator[dict[str, Tensor]] | None = None

    def setup(self, fabric: Fabric) -> None:
        """Wrap the model and its optimiser."""
        self.model, self.optimizer = fabric.setup(self.raw, adamw(self.raw, self.options.learning_rate))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimiser."""
        return [self.optimizer]

    def state(self) -> dict[str, Any]:
        """Return the model, the optimiser and the reader."""
        return {"model": self.raw, "optimizer": self.optimizer, "data": self.data}

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one step on the next blocks."""
        del index, progress
        if self._batches is None:  # not before the checkpoint is loaded, which says where to begin
            self._batches = iter(DataLoader(self.data, self.options.batch))
        loss = self.model(**next(self._batches), use_cache=False).loss  # without a cache, sequences are kept apart
        descend(fabric, loss, self.model, self.optimizer)
        return {"nats": loss.detach()}

    def evaluate(self) -> Logs:
        """Return the held-out bits per code."""
        return {f"{name}_bits": bits for name, bits in model_bits(self.raw, self.test).items()}

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write nothing: what the model says is judged at the end."""


@torch.no_grad()
def generate(
    model: GPT2LMHeadModel, vocabulary: Vocabulary, prompt: np.ndarray, tokens: int, *, temperature: float, seed: int
) -> Iterator[int]:
    """Continue ids ``[T]`` by ``tokens`` more, sampled among those that the layout allows, and yield these."""
    generator, grammar, ids = torch.Generator().manual_seed(seed), TokenDecoder(vocabulary), prompt
    grammar.push(ids)
    model.train(False)
    for _ in range(tokens):
        (allowed,) = grammar.allowed()
        allowed[vocabulary.eos] = False
        logits = model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0, -1]
        chance = (logits.masked_fill(torch.from_numpy(~allowed), -torch.inf) / temperature).softmax(0)
        new = torch.multinomial(chance, 1, generator=generator).numpy()
        grammar.push(new)
        ids = np.append(ids, new)
        yield int(new[0])


def sound(codec: SemantiCodec, vocabulary: Vocabulary, ids: Iterator[int]) -> Tensor:
    """Decode ids ``[T]``, from BOS on, group by group as they come, to samples ``[S]``."""
    stream = StreamDecoder(codec)
    blocks = vocabulary.iter_codes(ids, codec.config.group)
    return torch.cat([*(stream.push(block[None]) for block in blocks), stream.flush()], 1)[0]


def main() -> None:
    """Train, compare with a unigram, and continue a voice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder written by `semanticodec tokenize`")
    parser.add_argument("--model", default="mini-25", help="preset whose codes these are")
    parser.add_argument("--out", type=Path, default=Path("runs/language"), help="checkpoint, curves and sound")
    parser.add_argument("--minutes", type=float, default=10, help="of training")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--batch", type=int, default=8, help="blocks per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--prompt", type=Path, default=VOICE, help="recording whose first 3 seconds are continued")
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--write", action="store_true", help="also write benchmarks/results/language-MODEL.json and .png"
    )
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(given.threads)

    vocabulary = Vocabulary.of(preset(given.model))
    options = RunOptions(given.out, given.steps, given.minutes, given.batch, learning_rate=3e-3, evaluate_every=100)
    fabric = launch(options)
    stage = LanguageStage(given.corpus, vocabulary, given.length, given.width, options)
    checkpoint = train(stage, options, fabric)
    steps = int(fabric.load(checkpoint)["step"])

    once = TokenDataset(given.corpus, vocabulary, given.length, seed=None, epochs=1, keep=trained)
    seen, asked = counts(once), counts(stage.test)
    unigram, model = unigram_bits(vocabulary, seen, asked), model_bits(stage.raw, stage.test)
    print(f"{'stream':<10}{'uniform':>9}{'unigram':>9}{'GPT-2':>9}  bits per held-out code")
    for name, ids in streams(vocabulary):
        print(f"{name:<10}{math.log2(len(ids)):>9.2f}{unigram[name]:>9.2f}{model[name]:>9.2f}")

    codec = SemantiCodec.from_pretrained(given.model)
    wave, rate = load(given.prompt)
    voice = resample(wave.mean(0), rate, SAMPLE_RATE)
    given_part = voice[: 3 * SAMPLE_RATE // codec.config.group_samples * codec.config.group_samples]
    prompt = vocabulary.encode(codec.encode(given_part, SAMPLE_RATE)[0], eos=False)
    more = generate(stage.raw, vocabulary, prompt, given.length - len(prompt), temperature=given.temperature, seed=0)
    continued = sound(codec, vocabulary, chain(prompt.tolist(), more))
    save(given.out / "continued.wav", continued, SAMPLE_RATE)
    picture = RESULTS / f"language-{given.model}.png" if given.write else given.out / "continued.png"
    original = functional.pad(voice, (0, max(0, len(continued) - len(voice))))[: len(continued)]
    draw(picture, original, continued, f"{len(given_part) / SAMPLE_RATE} s, then GPT-2 on {given.model}")
    if given.write:
        result = {
            "machine": machine(),
            "options": {key: str(value) for key, value in vars(given).items()},
            "parameters": stage.raw.num_parameters(),
            "steps": steps,
            "tokens": {"train": int(seen.sum()), "held_out": int(asked.sum())},
            "unigram_bits": unigram,
            "model_bits": model,
        }
        (RESULTS / f"language-{given.model}.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
