"""EnCodec, DAC and Mimi through transformers, if their weights are on this machine; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..audio import resample
from ..config import SAMPLE_RATE
from ..wire import pack, packed_size, unpack
from .clips import Clip, Wave
from .codecs import LIBRARIES, READING, About, Coded, content, sources, versions

Kind = Literal["encodec", "dac", "mimi"]
CLASSES = {"encodec": "EncodecModel", "dac": "DacModel", "mimi": "MimiModel"}
FAMILIES = {"encodec": "EnCodec", "dac": "DAC", "mimi": "Mimi"}


@dataclass(frozen=True)
class Hub:
    """A codec of transformers with some of its codebooks.

    Args:
        kind: which architecture.
        source: repository on the Hugging Face hub whose files are in the cache, or a folder.
        books: codebooks to use.
    """

    kind: Kind
    source: str
    books: int

    @property
    def name(self) -> str:
        """Repository and number of codebooks."""
        return f"{Path(self.source).name}-{self.books}q"

    def missing(self) -> str | None:
        """Say whether transformers and the weights are here."""
        try:
            import transformers  # noqa: F401
        except ImportError:
            return "transformers is not installed: pip install 'semanticodec[generation]'"
        from safetensors import SafetensorError

        try:
            self._weights()
            _model(self.kind, self.source)
        except FileNotFoundError as error:
            return str(error)
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
            return f"{self.source} cannot be loaded: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
        return None

    def about(self) -> About:
        """Say how large it is and what it works at."""
        model = _model(self.kind, self.source)
        source = Path(self.source).name if Path(self.source).is_absolute() else self.source
        return About(
            FAMILIES[self.kind],
            f"{source}, {self.books} codebooks of {_codebook_size(model)}",
            int(model.config.sampling_rate),
            parameters=sum(p.numel() for p in model.parameters()),
        )

    def fingerprint(self) -> str:
        """Name the weights, what configures them and this adapter by content, and the libraries by their versions."""
        weights = self._weights()
        files = (weights, *sorted(weights.parent.glob("*.json")))
        made_by = sources(*READING, "bench/codecs", "bench/neural", "wire"), versions(*LIBRARIES, "transformers")
        return "/".join((self.name, ",".join(file.name for file in files), content(files), *made_by))

    @torch.inference_mode()
    def encode(self, clip: Clip) -> Coded:
        """Code a clip and pack its codes.

        Args:
            clip: any.

        Returns:
            Packed codes, and the codes ``[books, F]``.
        """
        model = _model(self.kind, self.source)
        wave = resample(torch.from_numpy(clip.wave), SAMPLE_RATE, int(model.config.sampling_rate))[None, None]
        if self.kind == "encodec":
            # the bandwidth is what selects codebooks
            frames = int(model.config.frame_rate)
            bandwidth = self.books * frames * (_codebook_size(model) - 1).bit_length() / 1000
            codes = model.encode(wave, bandwidth=bandwidth).audio_codes[0, 0]
        elif self.kind == "dac":
            codes = model.encode(wave, n_quantizers=self.books).audio_codes[0]
        else:
            codes = model.encode(wave, num_quantizers=self.books).audio_codes[0]
        packed = codes.cpu().numpy().astype(np.int64)
        bits = [(_codebook_size(model) - 1).bit_length()] * len(packed)
        return Coded(pack(packed[None], bits), 8 * packed_size(packed.shape[1], bits), packed)

    @torch.inference_mode()
    def decode(self, coded: Coded, clip: Clip) -> Wave:
        """Decode the packed codes and cut what the last frame adds.

        Args:
            coded: what :meth:`encode` returned.
            clip: the same, for its length.

        Returns:
            Samples ``[S']`` at 16 kHz, at most as many as the clip has.
        """
        model = _model(self.kind, self.source)
        bits = [(_codebook_size(model) - 1).bit_length()] * self.books
        codes = torch.from_numpy(unpack(coded.data, bits, 8 * len(coded.data) // sum(bits)))
        if self.kind == "encodec":
            wave = model.decode(codes[None], [None]).audio_values[0, 0]
        elif self.kind == "dac":
            wave = model.decode(audio_codes=codes).audio_values[0]
        else:
            wave = model.decode(codes).audio_values[0, 0]
        result: Wave = resample(wave.cpu(), int(model.config.sampling_rate), SAMPLE_RATE).numpy()
        return result[: len(clip.wave)]

    def codebook_sizes(self) -> tuple[int, ...]:
        """Entries of each codebook."""
        return (_codebook_size(_model(self.kind, self.source)),) * self.books

    def _weights(self) -> Path:
        # A folder that is not there must not pass for the name of a repository.
        if Path(self.source).is_absolute() or Path(self.source).is_dir():
            for path in (Path(self.source) / "config.json", Path(self.source) / "model.safetensors"):
                if not path.is_file():
                    raise FileNotFoundError(f"there is no {path}")
            return path
        import huggingface_hub

        found = [huggingface_hub.try_to_load_from_cache(self.source, n) for n in ("config.json", "model.safetensors")]
        paths = [path for path in found if isinstance(path, str)]
        if len(paths) < len(found):
            raise FileNotFoundError(f"{self.source} is not in the Hugging Face cache; fetch it first")
        return Path(paths[-1])


def _codebook_size(model: Any) -> int:
    return int(model.config.codebook_size)


@functools.lru_cache(1)
def _model(kind: Kind, source: str) -> Any:
    import transformers

    return getattr(transformers, CLASSES[kind]).from_pretrained(source, local_files_only=True).eval()


def hub(folder: Path | None = None) -> Iterator[Hub]:
    """Yield the usual settings of the published models.

    Args:
        folder: with a folder per model (encodec_24khz, dac_16khz, mimi); None takes the Hugging Face cache.
    """

    def source(repository: str) -> str:
        return repository if folder is None else str(folder.absolute() / Path(repository).name)

    for books in (2, 4, 8):
        yield Hub("encodec", source("facebook/encodec_24khz"), books)
    for books in (1, 2, 12):
        yield Hub("dac", source("descript/dac_16khz"), books)
    for books in (4, 8):
        yield Hub("mimi", source("kyutai/mimi"), books)
