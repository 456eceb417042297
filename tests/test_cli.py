"""The command line, end to end, with a tiny random model in the place of the shipped one."""

import importlib.metadata
import io
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import torch
from typer.testing import CliRunner, Result

from semanticodec import audio, checkpoints, cli, demo, wire
from semanticodec.cli.jobs import Job
from semanticodec.codec import SemantiCodec
from semanticodec.diffusion import SamplerOptions
from semanticodec.errors import CheckpointError
from semanticodec.model import CodecModel

CONFIG = tiny.config("mini")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    for name, seed in (("mini", 0), ("other", 1)):
        model = CodecModel(CONFIG)
        tiny.fill(model, seed)
        model.latent.vocoder.head.bias.data.add_(5)  # loud enough for 16 bits
        checkpoints.save(folder / name, {CONFIG: model.state_dict()})
    return folder


@pytest.fixture(autouse=True)
def _shipped(weights: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(checkpoints, "WEIGHTS", weights)
    monkeypatch.chdir(tmp_path)


def run(*args: object, stdin: bytes | None = None) -> Result:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    return result


def ok(*args: object, stdin: bytes | None = None) -> Result:
    result = run(*args, stdin=stdin)
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def make_sound(
    path: Path | io.BytesIO, seconds: float = 0.5, rate: int = 16000, channels: int = 1, seed: int = 0
) -> int:
    samples = int(seconds * rate)
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels))
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, rate, format="WAV" if isinstance(path, io.BytesIO) else None)
    return samples


class TestRoundTrip:
    @pytest.mark.parametrize(("ending", "rate"), [(".wav", 44100), (".flac", 48000), (".ogg", 8000), (".mp3", 16000)])
    def test_rate_and_length_come_back(self, tmp_path: Path, ending: str, rate: int) -> None:
        source = tmp_path / f"in{ending}"
        make_sound(source, 0.7123, rate)
        samples = soundfile.info(source).frames
        assert ok("encode", source).stdout == ""
        target = tmp_path / f"out{ending}"
        ok("decode", tmp_path / "in.scodec", "-o", target)
        result = soundfile.info(target)
        assert (result.samplerate, result.channels) == (rate, 1)
        # MP3 has its own idea of where a file ends.
        assert result.frames == samples or (ending == ".mp3" and abs(result.frames - samples) < 1200)

    @pytest.mark.parametrize("samples", [1, 2559, 5121])
    @pytest.mark.parametrize("rate", [8000, 11025, 96000])
    def test_any_length(self, tmp_path: Path, samples: int, rate: int) -> None:
        soundfile.write(tmp_path / "a.wav", np.zeros(samples), rate)
        ok("encode", "a.wav")
        ok("decode", "a.scodec", "-o", "b.wav", "--steps", 1)
        assert soundfile.info(tmp_path / "b.wav").frames == samples

    def test_is_what_the_library_does(self, tmp_path: Path) -> None:
        make_sound(tmp_path / "a.wav", 1.0, 44100)
        ok("encode", "a.wav")
        ok("decode", "a.scodec", "-o", "b.wav", "--seed", 5, "--steps", 3)
        codec = SemantiCodec.from_pretrained("mini-100")
        wave, rate = audio.load(tmp_path / "a.wav")
        codes = codec.encode(wave, rate)
        recording = wire.read_codes((tmp_path / "a.scodec").read_bytes())
        np.testing.assert_array_equal(recording.codes, codes.numpy())
        assert recording.header == wire.Header.of(codec.config, codec.weights_hash, 44100, 1, 44100)
        decoded = codec.decode(codes, seed=5, options=SamplerOptions(steps=3))
        want = audio.resample(decoded, 16000, 44100)[:, :44100]
        got, _ = audio.load(tmp_path / "b.wav")
        assert want.abs().max() > 1e-2
        torch.testing.assert_close(got, want.clamp(-1, 1), atol=5e-5, rtol=0)

    def test_the_seed_and_the_steps_count(self, tmp_path: Path) -> None:
        make_sound(tmp_path / "a.wav")
        ok("encode", "a.wav")
        outputs = []
        for name, *args in (
            ("b", "--seed", 1),
            ("c", "--seed", 1),
            ("d", "--seed", 2),
            ("e", "--seed", 1, "--steps", 4),
        ):
            ok("decode", "a.scodec", "-o", f"{name}.wav", *args)
            outputs.append((tmp_path / f"{name}.wav").read_bytes())
        assert outputs[0] == outputs[1]
        assert len(set(outputs)) == 3

    def test_channels(self, tmp_path: Path) -> None:
        make_sound(tmp_path / "a.wav", channels=2)
        ok("encode", "a.wav", "-o", "mono.scodec")
        ok("encode", "a.wav", "-o", "stereo.scodec", "--per-channel")
        ok("decode", "mono.scodec", "stereo.scodec")
        assert soundfile.info(tmp_path / "mono.wav").channels == 1
        stereo, rate = audio.load(tmp_path / "stereo.wav")
        assert stereo.shape[0] == 2
        left, _ = audio.load(tmp_path / "a.wav")
        audio.save(tmp_path / "left.wav", left[:1], rate)
        ok("encode", "left.wav")
        left_codes = wire.read_codes((tmp_path / "left.scodec").read_bytes()).codes
        both = wire.read_codes((tmp_path / "stereo.scodec").read_bytes()).codes
        np.testing.assert_array_equal(both[:1], left_codes)
        assert not np.array_equal(both[:1], both[1:])

    def test_pipes(self, tmp_path: Path) -> None:
        make_sound(tmp_path / "a.wav", 0.6, 22050)
        sound = (tmp_path / "a.wav").read_bytes()
        ok("encode", "a.wav")
        codes = ok("encode", "-", stdin=sound).stdout_bytes
        assert codes == (tmp_path / "a.scodec").read_bytes()
        assert ok("encode", "a.wav", "-o", "-").stdout_bytes == codes
        ok("decode", "a.scodec", "-o", "b.wav")
        decoded = ok("decode", "-", stdin=codes).stdout_bytes
        assert decoded == (tmp_path / "b.wav").read_bytes()
        ok("decode", "-", "-o", "c.flac", stdin=codes)
        assert soundfile.info(tmp_path / "c.flac").frames == int(0.6 * 22050)

    def test_through_a_real_pipe(self, tmp_path: Path, weights: Path) -> None:
        samples = make_sound(tmp_path / "a.wav")
        tool = f"{sys.executable} -c 'from semanticodec.cli import main; main()'"
        model = f"--model {weights / 'mini'}"
        line = f"cat a.wav | {tool} encode - {model} | {tool} decode - {model} > b.wav"
        root = Path(cli.__file__).parents[2]
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            check=False,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert soundfile.info(tmp_path / "b.wav").frames == samples


