/**
 * The messages of `semanticodec.v1` (server/PROTOCOL.md), packed codes, and what they cost at the socket.
 *
 * A message is a plain object: `type` is its name, the other fields are those of PROTOCOL.md; a field that is absent
 * and has no default is null.
 */

import { WireError, decode as unpackMap, encode as packMap } from "./msgpack.js";

export const SUBPROTOCOL = "semanticodec.v1";
/** Samples per second that positions of codes count. */
export const CODES_RATE = 16000;
const MAX_SEQ = 2 ** 48 - 1;
const MAX_MS = 86400000;
const MAX_COPIES = 8;
const MAX_BUNDLE = 32;

const integer = (low, high) => (value) => Number.isSafeInteger(value) && value >= low && value <= high;
const flag = (value) => typeof value === "boolean";
const octets = (low, high) => (value) => value instanceof Uint8Array && value.length >= low && value.length <= high;
const choice = (...words) => (value) => words.includes(value);
const text = (size, pattern = /^[^\u0000-\u001f\u007f]*$/u) => (value) =>
  typeof value === "string" && pattern.test(value) && new TextEncoder().encode(value).length <= size;
const many = (check, low, high, distinct = true) => (value) =>
  Array.isArray(value) && value.length >= low && value.length <= high && value.every(check)
  && !(distinct && new Set(value).size < value.length);

const seq = integer(0, MAX_SEQ);
const count = integer(0, 2 ** 48);
const rate = integer(1, 10000);
const ms = integer(0, MAX_MS);
const bps = integer(0, 2 ** 32);
const kind = choice("codes", "audio");
const reason = text(256);
const code = integer(1000, 4999);
const session = octets(16, 16);
const token = text(512);
const features = many(text(32, /^[a-z0-9-]+$/), 0, 16);

/** Per message its type number, and per field its key, its rule, and its default (undefined: it must be there). */
const MESSAGES = {
  hello: [1, {
    role: [1, choice("publish", "subscribe", "transcode")],
    send: [2, kind, null],
    receive: [3, many(kind, 0, 2), []],
    room: [4, text(64, /^[A-Za-z0-9._-]+$/), null],
    preset: [5, text(128), null],
    weights: [6, text(8, /^[0-9a-f]{8}$/), null],
    sample_rate: [7, integer(8000, 192000), 16000],
    sample_format: [8, choice("s16", "f32"), "s16"],
    latency: [9, ms, null],
    gross: [10, bps, null],
    copies: [11, integer(0, MAX_COPIES), 0],
    features: [12, features, []],
    token: [13, token, null],
  }],
  ready: [2, {
    session: [1, session],
    presets: [2, many(text(128), 1, 8)],
    weights: [3, many(text(8, /^[0-9a-f]{8}$/), 1, 8, false)],
    rates: [4, many(rate, 1, 8)],
    rate: [5, rate],
    block: [6, integer(1, 2 ** 24)],
    code_bits: [7, many(integer(1, 24), 2, 2, false)],
    window: [8, integer(1, 65536)],
    bundle: [9, integer(1, MAX_BUNDLE), 1],
    copies: [10, integer(0, MAX_COPIES), 0],
    features: [11, features, []],
    resumed: [12, flag, false],
    next: [13, seq, 0],
    limit: [14, seq, 0],
    codes_next: [15, seq, 0],
    audio_next: [16, seq, 0],
    keep: [17, ms, 0],
    idle: [18, ms, 0],
  }],
  resume: [3, { session: [1, session], codes_next: [2, seq, 0], audio_next: [3, seq, 0], token: [4, token, null], first: [5, seq, 0] }],
  audio: [4, { seq: [1, seq], at: [2, seq], data: [3, octets(2, 262144)] }],
  codes: [5, {
    seq: [1, seq],
    data: [2, octets(1, 32768)],
    rate: [3, rate, null],
    at: [4, seq, null],
    copies: [5, octets(0, 32768), new Uint8Array()],
    copy_rate: [6, rate, null],
  }],
  ack: [6, { next: [1, seq], limit: [2, seq, null], kind: [3, kind, "codes"], marker: [4, seq, 0] }],
  marker: [7, {
    id: [1, integer(1, MAX_SEQ)],
    seq: [2, seq],
    flush: [3, flag, false],
    at: [4, seq, null],
    kind: [5, kind, "codes"],
    tag: [6, seq, 0],
  }],
  tune: [8, {
    rate: [1, rate, null],
    latency: [2, ms, null],
    gross: [3, bps, null],
    copies: [4, integer(0, MAX_COPIES), null],
    bundle: [5, integer(1, MAX_BUNDLE), null],
  }],
  missing: [9, {
    first: [1, seq],
    stop: [2, seq],
    reason: [3, choice("window", "slow", "source", "overload"), "window"],
    kind: [4, kind, "codes"],
    total: [5, count, 0],
  }],
  room: [10, { live: [1, flag], listeners: [2, integer(0, 2 ** 24), 0] }],
  stats: [11, {
    net: [1, bps, 0],
    gross_sent: [2, bps, 0],
    gross_received: [3, bps, 0],
    sent: [4, count, 0],
    received: [5, count, 0],
    lost: [6, count, 0],
    recovered: [7, count, 0],
    repeated: [8, count, 0],
    queued: [9, count, 0],
    delay: [10, ms, 0],
    underruns: [11, count, 0],
  }],
  ping: [12, { nonce: [1, seq, 0] }],
  pong: [13, { nonce: [1, seq, 0] }],
  error: [14, { code: [1, code], reason: [2, reason, ""], retry: [3, ms, null] }],
  bye: [15, {
    code: [1, code, 1000],
    reason: [2, reason, ""],
    retry: [3, ms, null],
    url: [4, text(512, /^wss?:\/\/[!-~]+$/), null],
  }],
};
const NAMES = new Map(Object.entries(MESSAGES).map(([name, [tag]]) => [tag, name]));
const CODES = 5;
const CODES_DATA = 2;
const CRC_BYTES = 2;

