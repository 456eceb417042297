"""The cost of a solver step: what is counted, and what the command prints and keeps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import family, readme
from benchmarks.measure import Sgemm, gflop
from semanticodec.config import HiFiGANConfig, LatentConfig, UNetConfig, VAEConfig
from semanticodec.systems import SYSTEMS

TINY = dataclasses.replace(
    SYSTEMS["audioldm2-full"],
    latent=LatentConfig(
        unet=UNetConfig(
            base=16, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, contexts=(None, 768), groups=4
        ),
        vae=VAEConfig(base=8, res_blocks=1, groups=4),
        vocoder=HiFiGANConfig(base=32),
    ),
    samples=16 * 640,
)


@pytest.mark.parametrize("name", ["audioldm-s-full", "audioldm2-full", "audioldm2-speech-ljspeech", "audiosr-basic"])
def test_every_kind_of_condition_is_counted(name: str) -> None:
    step = family.Step(SYSTEMS[name], "meta")
    assert step.x.shape[2] * SYSTEMS[name].latent.step_samples == SYSTEMS[name].samples
    counts = {part: gflop(run) for part, run in step.parts().items()}
    assert 100 < counts["guided step"] < 1500
    assert (counts["contexts"] > 0) == (name != "audiosr-basic")


def test_the_command_prints_and_keeps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(family, "system", lambda _name: TINY)
    monkeypatch.setattr(family, "RESULTS", tmp_path)
    monkeypatch.setattr(family, "Sgemm", lambda: Sgemm(64))
    family.main(["--threads", str(torch.get_num_threads()), "--repeats", "1", "--write"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "audioldm2-full, random weights, float32, 0.64 s of sound"
    assert lines[5].startswith("guided step")
    kept = json.loads((tmp_path / "family-audioldm2-full.json").read_text())
    assert [row["part"] for row in kept["rows"]] == ["contexts", "guided step"]
    assert kept["rows"][1]["share"] > 0
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert f"| audioldm2-full: guided step | {kept['rows'][1]['gflop']:.1f} |" in readme.step()
