/** The codes as a scrolling picture: every bit that was sent, above semantic and below acoustic, tinted by its code. */

import { COLUMNS_PER_SECOND, HUES, Strip, codesColours } from "./strips.js";
import { CODES_RATE } from "./protocol.js";

const SPACE = 1;
const HELD = 4096;

export class CodesView {
  constructor(canvas, bits = [12, 13]) {
    this.canvas = canvas;
    this.dark = true;
    this.resize(bits);
  }

  /** Take the number of bits per code of a session. */
  resize(bits) {
    this.bits = bits;
    this.strip = new Strip(this.canvas, bits[0] + bits[1] + SPACE, false);
    this.clear();
  }

  clear() {
    this.frames = [];
    this.shift = null;
    this.strip.clear();
    this.theme(this.dark);
  }

  theme(dark) {
    this.dark = dark;
    this.strip.colours = codesColours(dark);
  }

  /** Take a block: it is drawn where it is heard, as soon as that is known. */
  push({ at, rate, semantic, acoustic }) {
    const length = (2 * CODES_RATE) / rate;
    semantic.forEach((code, i) => this.frames.push({ at: at + i * length, length, codes: [code, acoustic[i]] }));
    this.frames.splice(0, Math.max(0, this.frames.length - HELD));
    this.paint();
  }

  /** Note that the sample at position `at` (at 16 kHz) is heard at `time`; less than `tolerance` (s) changes nothing. */
  heard(at, time, tolerance) {
    const shift = time - at / CODES_RATE;
    if (this.shift === null || Math.abs(shift - this.shift) > tolerance) this.shift = shift;
    this.paint();
  }

  paint() {
    if (this.shift === null) return;
    for (const { at, length, codes } of this.frames.splice(0)) {
      const column = Math.round((at / CODES_RATE + this.shift) * COLUMNS_PER_SECOND);
      const stop = Math.round(((at + length) / CODES_RATE + this.shift) * COLUMNS_PER_SECOND);
      if (column >= 0 && stop > column) this.strip.put(column, this.column(codes), stop - column);
    }
  }

  column(codes) {
    const values = new Uint8Array(this.strip.rows);
    codes.forEach((code, stream) => {
      const width = this.bits[stream];
      const hue = Math.floor((code * HUES) / 2 ** width);
      const base = stream === 0 ? this.bits[1] + SPACE : 0;
      for (let bit = 0; bit < width; bit++) {
        values[base + bit] = 1 + 2 * stream * HUES + hue + (code & (1 << bit) ? HUES : 0);
      }
    });
    return values;
  }

  draw(now, seconds) {
    this.strip.draw(now, seconds);
  }
}
