"""Weights on disk: find them, check them, name them as our modules do, and fill modules strictly.

Two layouts are read.  *Official*: ``encoder.ckpt``, ``decoder.ckpt`` and ``codebook_idx/.../codebook_*.npy`` as
published.  *Native*, the only one that is written: ``encoder.safetensors``, ``codebooks.safetensors`` and
``decoder.safetensors``, whose metadata carries the configurations they serve and a SHA-256.  A native folder may serve
several token rates: a tensor named ``rate100.<name>`` belongs to the presets of that rate, any other is shared.

Every tensor of a file gets a place or is dropped for a stated reason (:mod:`.keymap`), and every parameter and buffer
of the module is filled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import PRESETS, CodecConfig, config_from_json, preset
from .errors import CheckpointError, ConfigError
from .keymap import DROP, FILES, OFFICIAL_DECODER, OFFICIAL_ENCODER, Rule, apply_rules, native_rules
from .loading import check_schedule, fill, matched, read_checkpoint

HUB = "haoheliu/SemantiCodec"
FORMAT, VERSION = "semanticodec", "1"
MODEL = "model.safetensors"
"""The file of a model that has only one."""
WEIGHTS = Path(__file__).parent / "weights"
"""Weights shipped with the package, one native folder per family."""
_LINKS = {"encoder": "encoder_sha256", "decoder": "decoder_sha256"}
"""File -> where the metadata of the codebooks keeps its SHA-256, so that files of two models are never mixed."""


@dataclass(frozen=True)
class Source:
    """Where the weights of one preset are.

    Attributes:
        config: what to build before filling it; ``semantic_size`` is what the k-means table really has.
        layout: how the files are organised.
        folder: where they lie; None for the hub.
    """

    config: CodecConfig
    layout: Literal["official", "native"]
    folder: Path | None

    def __str__(self) -> str:
        """Name the preset and the place."""
        return f"{self.config.name} in {self.folder or f'the hub repository {HUB}'}"


def locate(name_or_folder: str | os.PathLike[str], preset_name: str | None = None) -> Source:
    """Find the weights of a preset.

    Args:
        name_or_folder: a preset's name ("mini-100", "semanticodec-50-8192"), or a folder in either layout.
        preset_name: which preset to take from a folder that serves several; a folder that serves one needs none.
            Beside a preset's name it must be that preset.

    Returns:
        The source; nothing but metadata has been read yet.  The k-means table of a hub preset is downloaded.

    Raises:
        CheckpointError: there are no such weights, or the folder serves several presets and none was chosen.
        ConfigError: ``preset_name`` is unknown, or another one than the name's.
    """
    if isinstance(name_or_folder, str) and (name_or_folder in PRESETS or name_or_folder == "mini"):
        config = preset(name_or_folder)
        if preset_name is not None and preset(preset_name) != config:
            raise ConfigError(f"the preset {name_or_folder} was asked for, and the preset {preset_name} too; name one")
        if config.name.startswith("mini"):
            return _native_source(WEIGHTS / "mini", config.name)
        return _official_source(None, config)
    folder = Path(name_or_folder)
    if (folder / "codebooks.safetensors").is_file():
        return _native_source(folder, preset_name)
    if any((folder / name).is_file() for name in ("encoder.ckpt", "decoder.ckpt")):
        return _official_source(folder, preset(preset_name) if preset_name else _guess_preset(folder))
    raise CheckpointError(
        f"{name_or_folder} is neither a preset nor a folder with weights (codebooks.safetensors, or encoder.ckpt and "
        f"decoder.ckpt); known presets: {', '.join(PRESETS)}"
    )


def load(module: nn.Module, source: Source, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Fill a module that was built on the meta device; only the files that its names need are read.

    Args:
        module: has any of the children ``mae``, ``residual`` (encoder half), ``codebooks``, ``latent``, ``conditioner``
            (decoder half).  Tables that are not in ``state_dict()`` must have been computed on a real device.
        source: from :func:`locate`, whose ``config`` the module was built from.
        device: where the module goes.
        dtype: of every floating-point tensor; files may be stored in another.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the module in every name and shape.
    """
    fill(module, _collect(source, module.state_dict()), device=device, dtype=dtype)


