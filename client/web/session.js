/**
 * The page's half of a session, without a socket or a clock: bytes in, events and bytes out; time is seconds, passed in.
 *
 * A session outlives its connections.  On each new one {@link Session#begin} says hello or, if there was one before,
 * asks to go on where it broke; what was sent and not acknowledged is kept, within a window, to be sent again.
 */

import { WireError } from "./msgpack.js";
import { CODES_RATE, CodesMeter, Geometry, Meter, decode, encode, frameBytes } from "./protocol.js";

const MAX_GAP = 65536;
/** The table of PROTOCOL.md: what to do after a close code; a connection that merely broke is resumed. */
const THEN = {
  no: [1000, 4002, 4401, 4403, 4405, 4406, 4411, 4413, 4415, 4430],
  later: [4404, 4408, 4409, 4429, 4503],
};
const UNKNOWN_SESSION = 4404;

/** Number units, keep them until they are acknowledged, and say which are gone. */
class Outgoing {
  constructor(window) {
    this.window = window;
    this.units = [];
    this.next = this.cursor = this.limit = this.lost = 0;
    this.markers = [];
    this.markersSent = this.markerId = 0;
    this.reason = "overload";
  }

  /** The first unit that is still here. */
  get base() {
    return this.next - this.units.length;
  }

  push(unit) {
    this.units.push({ ...unit, seq: this.next++ });
    // A live client that may not send keeps the newest.
    if (this.units.length > this.window) this.units.shift();
  }

  mark(at) {
    this.markers.push({ type: "marker", id: ++this.markerId, seq: this.next, flush: true, at, kind: "audio" });
  }

  pull() {
    if (this.markers[this.markersSent]?.seq <= this.cursor) return this.markers[this.markersSent++];
    if (this.cursor < this.base) {
      const first = this.cursor;
      this.cursor = this.base;
      this.lost += this.cursor - first;
      return { type: "missing", first, stop: this.cursor, reason: this.reason, kind: "audio", total: this.lost };
    }
    this.reason = "overload";
    if (this.cursor >= Math.min(this.next, this.limit)) return null;
    return this.units[this.cursor++ - this.base];
  }

  ack({ next, limit, marker }) {
    if (next > this.cursor) throw new WireError(`unit ${next - 1} is acknowledged and was not sent`);
    this.units.splice(0, Math.max(0, next - this.base));
    while (this.markersSent && this.markers[0].id <= marker) {
      this.markers.shift();
      this.markersSent--;
    }
    this.limit = Math.max(this.limit, limit ?? 0);
  }

  /** Send again from `next` on. */
  rewind({ next, limit }) {
    this.ack({ next, limit, marker: 0 });
    this.cursor = next;
    this.markersSent = 0;
    this.reason = "window";
  }
}

/** Take each unit once, and tell which are gone. */
class Incoming {
  constructor(kind, next) {
    this.kind = kind;
    this.next = next;
    this.received = this.repeated = this.lost = this.recovered = this.fresh = this.marker = 0;
  }

  /** Return the first unit that is new in a message of `count` units; what is missing before it counts as lost. */
  take(seq, count) {
    this.skip(seq);
    const first = Math.max(seq, this.next);
    const fresh = Math.max(0, seq + count - first);
    this.next = first + fresh;
    this.received += fresh;
    this.repeated += count - fresh;
    this.fresh += fresh;
    return first;
  }

  /** Count the units up to `seq` as lost, and return how many they are. */
  skip(seq) {
    const gone = Math.max(0, seq - this.next);
    if (gone > MAX_GAP) throw new WireError(`unit ${seq} of ${this.kind} comes after unit ${this.next - 1}`);
    this.next += gone;
    this.lost += gone;
    this.fresh += gone;
    return gone;
  }
}

export class Session {
  /**
   * @param {object} hello the fields of hello; it is said again when the server does not know the session any more.
   */
  constructor(hello) {
    this.hello = { type: "hello", ...hello };
    this.ready = null;
    this.open = false;
    this.sent = new Meter();
    this.received = new Meter();
    this.codesMeter = new CodesMeter();
    this.rtt = null;
    /** What the person chose: said again after every new beginning, as tune asks. */
    this.wishes = {};
    this.forget();
  }

  /** Drop what belongs to the server's session, so that the next connection begins a new one. */
  forget() {
    this.ready = null;
    this.position = 0;
    this.out = new Outgoing(256);
    this.incoming = {};
    this.outbox = [];
    this.unanswered = null;
  }

  /** Return the first message on a new connection. */
  begin(now) {
    this.open = false;
    this.outbox = [];
    if (this.ready === null) return this.wrap(this.hello, now);
    const next = (kind) => this.incoming[kind]?.next ?? 0;
    const { session } = this.ready;
    const resume = { type: "resume", session, codes_next: next("codes"), audio_next: next("audio") };
    return this.wrap({ ...resume, token: this.hello.token, first: this.out.base }, now);
  }

  /** Queue a chunk of samples (`Int16Array`); return its position, or null before the session has begun. */
  push(pcm) {
    if (this.ready === null) return null;
    const at = this.position;
    this.position += pcm.length;
    this.out.push({ type: "audio", at, data: new Uint8Array(pcm.buffer, pcm.byteOffset, pcm.byteLength) });
    return at;
  }

  /** Ask that everything that was pushed is coded without waiting for a whole block. */
  flush() {
    if (this.ready !== null) this.out.mark(this.position);
  }

  /** Choose a rate (if this session sends audio) or a number of blocks per message (if it receives codes). */
  tune(wishes) {
    const { send, receive = [] } = this.hello;
    for (const [name, allowed] of [["rate", send === "audio"], ["bundle", receive.includes("codes")]]) {
      if (allowed && wishes[name] != null) this.wishes[name] = wishes[name];
    }
    if (this.open && Object.keys(this.wishes).length) this.outbox.push({ type: "tune", ...this.wishes });
  }

