"""Readers of tokenised corpora: everything once per epoch, any number of readers, resume at any block, packing."""

import json
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from semanticodec import CodesError, ConfigError, TokenDataset, Vocabulary, preset

VOCABULARY = Vocabulary("flat", 25, (50, 70))
GROUPS, ROWS = 6, 5
"""Row groups per shard, recordings per row group."""
LISTS = pa.list_(pa.uint16())
SCHEMA = pa.schema([("id", pa.string()), ("semantic", LISTS), ("acoustic", LISTS), ("frames", pa.int64())])


def write(path: Path, rows: list[tuple[str, np.ndarray]]) -> None:
    columns = {
        "id": [name for name, _ in rows],
        "semantic": [codes[0] for _, codes in rows],
        "acoustic": [codes[1] for _, codes in rows],
        "frames": [codes.shape[1] for _, codes in rows],
    }
    pq.write_table(pa.table(columns, SCHEMA), path, row_group_size=ROWS)


def recordings(shards: int = 4) -> list[list[tuple[str, np.ndarray]]]:
    """Recordings of 0 to 12 frames; the first semantic codes spell the number, so that all are different."""
    rng, number, result = np.random.default_rng(0), 0, []
    for _ in range(shards):
        shard = []
        for _ in range(GROUPS * ROWS):
            codes = rng.integers(0, 50, (2, int(rng.integers(2, 13)))).astype(np.uint16)
            codes[0, :2] = number // 50, number % 50
            shard.append((f"clip-{number}", codes))
            number += 1
        result.append(shard)
    return result


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index, shard in enumerate(recordings()):
        write(folder / f"shard-{index}.parquet", shard)
    pq.write_table(pa.table({"path": ["bad.wav"]}), folder / "failures.parquet")
    return folder


SEQUENCES = [tuple(VOCABULARY.encode(codes).tolist()) for shard in recordings() for _, codes in shard]


def stream(blocks) -> list[int]:
    """Join blocks and drop the padding at the end."""
    return [index for block in blocks for index in block["input_ids"].tolist() if index != VOCABULARY.pad]


def sequences(blocks) -> Counter[tuple[int, ...]]:
    found: list[list[int]] = []
    for index in stream(blocks):
        if index == VOCABULARY.bos:
            found.append([])
        found[-1].append(index)
    return Counter(tuple(sequence) for sequence in found)


