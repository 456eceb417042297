# ruff: noqa
# fmt: off
"""Stand-alone (numpy only) rules for the synthetic weights, inputs, signals and noise used by the goldens of the
latent-diffusion audio family (AudioLDM, AudioLDM 2, MusicLDM, AudioSR).

rng / normal / sincos / fill / load_manifest / NoiseStream / digest / compare are the SemantiCodec goldens' functions
(../semanticodec/synth.py), unchanged; everything below the line "family extensions" is new.
Nothing here needs the reference implementations.  See README.md.
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


def schedule(kind="linear"):
    """The 12 schedule buffers of a checkpoint (float32, computed in float64).

    kind "linear": scaled-linear betas (AudioLDM, AudioLDM 2, MusicLDM).  kind "cosine": AudioSR's un-clipped cosine; its
    two reciprocal arrays use alphas_cumprod + 1e-10.
    """
    if kind == "linear":
        b = np.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=np.float64) ** 2
        eps = 0.0
    else:
        u = np.arange(1001, dtype=np.float64) / 1000 + 8e-3
        f = np.cos(u / (1 + 8e-3) * np.pi / 2) ** 2
        f = f / f[0]
        b = 1 - f[1:] / f[:-1]
        eps = 1e-10
    a = 1.0 - b
    ac = np.cumprod(a)
    acp = np.append(1.0, ac[:-1])
    pv = b * (1 - acp) / (1 - ac)
    d = dict(
        betas=b, alphas_cumprod=ac, alphas_cumprod_prev=acp,
        sqrt_alphas_cumprod=np.sqrt(ac), sqrt_one_minus_alphas_cumprod=np.sqrt(1 - ac),
        log_one_minus_alphas_cumprod=np.log(1 - ac),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / (ac + eps)), sqrt_recipm1_alphas_cumprod=np.sqrt(1 / (ac + eps) - 1),
        posterior_variance=pv, posterior_log_variance_clipped=np.log(np.maximum(pv, 1e-20)),
        posterior_mean_coef1=b * np.sqrt(acp) / (1 - ac), posterior_mean_coef2=(1 - acp) * np.sqrt(a) / (1 - ac),
    )
    return {k: v.astype(np.float32) for k, v in d.items()}


_SCHED = {}


# ----------------------------------------------------------------------------- weights
def fill(entry):
    """One manifest entry -> numpy array."""
    k, shape, rule = entry["key"], tuple(entry["shape"]), entry["rule"]
    if rule == "normal":
        return normal(k, shape, entry["mean"], entry["std"])
    if rule == "const":
        return np.full(shape, entry["value"], dtype=entry["dtype"])
    if rule == "sincos2d":
        return sincos_2d(shape[-1])
    if rule in ("schedule", "schedule_cosine"):
        if rule not in _SCHED:
            _SCHED[rule] = schedule("linear" if rule == "schedule" else "cosine")
        return _SCHED[rule][k]
    return fill_extra(rule, shape)


def load_manifest(name):
    with open(os.path.join(HERE, "manifests", name + ".json")) as f:
        return json.load(f)["entries"]


class NoiseStream:
    """Sequential float32 Gaussian tensors for the sampler, in the order in which the reference asks for them."""

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


# ============================================================================= family extensions
def hann(n):
    """periodic Hann window, float64"""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n) / n)


def mel_slaney(sr, n_fft, n_mels, fmin, fmax):
    """[n_mels, n_fft/2+1] float32: Slaney mel scale, triangles divided by half their band width ('area' norm)."""
    step = 200.0 / 3.0

    def to_mel(f):
        f = np.asarray(f, np.float64)
        return np.where(f < 1000.0, f / step, 15.0 + np.log(np.maximum(f, 1e-9) / 1000.0) * 27.0 / np.log(6.4))

    def to_hz(m):
        m = np.asarray(m, np.float64)
        return np.where(m < 15.0, m * step, 1000.0 * np.exp((m - 15.0) * np.log(6.4) / 27.0))

    edges = to_hz(np.linspace(to_mel(fmin), to_mel(fmax), n_mels + 2))
    f = np.arange(n_fft // 2 + 1) * (sr / n_fft)
    up = (f[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    dn = (edges[2:, None] - f[None]) / (edges[2:] - edges[1:-1])[:, None]
    w = np.maximum(0, np.minimum(up, dn)).astype(np.float32)
    w *= (2.0 / (edges[2:] - edges[:-2]))[:, None]
    return w


def mel_htk(sr, n_fft, n_mels, fmin, fmax):
    """[n_fft/2+1, n_mels] float32: HTK mel scale, unnormalised triangles (torchaudio default)."""
    m = lambda f: 2595.0 * np.log10(1.0 + f / 700.0)
    edges = 700.0 * (10.0 ** (np.linspace(m(fmin), m(fmax), n_mels + 2) / 2595.0) - 1.0)
    f = np.linspace(0, sr // 2, n_fft // 2 + 1)
    sl = edges[None, :] - f[:, None]
    d = np.diff(edges)
    return np.maximum(0.0, np.minimum(-sl[:, :-2] / d[:-1], sl[:, 2:] / d[1:])).astype(np.float32)


def swin_relative_index(w=8):
    """[w*w, w*w] int64 index into a (2w-1)**2-row bias table."""
    r, c = np.divmod(np.arange(w * w), w)
    return ((r[:, None] - r[None] + w - 1) * (2 * w - 1) + (c[:, None] - c[None] + w - 1)).astype(np.int64)


def swin_attn_mask(side, w=8, shift=4):
    """[(side/w)**2, w*w, w*w] float32, 0 inside a region and -100 across regions of the cyclically shifted image."""
    z = np.zeros(side, np.int64)
    z[side - w:side - shift] = 1
    z[side - shift:] = 2
    img = z[:, None] * 3 + z[None]
    n = side // w
    win = img.reshape(n, w, n, w).transpose(0, 2, 1, 3).reshape(n * n, w * w)
    return np.where(win[:, None] == win[:, :, None], 0.0, -100.0).astype(np.float32)


def fill_extra(rule, shape):
    if rule == "arange":                       # position_ids [1, n] int64
        return np.arange(shape[-1], dtype=np.int64).reshape(shape)
    if rule == "swin_relative_index":
        return swin_relative_index(int(round(shape[0] ** 0.5)))
    if rule == "swin_attn_mask":
        w = int(round(shape[1] ** 0.5))
        return swin_attn_mask(int(round(shape[0] ** 0.5)) * w, w, w // 2)
    if rule == "clap_stft_real" or rule == "clap_stft_imag":     # [513, 1, 1024]
        n = shape[2]
        a = 2 * np.pi * (np.outer(np.arange(shape[0]), np.arange(n)) % n) / n
        v = np.cos(a) if rule.endswith("real") else -np.sin(a)
        return (v * hann(n)[None]).astype(np.float32)[:, None, :]
    if rule == "clap_melW":                    # [513, 64]
        return mel_slaney(48000, 1024, 64, 50, 14000).T.copy()
    if rule == "clap_hann":                    # [1024], torchaudio front-end buffer (unused at inference)
        return hann(shape[0]).astype(np.float32)
    if rule == "clap_mel_fb":                  # [513, 64], torchaudio front-end buffer (unused at inference)
        return mel_htk(48000, 1024, 64, 50.0, 14000.0)
    raise ValueError(rule)


# ----------------------------------------------------------------------------- whole checkpoints
def ema_entries(unet_entries):
    """LitEma part of a checkpoint: one flat buffer per U-Net parameter (dots removed) + two scalars."""
    out = [dict(key="model_ema.decay", shape=[], dtype="float32", rule="const", value=0.9999),
           dict(key="model_ema.num_updates", shape=[], dtype="int32", rule="const", value=0)]
    for e in unet_entries:
        assert e["key"].startswith("model.")
        out.append(dict(e, key="model_ema." + e["key"][len("model."):].replace(".", "")))
    return out


def checkpoints():
    with open(os.path.join(HERE, "manifests", "checkpoints.json")) as f:
        return json.load(f)


def checkpoint_entries(name):
    """All entries {key, shape, dtype, rule, ...} of one whole official-layout checkpoint (the fill key is the full key)."""
    out = []
    for p in checkpoints()[name]["parts"]:
        es = load_manifest(p["part"])
        if p.get("ema"):
            es = ema_entries(es)
        for e in es:
            assert e["key"].startswith(p.get("strip", "")), (e["key"], p)
            out.append(dict(e, key=p.get("add", "") + e["key"][len(p.get("strip", "")):]))
    keys = [e["key"] for e in out]
    assert len(set(keys)) == len(keys)
    return sorted(out, key=lambda e: e["key"])


# ----------------------------------------------------------------------------- test signals
def signal16(name="A"):
    """int16 mono, 16 kHz (divide by 32768): A = 4.0 s, C = 10.24 s.  Same as the SemantiCodec goldens' signal()."""
    n = {"A": 64000, "C": 163840}[name]
    t = np.arange(n, dtype=np.float64) / 16000.0
    f0 = {"A": 110.0, "C": 147.0}[name]
    sweep = np.sin(2 * np.pi * (f0 * t + 45.0 * t * t))
    harm = sum(np.sin(2 * np.pi * f0 * k * t + 0.3 * k) / k for k in range(2, 9))
    am = 0.5 * (1 + np.sin(2 * np.pi * 2.7 * t))
    noise = rng("signal:" + name).standard_normal(n)
    burst = (np.floor(t * 3.0) % 3 == 1).astype(np.float64)
    x = 0.25 * sweep * am + 0.15 * harm * (1 - am) + 0.02 * noise + 0.12 * noise * burst
    x = x + 0.01                                   # a DC offset, so that mean removal matters
    return np.clip(np.round(x * 32767.0 * 0.8), -32768, 32767).astype(np.int16)


