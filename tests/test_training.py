"""The training recipe from end to end, tiny: every stage runs, resumes, learns, and the export decodes."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.fabric import Fabric
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import config as tiny_config
from tiny import fill
from torch import Tensor, nn
from typer import Typer
from typer.testing import CliRunner

from semanticodec import SemantiCodec
from semanticodec.config import RATES, SAMPLE_RATE
from semanticodec.editing import Region
from semanticodec.errors import AudioError, CheckpointError
from semanticodec.nn.quantize import nearest
from semanticodec.training import __main__ as command
from semanticodec.training import latent, loop, mae, polish, stages, vae, vocoder
from semanticodec.training.blocks import Blocks, kmeans
from semanticodec.training.data import Clip, Corpus, Crops, manifest
from semanticodec.training.loop import RunOptions, Stage, rate_at
from semanticodec.training.stages import STAGES, Session

CONFIGS = {rate: tiny_config("mini", rate) for rate in RATES}
FIELDS = ("file", "source", "repo", "licence", "kind", "seconds", "shard")


def sound(seconds: float, seed: int, rate: int) -> np.ndarray:
    """Return three wandering tones over a little noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * f * time + 3 * np.sin(2 * np.pi * time)) for f in rng.uniform(100, 3000, 3)]
    return (0.1 * sum(tones) + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


def names(kind: str, count: int) -> list[str]:
    """Return names of recordings; the last one is held out."""
    every = [Clip(f"{kind}/{index}.wav", kind, 0, 0) for index in range(1000)]
    train_side = [clip.name for clip in every if not clip.held_out]
    return [*train_side[: count - 1], next(clip.name for clip in every if clip.held_out)]


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like shared/audio/train: a manifest and two tar shards, one of them not to be used."""
    folder = tmp_path_factory.mktemp("audio")
    plan = [(name, "speech", "a.tar") for name in names("speech", 4)]
    plan += [(name, "music", "a.tar") for name in names("music", 3)] + [("extra/0.wav", "optional", "b.tar")]
    rows = []
    for seed, (name, kind, shard) in enumerate(plan):
        rate = 24000 if kind == "music" else SAMPLE_RATE
        data = io.BytesIO()
        soundfile.write(data, sound(1.5 + 0.25 * seed, seed, rate), rate, format="FLAC")
        with tarfile.open(folder / shard, "a") as tar:
            member = tarfile.TarInfo("./" + name)
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
        rows.append([name, f"{kind} source", f"owner/{kind}", "CC0-1.0", kind, 1.5 + 0.25 * seed, shard])
    with (folder / "train_manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])
    return folder


def session(audio: Path, out: Path, **changes: Any) -> Session:
    """Return a session of two steps per stage on tiny models."""
    recipe = RunOptions(out, steps=2, minutes=60, batch=4, learning_rate=1e-3, evaluate_every=2)
    return Session(audio, out, out / "weights", lambda _: replace(recipe, **changes), CONFIGS)


@pytest.fixture(scope="module", autouse=True)
def _few_held_out_crops() -> Iterator[None]:
    """Evaluate on 6 crops or blocks instead of 64 and more, which would take most of the time."""
    losses, polish_losses = latent.LatentStage._run, polish.PolishStage._run

    def few(corpus: Corpus, length: int, batch: int, **options: Any) -> Crops:
        return Crops(corpus, length, min(batch, 6), **options)

    def few_blocks(
        stage: latent.LatentStage, rng: np.random.Generator, rate: int, batch: int, count: int, **options: bool
    ) -> tuple[Tensor, ...]:
        return losses(stage, rng, rate, min(batch, 6), min(count, 6), **options)

    def few_chains(
        stage: polish.PolishStage, rng: np.random.Generator, rate: int, batch: int, **options: bool
    ) -> tuple[Tensor, ...]:
        return polish_losses(stage, rng, rate, min(batch, 6), **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (mae, vae, vocoder):
            patch.setattr(module, "Crops", few)
        patch.setattr(latent.LatentStage, "_run", few_blocks)
        patch.setattr(polish.PolishStage, "_run", few_chains)
        yield


@pytest.fixture(scope="module")
def trained(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session whose stages have all been run."""
    run = session(audio, tmp_path_factory.mktemp("run"))
    for stage in STAGES.values():
        stage(run)
    return run


@pytest.fixture
def run(trained: Session, tmp_path: Path) -> Session:
    """A copy of the trained session to go on with."""
    out = tmp_path / "run"
    copytree(trained.out, out, ignore=ignore_patterns("tensorboard", "weights"))
    return session(trained.audio, out)


def changed(run: Session, **changes: Any) -> Session:
    """Return a session in the same folder with other options."""
    return session(run.audio, run.out, **changes)


def saved(run: Session, stage: str) -> dict[str, Any]:
    """Return what a stage's checkpoint holds, flat."""

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}

    found = flat(torch.load(run.out / f"{stage}.pt", weights_only=True), "")
    return {key: value for key, value in found.items() if key != ".seconds"}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Tell whether two checkpoints are equal in every bit."""
    assert a.keys() == b.keys()
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(a.values(), b.values(), strict=True)
    )


class TestData:
    def test_shards_are_decoded_at_16_khz_without_the_optional_one(self, trained: Session) -> None:
        corpus = trained.corpus
        assert [clip.kind for clip in corpus.clips] == ["speech"] * 4 + ["music"] * 3
        assert [clip.length for clip in corpus.clips] == [round((1.5 + 0.25 * i) * SAMPLE_RATE) for i in range(7)]
        wanted = torch.from_numpy(sound(1.75, 1, SAMPLE_RATE))
        assert (corpus.wave(corpus.clips[1]) - wanted).abs().max() < 1e-3
        around = corpus.wave(corpus.clips[1], -5, 5 + len(wanted) + 7)
        assert around[:5].abs().max() == around[-7:].abs().max() == 0
        assert torch.equal(around[5:-7], corpus.wave(corpus.clips[1]))

    def test_the_optional_shard_is_decoded_where_it_is_asked_for(self, audio: Path, tmp_path: Path) -> None:
        corpus = Corpus.open(audio, tmp_path, optional=True)
        assert [clip.kind for clip in corpus.clips] == ["speech"] * 4 + ["music"] * 3 + ["optional"]

    def test_the_decoded_corpus_is_kept(self, trained: Session, tmp_path: Path) -> None:
        again = Corpus.open(tmp_path / "nothing", trained.out / "audio")
        assert again.clips == trained.corpus.clips

    def test_a_folder_without_a_manifest_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(AudioError, match=r"train_manifest.csv is missing; point --audio at"):
            Corpus.open(tmp_path, tmp_path / "cache")

    def test_crops_follow_from_seed_step_and_rank(self, trained: Session) -> None:
        crops = Crops(trained.corpus, 4000, 3, seed=5)
        first = crops(7, 1)
        assert first.shape == (3, 4000)
        assert torch.equal(first, Crops(trained.corpus, 4000, 3, seed=5)(7, 1))
        others = [crops(7, 0), crops(8, 1), Crops(trained.corpus, 4000, 3, seed=6)(7, 1)]
        assert not any(torch.equal(first, other) for other in others)

    @pytest.mark.parametrize("held_out", [False, True])
    def test_crops_keep_to_their_side(self, held_out: bool) -> None:
        """Clips of the other side sound different, and lie on both sides of every clip."""
        plan = [Clip(name, "speech", 1000 * i, 1000) for i, name in enumerate(names("speech", 40))]
        plan += [replace(plan[-1], start=40000), replace(plan[0], start=41000)]
        level = np.repeat([-1000 if clip.held_out else 1000 for clip in plan], 1000).astype(np.int16)
        assert len(set(level.tolist())) == 2
        crops = Crops(Corpus(level, plan), 300, 16, seed=0, held_out=held_out)
        heard = torch.cat([crops(step) for step in range(20)])
        assert torch.equal(heard.sign().unique(), torch.tensor([-1.0, 0.0] if held_out else [0.0, 1.0]))


class TestBlocks:
    def test_pairs_stay_within_a_clip_and_a_side(self, trained: Session) -> None:
        blocks = trained.blocks(latents=True)
        counts = [clip.length // CONFIGS[100].block for clip in trained.corpus.clips]
        owner = np.repeat(np.arange(7), counts)
        side = np.array([clip.held_out for clip in trained.corpus.clips])[owner]
        assert len(blocks.features) == len(owner)
        stage = latent.LatentStage(blocks, trained.models(), trained.options("latent"))
        for held_out in (False, True):
            now = stage.pool[held_out]
            assert len(now) == sum(counts[i] - 1 for i in range(7) if trained.corpus.clips[i].held_out == held_out)
            assert (owner[now - 1] == owner[now]).all()
            assert (side[now] == held_out).all()

    def test_features_are_those_of_the_codec(self, trained: Session) -> None:
        blocks, corpus = trained.blocks(latents=False), trained.corpus
        codec = SemantiCodec.from_model(CONFIGS[100], trained.models()[100])
        rng, first = np.random.default_rng(7), 0
        for clip in corpus.clips:
            wave = corpus.wave(clip) * 10 ** (rng.uniform(-10, 3) / 20)
            wanted = codec.features(wave, SAMPLE_RATE)[0]
            count = clip.length // CONFIGS[100].block
            found = torch.from_numpy(blocks.features[first : first + count].astype(np.float32)).flatten(0, 1)
            assert found.std() > 0.1
            assert (found - wanted[: len(found)]).abs().max() < 0.01
            first += count

    def test_arrays_older_than_their_network_are_computed_again(self, run: Session) -> None:
        path = run.out / "features.npy"
        wanted = np.load(path)
        np.save(path, np.zeros_like(wanted))
        assert not np.any(run.blocks(latents=False).features)
        (run.out / "mae.pt").touch()
        assert np.array_equal(run.blocks(latents=False).features, wanted)


def clustered(points: np.ndarray, size: int, rounds: int) -> tuple[Tensor, float, int]:
    """Return (centroids, mean squared error, centroids in use) of k-means over 16 points ``[D]`` per block."""
    config = replace(CONFIGS[100], encoder=replace(CONFIGS[100].encoder, semantic_size=size))
    no = np.zeros(len(points) // 16, bool)
    table = kmeans(Blocks(points.reshape(-1, 16, 16).astype(np.float16), None, None, no, no), config, rounds=rounds)
    x = torch.from_numpy(points.astype(np.float16).astype(np.float32))
    codes = nearest(x, table)
    return table, float((x - table[codes]).square().mean()), len(codes.unique())


class TestKMeans:
    def test_error_falls(self) -> None:
        points = np.random.default_rng(0).standard_normal((3200, 16))
        errors = [clustered(points, 50, rounds)[1] for rounds in (0, 1, 4)]
        assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2] * 1.0
        assert clustered(points, 50, 4)[2] == 50

    def test_no_centroid_stays_empty(self) -> None:
        """Most points coincide, so that most starting centroids do."""
        points = np.random.default_rng(0).standard_normal((1600, 16))
        points[:1400] = 0.0
        assert clustered(points, 40, 0)[2] < 20
        assert clustered(points, 40, 20)[2] == 40

    def test_held_out_blocks_do_not_count(self) -> None:
        points = np.random.default_rng(0).standard_normal((80, 16, 16)).astype(np.float16)
        held_out = np.arange(80) >= 60
        config = CONFIGS[100]
        first = kmeans(Blocks(points, None, None, held_out, held_out), config)
        points[60:] += 5
        assert torch.equal(first, kmeans(Blocks(points, None, None, held_out, held_out), config))


class Killed(Exception):
    """Stands for the end of a process at the worst moment."""


class TestResume:
    def test_an_interrupted_run_ends_like_an_uninterrupted_one(
        self, run: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Weights, codebooks with their revived codes, averages and optimiser: equal in every bit."""
        start = latent.RateCodes.start

        def dying(codes: latent.RateCodes, patches: Tensor) -> None:
            """Start with codes that die, and so are placed anew at random, at the first step that does not use them."""
            start(codes, patches)
            codes.quantizer._codebook.cluster_size.fill_(0.1)
            codes.quantizer._codebook.embed_avg.mul_(0.1)

        monkeypatch.setattr(latent.RateCodes, "start", dying)
        (run.out / "latent.pt").unlink()
        whole = changed(run, steps=6, evaluate_every=3)
        STAGES["latent"](whole)
        wanted = saved(run, "latent")
        assert wanted[".step"] == 6
        (run.out / "latent.pt").unlink()
        step = latent.LatentStage.step

        def interrupted(stage: latent.LatentStage, fabric: Fabric, index: int, progress: float) -> loop.Logs:
            if index == 5:
                raise Killed
            return step(stage, fabric, index, progress)

        with monkeypatch.context() as patch:
            patch.setattr(latent.LatentStage, "step", interrupted)
            with pytest.raises(Killed):
                STAGES["latent"](whole)
        assert saved(run, "latent")[".step"] == 4
        STAGES["latent"](whole)
        assert same(saved(run, "latent"), wanted)

    def test_a_checkpoint_half_written_leaves_the_one_before(
        self, run: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = saved(run, "mae")

        def half(_: Fabric, path: Path, state: dict[str, Any]) -> None:
            del state
            path.write_bytes(b"PK half of a checkpoint")
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Fabric, "save", half)
            with pytest.raises(Killed):
                STAGES["mae"](changed(run, steps=4))
        assert same(saved(run, "mae"), before)
        STAGES["mae"](changed(run, steps=3))
        assert saved(run, "mae")[".step"] == 3

    def test_a_stage_that_has_ended_is_left_alone(self, run: Session) -> None:
        before = {path: path.stat().st_mtime_ns for path in run.out.glob("*.*")}
        for name in STAGES:
            STAGES[name](run)
        assert {path: path.stat().st_mtime_ns for path in run.out.glob("*.*")} == before

    @pytest.mark.parametrize("stage", ["mae", "latent"])
    def test_the_seed_decides(self, run: Session, stage: str) -> None:
        first = saved(run, stage)
        for seed, equal in ((0, True), (1, False)):
            (run.out / f"{stage}.pt").unlink()
            STAGES[stage](changed(run, seed=seed))
            assert same(saved(run, stage), first) == equal

    def test_time_ends_a_run(self, run: Session) -> None:
        (run.out / "mae.pt").unlink()
        STAGES["mae"](changed(run, steps=10**6, minutes=0.01))
        assert 0 < saved(run, "mae")[".step"] < 10**4

    @pytest.mark.parametrize(
        ("stage", "missing", "named"),
        [
            ("latent", "semantic_50.npy", "semantic"),
            ("vocoder", "vae.pt", "vae"),
            ("polish", "latent.pt", "latent"),
            ("export", "polish.pt", "polish"),
            ("semantic", "mae.pt", "mae"),
        ],
    )
    def test_a_stage_left_out_is_named(self, run: Session, stage: str, missing: str, named: str) -> None:
        (run.out / missing).unlink()
        with pytest.raises(CheckpointError, match=rf"{missing} is missing; run the stage '{named}' first"):
            STAGES[stage](run)


