"""Reads the recorded data of the published models: synthetic weights, inputs, outputs (their README has the rules)."""

import dataclasses
import importlib.util
import json
import lzma
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from semanticodec.bench.machine import machine
from semanticodec.keymap import OFFICIAL_DECODER, OFFICIAL_ENCODER, Rule, apply_rules

BOUND = 1e-4
"""Largest allowed error of float32 results, relative to the recorded output's standard deviation."""


class Goldens:
    """The goldens folder (see the fixture ``goldens``) with its own ``synth.py`` loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.synth = _load(folder / "synth.py")
        trimmed = folder / "manifests.json.xz"
        self._manifests = json.loads(lzma.decompress(trimmed.read_bytes())) if trimmed.is_file() else None
        if self._manifests is not None and "checkpoints" in self._manifests:
            self.synth.load_manifest = self._manifests.__getitem__
            self.synth.checkpoints = lambda: self._manifests["checkpoints"]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """Return the recorded arrays of ``<name>.npz``; skips the test where only a trimmed copy is at hand."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(f"{self.folder} is a trimmed copy without {name}")
        with np.load(path) as file:
            return dict(file)

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Return the entries of a manifest: key, shape and rule of every tensor of one published component."""
        return self.synth.load_manifest(name) if self._manifests is None else self._manifests[name]

    def checkpoint(self, name: str) -> dict[str, Tensor]:
        """Return a whole published checkpoint of the family, without its numbers (on the meta device)."""
        entries = self.synth.checkpoint_entries(name)
        return {e["key"]: torch.empty(e["shape"], dtype=getattr(torch, e["dtype"]), device="meta") for e in entries}

    def manifest(self, name: str, prefix: str) -> list[dict[str, Any]]:
        """Return the entries of a manifest, their keys without the ``prefix`` that all of them have."""
        entries = self.entries(name)
        assert all(entry["key"].startswith(prefix) for entry in entries)
        return [{"seed_key": entry["key"]} | entry | {"key": entry["key"][len(prefix) :]} for entry in entries]

    def shapes(self, name: str, prefix: str) -> dict[str, tuple[int, ...]]:
        """Return published key and shape of every tensor of a manifest."""
        return {entry["key"]: tuple(entry["shape"]) for entry in self.manifest(name, prefix)}

    def fill(self, module: nn.Module, name: str, prefix: str) -> None:
        """Give ``module`` the synthetic weights of a manifest, which must be exactly its own tensors."""
        # The rules take the whole published key.
        keys = [entry["key"] for entry in self.manifest(name, prefix)]
        filled = (torch.from_numpy(self.synth.fill(entry)) for entry in self.entries(name))
        module.load_state_dict(dict(zip(keys, filled, strict=True)))

    def load(self, module: nn.Module, *names: str) -> None:
        """Fill a codec (or its half) built on the meta device with manifests, by the checkpoints' own key map."""
        wanted = {name for name, _ in module.named_children()}
        state = {name: x for name, x in module.state_dict().items() if not x.is_meta}
        for name in names:
            encoder = name.startswith(("audiomae", "acoustic"))
            rules = OFFICIAL_ENCODER if encoder else OFFICIAL_DECODER
            for entry in self.entries(name):
                published = {entry["key"]: torch.empty(entry["shape"], device="meta")}
                for target, shape in apply_rules(rules, published, wanted)[0].items():
                    state[target] = torch.from_numpy(self.synth.fill(entry)).reshape(shape.shape)
        module.load_state_dict(state, strict=True, assign=True)

    def normal(self, key: str, shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Return the Gaussian input called ``key``."""
        return torch.from_numpy(self.synth.normal(key, shape, mean, std))

    def error(self, arrays: dict[str, np.ndarray], name: str, value: Tensor, samples: int | None = None) -> float:
        """Return the largest deviation from a recorded tensor.

        That is of the ``samples`` recorded values (None: as many as were recorded), relative to the tensor's standard
        deviation, and of the whole tensor's L2 norm, relative to itself.
        """
        array = value.numpy()
        if samples is None:
            samples = int(arrays.get(f"{name}.count", len(arrays[f"{name}.sample"])))
        assert array.shape == tuple(arrays[f"{name}.shape"]), name
        stride = int(arrays.get(f"{name}.stride", 1))
        seen = array.reshape(-1)[self.synth.sample_index(array.size, samples)[::stride]].astype(np.float64)
        _, std, norm, _ = arrays[f"{name}.stats"]
        point = np.abs(seen - arrays[f"{name}.sample"]).max() / max(std, 1e-12)
        return float(max(point, abs(np.linalg.norm(array.astype(np.float64)) / max(norm, 1e-12) - 1)))

    def signal(self, name: str) -> tuple[Tensor, int]:
        """Return a test signal as the codec sees it, ``[channels, samples]``, and its sample rate."""
        pcm = self.synth.signal_44k_stereo().T if name == "S44" else self.synth.signal(name)[None]
        return torch.from_numpy(pcm / np.float32(32768)), 44_100 if name == "S44" else 16_000

    @contextmanager
    def watch(
        self, arrays: dict[str, np.ndarray], modules: dict[str, nn.Module], samples: int | None = None
    ) -> Iterator[dict[str, float]]:
        """Collect, while a model runs, the errors of the outputs of its ``modules``, keyed by recorded name."""
        errors: dict[str, float] = {}

        # At once, because the model goes on to change some outputs in place.
        def hook(name: str) -> Any:
            return lambda _module, _args, output: errors.update({name: self.error(arrays, name, output, samples)})

        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        try:
            yield errors
        finally:
            for handle in handles:
                handle.remove()
        assert errors.keys() == modules.keys()


def check(
    request: pytest.FixtureRequest, errors: dict[str, float], bound: float = BOUND, *, part: tuple[str, str]
) -> None:
    """Hold errors against the bound, and leave the largest to the parity report, as (system, component) ``part``."""
    worst = max(errors, key=lambda name: errors[name])
    row = (*part, worst, errors[worst], bound)
    request.node.user_properties.append(("parity", row))
    assert errors[worst] < bound, errors


def check_equal(
    request: pytest.FixtureRequest,
    name: str,
    seen: np.ndarray,
    recorded: np.ndarray,
    part: tuple[str, str],
) -> None:
    """Demand equal integers, and leave the share of different ones to the parity report."""
    assert seen.shape == recorded.shape
    different = float((seen != recorded).mean())
    row = (*part, f"{name} ({seen.size} integers)", different, 0.0)
    request.node.user_properties.append(("parity", row))
    assert different == 0


@dataclass(frozen=True)
class Parity:
    """What one comparison found: where a component of a system differs most from what was recorded."""

    system: str
    component: str
    where: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; of integers, none may differ."""
        return self.error < self.bound or self.error == 0

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        parts = f"{self.system:<28} {self.component:<44} {self.error:8.1e} {self.bound:8.0e}"
        return f"{parts} {verdict}  {self.where}"


@dataclass(frozen=True)
class Coverage:
    """What becomes of the tensors of one published file."""

    checkpoint: str
    tensors: int
    mapped: int
    unmapped: int
    unfilled: int

    @property
    def dropped(self) -> int:
        """Tensors that are left out by name."""
        return self.tensors - self.mapped - self.unmapped

    def __str__(self) -> str:
        counts = (self.tensors, self.mapped, self.dropped, self.unmapped, self.unfilled)
        return f"{self.checkpoint:<44} " + " ".join(f"{count:8}" for count in counts)


KINDS = {"parity": Parity, "coverage": Coverage}


def measured(tests: Iterable[pytest.TestReport], kind: str) -> list[Any]:
    """Return the rows of one of :data:`KINDS` that tests left behind, in order."""
    rows = (row for test in tests if test.when == "call" for key, row in test.user_properties if key == kind)
    return [KINDS[kind](*row) for row in sorted(rows)]


def report(terminal: pytest.TerminalReporter) -> None:
    """Print what the tests measured: parity per system and component, and the coverage of the published files."""
    tests = [*terminal.getreports("passed"), *terminal.getreports("failed")]
    rows = measured(tests, "parity")
    if rows:
        terminal.section("parity with the published implementations")
        terminal.line("largest error relative to the recorded standard deviation (integers: share that differ)")
        terminal.line(f"{'system':<28} {'component':<44} {'error':>8} {'bound':>8}       where it is largest")
    for row in rows:
        terminal.line(str(row))
    covered = measured(tests, "coverage")
    if covered:
        terminal.section("tensors of the published checkpoints")
        terminal.line(f"{'checkpoint':<44} {'tensors':>8} {'mapped':>8} {'dropped':>8} {'unmapped':>8} {'unfilled':>8}")
    for row in covered:
        terminal.line(str(row))


def _name(row: dict[str, Any]) -> tuple[str, ...]:
    # Of integers several things may be compared for one component.
    parts = ("system", "component", "checkpoint", *(("where",) if row.get("bound") == 0 else ()))
    return tuple(row[part] for part in parts if part in row)


class Keeper:
    """Keeps what tests measure as ``parity.json`` and ``coverage.json`` in a folder, each test as it ends.

    A row replaces the one of the same name, so that a long run may be made in pieces.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.machine = folder, machine()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add what one test left behind."""
        for kind in KINDS:
            new = [dataclasses.asdict(row) for row in measured([report], kind)]
            if not new:
                continue
            path = self.folder / f"{kind}.json"
            old = json.loads(path.read_text())["rows"] if path.is_file() else []
            origin = {key: self.machine[key] for key in ("commit", "date")}
            rows = {_name(row): row for row in [*old, *(row | origin for row in new)]}
            text = {"machine": self.machine, "rows": [rows[key] for key in sorted(rows)]}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(text, indent=1) + "\n")


def places(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> int:
    """Return how many tensors of a file go somewhere: one may become several of ours."""
    compiled = [(re.compile(rule.pattern), rule.target) for rule in rules]
    targets = (next((target for pattern, target in compiled if pattern.fullmatch(name)), None) for name in tensors)
    return sum(target is not None for target in targets)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return key and shape of every tensor of a module."""
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("semanticodec_synth", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