class TestAnyLength:
    """Files are read, coded and written piece by piece, never held whole."""

    @pytest.fixture(autouse=True)
    def _small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audio, "PIECE", 3000)

    @pytest.mark.parametrize("channels", [1, 2])
    @pytest.mark.parametrize("flag", ["--downmix", "--per-channel"])
    def test_equals_the_whole(self, tmp_path: Path, channels: int, flag: str) -> None:
        make_sound(tmp_path / "a.wav", 1.5, 44100, channels)
        ok("encode", "a.wav", flag)
        codec = SemantiCodec.from_pretrained("mini-100")
        wave, rate = audio.load(tmp_path / "a.wav")
        want = codec.encode(wave if flag == "--per-channel" else wave[None], rate)
        np.testing.assert_array_equal(wire.read_codes((tmp_path / "a.scodec").read_bytes()).codes, want.numpy())

    def test_nothing_is_read_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for module, name in ((audio, "load"), (wire, "read_codes"), (SemantiCodec, "encode"), (SemantiCodec, "decode")):
            monkeypatch.setattr(module, name, None)
        samples = make_sound(tmp_path / "a.wav", 0.6, 22050, 2)
        sound = (tmp_path / "a.wav").read_bytes()
        ok("encode", "a.wav")
        codes = ok("encode", "-", stdin=sound).stdout_bytes
        assert codes == (tmp_path / "a.scodec").read_bytes()
        ok("info", "a.scodec")
        ok("decode", "a.scodec", "-o", "b.wav")
        assert ok("decode", "-", stdin=codes).stdout_bytes == (tmp_path / "b.wav").read_bytes()
        assert soundfile.info(tmp_path / "b.wav").frames == samples

    def test_long_files_leave_the_batch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for seed, name in enumerate("ab"):
            make_sound(tmp_path / f"{name}.wav", 0.5 + seed, seed=seed)
        ok("encode", "a.wav", "b.wav", "-o", "one", "--batch", 2)
        monkeypatch.setattr(cli, "SHORT", 1)
        pooled: list[int] = []
        encode = SemantiCodec.encode
        monkeypatch.setattr(
            SemantiCodec, "encode", lambda self, wave, rate: pooled.append(len(wave)) or encode(self, wave, rate)
        )
        ok("encode", "a.wav", "b.wav", "-o", "two", "--batch", 2)
        assert pooled == [1]
        for name in "ab":
            assert (tmp_path / f"one/{name}.scodec").read_bytes() == (tmp_path / f"two/{name}.scodec").read_bytes()


