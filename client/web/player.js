/** What is heard: chunks of a session into the jitter buffer of the audio thread, and its reports back. */

export class Player {
  /** @param {(report: object) => void} onreport some 50 times per second, see player-worklet.js */
  constructor(context, rate, onreport) {
    this.context = context;
    this.node = new AudioWorkletNode(context, "semanticodec-player", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { rate },
    });
    this.gain = new GainNode(context);
    this.node.connect(this.gain).connect(context.destination);
    this.node.port.onmessage = ({ data }) => onreport(data);
  }

  set volume(value) {
    this.gain.gain.setTargetAtTime(value, this.context.currentTime, 0.02);
  }

  /** Play samples (`Uint8Array` of 16-bit little-endian ones) that begin at number `at` of the stream. */
  push(data, at) {
    const pcm = new Int16Array(data.slice().buffer);
    this.node.port.postMessage({ pcm, at }, [pcm.buffer]);
  }

  end() {
    this.node.port.postMessage({ end: true });
  }

  reset() {
    this.node.port.postMessage({ reset: true });
  }

  stop() {
    this.node.port.onmessage = null;
    this.node.disconnect();
    this.gain.disconnect();
  }
}
