"""The Ray engine: the same rows as the local one, whatever dies meanwhile (``pytest -m ray``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from semanticodec.corpus import CorpusOptions, Progress, inputs, tokenize_corpus
from semanticodec.corpus.worker import Tokeniser

if TYPE_CHECKING:
    from benchmarks.corpus_ray import Nodes

# Ray warns of what it deprecates in itself, and leaves sockets to the garbage collector.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

OPTIONS = CorpusOptions(model="mini-25", engine="ray", shard_mb=0.01)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    corpus_ray = pytest.importorskip("benchmarks.corpus_ray", exc_type=ModuleNotFoundError)
    with corpus_ray.cluster(tmp_path_factory.mktemp("ray") / "plugin", 2) as nodes:
        yield nodes


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(24):
        wave = generator.normal(0, 0.1, int(generator.integers(1, 60_000)))
        soundfile.write(folder / f"{index:02d}.wav", wave, 16_000)
    (folder / "empty.wav").touch()
    return folder


def check(clips: Path, tmp_path: Path, disturb: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenise with a disturbance in mid-run, which says whether it did, and compare with what one process gives."""
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 2)
    (clips / "poison.wav").write_bytes((clips / "00.wav").read_bytes())
    disturbed: list[bool] = []

    def progress(status: Progress) -> None:
        if status.items and not disturbed:
            assert status.items < status.total
            disturbed.append(disturb())

    source = f"poison://{clips}"
    statistics = tokenize_corpus([source], tmp_path / "out", options=OPTIONS, progress=progress)
    assert disturbed == [True]
    assert (statistics["rows"], statistics["failures"]) == (24, 2)
    failures = pq.read_table(tmp_path / "out" / "failures.parquet").to_pylist()
    assert {one["id"]: one["error"] for one in failures} == {"empty.wav": "AudioError", "poison.wav": "WorkerDied"}
    good = [item for item in inputs.find_items([source]) if item.id not in ("empty.wav", "poison.wav")]
    expected = Tokeniser(OPTIONS.work("cpu", 0)).run(0, good).rows
    assert pq.read_table(tmp_path / "out" / "data").equals(expected)


def test_poison(nodes: Nodes, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(nodes.cluster.list_all_nodes()) == 2
    check(clips, tmp_path, lambda: True, monkeypatch)


@pytest.mark.parametrize("name", ["Encoder", "Ledger"])
def test_a_killed_actor(nodes: Nodes, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    check(clips, tmp_path, lambda: bool(nodes.kill(name)), monkeypatch)


@pytest.mark.usefixtures("nodes")
def test_a_driver_that_ends_in_mid_run_goes_on(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("semanticodec.corpus.run.CHUNK_ITEMS", 2)

    def cut(status: Progress) -> None:
        if status.items:
            assert status.items < status.total
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus([clips], tmp_path / "cut", options=OPTIONS, progress=cut)
    assert not (tmp_path / "cut" / "manifest.json").exists()
    statistics = tokenize_corpus([clips], tmp_path / "cut", options=OPTIONS, resume=True)
    assert statistics == tokenize_corpus([clips], tmp_path / "whole", options=OPTIONS)
    for one in sorted((tmp_path / "whole" / "data").iterdir()):
        assert (tmp_path / "cut" / "data" / one.name).read_bytes() == one.read_bytes()


def test_a_lost_node(nodes: Nodes, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lose() -> bool:
        nodes.lose()
        return len(nodes.cluster.list_all_nodes()) == 1

    check(clips, tmp_path, lose, monkeypatch)