class TestOptions:
    @pytest.fixture
    def both(self, tmp_path: Path) -> Path:
        models = {}
        for seed, rate in enumerate((100, 50)):
            config = tiny.config("mini", rate)
            model = CodecModel(config)
            tiny.fill(model, seed)
            models[config] = model.state_dict()
        checkpoints.save(tmp_path / "both", models)
        return tmp_path / "both"

    def test_preset(self, tmp_path: Path, both: Path) -> None:
        make_sound(tmp_path / "a.wav")
        for rate in (100, 50):
            name = f"{rate}.scodec"
            ok("encode", "a.wav", "-o", name, "--model", both, "--preset", f"mini-{rate}")
            assert wire.read_codes((tmp_path / name).read_bytes()).header.token_rate == rate
            ok("decode", name, "--model", both, "-o", f"{rate}.wav")
        result = run("encode", "a.wav", "--model", both)
        assert (result.exit_code, "say which one" in result.stderr) == (1, True)
        result = run("encode", "a.wav", "--model", "mini-100", "--preset", "mini-25")
        assert result.exit_code == 1
        assert "mini-100 was asked for, and the preset mini-25 too" in result.stderr

    def test_model_of_another_rate(self, tmp_path: Path, both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_sound(tmp_path / "a.wav")
        ok("encode", "a.wav", "--model", both, "--preset", "mini-100")
        monkeypatch.setattr(checkpoints, "WEIGHTS", both.parent)
        both.rename(both.parent / "mini")
        result = run("decode", "a.scodec", "-o", "b.wav", "--model", "mini-50")
        assert result.exit_code == 1
        assert "made by mini-100" in result.stderr
        assert "loaded is mini-50" in result.stderr

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_device_and_dtype(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
        seen: list[tuple[str, torch.device, torch.dtype]] = []

        def spy(name: str) -> None:
            real = getattr(SemantiCodec, name)

            def call(self: SemantiCodec, *args: object, **kwargs: object) -> object:
                seen.append((name, self.device, self.dtype))
                return real(self, *args, **kwargs)

            monkeypatch.setattr(SemantiCodec, name, call)

        make_sound(tmp_path / "a.wav")
        spy("iter_encode")
        spy("iter_decode")
        ok("encode", "a.wav", "--dtype", dtype, "--device", "cpu")
        if dtype != "float16":  # which a CPU lacks operations for
            ok("decode", "a.scodec", "-o", "b.wav", "--dtype", dtype, "--device", "cpu")
        want = (torch.device("cpu"), getattr(torch, dtype))
        assert seen == [("iter_encode", *want), ("iter_decode", *want)][: len(seen)]
        assert seen

    def test_precisions_understand_each_other(self, tmp_path: Path) -> None:
        make_sound(tmp_path / "a.wav")
        ok("encode", "a.wav", "--dtype", "bfloat16")
        ok("decode", "a.scodec", "-o", "b.wav", "--dtype", "float32")
        ok("decode", "a.scodec", "-o", "c.wav", "--dtype", "bfloat16")
        assert (tmp_path / "b.wav").read_bytes() != (tmp_path / "c.wav").read_bytes()

    def test_version(self) -> None:
        assert ok("--version").stdout == f"semanticodec {importlib.metadata.version('semanticodec')}\n"

    def test_serve_hands_everything_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[object] = []
        stub = types.ModuleType("semanticodec_server.__main__")
        stub.app = lambda args, prog_name: given.extend([prog_name, *args])  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "semanticodec_server", types.ModuleType("semanticodec_server"))
        monkeypatch.setitem(sys.modules, "semanticodec_server.__main__", stub)
        ok("serve", "--port", "0", "--help", "-x", "word")
        assert given == ["semanticodec serve", "--port", "0", "--help", "-x", "word"]

    def test_serve_without_its_extra_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "semanticodec_server.__main__", None)
        result = run("serve")
        assert result.exit_code == 1
        assert "pip install 'semanticodec[server]'" in result.stderr


