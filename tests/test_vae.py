"""The autoencoder: its published names, its two halves, and its numbers."""

from pathlib import Path

import pytest
import torch
from golden import Goldens, check, shapes
from torch import Tensor, nn

from semanticodec.config import VAEConfig, preset
from semanticodec.errors import ConfigError
from semanticodec.nn.norm import GroupNorm
from semanticodec.nn.vae import AutoencoderKL

TINY = VAEConfig(base=8, mults=(1, 2, 2), res_blocks=1, latent_channels=3, groups=4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(TINY)


def test_official_sizes() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(preset("semanticodec-100-4096").decoder.latent.vae)
    decoder = sum(p.numel() for part in (vae.decoder, vae.post_quant_conv) for p in part.parameters())
    assert decoder == 32_981_577
    assert sum(p.numel() for p in vae.parameters()) == 22_395_296 + decoder


def test_mini_shapes() -> None:
    vae = AutoencoderKL(preset("mini-100").decoder.latent.vae)
    mean, logvar = vae.encode(noise(2, 1, 16, 64))
    assert mean.shape == logvar.shape == (2, 8, 4, 16)
    assert vae.decode(mean).shape == (2, 1, 16, 64)


def test_every_parameter_gets_a_gradient(vae: AutoencoderKL) -> None:
    mean, logvar = vae.encode(noise(2, 1, 16, 8))
    loss = vae.decode(mean + noise(*mean.shape, seed=1) * (0.5 * logvar).exp()).square().sum()
    loss.backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # A key's bias shifts all scores of a query alike, so softmax lets nothing through to it.
    idle = {f"{half}.mid.attn_1.k.bias" for half in ("encoder", "decoder")}
    grads = {n: p.grad.abs().max().item() for n, p in vae.named_parameters() if p.grad is not None}
    assert {n for n, g in grads.items() if g < 1e-6} <= idle


@torch.inference_mode()
def test_rows_do_not_depend_on_each_other(vae: AutoencoderKL) -> None:
    mel = noise(2, 1, 16, 8)
    mean, logvar = vae.encode(mel)
    out = vae.decode(mean)
    for row in range(2):
        one = slice(row, row + 1)
        alone = vae.encode(mel[one])
        torch.testing.assert_close(alone, (mean[one], logvar[one]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(vae.decode(mean[one]), out[one], rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_far_ends_are_padded(vae: AutoencoderKL) -> None:
    """The strided convolution sees no row or column before the first one."""
    assert vae.encoder is not None
    down = vae.encoder.down[0].downsample
    image = noise(1, 8, 4, 6)
    got = down(image)
    assert got.shape == (1, 8, 2, 3)
    first = torch.einsum("oikl,ikl->o", down.conv.weight, image[0, :, :3, :3]) + down.conv.bias
    torch.testing.assert_close(got[0, :, 0, 0], first, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_attention_is_softmax_over_all_cells(vae: AutoencoderKL) -> None:
    attention, x = vae.decoder.mid.attn_1, noise(2, 16, 3, 5)
    normed = attention.norm(x)
    q, k, v = (layer(normed).flatten(2) for layer in (attention.q, attention.k, attention.v))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 4.0, dim=-1)
    wanted = x + attention.proj_out(torch.einsum("bij,bcj->bci", weights, v).unflatten(2, (3, 5)))
    torch.testing.assert_close(attention(x), wanted, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_log_variance_is_bounded(vae: AutoencoderKL) -> None:
    assert vae.quant_conv is not None
    bias = vae.quant_conv.bias
    assert bias is not None
    bias[3:] = torch.tensor([-1e3, 1e3, 0.0])
    _, logvar = vae.encode(noise(1, 1, 16, 8))
    assert logvar[:, 0].unique().tolist() == [-30.0]
    assert logvar[:, 1].unique().tolist() == [20.0]
    assert (logvar[:, 2].abs() < 19).all()


@torch.inference_mode()
def test_decoder_alone_decodes_the_same_and_refuses_to_encode(vae: AutoencoderKL) -> None:
    alone = AutoencoderKL(TINY, encoder=False)
    kept = {k: v for k, v in vae.state_dict().items() if k.startswith(("decoder.", "post_quant_conv."))}
    alone.load_state_dict(kept)
    z = noise(1, 3, 4, 2)
    assert torch.equal(alone.decode(z), vae.decode(z))
    with pytest.raises(ConfigError, match="only its decoder"):
        alone.encode(noise(1, 1, 16, 8))


def test_mel_that_would_lose_a_row_is_refused(vae: AutoencoderKL) -> None:
    with pytest.raises(ConfigError, match="multiples of 4"):
        vae.encode(noise(1, 1, 18, 8))


def test_published_epsilon(vae: AutoencoderKL) -> None:
    assert {m.eps for m in vae.modules() if isinstance(m, GroupNorm)} == {1e-6}


def watched(vae: AutoencoderKL) -> dict[str, nn.Module]:
    """Return the modules whose outputs are recorded."""
    decoder = vae.decoder
    return {
        "decode.post_quant_conv": vae.post_quant_conv,
        "decode.conv_in": decoder.conv_in,
        "decode.mid_block_1": decoder.mid.block_1,
        "decode.mid_attn_1": decoder.mid.attn_1,
        "decode.mid_block_2": decoder.mid.block_2,
        "decode.up2_upsample": decoder.up[2].upsample,
        "decode.up1_upsample": decoder.up[1].upsample,
        "decode.norm_out": decoder.norm_out,
    }


@pytest.mark.parity
@torch.inference_mode()
def test_parity(goldens: Path, request: pytest.FixtureRequest) -> None:
    golden = Goldens(goldens)
    with torch.device("meta"):
        vae = AutoencoderKL(preset("semanticodec-100-4096").decoder.latent.vae)
    assert shapes(vae) == golden.shapes("vae", "first_stage_model.")
    golden.fill(vae.to_empty(device="cpu"), "vae", "first_stage_model.")

    arrays = golden.arrays("vae")
    with golden.watch(arrays, watched(vae), 2048) as errors:
        mel = vae.decode(golden.normal("vae:z", (1, 8, 256, 16)))
    errors["decode.mel"] = golden.error(arrays, "decode.mel", mel, 16384)
    short = vae.decode(golden.normal("vae:zshort", (2, 8, 32, 16)))
    errors["decode_short.mel"] = golden.error(arrays, "decode_short.mel", short, 4096)
    mean, logvar = vae.encode(golden.normal("vae:mel", (1, 1, 1024, 64), -1.0, 1.5))
    errors["encode.mean"] = golden.error(arrays, "encode.mean", mean, 8192)
    errors["encode.logvar"] = golden.error(arrays, "encode.logvar", logvar, 8192)
    check(request, errors, part=("semanticodec", "autoencoder"))