def signal48(name, seconds):
    """int16 mono, 48 kHz (divide by 32768).  name: full | lp4k | lp8k (brick-wall low-passed copies of `full`)."""
    n = int(round(seconds * 48000))
    t = np.arange(n, dtype=np.float64) / 48000.0
    g = rng("signal48")
    noise = g.standard_normal(n)
    am = 0.5 * (1 + np.sin(2 * np.pi * 1.7 * t))
    harm = sum(np.sin(2 * np.pi * 220.0 * k * t + 0.3 * k) / k for k in range(1, 60))
    x = 0.12 * harm * (1 - 0.5 * am) + 0.10 * noise * (0.2 + 0.8 * am)
    if name != "full":
        cut = {"lp4k": 4000.0, "lp8k": 8000.0}[name]
        s = np.fft.rfft(x)
        s[np.fft.rfftfreq(n, 1 / 48000.0) > cut] = 0
        x = np.fft.irfft(s, n)
    return np.clip(np.round((x + 0.01) * 32767.0 * 0.8), -32768, 32767).astype(np.int16)


def click_track(bpm, seconds, first, sr=16000, key=""):
    """float32 click-track-like signal plus its beat and downbeat times (4/4): clicks of 30 ms, downbeats louder/higher."""
    n = int(round(seconds * sr))
    t = np.arange(n, dtype=np.float64) / sr
    beats = np.arange(first, seconds - 0.05, 60.0 / bpm)
    x = 0.02 * rng("click:" + key).standard_normal(n)
    for i, b in enumerate(beats):
        d = t - b
        on = (d >= 0) & (d < 0.03)
        x[on] += (0.8 if i % 4 == 0 else 0.4) * np.sin(2 * np.pi * (1500 if i % 4 == 0 else 900) * d[on]) * np.exp(-d[on] / 0.008)
    return x.astype(np.float32), beats, beats[::4]


