"""What only Lhotse can load: parts, mixtures and augmented versions of recordings, and what commands print."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import numpy as np

from ..errors import AudioError

PATIENCE = 600.0
"""Seconds that a command may take to print a recording."""


def load_cut(description: str) -> tuple[np.ndarray, int, float]:
    """Load a cut.

    Args:
        description: the cut as JSON; commands in it are run by a shell, as Lhotse does.

    Returns:
        float32 ``[channels, samples]``, the sample rate, and the cut's start in its recording in seconds.

    Raises:
        AudioError: Lhotse cannot load it, or a command failed or took too long.
    """
    from lhotse.audio.utils import AudioLoadingError, DurationMismatchError
    from lhotse.serialization import deserialize_item

    try:
        cut = deserialize_item(_without_commands(json.loads(description)))
        wave = np.ascontiguousarray(cut.load_audio(), np.float32)
    except (AudioLoadingError, DurationMismatchError, AssertionError, KeyError, TypeError) as error:
        raise AudioError(f"Lhotse cannot load this cut: {error}") from error
    return wave, cut.sampling_rate, getattr(cut, "start", 0.0)


def _without_commands(part: Any) -> Any:
    """Put what they print in the place of commands: Lhotse would wait for one that never ends."""
    if isinstance(part, list):
        return [_without_commands(one) for one in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "command" and "channels" in part:
        return {**part, "type": "memory", "source": _printed(part["source"])}
    return {name: _without_commands(one) for name, one in part.items()}


def _printed(command: str) -> bytes:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, shell=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, start_new_session=True
    ) as shell:
        try:
            out, told = shell.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(shell.pid, signal.SIGKILL)  # the shell alone would leave what it has started
            raise AudioError(f"`{command}` has not ended after {PATIENCE:g} s") from None
    if shell.returncode:
        last = told.decode(errors="replace").strip().splitlines()[-1:]
        raise AudioError(f"`{command}` ended with {shell.returncode}: {''.join(last)}")
    return out