def weights_hash(weights: Source | Mapping[str, Tensor]) -> str:
    """Identify what gives codes their meaning: SHA-256 over the codebooks, in hexadecimal.

    Either half has them, so what one half codes the other knows; a decoder may be replaced by a better one for the same
    codes.  An official folder has the identity of the native folder that :func:`convert` makes of it.

    Args:
        weights: where they are, or tensors by our names.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    found = _read(weights, set(FILES["codebooks"]))[0] if isinstance(weights, Source) else weights
    return _digest({name: tensor for name, tensor in found.items() if name.split(".")[0] in FILES["codebooks"]})


def save(folder: Path, models: Mapping[CodecConfig, Mapping[str, Tensor]]) -> None:
    """Write a native folder.

    Args:
        folder: is made if it does not exist; files of the same names are replaced.
        models: state dicts by the configuration they belong to.  A tensor that is equal in all of them is stored once,
            any other once per token rate.  Tensors are stored in the dtype they have.

    Raises:
        CheckpointError: a tensor belongs to no file, or two configurations have the same token rate.
    """
    rates = [config.token_rate for config in models]
    if len(set(rates)) != len(rates):
        raise CheckpointError(f"one folder holds one preset per token rate, seen the rates {rates}")
    files: dict[str, dict[str, Tensor]] = {name: {} for name in FILES}
    for name in sorted(set().union(*models.values())):
        versions = {f"rate{config.token_rate}.{name}": state[name] for config, state in models.items() if name in state}
        first = next(iter(versions.values()))
        if len(versions) == len(models) and all(_same(first, other) for other in versions.values()):
            versions = {name: first}
        files[_file_of(name)] |= {key: value.detach().cpu().contiguous() for key, value in versions.items()}
    hashes = {name: _digest(tensors) for name, tensors in files.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "configs": json.dumps({config.name: json.loads(config.to_json()) for config in models}),
    }
    links = {key: hashes[name] for name, key in _LINKS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        part = path.with_suffix(".part")
        extra = links if name == "codebooks" else {}
        save_file(tensors, part, metadata | extra | {"sha256": hashes[name]})
        part.replace(path)


def save_model(folder: Path, config: str, tensors: Mapping[str, Tensor], file: str = MODEL) -> None:
    """Write a model that is one file.

    Args:
        folder: is made if it does not exist; a file of the same name is replaced.
        config: what to build before filling it, as JSON.
        tensors: by our names, in the dtype to store them in.
        file: its name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    part = path.with_suffix(".part")
    metadata = {"format": FORMAT, "version": VERSION, "configs": config, "sha256": _digest(stored)}
    save_file(stored, part, metadata)
    part.replace(path)


def file_digest(path: Path) -> str:
    """Return the SHA-256 that a native file says its tensors have.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    return _read_safetensors(path)[1]["sha256"]


def read_model(folder: Path, file: str = MODEL) -> tuple[str, dict[str, Tensor]]:
    """Return the configuration (JSON) and the tensors that :func:`save_model` wrote.

    Raises:
        CheckpointError: the file is missing, damaged or of another format.
    """
    tensors, metadata = _read_safetensors(folder / file)
    seen = _digest(tensors)
    if seen != metadata["sha256"]:
        raise CheckpointError(
            f"{folder / file} is damaged: the SHA-256 of its tensors is {seen}, {metadata['sha256']} was expected; "
            "fetch or export it again"
        )
    return metadata["configs"], tensors


def convert(source: Source, target: Path, module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn official (or native) weights into a native folder for one preset.

    Args:
        source: from :func:`locate`.
        target: folder to write.
        module: the whole codec built on the meta device; says which tensors there must be.
        dtype: to store floating-point tensors in; None keeps theirs.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the module in every name and shape.
    """
    found = _collect(source, module.state_dict())
    if dtype is not None:
        found = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    save(target, {source.config: found})


