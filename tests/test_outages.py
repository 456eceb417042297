"""Opus and Codec 2 with packets lost: what arrived is as it was, what did not is concealed or held."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from semanticodec.audio import save
from semanticodec.bench import outages
from semanticodec.bench.align import find_delay
from semanticodec.bench.clips import Clip
from semanticodec.bench.codecs import Coded, Semanticodec
from semanticodec.bench.commands import Command, classical
from semanticodec.bench.losses import Condition, measure
from semanticodec.bench.outages import FRAMES, Interrupted, held, interruptible
from semanticodec.bench.results import read_results
from semanticodec.cli import app
from semanticodec.errors import AudioError, ConfigError

DEMO = Path(outages.__file__).parent.parent / "assets" / "demo.flac"
BLOCK = 5120


@pytest.fixture(scope="module")
def voice() -> Clip:
    return Clip("voice", "speech", DEMO)


def ready(name: str) -> Command:
    (codec,) = interruptible([name])
    if reason := Interrupted(codec, (False,), BLOCK).missing():
        pytest.skip(reason)
    return codec


def lost(clip: Clip, *gone: int) -> tuple[bool, ...]:
    return tuple(block in gone for block in range(-(-len(clip.wave) // BLOCK)))


@pytest.mark.parametrize("name", ["opus-6", "opus-12"])
def test_libopus_decodes_as_the_program_does(voice: Clip, name: str) -> None:
    codec = ready(name)
    adapter = Interrupted(codec, lost(voice), BLOCK)
    coded = adapter.encode(voice)
    ours, theirs = (one.decode(coded, voice).astype(float) for one in (adapter, codec))
    late = find_delay(voice.wave.astype(float), ours)
    assert late is not None
    assert abs(late.samples) <= 2
    length = min(len(ours), len(theirs))
    assert length >= len(voice.wave)
    between = find_delay(theirs, ours)
    delay = between.samples if between else 0
    assert abs(delay) <= 1
    assert np.corrcoef(ours[max(delay, 0) : length], theirs[: length - max(delay, 0)])[0, 1] > 0.98


def test_opus_conceals_and_recovers(voice: Clip) -> None:
    adapter = Interrupted(ready("opus-12"), lost(voice), BLOCK)
    coded = adapter.encode(voice)
    whole = adapter.decode(coded, voice)
    wave = replace(adapter, lost=lost(voice, 3, 4)).decode(coded, voice)
    assert len(wave) == len(whole)
    assert np.array_equal(wave[: 3 * BLOCK - 320], whole[: 3 * BLOCK - 320])
    gap = slice(3 * BLOCK + 320, 5 * BLOCK - 320)
    assert wave[3 * BLOCK + 320 : 3 * BLOCK + 960].any()  # concealed, not muted at once
    assert np.abs(wave[gap] - whole[gap]).mean() > 0.2 * np.abs(whole[gap]).mean()
    after = slice(6 * BLOCK, None)
    assert np.corrcoef(wave[after], whole[after])[0, 1] > 0.95


def test_codec2_holds_a_frame(voice: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    size, seconds = FRAMES["codec2-1300"]
    half = round(BLOCK / 16_000 / seconds) * size
    data = bytes(range(16)) * size  # 16 frames of 40 ms: two blocks
    given: list[bytes] = []

    def decode(_: Command, coded: Coded, __: Clip) -> np.ndarray:
        given.append(coded.data)
        return np.ones(round(len(coded.data) / size * seconds * 16_000), np.float32)

    monkeypatch.setattr(Command, "decode", decode)
    two = replace(voice, name="two")
    codec = next(codec for codec in classical() if codec.name == "codec2-1300")
    adapter = Interrupted(codec, (False, True), BLOCK)
    assert adapter.decode(Coded(data, 0.0), two).tolist() == [1.0] * 2 * BLOCK
    assert given == [data[:half] + data[half - size : half] * 8]
    first = replace(adapter, lost=(True, False)).decode(Coded(data, 0.0), two)
    assert first.tolist() == [0.0] * BLOCK + [1.0] * BLOCK  # nothing is held before anything has arrived
    assert given[1:] == [data[half:]]
    assert replace(adapter, lost=(True, True)).decode(Coded(data, 0.0), two).tolist() == [0.0] * 2 * BLOCK
    assert list(held([b"a", b"b", b"c"], [False, True, False])) == [b"a", b"a", b"c"]


@pytest.mark.parametrize("name", ["codec2-1200", "codec2-2400"])
def test_a_lost_beginning_is_silent(voice: Clip, name: str) -> None:
    adapter = Interrupted(ready(name), lost(voice, 0), BLOCK)
    coded = adapter.encode(voice)
    wave, whole = (one.decode(coded, voice) for one in (adapter, adapter.codec))
    assert not wave[:BLOCK].any()
    assert len(wave) == len(whole)
    loud = [np.sqrt((one[2 * BLOCK :] ** 2).mean()) for one in (wave, whole)]
    assert loud[0] == pytest.approx(loud[1], rel=0.1)


@pytest.mark.parametrize("name", FRAMES)
def test_frames_are_as_long_as_the_program_makes_them(voice: Clip, name: str) -> None:
    codec = ready(name)
    size, seconds = FRAMES[name]
    frames, rest = divmod(len(codec.encode(voice).data), size)
    assert rest == 0
    # Silence of the delay and a frame goes behind the clip.
    assert 1 <= frames - (voice.seconds + (codec.delay or 0)) / seconds < 2


def test_fingerprints_tell_losses_apart(voice: Clip) -> None:
    adapter = Interrupted(ready("opus-6"), lost(voice), BLOCK)
    others = (replace(adapter, lost=lost(voice, 2)), replace(adapter, stretch=320), adapter.codec)
    assert len({adapter.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_damage_is_an_error() -> None:
    head = b"OpusHead\x01\x01" + bytes(9)
    ready("opus-6")
    with pytest.raises(AudioError, match="libopus decoded"):
        outages.concealed([head, b"OpusTags", b"\xff\xff\xff"], lambda _: False)


def test_without_the_library_opus_is_missing(voice: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    (codec,) = interruptible(["opus-6"])
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    outages._libopus.cache_clear()
    adapter = Interrupted(codec, lost(voice), BLOCK)
    assert adapter.missing() == "libopus is not installed"
    with pytest.raises(AudioError, match="libopus is not installed"):
        adapter.fingerprint()


def test_a_codec_that_fails_on_every_clip_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready("codec2-700c")
    (tmp_path / "clips").mkdir()
    save(tmp_path / "clips" / "tick.wav", torch.full((160,), 0.1), 16_000)

    def fail(*_: object) -> None:
        raise AudioError("c2enc: exit code 1")

    monkeypatch.setattr(Command, "encode", fail)
    out = tmp_path / "out"
    words = ["bench", "losses", str(tmp_path / "clips"), "-o", str(out), "--model", "mini-25"]
    done = CliRunner().invoke(app, [*words, "--beside", "codec2-700c"])
    assert done.exit_code == 1
    assert done.output.count("codec2-700c on tick") == 1  # and not once for all that it could lose
    assert done.output.splitlines()[-1] == "codec2-700c: failed on every clip"
    with pytest.raises(ConfigError, match="holds no results of semanticodec bench"):
        read_results(out / "losses.json")
    (out / "results.json").touch()  # as if `bench run` had been here
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0, again.output
    assert again.output.splitlines()[-1].endswith(f"`semanticodec bench report {out}` puts them into the report")


def test_only_what_can_be_interrupted() -> None:
    assert {codec.name for codec in interruptible([f"opus-{kbps}" for kbps in (6, 24)])} == {"opus-6", "opus-24"}
    assert FRAMES.keys() == {codec.name for codec in classical() if codec.family == "Codec 2"}
    with pytest.raises(ConfigError, match="opus-6 comes twice"):
        interruptible(["opus-6", "opus-8", "opus-6"])
    with pytest.raises(ConfigError, match="no codec speex-nb-q2 whose packets could be lost; there are opus-6"):
        interruptible(["speex-nb-q2"])


def test_codecs_beside_ours_lose_the_same(voice: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Side by side with mini: the same blocks, their own bits, and less quality where something is lost."""
    monkeypatch.setattr("semanticodec.bench.losses.RATES", (0.2,))
    beside = [ready("opus-6"), ready("codec2-1300")]
    gone = replace(beside[0], name="opus-8", encode_command="no-such-program {input} {coded}")
    results = measure(Semanticodec("mini-25", 1), [voice], tmp_path, beside=[*beside, gone])
    assert results.failed == {}
    assert results.skipped == {"opus-8": "no-such-program is not installed"}
    assert results.settings["beside"] == ["opus-6", "codec2-1300"]
    for pattern in ("random", "bursts"):
        shares = {
            results.scores(Condition(pattern, 0.2, name).name, "lost")["voice"][0]
            for name in ("model", "opus-6", "codec2-1300")
        }
        assert len(shares) == 1
        assert shares.pop() > 0
    for name, least, most in (("model", 0.3, 0.35), ("opus-6", 5, 9), ("codec2-1300", 1.2, 1.4)):
        assert least < results.scores(Condition("none", 0.0, name).name, "kbps_net")["voice"][0] < most
        clean, cut = (
            results.scores(Condition(*what, name).name, "mel_l1")["voice"][0]
            for what in (("none", 0.0), ("bursts", 0.2))
        )
        assert cut > clean + 0.1
