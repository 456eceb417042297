/**
 * The adaptive jitter buffer: chunks come in bursts, samples leave evenly.
 *
 * How late a chunk comes is its arrival less its position in time; the buffer holds back as much as the latest of the
 * last seconds needs, and a margin.  It approaches that by leaving out or repeating single periods of the wave, which
 * are hardly heard; when nothing is left it goes on with the last period and fades away.  No clock: times are seconds
 * on the audio context's clock, passed in.
 */

const MEMORY = 10;
/** In the beginning half of what has passed is remembered, at least so much: what starts is late once. */
const FIRST_MEMORY = 1.5;
/** Lateness beyond the least of the last seconds that counts as an outage, not to be waited for again. */
const OUTAGE = 0.6;
/** What an outage held up comes in a burst, with gaps no longer than this. */
const BURST = 0.1;
/** After so much lateness it is no outage but the way things are. */
const LONGEST_OUTAGE = 2;
const MARGIN = 0.03;
const FIRST_MARGIN = 0.06;
/** What may be held back too much or too little without doing anything about it. */
const SLACK = 0.02;
/** Beyond this the buffer jumps to where it should be. */
const JUMP = 0.4;
const STEP_EVERY = 0.12;
const FADE = 0.008;
const FADE_AWAY = 0.09;
const EDGE = 0.004;
const PERIOD = [0.0025, 0.0125];

export class JitterBuffer {
  /** @param {number} rate samples per second @param {number} capacity samples, a power of two; the oldest go */
  constructor(rate, capacity = 1 << 19) {
    this.rate = rate;
    this.ring = new Float32Array(capacity);
    this.mask = capacity - 1;
    this.underruns = 0;
    this.concealed = 0;
    this.skipped = 0;
    this.reset();
  }

  /** Forget all sound and timing, not the counts. */
  reset() {
    this.written = this.read = 0;
    this.pieces = [];
    this.lateness = [];
    this.playing = this.ended = false;
    this.dry = null;
    this.fade = null;
    this.stepped = 0;
    this.outage = null;
    this.begun = null;
  }

  /** Take a chunk whose first sample is number `at` of the stream, at time `now`. */
  push(samples, at, now) {
    const expected = this.pieces.length ? this.written + this.pieces.at(-1).shift : null;
    if (at !== expected) {
      this.pieces.push({ begin: this.written, shift: at - this.written });
      if (expected !== null) this.join(samples);
    }
    for (let i = 0; i < samples.length; i++) this.ring[(this.written + i) & this.mask] = samples[i];
    this.written += samples.length;
    const room = this.mask + 1 - this.rate;
    if (this.level > room) this.jump(this.level - room);
    this.observe(now - at / this.rate, now);
    this.ended = false;
  }

  /** Remember how late a chunk came, unless an outage is to blame. */
  observe(late, now) {
    const held = this.outage !== null && now - this.outage.last < BURST;
    if (late > this.least + OUTAGE || held) {
      this.outage = { first: this.outage?.first ?? now, last: now };
      if (now - this.outage.first < LONGEST_OUTAGE) return;
      this.lateness = [];
    }
    this.outage = null;
    this.lateness.push({ now, late });
    this.begun ??= now;
    const memory = Math.min(MEMORY, Math.max(FIRST_MEMORY, (now - this.begun) / 2));
    while (this.lateness[0].now < now - memory) this.lateness.shift();
  }

  /** Nothing more will come for now: running dry is no fault. */
  end() {
    this.ended = true;
  }

  /** Samples that wait. */
  get level() {
    return this.written - this.read;
  }

  /** Number of the next sample of the stream that will be heard. */
  get at() {
    while (this.pieces.length > 1 && this.pieces[1].begin <= this.read) this.pieces.shift();
    return this.read + (this.pieces[0]?.shift ?? 0);
  }

  /** Seconds between a sample's position and its playing that the observed arrivals ask for. */
  get wanted() {
    const most = this.lateness.reduce((most, { late }) => Math.max(most, late), -Infinity);
    return most + (this.playing ? MARGIN : FIRST_MARGIN);
  }

