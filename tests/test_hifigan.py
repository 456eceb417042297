"""The HiFi-GAN generator: its published names, its length, and its numbers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden import Goldens, check, shapes
from torch import Tensor, nn

from semanticodec.config import HiFiGANConfig, preset
from semanticodec.errors import ConfigError
from semanticodec.nn.hifigan import HiFiGAN

TINY = HiFiGANConfig(base=64, rates=(5, 2), kernels=(16, 4), stack_kernels=(3, 5), dilations=(1, 3))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vocoder() -> HiFiGAN:
    torch.manual_seed(0)
    return HiFiGAN(TINY, mel_bins=6)


def official() -> HiFiGAN:
    config = preset("semanticodec-100-4096").decoder.latent.vocoder
    assert isinstance(config, HiFiGANConfig)
    with torch.device("meta"):
        return HiFiGAN(config)


def test_official_size() -> None:
    assert sum(p.numel() for p in official().parameters()) == 55_264_897


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 7])
def test_official_rates_give_160_samples_per_row_and_32_more(rows: int) -> None:
    narrow = HiFiGAN(replace(HiFiGANConfig(), base=32))
    wave = narrow(noise(2, 64, rows))
    assert wave.shape == (2, 160 * rows + 32)
    assert wave.abs().max() <= 1


@torch.inference_mode()
def test_follows_its_definition(vocoder: HiFiGAN) -> None:
    """The same sum written out without anything in place."""
    mel = noise(2, 6, 5)
    given = mel.clone()
    x = vocoder.conv_pre(mel)
    for stage, up in enumerate(vocoder.ups):
        x = up(F.leaky_relu(x, 0.1))
        outs = []
        for stack in vocoder.resblocks[2 * stage : 2 * stage + 2]:
            h = x
            for dilated, plain in zip(stack.convs1, stack.convs2, strict=True):
                h = h + plain(F.leaky_relu(dilated(F.leaky_relu(h, 0.1)), 0.1))
            outs.append(h)
        x = torch.stack(outs).mean(dim=0)
    wanted = torch.tanh(vocoder.conv_post(F.leaky_relu(x, 0.01)))[:, 0]
    torch.testing.assert_close(vocoder(mel), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(mel, given)


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other(vocoder: HiFiGAN) -> None:
    mel = noise(2, 6, 5)
    whole = vocoder(mel)
    for row in range(2):
        torch.testing.assert_close(vocoder(mel[row : row + 1]), whole[row : row + 1], rtol=1e-5, atol=1e-6)


def test_gradients_match_finite_differences() -> None:
    """What is done in place must not be something a gradient still needs."""
    torch.manual_seed(0)
    small = HiFiGAN(HiFiGANConfig(base=4, rates=(2,), kernels=(4,), stack_kernels=(3, 5), dilations=(1,)), mel_bins=2)
    assert torch.autograd.gradcheck(small.double(), noise(1, 2, 3).double().requires_grad_())


def test_rates_need_as_many_kernels() -> None:
    with pytest.raises(ConfigError, match="2 rates and 1 kernels"):
        HiFiGAN(replace(TINY, kernels=(16,)))


def watched(vocoder: HiFiGAN) -> dict[str, nn.Module]:
    """Return the modules whose outputs are recorded."""
    ups = {f"ups{i}": up for i, up in enumerate(vocoder.ups)}
    return ups | {"conv_pre": vocoder.conv_pre, "resblock0": vocoder.resblocks[0]}


@pytest.mark.parity
@torch.inference_mode()
def test_parity(goldens: Path, request: pytest.FixtureRequest) -> None:
    golden, vocoder = Goldens(goldens), official()
    assert shapes(vocoder) == golden.shapes("vocoder", "first_stage_model.vocoder.")
    golden.fill(vocoder.to_empty(device="cpu"), "vocoder", "first_stage_model.vocoder.")

    arrays = golden.arrays("vocoder")
    with golden.watch(arrays, watched(vocoder), 2048) as errors:
        wave = vocoder(golden.normal("voc:mel", (1, 64, 1024), -1.0, 1.5))
    errors["wav"] = golden.error(arrays, "wav", wave[:, None], 16384)
    short = vocoder(golden.normal("voc:short", (2, 64, 40), -1.0, 1.5))[:, None]
    recorded = torch.from_numpy(arrays["wav_short"])
    assert short.shape == recorded.shape
    errors["wav_short"] = ((short - recorded).abs().max() / recorded.std()).item()
    check(request, errors, part=("semanticodec", "vocoder"))