def test_without_a_seed_the_corpus_stands_in_order_one_sequence_behind_the_other(corpus: Path):
    blocks = list(TokenDataset(corpus, VOCABULARY, 64, seed=None, epochs=1))
    whole = [index for sequence in SEQUENCES for index in sequence]
    assert stream(blocks) == whole
    assert len(blocks) == -(-len(whole) // 64)
    assert all(len(block["input_ids"]) == 64 for block in blocks)
    assert blocks[0]["input_ids"].dtype == torch.int64


def test_positions_restart_with_every_sequence_and_labels_leave_padding_out(corpus: Path):
    blocks = list(TokenDataset(corpus, VOCABULARY, 64, seed=None, epochs=1))
    for block in blocks:
        ids, positions = block["input_ids"], block["position_ids"]
        expected = 0
        for index, position in zip(ids.tolist(), positions.tolist(), strict=True):
            expected = 0 if index == VOCABULARY.bos else expected
            if index != VOCABULARY.pad:
                assert position == expected
            expected += 1
        assert torch.equal(block["labels"], torch.where(ids == VOCABULARY.pad, -100, ids))
    assert (blocks[-1]["labels"] == -100).any()
    assert not any((block["labels"] == -100).any() for block in blocks[:-1])


@pytest.mark.parametrize("world", [1, 2, 5, 24])
def test_an_epoch_gives_every_recording_to_exactly_one_rank(corpus: Path, world: int):
    ranks = [
        list(TokenDataset(corpus, VOCABULARY, 64, seed=3, epochs=1, rank=rank, world=world)) for rank in range(world)
    ]
    assert sum((sequences(rank) for rank in ranks), Counter()) == Counter(SEQUENCES)


def test_workers_are_readers_like_ranks(corpus: Path):
    def blocks(rank: int, world: int, workers: int) -> Counter[tuple[int, ...]]:
        data = TokenDataset(corpus, VOCABULARY, 64, seed=3, epochs=1, rank=rank, world=world)
        return Counter(tuple(b["input_ids"].tolist()) for b in DataLoader(data, batch_size=None, num_workers=workers))

    assert blocks(1, 2, 2) == blocks(2, 4, 0) + blocks(3, 4, 0)


def test_epochs_and_seeds_shuffle_differently_and_repeatably(corpus: Path):
    def order(seed: int, epochs: int) -> list[int]:
        return stream(TokenDataset(corpus, VOCABULARY, 64, seed=seed, epochs=epochs))

    once, size = order(3, 1), len(order(None, 1))
    assert once == order(3, 1) != order(4, 1)
    twice = order(3, 2)
    assert twice[:size] == once != twice[size:]
    assert sorted(twice[size:]) == sorted(once)


def test_recordings_of_different_row_groups_stand_beside_each_other(corpus: Path):
    groups = [
        number // ROWS
        for number in (_number(s) for s in _split(stream(TokenDataset(corpus, VOCABULARY, 64, epochs=1))))
    ]
    changes = sum(a != b for a, b in pairwise(groups))
    assert changes > 0.7 * len(groups)  # 0.2 if a row group stayed together


def _split(ids: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for index in ids:
        if index == VOCABULARY.bos:
            found.append([])
        found[-1].append(index)
    return found


def _number(sequence: list[int]) -> int:
    high, low = (sequence[at] - VOCABULARY.semantic.start for at in (2, 4))
    return high * 50 + low


def test_for_ever_is_one_epoch_after_the_other(corpus: Path):
    finite = stream(TokenDataset(corpus, VOCABULARY, 64, epochs=3))
    endless = stream(islice(TokenDataset(corpus, VOCABULARY, 64), len(finite) // 64))
    assert endless == finite[: len(endless)]


@pytest.mark.parametrize("layout", ["flat", "delay"])
def test_a_reader_resumes_at_any_block(corpus: Path, layout):
    vocabulary = Vocabulary(layout, 25, (50, 70), delay=2)

    def fresh() -> TokenDataset:
        return TokenDataset(corpus, vocabulary, 48, seed=1, epochs=2, rank=1, world=2)

    data, states = fresh(), []
    blocks = []
    for block in data:
        blocks.append(block)
        states.append(data.state_dict())
    assert blocks[0]["input_ids"].shape == ((2, 48) if layout == "delay" else (48,))
    for done in range(0, len(blocks) + 1, 7):
        again = fresh()
        if done:
            again.load_state_dict(states[done - 1])
            assert again.state_dict() == states[done - 1]
        rest = list(again)
        assert len(rest) == len(blocks) - done
        for found, wanted in zip(rest, blocks[done:], strict=True):
            assert torch.equal(found["input_ids"], wanted["input_ids"])
            assert torch.equal(found["position_ids"], wanted["position_ids"])
    again = fresh()
    again.load_state_dict(states[-1])
    assert list(again) == []


def test_a_dataset_begins_anew_after_it_has_been_resumed(corpus: Path):
    data = TokenDataset(corpus, VOCABULARY, 64, epochs=1)
    whole = stream(data)
    iterator = iter(data)
    next(iterator)
    data.load_state_dict(data.state_dict())
    assert stream(data) == whole[64:]
    assert stream(data) == whole


def test_a_stateful_loader_resumes_in_its_workers(corpus: Path):
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(TokenDataset(corpus, VOCABULARY, 32, epochs=1), batch_size=2, num_workers=2)

    first = loader()
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    state = first.state_dict()
    wanted = [batch["input_ids"].tolist() for batch in iterator]
    second = loader()
    second.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in second] == wanted
    assert len(wanted) > 5


def test_recordings_are_kept_by_their_id(corpus: Path):
    def held_out(name: str) -> bool:
        return int(name.removeprefix("clip-")) % 10 == 0

    kept = sequences(TokenDataset(corpus, VOCABULARY, 64, epochs=1, keep=held_out))
    assert kept == Counter(SEQUENCES[::10])
    with pytest.raises(ConfigError, match="keeps none of the recordings"):
        next(iter(TokenDataset(corpus, VOCABULARY, 64, keep=lambda name: name == "nobody")))


@pytest.mark.parametrize("change", [{"seed": 5}, {"rank": 0}, {"world": 3}], ids=str)
def test_a_state_of_another_run_is_refused(corpus: Path, change):
    options = {"seed": 1, "rank": 1, "world": 2}
    state = TokenDataset(corpus, VOCABULARY, 64, **options).state_dict()
    other = TokenDataset(corpus, VOCABULARY, 64, **(options | change))
    other.load_state_dict(state)
    with pytest.raises(ConfigError, match="resume with what the run began with"):
        next(iter(other))


def test_more_readers_than_row_groups(corpus: Path):
    data = TokenDataset(corpus, VOCABULARY, 64, rank=0, world=25)
    with pytest.raises(ConfigError, match="25 readers share 24 row groups"):
        next(iter(data))


@pytest.mark.parametrize("wrong", [{"length": 0}, {"rank": 1}, {"rank": -1}, {"epochs": 0}, {"seed": -1}], ids=str)
def test_arguments_out_of_range(corpus: Path, wrong):
    with pytest.raises(ConfigError, match="wanted are length"):
        TokenDataset(corpus, VOCABULARY, **({"length": 64} | wrong))


def test_folders_that_are_no_corpus(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no recordings"):
        TokenDataset(tmp_path, VOCABULARY, 64)
    pq.write_table(pa.table({"id": ["a"], "semantic": [[1]]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match=r"x\.parquet has no column acoustic"):
        TokenDataset(tmp_path, VOCABULARY, 64)


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path):
    write(tmp_path / "x.parquet", recordings(1)[0])
    manifest = {"model": "mini-25", "config": json.loads(preset("mini-25").to_json())}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    fitting = Vocabulary.of(preset("mini-25"))
    assert stream(islice(TokenDataset(tmp_path, fitting, 64), 1))
    assert stream(islice(TokenDataset(tmp_path, replace(fitting, model=""), 64), 1))
    other = Vocabulary.of(preset("mini-100"))
    for wrong in (other, replace(other, model="mini-25"), replace(fitting, codebook_sizes=(50, 70))):
        with pytest.raises(ConfigError, match=r"manifest\.json: the codes are of .*'mini-25', 25, \(4096, 8192\)"):
            TokenDataset(tmp_path, wrong, 64)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"semantic": [[50]], "acoustic": [[1]]}, "recording 'a': semantic codes from 50 to 50"),
        ({"semantic": [[1, 2]], "acoustic": [[1]]}, "there are 2 semantic and 1 acoustic codes"),
    ],
)
def test_codes_that_do_not_fit_name_their_recording(tmp_path: Path, row, message: str):
    pq.write_table(pa.table({"id": ["a"], **row}), tmp_path / "x.parquet")
    with pytest.raises(CodesError, match=message):
        next(iter(TokenDataset(tmp_path, VOCABULARY, 64)))


def test_a_corpus_behind_a_url(corpus: Path):
    assert stream(TokenDataset(corpus.as_uri(), VOCABULARY, 64, epochs=1)) == stream(
        TokenDataset(corpus, VOCABULARY, 64, epochs=1)
    )