class TestTargets:
    @pytest.mark.parametrize(
        ("ending", "rate", "channels"),
        [(".ogg", 384_000, 1), (".mp3", 44_101, 1), (".mp3", 16_000, 3), (".flac", 700_000, 1), (".flac", 44_100, 9)],
    )
    def test_what_cannot_be_written_is_not_decoded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, rate: int, channels: int
    ) -> None:
        codec = SemantiCodec.from_pretrained("mini-100")
        header = wire.Header.of(codec.config, codec.weights_hash, rate, channels, 100)
        with (tmp_path / "a.scodec").open("wb") as file:
            wire.write_codes(file, header, np.zeros((channels, 2, 8), int))
        monkeypatch.setattr(SemantiCodec, "iter_decode", None)
        result = run("decode", "a.scodec", "-o", f"b{ending}")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert f"cannot write {ending[1:].upper()} with {channels} channels at {rate} Hz" in result.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["a.scodec"]

    @pytest.mark.parametrize("name", ["b.wav", "b.flac", "b.ogg", "b.mp3", "b.scodec", "-"])
    def test_a_full_disk(self, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str) -> None:
        make_sound(tmp_path / "a.wav")
        args = ["encode", "a.wav", "-o", name]
        if name != "b.scodec":
            ok("encode", "a.wav")
            args = ["decode", "a.scodec", "-o", name]
        before = sorted(tmp_path.iterdir())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50 if name == "b.scodec" else 1000, hard))
        try:
            result = run(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (result.exit_code, result.stderr) == (1, f"{args[1]}: File too large\n")
        assert sorted(tmp_path.iterdir()) == before
        assert capfd.readouterr().err == ""  # C would print there what it cannot raise

    def test_errors_of_libsndfile_while_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        make_sound(tmp_path / "a.wav")
        ok("encode", "a.wav")

        def fail(*_: object) -> None:
            raise soundfile.LibsndfileError(2)

        monkeypatch.setattr(soundfile.SoundFile, "write", fail)
        result = run("decode", "a.scodec", "-o", "b.wav")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "libsndfile cannot write this sound file: System error" in result.stderr
        assert not list(tmp_path.glob("b*"))

    def test_being_ended_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def work() -> None:
            with Job(None, tmp_path / "x.scodec").open_target():
                assert [path.name for path in tmp_path.iterdir()] == ["x.scodec.part"]
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("still there")

        before = signal.getsignal(signal.SIGTERM)
        monkeypatch.setattr(cli, "app", work)
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            signal.signal(signal.SIGTERM, before)
        assert ended.value.code == 143
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["encode", "a.wav", "b.wav", "-o", "-"], "2 files cannot go through one pipe"),
            (["encode", "in", "-o", "-"], "2 files cannot go through one pipe"),
            (["encode", "a.wav", "-o", "a.wav", "-f"], "a.wav is an input"),
            (["encode", "a.wav", "-o", "./in/../a.wav", "-f"], "is an input"),
            (["encode", "a.wav", "b.wav", "-o", "x.scodec"], "x.scodec is the name of a file"),
            (["encode", "in", "-o", "x.scodec"], "x.scodec is the name of a file"),
            (["decode", "in", "-o", "x.wav"], "x.wav is the name of a file"),
        ],
    )
    def test_senseless_ones(self, tmp_path: Path, args: list[str], message: str) -> None:
        for name in ("a.wav", "b.wav", "in/a.wav", "in/b.wav"):
            make_sound(tmp_path / name, 0.1)
        (tmp_path / "in" / "a.scodec").touch()
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        result = run(*args)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    def test_the_demo_spares_its_recording(self, tmp_path: Path) -> None:
        make_sound(tmp_path / "a.wav")
        before = (tmp_path / "a.wav").read_bytes()
        result = run("demo", "a.wav", "-o", ".")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "would be overwritten" in result.stderr
        assert (tmp_path / "a.wav").read_bytes() == before


