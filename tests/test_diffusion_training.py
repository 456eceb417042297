"""The objective that every system trains with: what is guessed, how conditions are left out, averages, ControlNets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from tiny import UNET, VAE, fill, noise
from torch import Tensor

from semanticodec.config import (
    ControlNetConfig,
    LatentConfig,
    MelConfig,
    ScheduleConfig,
    VocosConfig,
)
from semanticodec.errors import ConfigError
from semanticodec.latent import Conditioning, Control, Known, LatentDiffusion
from semanticodec.nn.controlnet import ControlNet
from semanticodec.training import diffusion
from semanticodec.training.diffusion import Batch, DiffusionStage, denoising_loss, dropped, timesteps
from semanticodec.training.loop import RunOptions, follow, train

FILMED = replace(UNET, in_channels=8, contexts=(None, 6), film_dim=5)
CONFIG = LatentConfig(
    unet=FILMED,
    vae=VAE,
    vocoder=VocosConfig(dim=16, hidden=24, layers=2, right=(1, 1, 0)),
    mel=MelConfig(bins=16),
    steps=2,
)
SHAPE = (2, 4, 8, 4)


def core(config: LatentConfig = CONFIG, *, filled: bool = True) -> LatentDiffusion:
    latent = LatentDiffusion(config, vae_encoder=True)
    if filled:
        fill(latent)
    return latent


def conditioning(seed: int = 1, length: int = 3) -> Conditioning:
    mask = torch.ones(2, length)
    mask[1, -1] = 0
    context = noise(2, length, 6, seed=seed)
    return Conditioning(((context, mask),), noise(*SHAPE, seed=seed), noise(2, 5, seed=seed))


def nothing() -> Conditioning:
    return Conditioning(((torch.zeros(2, 1, 6), None),), torch.full(SHAPE, -1.0), torch.zeros(2, 5))


def predicted(latent: LatentDiffusion, given: Conditioning, x: Tensor, t: Tensor) -> Tensor:
    return latent.predict(x, t, latent.prepare(given))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
@torch.inference_mode()
def test_what_is_guessed(prediction: str, kind: str) -> None:
    """The noise, or v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0, of x_t as the schedule has it (spec 2.5)."""
    latent = core(replace(CONFIG, prediction=prediction, schedule=ScheduleConfig(kind)))  # type: ignore[arg-type]
    x0, drawn, t = noise(*SHAPE, seed=2), noise(*SHAPE, seed=3), torch.tensor([20, 700])
    bar = torch.tensor([latent.schedule.alpha_bar[i] for i in t]).reshape(2, 1, 1, 1)
    guess = predicted(latent, conditioning(), bar.sqrt() * x0 + (1 - bar).sqrt() * drawn, t)
    target = drawn if prediction == "eps" else bar.sqrt() * drawn - (1 - bar).sqrt() * x0
    loss = denoising_loss(latent, conditioning(), x0, drawn, t)
    torch.testing.assert_close(loss, (guess - target).square().mean())


@torch.inference_mode()
def test_a_known_beginning_is_not_compared() -> None:
    latent = core(replace(CONFIG, unet=replace(FILMED, in_channels=9)))  # told by one more channel what is known
    known = Known(noise(2, 4, 4, 4, seed=4), torch.tensor([True, True]))
    given = replace(conditioning(), concat=noise(2, 4, 12, 4))
    x0, drawn, t = noise(*SHAPE, seed=2), noise(2, 4, 12, 4, seed=3), torch.tensor([20, 700])
    other = torch.cat([drawn[:, :, :4] + 1, drawn[:, :, 4:]], 2)
    loss = denoising_loss(latent, given, x0, drawn, t, known)
    torch.testing.assert_close(denoising_loss(latent, given, x0, other, t, known), loss)
    assert (denoising_loss(latent, given, x0 + 1, drawn, t, known) - loss).abs() > 1e-3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"concat of the conditioning is missing; this U-Net needs \[2, 4, 8, 4\]"):
        denoising_loss(
            core(), replace(conditioning(), concat=None), noise(*SHAPE), noise(*SHAPE), torch.tensor([20, 700])
        )


@pytest.mark.parametrize("length", [1, 3, 5])
@torch.inference_mode()
def test_a_row_without_its_condition_is_the_unconditional_row(length: int) -> None:
    """Contexts of other lengths included: what is left over is hidden."""
    latent, x, t = core(), noise(*SHAPE, seed=5), torch.tensor([500, 500])
    asked = conditioning(length=length)
    mixed = predicted(latent, dropped(asked, nothing(), torch.tensor([True, False])), x, t)
    torch.testing.assert_close(mixed[0], predicted(latent, nothing(), x, t)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], predicted(latent, asked, x, t)[1], rtol=1e-5, atol=1e-5)
    assert (predicted(latent, nothing(), x, t)[1] - mixed[1]).abs().max() > 0.01


def test_what_one_side_lacks_is_not_dropped_in_silence() -> None:
    rows = torch.tensor([True, False])
    with pytest.raises(ConfigError, match="film and concat"):
        dropped(conditioning(), replace(nothing(), film=None, concat=None), rows)
    with pytest.raises(ConfigError, match="has concat;"):
        dropped(replace(conditioning(), concat=None), nothing(), rows)


def test_controls_stay() -> None:
    control = Control(ControlNet(ControlNetConfig(FILMED, hint_widths=(4, 6, 8))), noise(2, 1, 32, 16))
    asked = replace(conditioning(), controls=(control,))
    assert dropped(asked, nothing(), torch.tensor([True, True])).controls == (control,)


def test_timesteps_are_uniform_but_for_the_share_of_pure_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    t = timesteps(20_000, 10, generator, 0.25)
    assert (t[:5000] == 9).all()
    share = torch.bincount(timesteps(20_000, 10, generator), minlength=10) / 20_000
    assert (share - 0.1).abs().max() < 0.01


def test_the_average_follows_as_published() -> None:
    """(1 + n) / (10 + n) of the old after few updates, later 0.9999 (spec 2.7)."""
    average, module = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, keep in ((0, 0.1), (89, 90 / 99), (10**6, 0.9999)):
        torch.nn.init.constant_(average.weight, 1.0)
        torch.nn.init.constant_(module.weight, 3.0)
        follow(average, module, step, diffusion.AVERAGE)
        assert average.weight.item() == pytest.approx(keep + 3 * (1 - keep))


def options(out: Path, steps: int = 60) -> RunOptions:
    return RunOptions(out, steps=steps, minutes=60, batch=2, learning_rate=5e-3)


def one_batch(*_: int) -> Batch:
    """Latents with a pattern, as those of sounds have."""
    return Batch(noise(2, 4, 1, 4, seed=7).expand(SHAPE), conditioning(), nothing())


def run(stage: DiffusionStage, steps: int) -> tuple[float, float]:
    """Return the loss before and after learning from one batch."""
    fabric = Fabric(accelerator="cpu", devices=1)
    stage.setup(fabric)
    before = float(stage.evaluate()["loss"])
    for index in range(steps):
        stage.step(fabric, index, 0.0)
    return before, float(stage.evaluate()["loss"])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_one_batch_is_learnt(tmp_path: Path, prediction: str) -> None:
    unet = replace(FILMED, base=16)
    latent = core(replace(CONFIG, prediction=prediction, unet=unet), filled=False)  # type: ignore[arg-type]
    before_vae = latent.vae.encoder.conv_in.weight.clone()
    before, after = run(DiffusionStage(latent, latent.unet, one_batch, one_batch, options(tmp_path)), 30)
    assert after < 0.6 * before
    assert torch.equal(latent.vae.encoder.conv_in.weight, before_vae), "all but the U-Net stands still"


def test_the_share_of_rows_without_a_condition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def watched(asked: Conditioning, absent: Conditioning, rows: Tensor) -> Conditioning:
        seen.append(rows)
        return dropped(asked, absent, rows)

    monkeypatch.setattr(diffusion, "dropped", watched)
    monkeypatch.setattr(diffusion, "denoising_loss", lambda latent, *_: latent.unet.out[2].bias.sum())
    latent = core()
    fabric = Fabric(accelerator="cpu", devices=1)
    stage = DiffusionStage(latent, latent.unet, one_batch, one_batch, options(tmp_path))
    stage.setup(fabric)
    for index in range(100):
        stage.step(fabric, index, 0.0)
    trained = torch.cat(seen).float().mean()
    assert 0.05 < trained < 0.16
    seen.clear()
    stage.evaluate()
    assert not torch.cat(seen).any()


def test_a_controlnet_learns_beside_a_base_that_stands_still(tmp_path: Path) -> None:
    latent = core()
    base = {name: value.clone() for name, value in latent.state_dict().items()}
    control = ControlNet(ControlNetConfig(FILMED, hint_widths=(4, 6, 8)))
    control.copy_from(latent.unet)
    hint = noise(2, 1, 32, 16, seed=8)

    def batch(*_: int) -> Batch:
        given = one_batch()
        return given._replace(conditioning=replace(given.conditioning, controls=(Control(control, hint),)))

    stage = DiffusionStage(latent, control, batch, batch, options(tmp_path))
    before, after = run(stage, 30)
    assert after < 0.8 * before
    assert all(torch.equal(value, base[name]) for name, value in latent.state_dict().items())
    assert all(name.startswith("network.") for name in stage.state()["model"].state_dict())


def test_a_run_continues_where_it_stopped(tmp_path: Path) -> None:
    def trained(folder: str, **changes: float) -> dict[str, dict[str, Tensor]]:
        out = tmp_path / folder
        out.mkdir(exist_ok=True)
        latent, fabric = core(), Fabric(accelerator="cpu", devices=1)
        how = replace(options(out, steps=2), **changes)  # type: ignore[arg-type]
        path = train(DiffusionStage(latent, latent.unet, one_batch, one_batch, how), how, fabric)
        saved: dict[str, dict[str, Tensor]] = torch.load(path, weights_only=True)
        return saved

    whole = trained("whole")
    assert trained("pieces", minutes=1e-9)["step"] == 1  # which is over after one step
    pieces = trained("pieces")
    assert whole["step"] == pieces["step"] == 2
    for part in ("model", "average"):
        assert all(torch.equal(whole[part][name], value) for name, value in pieces[part].items())