/** Return the bytes of a message that this page may send; it never sends codes. */
export function encode(message) {
  const [tag, fields] = MESSAGES[message.type];
  const map = new Map([[0, tag]]);
  for (const [name, [key, allowed, fallback]] of Object.entries(fields)) {
    const value = message[name] ?? fallback;
    if (value === fallback && fallback !== undefined) continue;
    if (!allowed(value)) throw new WireError(`${message.type}.${name} is out of range`);
    if (value.length !== 0 || fallback === undefined) map.set(key, value);
  }
  return packMap(map);
}

/** Undo {@link encode}: null for a message of an unknown type, which is to be ignored. */
export function decode(bytes) {
  const map = unpackMap(bytes);
  if (!(map instanceof Map)) throw new WireError("the message is no map");
  const tag = map.has(0) ? map.get(0) : CODES;
  if (!integer(1, MAX_SEQ)(tag)) throw new WireError("the message has no type");
  const type = NAMES.get(tag);
  if (type === undefined) return null;
  if (type === "codes") checkCrc(bytes, map);
  const message = { type };
  for (const [name, [key, allowed, fallback]] of Object.entries(MESSAGES[type][1])) {
    const value = map.has(key) ? map.get(key) : fallback;
    if (value === undefined) throw new WireError(`${type} lacks ${name}`);
    if (map.has(key) && !allowed(value)) throw new WireError(`${type}.${name} is out of range`);
    message[name] = value;
  }
  return message;
}

/** Check and remove the CRC at the end of a codes message. */
function checkCrc(bytes, map) {
  const data = map.get(CODES_DATA);
  if (!(data instanceof Uint8Array) || data.length <= CRC_BYTES || [...map.keys()].at(-1) !== CODES_DATA) {
    throw new WireError("codes need data of more than 2 bytes, last in the map");
  }
  const stored = new DataView(bytes.buffer, bytes.byteOffset + bytes.length - CRC_BYTES).getUint16(0);
  if (crc16(bytes.subarray(0, -CRC_BYTES)) !== stored) throw new WireError("the CRC of the codes does not hold");
  map.set(CODES_DATA, data.subarray(0, -CRC_BYTES));
}

