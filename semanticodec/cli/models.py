"""``semanticodec models``: every preset, what it is for, its licence, and where its files are looked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

OFFICIAL = {100: 2.38, 50: 4.13, 25: 8.14}
"""10**9 bytes of the official codec's two checkpoints, by token rate."""


class Row(NamedTuple):
    """One line of the table; sizes in 10**9 bytes."""

    name: str
    task: str
    gigabytes: float
    licence: str
    place: str
    present: bool


def models() -> None:
    """List every preset: task, size, licence, where its files are looked for, and whether they are there."""
    lines = [["preset", "task", "size", "licence", "here", "looked for in"], *(_cells(row) for row in rows())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cells(row: Row) -> list[str]:
    return [row.name, row.task, f"{row.gigabytes:.2f} GB", row.licence, "yes" if row.present else "no", row.place]


def rows() -> Iterator[Row]:
    """Yield the presets of the codec, our other small models, and the systems of the family."""
    import huggingface_hub

    from ..checkpoints import HUB, MODEL, WEIGHTS
    from ..config import PRESETS
    from ..family import expected, present
    from ..generation import MINI_GEN
    from ..superres import MINI_SR
    from ..systems import SYSTEMS

    shipped = WEIGHTS / "mini"
    for config in PRESETS.values():
        if config.name.startswith("mini"):
            yield Row(config.name, "codec", _size(shipped), "MIT (data: its README)", str(shipped), shipped.is_dir())
        else:
            folder = f"semanticodec_tokenrate_{config.token_rate}"
            here = _cached(HUB, f"{folder}/encoder.ckpt") and _cached(HUB, f"{folder}/decoder.ckpt")
            table = 4e-9 * config.encoder.semantic_size * config.feature_dim
            place = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{HUB.replace('/', '--')}"
            source = "" if here else f" (from https://huggingface.co/{HUB})"
            size = OFFICIAL[config.token_rate] + table
            yield Row(config.name, "codec", size, "not stated; code MIT", f"{place}{source}", here)
    for name, task in ((MINI_SR.name, "super-resolution"), (MINI_GEN.name, "label to sound")):
        own = WEIGHTS / name
        here = (own / MODEL).is_file()
        yield Row(name, task, _size(own), "MIT (data: its README)", str(own), here)
    for system in SYSTEMS.values():
        weights, found = system.weights, present(system)
        place = expected(system) if found is None else found
        source = f" (from {weights.source})" if found is None else ""
        size = weights.gigabytes if found is None else found.stat().st_size / 1e9
        licence = weights.licence + ("" if weights.commercial else ", non-commercial")
        yield Row(system.name, system.task, size, licence, f"{place}{source}", found is not None)


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def _cached(repository: str, file: str) -> bool:
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str)
