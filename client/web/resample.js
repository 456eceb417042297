/** Change the sampling rate of a stream: windowed sinc, one table row per phase, no shift in time. */

const ZEROS = 16;
const ROLLOFF = 0.92;
const BETA = 8;

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

/** The modified Bessel function of order 0, for Kaiser's window. */
function bessel(x) {
  let sum = 1;
  for (let k = 1, term = 1; k < 40; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}

export class Resampler {
  /** @param {number} from samples per second @param {number} to samples per second, both integers */
  constructor(from, to) {
    const common = gcd(from, to);
    this.up = to / common;
    this.down = from / common;
    const cutoff = ROLLOFF * Math.min(1, to / from);
    /** Input samples that are needed on either side of an output sample. */
    this.half = Math.ceil(ZEROS / cutoff);
    this.taps = 2 * this.half;
    this.table = Array.from({ length: this.up }, (_, phase) =>
      Float32Array.from({ length: this.taps }, (_, tap) => {
        const x = tap - this.half + 1 - phase / this.up;
        const edge = x / this.half;
        if (Math.abs(edge) >= 1) return 0;
        const sinc = x === 0 ? 1 : Math.sin(Math.PI * cutoff * x) / (Math.PI * cutoff * x);
        return (cutoff * sinc * bessel(BETA * Math.sqrt(1 - edge * edge))) / bessel(BETA);
      }));
    this.buffer = new Float32Array(this.half - 1);
    this.phase = 0;
  }

  /** Take any number of samples, return those that are ready: output k is at the time of input k x from / to. */
  process(input) {
    const data = new Float32Array(this.buffer.length + input.length);
    data.set(this.buffer);
    data.set(input, this.buffer.length);
    const out = [];
    let at = 0;
    while (at + this.taps <= data.length) {
      const row = this.table[this.phase];
      let sum = 0;
      for (let tap = 0; tap < this.taps; tap++) sum += row[tap] * data[at + tap];
      out.push(sum);
      this.phase += this.down;
      at += Math.floor(this.phase / this.up);
      this.phase %= this.up;
    }
    this.buffer = data.slice(at);
    return Float32Array.from(out);
  }
}
