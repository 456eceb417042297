/** The page: controls, messages, pictures, meters. */

import { Call } from "./call.js";
import { MicrophoneError, openMicrophone } from "./capture.js";
import { CodesView } from "./codesview.js";
import { Meters } from "./meters.js";
import { Spectrogram } from "./spectrogram.js";

const $ = (id) => document.getElementById(id);
const controls = $("controls");
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
/** Codes per second at first: one block per message then stays below 1.4 kbit/s with all framing. */
const RATE = 50;
const ROOM = /^[A-Za-z0-9._-]{1,64}$/;
const query = new URLSearchParams(location.search);

const views = {
  input: new Spectrogram($("input")),
  codes: new CodesView($("codes")),
  output: new Spectrogram($("output")),
};
const meters = new Meters($);
/** For tests and the curious: what is going on. */
const app = (globalThis.semanticodec = { call: null, context: null, views, starting: false });

function show(message) {
  $("message").textContent = message ?? "";
  $("message").hidden = !message;
}

// Theme

function applyTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", String(theme === "dark"));
  for (const view of Object.values(views)) view.theme(theme === "dark");
}

function chooseTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  applyTheme(theme);
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // Forbidden storage: the choice holds for this visit.
  }
}

function systemTheme({ matches }) {
  let stored = null;
  try {
    stored = localStorage.getItem("theme");
  } catch {
    // As above.
  }
  if (stored === null) applyTheme(matches ? "dark" : "light");
}

// Controls

const LEADS = {
  loop: "Speak, and hear what comes out of the other end. Everything a listener needs is in the coloured pattern below.",
  speak: "Speak, and let others listen by a link. All that they need is the coloured pattern below.",
  listen: "Hear somebody speak through a link. All that it takes is the coloured pattern below.",
};

/** Show what belongs to the chosen mode and source, and what may be changed now. */
function arrange() {
  const mode = chosen("mode");
  const running = app.call !== null || app.starting;
  const listening = mode === "listen";
  $("sources").hidden = listening;
  $("file-field").hidden = listening || chosen("source") !== "file";
  $("headphones-field").hidden = listening || chosen("source") === "file";
  $("room-field").hidden = mode === "loop";
  $("room").disabled = mode === "loop" || running;
  for (const id of ["modes", "sources", "file", "headphones", "token"]) $(id).disabled = running;
  $("rates").disabled = listening;
  $("input-figure").hidden = listening;
  $("output-figure").hidden = mode === "speak";
  $("latency-card").hidden = mode !== "loop";
  $("buffer-card").hidden = $("volume-field").hidden = mode === "speak";
  $("whose").textContent = listening ? "A" : "Your";
  $("lead").textContent = LEADS[mode];
  $("share").hidden = mode !== "speak" || !ROOM.test($("room").value);
  $("link").value = listenLink();
  const label = running ? "Stop" : { loop: "Start", speak: "Speak", listen: "Listen" }[mode];
  $("start-label").textContent = label;
  $("start").setAttribute("aria-pressed", String(running));
  $("hint").textContent = `Press ${label}`;
  $("hint").hidden = running || app.used === true;
  $("span").textContent = `${span()} s ago`;
}

function listenLink() {
  const link = new URL(location.pathname, location.href);
  link.search = new URLSearchParams({ room: $("room").value, listen: "1" }).toString();
  return link.href;
}

function showRates(rates, rate) {
  const seen = [...$("rates").querySelectorAll("input")].map((input) => Number(input.value));
  if (String(seen) === String(rates)) return;
  for (const label of $("rates").querySelectorAll("label")) label.remove();
  for (const value of rates) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "rate", value });
    input.defaultChecked = value === rate;
    const name = Object.assign(document.createElement("span"), { textContent: value });
    label.append(input, name);
    $("rates").append(label);
  }
}

const wishes = () => ({ rate: Number(chosen("rate")), bundle: Number(chosen("bundle")) });

async function copyLink() {
  $("link").select();
  try {
    await navigator.clipboard.writeText($("link").value);
    $("copy").textContent = "Copied";
  } catch {
    $("copy").textContent = "Press Ctrl+C";
  }
  setTimeout(() => ($("copy").textContent = "Copy link"), 2000);
}

// Start and stop

async function openSource(context) {
  if (chosen("mode") === "listen") return {};
  if (chosen("source") === "microphone") return { stream: await openMicrophone($("headphones").checked) };
  const [file] = $("file").files;
  if (!file) throw new Error("Choose a recording first.");
  try {
    return { buffer: await context.decodeAudioData(await file.arrayBuffer()) };
  } catch {
    throw new Error(`The browser cannot read ${file.name} as sound.`);
  }
}

