"""``python -m semanticodec.training STAGE``: train one stage of mini (or mini-sr, mini-gen), or ``all`` in order."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checkpoints import WEIGHTS
from ..config import SAMPLE_RATE
from ..generation import MINI_GEN
from ..superres import MINI_SR
from .generator_stages import GENERATOR_RECIPES, GENERATOR_STAGES
from .loop import Precision, RunOptions
from .stages import RECIPES, STAGES, Session
from .superres_stages import SUPERRES_RECIPES, SUPERRES_STAGES

MODELS = {
    "mini": (STAGES, RECIPES, SAMPLE_RATE),
    MINI_GEN.name: (GENERATOR_STAGES, GENERATOR_RECIPES, SAMPLE_RATE),
    MINI_SR.name: (SUPERRES_STAGES, SUPERRES_RECIPES, MINI_SR.latent.mel.sample_rate),
}
"""Stages, their settings, and the sample rate of what they learn from."""


def main(
    stage: Annotated[str, typer.Argument(help=f"all, or one of {', '.join(STAGES)}")],
    model: Annotated[str, typer.Option(help=f"{' or '.join(MODELS)}, with its own stages")] = "mini",
    audio: Annotated[Path, typer.Option(help="folder with train_manifest.csv and its shards")] = Path(
        "../shared/audio/train"
    ),
    out: Annotated[Path | None, typer.Option(help="checkpoints, curves and caches [runs/MODEL]")] = None,
    weights: Annotated[Path | None, typer.Option(help="where export writes")] = None,
    minutes: Annotated[float | None, typer.Option(help="time box of each stage")] = None,
    steps: Annotated[int | None, typer.Option(help="at most this many steps per stage")] = None,
    batch: Annotated[int | None, typer.Option(help="rows per step")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 2,
    accelerator: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    devices: Annotated[int, typer.Option(help="how many")] = 1,
    precision: Annotated[Precision | None, typer.Option(help="of the networks that train")] = None,
    compile: Annotated[bool, typer.Option(help="compile the networks")] = False,
    seed: Annotated[int, typer.Option(help="of crops, masks and noise")] = 0,
) -> None:
    """Train one stage; run it again to continue where it stopped."""
    if model not in MODELS:
        raise typer.BadParameter(f"no model is called {model!r}; choose one of {', '.join(MODELS)}")
    stages, recipes, rate = MODELS[model]
    if stage != "all" and stage not in stages:
        raise typer.BadParameter(f"no stage is called {stage!r}; choose all or one of {', '.join(stages)}")
    out = out or Path("runs") / model
    level = logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)

    def options(name: str) -> RunOptions:
        recipe = recipes.get(name, RECIPES["latent"])  # the stages that do not train only need to know where
        return replace(
            recipe,
            out=out,
            steps=recipe.steps if steps is None else steps,
            minutes=recipe.minutes if minutes is None else minutes,
            batch=recipe.batch if batch is None else batch,
            seed=seed,
            accelerator=accelerator,
            devices=devices,
            precision=precision or recipe.precision,
            compile=compile,
        )

    optional = model == MINI_GEN.name  # the only recordings that name an instrument
    session = Session(audio, out, weights or WEIGHTS / model, options, rate=rate, optional=optional)
    for name in stages if stage == "all" else (stage,):
        stages[name](session)


if __name__ == "__main__":
    typer.run(main)
