"""The parity and coverage tables: kept test by test, replaced by name, and laid out for the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden import Coverage, Keeper, Parity, measured

from benchmarks import readme

UNET = ("audioldm-s-full", "U-Net, every block", "t500", 2e-5, 1e-4)
LARGER = ("audioldm-m-full", "U-Net, every block", "t1", 3e-5, 1e-4)


def ended(*rows: tuple[object, ...], kind: str = "parity", when: str = "call") -> pytest.TestReport:
    properties = [(kind, row) for row in rows]
    return pytest.TestReport("x", ("x", 0, "x"), {}, "passed", None, when, user_properties=properties)  # type: ignore[arg-type]


def test_rows() -> None:
    assert [row.passed for row in (Parity(*UNET), Parity("a", "b", "c", 2e-4, 1e-4), Parity("a", "b", "c", 0, 0))] == [
        True,
        False,
        True,
    ]
    assert str(Parity("a", "b", "c", 0.5, 0)).split() == ["a", "b", "5.0e-01", "0e+00", "FAIL", "c"]
    assert str(Coverage("file", 10, 6, 1, 2)).split() == ["file", "10", "6", "3", "1", "2"]
    assert measured([ended(UNET, LARGER), ended(UNET, when="setup")], "parity") == [Parity(*LARGER), Parity(*UNET)]


def test_rows_are_kept_and_replaced_by_name(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path)
    keeper.pytest_runtest_logreport(ended())
    assert not list(tmp_path.iterdir())
    keeper.pytest_runtest_logreport(
        ended(UNET, ("all", "schedule", "steps", 0.0, 0.0), ("all", "schedule", "t", 0.0, 0.0))
    )
    Keeper(tmp_path).pytest_runtest_logreport(ended((*UNET[:2], "t999", 4e-5, 1e-4), LARGER))
    kept = json.loads((tmp_path / "parity.json").read_text())
    assert [(row["system"], row["where"]) for row in kept["rows"]] == [
        ("all", "steps"),
        ("all", "t"),
        ("audioldm-m-full", "t1"),
        ("audioldm-s-full", "t999"),
    ]
    assert kept["machine"]["commit"] == kept["rows"][0]["commit"]


def test_tables_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    keeper = Keeper(tmp_path)
    keeper.pytest_runtest_logreport(ended(UNET, LARGER, ("semanticodec", "U-Net", "t1", 1e-5, 1e-4)))
    for setting, error in (("S4_eta0", 2e-4), ("S4_eta1", 3e-4)):
        keeper.pytest_runtest_logreport(ended(("audiosr-basic", f"DDIM {setting}", "latent", error, 1e-3)))
    keeper.pytest_runtest_logreport(ended(("x", "vocoder", "wav", 2e-4, 1e-4)))
    keeper.pytest_runtest_logreport(ended(("semanticodec-50", "U-Net", "t1", 2e-5, 1e-4)))
    assert readme.parity(codec=True).splitlines()[2:] == [
        "| U-Net | semanticodec: 1.0e-05; semanticodec-50: 2.0e-05 | 1e-04 | yes |"
    ]
    assert readme.parity().splitlines()[2:] == [
        "| U-Net | audioldm-m-full: 3.0e-05; audioldm-s-full: 2.0e-05 | 1e-04 | yes |",
        "| DDIM | audiosr-basic: 3.0e-04 | 1e-03 | yes |",
        "| vocoder | x: 2.0e-04 | 1e-04 | **no** |",
    ]
    for name in ("a", "b"):
        keeper.pytest_runtest_logreport(ended((name, 10, 6, 0, 0), kind="coverage"))
    assert readme.coverage().splitlines()[2:] == ["| a, b | 10 | 6 | 4 | 0 | 0 |"]
