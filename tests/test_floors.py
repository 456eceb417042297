"""Who may import whom (design: floors), read off the source with ``ast`` and confirmed by a real import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import semanticodec

FLOORS = (
    ("errors", "values", "config", "wire", "tokens", "processes", "compiled"),
    ("audio", "bandlimit", "devices", "nn", "schedule", "diffusion", "graphs", "offload", "ranking"),
    ("latent", "checkpoints", "inverse", "keymap", "loading", "systems"),
    ("model", "windows", "conditioners", "family", "diffusers_layout"),
    ("codec", "controls", "generation", "superres", "editing", "regions"),
    ("streaming", "corpus", "datasets", "training", "published", "novelty", "novelty_page"),
    ("bench", "cli", "demo"),
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
STRANGERS = ({"nn", "diffusion"}, {"nn", "schedule"})
"""Units of one floor that do not know each other."""

HOMES = {
    "librosa": {"semanticodec.compiled"},
    "numba": {"semanticodec.compiled"},
    "lightning": {"semanticodec.training"},
    "ray": {"semanticodec.corpus.cluster"},
    "rich": {"semanticodec.cli", "semanticodec.demo", "semanticodec.training"},
    "phonemizer": {"semanticodec.conditioners"},
    "tensorboard": {"semanticodec.training"},
    "transformers": {"semanticodec.bench", "semanticodec.conditioners"},
    "typer": {"semanticodec.cli", "semanticodec.training", "server.__main__", "client.__main__"},
    "websockets": {"server", "client"},
}
"""The only places that may import these packages."""

TORCH = {"torch", "torchaudio", "lightning", "vector_quantize_pytorch"}


def sources(root: Path) -> dict[str, Path]:
    """Map dotted module names to files, for the three packages under ``root``."""
    files = (file for package in ("semanticodec", "server", "client") for file in (root / package).rglob("*.py"))
    return {".".join(file.relative_to(root).with_suffix("").parts): file for file in files}


def imports(module: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield (imported module, name taken from it or "") for every import statement, wherever it stands."""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from ((".".join([*base, *filter(None, [node.module])]), alias.name) for alias in node.names)


def unit(module: str, name: str = "") -> str:
    """Return which unit of the floors a module of semanticodec belongs to ("" for the package itself)."""
    parts = module.split(".")[1:] or ([name] if name in FLOOR else [])
    return parts[0] if parts and parts[0] != "__init__" else ""


def library_fault(module: str, target: str, name: str) -> str | None:
    here, there = unit(module), unit(target, name)
    if target.split(".")[0] in ("server", "client", "semanticodec_server", "semanticodec_client"):
        # the command line starts them
        return None if FLOOR[here] == FLOOR["cli"] else "the library knows neither server nor client"
    if target.split(".")[0] != "semanticodec":
        return f"{here} must not need torch" if FLOOR[here] == 0 and target.split(".")[0] in TORCH else None
    if not there:
        return "import from the module that defines it, not from the package"
    if there not in FLOOR:
        return f"{there} has no floor"
    if FLOOR[there] > FLOOR[here]:
        return f"{here} (floor {FLOOR[here]}) must not know {there} (floor {FLOOR[there]})"
    if here != there and any({here, there} <= pair for pair in STRANGERS):
        return f"{here} and {there} do not know each other"
    return None


def side_fault(module: str, target: str, name: str) -> str | None:
    side = module.split(".")[0]
    top, *rest = target.split(".")
    if top in TORCH:
        return None if module == "server.engine" else "torch only in the server's engine"
    if top in {"server", "client", "semanticodec_server", "semanticodec_client"} - {side}:
        return "server and client do not know each other"
    if top != "semanticodec":
        return None
    used = (rest or [name])[0] if rest[:1] == ["wire"] else ".".join(rest) or name
    # the client needs the codec only where it encodes or decodes by itself
    whole = side == "server" or module == "client.local"
    allowed = {"wire", "errors"} | (set(semanticodec.__all__) if whole and not rest else set())
    return None if used in allowed else f"{module} may use {'public names, ' * whole}wire and errors only"


