"""Generation on small random models: what a result depends on, and what not."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from prompting import conditioner
from test_editing import CONFIG as LATENT
from tiny import fill
from torch import Tensor, nn
from typer.testing import CliRunner

from semanticodec import checkpoints, controls
from semanticodec.audio import load, save
from semanticodec.bandlimit import stft
from semanticodec.cli import app
from semanticodec.cli.generate import _targets
from semanticodec.conditioners.labels import LabelConditioner
from semanticodec.conditioners.prompts import PromptConditioner, Prompts
from semanticodec.config import ControlNetConfig
from semanticodec.controls import loudness_of
from semanticodec.diffusion import SamplerOptions
from semanticodec.errors import CheckpointError, ConfigError
from semanticodec.family import SystemModel
from semanticodec.generation import Generator, GeneratorConfig, GeneratorModel
from semanticodec.latent import LatentDiffusion
from semanticodec.nn.controlnet import ControlNet
from semanticodec.offload import Offload
from semanticodec.systems import system
from semanticodec.values import to_json

RATE = 16_000
CONFIG = GeneratorConfig("small", replace(LATENT, unet=replace(LATENT.unet, film_dim=6)), ("rain", "cello"), 16, 4)


@cache
def labelled() -> Generator:
    model = GeneratorModel(CONFIG)
    fill(model)
    model.eval()
    return Generator("small", model.latent, model.prompts, window=16, overlap=4)


@cache
def controlled() -> Generator:
    own = labelled()
    network = ControlNet(ControlNetConfig(own.latent.config.unet, hint_factor=4, hint_widths=(4, 8, 8)))
    fill(network)
    return Generator("small", own.latent, own.prompts, window=16, overlap=4, control=network.eval())


def prompted(kind: str, folder: Path) -> Generator:
    """Return a small system whose conditioners are those of a published kind."""
    contexts = {"film": (None,), "t5": (None, 16), "sequence": (None, 16, 16), "speech": (None, 16)}[kind]
    unet = replace(LATENT.unet, film_dim=12 if kind == "film" else None, contexts=contexts)
    latent = LatentDiffusion(replace(LATENT, unet=unet), vae_encoder=True)
    fill(latent)
    return Generator(kind, latent.eval(), conditioner(kind, folder), window=16, overlap=4)


class TestWhatAResultIs:
    @pytest.mark.parametrize("duration", [1 / RATE, 0.1, 0.6401, 1.0])
    def test_any_duration_to_the_sample(self, duration: float) -> None:
        assert labelled().generate("rain", duration=duration).shape == (1, 1, round(duration * RATE))

    def test_it_follows_label_seed_and_options(self) -> None:
        own = labelled()
        heard = own.generate("rain", duration=0.3)
        assert torch.equal(heard, own.generate(["rain"], duration=0.3))
        for other in (
            own.generate("cello", duration=0.3),
            own.generate("rain", duration=0.3, seed=1),
            own.generate("rain", duration=0.3, options=SamplerOptions(steps=1)),
            own.generate("rain", duration=0.3, options=SamplerOptions(guidance=4.0)),
            own.generate("rain", duration=0.3, negatives="cello"),
        ):
            assert not torch.allclose(heard, other, atol=1e-3)

    def test_it_depends_on_no_other(self) -> None:
        own = labelled()
        alone = own.generate("rain", duration=0.3, seed=6)[0, 0]
        assert torch.equal(own.generate(["cello", "rain"], duration=0.3, n=3, seed=5)[1, 1], alone)

    def test_a_gpu_that_takes_several_at_once_gets_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own, texts = labelled(), ["cello", "rain", "cello"]
        one_by_one = own.generate(texts, duration=0.2, n=2)
        monkeypatch.setattr("semanticodec.generation.rows_at_once", lambda _: 4)
        torch.testing.assert_close(own.generate(texts, duration=0.2, n=2), one_by_one, rtol=0, atol=1e-4)

    def test_what_is_long_goes_on_from_what_came_before(self) -> None:
        own = labelled()
        short, long = (own.generate("rain", duration=seconds)[0, 0] for seconds in (0.64, 2.0))
        assert torch.equal(short[: 12 * 640], long[: 12 * 640])  # but for the overlap, which is faded
        told = own.editor("rain")
        shuffled = replace(told, overlap=0).generate(2 * RATE, [0])[0]

        def jump(wave: Tensor) -> float:
            """How much the spectrum changes where the second window begins, as against elsewhere."""
            level = stft(wave).abs().clamp_min(1e-5).log()
            change = (level[:, 1:] - level[:, :-1]).abs().mean(0)
            return float(change.max() / change.median())

        assert jump(long) <= jump(shuffled) * 1.5

    def test_progress_ends_at_one(self) -> None:
        seen: list[float] = []
        labelled().generate(["rain", "cello"], duration=1.0, n=2, progress=seen.append)
        assert seen == sorted(seen)
        assert len(seen) == 2 * 2 * 2
        assert seen[-1] == 1.0


class TestLoudness:
    def test_it_is_told_from_moment_to_moment(self) -> None:
        own = controlled()
        low, rising = torch.full((300,), -8.0), torch.cat([torch.full((64,), -8.0), torch.full((236,), 0.0)])
        plain, quiet, louder = (
            own.generate("rain", duration=2.0, loudness=curve)[0, 0] for curve in (None, low, rising)
        )
        assert torch.equal(plain, labelled().generate("rain", duration=2.0)[0, 0])
        assert not torch.allclose(plain, quiet, atol=1e-3)
        # The first window, 64 mel rows, has heard nothing of what follows; the next one fades into its overlap.
        assert torch.equal(quiet[: 12 * 640], louder[: 12 * 640])
        assert not torch.allclose(quiet[16 * 640 :], louder[16 * 640 :], atol=1e-3)
        assert torch.equal(own.generate("rain", duration=2.0, loudness=low[:1])[0, 0], quiet)  # it holds on
        assert torch.equal(own.generate("rain", duration=2.0, loudness=low.numpy())[0, 0], quiet)
        assert torch.equal(own.generate("rain", duration=2.0, loudness=low, loudness_scale=0.0)[0, 0], plain)

    def test_every_result_has_it(self) -> None:
        own, curve = controlled(), torch.linspace(-8, 0, 40)
        alone = own.generate("cello", duration=0.3, loudness=curve, seed=1)[0, 0]
        assert torch.equal(own.generate(["rain", "cello"], duration=0.3, loudness=curve, n=2)[1, 1], alone)

    def test_of_a_recording(self) -> None:
        config = labelled().latent.config
        wave = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.001, 0.3, RATE)
        curve = loudness_of(wave, RATE, config)
        assert curve.shape == (RATE // config.mel.hop,)
        assert float(curve[-20:].mean() - curve[:20].mean()) > 2
        assert torch.equal(curve, loudness_of(wave.mean(0), RATE, config))
        assert len(loudness_of(wave[0, :10], RATE, config)) >= 1

    def test_it_is_refused_where_it_cannot_be_told(self) -> None:
        with pytest.raises(ConfigError, match=r"no ControlNet for loudness"):
            labelled().generate("rain", loudness=torch.zeros(4))
        for curve in (torch.zeros(0), torch.zeros(2, 4), torch.full((4,), math.nan)):
            with pytest.raises(ConfigError, match="one dimension"):
                controlled().generate("rain", loudness=curve)


class TestWhatIsRefused:
    @pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf"), 1e-9, 1e6])
    def test_durations(self, duration: float) -> None:
        with pytest.raises(ConfigError, match=r"can be generated"):
            labelled().generate("rain", duration=duration)

    def test_labels(self) -> None:
        with pytest.raises(ConfigError, match="did you mean 'cello'"):
            labelled().generate("celo")
        seen: list[float] = []
        with pytest.raises(ConfigError, match="choose one of rain, cello"):
            labelled().generate(["rain", "xyz"], progress=seen.append)
        assert not seen
        with pytest.raises(ConfigError, match="no transcriptions"):
            labelled().generate("rain", transcriptions="hello")

    def test_numbers(self) -> None:
        for options in (
            {"n": 0},
            {"n": 1.5},
            {"seed": -1},
            {"candidates": 3},
            {"negatives": ["a", "b"]},
        ):
            with pytest.raises(ConfigError):
                labelled().generate("rain", duration=0.1, **options)
        with pytest.raises(ConfigError, match="policy 'none' is unknown"):
            labelled().generate("rain", duration=0.1, policy="none")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="policy 'none' is unknown"):
            labelled().editor("rain", policy="none")  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="at least one text"):
            labelled().generate([])

    def test_sounds(self) -> None:
        with pytest.raises(ConfigError, match="labels only"):
            labelled().similar(torch.zeros(RATE), RATE)

    def test_systems_without_prompts(self) -> None:
        with pytest.raises(ConfigError, match="reads no prompts"):
            Generator.from_pretrained("audiosr-basic")

    def test_weights_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="mini-gen is none: give its folder"):
            Generator.from_pretrained("mini-gen", weights=tmp_path)
        with pytest.raises(CheckpointError, match="training all --model mini-gen"):
            Generator.from_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match="foo is neither a folder nor a model that generates: mini-gen, audio"
        ):
            Generator.from_pretrained("foo")


class TestPrompts:
    @pytest.mark.parametrize("kind", ["film", "t5", "sequence", "speech"])
    def test_every_kind_generates_and_texts_do_not_mix(self, kind: str, tmp_path: Path) -> None:
        own = prompted(kind, tmp_path)
        said = {"transcriptions": ["rain", "bells ring"]} if kind == "speech" else {}
        if kind == "speech":
            pytest.importorskip("phonemizer")
        both = own.generate(["a dog barks", "rain falls on tin roofs"], duration=0.2, **said)
        assert both.shape == (2, 1, 3200)
        assert not torch.allclose(both[0], both[1], atol=1e-4)
        if said:
            whole = own.generate(["a dog barks", "rain falls on tin roofs"], duration=0.64, **said)
            assert torch.equal(whole[..., :3200], both)  # a shorter one is its beginning
            with pytest.raises(ConfigError, match=r"2 s of speech were asked for, and this model speaks for 0\.64 s"):
                own.generate(["a", "b"], duration=2.0, **said)
            editor = own.editor("a dog barks", transcription="bells ring")
            with pytest.raises(ConfigError, match=r"2 s are to be edited, and this model speaks for 0\.64 s"):
                editor.transfer(torch.zeros(2 * RATE), RATE)
        one = {"transcriptions": ["bells ring"]} if said else {}
        assert torch.equal(own.generate("rain falls on tin roofs", duration=0.2, **one)[0], both[1])

    @pytest.mark.parametrize("kind", ["film", "sequence"])
    def test_negative_prompts(self, kind: str, tmp_path: Path) -> None:
        own = prompted(kind, tmp_path)
        plain, against = (
            own.generate("a dog barks", duration=0.2, negatives=negative) for negative in (None, "rain falls")
        )
        assert not torch.allclose(plain, against, atol=1e-4)
        if kind == "sequence":
            other = own.generate("a dog barks", duration=0.2, policy="negative_prompt")
            assert not torch.allclose(plain, other, atol=1e-4)
            wave = 0.1 * torch.randn(3200, generator=torch.Generator().manual_seed(0))
            zeros, chain = (
                own.editor("a dog barks", policy=policy).transfer(wave, RATE) for policy in ("zeros", "negative_prompt")
            )
            assert not torch.allclose(zeros, chain, atol=1e-4)

    def test_clap_chooses(self, tmp_path: Path) -> None:
        own = prompted("film", tmp_path)
        assert isinstance(own.prompts, PromptConditioner)
        every = own.generate("a dog barks", duration=0.5, n=4)[0]
        scores = own.prompts.rank(every, RATE, ["a dog barks"])[0]
        best = own.generate("a dog barks", duration=0.5, n=2, candidates=4)[0]
        assert torch.equal(best, every[scores.argsort(descending=True)[:2]])

    def test_clap_chooses_what_is_like_a_sound(self, tmp_path: Path) -> None:
        own = prompted("film", tmp_path)
        assert isinstance(own.prompts, PromptConditioner)
        wave = torch.randn(1, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
        every = own.similar(wave, RATE, n=4)
        scores = own.prompts.rank(every, RATE, wave)[0]
        best = own.similar(wave, RATE, n=2, candidates=4)
        assert torch.equal(best, every[scores.argsort(descending=True)[:2]])
        against = own.similar(wave, RATE, negative="rain falls")
        assert not torch.allclose(against[0], every[0], atol=1e-4)

    def test_sound_for_a_text(self, tmp_path: Path) -> None:
        own = prompted("film", tmp_path)
        wave = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * 0.1
        heard = own.similar(wave, RATE, n=2)
        assert heard.shape == (2, 8000)
        assert torch.equal(own.similar(wave.mean(0), RATE, seed=1, duration=0.5)[0], heard[1])
        assert own.similar(wave, 8000, duration=0.1).shape == (1, 1600)


class Counted(nn.Linear):
    """A part that notes where it has been sent."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.sent: list[str] = []

    def to(self, *arguments: Any, **options: Any) -> Any:
        self.sent.append(str(arguments[0]))
        return super().to(*arguments, **options)