  /** Say a message of no stream: bye, stats. */
  say(message) {
    if (this.open) this.outbox.push(message);
  }

  ping(now) {
    this.unanswered ??= now;
    this.say({ type: "ping", nonce: Math.round(now * 1000) });
  }

  /** Return the bytes of the next message to be sent, or null. */
  pull(now) {
    if (!this.open) return null;
    const message = this.outbox.shift() ?? this.out.pull();
    return message ? this.wrap(message, now) : null;
  }

  wrap(message, now) {
    const bytes = encode(message);
    this.sent.add(frameBytes(bytes.length, true), now);
    return bytes;
  }

  /**
   * Take the bytes of a message; return what has happened, as messages and as parts of them: `ready` (with `fresh`),
   * `audio`, `codes` (one per block), `lost`, `marker`, `room`, `stats`, `tune`, `error`, `bye`.
   */
  receive(bytes, now) {
    const size = frameBytes(bytes.length, false);
    this.received.add(size, now);
    const message = decode(bytes);
    if (message === null) return [];
    const handler = this[`on_${message.type}`];
    if (handler) return handler.call(this, message, now, size);
    if (!this.open && ["audio", "codes", "ack", "marker", "missing"].includes(message.type)) {
      throw new WireError(`${message.type} before ready`);
    }
    return this.inStream(message, size);
  }

  on_ready(ready) {
    const fresh = this.ready === null;
    if (ready.resumed === fresh) throw new WireError("ready does not answer what was asked");
    this.ready = ready;
    this.open = true;
    this.geometry = new Geometry(ready);
    if (!ready.rates.includes(this.wishes.rate)) delete this.wishes.rate;
    this.every = Math.max(1, ready.window >> 2);
    this.out.window = ready.window;
    if (fresh) {
      for (const kind of this.hello.receive ?? []) this.incoming[kind] = new Incoming(kind, ready[`${kind}_next`]);
    }
    this.out.rewind(ready);
    this.tune({});
    return [{ ...ready, fresh }];
  }

  on_ping({ nonce }) {
    this.outbox.push({ type: "pong", nonce });
    return [];
  }

  on_pong(_, now) {
    if (this.unanswered !== null) this.rtt = now - this.unanswered;
    this.unanswered = null;
    return [];
  }

  on_ack(message) {
    this.out.ack(message);
    return [];
  }

  inStream(message, size) {
    const stream = this.incoming[message.type in this.incoming ? message.type : message.kind];
    if (["audio", "codes", "marker", "missing"].includes(message.type) && stream === undefined) {
      throw new WireError(`${message.type} of a stream that was not asked for`);
    }
    let events = [message];
    if (message.type === "audio") events = this.audio(stream, message);
    else if (message.type === "codes") events = this.codes(stream, message, size);
    else if (message.type === "missing") events = losses(message.kind, stream.skip(message.stop), message.reason);
    else if (message.type === "marker") events = this.marker(stream, message);
    if (stream && stream.fresh >= this.every) this.acknowledge(stream);
    return events;
  }

  audio(stream, message) {
    const gone = Math.max(0, message.seq - stream.next);
    const news = stream.take(message.seq, 1) < stream.next;
    return [...losses("audio", gone, "source"), ...(news ? [message] : [])];
  }

  codes(stream, message, size) {
    const rate = message.rate ?? this.ready.rate;
    const { block } = this.geometry;
    const at = message.at ?? message.seq * block;
    const blocks = this.geometry.unpack(message.data, rate);
    this.codesMeter.add(message.data.length, size, (blocks.length * block) / CODES_RATE);
    const copies = message.copy_rate ? this.geometry.unpack(message.copies, message.copy_rate) : [];
    const before = stream.next;
    const first = stream.take(message.seq, blocks.length);
    const events = [];
    const covered = Math.max(before, message.seq - copies.length);
    for (let seq = covered; seq < message.seq; seq++) {
      const place = at - (message.seq - seq) * block;
      events.push({ type: "codes", seq, at: place, ...copies[copies.length - (message.seq - seq)] });
    }
    stream.lost -= events.length;
    stream.recovered += events.length;
    for (let seq = first; seq < message.seq + blocks.length; seq++) {
      const i = seq - message.seq;
      events.push({ type: "codes", seq, at: at + i * block, ...blocks[i] });
    }
    return [...losses("codes", Math.max(0, covered - before), "source"), ...events];
  }

  marker(stream, message) {
    const gone = losses(stream.kind, stream.skip(message.seq), "source");
    if (message.id <= stream.marker) return gone;
    stream.marker = message.id;
    this.acknowledge(stream);
    return [...gone, message];
  }

  acknowledge(stream) {
    stream.fresh = 0;
    this.outbox.push({ type: "ack", next: stream.next, kind: stream.kind, marker: stream.marker });
  }

  /** Units that never came, those that copies brought, and those that could not be sent. */
  get losses() {
    const streams = Object.values(this.incoming);
    const sum = (name) => streams.reduce((total, stream) => total + stream[name], 0);
    return { lost: sum("lost"), recovered: sum("recovered"), unsent: this.out.lost };
  }

  /** Note that the connection is gone, and with which close code; return what to do: "resume", "later" or "no". */
  lost(code) {
    this.open = false;
    this.unanswered = null;
    if (code === UNKNOWN_SESSION) this.forget();
    if (THEN.no.includes(code)) return "no";
    return THEN.later.includes(code) || this.ready === null ? "later" : "resume";
  }
}

function losses(kind, count, reason) {
  return count > 0 ? [{ type: "lost", kind, count, reason }] : [];
}
