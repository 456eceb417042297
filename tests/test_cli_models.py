"""The command `models`: one line per preset, its files, sizes and licences; and how commands warn."""

from __future__ import annotations

import warnings
from pathlib import Path

import huggingface_hub
import pytest
from typer.testing import CliRunner

from semanticodec import PRESETS, cli
from semanticodec.cli.jobs import user_errors
from semanticodec.errors import LicenceWarning
from semanticodec.systems import SYSTEMS


def listed(monkeypatch: pytest.MonkeyPatch, folder: Path, cached: dict[str, str]) -> dict[str, str]:
    monkeypatch.setenv("SEMANTICODEC_MODELS", str(folder))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda _repo, file: cached.get(file))
    result = CliRunner().invoke(cli.app, ["models"])
    assert result.exit_code == 0, result.output
    head, *lines = result.output.splitlines()
    assert head.split() == ["preset", "task", "size", "licence", "here", "looked", "for", "in"]
    return {line.split()[0]: line for line in lines}


def test_every_preset_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = listed(monkeypatch, tmp_path, {})
    assert list(lines) == [*PRESETS, "mini-sr", "mini-gen", *SYSTEMS]
    assert "  yes   /" in lines["mini-100"]
    assert " 0.05 GB " in lines["mini-100"]
    official = lines["semanticodec-100-4096"]
    assert official.endswith("models--haoheliu--SemantiCodec (from https://huggingface.co/haoheliu/SemantiCodec)")
    assert "  no    /" in official
    assert " 2.39 GB " in official
    assert " not stated; code MIT " in official
    assert " 8.54 GB " in lines["semanticodec-25-32768"]
    for name, system in SYSTEMS.items():
        assert "  no  " in lines[name]
        assert system.weights.source in lines[name]
        assert (", non-commercial" in lines[name]) != name.startswith("audiosr")
        assert str(tmp_path / name / system.weights.file) in lines[name]


def test_what_is_here_is_said_with_its_own_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "musicldm").mkdir()
    with (tmp_path / "musicldm" / "musicldm.ckpt").open("wb") as file:
        file.truncate(40_000_000)
    (tmp_path / "cached").write_bytes(b"x")
    halves = {f"semanticodec_tokenrate_50/{half}.ckpt": "there" for half in ("encoder", "decoder")}
    one = {"semanticodec_tokenrate_25/encoder.ckpt": "there"}
    lines = listed(monkeypatch, tmp_path, {"audioldm2-full.pth": str(tmp_path / "cached"), **halves, **one})
    assert " 0.04 GB " in lines["musicldm"]
    here = {name for name, line in lines.items() if "  yes  " in line}
    official = {name for name in PRESETS if name.startswith("semanticodec-50-")}
    assert here == {"mini-100", "mini-50", "mini-25", "mini-sr", "mini-gen", "musicldm", "audioldm2-full", *official}


@pytest.mark.filterwarnings("always")
def test_what_a_command_warns_of_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with user_errors():
        warnings.warn("not for\ncommercial use", LicenceWarning, stacklevel=1)
    assert capsys.readouterr().err == "semanticodec: not for commercial use\n"
    with pytest.warns(DeprecationWarning, match="old"), user_errors():
        warnings.warn("old", DeprecationWarning, stacklevel=1)
