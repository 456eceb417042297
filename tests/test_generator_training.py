"""The recipe of mini-gen from end to end, tiny: labels, stages, ControlNet beside an untouched base, export."""

from __future__ import annotations

import csv
import io
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lightning.fabric import Fabric
from test_superres_training import names
from tiny import config as tiny_config
from tiny import fill
from torch import nn

from semanticodec import SemantiCodec, checkpoints, controls, inverse
from semanticodec.config import SAMPLE_RATE, UNetConfig
from semanticodec.controls import follow, loudness, loudness_hint
from semanticodec.diffusion import SamplerOptions
from semanticodec.generation import GeneratorConfig
from semanticodec.latent import Conditioning, Control, LatentDiffusion
from semanticodec.model import CodecModel
from semanticodec.nn.controlnet import ControlNet
from semanticodec.nn.vae import AutoencoderKL
from semanticodec.training import generator_stages
from semanticodec.training.generator import GeneratorStage, Told, Windows, window_samples
from semanticodec.training.generator_stages import GENERATOR_STAGES, control_config
from semanticodec.training.labels import LABELS, LabelledCrops, labels_of
from semanticodec.training.loop import RunOptions
from semanticodec.training.stages import Session

FIELDS = ("file", "source", "repo", "licence", "kind", "lang", "seconds", "orig", "shard")
LATENT = replace(
    tiny_config("mini").decoder.latent,
    unet=UNetConfig(
        base=8, mults=(1, 2), res_blocks=1, attention_levels=(1,), head_dim=8, groups=4, film_dim=6, film_mode="add"
    ),
    steps=2,
    guidance=1.5,
)
CONFIG = GeneratorConfig("tiny-gen", LATENT, (), window=16, overlap=4)


def row(**given: str) -> dict[str, str]:
    return {"kind": "sound", "source": "", "lang": "", "orig": "", **given}


def philharmonia(*names: str) -> dict[str, str]:
    orig = ";".join(f"philharmonia/audio/{name.partition('_')[0]}/{name}" for name in names)
    return row(kind="optional", source="philharmonia", orig=orig)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (row(kind="speech", lang="nl-BE"), ("speech", "speech-nl")),
        (row(kind="speech", lang="mixed"), ("speech",)),
        (row(source="esc10", orig="esc10/001 - Dog bark/1.ogg"), ("sound", "dog")),
        (row(source="blanket", orig="blanket/data/resources/sounds/rain.ogg@24.9+24.9"), ("sound", "rain")),
        (row(kind="music", source="cc0_beats", orig="cc0_beats/a.mp3"), ("music", "beat")),
        (row(kind="music", source="sonicpi", orig="sonicpi/etc/samples/drum_tom.flac;x"), ("music", "drums")),
        (row(kind="music", source="uh_music"), ("music",)),
        (row(kind="optional", source="another"), ()),
        (philharmonia("cello_A5_05.mp3", "cello_G2_phrase.mp3"), ("instrument", "cello")),
        (philharmonia("contrabassoon_G2.mp3", "bassoon_G2.mp3"), ("instrument", "bassoon")),
        (philharmonia("cello_A5.mp3", "flute_A5.mp3"), ("instrument",)),
        (philharmonia("banjo_A5.mp3"), ("instrument",)),
    ],
)
def test_labels_come_from_the_manifest(given: dict[str, str], wanted: tuple[str, ...]) -> None:
    assert labels_of(given) == wanted
    assert set(wanted) <= set(LABELS)


@pytest.fixture(scope="module")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four recordings: two dogs (high) and two of rain (noise), one of them held out."""
    folder = tmp_path_factory.mktemp("audio")
    rng, time, rows = np.random.default_rng(0), np.arange(SAMPLE_RATE) / SAMPLE_RATE, []
    with tarfile.open(folder / "a.tar", "w") as tar:
        for index, name in enumerate(names()):
            wave = 0.3 * np.sin(12_000 * time) if index % 2 else 0.1 * rng.standard_normal(SAMPLE_RATE)
            wave[: SAMPLE_RATE // 2] *= 0.01
            data = io.BytesIO()
            soundfile.write(data, wave, SAMPLE_RATE, format="FLAC")
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
            orig = f"esc10/{'001 - Dog bark' if index % 2 else '002 - Rain'}/{index}.ogg"
            rows.append([name, "esc10", "owner/repository", "CC0-1.0", "sound", "", 1.0, orig, "a.tar"])
    with (folder / "train_manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([FIELDS, *rows])
    return folder


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny codec's folder, with the encoder of its autoencoder."""
    folder = tmp_path_factory.mktemp("codec")
    config = tiny_config("mini")
    model = CodecModel(config)
    fill(model)
    checkpoints.save(folder, {config: model.state_dict()})
    whole = AutoencoderKL(config.decoder.latent.vae)
    fill(whole, 1)
    inverse.save(folder, whole.config, {name: value.half() for name, value in whole.state_dict().items()})
    return folder


@pytest.fixture(scope="module", autouse=True)
def _few_held_out_crops() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator_stages, "HELD_OUT", 2)
        yield


