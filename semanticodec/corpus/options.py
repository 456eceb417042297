"""What a caller chooses about a tokenisation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ..config import DEFAULT_PRESET
from ..devices import DTYPES
from ..errors import ConfigError
from .encoding import CPU_SECONDS, GPU_SECONDS
from .reading import Channels
from .worker import Work
from .writers import Format

Engine = Literal["local", "ray"]


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is tokenised.

    Args:
        model: a preset's name, or a folder with weights.
        preset: which preset to take from a folder with several.
        engine: "local" processes, or a "ray" cluster.
        address: of the Ray cluster; None starts one here, "auto" finds the one that runs here.
        devices: where to encode, one worker per GPU: ("cuda:0", "cuda:1").  Ray places its actors itself: ("cuda",).
        workers: encoding processes on a CPU, decoding threads for GPUs; of Ray, decoding tasks at a time.  None: one
            per core; of Ray, as many as fit.
        encoders: of Ray, encoding actors at most; None: one per core, or as many as there are GPUs.
        dtype: floating-point type of the weights; codes are promised to be the same everywhere for float32 on CPUs.
        batch_seconds: of sound in one call of the networks; None takes what is good for the device.
        channels: "downmix" averages channels, "split" makes a row of each.
        vad: make a row of every stretch of speech (WebRTC's detector).
        keep_features: keep the continuous features too, float16: hundreds of times as large as the codes.
        form: of the shards: "parquet", "webdataset" or "shar".
        shard_mb: about how many megabytes a shard has.
    """

    model: str | os.PathLike[str] = DEFAULT_PRESET
    preset: str | None = None
    engine: Engine = "local"
    address: str | None = None
    devices: tuple[str, ...] = ("cpu",)
    workers: int | None = None
    encoders: int | None = None
    dtype: str = "float32"
    batch_seconds: float | None = None
    channels: Channels = "downmix"
    vad: bool = False
    keep_features: bool = False
    form: Format = "parquet"
    shard_mb: float = 200

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("engine", self.engine, get_args(Engine)),
            ("channels", self.channels, get_args(Channels)),
            ("form", self.form, get_args(Format)),
            ("dtype", self.dtype, tuple(str(kind).removeprefix("torch.") for kind in DTYPES)),
        ):
            if value not in choices:
                raise ConfigError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        for name, number in (
            ("workers", self.workers),
            ("encoders", self.encoders),
            ("batch_seconds", self.batch_seconds),
            ("shard_mb", self.shard_mb),
        ):
            if number is not None and not number > 0:
                raise ConfigError(f"{name}={number!r} must be more than 0")
        if self.keep_features and self.form == "shar":
            raise ConfigError("keep_features does not go with form='shar'; choose 'parquet' or 'webdataset'")
        if not self.devices:
            raise ConfigError("devices is empty; name one, such as 'cpu'")
        if len({device.partition(":")[0] for device in self.devices}) > 1:
            raise ConfigError(f"devices of one kind are needed, seen {', '.join(self.devices)}; tokenise with the GPUs")

    @property
    def cores(self) -> int:
        """How many CPU workers there are."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def kind(self) -> str:
        """The kind of device that encodes."""
        return torch.device(self.devices[0]).type

    @property
    def seconds(self) -> float:
        """Seconds of sound in one call of the networks."""
        return self.batch_seconds or (CPU_SECONDS if self.kind == "cpu" else GPU_SECONDS)

    def work(self, device: str, readers: int) -> Work:
        """Return what a worker on a device is told."""
        return Work(
            os.fspath(self.model),
            self.preset,
            device,
            self.dtype,
            self.seconds,
            readers,
            self.channels,
            self.vad,
            self.keep_features,
        )

    def works(self) -> list[Work]:
        """Return what each local worker is told."""
        if self.kind == "cpu":
            return [self.work("cpu", 0)] * self.cores
        return [self.work(device, max(1, self.cores // len(self.devices))) for device in self.devices]