def read_inverse(source: Source) -> dict[str, Tensor]:
    """Return the encoder of the autoencoder that official weights hold beside its decoder, still on disk.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    rules = (
        Rule(r"first_stage_model\.((?:encoder|quant_conv)\..+)", r"vae.\1", "VAE encoder: editing needs it"),
        Rule(r".+", DROP, "everything else was loaded before"),
    )
    found, _ = apply_rules(rules, read_checkpoint(_official_file(source, "decoder.ckpt")), {"vae"})
    return {name.removeprefix("vae."): tensor for name, tensor in found.items()}


# --- matching -------------------------------------------------------------------------------------------------------


def _read(source: Source, wanted: set[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Return all tensors of the wanted components by our names, still on disk, and the names that have no rule."""
    found: dict[str, Tensor] = {}
    unmapped: list[str] = []
    for rules, tensors in (
        _read_official(source, wanted) if source.layout == "official" else _read_native(source, wanted)
    ):
        part, unknown = apply_rules(rules, tensors, wanted)
        found |= part
        unmapped += unknown
    return found, unmapped


def _collect(source: Source, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return exactly the tensors that ``targets`` (on any device) ask for, still on disk."""
    return matched(*_read(source, {name.split(".")[0] for name in targets}), targets, str(source))


def _file_of(name: str) -> str:
    component = name.split(".")[0]
    for file, components in FILES.items():
        if component in components:
            return file
    raise CheckpointError(f"{name} belongs to no file; names start with one of {sum(FILES.values(), ())}")


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.dtype == b.dtype and torch.equal(a, b))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and data, independent of the order in the file."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# --- official layout ------------------------------------------------------------------------------------------------


def _table_path(config: CodecConfig) -> str:
    # By the preset's name: ``semantic_size`` may have been adapted to the rows found.
    half = int(config.name.rsplit("-", 1)[1]) // 2
    return f"codebook_idx/combine_{config.token_rate * 512 // 100}_audioset_dominate/codebook_{half}_0.npy"


def official_files(config: CodecConfig) -> tuple[str, ...]:
    """Return the names of an official preset's files in the hub repository: encoder, decoder, k-means table."""
    remote = f"semanticodec_tokenrate_{config.token_rate}"
    return f"{remote}/encoder.ckpt", f"{remote}/decoder.ckpt", _table_path(config)


def _official_presets() -> list[CodecConfig]:
    return [config for config in PRESETS.values() if config.name.startswith("semanticodec-")]


def _guess_preset(folder: Path) -> CodecConfig:
    """Tell the preset of an official folder from the k-means tables that lie in it (or, as in the hub, beside it)."""
    named = re.fullmatch(r"semanticodec_tokenrate_(\d+)", folder.resolve().name)
    present = [
        config
        for config in _official_presets()
        if any((base / _table_path(config)).is_file() for base in (folder, folder.resolve().parent))
        and (named is None or named[1] == str(config.token_rate))
    ]
    if len(present) != 1:
        seen = ", ".join(config.name for config in present) or "none"
        raise CheckpointError(
            f"{folder} has the k-means tables of these presets: {seen}.  Say which preset to load; its table is "
            f"expected in the folder as {_table_path(_official_presets()[0])} or the like"
        )
    return present[0]


def _official_source(folder: Path | None, config: CodecConfig) -> Source:
    """Adapt the configuration to the rows the k-means table really has."""
    if config not in _official_presets():
        raise CheckpointError(f"{folder} has the official layout, which does not serve the preset {config.name}")
    source = Source(config, "official", folder)
    rows, columns = _read_table(source).shape
    size = config.encoder.semantic_size
    if columns != config.feature_dim:
        raise CheckpointError(
            f"the k-means table of {source} has {columns} columns where {config.feature_dim} are wanted; it belongs to "
            "another token rate"
        )
    if rows > size:
        raise CheckpointError(f"the k-means table of {source} has {rows} rows; its codes do not fit {size} values")
    if rows < size:
        warnings.warn(f"the k-means table of {source} has {rows} rows, {size} were expected", stacklevel=3)
    encoder = dataclasses.replace(config.encoder, semantic_size=rows)
    return dataclasses.replace(source, config=dataclasses.replace(config, encoder=encoder))


def _official_file(source: Source, name: str) -> Path:
    """Return the local path of one official file, downloading it if the source is the hub."""
    if source.folder is not None:
        # The hub keeps the tables beside the folders of the token rates.
        for path in (source.folder / name, source.folder.resolve().parent / name):
            if path.is_file() and (path.parent == source.folder or name.endswith(".npy")):
                return path
        raise CheckpointError(f"{source.folder / name} is missing; it is {name} of https://huggingface.co/{HUB}")
    import huggingface_hub

    encoder, decoder, _ = official_files(source.config)
    remote = {"encoder.ckpt": encoder, "decoder.ckpt": decoder}.get(name, name)
    try:
        return Path(huggingface_hub.hf_hub_download(HUB, remote))
    except Exception as error:  # the client raises errors of several unrelated libraries
        raise CheckpointError(
            f"cannot fetch {remote} from the hub repository {HUB} ({type(error).__name__}: {error}).  Without a "
            f"network, put encoder.ckpt and decoder.ckpt of semanticodec_tokenrate_{source.config.token_rate} and "
            f"{_table_path(source.config)} into one folder and give its path instead of the preset's name"
        ) from error


def _read_table(source: Source) -> np.ndarray:
    path = _official_file(source, _table_path(source.config))
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is not a readable .npy file: {error}") from error
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype != np.float32:
        seen = f"{table.dtype} {table.shape}" if isinstance(table, np.ndarray) else type(table).__name__
        raise CheckpointError(f"{path} holds {seen}, not a float32 table with two axes")
    return table


def _read_official(source: Source, wanted: set[str]) -> Iterator[tuple[tuple[Rule, ...], Mapping[str, Tensor]]]:
    if wanted & {*FILES["encoder"], *FILES["codebooks"]}:
        yield OFFICIAL_ENCODER, read_checkpoint(_official_file(source, "encoder.ckpt"))
    if wanted & set(FILES["codebooks"]):
        table = torch.from_numpy(np.array(_read_table(source)))
        yield (Rule("table", "codebooks.semantic", "k-means table"),), {"table": table}
    if wanted & set(FILES["decoder"]):
        state = read_checkpoint(_official_file(source, "decoder.ckpt"))
        check_schedule(source.config.decoder.latent.schedule, state.get("alphas_cumprod"), str(source))
        yield OFFICIAL_DECODER, state


# --- native layout --------------------------------------------------------------------------------------------------


def _native_source(folder: Path, preset_name: str | None) -> Source:
    _, metadata = _read_safetensors(folder / "codebooks.safetensors")
    try:
        configs = {name: config_from_json(json.dumps(value)) for name, value in json.loads(metadata["configs"]).items()}
    except (ConfigError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the configurations in {folder} are of another version: {error}") from error
    if preset_name is None and len(configs) == 1:
        preset_name = next(iter(configs))
    if preset_name not in configs:
        wanted = f"not {preset_name}" if preset_name else "say which one to load"
        raise CheckpointError(f"{folder} serves the presets {', '.join(configs)}; {wanted}")
    return Source(configs[preset_name], "native", folder)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Open one native file; its tensors stay on disk until they are used."""
    if not path.is_file():
        wanted = MODEL if path.name == MODEL else ", ".join(f"{name}.safetensors" for name in FILES)
        raise CheckpointError(f"{path} is missing; native weights are {wanted}")
    try:
        with safe_open(path, framework="pt") as opened:
            file: Any = opened
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        seen = f"{metadata.get('format')!r} version {metadata.get('version')!r}"
        raise CheckpointError(f"{path} has the format {seen}; this package reads {FORMAT!r} version {VERSION!r}")
    missing = {"configs", "sha256", *(_LINKS.values() if path.stem == "codebooks" else ())} - set(metadata)
    if missing:
        raise CheckpointError(f"{path} lacks the metadata {sorted(missing)}; write it again")
    return tensors, metadata


def _read_native(source: Source, wanted: set[str]) -> Iterator[tuple[tuple[Rule, ...], Mapping[str, Tensor]]]:
    folder = source.folder or WEIGHTS
    _, links = _read_safetensors(folder / "codebooks.safetensors")
    for name, components in FILES.items():
        if not wanted & set(components):
            continue
        tensors, metadata = _read_safetensors(folder / f"{name}.safetensors")
        seen, expected = _digest(tensors), links[_LINKS.get(name, "sha256")]
        if not seen == metadata["sha256"] == expected:
            raise CheckpointError(
                f"{folder / name}.safetensors is damaged, or of another set of files: the SHA-256 of its tensors is "
                f"{seen}, {expected} was expected; fetch or convert it again"
            )
        yield native_rules(name, source.config.token_rate), tensors
