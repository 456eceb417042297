"""The training loop that all stages share, on Lightning Fabric: time-boxed, resumable, seeded, with curves."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from rich.progress import Progress, TextColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
Logs = dict[str, Tensor | float]


@dataclass(frozen=True)
class RunOptions:
    """How long, how wide and where a stage runs.

    The learning rate follows whichever of ``steps`` and ``minutes`` is further along, so that a time-boxed run still
    ends with a small one.
    """

    out: Path
    steps: int
    minutes: float
    batch: int
    learning_rate: float
    seed: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    precision: str = "32-true"
    compile: bool = False
    evaluate_every: int = 500


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str

    def setup(self, fabric: Fabric) -> None:
        """Move modules to the device and wrap them together with their optimisers."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return every optimiser; the loop sets their learning rates."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold (modules and optimisers), by name."""

    def step(self, fabric: Fabric, index: int, progress: float) -> Logs:
        """Take one optimisation step; return what to log."""

    def evaluate(self) -> Logs:
        """Return held-out losses."""

    def examples(self, writer: SummaryWriter, index: int) -> None:
        """Write pictures and sounds of held-out recordings."""


def descend(
    fabric: Fabric, loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer, clip: float = 1.0
) -> None:
    """Take one step down the gradient of ``loss``, clipped to norm ``clip``."""
    optimizer.zero_grad(set_to_none=True)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=clip)
    optimizer.step()


def adamw(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Return AdamW over the parameters that train, without weight decay on vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def rate_at(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate: linear warm-up, then a cosine to a twentieth of the peak."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * cosine


def train(stage: Stage, options: RunOptions) -> Path:
    """Run a stage until its steps or its minutes are used up, continuing from its checkpoint if there is one.

    Args:
        stage: what to train.
        options: how; ``options.out`` gets ``NAME.pt`` (the checkpoint) and ``tensorboard/NAME``.

    Returns:
        The checkpoint's path.
    """
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, precision=options.precision)  # type: ignore[arg-type]
    fabric.launch()
    fabric.seed_everything(options.seed, verbose=False)
    stage.setup(fabric)
    path = options.out / f"{stage.name}.pt"
    clock: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if path.exists():
        clock.update(fabric.load(path, stage.state()))
        log.info("%s: continuing at step %d", stage.name, clock["step"])
    writer = SummaryWriter(str(options.out / "tensorboard" / stage.name))

    def save() -> None:
        fabric.save(path, {**stage.state(), **clock})

    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"), disable=not _terminal()) as bar:
        task = bar.add_task(stage.name, total=1.0, loss="")
        for index, progress in _schedule(clock, options):
            for optimizer in stage.optimizers():
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(progress, index, options.learning_rate)
            logs = stage.step(fabric, index, progress)
            if index % 25 == 0:
                _write(writer, "train", logs, index)
                bar.update(task, completed=progress, loss=_line(logs))
            if index % options.evaluate_every == 0 and fabric.is_global_zero:
                held_out = stage.evaluate()
                _write(writer, "held_out", held_out, index)
                stage.examples(writer, index)
                log.info(
                    "%s step %d (%.0f%%): %s | held out: %s",
                    stage.name,
                    index,
                    100 * progress,
                    _line(logs),
                    _line(held_out),
                )
                save()
    save()
    held_out = stage.evaluate()
    _write(writer, "held_out", held_out, clock["step"])
    stage.examples(writer, clock["step"])
    log.info(
        "%s ended at step %d after %.1f min | held out: %s",
        stage.name,
        clock["step"],
        clock["seconds"] / 60,
        _line(held_out),
    )
    writer.close()
    return path


def _schedule(clock: dict[str, Any], options: RunOptions) -> Iterator[tuple[int, float]]:
    """Yield (step, progress in 0..1), keeping ``clock`` up to date, until the first limit is reached."""
    while True:
        progress = max(clock["step"] / options.steps, clock["seconds"] / (60 * options.minutes))
        if progress >= 1:
            return
        begin = time.monotonic()
        yield clock["step"], progress
        clock["seconds"] += time.monotonic() - begin
        clock["step"] += 1


def mean_logs(evaluate: Callable[[int], Logs], batches: int) -> Logs:
    """Average the logs of ``evaluate(0) .. evaluate(batches - 1)`` without gradients."""
    with torch.no_grad():
        results = [evaluate(index) for index in range(batches)]
    return {key: sum(float(result[key]) for result in results) / batches for key in results[0]}


def _write(writer: SummaryWriter, group: str, logs: Logs, index: int) -> None:
    for key, value in logs.items():
        writer.add_scalar(f"{group}/{key}", float(value), index)


def _line(logs: Logs) -> str:
    return " ".join(f"{key} {float(value):.4f}" for key, value in logs.items())


def _terminal() -> bool:
    return sys.stderr.isatty()
