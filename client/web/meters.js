/** Figures: bitrates, latency, buffer, losses. */

import { CHUNK } from "./capture.js";
import { PARTS } from "./latency.js";

const PCM = 16 * 16000;
const CHUNK_MS = (1000 * CHUNK) / 16000;
/** Bits per code of both streams, on average per code: what to promise before anything is measured. */
const BITS_PER_CODE = 12.5;

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const ms = (seconds) => whole.format(1000 * seconds);
const kilobits = (bits) => whole.format(bits / 1000);
const often = (count) => ["never", "once"][count] ?? `${count} times`;

export class Meters {
  /** @param {(id: string) => HTMLElement} element */
  constructor(element) {
    this.element = element;
    for (const part of PARTS) {
      const bar = document.createElement("i");
      const row = document.createElement("div");
      const name = Object.assign(document.createElement("dt"), { textContent: part });
      const value = Object.assign(document.createElement("dd"), { id: `latency-${part}`, textContent: "–" });
      bar.dataset.part = name.dataset.part = part;
      row.append(name, value);
      element("latency-bar").append(bar);
      element("latency-parts").append(row);
    }
  }

  set(id, text) {
    this.element(id).textContent = text;
  }

  /** Say what a rate will cost. */
  promise(rate) {
    this.set("headline-rate", whole.format(BITS_PER_CODE * rate));
  }

  show(call) {
    const now = performance.now() / 1000;
    const { session } = call;
    const { net, gross } = call.codesSession.codesMeter.rates;
    if (net) {
      this.set("net", whole.format(net));
      this.set("gross", `${whole.format(gross)} bit/s`);
      this.set("ratio", `${whole.format(PCM / net)} times less`);
      this.set("headline-rate", whole.format(net));
    }
    this.set("socket", `${kilobits(session.sent.rate(now))} up, ${kilobits(session.received.rate(now))} down, kbit/s`);
    const { lost, recovered } = call.codesSession.losses;
    this.set("lost", lost);
    this.set("recovered", recovered);
    this.set("unsent", `${whole.format(session.losses.unsent * CHUNK_MS)} ms`);
    this.set("reconnects", often(Math.max(0, call.link.reconnects)));
    if (call.report) this.buffer(call.report);
    if (call.latency.summary) this.latency(call.latency.summary);
  }

  buffer({ level, underruns, concealed, skipped }) {
    this.set("level", ms(level));
    this.element("level-bar").style.width = `${Math.min(100, 100 * level)}%`;
    this.set("underruns", often(underruns) + (underruns ? `, ${ms(concealed)} ms` : ""));
    this.set("skipped", `${ms(skipped)} ms`);
  }

  latency({ parts, p50, p95 }) {
    const total = parts.reduce((sum, { value }) => sum + Math.max(0, value), 0);
    this.set("latency", `${ms(p50)}`);
    this.element("latency").nextElementSibling.textContent = `ms, 95 % below ${ms(p95)}`;
    for (const { part, value } of parts) {
      this.set(`latency-${part}`, `${ms(value)} ms`);
      const bar = this.element("latency-bar").querySelector(`[data-part="${part}"]`);
      bar.style.width = `${(100 * Math.max(0, value)) / total}%`;
    }
  }
}
