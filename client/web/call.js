/** One stretch of talking or listening: sound in, a session with the server, sound out, and what was measured. */

import { Capture } from "./capture.js";
import { Latency } from "./latency.js";
import { Link } from "./link.js";
import { Player } from "./player.js";
import { Session } from "./session.js";

/** Samples per second of the session: what the codec hears. */
export const RATE = 16000;
const FEATURES = ["room", "stats"];
/** How long a file's last block may take to come back, in seconds. */
const LAST_BLOCK = 5;
const REPORT_EVERY = 5000;

/** What each mode says in hello; a speaker has a second session that shows what listeners get. */
const HELLOS = {
  loop: { role: "transcode", send: "audio", receive: ["audio", "codes"] },
  speak: { role: "publish", send: "audio" },
  listen: { role: "subscribe", receive: ["audio", "codes"] },
  monitor: { role: "subscribe", receive: ["codes"] },
};

export class Call extends EventTarget {
  /**
   * Fires `state` (as {@link Link}), `room` (detail: a room message), `ready`, and `ended` once it is over.
   *
   * @param {AudioContext} context with both worklets loaded
   * @param {{input, output, codes}} views pictures to feed
   * @param {{mode, room, token, url, wishes, volume}} options
   */
  constructor(context, views, options) {
    super();
    Object.assign(this, { context, views, options });
    this.latency = new Latency(RATE);
    this.report = null;
    this.inputDelay = 0;
    const room = options.mode === "loop" ? null : options.room;
    const hello = { sample_rate: RATE, token: options.token || null, features: FEATURES, room };
    this.session = new Session({ ...hello, ...HELLOS[options.mode] });
    this.session.tune(options.wishes);
    this.link = new Link(options.url, this.session);
    this.listen(this.link);
    if (options.mode === "speak") {
      this.monitor = new Link(options.url, new Session({ ...hello, ...HELLOS.monitor }));
      this.monitor.session.tune(options.wishes);
      this.monitor.addEventListener("happened", ({ detail }) => detail.type !== "room" && this.happened(detail));
    }
  }

  listen(link) {
    link.addEventListener("happened", ({ detail }) => this.happened(detail));
    link.addEventListener("state", ({ detail }) => {
      this.tell("state", detail);
      if (detail.state === "closed") this.stop();
    });
  }

  tell(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }

  /** Begin. @param {{stream?: MediaStream, buffer?: AudioBuffer}} source none to listen */
  start({ stream, buffer }) {
    if (stream || buffer) {
      this.capture = new Capture(this.context, RATE, (pcm, time) => this.captured(pcm, time));
      if (stream) this.capture.fromStream(stream, () => this.stop());
    }
    this.inputDelay = stream?.getAudioTracks()[0].getSettings().latency ?? 0;
    if (this.options.mode !== "speak") {
      this.player = new Player(this.context, RATE, (report) => this.played(report));
      this.player.volume = this.options.volume;
    }
    this.buffer = buffer;
    this.reporter = setInterval(() => this.tellServer(), REPORT_EVERY);
    this.link.start();
    this.monitor?.start();
  }

  tune(wishes) {
    for (const link of [this.link, this.monitor]) {
      link?.session.tune(wishes);
      link?.send();
    }
  }

  set volume(value) {
    if (this.player) this.player.volume = value;
  }

  captured(pcm, time) {
    this.views.input.push(Float32Array.from(pcm, (sample) => sample / 32768), time);
    const at = this.session.push(pcm);
    if (at === null) return;
    this.link.send();
    this.latency.sent(at, pcm.length, time - this.inputDelay, this.context.currentTime);
  }

  happened(event) {
    const now = this.context.currentTime;
    if (event.type === "ready") this.began(event);
    else if (event.type === "audio") {
      this.latency.audio(event.at, event.data.length / 2, now);
      this.player.push(event.data, event.at);
    } else if (event.type === "codes") {
      this.latency.codes(event.at, this.codesSession.geometry.block, now);
      // Nobody hears them here: they are shown when they come.
      if (!this.player) this.views.codes.heard(event.at, now, 1);
      this.views.codes.push(event);
    } else if (event.type === "marker" && event.kind === "audio") {
      this.player?.end();
      this.finishing = true;
    } else if (event.type === "room") {
      if (!event.live) this.player?.end();
      this.tell("room", event);
    } else if (event.type === "bye" || event.type === "error") this.tell("said", event);
  }

  began(ready) {
    if (ready.fresh) {
      this.player?.reset();
      this.latency.clear();
      this.views.codes.resize(ready.code_bits);
      // A file begins when the server listens, so that its first words are not lost.
      if (this.buffer) this.capture.fromBuffer(this.buffer, () => this.finish());
      this.buffer = null;
    }
    this.tell("ready", ready);
  }

  played(report) {
    this.report = report;
    this.views.output.push(report.heard, report.time);
    if (report.at !== null) {
      const devices = this.context.baseLatency + (this.context.outputLatency || 0);
      this.latency.heard(report.at, report.time, this.session.rtt, devices);
      this.views.codes.heard(report.at, report.time, 0.03);
    }
    if (this.finishing && !report.playing) this.stop();
  }

  /** Code what is left, play what comes back, and stop. */
  finish() {
    this.session.flush();
    this.link.send();
    this.last = setTimeout(() => this.stop(), 1000 * (this.player ? LAST_BLOCK : 1));
  }

  tellServer() {
    const { session } = this;
    const now = performance.now() / 1000;
    const whole = (value) => Math.max(0, Math.round(value ?? 0));
    session.say({
      type: "stats",
      gross_sent: whole(session.sent.rate(now)),
      gross_received: whole(session.received.rate(now)),
      lost: session.losses.lost,
      delay: whole(1000 * (this.latency.summary?.p50 ?? 0)),
      underruns: this.report?.underruns ?? 0,
    });
    this.link.send();
  }

  /** The session that receives codes. */
  get codesSession() {
    return (this.monitor ?? this.link).session;
  }

  stop() {
    if (this.stopped) return;
    this.stopped = true;
    clearInterval(this.reporter);
    clearTimeout(this.last);
    this.capture?.stop();
    this.player?.stop();
    if (this.options.mode === "speak") this.session.flush();
    if (this.link.state !== "closed") this.link.stop();
    if (this.monitor && this.monitor.state !== "closed") this.monitor.stop();
    this.tell("ended");
  }
}
