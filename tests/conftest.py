"""What all tests share: thread count, hypothesis profiles, and where the recorded reference outputs lie."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

# Before torch is first imported: the same number of threads, and so the same summation order, on every machine; one
# in each of several test processes, which would otherwise wait for each other.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

# Models are slow at first use and machines are shared: no deadlines. In CI the same examples every time.
settings.register_profile("local", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of recorded outputs of the published implementation (``SEMANTICODEC_GOLDENS`` overrides it)."""
    folder = Path(os.environ.get("SEMANTICODEC_GOLDENS", ROOT.parent / "shared" / "goldens" / "semanticodec"))
    return folder if (folder / "synth.py").is_file() else ROOT / "tests" / "goldens"


@pytest.fixture(scope="session")
def family(goldens: Path) -> Path:
    """The folder of recorded outputs of the published AudioLDM, AudioLDM 2, MusicLDM and AudioSR."""
    folder = goldens.parent / "ldm"
    return folder if (folder / "synth.py").is_file() else ROOT / "tests" / "goldens" / "ldm"


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """Put back what a tokeniser does to torch's number of threads."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=Path, metavar="FOLDER", help="keep the parity and coverage tables there as JSON")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--keep")
    if folder is not None and not hasattr(config, "workerinput"):
        import golden  # see below

        config.pluginmanager.register(golden.Keeper(folder))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import golden  # not before torch's threads are set, nor by runs that need no torch

    golden.report(terminalreporter)
