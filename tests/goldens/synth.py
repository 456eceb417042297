# ruff: noqa
# fmt: off
"""Stand-alone (numpy only) rules for the synthetic SemantiCodec weights, inputs and noise used by the goldens.

Nothing here needs the reference implementation.  See README.md.
"""
import json
import os
import zlib

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))


# ----------------------------------------------------------------------------- random streams
def rng(key: str) -> np.random.Generator:
    """The one and only source of randomness: PCG64 seeded with the CRC-32 of a text key."""
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))


def normal(key, shape, mean=0.0, std=1.0):
    """float32(mean) + float32(std) * standard_normal(shape) rounded to float32.

    Values are drawn in C order.  Drawing in blocks gives the same stream as one call (and needs less memory).
    """
    n = int(np.prod(shape, dtype=np.int64)) if len(shape) else 1
    g = rng(key)
    out = np.empty(n, np.float32)
    block = 1 << 22
    for i in range(0, n, block):
        j = min(n, i + block)
        out[i:j] = g.standard_normal(j - i).astype(np.float32)
    s, m = np.float32(std), np.float32(mean)
    out *= s
    if m != 0:
        out += m
    return out.reshape(shape)


# ----------------------------------------------------------------------------- computed tensors
def sincos_1d(dim, pos):
    """[len(pos), dim]: sin of pos * 10000**(-i/(dim/2)) in the first half, cos in the second half (float64)."""
    w = 1.0 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2.0))
    a = np.asarray(pos, np.float64).reshape(-1)[:, None] * w[None, :]
    return np.concatenate([np.sin(a), np.cos(a)], axis=1)