class TestManyFiles:
    @pytest.fixture
    def tree(self, tmp_path: Path) -> Path:
        for i, name in enumerate(("one.wav", "deep/er/two.flac", "deep/three.ogg")):
            make_sound(tmp_path / "in" / name, 0.4 + 0.2 * (i == 1), seed=i)
        (tmp_path / "in" / "notes.txt").write_text("not sound")
        return tmp_path

    @pytest.mark.parametrize("batch", [1, 2, 8])
    def test_trees_are_mirrored(self, tree: Path, batch: int) -> None:
        ok("encode", "in", "-o", "codes", "--batch", batch)
        found = sorted(str(file.relative_to(tree / "codes")) for file in (tree / "codes").rglob("*.*"))
        assert found == ["deep/er/two.scodec", "deep/three.scodec", "one.scodec"]
        ok("decode", "codes", "-o", "out", "--batch", batch)
        for name, samples in (("one", 6400), ("deep/er/two", 9600), ("deep/three", 6400)):
            assert soundfile.info(tree / "out" / f"{name}.wav").frames == samples

    def test_a_batch_changes_nothing(self, tree: Path) -> None:
        for batch in (1, 3):
            ok("encode", "in", "-o", f"codes{batch}", "--batch", batch)
            ok("decode", "codes1", "-o", f"out{batch}", "--batch", batch)
        for ours in (tree / "codes1").rglob("*.scodec"):
            theirs = tree / "codes3" / ours.relative_to(tree / "codes1")
            assert ours.read_bytes() == theirs.read_bytes()
        for path in (tree / "out1").rglob("*.wav"):
            one, _ = audio.load(path)
            three, _ = audio.load(tree / "out3" / path.relative_to(tree / "out1"))
            assert torch.equal(one, three)

    def test_one_bad_file_does_not_stop_the_others(self, tree: Path) -> None:
        (tree / "in" / "broken.wav").write_bytes(b"RIFF, but no wave")
        for batch in (1, 4):
            result = run("encode", "in", "-o", f"codes{batch}", "--batch", batch)
            assert result.exit_code == 1
            assert result.stderr.startswith("in/broken.wav: ")
            assert result.stderr.count("\n") == 1
            assert len(list((tree / f"codes{batch}").rglob("*.scodec"))) == 3
        (tree / "codes1" / "one.scodec").write_bytes(b"SCD")
        result = run("decode", "codes1", "-o", "out")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "one.scodec: the file ends after 3 bytes" in result.stderr
        assert len(list((tree / "out").rglob("*"))) == 4

    def test_nothing_is_overwritten_unasked(self, tree: Path) -> None:
        ok("encode", "in/one.wav")
        before = (tree / "in" / "one.scodec").read_bytes()
        (tree / "in" / "one.scodec").write_bytes(b"precious")
        result = run("encode", "in/one.wav")
        assert (result.exit_code, result.stderr) == (1, "in/one.wav: in/one.scodec: exists; --force overwrites it\n")
        assert (tree / "in" / "one.scodec").read_bytes() == b"precious"
        ok("encode", "in/one.wav", "--force")
        assert (tree / "in" / "one.scodec").read_bytes() == before
        assert run("decode", "in/one.scodec").exit_code == 1

    def test_errors_leave_nothing_half_written(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ok("encode", "in/one.wav", "-o", "one.scodec")

        def fail(*_: object, **__: object) -> None:
            raise CheckpointError("the weights\nwent away")

        monkeypatch.setattr(SemantiCodec, "iter_decode", fail)
        result = run("decode", "one.scodec", "-o", "new/out.wav")
        assert (result.exit_code, result.stderr) == (1, "one.scodec: the weights went away\n")
        assert list((tree / "new").iterdir()) == []


class TestDamage:
    @pytest.fixture
    def damaged(self, tmp_path: Path) -> Path:
        codec = SemantiCodec.from_pretrained("mini-100")
        codes = codec.encode(torch.randn(1, 96000, generator=torch.Generator().manual_seed(0)) * 0.1, 16000).numpy()
        file = io.BytesIO()
        wire.write_codes(file, wire.Header.of(codec.config, codec.weights_hash, 16000, 1, 96000), codes, 64)
        data = bytearray(file.getvalue())
        data[wire.Reader(io.BytesIO(data)).index[2].offset + 40] ^= 4
        (tmp_path / "damaged.scodec").write_bytes(data)
        return tmp_path

    def test_is_refused_or_salvaged(self, damaged: Path) -> None:
        result = run("decode", "damaged.scodec", "-o", "out.wav")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "CRC" in result.stderr
        assert not (damaged / "out.wav").exists()
        result = run("decode", "damaged.scodec", "-o", "out.wav", "--salvage")
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
        assert result.stderr.startswith("damaged.scodec: frames 128 to 192 lost: ")
        assert soundfile.info(damaged / "out.wav").frames == 96000

    @pytest.mark.usefixtures("damaged")
    def test_info_says_so(self) -> None:
        result = run("info", "damaged.scodec")
        assert result.exit_code == 1
        assert "frames 128 to 192 lost" in result.stderr
        assert "96000 samples at 16000 Hz" in result.stdout

    @pytest.mark.usefixtures("damaged")
    def test_other_weights_are_refused(self, weights: Path) -> None:
        result = run("decode", "damaged.scodec", "--salvage", "-o", "out.wav", "--model", weights / "other")
        assert result.exit_code == 1
        assert "with codebooks" in result.stderr
        assert "--model" in result.stderr

    def test_a_file_cannot_choose_a_folder(self, tmp_path: Path, weights: Path) -> None:
        header = wire.Header(str(weights / "mini"), "00000000", 100, 16000, 1, CONFIG.code_bits, 320)
        with (tmp_path / "hostile.scodec").open("wb") as file:
            wire.write_codes(file, header, np.zeros((1, 2, 1), int))
        result = run("decode", "hostile.scodec")
        assert result.exit_code == 1
        assert "is no preset" in result.stderr

    def test_nothing_left_to_salvage(self, damaged: Path) -> None:
        data = (damaged / "damaged.scodec").read_bytes()
        (damaged / "cut.scodec").write_bytes(data[:40])
        result = run("decode", "cut.scodec", "--salvage")
        assert result.exit_code == 1
        assert "no codes to decode" in result.stderr


def test_info(tmp_path: Path) -> None:
    make_sound(tmp_path / "a.wav", 2.0, 48000)
    ok("encode", "a.wav")
    text = ok("info", "a.scodec").stdout
    for part in (
        "mini-100, codebooks ",
        "2.000 s: 96000 samples at 48000 Hz",
        "6 + 7 bits, 50 per second",
        "104 frames",  # whole blocks: more than 50 a second
        "0.676 kbps",
    ):
        assert part in text
    assert f"{(tmp_path / 'a.scodec').stat().st_size} bytes" in text
    assert "standard input" in ok("info", "-", stdin=(tmp_path / "a.scodec").read_bytes()).stdout


def test_what_has_no_prior_is_refused_before_weights_are_fetched(tmp_path: Path) -> None:
    make_sound(tmp_path / "a.wav")
    result = run("encode", "a.wav", "--entropy", "--model", "semanticodec-25-4096")  # whose weights are not here
    assert (result.exit_code, "there is no prior for the codes of" in result.stderr) == (1, True)


def test_convert(tmp_path: Path, weights: Path) -> None:
    assert "mini-100" in ok("convert", weights / "mini", "mine", "--dtype", "float16").stdout
    make_sound(tmp_path / "a.wav")
    ok("encode", "a.wav", "--model", "mine")
    ok("decode", "a.scodec", "--model", "mine", "-o", "b.wav")
    result = run("convert", weights / "mini", "mine")
    assert (result.exit_code, result.stderr) == (1, "semanticodec: mine: there is something already\n")
    assert run("convert", "nowhere", "other").exit_code == 1


class TestUserErrors:
    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["encode", "missing.wav"], "missing.wav: No such file or directory"),
            (["encode", "text.wav"], "text.wav: "),
            (["encode", "empty"], "no .wav, .flac, .ogg, .mp3 in this folder"),
            (["encode", "nan.wav"], "NaN"),
            (["encode", "ok.wav", "--model", "nonsense"], "nonsense is neither a preset nor a folder"),
            (["encode", "ok.wav", "--model", "mini-7"], "mini-7"),
            (["encode", "ok.wav", "-o", "ok.wav/x.scodec"], "ok.wav"),
            (["decode", "missing.scodec"], "missing.scodec: No such file or directory"),
            (["decode", "ok.wav", "-o", "x.wav"], "ok.wav: this is no .scodec file"),
            (["decode", "ok.scodec", "-o", "x.xyz"], "its ending must be one of .wav"),
            (["decode", "ok.scodec", "--steps", "5000", "-o", "x.wav"], "5000"),
            (["info", "ok.wav"], "begins with b'RIFF"),
            (["demo", "missing.wav"], "missing.wav"),
        ],
    )
    def test_one_line_and_code_1(self, tmp_path: Path, args: list[str], message: str) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.wav").write_text("hello")
        make_sound(tmp_path / "ok.wav")
        soundfile.write(tmp_path / "nan.wav", np.full(1000, np.nan), 16000, subtype="FLOAT")
        if "ok.scodec" in args:
            ok("encode", "ok.wav", "-o", "ok.scodec")
        result = run(*args)
        assert result.exit_code == 1, result.stderr
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""

    @pytest.mark.parametrize("command", ["encode", "decode", "info"])
    def test_a_bad_pipe_has_a_name(self, command: str) -> None:
        result = run(command, "-", stdin=b"no such thing")
        assert result.exit_code == 1
        assert result.stderr.startswith("standard input: this is no")
        assert "<" not in result.stderr

    @pytest.mark.parametrize(
        "args",
        [
            ["encode"],
            ["encode", "a.wav", "--steps", "3"],
            ["encode", "a.wav", "--dtype", "int8"],
            ["encode", "a.wav", "--device", "nonsense"],
            ["encode", "a.wav", "--device", "meta"],
            ["decode", "a.scodec", "--device", "cuda:99"],
            ["encode", "a.wav", "--batch", "0"],
            ["encode", "-", "a.wav"],
            ["encode", "-", "-o", "."],
            ["encode", "a.wav", "a.flac"],
            ["decode", "a.scodec", "--seed", "-1"],
            ["decode", "a.scodec", "--steps", "0"],
            ["nonsense"],
        ],
    )
    def test_senseless_lines_are_code_2(self, args: list[str]) -> None:
        assert run(*args).exit_code == 2

    def test_help_needs_no_torch(self) -> None:
        code = "import sys; from semanticodec import cli; sys.exit('torch' in sys.modules)"
        root = Path(cli.__file__).parents[2]
        assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0
        assert {"encode", "decode", "info", "convert", "demo"} <= set(ok("--help").stdout.split())

    @pytest.mark.parametrize("words", [("generate",), ("edit", "inpaint"), ("upsample",)])
    def test_help_says_what_is_taken_where_nothing_is_given(self, words: tuple[str, ...]) -> None:
        assert "[default: the preset's]" in " ".join(ok(*words, "--help").stdout.split())


