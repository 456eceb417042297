"""The bench of speed as ratios: its arithmetic and that every part runs, on models of no size."""

import dataclasses
import itertools
import json
import os
from pathlib import Path

import pytest
import tiny
import torch

from benchmarks import ratios
from benchmarks.measure import Sgemm, Timing
from semanticodec import SemantiCodec
from semanticodec.config import CodecConfig, HiFiGANConfig

CONFIG = tiny.config("official")
SMALL = dataclasses.replace(
    CONFIG,
    decoder=dataclasses.replace(
        CONFIG.decoder,
        columns=2,
        overlap=1,
        latent=dataclasses.replace(CONFIG.decoder.latent, vocoder=HiFiGANConfig(base=32), steps=3),
    ),
)


@pytest.fixture
def sgemm() -> Sgemm:
    peak = Sgemm(64)
    peak.measure()
    return peak


def test_published_times_are_compared_in_products() -> None:
    assert ratios.against_published("window", 216, 68) == pytest.approx(1)
    assert ratios.against_published("vocoder", 10.2, 136) == pytest.approx(1)


def test_enough_steps_are_the_fewest_that_are_as_near() -> None:
    ddim = {10: 0.5, 50: 0.1}
    assert ratios.enough({"dpmpp_2m": {5: 0.3, 8: 0.1, 12: 0.05, 20: 0.2}, "ddim": ddim}) == 8
    with pytest.raises(ValueError, match="empty"):
        ratios.enough({"dpmpp_2m": {5: 0.3}, "ddim": ddim})


def test_more_steps_come_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "REFERENCE", 60)
    monkeypatch.setattr(ratios, "CURVE", {"dpmpp_2m": (4, 16, 60), "ddim": (4, 16)})
    found = ratios.curve(SMALL, columns=2)
    assert found["dpmpp_2m"][60] == 0
    assert found["dpmpp_2m"][4] > found["dpmpp_2m"][16] > 0
    assert found["ddim"][4] > found["ddim"][16] > 0


def test_compiled_networks_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SemantiCodec, "from_pretrained", lambda: tiny.codec("mini"))
    monkeypatch.setattr(torch, "compile", lambda forward: lambda *given, **more: forward(*given, **more))
    result = ratios.measure_compiled(SMALL)
    assert set(result) == {"official: guided step", "mini: decode"}
    assert all(about["seconds_until_compiled"] > 0 and about["times_faster"] > 0 for about in result.values())


def test_the_parts_of_a_decoder(sgemm: Sgemm) -> None:
    result = ratios.measure_parts(SMALL, sgemm)
    assert set(result["rows"]) == {"contexts", "guided step", "VAE decoder", "vocoder", "window"}
    assert all(0 < share <= 1 for ops in result["hot"].values() for _, share in ops)


def test_the_published_decoder_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "Sgemm", lambda: Sgemm(64))
    result = ratios.measure_official(SMALL, torch.get_num_threads())
    times, peak = result["times_published"], result["machine"]["sgemm_gflops_per_cpu_second"]
    assert set(times) == {"guided step", "VAE decoder", "vocoder", "window", "default, 3 steps"}
    assert times["default, 3 steps"] > times["window"]
    assert times["vocoder"] == ratios.against_published("vocoder", result["rows"]["vocoder"]["timing"]["cpu"], peak)


def test_what_is_compared_is_held_to_the_same_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    most = torch.backends.cpu.get_cpu_capability()
    assert ratios.held_to_avx2(os.getenv, "ONEDNN_MAX_CPU_ISA") == ("AVX2" if most == "AVX512" else None)
    assert ratios.held_to_avx2(torch.backends.cpu.get_cpu_capability) == ("AVX2" if most == "AVX512" else most)
    assert not ratios.AVX2.keys() & os.environ.keys()
    assert os.environ["KEPT"] == "1"


def test_encoding_without_a_window_of_silence(monkeypatch: pytest.MonkeyPatch, sgemm: Sgemm) -> None:
    monkeypatch.setattr(ratios, "LONG", 3)
    mae = dataclasses.replace(CONFIG.encoder.mae, columns=64)  # the published windows
    result = ratios.measure_encode(
        dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, mae=mae)), sgemm
    )
    one, long = result["1"], result["3"]
    assert long["row"]["gflop"] == 3 * one["row"]["gflop"] > 0
    assert 1 < one["times_published_windows"]["median"] < 4
    assert 0.5 < long["times_published_windows"]["median"] < 4


def test_scaling_counts_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def preset(_: str) -> CodecConfig:
        return CONFIG

    monkeypatch.setattr(ratios, "preset", preset)
    monkeypatch.setattr(ratios, "timed", lambda *_: Timing(wall=0.5, cpu=1.0))
    rows = ratios.scaling("semanticodec-100-4096", "cpu", torch.float32, [1, 2], seconds=1)
    seen = [(row["batch"], row["networks"], row["way"]) for row in rows]
    assert seen == list(itertools.product((1, 2), ("plain", "recorded"), ("encode", "decode")))
    assert [(row["factor"], row["streams"]) for row in rows] == [(0.5, 2)] * 4 + [(0.25, 4)] * 4
    encode, decode = (row["tflops"] for row in rows[:2])
    assert [row["tflops"] for row in rows] == pytest.approx(
        [encode, decode] * 2 + [2 * encode, 2 * decode] * 2, rel=0.02
    )


def test_times_of_another_run_are_not_compared_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ratios, "RESULTS", tmp_path)
    monkeypatch.setattr(ratios, "Sgemm", lambda: Sgemm(64))
    monkeypatch.setattr(ratios, "curve", lambda _: {"dpmpp_2m": {8: 0.1}, "ddim": {50: 0.2}})
    about = {"official": {"rows": {}}, "official_machine": {"sgemm_gflops_per_cpu_second": 1}}
    (tmp_path / "ratios.json").write_text(json.dumps(about))
    monkeypatch.setattr(ratios, "held_to_avx2", lambda *_: {"rows": {}, "machine": {}})
    ratios.main(["--only", "solver", "official", "--write", "--threads", str(torch.get_num_threads())])
    assert "times_published" not in json.loads((tmp_path / "ratios.json").read_text())["solver"]


def test_parts_not_measured_now_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ratios, "RESULTS", tmp_path)
    monkeypatch.setattr(ratios, "Sgemm", lambda: Sgemm(64))
    monkeypatch.setattr(ratios, "measure_start", lambda: {"--help": 0.1})
    (tmp_path / "ratios.json").write_text('{"mini": 1}')
    threads = torch.get_num_threads()
    ratios.main(["--only", "start", "--write", "--threads", str(threads)])
    result = json.loads((tmp_path / "ratios.json").read_text())
    assert (result["mini"], result["start"]) == (1, {"--help": 0.1})
    assert result["start_machine"]["torch"] == torch.__version__
