"""Networks of fixed shapes as recordings: a CUDA graph launches in one call what Python would launch kernel by kernel.

A replay runs the very kernels that were recorded, so that a recorded network computes what it did before, to the bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError

Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Takes a function without arguments; returns its outputs and what fills them anew from the present inputs."""
WARM_UP = 3
"""Calls before recording, in which libraries choose their algorithms and set memory aside."""


def cuda_recorder(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Record a CUDA graph (a :data:`Recorder`)."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return outputs, graph.replay


def rerun_recorder(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """Stand in for a CUDA graph on any device (a :data:`Recorder`): run again, into the same outputs."""
    outputs = run()

    def replay() -> None:
        for old, new in zip(_tensors(outputs), _tensors(run()), strict=True):
            old.copy_(new)

    return outputs, replay


class Graphed:
    """Call a function of tensors through recordings, one for each combination of shapes.

    Arguments and results may be tensors, None, numbers, strings, and tuples, lists and dataclasses of them.  What is
    not a tensor belongs to the combination.  A recording keeps its inputs and outputs in memory of its own: arguments
    are copied in unless they are the very tensors of the call before, and results are copied out.
    """

    def __init__(self, function: Callable[..., Any], recorder: Recorder = cuda_recorder) -> None:
        self._function, self._recorder = function, recorder
        self._recordings: dict[object, _Recording] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Call the function.

        Raises:
            ConfigError: an argument of a kind that cannot be recorded.
        """
        # A recording holds the kernels of the precision that was on when it was made.
        key = _precision(arguments), _signature(arguments)
        if key not in self._recordings:
            self._recordings[key] = _Recording(self._function, arguments, self._recorder)
        return self._recordings[key](arguments)


class _Recording:
    """One combination of shapes: buffers for the inputs, the outputs, and how to fill them."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], recorder: Recorder) -> None:
        # Outside inference mode: tensors made inside it cannot be written to outside.
        with torch.inference_mode(False), torch.no_grad():
            held = _mapped(arguments, lambda tensor: tensor.clone(memory_format=torch.preserve_format))
        self._buffers = list(_tensors(held))
        self._seen: list[tuple[Tensor, int] | None] = [None] * len(self._buffers)

        def run() -> Any:
            with torch.inference_mode():
                return function(*held)

        self._outputs, self._replay = recorder(run)

    @torch.inference_mode()
    def __call__(self, arguments: tuple[Any, ...]) -> Any:
        for index, (buffer, tensor) in enumerate(zip(self._buffers, _tensors(arguments), strict=True)):
            seen = self._seen[index]
            # Tensors of inference mode do not count their changes; they are copied every time.
            if seen is not None and seen[0] is tensor and seen[1] == tensor._version:
                continue
            buffer.copy_(tensor)
            self._seen[index] = None if tensor.is_inference() else (tensor, tensor._version)
        self._replay()
        return _mapped(self._outputs, lambda tensor: tensor.clone(memory_format=torch.preserve_format))


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        yield from value
    else:
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nested value in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list) or dataclasses.is_dataclass(value):
        for part in _parts(value):
            yield from _tensors(part)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    named = hasattr(value, "_fields") or dataclasses.is_dataclass(value)
    if named and not isinstance(value, type):
        return type(value)(*(_mapped(part, change) for part in _parts(value)))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(part, change) for part in value)
    return value


def _precision(value: Any) -> torch.dtype | None:
    """Return what autocast computes in on the device of the first tensor; None where it is off."""
    kind = next((tensor.device.type for tensor in _tensors(value)), "cpu")
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _signature(value: Any) -> object:
    """Return what a recording depends on besides the numbers in its tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return type(value), tuple(_signature(part) for part in _parts(value))
    if value is None or isinstance(value, int | float | str):
        return type(value), value  # 1, 1.0 and True are equal, and not the same
    raise ConfigError(f"a {type(value).__name__} cannot be an argument of a recorded network")
