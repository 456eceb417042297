"""The speed benchmark's counts and arithmetic; its times are not tested, only that it takes them."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import measure, speed
from benchmarks.measure import Sgemm, Timing, gflop, in_turn, machine, randomise, spread, timed
from benchmarks.speed import OFFICIAL, PUBLISHED_CPU, STEPS, RealTime, Row, Window, compose, report
from semanticodec.audio import save
from semanticodec.config import CodecConfig, HiFiGANConfig, LatentConfig, UNetConfig, VAEConfig, preset

MINI = RealTime("a.flac", 10.0, 0.1, 0.25)


def tiny() -> CodecConfig:
    """An official preset in all but size."""
    official = preset(OFFICIAL)
    unet = UNetConfig(
        base=16, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, contexts=(None, 20), groups=4
    )
    latent = LatentConfig(unet=unet, vae=VAEConfig(base=8, res_blocks=1, groups=4), vocoder=HiFiGANConfig(base=32))
    decoder = dataclasses.replace(official.decoder, columns=2, overlap=1, latent=latent)
    return dataclasses.replace(official, decoder=decoder)


@pytest.fixture
def sgemm() -> Sgemm:
    peak = Sgemm(64)
    peak.best = Timing(wall=peak.gflop / 100, cpu=peak.gflop / 50)
    return peak


def test_counts_agree_with_the_published_ones():
    counts = {part: gflop(run) for part, run in Window(preset(OFFICIAL), "meta").parts().items()}
    # the published U-Net computes the context's keys and values in every pass: 53.2 GFLOP, two passes a step
    assert counts["guided step"] + counts["contexts"] == pytest.approx(2 * 53.2, rel=1e-3)
    assert counts["contexts"] == pytest.approx(2 * 12.4, rel=1e-2)
    assert counts["VAE decoder"] == pytest.approx(670, rel=1e-3)
    assert counts["vocoder"] == pytest.approx(1027, rel=1e-3)


def test_a_product_is_counted_as_two_operations_a_cell():
    a = torch.empty(30, 40, device="meta")
    assert gflop(lambda: a @ a.mT) == pytest.approx(2 * 30 * 40 * 30 / 1e9)


def test_the_peak_is_measured_and_kept(sgemm: Sgemm):
    assert (sgemm.gflops, sgemm.gflops_cpu) == (pytest.approx(100), pytest.approx(50))
    fresh = Sgemm(64)
    fresh.measure()
    first = fresh.gflops
    fresh.measure()
    assert 0 < first <= fresh.gflops


class Clock:
    """Both of the benchmark's clocks, advanced by hand: work takes as long as it says, on two threads."""

    def __init__(self) -> None:
        self.now = 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 2 * self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(measure, "time", fake)
    return fake


def test_times_are_the_smallest_after_warming_up(clock: Clock):
    seconds = iter([1.0, 5.0, 2.0, 5.0])
    assert timed(lambda: clock.work(next(seconds)), repeats=3) == Timing(wall=2.0, cpu=4.0)
    assert next(seconds, None) is None


def test_long_runs_need_no_warming_up(clock: Clock):
    assert timed(lambda: clock.work(7.0), repeats=1, warm_up=False) == Timing(wall=7.0, cpu=14.0)
    assert clock.now == 7.0


def test_things_in_turn_keep_the_smallest_of_their_own(clock: Clock):
    seconds = {"a": iter([9.0, 3.0, 2.0]), "b": iter([9.0, 5.0, 6.0])}
    runs = {name: lambda times=times: clock.work(next(times)) for name, times in seconds.items()}
    assert in_turn(runs, 2) == {"a": Timing(2.0, 4.0), "b": Timing(5.0, 10.0)}


def test_a_spread_is_of_all_rounds():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}


def test_shares_are_of_the_peak(sgemm: Sgemm):
    row = Row.of("vocoder", 100.0, Timing(wall=2.0, cpu=4.0), sgemm)
    assert (row.share, row.share_cpu) == (pytest.approx(0.5), pytest.approx(0.5))


