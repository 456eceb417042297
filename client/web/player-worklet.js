/** Audio thread: the jitter buffer, at the session's rate, and from there to the context's rate. */

import { JitterBuffer } from "./jitter.js";
import { Resampler } from "./resample.js";

/** Samples that are fetched from the jitter buffer at a time, and that are reported together as heard. */
const FETCH = 32;
const REPORT = 320;

class Player extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate } }) {
    super();
    this.rate = rate;
    this.buffer = new JitterBuffer(rate);
    this.resampler = new Resampler(rate, sampleRate);
    this.ready = new Float32Array(0);
    this.heard = new Float32Array(REPORT);
    this.filled = 0;
    this.port.onmessage = ({ data }) => this.take(data);
  }

  take(message) {
    if (message.pcm) {
      this.buffer.push(Float32Array.from(message.pcm, (sample) => sample / 32768), message.at, currentTime);
    } else if (message.end) this.buffer.end();
    else this.buffer.reset();
  }

  process(_, [[output]]) {
    const parts = [this.ready];
    let have = this.ready.length;
    while (have < output.length) {
      const part = this.resampler.process(this.fetch(currentTime + have / sampleRate));
      parts.push(part);
      have += part.length;
    }
    const all = new Float32Array(have);
    parts.reduce((at, part) => (all.set(part, at), at + part.length), 0);
    output.set(all.subarray(0, output.length));
    this.ready = all.slice(output.length);
    return true;
  }

  fetch(now) {
    const { buffer } = this;
    const at = buffer.at;
    const playing = buffer.playing;
    const samples = buffer.pull(new Float32Array(FETCH), now);
    this.heard.set(samples, this.filled);
    this.filled += FETCH;
    if (this.filled === REPORT) {
      const heard = this.heard.slice();
      const lag = this.resampler.half / this.rate;
      this.port.postMessage({
        heard,
        // Where in the stream, and when on the context's clock, the last fetch begins; null while nothing is played.
        at: playing && buffer.dry === null ? at : null,
        time: now + lag,
        level: buffer.level / this.rate,
        wanted: buffer.lateness.length ? buffer.wanted : 0,
        playing: buffer.playing,
        underruns: buffer.underruns,
        concealed: buffer.concealed / this.rate,
        skipped: buffer.skipped / this.rate,
      }, [heard.buffer]);
      this.filled = 0;
    }
    return samples;
  }
}

registerProcessor("semanticodec-player", Player);
