"""What codecs' fingerprints are made of, what their bits cost on the wire, and the ends of clips."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import soundfile

from semanticodec.bench import commands
from semanticodec.bench.align import find_delay
from semanticodec.bench.clips import Clip
from semanticodec.bench.codecs import (
    Codec,
    Coded,
    Semanticodec,
    content,
    found_by,
    gross_bits,
    loaded,
    sources,
    versions,
)
from semanticodec.bench.commands import Command, classical
from semanticodec.bench.decodes import Decodes
from semanticodec.bench.neural import Hub
from semanticodec.bench.outages import Interrupted
from semanticodec.bench.payloads import CODEC2
from semanticodec.config import SAMPLE_RATE, preset
from semanticodec.errors import CheckpointError, ConfigError
from semanticodec.wire import messages
from semanticodec.wire.blocks import Geometry, frame_bytes

DEMO = Path(commands.__file__).parent.parent / "assets" / "demo.flac"
COPY = Command("copy", "cp {input} {coded}", "cp {coded} {output}")


def hub(folder: Path) -> Hub:
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        (folder / name).write_text(name)
    return Hub("dac", str(folder), 2)


class TestFingerprints:
    def test_sources_are_digests_of_files(self) -> None:
        root = Path(commands.__file__).parents[1]
        files = (root / "audio.py", *sorted((root / "wire").glob("*.py")))
        assert sources("audio", "wire") == content(files)
        assert len({sources("audio"), sources("wire"), sources("audio", "wire")}) == 3
        with pytest.raises(FileNotFoundError, match=r"nowhere\.py"):
            sources("nowhere")
        with pytest.raises(CheckpointError, match="there are no files"):
            content(())

    def test_commands_follow_the_files_that_they_name(self, tmp_path: Path) -> None:
        model, told = tmp_path / "model.bin", tmp_path / "told.bin"
        config = tmp_path / "codecs.toml"
        config.write_text(
            f'[a]\nencode = "cp {{input}} {{coded}}"\ndecode = "env --model={model} cp {{coded}} {{output}}"\n'
            f'files = ["{told}"]\nframe = 160\npacket = 320\n'
        )
        (codec,) = commands.configured(config)
        assert codec.missing() == f"there is no file {told}"
        assert (codec.frame, codec.about().packet) == (160, 0.02)
        prints = set()
        for file, text in ((model, "1"), (told, "1"), (model, "2"), (told, "2")):
            file.write_text(text)
            told.touch()
            prints.add(codec.fingerprint())
        assert len(prints) == 4
        assert codec.missing() is None
        config.write_text('[a]\nencode = "cp {input} {coded}"\ndecode = "cp {coded} {output}"\nfiles = [1]\n')
        with pytest.raises(ConfigError, match="files wrong"):
            commands.configured(config)

    def test_commands_follow_folders_and_quoted_commands(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What lies in folders that a command or its file names, and what a quoted command names and starts."""
        home, model, told = tmp_path / "home", tmp_path / "model", tmp_path / "told"
        script, tool = tmp_path / "enc.py", tmp_path / "bin" / "tool"
        for folder in (home, model / "deep", told, tool.parent):
            folder.mkdir(parents=True)
        tool.touch(0o755)
        monkeypatch.chdir(home)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        quoted = f"cd {home.parent}; python {script}|tool --model={model} {{input}} {{coded}} {'#' * 256}"
        codec = dataclasses.replace(COPY, encode_command=f"sh -c 'sh -c \"{quoted}\"'", files=(str(told),))
        assert codec.missing() is None
        prints = {codec.fingerprint()}
        for file in (script, tool, model / "deep" / "weights.bin", told / "weights.bin"):
            for size in (1, 2):
                file.write_bytes(bytes(size))
                prints.add(codec.fingerprint())
        assert len(prints) == 1 + 2 * 4
        # Working folders and what lies around them change with every run, and so does what Python keeps of scripts.
        (model / "__pycache__").mkdir()
        for file in (tmp_path / "results.json", home / "results.json", model / "__pycache__" / "enc.pyc"):
            file.touch()
        assert codec.fingerprint() in prints
        told.rename(tmp_path / "gone")
        assert codec.missing() == f"there is no file {told}"

    def test_an_empty_folder_of_decodes_is_missing(self, tmp_path: Path) -> None:
        assert Decodes("theirs", tmp_path / "none", 1.0).missing() == f"there is no folder {tmp_path / 'none'}"
        assert Decodes("theirs", tmp_path, 1.0).missing() == f"no file is in {tmp_path}"
        (tmp_path / "a.wav").write_bytes(b"a")
        assert Decodes("theirs", tmp_path, 1.0).missing() is None

    def test_they_follow_the_code_and_the_libraries(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each names the sources of its adapter and of what reads sound, and the libraries that compute."""
        (tmp_path / "a.wav").write_bytes(b"a")
        lossy = Interrupted(dataclasses.replace(COPY, name="codec2-1300"), (True,), 5120)
        wanted: dict[Codec, set[str]] = {
            COPY: {"audio", "bench/clips", "bench/codecs", "bench/commands", "bench/payloads"},
            lossy: {"audio", "bench/clips", "bench/codecs", "bench/commands", "bench/outages"},
            hub(tmp_path): {"audio", "bench/clips", "bench/codecs", "bench/neural", "wire"},
            Decodes("x", tmp_path, 1.5): {"audio", "bench/clips", "bench/codecs", "bench/decodes"},
            Semanticodec("mini-25"): {"audio", "bench/clips", "bench/codecs", "codec", "nn", "wire"},
        }
        given: list[str] = []

        def told(*names: str) -> str:
            given.extend(names)
            return "+".join(names)

        for module in ("codecs", "commands", "decodes", "neural", "outages"):
            monkeypatch.setattr(f"semanticodec.bench.{module}.sources", told)
            monkeypatch.setattr(f"semanticodec.bench.{module}.versions", told, raising=False)
        for codec, names in wanted.items():
            given.clear()
            fingerprint = codec.fingerprint()
            assert names | {"torch", "numpy", "soxr", "soundfile"} <= set(given)
            assert all(name in fingerprint for name in given)
            assert ("transformers" in given) == isinstance(codec, Hub)
            assert ("constriction" in given) == isinstance(codec, Semanticodec)

    def test_versions_are_those_installed(self) -> None:
        assert versions("numpy") == f"numpy-{np.__version__}"

    @pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
    def test_every_file_of_a_hub_folder_counts(self, tmp_path: Path, name: str) -> None:
        codec = hub(tmp_path)
        seen = {codec.fingerprint()}
        (tmp_path / name).write_text("another")
        content.cache_clear()
        seen.add(codec.fingerprint())
        assert len(seen) == 2


def test_decodes_of_equal_clips_go_by_their_names(tmp_path: Path) -> None:
    """Clips of one content that others decoded twice: two entries, where this package's decodes share one."""
    clips = []
    for place, name in enumerate(("one", "two")):
        soundfile.write(tmp_path / f"{name}.wav", np.full(800, 0.1), SAMPLE_RATE)
        clips.append(Clip(name, "sound", tmp_path / f"{name}.wav"))
        (tmp_path / "theirs").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "theirs" / f"{name}.wav", np.full(800, 0.2 + place / 10), SAMPLE_RATE)
    theirs = Decodes("theirs", tmp_path / "theirs", 1.5)
    first, second = (theirs.decode(Coded(b"", 0.0), clip) for clip in clips)
    assert not np.array_equal(first, second)
    assert len({found_by(clip, by_name=False) for clip in clips}) == 1
    assert len({found_by(clip, by_name=True) for clip in clips}) == 2


