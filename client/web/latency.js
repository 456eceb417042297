/**
 * From mouth to ear, in parts.  Positions of samples are the same on the way out and back, so each sample that is heard
 * tells when it was spoken, sent, coded and received.  All times are seconds on the audio context's clock.
 */

const KEPT = 1500;
const REMEMBERED = 3000;
export const PARTS = ["capture", "encode", "network", "decode", "playout"];

/** Intervals of positions with something to tell about each. */
class Trail {
  constructor() {
    this.entries = [];
  }

  add(begin, end, what) {
    this.entries.push({ begin, end, ...what });
    if (this.entries.length > KEPT) this.entries.shift();
  }

  find(position) {
    for (let i = this.entries.length - 1; i >= 0; i--) {
      const entry = this.entries[i];
      if (entry.begin <= position && position < entry.end) return entry;
    }
    return null;
  }
}

export class Latency {
  /** @param {number} rate samples per second that positions count */
  constructor(rate) {
    this.rate = rate;
    this.clear();
  }

  /** Forget where samples are: a new session counts from 0. */
  clear() {
    this.spoken = new Trail();
    this.coded = new Trail();
    this.received = new Trail();
    this.samples = [];
  }

  /** Note that samples whose last was spoken at `spoken` were handed to the socket at `sent`. */
  sent(at, count, spoken, sent) {
    this.spoken.add(at, at + count, { spoken, sent });
  }

  codes(at, count, now) {
    this.coded.add(at, at + count, { now });
  }

  audio(at, count, now) {
    this.received.add(at, at + count, { now });
  }

  /** Note that position `at` is heard at `time`; `rtt` is the last round trip, `devices` what the sound card adds. */
  heard(at, time, rtt, devices) {
    const chunk = this.spoken.find(at);
    const arrival = this.received.find(at);
    if (chunk === null || arrival === null) return;
    const spoken = chunk.spoken - (chunk.end - at) / this.rate;
    const back = arrival.now - chunk.sent;
    const network = Math.min(rtt ?? 0, back);
    // Codes that come after their sound (in bundles) do not tell when they were made.
    const coded = Math.min(this.coded.find(at)?.now ?? arrival.now, arrival.now);
    const decode = Math.min(arrival.now - coded, back - network);
    this.samples.push({
      capture: chunk.sent - spoken,
      encode: back - network - decode,
      network,
      decode,
      playout: time + devices - arrival.now,
      total: time + devices - spoken,
    });
    if (this.samples.length > REMEMBERED) this.samples.shift();
  }

  /** Mean of each part over the last seconds, and the total's median and 95th percentile over all that is remembered. */
  get summary() {
    if (!this.samples.length) return null;
    const recent = this.samples.slice(-100);
    const mean = (part) => recent.reduce((sum, sample) => sum + sample[part], 0) / recent.length;
    const totals = this.samples.map(({ total }) => total).sort((a, b) => a - b);
    const quantile = (q) => totals[Math.min(totals.length - 1, Math.floor(q * totals.length))];
    return { parts: PARTS.map((part) => ({ part, value: mean(part) })), p50: quantile(0.5), p95: quantile(0.95) };
  }
}