def faults(module: str, source: str) -> list[str]:
    """Return what is wrong with the imports, and with the reading of pickles, of one module."""
    found = []
    for target, name in imports(module, source):
        home = HOMES.get(target.split(".")[0])
        if home and not any(module == place or module.startswith(place + ".") for place in home):
            found.append(f"{target} belongs in {' or '.join(sorted(home))}")
        if module != "semanticodec.__init__":
            library = module.startswith("semanticodec.")
            found.append((library_fault if library else side_fault)(module, target, name))
        if (target, name) == ("torch", "load"):
            found.append("say torch.load, so that it can be seen")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load" and module != "semanticodec.loading":
            found.append("torch.load belongs in loading")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True"
            found.append(None if safe else "torch.load needs weights_only=True")
    return [f"{module}: {fault}" for fault in found if fault]


def test_every_import_respects_the_floors(root: Path):
    modules = sources(root)
    assert {"semanticodec.config", "server.__init__", "client.__init__"} <= set(modules)
    homeless = {
        m for m in modules if m.startswith("semanticodec.") and unit(m) not in FLOOR and m != "semanticodec.__init__"
    }
    assert not homeless, f"give these a floor: {sorted(homeless)}"
    assert [fault for module, file in modules.items() for fault in faults(module, file.read_text())] == []


def test_benchmarks_leave_torch_load_alone(root: Path):
    for file in (root / "benchmarks").rglob("*.py"):
        names = {ast.unparse(n) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Attribute)}
        assert "torch.load" not in names, file


def test_no_import_cycles(root: Path):
    graph: dict[str, set[str]] = {}
    modules = sources(root)
    for module, file in modules.items():
        if not module.endswith("__init__"):
            pairs = imports(module, file.read_text())
            graph[module] = {t for pair in pairs for t in (pair[0], ".".join(pair)) if t in modules}
    while leaves := {module for module, targets in graph.items() if not targets & set(graph)}:
        graph = {module: targets for module, targets in graph.items() if module not in leaves}
    assert not graph, f"import cycle among {sorted(graph)}"


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("semanticodec.wire", "import torch", "must not need torch"),
        ("semanticodec.tokens", "def f():\n    from torch import Tensor", "must not need torch"),
        ("semanticodec.config", "from .audio import load", "must not know audio"),
        ("semanticodec.config", "from . import audio", "must not know audio"),
        ("semanticodec.nn.unet", "from ..diffusion import ddim", "do not know each other"),
        ("semanticodec.diffusion", "from .nn import unet", "do not know each other"),
        ("semanticodec.latent", "import semanticodec.codec", "must not know codec"),
        ("semanticodec.codec", "from . import SamplerOptions", "from the module that defines it"),
        ("semanticodec.codec", "from .helpers import x", "helpers has no floor"),
        ("semanticodec.codec", "import semanticodec_server", "neither server nor client"),
        ("semanticodec.codec", "import ray.data", "belongs in semanticodec.corpus.cluster"),
        ("semanticodec.corpus.run", "import ray", "belongs in semanticodec.corpus.cluster"),
        ("semanticodec.codec", "import torch\ntorch.load(f, weights_only=True)", "torch.load belongs in loading"),
        ("semanticodec.codec", "from torch import load", "say torch.load"),
        ("semanticodec.loading", "import torch\ntorch.load(f)", "needs weights_only=True"),
        ("server.session", "import torch", "only in the server's engine"),
        ("server.engine", "from semanticodec.codec import SemantiCodec", "public names, wire and errors only"),
        ("client.client", "from semanticodec import SemantiCodec", "wire and errors only"),
        ("client.client", "from semanticodec_server import app", "do not know each other"),
    ],
)
def test_the_rules_can_fail(module: str, source: str, complaint: str):
    assert any(complaint in fault for fault in faults(module, source)), faults(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("semanticodec.wire", "import numpy\nfrom .errors import WireError"),
        ("semanticodec.nn.unet", "import torch\nfrom ..config import UNetConfig\nfrom .vae import ResBlock"),
        ("semanticodec.codec", "from .latent import LatentDiffusion\nfrom .nn.audiomae import AudioMAE"),
        ("semanticodec.loading", "import torch\ntorch.load(f, weights_only=True)"),
        (
            "server.engine",
            "import torch\nfrom semanticodec import SemantiCodec, wire\nfrom semanticodec.wire import Message",
        ),
        ("client.client", "import websockets\nfrom semanticodec.errors import WireError\nfrom . import jitter"),
    ],
)
def test_the_rules_let_through_what_is_allowed(module: str, source: str):
    assert faults(module, source) == []


@pytest.mark.parametrize("module", ["errors", "config", "wire", "tokens"])
def test_the_lowest_floor_loads_no_torch(module: str):
    code = f"import sys, semanticodec.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
