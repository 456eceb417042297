"""``python -m semanticodec.training STAGE``: train one stage of mini, or ``all`` of them in order."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checkpoints import WEIGHTS
from .loop import Precision, RunOptions
from .stages import RECIPES, STAGES, Session


def main(
    stage: Annotated[str, typer.Argument(help=f"all, or one of {', '.join(STAGES)}")],
    audio: Annotated[Path, typer.Option(help="folder with train_manifest.csv and its shards")] = Path(
        "../shared/audio/train"
    ),
    out: Annotated[Path, typer.Option(help="checkpoints, curves and caches")] = Path("runs/mini"),
    weights: Annotated[Path, typer.Option(help="where export writes")] = WEIGHTS / "mini",
    minutes: Annotated[float | None, typer.Option(help="time box of each stage")] = None,
    steps: Annotated[int | None, typer.Option(help="at most this many steps per stage")] = None,
    batch: Annotated[int | None, typer.Option(help="rows per step")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    accelerator: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    devices: Annotated[int, typer.Option(help="how many")] = 1,
    precision: Annotated[Precision, typer.Option(help="of the networks that train")] = "32-true",
    compile: Annotated[bool, typer.Option(help="compile the networks")] = False,
    seed: Annotated[int, typer.Option(help="of crops, masks and noise")] = 0,
) -> None:
    """Train one stage; run it again to continue where it stopped."""
    if stage != "all" and stage not in STAGES:
        raise typer.BadParameter(f"no stage is called {stage!r}; choose all or one of {', '.join(STAGES)}")
    level = logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)

    def options(name: str) -> RunOptions:
        recipe = RECIPES.get(name, RECIPES["latent"])  # the stages that do not train only need to know where
        return replace(
            recipe,
            out=out,
            steps=recipe.steps if steps is None else steps,
            minutes=recipe.minutes if minutes is None else minutes,
            batch=recipe.batch if batch is None else batch,
            seed=seed,
            accelerator=accelerator,
            devices=devices,
            precision=precision,
            compile=compile,
        )

    session = Session(audio, out, weights, options)
    for name in STAGES if stage == "all" else (stage,):
        STAGES[name](session)


if __name__ == "__main__":
    typer.run(main)
