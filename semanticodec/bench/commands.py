"""Codecs that are programs: Opus, Codec 2, Speex, MP3, AAC, and any other by two lines of configuration."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import soundfile

from ..audio import HIGHEST_RATE, LOWEST_RATE, load, resample, save
from ..config import SAMPLE_RATE
from ..errors import AudioError, ConfigError
from .clips import Clip, Wave
from .codecs import LIBRARIES, READING, About, Coded, sources, versions
from .folders import recordings
from .payloads import CODEC2, NET_BITS, Payload

LAUNCHER = """
import ctypes, os, sys
told, *command = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    command = ["sh", "-c", '"$@" &', "sh", *command]
first, code, most = os.posix_spawnp(command[0], command, os.environ), 0, 0
try:
    while True:
        pid, status, usage = os.wait4(-1, 0)
        code = max(code, abs(os.waitstatus_to_exitcode(status)))
        if pid != first or sys.platform != "linux":
            most = max(most, usage.ru_maxrss)
except ChildProcessError:
    open(told, "a").write(f"{most} ")
sys.exit(code)
"""
"""Start a program and note its most resident memory.

On Linux that begins with the memory of the process that started the program: a shell, of 1 MB, which ends at once and
leaves the program to this one.
"""
TIMEOUT = 300
"""Seconds that a program may take with one clip."""
RANGES = {
    "rate": (LOWEST_RATE, HIGHEST_RATE),
    "delay": (0, 60),
    "frame": (0, HIGHEST_RATE),
    "packet": (0, HIGHEST_RATE),
}
"""Least and most of what a TOML file may say of a command."""


@dataclass(frozen=True)
class Command:
    """A codec that two commands run: ``{input}``, ``{coded}`` and ``{output}`` stand for files.

    Args:
        name: of the codec at this setting.
        encode: command from ``{input}`` (a WAV file, or headerless samples) to ``{coded}``.
        decode: command from ``{coded}`` to ``{output}``.
        family: which curve it belongs to.
        rate: sample rate in Hz of ``{input}``, mono, 16 bits.
        raw: whether both ends are headerless little-endian samples.
        payload: what of the coded file counts as net bits: all of it, the packets of an Ogg stream without its two
            header packets, AAC or MP3 frames without their headers, or frames of Codec 2 without what fills them up
            to bytes.
        ending: of the coded file's name.
        delay: algorithmic delay in seconds, if known.
        frame: samples of a frame at ``rate``, of programs that would keep the end of a clip: silence of the delay and
            one frame goes behind the clip, and net bits are those of the frames that the clip itself has; else 0.
        packet: samples of a packet at ``rate``, where packets vary in length; else 0.
        files: that the programs read beside those their commands name, as a model that a script opens, and folders of
            such: decodes in the cache are found by them too.
    """

    name: str
    encode_command: str
    decode_command: str
    family: str = ""
    rate: int = SAMPLE_RATE
    raw: bool = False
    payload: Payload = "file"
    ending: str = ".bin"
    delay: float | None = None
    frame: int = 0
    packet: int = 0
    files: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """Say which program is not installed, or which of its files is not there."""
        for file in self.files:
            if not Path(file).exists():
                return f"there is no file {file}"
        for command in (self.encode_command, self.decode_command):
            program = shlex.split(command)[0]
            if shutil.which(program) is None:
                return f"{program} is not installed"
        return None

    def about(self) -> About:
        """Say which commands it is."""
        packet = self.packet / self.rate if self.packet else None
        return About(self.family or self.name, self.encode_command, self.rate, self.delay, packet=packet)

    def fingerprint(self) -> str:
        """Name the programs and this adapter by their content, and the libraries that they load by size and time.

        Scripts and models that a command names count by their content too, what lies in folders by size and time.
        """
        digests: list[str] = []
        for command in (self.encode_command, self.decode_command):
            names = sorted(set(_names(command)))
            # Shells, env and nice start programs that are words like others.
            programs = [path for name in names if (path := shutil.which(name))]
            digests += map(_digest, [*programs, *(name for name in names if os.path.isfile(name))])
            folders = (Path(name) for name in names if os.path.isdir(name) and not _is_worked_in(name))
            digests += [line for folder in folders for line in _listing(folder)]
            digests += [line for path in programs for line in _libraries(path)]
        for file in map(Path, self.files):
            digests += [_digest(file)] if file.is_file() else _listing(file)
        made_by = sources(*READING, "bench/codecs", "bench/commands", "bench/payloads"), versions(*LIBRARIES)
        return "/".join((str(dataclasses.astuple(self)), *digests, *made_by))

    def encode(self, clip: Clip, launcher: Sequence[str] = ()) -> Coded:
        """Run the first command on the clip.

        Args:
            clip: any.
            launcher: words before the command.

        Returns:
            The coded file, and the net bits in it.

        Raises:
            AudioError: the program failed or took too long, or the file is not of the format that ``payload`` names.
        """
        import torch

        wave = resample(torch.from_numpy(clip.wave), SAMPLE_RATE, self.rate)
        own = None
        if self.frame:
            own = -(-len(wave) // self.frame)
            frames = -(-(len(wave) + math.ceil((self.delay or 0) * self.rate)) // self.frame) + 1
            wave = torch.nn.functional.pad(wave, (0, frames * self.frame - len(wave)))
        with tempfile.TemporaryDirectory() as folder:
            files = self._files(Path(folder))
            if self.raw:
                pcm = (wave.clamp(-1, 1) * 32767).round().short().numpy()
                files["input"].write_bytes(pcm.astype("<i2").tobytes())
            else:
                save(files["input"], wave, self.rate)
            _run(self.encode_command, files, "coded", launcher)
            data = files["coded"].read_bytes()
        return Coded(data, sum(NET_BITS[self.payload](data)[:own]))

    def decode(self, coded: Coded, clip: Clip, launcher: Sequence[str] = ()) -> Wave:  # noqa: ARG002
        """Run the second command on the coded file.

        Args:
            coded: what :meth:`encode` returned.
            clip: not used.
            launcher: words before the command.

        Returns:
            Samples ``[S']`` at 16 kHz, the program's delay and what fills up its last frame among them.

        Raises:
            AudioError: the program failed or took too long, or wrote no sound.
        """
        with tempfile.TemporaryDirectory() as folder:
            files = self._files(Path(folder))
            files["coded"].write_bytes(coded.data)
            _run(self.decode_command, files, "output", launcher)
            if self.raw:
                data, rate = soundfile.read(
                    files["output"],
                    dtype="float32",
                    always_2d=True,
                    samplerate=self.rate,
                    channels=1,
                    format="RAW",
                    subtype="PCM_16",
                    endian="LITTLE",
                )
                import torch

                wave = torch.from_numpy(data[:, 0])
            else:
                channels, rate = load(files["output"])
                wave = channels.mean(0)
        result: Wave = resample(wave, rate, SAMPLE_RATE).numpy()
        return result

    def peak_memory(self, clip: Clip) -> int:
        """Measure the memory of the two programs.

        Args:
            clip: to be coded and decoded.

        Returns:
            The most resident bytes of either.

        Raises:
            AudioError: as :meth:`encode` and :meth:`decode`.
        """
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "told"
            launcher = (sys.executable, "-I", "-S", "-c", LAUNCHER, str(told))
            self.decode(self.encode(clip, launcher), clip, launcher)
            return max(map(int, told.read_text().split())) * (1 if sys.platform == "darwin" else 1024)

    def _files(self, folder: Path) -> dict[str, Path]:
        sound = ".raw" if self.raw else ".wav"
        return {
            "input": folder / f"input{sound}",
            "coded": folder / f"coded{self.ending}",
            "output": folder / f"output{sound}",
        }


def _names(command: str) -> Iterator[str]:
    """Yield what a command may name files by: its words, what follows an = in one, and the same of quoted commands."""
    shell = shlex.shlex(command, posix=True, punctuation_chars=True)
    shell.whitespace_split, shell.commenters = True, ""
    try:
        words = {*shlex.split(command), *shell}
    except ValueError:  # a word that is no command: an apostrophe
        return
    for word in words:
        yield from {word, word.rpartition("=")[2]} - {""}
        if word != command:
            yield from _names(word)


def _digest(file: str | Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _is_worked_in(folder: str) -> bool:
    """Tell whether a folder is none of a model, but one that changes while this runs, or has such a one below it."""
    places = (".", tempfile.gettempdir(), os.path.expanduser("~"))
    return any(Path(place).resolve().is_relative_to(Path(folder).resolve()) for place in places)


def _listing(folder: Path) -> Iterator[str]:
    """Yield path, size and time of what lies in a folder: models are large, and this is asked for every clip."""
    for file in recordings(folder):
        if file.is_file() and "__pycache__" not in file.parts:  # which a program writes when it first runs
            yield f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}"


@functools.cache
def _libraries(program: str) -> tuple[str, ...]:
    """Return path, size and time of what a program is linked with, where ``ldd`` tells."""
    if (ldd := shutil.which("ldd")) is None:
        return ()
    told = subprocess.run([ldd, program], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL).stdout
    paths = sorted(path.resolve() for word in told.split() if (path := Path(word)).is_absolute() and path.is_file())
    return tuple(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths)


def _run(command: str, files: dict[str, Path], made: str, launcher: Sequence[str]) -> None:
    # Split first, so that no name of a file is ever read as shell syntax or as two words.
    words = [*launcher, *(_filled(word, files) for word in shlex.split(command))]
    try:
        done = subprocess.run(words, capture_output=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        raise AudioError(f"{command}: not finished after {TIMEOUT} s") from None
    if done.returncode or not files[made].is_file() or not files[made].stat().st_size:
        said = (done.stderr or done.stdout).decode(errors="replace").strip()[-300:]
        raise AudioError(f"{command}: exit code {done.returncode}, {{{made}}} is {_size(files[made])}: {said}")


def _filled(word: str, files: dict[str, Path]) -> str:
    for name, path in files.items():  # other braces are the program's own
        word = word.replace(f"{{{name}}}", str(path))
    return word


def _size(path: Path) -> str:
    return f"{path.stat().st_size} bytes long" if path.is_file() else "missing"


OPUS = (6, 8, 12, 16, 24)
SPEEX = ((8000, 2), (16000, 1), (16000, 3))
"""Sample rate and quality."""
MP3 = (8, 16, 24)
AAC = (12, 16, 24)


def classical() -> Iterator[Command]:
    """Yield the codecs that Debian's opus-tools, codec2, speex and ffmpeg run, all asked for mono.

    Delays are those of the methods at their default frames: Opus 20 ms + 6.5 ms, Codec 2 40 ms + 40 ms (20 ms frames
    at 2400 and 3200), Speex 20 ms + 10 or 14 ms.
    """
    for kbps in OPUS:
        yield Command(
            f"opus-{kbps}",
            f"opusenc --quiet --bitrate {kbps} {{input}} {{coded}}",
            "opusdec --quiet {coded} {output}",
            family="Opus",
            payload="ogg",
            ending=".opus",
            delay=0.0265,
            packet=320,
        )
    for name, (_, frame) in CODEC2.items():
        mode = name.removeprefix("codec2-").upper()
        yield Command(
            name,
            f"c2enc {mode} {{input}} {{coded}}",
            f"c2dec {mode} {{coded}} {{output}}",
            family="Codec 2",
            rate=8000,
            raw=True,
            payload=name,
            delay=2 * frame / 8000,
            frame=frame,
        )
    for rate, quality in SPEEX:
        band = "nb" if rate == 8000 else "wb"
        yield Command(
            f"speex-{band}-q{quality}",
            f"speexenc --{'narrowband' if band == 'nb' else 'wideband'} --quality {quality} {{input}} {{coded}}",
            "speexdec {coded} {output}",
            family=f"Speex {band.upper()}",
            rate=rate,
            payload="ogg",
            ending=".spx",
            delay=0.03 if band == "nb" else 0.034,
            frame=rate // 50,
        )
    ffmpeg = "ffmpeg -nostdin -loglevel error -y -i"
    for kbps in MP3:
        yield Command(
            f"mp3-{kbps}",
            f"{ffmpeg} {{input}} -codec:a libmp3lame -b:a {kbps}k -write_xing 0 -id3v2_version 0 {{coded}}",
            f"{ffmpeg} {{coded}} {{output}}",
            family="MP3",
            payload="mp3",
            ending=".mp3",
            packet=576,
        )
    for kbps in AAC:
        yield Command(
            f"aac-{kbps}",
            f"{ffmpeg} {{input}} -codec:a aac -b:a {kbps}k {{coded}}",
            f"{ffmpeg} {{coded}} {{output}}",
            family="AAC",
            payload="adts",
            ending=".aac",
            packet=1024,
        )


def configured(path: Path) -> list[Command]:
    """Read codecs from a TOML file, a table each, of which two lines are needed.

    ::

        [lyra-3200]
        encode = "lyra_encoder --input {input} --output {coded} --bitrate 3200"
        decode = "lyra_decoder --input {coded} --output {output}"

    Further keys: rate (Hz, 16000), raw (false), payload ("file"), ending (".bin"), family, delay (s), frame and packet
    (samples at rate, see :class:`Command`), files (a list of files and folders: what the programs read that the
    commands do not name).

    Args:
        path: of the file.

    Returns:
        A codec per table.

    Raises:
        ConfigError: a key is missing or unknown, or a value is of the wrong type or out of range.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    return [_configured(path, name, table) for name, table in tables.items()]


def _configured(path: Path, name: str, table: object) -> Command:
    kinds = {"family": str, "rate": int, "raw": bool, "payload": str, "ending": str, "delay": float}
    kinds |= {"frame": int, "packet": int, "files": list}
    if not isinstance(table, dict) or not {"encode", "decode"} <= table.keys():
        raise ConfigError(f"{path}: [{name}] needs encode = and decode =")
    if type(table.get("delay")) is int:
        table = table | {"delay": float(table["delay"])}
    wrong = [key for key, value in table.items() if type(value) is not kinds.get(key, str)]
    wrong += table.keys() - kinds.keys() - {"encode", "decode"}
    wrong += ["files"] * any(not isinstance(file, str) for file in table.get("files", ()))
    if wrong or table.get("payload", "file") not in get_args(Payload):
        raise ConfigError(
            f"{path}: [{name}] has {', '.join(wrong) or 'payload'} wrong; beside encode and decode there may be "
            f"{', '.join(kinds)}, payload one of {', '.join(get_args(Payload))}"
        )
    for key, (least, most) in RANGES.items():
        if key in table and not least <= table[key] <= most:
            raise ConfigError(f"{path}: [{name}] {key} is {table[key]}; wanted is {least} to {most}")
    places = {"encode": ("{input}", "{coded}"), "decode": ("{coded}", "{output}")}
    for key, needed in places.items():
        if not all(place in table[key] for place in needed):
            raise ConfigError(f"{path}: [{name}] {key} needs {' and '.join(needed)}, seen is {table[key]!r}")
        try:
            shlex.split(table[key])
        except ValueError as error:
            raise ConfigError(f"{path}: [{name}] {key} cannot be split into words ({error}): {table[key]!r}") from None
    rest: dict[str, Any] = {key: value for key, value in table.items() if key in kinds}
    return Command(name, table["encode"], table["decode"], **rest | {"files": tuple(rest.get("files", ()))})