def test_endings_of_decodes_may_be_capitals(tmp_path: Path) -> None:
    (tmp_path / "speech").mkdir()
    for place, file in enumerate(("UP.WAV", "both.wav", "both.WAV", "speech/Up.Flac", "UP.TXT")):
        soundfile.write(tmp_path / file, np.full(800, (1 + place) / 8), SAMPLE_RATE, format="WAV")
    theirs = Decodes("theirs", tmp_path, 1.5)
    for name, place in (("UP", 0), ("both", 1), ("speech/Up", 3), ("speech/both", 1)):
        found = theirs.decode(Coded(b"", 0.0), Clip(name, "sound", tmp_path))
        assert found == pytest.approx((1 + place) / 8, abs=1e-3)
    with pytest.raises(FileNotFoundError, match="no decode of this clip"):
        theirs.decode(Coded(b"", 0.0), Clip("up", "sound", tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("delay", "nan", "0 to 60"),
        ("delay", "inf", "0 to 60"),
        ("delay", "-0.1", "0 to 60"),
        ("rate", "0", "1000 to 1000000"),
        ("rate", "-8000", "1000 to 1000000"),
        ("frame", "-1", "0 to 1000000"),
        ("packet", "-5", "0 to 1000000"),
    ],
)
def test_numbers_of_a_command_have_ranges(key: str, value: str, wanted: str, tmp_path: Path) -> None:
    config = tmp_path / "codecs.toml"
    config.write_text(f'[a]\nencode = "cp {{input}} {{coded}}"\ndecode = "cp {{coded}} {{output}}"\n{key} = {value}\n')
    with pytest.raises(ConfigError, match=rf"\[a\] {key} is {value}; wanted is {wanted}"):
        commands.configured(config)