def test_one_part_at_a_time_is_on_the_device() -> None:
    turns, parts = Offload(torch.device("cpu", 0), home="cpu"), [Counted(), Counted()]
    for part in parts:
        turns.watch(part, "forward")
    one, other = parts
    for part in (one, one, other, one):
        assert part(torch.ones(1, 1)).shape == (1, 1)
    assert one.sent == ["cpu:0", "cpu", "cpu:0"]
    assert other.sent == ["cpu:0", "cpu"]


@pytest.mark.gpu
def test_half_precision_and_offload_on_a_gpu() -> None:
    plain = labelled().generate("rain", duration=0.5)
    for dtype, bound in ((torch.float32, 0.01), (torch.bfloat16, 0.5), (torch.float16, 0.3)):
        own = copy.deepcopy(labelled())
        own.latent.to("cuda", dtype)
        assert isinstance(own.prompts, LabelConditioner)
        own.prompts.to("cuda", dtype)
        heard = own.generate("rain", duration=0.5)
        assert ((heard - plain).std() / plain.std()).item() < bound
    waiting = copy.deepcopy(labelled())
    waiting.latent.offload(Offload(torch.device("cuda")))
    heard = waiting.generate("rain", duration=0.5)
    assert ((heard - plain).std() / plain.std()).item() < 0.01
    assert next(waiting.latent.unet.parameters()).device.type == "cpu"