def sincos_2d(dim, rows=8, cols=64):
    """AudioMAE table [1, 1+rows*cols, dim]; row 0 is zeros (class token); column index varies fastest and
    fills the FIRST half of the channels, the row index the second half."""
    r, c = np.meshgrid(np.arange(rows, dtype=np.float32), np.arange(cols, dtype=np.float32), indexing="ij")
    body = np.concatenate([sincos_1d(dim // 2, c), sincos_1d(dim // 2, r)], axis=1)
    return np.concatenate([np.zeros((1, dim)), body], axis=0).astype(np.float32)[None]


def schedule():
    """The 12 schedule buffers of the decoder checkpoint (float32, computed in float64)."""
    b = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=np.float64) ** 2
    a = 1.0 - b
    ac = np.cumprod(a)
    acp = np.append(1.0, ac[:-1])
    pv = b * (1 - acp) / (1 - ac)
    d = dict(
        betas=b, alphas_cumprod=ac, alphas_cumprod_prev=acp,
        sqrt_alphas_cumprod=np.sqrt(ac), sqrt_one_minus_alphas_cumprod=np.sqrt(1 - ac),
        log_one_minus_alphas_cumprod=np.log(1 - ac),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / ac), sqrt_recipm1_alphas_cumprod=np.sqrt(1 / ac - 1),
        posterior_variance=pv, posterior_log_variance_clipped=np.log(np.maximum(pv, 1e-20)),
        posterior_mean_coef1=b * np.sqrt(acp) / (1 - ac), posterior_mean_coef2=(1 - acp) * np.sqrt(a) / (1 - ac),
    )
    return {k: v.astype(np.float32) for k, v in d.items()}


_SCHED = None


# ----------------------------------------------------------------------------- weights
def fill(entry):
    """One manifest entry -> numpy array."""
    global _SCHED
    k, shape, rule = entry["key"], tuple(entry["shape"]), entry["rule"]
    if rule == "normal":
        return normal(entry.get("seed_key", k), shape, entry["mean"], entry["std"])
    if rule == "const":
        return np.full(shape, entry["value"], dtype=entry["dtype"])
    if rule == "sincos2d":
        return sincos_2d(shape[-1])
    if rule == "schedule":
        if _SCHED is None:
            _SCHED = schedule()
        return _SCHED[k]
    raise ValueError(rule)


def load_manifest(name):
    with open(os.path.join(HERE, "manifests", name + ".json")) as f:
        return json.load(f)["entries"]


ENCODER_PARTS = lambda rate: ["audiomae", f"acoustic_{rate}"]
DECODER_PARTS = lambda rate: [f"unet_{rate}", f"unet_ema_{rate}", "diffusion_buffers", "vae", "vocoder"]


def encoder_entries(rate):
    return [e for p in ENCODER_PARTS(rate) for e in load_manifest(p)]


def decoder_entries(rate):
    return [e for p in DECODER_PARTS(rate) for e in load_manifest(p)]


CODEBOOK_DIR = {100: "combine_512_audioset_dominate", 50: "combine_256_audioset_dominate",
                25: "combine_128_audioset_dominate"}
CODEBOOK_STD = 0.4
# seeds were picked so that no token sits closer than 4e-4 (relative) to a decision boundary
CODEBOOK_SALT = {(100, 4096): 19, (100, 8192): 0, (100, 16384): 4, (100, 32768): 11, (50, 4096): 0, (50, 8192): 2, (50, 16384): 2, (50, 32768): 7, (25, 4096): 0, (25, 8192): 0, (25, 16384): 0, (25, 32768): 2}


def codebook_path(rate, vocab):
    return f"codebook_idx/{CODEBOOK_DIR[rate]}/codebook_{vocab // 2}_0.npy"


def semantic_codebook(rate, vocab):
    """[vocab, 768*100/rate] float32 synthetic k-means table; key = its file name in the model repository,
    followed by '#<salt>' when CODEBOOK_SALT is not 0."""
    salt = CODEBOOK_SALT[(rate, vocab)]
    key = codebook_path(rate, vocab) + (f"#{salt}" if salt else "")
    return normal(key, (vocab, 768 * 100 // rate), 0.0, CODEBOOK_STD)


# ----------------------------------------------------------------------------- test signals
def signal(name):
    """int16 mono test signals at 16 kHz (divide by 32768 to get the float32 the codec sees)."""
    n = {"A": 64000, "B": 196800, "C": 163840, "D": 80000, "Z": 32000}[name]
    if name == "Z":
        return np.zeros(n, np.int16)
    t = np.arange(n, dtype=np.float64) / 16000.0
    f0 = {"A": 110.0, "B": 180.0, "C": 147.0, "D": 98.0}[name]
    sweep = np.sin(2 * np.pi * (f0 * t + 45.0 * t * t))
    harm = sum(np.sin(2 * np.pi * f0 * k * t + 0.3 * k) / k for k in range(2, 9))
    am = 0.5 * (1 + np.sin(2 * np.pi * 2.7 * t))
    noise = rng("signal:" + name).standard_normal(n)
    burst = (np.floor(t * 3.0) % 3 == 1).astype(np.float64)
    x = 0.25 * sweep * am + 0.15 * harm * (1 - am) + 0.02 * noise + 0.12 * noise * burst
    x = x + 0.01                                   # a DC offset, so that mean removal matters
    if name == "B":                                # 0.5 s of digital silence inside
        x[int(4.0 * 16000):int(4.5 * 16000)] = 0.0
    return np.clip(np.round(x * 32767.0 * 0.8), -32768, 32767).astype(np.int16)


def signal_44k_stereo():
    """int16 [n, 2] at 44.1 kHz, 1.3 s (resampling + channel selection test)."""
    n = int(1.3 * 44100)
    t = np.arange(n, dtype=np.float64) / 44100.0
    left = 0.4 * np.sin(2 * np.pi * (200 * t + 3000 * t * t)) + 0.05 * rng("signal:S44").standard_normal(n)
    right = 0.3 * np.sin(2 * np.pi * 523.25 * t)
    return np.clip(np.round(np.stack([left, right], 1) * 32767.0), -32768, 32767).astype(np.int16)


class NoiseStream:
    """Sequential float32 Gaussian tensors for the sampler: first x_T, then one per DDIM step, window after window."""

    def __init__(self, key):
        self.g = rng(key)
        self.count = 0

    def __call__(self, shape):
        self.count += 1
        return self.g.standard_normal(tuple(shape)).astype(np.float32)


# ----------------------------------------------------------------------------- digests
def sample_index(n, k=4096):
    if n <= k:
        return np.arange(n, dtype=np.int64)
    return np.unique(np.round(np.linspace(0, n - 1, k)).astype(np.int64))


def digest(name, x, k=4096):
    """dict of small arrays describing a float tensor: shape, [mean, std, l2, absmax] (float64), strided sample."""
    x = np.asarray(x)
    f = x.reshape(-1).astype(np.float64)
    return {
        name + ".shape": np.asarray(x.shape, np.int64),
        name + ".stats": np.asarray([f.mean(), f.std(), np.sqrt((f * f).sum()), np.abs(f).max()], np.float64),
        name + ".sample": x.reshape(-1)[sample_index(x.size, k)].astype(np.float32),
    }


def compare(golden, name, x, k=4096):
    """max |x - golden| over the sample, relative to the golden std; raises on a shape mismatch."""
    x = np.asarray(x)
    assert tuple(golden[name + ".shape"]) == x.shape, (name, tuple(golden[name + ".shape"]), x.shape)
    s = x.reshape(-1)[sample_index(x.size, k)].astype(np.float64)
    d = np.abs(s - golden[name + ".sample"].astype(np.float64)).max()
    f = x.reshape(-1).astype(np.float64)
    l2 = np.sqrt((f * f).sum())
    g = golden[name + ".stats"]
    return {"max_abs_err": float(d), "rel_to_std": float(d / max(g[1], 1e-12)), "l2_rel": float(abs(l2 - g[2]) / max(g[2], 1e-12))}
