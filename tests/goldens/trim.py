"""Make the trimmed copy of the recorded data that lies beside this file: ``python trim.py FOLDER_OF_ALL_GOLDENS``."""

import json
import lzma
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SAMPLES = 512
"""Values kept of a digest's sample: every ``name.stride``-th one."""
FILES = {
    "frontend": "fbank_|resample_|mel_banks_",
    "audiomae": r".*\.(block|out_token100|pooled)|pos_embed",
    "acoustic_100": r"(?!.*(gap|margin))",
    "encode_100": r".*(tokens|cutoff|residual)",
    "unet_100": r"(?!.*time_embed)",
    "vae": r"(?!.*rows)",
    "vocoder": r"(?!wav_(first|last))",
    "schedule": r"(sqrt_)?(one_minus_)?alphas_cumprod$",
    "ddim_schedule": "",
    "decode_100": r"(?!.*(latent_full|wav_8000))",
    "overlap_add": r".*(shape|stats|sample)$",
    "posenc": "",
}
"""File -> pattern that the names of the arrays to keep begin with."""
FAMILY = {
    "schedule": r"\w+\.alphas_cumprod$",
    "ddim_schedule": r"\w+\.S(4|10|50|200)_|steps_for_S|overrun_S",
    "unet_audioldm_s": r"(t1|t500|ema_t500|batch2)(?!.*time_embed)",
    "unet_audiosr": r"t500(?!.*time_embed)",
    "vae_48k": r"(encode|decode)\.(mean|logvar|mel|sample)\.",
    "vocoder_48k": r"wav_digest|length",
    "frontends": r"(A|B|48k)\..*(logmel|wav)|48k.*frames|mel_basis",
    "traj_audioldm_s": r"(ddim:s:S4_eta[01]_g2\.5_B2|masked:s:inpaint|partial:s:S4)\S*\.(latent|mask|t_enc|z_enc)",
    "clap_tiny": r"audio_v1\..*(logmel|embedding|crop_start)|audio_v2\..*embedding|text\.emb|uncond_emb|cosine",
    "seqgen": r"(?!transformers)",
    "audiomae": r"\w+\.pooled_\dx\d\.(shape|stats|sample)",
    "musicldm": r"tempo\.(track|beat|group_of)|latent_mixup",
    "traj_audiosr": r"vpred|ddim:sr:S4_eta1_g3\.5\.latent",
}
"""The same for the folder of AudioLDM, AudioLDM 2, MusicLDM and AudioSR beside that."""
WHOLE = r"ddim:\d.*step\d"
"""Digests whose samples are compared point by point."""


def trim(arrays: dict[str, np.ndarray], pattern: str) -> dict[str, np.ndarray]:
    """Keep the arrays that tests read, with thinner samples."""
    kept = {name: array for name, array in arrays.items() if re.match(pattern, name)}
    for name in [name for name in kept if name.endswith(".sample") and not re.match(WHOLE, name)]:
        stride = -(-len(kept[name]) // SAMPLES)
        kept[name.removesuffix("sample") + "count"] = np.array(len(kept[name]))
        kept[name] = kept[name][::stride]
        kept[name.removesuffix("sample") + "stride"] = np.array(stride)
    return kept


def trim_family(source: Path, target: Path) -> None:
    """Do the same for the family's folder."""
    target.mkdir(exist_ok=True)
    for name, pattern in FAMILY.items():
        with np.load(source / f"{name}.npz") as file:
            np.savez_compressed(target / f"{name}.npz", **trim(dict(file), pattern))
    (target / "synth.py").unlink(missing_ok=True)
    (target / "synth.py").write_text("# ruff: noqa\n# fmt: off\n" + (source / "synth.py").read_text())
    manifests = {path.stem: json.loads(path.read_text()) for path in sorted(source.glob("manifests/*.json"))}
    whole = {name: manifest.get("entries", manifest) for name, manifest in manifests.items()}
    (target / "manifests.json.xz").write_bytes(lzma.compress(json.dumps(whole, separators=(",", ":")).encode()))


def main() -> None:
    """Read all, write what fits."""
    source = Path(sys.argv[1])
    for name, pattern in FILES.items():
        with np.load(source / f"{name}.npz") as file:
            np.savez_compressed(HERE / f"{name}.npz", **trim(dict(file), pattern))
    (HERE / "synth.py").unlink(missing_ok=True)
    (HERE / "synth.py").write_text("# ruff: noqa\n# fmt: off\n" + (source / "synth.py").read_text())
    counts = json.loads((source / "token_counts.json").read_text())
    (HERE / "token_counts.json").write_text(json.dumps(counts, separators=(",", ":")) + "\n")
    manifests = {path.stem: json.loads(path.read_text())["entries"] for path in sorted(source.glob("manifests/*.json"))}
    (HERE / "manifests.json.xz").write_bytes(lzma.compress(json.dumps(manifests, separators=(",", ":")).encode()))
    trim_family(source.parent / "ldm", HERE / "ldm")


if __name__ == "__main__":
    main()