def test_a_system_loads_with_its_conditioners_and_offloads_the_same_sound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = system("audioldm-s-full")
    own = prompted("film", tmp_path)

    def loaded(asked: Any, place: Any, **_: Any) -> SystemModel:
        assert (asked, place) == (row, "there")
        with torch.device("meta"):
            model = SystemModel(row, prompts=False)
        model.latent, model.prompts = own.latent, own.prompts
        return model

    monkeypatch.setattr("semanticodec.generation.load_system", loaded)
    plain = Generator.from_pretrained(row.name, weights="there")
    assert (plain.window, plain.overlap) == (256, 64)
    wanted = plain.generate("rain falls", duration=0.2)
    offloaded = Generator.from_pretrained(row.name, weights="there", offload=True)
    assert torch.equal(offloaded.generate("rain falls", duration=0.2), wanted)


@pytest.mark.filterwarnings("ignore::semanticodec.errors.LicenceWarning")
@pytest.mark.parametrize(("kind", "hears"), [("AudioLDM2Pipeline", True), ("AudioLDMPipeline", False)])
def test_a_folder_of_diffusers_is_loaded(
    kind: str, hears: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, folders = pytest.importorskip("test_diffusers_layout"), pytest.importorskip("test_folders")
    monkeypatch.setitem(layout.CONTEXTS, kind, {"cross_attention_dim": [[None, 16, 16]] * 3})
    folder = layout.saved(tmp_path, layout.parts(kind, 4))
    folders.pipeline(folder, hears=hears, sequence=kind == "AudioLDM2Pipeline")
    own = Generator.from_pretrained(folder)
    assert own.ranks == hears
    options = SamplerOptions(steps=1)
    one, other = (own.generate(text, duration=0.2, options=options) for text in ("bells ring", "a dog barks"))
    assert one.shape == (1, 1, 3200)
    assert not torch.allclose(one, other, atol=1e-4)
    if not hears:
        with pytest.raises(ConfigError, match="no CLAP that hears"):
            own.generate("bells ring", candidates=2)
    with pytest.raises(ConfigError, match="name it as the model"):
        Generator.from_pretrained("audioldm2-full", weights=folder)


def test_a_folder_of_ours_is_loaded(tmp_path: Path) -> None:
    own = labelled()
    assert isinstance(own.prompts, LabelConditioner)
    model = GeneratorModel(CONFIG)
    model.latent.load_state_dict(own.latent.state_dict())
    model.prompts.load_state_dict(own.prompts.state_dict())
    checkpoints.save_model(tmp_path, to_json(CONFIG), model.state_dict())
    assert Generator.from_pretrained(tmp_path).control is None
    wanted = controlled()
    assert wanted.control is not None
    controls.save(tmp_path, wanted.control)
    again = Generator.from_pretrained(tmp_path)
    curve = torch.zeros(4)
    heard = again.generate("cello", duration=0.2, loudness=curve)
    torch.testing.assert_close(heard, wanted.generate("cello", duration=0.2, loudness=curve), rtol=0, atol=1e-2)
    assert torch.equal(again.generate("cello", duration=0.2), own.generate("cello", duration=0.2))


def test_no_label_is_what_guidance_steers_away_from() -> None:
    prompts = labelled().prompts
    assert isinstance(prompts, LabelConditioner)
    absent = prompts.unconditional(2).film
    assert absent is not None
    assert torch.equal(absent[0], absent[1])
    assert torch.equal(absent[0], prompts.table.weight[2])
    empty = prompts(Prompts(["", " Rain "])).film
    assert empty is not None
    assert torch.equal(empty, prompts.table.weight[[2, 0]])


class TestCommandLine:
    @pytest.fixture
    def folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        monkeypatch.setattr("semanticodec.generation.Generator.from_pretrained", lambda *_, **__: labelled())
        return tmp_path

    def run(self, *words: Any) -> Any:
        return CliRunner().invoke(app, ["generate", *map(str, words), "--device", "cpu"])

    def test_files_are_named_after_texts(self, folder: Path) -> None:
        result = self.run("rain", "cello", "-o", folder, "-n", 2, "--duration", 0.25, "--seed", 3)
        assert result.exit_code == 0, result.output
        assert sorted(path.name for path in folder.iterdir()) == [
            "cello.1.wav",
            "cello.2.wav",
            "rain.1.wav",
            "rain.2.wav",
        ]
        heard, rate = load(folder / "rain.2.wav")
        assert rate == RATE
        wanted = labelled().generate("rain", duration=0.25, seed=4)[0]
        torch.testing.assert_close(heard, wanted.clamp(-1, 1), rtol=0, atol=1e-4)
        again = self.run("rain", "-o", folder / "rain.2.wav", "--duration", 0.25)
        assert again.exit_code == 1
        assert "--force" in again.output

    def test_every_result_has_a_name_of_its_own(self, folder: Path) -> None:
        texts = ("rain", " rain", "Rain ", "cello")
        (folder / "a.b").mkdir()
        assert self.run(*texts, "-o", folder / "a.b", "--duration", 0.1).exit_code == 0
        assert self.run("rain", "-n", 2, "-o", folder / "take.1", "--duration", 0.1).exit_code == 0
        assert sorted(path.name for path in (folder / "a.b").iterdir()) == [
            "cello.wav",
            "rain-2.wav",
            "rain-3.wav",
            "rain.wav",
        ]
        assert sorted(path.name for path in (folder / "take.1").iterdir()) == ["rain.1.wav", "rain.2.wav"]
        names = [job.target.name for job in _targets(["a b", "a-b", "a b 2"], 1, str(folder)) if job.target]
        assert names == ["a-b.wav", "a-b-2.wav", "a-b-2-2.wav"]

    def test_published_settings(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def generate(*_: Any, **options: Any) -> Tensor:
            asked.update(options)
            return torch.zeros(1, 1, 1600)

        monkeypatch.setattr(Generator, "generate", generate)
        monkeypatch.setattr(Generator, "ranks", True)
        result = self.run("rain", "--model", "musicldm", "--published", "--policy", "negative_prompt", "-o", folder)
        assert result.exit_code == 0, result.output
        assert asked["options"] == SamplerOptions("ddim", 200, 2.0, 1.0, "published")
        assert (asked["candidates"], asked["n"], asked["policy"]) == (5, 1, "negative_prompt")
        assert self.run("rain", "--published", "-o", folder).exit_code == 2
        assert self.run("rain", "--published", "--steps", 3, "--model", "musicldm", "-o", folder).exit_code == 2

    def test_seeds_end(self, folder: Path) -> None:
        assert self.run("rain", "-n", 2, "--seed", 2**64 - 1, "-o", folder).exit_code == 2

    def test_one_file(self, folder: Path) -> None:
        assert self.run("rain", "-o", folder / "x.flac", "--duration", 0.25, "--negative", "cello").exit_code == 0
        assert load(folder / "x.flac")[0].shape == (1, 4000)
        assert self.run("rain", "cello", "-o", folder / "y.wav").exit_code == 2

    def test_as_loud_as_a_recording(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("semanticodec.generation.Generator.from_pretrained", lambda *_, **__: controlled())
        wave = 0.1 * torch.randn(1, 4800, generator=torch.Generator().manual_seed(0))
        save(folder / "in.wav", wave, RATE)
        assert self.run("rain", "-o", folder / "x.wav", "--loud-as", folder / "in.wav").exit_code == 0
        curve = loudness_of(*load(folder / "in.wav"), controlled().latent.config)
        wanted = controlled().generate("rain", duration=0.3, loudness=curve)[0]
        torch.testing.assert_close(load(folder / "x.wav")[0], wanted.clamp(-1, 1), rtol=0, atol=1e-4)
        for more in (("--loud-as", folder / "in.wav"), ("--transcription", "hello")):
            assert self.run("--like", folder / "in.wav", *more, "-o", folder / "y.wav").exit_code == 2

    def test_what_is_wrong_is_said(self, folder: Path) -> None:
        assert self.run("-o", folder).exit_code == 2
        result = self.run("snow", "-o", folder)
        assert result.exit_code == 1
        assert "choose one of rain, cello" in result.output
        save(folder / "in.wav", torch.zeros(1, 1600), RATE)
        result = self.run("--like", folder / "in.wav", "-o", folder / "z.wav")
        assert result.exit_code == 1
        assert "labels only" in result.output