async function start() {
  show(null);
  app.starting = true;
  arrange();
  // In the click itself: browsers start sound only then.
  const context = new AudioContext({ latencyHint: "interactive" });
  let source = {};
  try {
    if (!context.audioWorklet) {
      throw new MicrophoneError("Browsers allow live sound and the microphone only to pages over HTTPS or on localhost.");
    }
    source = await openSource(context);
    const worklets = ["capture-worklet.js", "player-worklet.js"].map((name) => context.audioWorklet.addModule(name));
    await Promise.all([...worklets, context.resume()]);
  } catch (error) {
    await context.close();
    app.starting = false;
    arrange();
    return show(error.message);
  }
  begin(context, source);
}

function begin(context, source) {
  for (const view of Object.values(views)) view.clear();
  const url = new URL("./", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  url.search = url.hash = "";
  const options = { mode: chosen("mode"), room: $("room").value, token: $("token").value, url: url.href };
  const call = new Call(context, views, { ...options, wishes: wishes(), volume: Number($("volume").value) });
  Object.assign(app, { call, context, starting: false, used: true });
  call.addEventListener("state", ({ detail }) => showState(detail));
  call.addEventListener("ready", ({ detail }) => {
    showRates(detail.rates, detail.rates.includes(RATE) ? RATE : detail.rate);
    const rate = detail.rates.indexOf(Number(chosen("rate")) || detail.rate);
    $("server-preset").textContent = `Served by ${detail.presets[Math.max(0, rate)]}.`;
  });
  call.addEventListener("room", ({ detail }) => showRoom(detail));
  call.addEventListener("said", ({ detail }) => detail.type === "error" && detail.code === 4411 && show(detail.reason));
  call.addEventListener("ended", () => ended());
  call.start(source);
  arrange();
  animate();
}

function ended() {
  const { call, context } = app;
  app.call = null;
  meters.show(call, context);
  context.close();
  $("room-state").textContent = "";
  if ($("connection").dataset.state !== "closed") setState("idle", "Not connected");
  arrange();
}

// What happens

function setState(state, text) {
  $("connection").dataset.state = state;
  $("connection").textContent = text;
}

const REFUSALS = {
  4401: "The server wants an access token. Enter it at the end of this page.",
  4403: "This access token does not allow that here.",
  4406: "This page and the server do not speak the same version. Reload the page.",
  4002: "This session goes on in another connection.",
};

function showState({ state, wait, code, reason }) {
  if (state === "connecting") setState(state, "Connecting…");
  else if (state === "open") setState(state, "Connected");
  else if (state === "waiting") {
    const because = code >= 4000 && reason ? ` (${reason})` : "";
    setState(state, `Connection lost${because}, trying again in ${Math.ceil(wait)} s`);
  } else if (code === 1000) setState("idle", "Not connected");
  else {
    setState(state, "Refused");
    show(REFUSALS[code] ?? `The server refused: ${reason || `code ${code}`}.`);
    if (code === 4401) document.querySelector("details").open = true;
  }
}

function showRoom({ live, listeners }) {
  if (chosen("mode") === "listen") setState("open", live ? "Live" : "Waiting for somebody to speak");
  else {
    // One of them shows the codes on this page.
    const others = Math.max(0, listeners - 1);
    $("room-state").textContent = others === 1 ? "1 person listens" : `${others} people listen`;
  }
}

/** Seconds that are shown. */
const span = () => (innerWidth < 640 ? 4 : 8);

let drawing = 0;
let measured = 0;
function animate() {
  cancelAnimationFrame(drawing);
  const { call, context } = app;
  if (call === null) return;
  const now = context.currentTime;
  for (const view of Object.values(views)) view.draw(now, span());
  if (performance.now() - measured > 250) {
    measured = performance.now();
    meters.show(call, context);
  }
  drawing = requestAnimationFrame(animate);
}

function retune() {
  const { rate } = wishes();
  meters.promise(rate);
  app.call?.tune(wishes());
}

function prepare() {
  showRates([100, 50, 25], RATE);
  meters.promise(RATE);
  applyTheme(document.documentElement.dataset.theme);
  const room = query.get("room");
  $("room").value = ROOM.test(room ?? "") ? room : `room-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
  const mode = query.has("listen") ? "listen" : room ? "speak" : "loop";
  document.querySelector(`input[name="mode"][value="${mode}"]`).checked = true;
  controls.addEventListener("input", arrange);
  controls.addEventListener("submit", (event) => {
    event.preventDefault();
    if (app.call) app.call.stop();
    else if (!app.starting) start();
  });
  $("tuning").addEventListener("submit", (event) => event.preventDefault());
  $("tuning").addEventListener("change", retune);
  $("volume").addEventListener("input", () => app.call && (app.call.volume = Number($("volume").value)));
  $("copy").addEventListener("click", copyLink);
  $("theme").addEventListener("click", chooseTheme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", systemTheme);
  addEventListener("pagehide", () => app.call?.stop());
  arrange();
}

prepare();