@pytest.fixture(scope="module")
def trained(audio: Path, codec: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    out = tmp_path_factory.mktemp("run")
    recipe = RunOptions(out, steps=2, minutes=60, batch=2, learning_rate=1e-3, evaluate_every=2)
    run = Session(audio, out, out / "weights", lambda _: recipe)
    for stage in GENERATOR_STAGES.values():
        stage(run, CONFIG, codec)  # type: ignore[call-arg]
    return run


def crops(run: Session, batch: int = 2) -> LabelledCrops:
    return LabelledCrops(run.corpus, run.audio, window_samples(64, 160), batch, seed=0)


def test_crops_have_their_labels_and_are_the_loud_places(trained: Session) -> None:
    wave, label = crops(trained, 40)(3)
    again = crops(trained, 40)(3)
    assert torch.equal(wave, again.wave)
    assert torch.equal(label, again.label)
    assert {LABELS[int(index)] for index in label} == {"sound", "dog", "rain"}
    crossings = (wave[:, 1:] * wave[:, :-1] < 0).float().mean(1)
    # A tone of 1.9 kHz crosses zero in about a quarter of the samples, white noise in half of them.
    assert (
        float(crossings[label == LABELS.index("dog")].max())
        < 0.4
        < float(crossings[label == LABELS.index("rain")].min())
    )
    assert float((wave.square().mean(1).sqrt() > 0.05).float().mean()) > 0.75


def test_loudness_is_a_smooth_curve_over_the_whole_image() -> None:
    mel = torch.full((1, 40, 64), -6.0)
    mel[:, 20:] = 0.0
    curve = loudness(mel)
    torch.testing.assert_close(curve[:, [0, 39]], torch.tensor([[-6.0, 0.0]]))
    assert bool((curve.diff() >= 0).all())
    assert int((curve.diff() > 0).sum()) > 5
    hint = loudness_hint(curve, 64)
    assert hint.shape == (1, 1, 40, 64)
    assert torch.equal(hint[..., 0], hint[..., 63])


def test_the_export_holds_what_was_trained(trained: Session, codec: Path) -> None:
    text, state = checkpoints.read_model(trained.weights)
    saved = torch.load(trained.out / "generator.pt", weights_only=True)
    assert '"dog"' in text
    name = "input_blocks.0.0.weight"
    assert torch.equal(state[f"latent.unet.{name}"], saved["average"][f"unet.{name}"].half())
    assert state["latent.scale"] == saved["average"]["scale"].half()
    assert not torch.equal(saved["average"][f"unet.{name}"], saved["model"][f"network.unet.{name}"])
    own = SemantiCodec.from_pretrained(codec, parts="decoder").model.latent
    assert own is not None
    name = "decoder.conv_in.weight"
    assert torch.equal(state[f"latent.vae.{name}"], own.vae.state_dict()[name].half())
    assert "owner/repository" in (trained.weights / "README.md").read_text()


def stage_of(run: Session, kind: str) -> tuple[GeneratorStage, LatentDiffusion, Told, ControlNet, Fabric]:
    """Return a stage on the crops of ``run`` with fresh random networks, ready for its first step."""
    torch.manual_seed(0)
    latent = LatentDiffusion(LATENT, vae_encoder=True)
    fill(latent)
    latent.scale.fill_(0.5)
    told = generator_stages._told(latent)
    network = ControlNet(control_config(CONFIG))
    network.copy_from(latent.unet)
    told.requires_grad_(kind == "generator")
    windows = Windows(crops(run), latent, told.labels, network if kind == "control" else None)
    options = RunOptions(run.out, steps=40, minutes=60, batch=2, learning_rate=3e-3)
    stage = GeneratorStage(told if kind == "generator" else network, windows, windows, options, name=kind)
    fabric = Fabric(accelerator="cpu", devices=1)
    stage.setup(fabric)
    for group in stage.optimizer.param_groups:
        group["lr"] = options.learning_rate
    return stage, latent, told, network, fabric


def losses(stage: GeneratorStage, fabric: Fabric, steps: int = 30) -> list[float]:
    return [float(stage.step(fabric, 0, 0.0)["loss"]) for _ in range(steps)]


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_the_generator_learns_one_batch(trained: Session) -> None:
    stage, _, told, _, fabric = stage_of(trained, "generator")
    before = copied(told.labels)
    seen = losses(stage, fabric)
    assert np.mean(seen[-3:]) < 0.8 * np.mean(seen[:3])
    assert any(not torch.equal(value, before[name]) for name, value in told.labels.state_dict().items())


def test_a_control_learns_one_batch_and_leaves_the_base_alone(trained: Session) -> None:
    stage, latent, told, network, fabric = stage_of(trained, "control")
    base, labels, own = copied(latent), copied(told.labels), copied(network)
    seen = losses(stage, fabric)
    assert np.mean(seen[-3:]) < 0.9 * np.mean(seen[:3])
    assert all(torch.equal(value, base[name]) for name, value in latent.state_dict().items())
    assert all(torch.equal(value, labels[name]) for name, value in told.labels.state_dict().items())
    changed = [name for name, value in network.state_dict().items() if not torch.equal(value, own[name])]
    assert {"zero_convs.0.0.weight", "middle_block_out.0.weight", "input_hint_block.0.weight"} <= set(changed)


def test_the_exported_control_steers_the_exported_generator(trained: Session) -> None:
    network = controls.read(trained.weights)
    assert network.control == control_config(CONFIG)
    latent = LatentDiffusion(LATENT)
    fill(latent)
    noise = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    film = torch.zeros(1, 6)

    def heard(*asked: Control) -> torch.Tensor:
        told = Conditioning(film=film, controls=asked)
        with torch.inference_mode():
            return latent.generate(told, Conditioning(film=film), lambda _: noise, SamplerOptions(steps=1))

    curve = torch.zeros(1, 64)
    assert torch.equal(heard(), heard(follow(network, curve, 64, 0.0)))
    assert not torch.equal(heard(), heard(follow(network, curve, 64)))
