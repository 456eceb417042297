"""Which machine, software and commit a figure comes from."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent

CODE = (".", ":!benchmarks/results", ":!README.md")
"""What figures depend on: not on earlier figures, nor on the tables of them."""


def machine() -> dict[str, str | int | bool]:
    """Say where and from what this runs; the commit is "unknown" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    checkout = git("rev-parse", "--show-toplevel") == str(ROOT)  # and not the environment's, of something else
    models = (line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name"))
    return {
        "cpu": next(models, platform.processor() or platform.machine()),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "semanticodec": importlib.metadata.version("semanticodec"),
        "commit": (checkout and git("rev-parse", "--verify", "HEAD")) or "unknown",
        "modified": checkout and bool(git("status", "--porcelain", "--untracked-files=no", "--", *CODE)),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
