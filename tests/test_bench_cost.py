"""What the bench says of bits, memory, operations and threads, and what its cache depends on."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile
import torch
from tiny import noise
from torch import nn
from torch.nn import functional

from semanticodec.bench.clips import Clip
from semanticodec.bench.codecs import Semanticodec, content
from semanticodec.bench.commands import Command, _libraries, classical
from semanticodec.bench.cost import UNCOUNTED, _first_block, gflop
from semanticodec.bench.decodes import Decodes
from semanticodec.bench.payloads import mp3_payload
from semanticodec.bench.pool import workers
from semanticodec.bench.run import score_key
from semanticodec.checkpoints import official_files
from semanticodec.config import preset
from semanticodec.errors import AudioError

SECONDS = 2.0


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    soundfile.write(tmp_path / "noise.flac", noise(round(SECONDS * 16_000), scale=0.1).numpy(), 16_000)
    return Clip("noise", "sound", tmp_path / "noise.flac")


def program(name: str) -> Command:
    command = next(one for one in classical() if one.name == name)
    if missing := command.missing():
        pytest.skip(missing)
    return command


@pytest.mark.parametrize(("name", "bits"), [("codec2-700c", 700), ("codec2-1300", 1300), ("codec2-1200", 1200)])
def test_what_fills_frames_up_to_bytes_is_no_bit(name: str, bits: int, clip: Clip) -> None:
    coded = program(name).encode(clip)
    assert coded.net_bits == pytest.approx(bits * SECONDS, rel=0.03)
    assert coded.net_bits <= 8 * len(coded.data)


def test_headers_of_mp3_frames_are_no_bits(clip: Clip) -> None:
    coded = program("mp3-16").encode(clip)
    frames = 1 + SECONDS * 16_000 / 576
    assert 8 * len(coded.data) - coded.net_bits == pytest.approx(32 * frames, rel=0.06)
    with pytest.raises(AudioError, match="no MP3 frame at byte 0"):
        mp3_payload(b"RIFF" + coded.data)


def test_recurrent_layers_are_counted_alike_on_a_gpu() -> None:
    layer, x = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True), torch.zeros(3, 5, 8)
    weights = [weight.shape for weight in layer.parameters()]
    with torch.inference_mode():
        assert gflop(lambda: layer(x)) == UNCOUNTED[torch.ops.aten._cudnn_rnn](x.shape, weights) / 1e9 > 0


def test_memory_is_the_programs_own(clip: Clip) -> None:
    ballast = torch.ones(50_000_000)
    assert 1e6 < program("codec2-1200").peak_memory(clip) < 6e6  # 2.3 MB; a Python that starts it takes 9
    assert ballast.sum() > 0


def test_memory_of_the_hungrier_program_counts(clip: Clip) -> None:
    copy = f'{sys.executable} -S -c "import shutil, sys; bytearray({{}}); shutil.copy(*sys.argv[1:])"'
    codec = Command("copy", f"{copy.format(80_000_000)} {{input}} {{coded}}", f"{copy.format(1)} {{coded}} {{output}}")
    assert 80e6 < codec.peak_memory(clip) < 110e6
    with pytest.raises(AudioError, match="exit code 3"):
        dataclasses.replace(codec, decode_command='sh -c "exit 3" {coded} {output}').peak_memory(clip)


def test_a_clip_of_less_than_a_block_has_no_first_block(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "dot.wav", noise(800).numpy(), 16_000)
    assert _first_block(Semanticodec("mini-25"), Clip("dot", "sound", tmp_path / "dot.wav")) is None


def test_the_first_block_takes_its_work_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock on which every push takes 7 s."""
    soundfile.write(tmp_path / "noise.wav", noise(8000, scale=0.1).numpy(), 16_000)
    codec = Semanticodec("mini-25")
    monkeypatch.setattr("semanticodec.bench.cost.time", SimpleNamespace(perf_counter=itertools.count(0, 7).__next__))
    found = _first_block(codec, Clip("noise", "sound", tmp_path / "noise.wav"))
    assert found is not None
    delay = codec.about().delay
    assert delay is not None
    assert 320 <= found - 7000 <= 1000 * delay + 10  # the sound that it took, in steps of 10 ms


def test_operations_that_pytorch_does_not_count() -> None:
    lstm = nn.LSTM(8, 16, 2, bidirectional=True, batch_first=True)
    # Per step and direction: four gates of 16 that see 8 or 32 inputs and 16 states; a multiply-add is two.
    assert gflop(lambda: lstm(torch.randn(3, 5, 8))) * 1e9 == pytest.approx(2 * 15 * 2 * 64 * (8 + 16 + 32 + 16))
    query = torch.randn(1, 2, 7, 16)
    attend = functional.scaled_dot_product_attention
    assert gflop(lambda: attend(query, query, query)) * 1e9 == pytest.approx(2 * 2 * 2 * 7 * 7 * 16)


def test_times_are_of_one_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with workers(1) as each:
            seen = [threads for _, threads in each(lambda _: torch.get_num_threads(), [(0,)], "", lambda *_: None)]
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


class TestCacheFollows:
    def test_bitrates_and_names_of_decodes(self, tmp_path: Path) -> None:
        (tmp_path / "a.wav").write_bytes(b"a")
        seen = {Decodes("x", tmp_path, kbps).fingerprint() for kbps in (1.5, 3.0)}
        (tmp_path / "a.wav").rename(tmp_path / "b.wav")
        seen.add(Decodes("x", tmp_path, 1.5).fingerprint())
        assert len(seen) == 3

    def test_scripts_in_commands(self, tmp_path: Path) -> None:
        script = tmp_path / "encode.py"
        codec = Command("x", f"python3 {script} {{input}} {{coded}}", "python3 decode.py {coded} {output}")
        seen = set()
        for text in ("one", "two"):
            script.write_text(text)
            seen.add(codec.fingerprint())
        assert len(seen) == 2

    def test_libraries_of_programs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a stand-in for ``ldd`` tells them."""
        library, ldd, seen = tmp_path / "libcodec.so", tmp_path / "ldd", set()
        ldd.write_text(f'#!/bin/sh\necho "libcodec.so => {library} (0x00)"\necho "libgone.so => not found"\n')
        ldd.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        for text in ("one", "another"):
            library.write_text(text)
            _libraries.cache_clear()
            seen.add(Command("x", "cp {input} {coded}", "cp {coded} {output}").fingerprint())
        assert len(seen) == 2

    @pytest.mark.parametrize("beside", [False, True])
    def test_codebooks(self, tmp_path: Path, beside: bool) -> None:
        """In a folder of weights, or beside it as in the hub."""
        folder, seen = tmp_path / "semanticodec_tokenrate_100", set()
        folder.mkdir()
        (folder / "encoder.ckpt").write_bytes(b"weights")
        config = preset("semanticodec-100-4096")
        table = (tmp_path if beside else folder) / official_files(config)[-1]
        table.parent.mkdir(parents=True)
        for text in (b"one", b"other"):
            table.write_bytes(text)
            content.cache_clear()
            seen.add(Semanticodec(config.name, folder=str(folder)).fingerprint())
        assert len(seen) == 2

    def test_what_was_said(self, clip: Clip) -> None:
        said = [Clip("noise", "speech", clip.path, text) for text in ("right", "wrong", None)]
        assert len({score_key("wer", 0, True, one) for one in said}) == 3
        assert len({score_key("stoi", 0, True, one) for one in said}) == 1