/** Return the CRC-16/IBM-3740: polynomial 0x1021, most significant bit first, all ones at the beginning. */
export function crc16(bytes) {
  let crc = 0xffff;
  for (const byte of bytes) {
    crc ^= byte << 8;
    for (let k = 0; k < 8; k++) crc = crc & 0x8000 ? (crc << 1) ^ 0x1021 : crc << 1;
  }
  return crc & 0xffff;
}

/** What codes of a session look like; `ready` says. */
export class Geometry {
  constructor({ block, code_bits: bits, rates }) {
    this.block = block;
    this.bits = bits;
    this.rates = rates;
    for (const perSecond of rates) {
      if ((block * perSecond) % (2 * CODES_RATE)) throw new WireError(`no whole frames at ${perSecond} codes/s`);
    }
  }

  frames(perSecond) {
    return (this.block * perSecond) / (2 * CODES_RATE);
  }

  blockBytes(perSecond) {
    return Math.ceil((this.frames(perSecond) * (this.bits[0] + this.bits[1])) / 8);
  }

  /** Unpack blocks, oldest first: per block `{semantic, acoustic}`, one code per frame. */
  unpack(data, perSecond) {
    const size = this.blockBytes(perSecond);
    const blocks = data.length / size;
    if (!this.rates.includes(perSecond) || !integer(1, MAX_BUNDLE)(blocks)) {
      throw new WireError(`${data.length} bytes are no blocks at ${perSecond} codes/s`);
    }
    return Array.from({ length: blocks }, (_, i) => this.one(data.subarray(i * size, (i + 1) * size), perSecond));
  }

  one(data, perSecond) {
    let bit = 0;
    const take = (width) => {
      let value = 0;
      for (let i = 0; i < width; i++, bit++) value = (value << 1) | ((data[bit >> 3] >> (7 - (bit & 7))) & 1);
      return value;
    };
    const stream = (width) => Uint32Array.from({ length: this.frames(perSecond) }, () => take(width));
    const codes = { rate: perSecond, semantic: stream(this.bits[0]), acoustic: stream(this.bits[1]) };
    while (bit < 8 * data.length) if (take(1)) throw new WireError("bits are set after the last code");
    return codes;
  }
}

/** Return the bytes at the socket of a message; clients mask their frames (RFC 6455, section 5.2). */
export function frameBytes(message, masked) {
  return message + (message < 126 ? 2 : message < 65536 ? 4 : 10) + (masked ? 4 : 0);
}

/** Bits per second at the socket over the last four seconds. */
export class Meter {
  constructor() {
    this.recent = [];
  }

  /** Count bytes at time `now` (seconds). */
  add(bytes, now) {
    const bucket = Math.floor(2 * now);
    const last = this.recent.at(-1);
    if (last?.bucket === bucket) last.bytes += bytes;
    else this.recent.push({ bucket, bytes, now });
    if (this.recent.length > 8) this.recent.shift();
  }

  rate(now) {
    this.recent = this.recent.filter(({ bucket }) => bucket > Math.floor(2 * now) - 8);
    if (!this.recent.length) return 0;
    const bytes = this.recent.reduce((sum, entry) => sum + entry.bytes, 0);
    return (8 * bytes) / Math.max(0.5, now - this.recent[0].now);
  }
}

/**
 * Bits per second of a stream of codes: packed (`net`) and with all framing (`gross`), over the time that they stand
 * for.  Bundles come seldom; over the clock their rate would jump about.
 */
export class CodesMeter {
  constructor() {
    this.recent = [];
  }

  add(net, gross, seconds) {
    this.recent.push({ net, gross, seconds });
    while (this.recent.length > 1 && this.total("seconds") > 4 + seconds) this.recent.shift();
  }

  total(what) {
    return this.recent.reduce((sum, entry) => sum + entry[what], 0);
  }

  get rates() {
    const seconds = this.total("seconds");
    if (!seconds) return { net: 0, gross: 0 };
    return { net: (8 * this.total("net")) / seconds, gross: (8 * this.total("gross")) / seconds };
  }
}
