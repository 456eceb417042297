"""The worked example on a small corpus: it learns, resumes with its place in the corpus, and speaks in valid tokens."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch

from benchmarks import language
from benchmarks.language import (
    LanguageStage,
    counts,
    generate,
    held_out,
    model_bits,
    sound,
    trained,
    unigram_bits,
)
from semanticodec import TokenDataset, Vocabulary
from semanticodec.audio import load
from semanticodec.training.loop import RunOptions, launch, train

VOCABULARY = Vocabulary.of(tiny.config("mini", 25))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings that count upwards, so that there is something to learn beyond frequencies."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    names = [f"clip-{index}" for index in range(200)]
    codes = [(rng.integers(0, 1000) + np.arange(24) + 1000 * np.arange(2)[:, None]) % [[50], [70]] for _ in names]
    lists = pa.list_(pa.uint16())
    columns = [pa.array(names), pa.array([c[0] for c in codes], lists), pa.array([c[1] for c in codes], lists)]
    pq.write_table(pa.table(columns, ["id", "semantic", "acoustic"]), folder / "x.parquet", row_group_size=50)
    assert 2 <= sum(map(held_out, names)) <= 10
    return folder


def stage(corpus: Path, options: RunOptions) -> LanguageStage:
    return LanguageStage(corpus, VOCABULARY, 64, 16, options)


def test_it_beats_the_unigram_on_held_out_recordings(corpus: Path, tmp_path: Path):
    options = RunOptions(tmp_path, steps=120, minutes=60, batch=8, learning_rate=1e-2, evaluate_every=1000)
    learner = stage(corpus, options)
    train(learner, options, launch(options))
    seen = counts(TokenDataset(corpus, VOCABULARY, 64, epochs=1, keep=trained))
    unigram = unigram_bits(VOCABULARY, seen, counts(learner.test))
    found = model_bits(learner.raw, learner.test)
    assert 5.4 < unigram["semantic"] < np.log2(50) + 0.3
    assert 5.9 < unigram["acoustic"] < np.log2(70) + 0.3
    assert found["semantic"] < unigram["semantic"] - 1
    assert found["acoustic"] < unigram["acoustic"] - 1


def test_unigram_bits_by_hand():
    vocabulary = Vocabulary("flat", 25, (2, 2))
    seen, asked = np.zeros((2, vocabulary.size), np.int64)
    seen[6:], asked[6:] = [2, 0, 0, 0], [1, 1, 0, 4]
    assert unigram_bits(vocabulary, seen, asked) == {"semantic": (np.log2(4 / 3) + 2) / 2, "acoustic": 1.0}


def test_an_interrupted_run_ends_like_an_uninterrupted_one(corpus: Path, tmp_path: Path):
    def run(out: str, steps: int) -> dict[str, torch.Tensor]:
        options = RunOptions(tmp_path / out, steps, minutes=1e6, batch=4, learning_rate=0.0, evaluate_every=1000)
        fabric = launch(options)
        learner = stage(corpus, options)
        train(learner, options, fabric)
        return learner.data.state_dict()

    run("cut", 3)
    assert run("cut", 8) == run("whole", 8)


def test_sequences_of_a_block_do_not_see_each_other(corpus: Path, tmp_path: Path):
    learner = stage(corpus, RunOptions(tmp_path, 1, 1, 1, 1e-3))
    launch(learner.options)
    block = next(iter(learner.test))
    second = int((block["position_ids"] == 0).nonzero()[1])
    other = dict(block, input_ids=block["input_ids"].clone())
    other["input_ids"][:second] = VOCABULARY.semantic.start
    learner.raw.train(False)
    with torch.no_grad():
        here, there = (
            learner.raw(**{k: v[None] for k, v in b.items()}, use_cache=False).logits[0] for b in (block, other)
        )
    assert torch.equal(here[second:], there[second:])
    assert not torch.equal(here[:second], there[:second])


def test_what_it_says_is_a_sequence_and_becomes_sound_as_it_comes(corpus: Path, tmp_path: Path):
    options = RunOptions(tmp_path, 1, 1, 1, 1e-3)
    launch(options)
    learner, codec = stage(corpus, options), tiny.codec("mini", 25)
    prompt = VOCABULARY.encode(tiny.random_codes(codec.config, 8)[0], eos=False)

    def more(seed: int) -> list[int]:
        return list(generate(learner.raw, VOCABULARY, prompt, 16, temperature=1.0, seed=seed))

    said = more(0)
    assert said == more(0) != more(1)
    codes = VOCABULARY.decode([*prompt, *said, VOCABULARY.eos])
    assert codes.shape == (2, 8 + 8)
    found = sound(codec, VOCABULARY, chain(prompt.tolist(), said))
    assert torch.equal(found, codec.decode(codes[None])[0])


def test_the_command_trains_compares_and_continues_a_voice(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    codec = tiny.codec("mini", 25)
    monkeypatch.setattr(language, "preset", lambda _: codec.config)
    monkeypatch.setattr(language.SemantiCodec, "from_pretrained", lambda _: codec)
    monkeypatch.setattr(language, "RESULTS", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    options = "--steps 2 --batch 2 --length 96 --width 16 --threads 1 --write"
    monkeypatch.setattr("sys.argv", ["language", str(corpus), "--out", str(tmp_path), *options.split()])
    language.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["stream", "semantic", "acoustic"]
    result = json.loads((tmp_path / "language-mini-25.json").read_text())
    assert result["steps"] == 2
    assert result["tokens"]["train"] > 10 * result["tokens"]["held_out"] > 0
    assert (tmp_path / "language-mini-25.png").stat().st_size > 10_000
    wave, rate = load(tmp_path / "continued.wav")
    groups = (96 - 2) // 8 + 1  # of four frames, eight tokens; the last one is not complete
    assert (rate, wave.shape) == (16_000, (1, groups * codec.config.group_samples))