def test_learning_rate_warms_up_and_falls() -> None:
    assert rate_at(0, 0, 1.0) == pytest.approx(0.01)
    assert rate_at(0, 99, 1.0) == pytest.approx(1.0)
    assert rate_at(0.5, 1000, 1.0) == pytest.approx(0.525)
    assert rate_at(1.0, 1000, 2.0) == pytest.approx(0.1)


def made(run: Session, name: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Stage, Fabric]:
    """Return a stage ready for its first step, instead of training it."""
    found: list[tuple[Stage, Fabric]] = []
    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", lambda stage, _, fabric: found.append((stage, fabric)))
        STAGES[name](changed(run, **changes))
    found[0][0].setup(found[0][1])
    return found[0]


class TestLearning:
    @pytest.mark.parametrize(
        ("name", "loss"),
        [("mae", "masked"), ("mae", "visible"), ("vae", "error"), ("vocoder", "mel_l1")],
    )
    def test_loss_falls_on_one_batch(
        self, trained: Session, monkeypatch: pytest.MonkeyPatch, name: str, loss: str
    ) -> None:
        stage, fabric = made(trained, name, monkeypatch, learning_rate=5e-3)
        batch = stage.crops(0)
        stage.crops = lambda *_: batch
        losses = [float(stage.step(fabric, index, 0.0)[loss]) for index in range(25)]
        assert losses[-1] < 0.75 * losses[0]

    def test_an_encoder_is_learnt_for_a_decoder_that_stands_still(
        self, trained: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage, fabric = made(trained, "inverse", monkeypatch, learning_rate=5e-3)
        assert isinstance(stage, vae.InverseStage)
        shipped = SemantiCodec.from_pretrained(trained.weights, preset="mini-100", parts="decoder").model.latent
        assert shipped is not None
        batch = stage.crops(0)
        monkeypatch.setattr(stage, "crops", lambda *_: batch)
        losses = [float(stage.step(fabric, index, 0.0)["error"]) for index in range(25)]
        assert losses[-1] < 0.95 * losses[0]  # the decoder, hardly trained, leaves little to gain
        for part in (stage.vae.decoder, stage.vae.post_quant_conv):
            own = shipped.vae.decoder if part is stage.vae.decoder else shipped.vae.post_quant_conv
            assert same(dict(part.state_dict()), dict(own.state_dict()))

    def test_latent_losses_fall_on_few_blocks(self, trained: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        stage, fabric = made(trained, "latent", monkeypatch, learning_rate=5e-3)
        monkeypatch.setattr(latent, "RATES", (100,))
        monkeypatch.setattr(latent, "TURNS", (100,))
        stage.pool = dict.fromkeys(stage.pool, stage.pool[False][:3])
        before = stage.evaluate()
        for index in range(40):
            stage.step(fabric, index, 0.0)
        after = stage.evaluate()
        assert after["velocity_100"] < 0.75 * before["velocity_100"]
        assert after["sketch_100"] < 0.75 * before["sketch_100"]

    def test_polish_improves_the_decode_and_leaves_the_codes(
        self, trained: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The mel error falls, through the U-Net and through the mel decoder; codes get no gradient."""
        stage, fabric = made(trained, "polish", monkeypatch, learning_rate=5e-3)
        assert isinstance(stage, polish.PolishStage)
        monkeypatch.setattr(polish, "RATES", (100,))
        monkeypatch.setattr(polish, "TURNS", (100,))
        stage.pool = dict.fromkeys(stage.pool, stage.pool[False][:3])
        codes = {name: value.clone() for name, value in stage.trained.codes(100).state_dict().items()}
        moving = {name: value.clone() for name, value in stage.raw.state_dict().items()}
        before = stage.evaluate()
        for index in range(40):
            stage.step(fabric, index, 0.0)
        after = stage.evaluate()
        assert after["error_100"] < 0.75 * before["error_100"]
        assert same(codes, dict(stage.trained.codes(100).state_dict()))
        for part in ("unet.out.2.weight", "vae.decoder.conv_out.weight", "conditioners.100.enter.weight"):
            assert not torch.equal(moving[part], stage.raw.state_dict()[part])

    def test_the_second_block_continues_from_the_first(self, trained: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        """As in use, the known beginning of a window is what the window before it became."""
        stage, _ = made(trained, "polish", monkeypatch)
        assert isinstance(stage, polish.PolishStage)
        rng, heard = np.random.default_rng(0), []
        decode = stage.raw.latent.mel
        monkeypatch.setattr(stage.raw.latent, "mel", lambda z: heard.append(z) or decode(z))
        with torch.no_grad():
            stage._run(rng, 100, 2, held_out=False, dropout=False)
        assert len(heard) == 2
        assert torch.equal(heard[1][:, :, :4], heard[0][:, :, -4:])

    def test_frozen_codes_stand_still(self, trained: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        """Also for what follows the switch: weight decay, momentum and the evaluation in between."""
        stage, fabric = made(trained, "latent", monkeypatch)
        assert isinstance(stage, latent.LatentStage)

        def snapshot() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            state = {name: value.clone() for name, value in stage.raw.state_dict().items()}
            codes = {name: value for name, value in state.items() if name.startswith("rates.")}
            return codes, {name: value for name, value in state.items() if "unet." in name or "conditioner" in name}

        start = snapshot()
        for index in range(4):
            stage.step(fabric, index, 0.0)
        before = snapshot()
        for name in ("residual.project.weight", "quantizer._codebook.embed"):
            assert not any(torch.equal(before[0][f"rates.{r}.{name}"], start[0][f"rates.{r}.{name}"]) for r in RATES)
        for index in range(4, 8):
            stage.step(fabric, index, latent.FREEZE_CODES_AT)
            stage.evaluate()
        after = snapshot()
        assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
        assert all(not torch.equal(before[1][name], after[1][name]) for name in before[1] if "weight" in name)

    def test_which_streams_are_shown(self) -> None:
        drop = 0.1
        chance = torch.tensor([0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.99])
        acoustic, semantic = latent.kept(chance, drop).T
        assert acoustic.tolist() == [True, True, False, False, False, False, True, True]
        assert semantic.tolist() == [False, False, True, True, False, False, True, True]
        assert latent.kept(torch.rand(100), 0.0).all()

    def test_a_missing_past_reaches_nothing(self, trained: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the past is absent, neither its latents nor its codes change the loss; where present, both do."""
        stage, _ = made(trained, "latent", monkeypatch)
        assert isinstance(stage, latent.LatentStage)
        stage.raw.eval()
        fill(stage.raw.latent.unet)
        patches = torch.from_numpy(stage.blocks.features[:2].astype(np.float32))
        now = torch.from_numpy(stage.latents[1:2].astype(np.float32))
        mels = torch.from_numpy(stage.mels[1:2].astype(np.float32))
        noise = torch.randn((1, 8, 12, 16), generator=torch.Generator().manual_seed(0))

        def loss(present: bool, past: float, keep_before: bool) -> float:
            known = latent.Known(torch.full((1, 8, 4, 16), past), torch.tensor([present]))
            keep = torch.tensor([[keep_before] * 2, [True] * 2])
            with torch.no_grad():
                return float(stage.raw(patches, now, mels, known, keep, 100, noise, torch.tensor([500]))[0])

        assert loss(False, 0.0, True) == loss(False, 3.0, True) == loss(False, 0.0, False)
        assert len({loss(True, 0.0, True), loss(True, 3.0, True), loss(True, 0.0, False)}) == 3


class TestDevices:
    @pytest.mark.parametrize("name", ["mae", "vae", "vocoder", "latent", "polish"])
    def test_bf16(self, trained: Session, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """Networks compute in bf16, weights and what losses compare with stay float32, codes are decided in float32."""
        stage, fabric = made(trained, name, monkeypatch, precision="bf16-mixed")
        reference, plain = made(trained, name, monkeypatch)
        for one in (stage, reference):
            if isinstance(one, vocoder.VocoderStage):  # a new one corrects nothing yet, in any precision
                nn.init.constant_(one.raw.vocoder.head.weight, 1e-3)
        seen: dict[str, torch.dtype] = {}

        def watch(module: nn.Module, where: str) -> None:
            module.register_forward_hook(
                lambda _m, args, out: seen.update({where: out.dtype, where + " in": args[0].dtype})
            )

        layer = next(m for m in stage.raw.modules() if isinstance(m, nn.Conv2d | nn.Conv1d))
        watch(layer, "network")
        if isinstance(stage, latent.LatentStage):
            watch(stage.raw.codes(100).residual, "codes")
        logs, wanted = stage.step(fabric, 0, 0.0), reference.step(plain, 0, 0.0)
        assert seen.pop("network") == torch.bfloat16
        assert set(seen.values()) == {torch.float32}
        for key, value in wanted.items():
            assert logs[key].dtype == torch.float32
            assert float(logs[key]) == pytest.approx(float(value), rel=0.03, abs=1e-3)
        assert any(float(logs[key]) != float(value) for key, value in wanted.items())
        assert all(parameter.dtype == torch.float32 for parameter in stage.raw.parameters())

    def test_two_processes(self, run: Session) -> None:
        """Fabric starts them; at the end all ranks hold the same weights, codebooks and averages, and one has saved."""
        script = run.out / "both.py"
        script.write_text(
            TWO_PROCESSES.format(tests=str(Path(__file__).parent), audio=str(run.audio), out=str(run.out))
        )
        (run.out / "latent.pt").unlink()
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        ranks = [torch.load(run.out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
        assert same(*ranks)
        found = saved(run, "latent")
        assert found[".step"] == 4
        assert all(torch.equal(found[f".{name}"], value) for name, value in ranks[0].items())


TWO_PROCESSES = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from semanticodec.training import stages
from test_training import STAGES, session

torch.set_num_threads(1)
run = session(Path({audio!r}), Path({out!r}), devices=2, steps=4)
train = stages.train

def keeping(stage, options, fabric):
    train(stage, options, fabric)
    modules = {{key: item for key, item in stage.state().items() if isinstance(item, torch.nn.Module)}}
    state = {{f"{{k}}.{{name}}": v for k, m in modules.items() for name, v in m.state_dict().items()}}
    torch.save(state, run.out / f"rank{{fabric.global_rank}}.pt")

stages.train = keeping
STAGES["latent"](run)
"""


class TestReports:
    def test_curves_and_examples(self, trained: Session) -> None:
        kinds = {"mae": "images", "vae": "images", "vocoder": "audio", "latent": "images", "polish": "images"}
        for name, kind in kinds.items():
            found = EventAccumulator(str(trained.out / "tensorboard" / name)).Reload().Tags()
            groups = {tag.split("/")[0] for tag in found["scalars"]}
            assert groups == {"train", "held_out"}
            assert len(found[kind]) == 1

    def test_silent_without_a_terminal(self, run: Session, capfd: pytest.CaptureFixture[str]) -> None:
        for path in [*run.out.glob("audio/*"), *run.out.glob("*.npy")]:
            path.unlink()
        STAGES["semantic"](changed(run, steps=3))
        STAGES["mae"](changed(run, steps=3))
        assert capfd.readouterr() == ("", "")

    def test_bars_on_a_terminal(self, run: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "stderr", Terminal())
        (run.out / "features.npy").unlink()
        STAGES["semantic"](run)
        STAGES["mae"](changed(run, steps=3))
        shown = sys.stderr.getvalue()
        assert "features" in shown
        assert "mae" in shown


class TestExport:
    def test_the_folder_edits(self, trained: Session) -> None:
        codec = SemantiCodec.from_pretrained(trained.weights, preset="mini-100")
        wave = trained.corpus.wave(trained.corpus.clips[0])
        heard = codec.editor(codec.encode(wave, SAMPLE_RATE)).inpaint(wave, SAMPLE_RATE, [Region(0.4, 0.6)])
        kept = torch.ones(len(wave), dtype=torch.bool)
        kept[6400:9600] = False
        assert torch.equal(heard[kept], wave[kept])
        assert not torch.equal(heard[~kept], wave[~kept])

    @pytest.mark.parametrize("rate", RATES)
    def test_the_folder_decodes(self, trained: Session, rate: int) -> None:
        codec = SemantiCodec.from_pretrained(trained.weights, preset=f"mini-{rate}")
        assert codec.config == CONFIGS[rate]
        wave = trained.corpus.wave(trained.corpus.clips[0])
        codes = codec.encode(wave, SAMPLE_RATE)
        assert codes.shape == (1, 2, codec.config.frames(len(wave)))
        assert len(codes.unique()) > 3
        sound = codec.decode(codes, length=len(wave))
        assert sound.shape == (1, len(wave))
        assert sound.isfinite().all()
        assert sound.std() > 1e-4

    def test_weights_are_the_trained_ones_in_half_precision(self, trained: Session) -> None:
        codec = SemantiCodec.from_pretrained(trained.weights, preset="mini-50").model
        found = saved(trained, "latent")
        pairs = {
            "model.rates.50.residual.project.weight": codec.residual.project.weight,
            "model.rates.50.quantizer._codebook.embed": codec.codebooks.acoustic[None],
            "model.scale": codec.latent.scale,
        }
        for name, value in pairs.items():
            assert torch.equal(found["." + name].half().float(), value)
        other = saved(trained, "polish")[".model.vae.decoder.conv_out.weight"]
        assert torch.equal(other.half().float(), codec.latent.vae.decoder.conv_out.weight)
        table = np.load(trained.out / "semantic_50.npy")
        assert torch.equal(torch.from_numpy(table).half().float(), codec.codebooks.semantic)
        for path in trained.weights.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118

    def test_the_card_names_the_sources(self, trained: Session) -> None:
        card = (trained.weights / "README.md").read_text()
        assert "| music source | owner/music | CC0-1.0 | 0.00 |" in card
        assert "| speech source | owner/speech | CC0-1.0 | 0.00 |" in card
        assert "optional" not in card
        assert "no-as-is-resale" not in card

    def test_the_card_names_a_clause(self, audio: Path, tmp_path: Path) -> None:
        text = (audio / "train_manifest.csv").read_text().replace("CC0-1.0,music", "CC-BY+no-as-is-resale,music")
        (tmp_path / "train_manifest.csv").write_text(text)
        clips = [Clip(row["file"], row["kind"], 0, 1) for row in manifest(tmp_path)]
        assert "may not be sold as they are" in stages.card("x", "x", tmp_path, clips)


class TestCommand:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Session]]:
        """Stages that only note that they were asked for."""
        found: list[tuple[str, Session]] = []
        for name in STAGES:
            monkeypatch.setitem(STAGES, name, lambda session, name=name: found.append((name, session)))
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        monkeypatch.setattr("logging.basicConfig", lambda **_: None)
        return found

    def test_all_stages_in_order(self, asked: list[tuple[str, Session]], tmp_path: Path) -> None:
        app = Typer()
        app.command()(command.main)
        args = ["all", "--out", str(tmp_path), "--steps", "7", "--precision", "bf16-mixed", "--seed", "3", "--compile"]
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 0, result.output
        order = ["mae", "semantic", "vae", "vocoder", "latent", "polish", "export", "prior", "inverse"]
        assert [name for name, _ in asked] == order
        options = asked[0][1].options("vae")
        recipe = stages.RECIPES["vae"]
        assert options == replace(recipe, out=tmp_path, steps=7, precision="bf16-mixed", seed=3, compile=True)
        assert set(asked[0][1].configs) == set(RATES)

    def test_an_unknown_stage_is_refused(self, asked: list[tuple[str, Session]]) -> None:
        app = Typer()
        app.command()(command.main)
        result = CliRunner().invoke(app, ["decoder"])
        assert result.exit_code == 2
        assert "choose all or one of mae, semantic" in " ".join(result.output.replace("│", " ").split())
        assert not asked