class TestDemo:
    def test_makes_everything(self, tmp_path: Path) -> None:
        text = ok("demo", "--out", "results", "--steps", 1).stdout
        for word in ("net bitrate", "bytes", "real-time factor", "log-mel L1", "STOI"):
            assert word in text
        assert soundfile.info(tmp_path / "results" / "demo.wav").frames == soundfile.info(demo.RECORDING).frames
        recording = wire.read_codes((tmp_path / "results" / "demo.scodec").read_bytes())
        assert recording.header.sample_rate == 48000
        bits = recording.codes.shape[2] * sum(recording.header.code_bits)
        assert f"{bits * 48 / soundfile.info(demo.RECORDING).frames:.3f} kbps" in text
        assert (tmp_path / "results" / "demo.png").read_bytes().startswith(b"\x89PNG")

    def test_the_recording_is_the_one_it_is_said_to_be(self) -> None:
        import hashlib

        attribution = (demo.RECORDING.parent / "ATTRIBUTION.md").read_text()
        assert hashlib.sha1(demo.RECORDING.read_bytes()).hexdigest() in attribution

    def test_does_without_matplotlib_and_pystoi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("matplotlib.figure", "matplotlib.backends.backend_agg", "pystoi"):
            monkeypatch.setitem(sys.modules, name, None)
        assert "pystoi is not installed" in ok("demo", "--steps", 1).stdout
        assert not (tmp_path / "demo_out" / "demo.png").exists()

    def test_mel_l1_of_a_louder_copy_is_the_logarithm_of_the_gain(self) -> None:
        wave = torch.randn(16000, generator=torch.Generator().manual_seed(0))
        assert demo.mel_l1(wave, wave) == 0
        assert demo.mel_l1(wave, 2 * wave) == pytest.approx(np.log(2), abs=1e-5)

    def test_stoi_tells_clean_from_lost(self) -> None:
        wave, rate = audio.load(demo.RECORDING)
        wave = audio.resample(wave[0], rate, 16000)
        noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(0)) * wave.std()
        assert demo.stoi(wave, wave) == pytest.approx(1, abs=1e-6)
        assert demo.stoi(wave, noise) < 0.5
