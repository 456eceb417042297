"""The training loop that all stages share, on Lightning Fabric: time-boxed, resumable, seeded, with curves."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.strategies.ddp import DDPStrategy
from rich.console import Console
from rich.progress import Progress, TextColumn, track
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)
Logs = dict[str, Tensor | float]
Precision = Literal["32-true", "bf16-mixed"]
T = TypeVar("T")
_CONSOLE = Console(stderr=True)


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
    precision: Precision = "32-true"
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


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, step: int, decay: float) -> None:
    """Move the weights of ``average`` towards those of ``module`` after optimisation step ``step``, counted from 0.

    The average is of few steps at first: its decay grows to ``decay`` as (1 + step) / (10 + step), as published.
    """
    keep = min(decay, (step + 1) / (step + 10))
    for mean, value in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, 1 - keep)


def channels_last(module: nn.Module) -> None:
    """Store convolution weights with channels innermost, which makes convolutions faster."""
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def rate_at(progress: float, step: int, peak: float, warmup: int = 100) -> float:
    """Return the learning rate: linear warm-up, then a cosine to a twentieth of the peak."""
    cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / warmup) * cosine


def launch(options: RunOptions) -> Fabric:
    """Start the processes of a run, one per device, and seed them, so that models built next are everywhere the same.

    Several devices train by data parallelism.  Token rates take turns and codes freeze, so that parameters go unused;
    codebooks keep their own averages in step, so that buffers need no copying.
    """
    strategy = (
        DDPStrategy(find_unused_parameters=True, broadcast_buffers=False, timeout=timedelta(hours=2))
        if options.devices > 1
        else "auto"
    )
    mixed = options.precision == "bf16-mixed"
    fabric = Fabric(
        accelerator=options.accelerator,
        strategy=strategy,
        devices=options.devices,
        plugins=[_Autocast("bf16-mixed", options.accelerator)] if mixed else None,
    )
    fabric.launch()
    fabric.seed_everything(options.seed, verbose=False)
    return fabric


class _Autocast(MixedPrecision):
    """Fabric's mixed precision with inputs left in float32: they are also what the losses compare with."""

    def convert_input(self, data: Any) -> Any:
        """Return ``data`` as it is."""
        return data


def train(stage: Stage, options: RunOptions, fabric: Fabric) -> Path:
    """Run a stage until its steps or its minutes are used up, continuing from its checkpoint if there is one.

    Args:
        stage: what to train; every rank calls with its own copy.
        options: how; ``options.out`` gets ``NAME.pt`` (the checkpoint) and ``tensorboard/NAME``.
        fabric: from :func:`launch`.

    Returns:
        The checkpoint's path.  A stage that had already ended leaves it untouched.
    """
    stage.setup(fabric)
    path = options.out / f"{stage.name}.pt"
    clock: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if path.exists():
        clock.update(fabric.load(path, stage.state(), weights_only=True))
        log.info("%s: continuing at step %d", stage.name, clock["step"])
    begin, logs = clock["step"], {}
    with _Report(stage, options, fabric, begin) as report:
        for index, progress in _schedule(clock, options, fabric):
            # What libraries draw from the global generators (new places for dead codes) follows from the step as well.
            fabric.seed_everything(options.seed + index, verbose=False)
            for optimizer in stage.optimizers():
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(progress, index, options.learning_rate)
            logs = stage.step(fabric, index, progress)
            if index % 25 == 0:
                report.curves(index, progress, logs)
            if index % options.evaluate_every == 0:
                report.held_out(index, progress, logs)
                _save(fabric, path, {**stage.state(), **clock, "step": index + 1})
        if clock["step"] > begin:
            _save(fabric, path, {**stage.state(), **clock})
            report.held_out(clock["step"], 1.0, logs)
    log.info("%s ended at step %d after %.1f min", stage.name, clock["step"], clock["seconds"] / 60)
    return path


def _save(fabric: Fabric, path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint that appears when it is complete; the one before it survives until then."""
    part = path.with_suffix(".part")
    fabric.save(part, state)
    if fabric.is_global_zero:
        part.replace(path)


def _schedule(clock: dict[str, Any], options: RunOptions, fabric: Fabric) -> Iterator[tuple[int, float]]:
    """Yield (step, progress in 0..1), keeping ``clock`` up to date, until the first limit is reached.

    All ranks follow the first one's clock, for they must stop at the same step.
    """
    while True:
        progress = max(clock["step"] / options.steps, clock["seconds"] / (60 * options.minutes))
        if progress >= 1:
            return
        begin = time.monotonic()
        yield clock["step"], progress
        clock["seconds"] = fabric.broadcast(clock["seconds"] + time.monotonic() - begin)
        clock["step"] += 1


class _Report:
    """Curves, pictures and sounds for TensorBoard, a line in the log, and a bar on a terminal; by rank zero alone."""

    def __init__(self, stage: Stage, options: RunOptions, fabric: Fabric, step: int) -> None:
        self.stage, self.active = stage, fabric.is_global_zero
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[loss]}"))
        self.bar = Progress(*columns, console=_CONSOLE, disable=not (self.active and sys.stderr.isatty()))
        self.task = self.bar.add_task(stage.name, total=1.0, loss="")
        folder = str(options.out / "tensorboard" / stage.name)
        # What an interrupted run had written after its last checkpoint is hidden.
        self.writer = SummaryWriter(folder, purge_step=step) if self.active else None

    def __enter__(self) -> _Report:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.writer:
            self.writer.close()

    def curves(self, index: int, progress: float, logs: Logs) -> None:
        """Add a step's losses."""
        if self.writer:
            _write(self.writer, "train", logs, index)
            self.bar.update(self.task, completed=progress, loss=_line(logs))

    def held_out(self, index: int, progress: float, train: Logs) -> None:
        """Evaluate the stage and write examples."""
        if self.writer:
            logs = self.stage.evaluate()
            _write(self.writer, "held_out", logs, index)
            self.stage.examples(self.writer, index)
            line = "%s step %d (%.0f%%): %s | held out: %s"
            log.info(line, self.stage.name, index, 100 * progress, _line(train), _line(logs))


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


def tracked(items: Iterable[T], description: str) -> Iterable[T]:
    """Show a bar on a terminal while ``items`` are gone through; elsewhere nothing."""
    return track(items, description=description, console=_CONSOLE, disable=not sys.stderr.isatty())
