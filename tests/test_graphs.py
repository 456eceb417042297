"""Recorded networks: buffers, shapes and results, on the CPU with a stand-in for CUDA graphs and on a GPU with them."""

from dataclasses import dataclass

import pytest
import torch
from tiny import FLAVOURS, codec, noise
from torch import Tensor

from semanticodec import Decoder, Encoder, SemantiCodec
from semanticodec.errors import ConfigError
from semanticodec.graphs import Graphed, cuda_recorder, rerun_recorder
from semanticodec.model import CodecModel


@dataclass(frozen=True)
class Pair:
    a: Tensor
    b: tuple[Tensor | None, int]


class Counted:
    """A function that counts its calls; recordings rerun it once per call, and once when they are made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, pair: Pair | None = None, factor: int = 1) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return x * factor + (0 if pair is None else pair.a + pair.b[1]), x - 1


class TestGraphed:
    def test_computes_what_the_function_does(self) -> None:
        call = Graphed(Counted(), rerun_recorder)
        for seed in range(3):
            x, pair = noise(2, 3, seed=seed), Pair(noise(2, 3, seed=seed + 9), (None, seed % 2))
            for mine, its in zip(call(x, pair, 5), Counted()(x, pair, 5), strict=True):
                assert torch.equal(mine, its)

    @torch.inference_mode()
    def test_results_belong_to_the_caller(self) -> None:
        call = Graphed(Counted(), rerun_recorder)
        first, _ = call(torch.zeros(4), None, 2)
        call(torch.ones(4), None, 2)
        assert first.tolist() == [0] * 4
        first.fill_(7)
        assert call(torch.ones(4), None, 2)[0].tolist() == [2] * 4

    @pytest.mark.parametrize("inference", [False, True])
    def test_what_changes_in_place_is_noticed(self, inference: bool) -> None:
        call = Graphed(Counted(), rerun_recorder)
        with torch.inference_mode(inference):
            x = torch.zeros(4)
            assert call(x)[0].tolist() == [0] * 4
            assert call(x)[0].tolist() == [0] * 4
            x.add_(3)
            assert call(x)[0].tolist() == [3] * 4
            assert call(torch.ones(4))[0].tolist() == [1] * 4
            assert call(x)[0].tolist() == [3] * 4

    def test_one_recording_for_each_combination(self) -> None:
        made = []

        def recorder(run):
            made.append(run)
            return rerun_recorder(run)

        call = Graphed(Counted(), recorder)
        x = torch.zeros(4, 4)
        for arguments in [(x,), (x + 1,), (x[:2],), (x.mT,), (x.double(),), (x, None, 2), (x, None, 3), (x, None, 2)]:
            call(*arguments)
        # A transposed square has the shape, not the strides; the last repeats.
        assert len(made) == 6

    def test_refuses_what_cannot_be_recorded(self) -> None:
        with pytest.raises(ConfigError, match="a set cannot"):
            Graphed(Counted(), rerun_recorder)({1})


def copied(flavour: str, device: str = "cpu") -> SemantiCodec:
    small = codec(flavour, 100)
    model = CodecModel(small.config)
    model.load_state_dict(small.model.state_dict())
    return SemantiCodec.from_model(small.config, model.to(device))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_recorded_codec_gives_the_same_codes_and_samples(flavour: str) -> None:
    plain, recorded = codec(flavour, 100), copied(flavour)
    assert recorded.record(rerun_recorder) is recorded
    for rows, length in ((1, 30_000), (2, 21_000), (1, 12_345)):
        wave = noise(rows, length, scale=0.3)
        codes = plain.encode(wave, 16_000)
        assert torch.equal(recorded.encode(wave, 16_000), codes)
        assert torch.equal(recorded.decode(codes, seed=3), plain.decode(codes, seed=3))


def test_recorded_streams_are_what_they_were() -> None:
    plain, recorded = codec("mini", 100), copied("mini").record(rerun_recorder)
    outputs = []
    for one in (plain, recorded):
        encoder, decoder = Encoder(one), Decoder(one)
        hearing, speaking, heard = encoder.begin(2), decoder.begin(2), []
        for index in range(3):
            codes, hearing = encoder.step(noise(2, encoder.latency, seed=index), hearing)
            wave, speaking = decoder.step(codes, speaking, [1, 2])
            heard.append(wave)
        outputs.append(torch.cat(heard, 1))
    assert torch.equal(*outputs)


def test_a_recording_is_of_one_precision() -> None:
    call = Graphed(lambda a, b: a @ b, rerun_recorder)
    a, b = torch.ones(3, 3), torch.ones(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(a, b).dtype == torch.bfloat16
    assert call(a, b).dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        assert call(a, b).dtype == torch.float16


def test_numbers_that_are_equal_are_not_the_same() -> None:
    call = Graphed(lambda a, n: a * n, rerun_recorder)
    whole = torch.ones(2, dtype=torch.int64)
    assert [call(whole, n).dtype for n in (1, 1.0, True)] == [torch.int64, torch.float32, torch.int64]


def test_recording_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="already"):
        copied("mini").record(rerun_recorder).record(rerun_recorder)


def test_cuda_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="need device='cuda'"):
        copied("mini").record()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bfloat16_stays_near_float32(flavour: str, autocast: bool) -> None:
    """U-Net and autoencoder with weights in bfloat16, 8 bits of precision, or under ``torch.autocast``, and float32."""
    exact, rough = codec(flavour, 100), copied(flavour)
    if not autocast:
        rough.model.to(torch.bfloat16)
    a, b = exact.model.latent, rough.model.latent
    assert a is not None
    assert b is not None
    config = a.unet.config
    x = noise(2, config.in_channels, 12, 16)
    t = torch.tensor([3, 700])
    contexts = [(noise(2, 7, width), None) for width in config.contexts if width is not None]
    z = noise(1, exact.config.decoder.latent.vae.latent_channels, 8, 16)
    with torch.inference_mode():
        seen, mel = a.unet(x, t, a.unet.project_contexts(contexts)), a.mel(z)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            low = [(context.to(b.dtype), None) for context, _ in contexts]
            there, other = b.unet(x.to(b.dtype), t, b.unet.project_contexts(low)), b.mel(z)
        assert there.dtype == other.dtype == torch.bfloat16
        assert 1e-4 < ((there.float() - seen).std() / seen.std()).item() < 0.03
        assert 1e-4 < ((other.float() - mel).std() / mel.std()).item() < 0.03


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_whole_calls_under_autocast(flavour: str) -> None:
    """As many codes and samples as ever, the samples float32."""
    small = codec(flavour, 100)
    wave = noise(1, 30_000, scale=0.3)
    codes = small.encode(wave, 16_000)
    heard = small.decode(codes, seed=3)
    with torch.autocast("cpu", torch.bfloat16):
        rough, sound = small.encode(wave, 16_000), small.decode(codes, seed=3)
    assert rough.shape == codes.shape
    assert (sound.shape, sound.dtype) == (heard.shape, torch.float32)
    assert torch.isfinite(sound).all()
    assert not torch.equal(sound, heard)


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_cuda_graphs_replay_to_the_bit(flavour: str) -> None:
    plain, recorded = copied(flavour, "cuda"), copied(flavour, "cuda").record(cuda_recorder)
    for rows in (1, 3, 1):
        wave = noise(rows, 30_000, scale=0.3)
        codes = plain.encode(wave, 16_000)
        assert torch.equal(recorded.encode(wave, 16_000), codes)
        assert torch.equal(recorded.decode(codes, seed=3), plain.decode(codes, seed=3))


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bfloat16_on_a_gpu_sounds_alike(flavour: str) -> None:
    small = copied(flavour, "cuda")
    codes = small.encode(noise(2, 30_000, scale=0.3), 16_000)
    heard = small.decode(codes)
    small.model.to(torch.bfloat16)
    assert ((small.decode(codes) - heard).std() / heard.std()).item() < 0.3
