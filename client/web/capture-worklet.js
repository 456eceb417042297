/** Audio thread: what the microphone or file brings, mono, as 16-bit chunks at the session's rate. */

import { Resampler } from "./resample.js";

class Capture extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate, chunk } }) {
    super();
    this.resampler = new Resampler(sampleRate, rate);
    this.lag = this.resampler.half / sampleRate;
    this.chunk = new Int16Array(chunk);
    this.filled = 0;
  }

  process([channels]) {
    if (!channels.length) return true;
    const mono = new Float32Array(channels[0].length);
    for (const channel of channels) for (let i = 0; i < mono.length; i++) mono[i] += channel[i] / channels.length;
    for (const sample of this.resampler.process(mono)) {
      this.chunk[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === this.chunk.length) {
        const pcm = this.chunk.slice();
        // When its last sample was heard, on the context's clock.
        const time = currentTime + mono.length / sampleRate - this.lag;
        this.port.postMessage({ pcm, time }, [pcm.buffer]);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("semanticodec-capture", Capture);