def crc(a):
    return zlib.crc32(np.ascontiguousarray(a).tobytes())


# ----------------------------------------------------------------------------- inputs of the goldens
def unit(key, shape):
    """Gaussian rows scaled to unit length (norm computed in float64)."""
    x = normal(key, shape)
    return (x / np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True))).astype(np.float32)


def film(batch, tag="cond"):
    """(batch, 1, 512) unit vectors standing for CLAP embeddings; the unconditional one is film(1, "uncond") repeated."""
    return np.repeat(unit("film:uncond", (1, 1, 512)), batch, 0) if tag == "uncond" else unit("film:" + tag, (batch, 1, 512))


def mask_rows(rows, length):
    m = np.zeros((len(rows), length), np.float32)
    for i, r in enumerate(rows):
        m[i, :r] = 1
    return m


def ctx_audioldm2(batch, tag="cond", length=13, rows=(9, 13)):
    """[(tokens, mask), (tokens, mask)]: 8 generated vectors (768) and `length` T5 states (1024), rows[i] of them valid."""
    return [(normal("ctx768:" + tag, (batch, 8, 768)), np.ones((batch, 8), np.float32)),
            (normal("ctx1024:" + tag, (batch, length, 1024)), mask_rows(list(rows)[:batch], length))]


def uncond_audioldm2(batch):
    """unconditional contexts: zeros for the generated vectors, ONE token (the encoding of "") for T5."""
    return [(np.zeros((batch, 8, 768), np.float32), np.ones((batch, 8), np.float32)),
            (np.repeat(normal("ctx1024:uncond", (1, 1, 1024)), batch, 0), np.ones((batch, 1), np.float32))]


def concat_cond(batch, tag, shape):
    """AudioSR condition latent before scale_factor, shape (C, T, F)"""
    return normal("concat:%s:%d" % (tag, shape[1]), (batch,) + tuple(shape))


AUDIOSR_UNCOND = -11.4981          # constant latent, also before scale_factor


def clap_text_ids():
    """(3, 512) RoBERTa ids and masks: two random texts of 7 and 77 tokens and the empty string, padded with 1."""
    g = rng("clap:ids")
    a, m = np.ones((3, 512), np.int64), np.zeros((3, 512), np.int64)
    for i, n in enumerate((7, 77, 2)):
        a[i, 0], a[i, n - 1] = 0, 2
        a[i, 1:n - 1] = g.integers(4, 50260, n - 2)
        m[i, :n] = 1
    return a, m


def phoneme_ids():
    g = rng("phonemes")
    ids = np.zeros((2, 310), np.int64)
    ids[0, :57] = g.integers(1, 183, 57)
    ids[1, :140] = g.integers(1, 183, 140)
    return ids


def check(golden, name, x):
    """compare() with the sample size taken from the golden itself (sizes differ from array to array here)."""
    return compare(golden, name, x, len(golden[name + ".sample"]))


def long_segments():
    """four (1,1,16384) waveforms; the head of each is the shifted tail of the previous one (MusicLDM long-sample join)."""
    segs = [normal("long:%d" % i, (1, 1, 16384), 0, 0.2) for i in range(4)]
    for i, sh in ((1, 37), (2, -53), (3, 400)):
        segs[i][..., :4096] = np.roll(segs[i - 1][..., -4096:], -sh, axis=-1)
    return segs
