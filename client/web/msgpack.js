/**
 * MessagePack, as far as the protocol needs it, within the bounds of PROTOCOL.md.
 *
 * Maps are `Map`s with integer keys, because the order of keys matters to codes messages; bytes are `Uint8Array`s.
 */

export class WireError extends Error {
  name = "WireError";
}

export const MAX_MESSAGE = 262400;
export const MAX_DEPTH = 4;
export const MAX_ENTRIES = 64;
const MAX_TEXT = 1024;
const MAX_BYTES = 262144;

const utf8 = new TextEncoder();
const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Return the bytes of a value: integers from 0 to 2^53 - 1, booleans, text, bytes, arrays, maps. */
export function encode(value) {
  const out = [];
  write(out, value);
  return Uint8Array.from(out);
}

/** Append `size` bytes of a number, most significant first; numbers may have more than 32 bits. */
function tail(out, number, size) {
  for (let i = size - 1; i >= 0; i--) out.push(Math.floor(number / 2 ** (8 * i)) % 256);
}

function head(out, size, small, smallest, tags) {
  if (size < small) out.push(smallest | size);
  else {
    const width = size < 1 << 8 && tags[0] !== null ? 0 : size < 1 << 16 ? 1 : 2;
    out.push(tags[width]);
    tail(out, size, 1 << width);
  }
}

function write(out, value) {
  if (Number.isSafeInteger(value) && value >= 0) {
    if (value < 128) return void out.push(value);
    const width = value < 2 ** 8 ? 0 : value < 2 ** 16 ? 1 : value < 2 ** 32 ? 2 : 3;
    out.push(0xcc + width);
    tail(out, value, 1 << width);
  } else if (typeof value === "boolean") out.push(value ? 0xc3 : 0xc2);
  else if (typeof value === "string") {
    const text = utf8.encode(value);
    head(out, text.length, 32, 0xa0, [0xd9, 0xda, 0xdb]);
    for (const byte of text) out.push(byte);
  } else if (value instanceof Uint8Array) {
    head(out, value.length, 0, 0, [0xc4, 0xc5, 0xc6]);
    for (const byte of value) out.push(byte);
  } else if (Array.isArray(value)) {
    head(out, value.length, 16, 0x90, [null, 0xdc, 0xdd]);
    for (const item of value) write(out, item);
  } else if (value instanceof Map) {
    head(out, value.size, 16, 0x80, [null, 0xde, 0xdf]);
    for (const [key, item] of value) {
      write(out, key);
      write(out, item);
    }
  } else throw new WireError(`a message cannot hold ${typeof value}`);
}

/** Read one value that fills `bytes` (a `Uint8Array`); what a stranger sent is bounded before anything is built. */
export function decode(bytes) {
  if (bytes.length > MAX_MESSAGE) throw new WireError(`a message of ${bytes.length} bytes; at most ${MAX_MESSAGE}`);
  const reader = new Reader(bytes);
  const value = reader.value(MAX_DEPTH);
  if (reader.at !== bytes.length) throw new WireError(`${bytes.length - reader.at} bytes after the message`);
  return value;
}

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    this.at = 0;
  }

  skip(count) {
    const begin = this.at;
    if (count > this.bytes.length - begin) throw new WireError("the message ends too early");
    this.at += count;
    return begin;
  }

  unsigned(size) {
    const begin = this.skip(size);
    if (size === 1) return this.view.getUint8(begin);
    if (size === 2) return this.view.getUint16(begin);
    if (size === 4) return this.view.getUint32(begin);
    return this.safe(this.view.getBigUint64(begin));
  }

  signed(size) {
    const begin = this.skip(size);
    if (size === 1) return this.view.getInt8(begin);
    if (size === 2) return this.view.getInt16(begin);
    if (size === 4) return this.view.getInt32(begin);
    return this.safe(this.view.getBigInt64(begin));
  }

  safe(big) {
    const number = Number(big);
    if (!Number.isSafeInteger(number)) throw new WireError(`the number ${big} is too large`);
    return number;
  }

  value(depth) {
    const tag = this.unsigned(1);
    if (tag < 0x80) return tag;
    if (tag < 0x90) return this.map(tag & 15, depth);
    if (tag < 0xa0) return this.array(tag & 15, depth);
    if (tag < 0xc0) return this.text(tag & 31);
    if (tag >= 0xe0) return tag - 256;
    switch (tag) {
      case 0xc0: return null;
      case 0xc2: return false;
      case 0xc3: return true;
      case 0xc4: case 0xc5: case 0xc6: return this.binary(this.unsigned(1 << (tag - 0xc4)));
      case 0xca: return this.view.getFloat32(this.skip(4));
      case 0xcb: return this.view.getFloat64(this.skip(8));
      case 0xcc: case 0xcd: case 0xce: case 0xcf: return this.unsigned(1 << (tag - 0xcc));
      case 0xd0: case 0xd1: case 0xd2: case 0xd3: return this.signed(1 << (tag - 0xd0));
      case 0xd9: case 0xda: case 0xdb: return this.text(this.unsigned(1 << (tag - 0xd9)));
      case 0xdc: case 0xdd: return this.array(this.unsigned(2 << (tag - 0xdc)), depth);
      case 0xde: case 0xdf: return this.map(this.unsigned(2 << (tag - 0xde)), depth);
      default: throw new WireError(`the byte ${tag} begins nothing that is allowed`);
    }
  }

  binary(size) {
    if (size > MAX_BYTES) throw new WireError(`${size} bytes in one field`);
    const begin = this.skip(size);
    return this.bytes.subarray(begin, this.at);
  }

  text(size) {
    if (size > MAX_TEXT) throw new WireError(`text of ${size} bytes`);
    const begin = this.skip(size);
    try {
      return strict.decode(this.bytes.subarray(begin, this.at));
    } catch {
      throw new WireError("text that is no UTF-8");
    }
  }

  array(count, depth) {
    this.bound(count, depth);
    return Array.from({ length: count }, () => this.value(depth - 1));
  }

  map(count, depth) {
    this.bound(count, depth);
    const map = new Map();
    for (let i = 0; i < count; i++) {
      const key = this.value(0);
      if (!Number.isSafeInteger(key) || key < 0 || map.has(key)) {
        throw new WireError("keys must be different integers, 0 or more");
      }
      map.set(key, this.value(depth - 1));
    }
    return map;
  }

  bound(count, depth) {
    if (depth < 1) throw new WireError(`the message is nested more than ${MAX_DEPTH} deep`);
    if (count > MAX_ENTRIES) throw new WireError(`${count} entries; at most ${MAX_ENTRIES}`);
  }
}
