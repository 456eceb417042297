/** Pictures that scroll with time: one column per 10 ms of the audio context's clock, drawn where it belongs. */

export const COLUMNS_PER_SECOND = 100;
/** Columns that are kept: those to be seen, and some ahead, because codes come before they are heard. */
const KEPT = 1024;
const AHEAD = 150;
/** What is shown ends so long ago (s), so that what is still on its way does not flicker at the edge. */
const EDGE = 0.08;

export class Strip {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {number} rows values per column, the lowest first
   * @param {boolean} smooth whether pixels are blended when scaled
   */
  constructor(canvas, rows, smooth) {
    this.canvas = canvas;
    this.rows = rows;
    this.smooth = smooth;
    this.values = new Uint8Array(KEPT * rows);
    this.stamps = new Int32Array(KEPT).fill(-1);
    this.ring = new OffscreenCanvas(KEPT, rows);
    this.pixels = this.ring.getContext("2d");
    this.view = canvas.getContext("2d");
    this.swept = 0;
    this.shown = null;
    this.palette = new Uint32Array(256);
  }

  /** Repaint all in other colours: 256 of them, as RGBA in a `Uint32Array`. */
  set colours(palette) {
    this.palette = palette;
    const image = new ImageData(KEPT, this.rows);
    const out = new Uint32Array(image.data.buffer);
    for (let column = 0; column < KEPT; column++) {
      for (let row = 0; row < this.rows; row++) {
        out[(this.rows - 1 - row) * KEPT + column] = palette[this.values[column * this.rows + row]];
      }
    }
    this.pixels.putImageData(image, 0, 0);
    if (this.shown) this.draw(...this.shown);
  }

  /** Set `width` columns from number `column` on. */
  put(column, values, width = 1) {
    const image = new ImageData(width, this.rows);
    const out = new Uint32Array(image.data.buffer);
    for (let i = 0; i < width; i++) {
      const place = (column + i) & (KEPT - 1);
      this.values.set(values, place * this.rows);
      this.stamps[place] = column + i;
      for (let row = 0; row < this.rows; row++) out[(this.rows - 1 - row) * width + i] = this.palette[values[row]];
    }
    const place = column & (KEPT - 1);
    this.pixels.putImageData(image, place, 0);
    if (place + width > KEPT) this.pixels.putImageData(image, place - KEPT, 0);
  }

  clear() {
    this.values.fill(0);
    this.stamps.fill(-1);
    this.swept = 0;
    this.shown = null;
    this.colours = this.palette;
  }

  /** Show the last `seconds` before `now`. */
  draw(now, seconds) {
    this.shown = [now, seconds];
    const end = Math.max(0, (now - EDGE) * COLUMNS_PER_SECOND);
    this.sweep(Math.floor(end) + AHEAD);
    const { canvas, view } = this;
    const ratio = Math.min(2, devicePixelRatio);
    const width = Math.round(canvas.clientWidth * ratio);
    const height = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    view.imageSmoothingEnabled = this.smooth;
    view.clearRect(0, 0, width, height);
    const count = Math.min(seconds * COLUMNS_PER_SECOND, KEPT - AHEAD);
    const scale = width / count;
    const first = end - count;
    const from = ((first % KEPT) + KEPT) % KEPT;
    const before = Math.min(count, KEPT - from);
    view.drawImage(this.ring, from, 0, before, this.rows, 0, 0, before * scale, height);
    if (before < count) {
      view.drawImage(this.ring, 0, 0, count - before, this.rows, before * scale, 0, (count - before) * scale, height);
    }
  }

  /** Empty the columns that time reaches and nobody has set: the ring still holds those of ten seconds ago. */
  sweep(column) {
    const empty = new Uint8Array(this.rows);
    for (this.swept = Math.max(this.swept, column - KEPT); this.swept < column; this.swept++) {
      if (this.stamps[this.swept & (KEPT - 1)] !== this.swept) {
        this.put(this.swept, empty);
      }
    }
  }
}

/** Return the RGBA value of a colour in OKLCH, whose lightness is perceptually even. */
export function oklch(lightness, chroma, degrees, alpha = 1) {
  const hue = (degrees * Math.PI) / 180;
  const a = chroma * Math.cos(hue);
  const b = chroma * Math.sin(hue);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const [red, green, blue] = linear.map((value) => {
    const clipped = Math.max(0, Math.min(1, value));
    return Math.round(255 * (clipped <= 0.0031308 ? 12.92 * clipped : 1.055 * clipped ** (1 / 2.4) - 0.055));
  });
  return ((Math.round(255 * alpha) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

/** Colours of a spectrogram: even steps of lightness away from the page's own, through violet and rose to gold. */
export function spectrumColours(dark) {
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const x = i / 255;
    const chroma = 0.03 + 0.14 * Math.sin(Math.PI * Math.min(1, x * 1.08)) ** 0.8;
    return dark
      ? oklch(0.19 + 0.74 * x, 0.02 + chroma * Math.min(1, 3 * x), 285 + 165 * x ** 1.2)
      : oklch(0.985 - 0.72 * x ** 1.2, chroma * Math.min(1, 3 * x), 85 - 160 * x ** 0.8);
  });
}

/** Hues per stream of codes; values are 0 for nothing, then off and on bits of either stream, one per hue. */
export const HUES = 63;

/** Colours of codes: semantic ones from teal to violet, acoustic ones from rose to gold; bits that are 0 are faint. */
export function codesColours(dark) {
  const colours = new Uint32Array(256);
  for (let stream = 0; stream < 2; stream++) {
    for (let hue = 0; hue < HUES; hue++) {
      const degrees = stream === 0 ? 175 + (125 * hue) / HUES : 5 + (90 * hue) / HUES;
      const first = 1 + 2 * stream * HUES + hue;
      colours[first] = dark ? oklch(0.27, 0.035, degrees) : oklch(0.94, 0.025, degrees);
      colours[first + HUES] = dark ? oklch(0.76, 0.13, degrees) : oklch(0.6, 0.14, degrees);
    }
  }
  return colours;
}
