/** The WebSocket of a session: opens it, watches it, and opens it again with exponential back-off and jitter. */

import { WireError } from "./msgpack.js";
import { SUBPROTOCOL } from "./protocol.js";

const FIRST_WAIT = 0.25;
const LONGEST_WAIT = 15;
/** A connection over which nothing came for so long is given up, in seconds. */
const SILENCE = 8;
const PING = 2;
/** Bytes that may wait in the socket; the rest stays in the session's bounded window. */
const BUFFERED = 1 << 15;
const BAD_MESSAGE = 4400;

const seconds = () => performance.now() / 1000;

export class Link extends EventTarget {
  /**
   * Fires `state` (detail `{state, wait, code, reason}`; state is "connecting", "open", "waiting" or "closed") and
   * `happened` (detail: an event of the session).
   */
  constructor(url, session) {
    super();
    this.home = this.url = url;
    this.session = session;
    this.attempts = 0;
    this.reconnects = -1;
    this.timers = {};
  }

  start() {
    this.timers.tick = setInterval(() => this.tick(), 250);
    this.online = () => this.state === "waiting" && this.connect();
    addEventListener("online", this.online);
    this.connect();
  }

  /** End the session as agreed. */
  stop() {
    // What was said before the bye is still coded, so it goes first.
    this.send();
    this.session.say({ type: "bye" });
    this.send();
    this.finish(1000, "");
  }

  /** Send what is due, as far as the socket takes it. */
  send() {
    const { socket, session } = this;
    if (socket?.readyState !== WebSocket.OPEN) return;
    for (let bytes; socket.bufferedAmount < BUFFERED && (bytes = session.pull(seconds())); ) socket.send(bytes);
  }

  connect() {
    clearTimeout(this.timers.retry);
    this.drop();
    this.change("connecting");
    const socket = new WebSocket(this.url, SUBPROTOCOL);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.heard = seconds();
    this.said = null;
    socket.onopen = () => socket.send(this.session.begin(seconds()));
    socket.onmessage = ({ data }) => this.receive(data);
    socket.onclose = ({ code, reason }) => this.broken(this.said?.code ?? code, this.said?.reason || reason);
  }

  receive(data) {
    this.heard = seconds();
    try {
      if (typeof data === "string") throw new WireError("a text message");
      for (const event of this.session.receive(new Uint8Array(data), this.heard)) this.happened(event);
    } catch (error) {
      if (!(error instanceof WireError)) throw error;
      this.broken(BAD_MESSAGE, error.message);
    }
    this.send();
  }

  happened(event) {
    if (event.type === "ready") {
      this.attempts = 0;
      this.reconnects++;
      this.change("open");
    }
    if (event.type === "bye" || event.type === "error") this.said = event;
    if (event.type === "tune") this.said = null;
    this.dispatchEvent(new CustomEvent("happened", { detail: event }));
  }

  broken(code, reason) {
    const { retry, url } = this.said ?? {};
    // A server that goes away may name another one; when that cannot be reached, it is home again.
    if (url) this.url = url;
    else if (!this.said && this.state !== "open") this.url = this.home;
    this.drop();
    const then = this.session.lost(code);
    if (then === "no") return this.finish(code, reason);
    const backoff = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.attempts++) * (0.5 + Math.random() / 2);
    const wait = retry == null ? backoff : retry / 1000;
    this.timers.retry = setTimeout(() => this.connect(), 1000 * wait);
    this.change("waiting", { wait, code, reason });
  }

  finish(code, reason) {
    clearInterval(this.timers.tick);
    clearTimeout(this.timers.retry);
    removeEventListener("online", this.online);
    this.drop();
    this.change("closed", { code, reason });
  }

  /** Let go of the socket at once, without waiting for a peer that may be gone. */
  drop() {
    const { socket } = this;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
    this.socket = null;
  }

  tick() {
    const now = seconds();
    if (!this.socket) return;
    if (now - this.heard > SILENCE) this.broken(1006, "nothing was heard");
    else if (this.state === "open" && now - (this.asked ?? 0) > PING) {
      this.asked = now;
      this.session.ping(now);
    }
    this.send();
  }

  change(state, detail = {}) {
    this.state = state;
    this.dispatchEvent(new CustomEvent("state", { detail: { state, ...detail } }));
  }
}