  get least() {
    return this.lateness.reduce((least, { late }) => Math.min(least, late), Infinity);
  }

  /** Fill `out` with what is to be heard from `now` on. */
  pull(out, now) {
    if (!this.playing && this.level > 0 && (this.ended || now >= this.at / this.rate + this.wanted)) {
      this.playing = true;
    }
    if (!this.playing) return out.fill(0);
    if (this.dry === null) this.adjust(now);
    for (let i = 0; i < out.length; i++) out[i] = this.next();
    return out;
  }

  adjust(now) {
    const excess = now - this.at / this.rate - this.wanted;
    if (excess > JUMP) this.jump(Math.min(Math.round(excess * this.rate), this.level - this.samples(2 * PERIOD[1])));
    else if (Math.abs(excess) > SLACK && now - this.stepped > STEP_EVERY && this.level > this.samples(3 * PERIOD[1])) {
      this.stepped = now;
      this.splice(Math.sign(excess));
    }
  }

  samples(seconds) {
    return Math.round(seconds * this.rate);
  }

  next() {
    if (this.dry !== null || this.level <= 0) return this.nextDry();
    let sample = this.ring[this.read++ & this.mask];
    if (this.fade !== null) {
      const { from, length } = this.fade;
      const weight = this.fade.done / length;
      sample = sample * weight + this.ring[(from + this.fade.done++) & this.mask] * (1 - weight);
      if (this.fade.done === length) this.fade = null;
    }
    return sample;
  }

  /** Go on without data: the last period again and again, fading; fade over to data when there are some. */
  nextDry() {
    if (this.dry === null) {
      if (!this.ended) this.underruns++;
      this.fade = null;
      this.dry = { period: this.period(this.read - this.samples(2 * PERIOD[1])), done: 0, back: 0, from: this.read };
    }
    const { dry } = this;
    const gain = Math.max(0, 1 - dry.done / this.samples(FADE_AWAY));
    const replay = this.ring[(dry.from - dry.period + (dry.done % dry.period)) & this.mask] * gain;
    dry.done++;
    if (this.level <= 0) {
      if (!this.ended) this.concealed++;
      if (gain === 0 && this.ended) {
        this.playing = false;
        this.dry = null;
      }
      return replay;
    }
    const weight = ++dry.back / this.samples(FADE);
    const sample = this.ring[this.read++ & this.mask] * weight + replay * (1 - weight);
    if (weight >= 1) this.dry = null;
    return sample;
  }

  /** Find the lag at which the wave at `begin` looks most like itself. */
  period(begin) {
    const [low, high] = PERIOD.map((seconds) => this.samples(seconds));
    const length = high;
    let best = low;
    let likeness = -Infinity;
    for (let lag = low; lag <= high; lag++) {
      let cross = 0;
      let power = 1e-6;
      for (let i = 0; i < length; i += 2) {
        const later = this.ring[(begin + lag + i) & this.mask];
        cross += this.ring[(begin + i) & this.mask] * later;
        power += later * later;
      }
      const score = cross / Math.sqrt(power);
      if (score > likeness) [best, likeness] = [lag, score];
    }
    return best;
  }

  /** Leave out (1) or repeat (-1) one period of what comes next. */
  splice(direction) {
    if (direction > 0) {
      const lag = this.period(this.read);
      this.crossfade(lag);
      this.skipped += lag;
    } else {
      this.crossfade(-this.period(this.read - this.samples(2 * PERIOD[1])));
    }
  }

  jump(count) {
    if (count <= 0) return;
    this.crossfade(count);
    this.skipped += count;
  }

  crossfade(distance) {
    this.fade = { from: this.read, done: 0, length: this.samples(FADE) };
    this.read += distance;
  }

  /** Soften the seam between what was written last and samples that do not belong to it. */
  join(samples) {
    const length = Math.min(this.samples(EDGE), samples.length);
    for (let i = 0; i < length; i++) samples[i] *= i / length;
    for (let i = 0; i < Math.min(length, this.level); i++) this.ring[(this.written - 1 - i) & this.mask] *= i / length;
  }
}
