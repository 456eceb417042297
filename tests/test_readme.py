"""The README's blocks are run as they stand, from top to bottom, in a folder that holds the shipped recordings.

Convention:

* every block fenced as ``python`` is executed; all of them share one namespace, as if typed into one session;
* a block fenced as ``sh run`` is executed by bash, stopping at the first error (GitHub still shows it as shell);
* a block fenced as plain ``sh`` is for the reader only (installation, servers that never end);
* recordings from ``semanticodec/assets`` lie in the working folder under their own names, and files that one block
  writes are there for the next.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import semanticodec


class Block(NamedTuple):
    line: int
    language: str
    code: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text, each with the line its code starts on."""
    fences = re.finditer(r"^```(\S[^\n]*)\n(.*?)^```[ \t]*$", text, flags=re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, m.start(2)) + 1, m[1].strip(), m[2]) for m in fences]


def execute(block: Block, namespace: dict[str, object], folder: Path) -> None:
    """Run one block in ``folder``; blocks of other languages are left alone."""
    if block.language == "python":
        # leading newlines make tracebacks name the README's own line
        exec(compile("\n" * (block.line - 1) + block.code, "README.md", "exec"), namespace)
    elif block.language == "sh run":
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.code],
            cwd=folder,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"README.md:{block.line}\n{block.code}\n{done.stdout}\n{done.stderr}"


def test_readme_blocks_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = blocks((root / "README.md").read_text())
    languages = [block.language for block in found]
    assert "python" in languages
    assert "sh run" in languages
    for recording in (Path(semanticodec.__file__).parent / "assets").iterdir():
        (tmp_path / recording.name).symlink_to(recording)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in found:
        execute(block, namespace, tmp_path)


def test_blocks_are_found_with_their_lines_and_languages():
    text = "# Title\n\n```python\nx = 1\n```\ntext\n```sh run\ntrue\n```\n```\nplain\n```\n"
    assert blocks(text) == [Block(4, "python", "x = 1\n"), Block(8, "sh run", "true\n")]


def test_a_failing_block_fails(tmp_path: Path):
    with pytest.raises(ZeroDivisionError):
        execute(Block(7, "python", "1 / 0\n"), {}, tmp_path)
    with pytest.raises(AssertionError, match=r"README\.md:7"):
        execute(Block(7, "sh run", "false\ntrue\n"), {}, tmp_path)
    execute(Block(7, "sh", "false\n"), {}, tmp_path)