@pytest.mark.parametrize("name", ["mini-25", "mini-50", "mini-100"])
def test_gross_bits_are_those_of_real_messages(name: str) -> None:
    """As many as the server sends: each packed block in a message of its own, in an unmasked frame."""
    clip, codec = Clip("demo", "speech", DEMO), Semanticodec(name)
    config = preset(name)
    geometry = Geometry(config.block, config.code_bits, (config.token_rate,))
    codes = codec.encode(clip).codes
    assert codes is not None
    frames = geometry.frames(config.token_rate)
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % frames)))
    blocks = [geometry.pack(block, config.token_rate) for block in np.split(codes, codes.shape[1] // frames, 1)]
    sent = [messages.encode(messages.Codes(500, geometry.join([block], config.token_rate))) for block in blocks]
    about = codec.about()
    counted = gross_bits(codec.encode(clip).net_bits, clip.seconds, about.block, about.block_bits, about.packet)
    assert counted == 8 * sum(frame_bytes(len(message), masked=False) for message in sent)
    assert about.block_bits == frames * sum(config.code_bits)
    loaded.cache_clear()


def test_packets_of_varying_length_say_it() -> None:
    """A byte for each of 16 packets in a message, two where they are longer than a byte tells."""
    message = gross_bits(16 * 8 * 20, 0.32, 0.32)
    assert gross_bits(16 * 8 * 20, 0.32, 0.32, packet=0.02) == message + 8 * 16
    assert gross_bits(16 * 8 * 300, 0.32, 0.32, packet=0.02) == gross_bits(16 * 8 * 300, 0.32, 0.32) + 8 * 32
    assert gross_bits(16 * 8 * 20, 0.32, 0.32) == gross_bits(16 * 8 * 20 - 7, 0.32, 0.32)  # whole bytes
    packets = {codec.family: codec.about().packet for codec in classical()}
    known = {"Opus": 0.02, "MP3": 0.036, "AAC": 0.064}
    assert packets == {**dict.fromkeys(packets), **known}


@pytest.mark.parametrize("name", [*CODEC2, "speex-nb-q2", "speex-wb-q1", "speex-wb-q3", "opus-12", "mp3-16", "aac-16"])
def test_the_end_of_a_clip_comes_out(name: str, tmp_path: Path) -> None:
    """Speech that is cut off in the middle of a word is heard to the last 10 ms, and what fills up costs no bits."""
    codec = next(codec for codec in classical() if codec.name == name)
    if reason := codec.missing():
        pytest.skip(reason)
    wave = Clip("demo", "speech", DEMO).wave
    levels = [np.abs(wave[end - 1600 : end]).mean() for end in range(32_000, len(wave), 371)]
    wave = wave[: 32_000 + 371 * int(np.argmax(levels))]
    soundfile.write(tmp_path / "cut.wav", wave, SAMPLE_RATE)
    clip = Clip("cut", "speech", tmp_path / "cut.wav")
    coded = codec.encode(clip)
    decoded = codec.decode(coded, clip)
    found = find_delay(clip.wave.astype(float), decoded.astype(float))
    delay = max(found.samples, 0) if found else 0
    assert len(decoded) - delay >= len(wave) - 2  # a sample or two of the estimate
    end = decoded[delay:][len(wave) - 160 : len(wave)]
    assert np.abs(end).mean() > 0.1 * np.abs(wave[-160:]).mean()
    if codec.family == "Codec 2":
        bits, frame = CODEC2[codec.payload]  # type: ignore[index]
        assert coded.net_bits == bits * -(-len(wave) // (2 * frame))


def test_the_input_is_padded_by_the_delay_and_a_frame() -> None:
    codec = dataclasses.replace(COPY, rate=8000, raw=True, delay=0.05, frame=160)
    coded = codec.encode(Clip("demo", "speech", DEMO))
    samples = len(coded.data) // 2
    own = -(-len(Clip("demo", "speech", DEMO).wave) // 2)
    assert samples % 160 == 0
    assert 400 + 160 <= samples - own < 400 + 2 * 160
    assert not any(coded.data[2 * own :])
