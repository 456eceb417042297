"""The Ray engine: the same rows as the local one, whatever dies meanwhile (``pytest -m ray``)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import poison
import pyarrow.parquet as pq
import pytest
import soundfile

from semanticodec.corpus import CorpusOptions, Progress, inputs, tokenize_corpus
from semanticodec.corpus.worker import Tokeniser

# Ray warns of what it deprecates in itself, and leaves sockets to the garbage collector.
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

OPTIONS = CorpusOptions(model="mini-25", engine="ray", shard_mb=0.01)


class Nodes:
    """A cluster of two nodes on this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        arguments = {"num_cpus": 2, "object_store_memory": 200 << 20}
        self.cluster = Cluster(initialize_head=True, head_node_args=arguments)
        self.second = self.cluster.add_node(**arguments)
        self.cluster.wait_for_nodes()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    ray = pytest.importorskip("ray")
    folder = poison.install(tmp_path_factory.mktemp("ray") / "plugin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.syspath_prepend(folder)
        fsspec.register_implementation("poison", "poisonfs.Poison", clobber=True)
        nodes = Nodes()
        ray.init(address=nodes.cluster.address, log_to_driver=False)
        yield nodes
        ray.shutdown()
        nodes.cluster.shutdown()


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


def kill(name: str) -> bool:
    """Kill one of Ray's processes on this machine whose title contains ``name``."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::") and name in title:
            os.kill(int(process.name), signal.SIGKILL)
            return True
    return False


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


@pytest.mark.usefixtures("nodes")
def test_a_killed_encoder(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check(clips, tmp_path, lambda: kill("Encoder"), monkeypatch)


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
        nodes.cluster.remove_node(nodes.second, allow_graceful=False)
        return len(nodes.cluster.list_all_nodes()) == 1

    check(clips, tmp_path, lose, monkeypatch)
