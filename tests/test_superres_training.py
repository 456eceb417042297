"""The recipe of mini-sr from end to end, tiny: every stage runs, learns, and the export restores sound."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from lightning.fabric import Fabric
from test_superres import CONFIG, dull

from semanticodec.superres import SuperResolution
from semanticodec.training import superres, superres_stages, vae, vocoder
from semanticodec.training.data import Clip, Corpus, Crops
from semanticodec.training.loop import RunOptions
from semanticodec.training.stages import Session
from semanticodec.training.superres_stages import SUPERRES_STAGES

RATE = 24_000
FIELDS = ("file", "source", "repo", "licence", "kind", "seconds", "shard")


def names() -> list[str]:
    every = [Clip(f"speech/{index}.wav", "speech", 0, 0) for index in range(1000)]
    return [*[c.name for c in every if not c.held_out][:3], next(c.name for c in every if c.held_out)]


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bright recordings, one that ends at 4 kHz, and one stored at 16 kHz."""
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    plan = [(name, RATE, rng.standard_normal(36_000)) for name in names()]
    plan += [("speech/dull.wav", RATE, dull(36_000, cutoff=4000)[0].numpy())]
    plan += [("speech/16k.wav", 16_000, rng.standard_normal(24_000))]
    rows = []
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, rate, wave in plan:
            data = io.BytesIO()
            soundfile.write(data, 0.1 * wave, rate, format="FLAC")
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
            rows.append([name, "source", "owner/repository", "CC0-1.0", "speech", 1.5, "a.tar"])
    with (folder / "train_manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_held_out_crops() -> Iterator[None]:
    def few(corpus: Corpus, length: int, batch: int, **options: Any) -> Crops:
        return Crops(corpus, length, min(batch, 4), **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (vae, vocoder, superres):
            patch.setattr(module, "Crops", few)
        yield


def session(audio: Path, out: Path, **changes: Any) -> Session:
    recipe = RunOptions(out, steps=2, minutes=60, batch=2, learning_rate=1e-3, evaluate_every=2)
    return Session(audio, out, out / "weights", lambda _: replace(recipe, **changes), rate=RATE)


@pytest.fixture(scope="module")
def trained(audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    run = session(audio, tmp_path_factory.mktemp("run"))
    for stage in SUPERRES_STAGES.values():
        stage(run, CONFIG)  # type: ignore[call-arg]
    return run


def test_only_what_has_an_upper_band_is_learnt_from(trained: Session) -> None:
    assert {clip.name for clip in trained.corpus.clips} == {*names(), "speech/dull.wav"}
    assert [clip.name for clip in superres.wideband(trained.corpus, RATE).clips] == names()


def test_the_export_restores_sound(trained: Session) -> None:
    model = SuperResolution.from_pretrained(trained.weights)
    assert model.config == CONFIG
    wave = dull(9000)
    heard = model.upsample(wave, RATE)
    assert heard.shape == wave.shape
    assert not torch.allclose(heard, wave, atol=1e-4)
    assert (trained.weights / "README.md").read_text().count("| source | owner/repository | CC0-1.0 | 0.00 |") == 1


def test_the_export_holds_the_averaged_network_and_the_scale(trained: Session) -> None:
    model = SuperResolution.from_pretrained(trained.weights)
    saved = torch.load(trained.out / "superres.pt", weights_only=True)
    assert model.latent.scale == saved["model"]["scale"].half()
    name = "input_blocks.0.0.weight"
    assert torch.equal(model.latent.unet.state_dict()[name], saved["average"][name].half().float())
    assert not torch.equal(saved["average"][name], saved["model"][f"unet.{name}"])


@pytest.mark.slow
def test_a_stage_continues_where_it_stopped(trained: Session, tmp_path: Path) -> None:
    def run(folder: str, **changes: Any) -> dict[str, Any]:
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        for name in ("vae.pt", "audio"):
            if not (out / name).exists():
                (out / name).symlink_to(trained.out / name)
        SUPERRES_STAGES["superres"](session(trained.audio, out, **changes), CONFIG)  # type: ignore[call-arg]
        saved: dict[str, Any] = torch.load(out / "superres.pt", weights_only=True)
        return saved

    whole = run("whole")
    first = run("pieces", minutes=1e-9)  # which is over after one step
    pieces = run("pieces")
    assert (whole["step"], first["step"], pieces["step"]) == (2, 1, 2)
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][name], value) for name, value in pieces[part].items())


def test_the_loss_falls_on_one_batch(trained: Session) -> None:
    options = RunOptions(trained.out, steps=15, minutes=60, batch=2, learning_rate=5e-3)
    torch.manual_seed(0)
    stage = superres.SuperResStage(
        superres.wideband(trained.corpus, RATE), CONFIG, superres_stages._trained_vae(trained, CONFIG), options
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    stage.setup(fabric)
    for group in stage.optimizer.param_groups:
        group["lr"] = options.learning_rate
    losses = [float(stage.step(fabric, 0, 0.0)["velocity"]) for _ in range(15)]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_low_passes_are_drawn_from_the_seed(trained: Session) -> None:
    options = RunOptions(trained.out, steps=1, minutes=1, batch=2, learning_rate=1e-3)
    corpus = superres.wideband(trained.corpus, RATE)
    stage = superres.SuperResStage(corpus, CONFIG, superres_stages._trained_vae(trained, CONFIG), options)
    stage.setup(Fabric(accelerator="cpu", devices=1))
    wave = stage.crops(0)
    latents = [stage._latents(wave, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(latents[0][0], each[0]) for each in latents)
    assert torch.equal(latents[0][1], latents[1][1])
    assert not torch.equal(latents[0][1], latents[2][1])