def test_a_window_is_its_parts(sgemm: Sgemm):
    rows = {
        part: Row.of(part, count, Timing(seconds, 2 * seconds), sgemm)
        for part, count, seconds in [
            ("contexts", 1, 1),
            ("guided step", 10, 2),
            ("VAE decoder", 3, 3),
            ("vocoder", 4, 4),
        ]
    }
    window = compose(rows, sgemm)
    assert window.gflop == 1 + STEPS * 10 + 3 + 4
    assert window.timing == Timing(1 + STEPS * 2 + 3 + 4, 2 * (1 + STEPS * 2 + 3 + 4))
    text = report(rows | {"window": window}, sgemm, MINI, full=False)
    assert "100.0 GFLOP/s, 50.0 per CPU second" in text
    assert "108.0 s (216.0 CPU s) per 10.24 s window" in text
    assert "0.350 in all" in text
    for part, figures in PUBLISHED_CPU.items():
        line = next(line for line in text.splitlines() if line.startswith(part))
        assert [float(word) for word in line.rpartition("|")[2].split()] == list(figures)


def test_weights_follow_from_the_seed():
    first, second, other = (torch.nn.Linear(5, 3) for _ in range(3))
    for module, seed in ((first, 1), (second, 1), (other, 2)):
        randomise(module.parameters(), seed)
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_the_machine_names_itself():
    who = machine()
    assert who["torch"] == torch.__version__
    assert who["threads"] == torch.get_num_threads()
    assert who["cpu"]


def test_a_window_is_run_whole_when_asked(sgemm: Sgemm):
    config = tiny()
    wave = Window(config, "cpu").decode()
    assert wave.shape == (1, 2 * 2560)
    assert wave.isfinite().all()
    composed, whole = (speed.official(config, sgemm, full=full) for full in (False, True))
    assert list(whole) == ["contexts", "guided step", "VAE decoder", "vocoder", "window"]
    assert whole["window"].gflop == composed["window"].gflop > STEPS * whole["guided step"].gflop
    assert whole["window"].timing.cpu > STEPS / 2 * whole["guided step"].timing.cpu


class Codec:
    """Stands for a codec that takes a known time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def encode(self, wave: torch.Tensor, sample_rate: int) -> str:
        assert (tuple(wave.shape), sample_rate) == ((1, 800), 8000)
        self.clock.work(0.02)
        return "codes"

    def decode(self, codes: str, *, seed: int) -> None:
        assert (codes, seed) == ("codes", 0)
        self.clock.work(0.05)


def test_real_time_factors_are_times_over_the_clip(clock: Clock, tmp_path: Path):
    save(tmp_path / "noise.wav", torch.zeros(1, 800), 8000)
    figures = speed.real_time(Codec(clock), tmp_path / "noise.wav")
    assert (figures.clip, figures.seconds) == ("noise.wav", 0.1)
    assert (figures.encode, figures.decode) == (pytest.approx(0.2), pytest.approx(0.5))


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Make the command's work small, and return the recordings it gives to mini."""
    seen: list[Path] = []

    def real_time(codec: None, clip: Path) -> RealTime:  # noqa: ARG001
        seen.append(clip)
        return MINI

    monkeypatch.setattr(speed, "preset", lambda _: tiny())
    monkeypatch.setattr(speed, "Sgemm", lambda: Sgemm(64))
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(speed.SemantiCodec, "from_pretrained", lambda: None)
    monkeypatch.setattr(speed, "real_time", real_time)
    return seen


@pytest.mark.parametrize("full", [False, True])
def test_the_command_prints_and_keeps_what_it_measured(
    full: bool, clips: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    threads = torch.get_num_threads()
    try:
        speed.main(["--threads", "1", "--clip", "x.wav", "--write", *(["--full"] if full else [])])
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert ("run whole" in text, "composed" in text) == (full, not full)
    assert clips == [Path("x.wav")]
    (file,) = (tmp_path / "results").iterdir()
    result = json.loads(file.read_text())
    assert result["machine"]["threads"] == 1
    assert result["window"] == ("whole" if full else "composed")
    assert result["mini"] == dataclasses.asdict(MINI)
    assert [row["part"] for row in result["rows"]][-1] == "window"
    assert result["sgemm_gflops"] > 0


def test_nothing_is_kept_unasked_and_a_shipped_recording_is_used(clips: list[Path], tmp_path: Path):
    speed.main(["--threads", str(torch.get_num_threads())])
    assert not (tmp_path / "results").exists()
    assert [clip.parent for clip in clips] == [speed.ASSETS]
