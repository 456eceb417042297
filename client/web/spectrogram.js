/** A live mel spectrogram of samples at 16 kHz. */

import { COLUMNS_PER_SECOND, Strip, spectrumColours } from "./strips.js";

const RATE = 16000;
const HOP = RATE / COLUMNS_PER_SECOND;
const WINDOW = 512;
const SIZE = 1024;
export const BANDS = 112;
/** Decibels of full scale at the ends of the colours. */
const QUIET = -86;
const LOUD = -8;

const hann = Float32Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
const cosine = Float32Array.from({ length: SIZE / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / SIZE));
const sine = Float32Array.from({ length: SIZE / 2 }, (_, i) => Math.sin((2 * Math.PI * i) / SIZE));

const toMel = (hertz) => 2595 * Math.log10(1 + hertz / 700);
const fromMel = (mel) => 700 * (10 ** (mel / 2595) - 1);
/** Edges of the triangular bands, in bins of the transform. */
const edges = Float32Array.from({ length: BANDS + 2 }, (_, i) => {
  const [low, high] = [toMel(50), toMel(RATE / 2)];
  return (fromMel(low + ((high - low) * i) / (BANDS + 1)) * SIZE) / RATE;
});

/** Transform in place (radix 2). */
function fft(re, im) {
  for (let i = 1, j = 0; i < SIZE; i++) {
    let bit = SIZE >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let half = 1; half < SIZE; half *= 2) {
    const step = SIZE / 2 / half;
    for (let i = 0; i < SIZE; i += 2 * half) {
      for (let k = 0; k < half; k++) {
        const [a, b] = [i + k, i + k + half];
        const [c, s] = [cosine[k * step], -sine[k * step]];
        const x = re[b] * c - im[b] * s;
        const y = re[b] * s + im[b] * c;
        re[b] = re[a] - x;
        im[b] = im[a] - y;
        re[a] += x;
        im[a] += y;
      }
    }
  }
}

/** Return the level of each band of the last `WINDOW` samples, from 0 (quiet) to 255 (loud). */
export function bands(samples) {
  const re = new Float32Array(SIZE);
  const im = new Float32Array(SIZE);
  for (let i = 0; i < WINDOW; i++) re[i] = samples[i] * hann[i];
  fft(re, im);
  return Uint8Array.from({ length: BANDS }, (_, band) => {
    const [low, middle, high] = edges.subarray(band, band + 3);
    let power = 0;
    let weights = 0;
    for (let bin = Math.floor(low); bin <= Math.ceil(high); bin++) {
      const weight = Math.max(0.05, Math.min((bin - low) / (middle - low), (high - bin) / (high - middle)));
      power += weight * (re[bin] ** 2 + im[bin] ** 2);
      weights += weight;
    }
    const decibels = 10 * Math.log10(power / weights / (WINDOW / 4) ** 2 + 1e-12);
    return Math.max(0, Math.min(255, Math.round((255 * (decibels - QUIET)) / (LOUD - QUIET))));
  });
}

export class Spectrogram {
  constructor(canvas) {
    this.strip = new Strip(canvas, BANDS, true);
    this.clear();
  }

  clear() {
    this.samples = new Float32Array(WINDOW);
    this.fresh = 0;
    this.column = 0;
    this.strip.clear();
  }

  theme(dark) {
    this.strip.colours = spectrumColours(dark);
  }

  /** Take samples in [-1, 1], the last of which is at `time` (s). */
  push(samples, time) {
    let done = 0;
    while (done < samples.length) {
      const count = Math.min(HOP - this.fresh, samples.length - done);
      this.samples.copyWithin(0, count);
      this.samples.set(samples.subarray(done, done + count), WINDOW - count);
      done += count;
      this.fresh += count;
      if (this.fresh === HOP) {
        this.fresh = 0;
        this.place(time - (samples.length - done) / RATE);
      }
    }
  }

  /** Put a column where its time says; times jitter by less than two columns, columns do not. */
  place(time) {
    const column = Math.floor(time * COLUMNS_PER_SECOND);
    this.column = Math.abs(column - this.column - 1) <= 3 ? this.column + 1 : column;
    this.strip.put(this.column, bands(this.samples));
  }

  draw(now, seconds) {
    this.strip.draw(now, seconds);
  }
}
