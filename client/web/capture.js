/** Where sound comes from: the microphone or a file, through an AudioWorklet. */

/** Samples per chunk at 16 kHz: 20 ms, a whole number of which make a block. */
export const CHUNK = 320;

export class MicrophoneError extends Error {
  name = "MicrophoneError";
}

/** Say why the browser gives no microphone, and what to do. */
function refusal(error) {
  if (!globalThis.isSecureContext || !navigator.mediaDevices?.getUserMedia) {
    return "Browsers give the microphone only to pages over HTTPS or on localhost. Open this page that way, or choose a file.";
  }
  const known = {
    NotAllowedError: "The browser refused the microphone. Allow it in the address bar or the site’s settings (the page "
      + "must come over HTTPS or from localhost), then start again — or choose a file.",
    NotFoundError: "No microphone was found. Plug one in, then start again — or choose a file.",
    NotReadableError: "The microphone is in use by something else. Close that, then start again — or choose a file.",
  };
  return known[error?.name] ?? `The microphone cannot be used (${error?.message ?? "unknown reason"}). Choose a file.`;
}

/**
 * Ask for the microphone.
 *
 * @param {boolean} headphones nothing leaks back into it: the sound may stay as it is.
 */
export async function openMicrophone(headphones) {
  try {
    const audio = { echoCancellation: !headphones, noiseSuppression: false, autoGainControl: false, channelCount: 1 };
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    throw new MicrophoneError(refusal(error));
  }
}

export class Capture {
  /** @param {(pcm: Int16Array, time: number) => void} onchunk `time` is the end of the chunk on the context's clock */
  constructor(context, rate, onchunk) {
    this.context = context;
    this.node = new AudioWorkletNode(context, "semanticodec-capture", {
      numberOfOutputs: 0,
      processorOptions: { rate, chunk: CHUNK },
    });
    this.node.port.onmessage = ({ data }) => onchunk(data.pcm, data.time);
  }

  fromStream(stream, onend) {
    this.stream = stream;
    this.source = new MediaStreamAudioSourceNode(this.context, { mediaStream: stream });
    stream.getAudioTracks()[0].onended = onend;
    this.source.connect(this.node);
  }

  fromBuffer(buffer, onend) {
    this.source = new AudioBufferSourceNode(this.context, { buffer });
    this.source.onended = onend;
    this.source.connect(this.node);
    this.source.start();
  }

  stop() {
    this.source?.disconnect();
    if (this.source instanceof AudioBufferSourceNode) {
      this.source.onended = null;
      this.source.stop();
    }
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.node.port.onmessage = null;
  }
}
