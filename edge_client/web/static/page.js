// The device's page. Everything that comes from outside is put in as text, never as HTML.
import { Chart } from "/static/chart.js";
import { $, bits, bytes, element, put } from "/static/words.js";

const OUTCOMES = ["result", "local", "filtered", "unchanged", "dropped", "expired"];
const MEANING = {
  result: "the server answered", local: "this device answered", filtered: "nothing of interest",
  unchanged: "nothing moved", dropped: "not processed", expired: "too late",
};
const CHOICES = ["#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#1f78b4"];
const camera = new URLSearchParams(location.search).get("camera");
const query = camera === null ? "" : `camera=${encodeURIComponent(camera)}`;
const seconds = new Map();
const choices = new Map();
let since = 0, failures = 0, keptS = 300;

function swatch(colour) {
  const made = element("span", "", "swatch");
  made.style.background = colour;
  made.setAttribute("aria-hidden", "true");
  return made;
}
const colourOf = (outcome) => getComputedStyle(document.documentElement).getPropertyValue(`--${outcome}`).trim();

function choiceColour(name) {
  if (!choices.has(name)) choices.set(name, CHOICES[choices.size % CHOICES.length]);
  return choices.get(name);
}

function decision(state) {
  const frame = state.frame;
  if (!frame) return "No frame yet";
  const parts = [frame.decision || frame.outcome + (frame.reason ? ` (${frame.reason})` : "")];
  if (frame.payload_bytes) parts.push(bytes(frame.payload_bytes));
  if (state.minute.on_time !== null) parts.push(`${Math.round(state.minute.on_time * 100)} % on time`);
  return parts.join(", ");
}

function connection(state) {
  if (state.server.up) return ["connected", "good"];
  return ["no server: the device goes on by itself", "bad"];
}

function showFacts(state) {
  const frame = state.frame, minute = state.minute;
  const rows = [
    ["Server", state.server.address + (state.server.reconnects ? `, ${state.server.reconnects} reconnects` : "")],
    ["Model", state.model ? `${state.model} (${state.bundle_sha256})` : "none yet"],
    ["Pace", `${minute.frames_per_s} frames a second`],
    ["Sent", minute.bytes_mean === null ? "nothing in the last minute" : `${bytes(minute.bytes_mean)} a frame on average`],
    ["Last answer", frame ? `${frame.latency_ms} ms after capture` : "none yet"],
    ["Deadline", state.deadline_ms ? `${state.deadline_ms} ms` : "none"],
    ["Link", state.link && state.server.up ? `about ${bits(state.link.bitrate_bps)}, round trip ${Math.round(state.link.rtt_ms)} ms` : "not known"],
  ];
  if (state.server.error) rows.push(["Trouble", state.server.error]);
  if (state.note) rows.push(["Note", state.note]);
  const list = $("facts");
  list.replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function showOutcomes(state) {
  $("outcomes").replaceChildren(...OUTCOMES.map((name) => {
    const item = element("li");
    item.append(swatch(colourOf(name)), `${name} ${state.outcomes[name].toLocaleString("en")} `, element("span", MEANING[name], "small"));
    return item;
  }));
}

const charts = {
  outcomes: new Chart($("chart-outcomes")), bytes: new Chart($("chart-bytes")),
  latency: new Chart($("chart-latency")), link: new Chart($("chart-link")),
};

function draw(state) {
  const rows = [...seconds.values()].sort((a, b) => a[0] - b[0]);
  const span = { from: state.now - keptS, to: state.now };
  charts.outcomes.bars(span, rows.map((r) => [r[0], r[1]]), OUTCOMES.map(colourOf));
  const recent = OUTCOMES.map((name, i) => [name, rows.reduce((sum, r) => sum + r[1][i], 0)]).filter(([, n]) => n);
  charts.outcomes.describe(`Frames of the last five minutes: ${recent.map(([name, n]) => `${name} ${n}`).join(", ") || "none"}`);

  charts.bytes.lines(span, [{ points: rows.map((r) => [r[0], r[2]]), width: 2, colour: "--accent" }], { unit: bytes });
  charts.bytes.band(span, rows.filter((r) => r[3]).map((r) => [r[0], choiceColour(r[3])]));
  const used = [...new Set(rows.map((r) => r[3]).filter(Boolean))];
  $("choices").replaceChildren(...used.map((name) => {
    const item = element("span", undefined, "item");
    item.append(swatch(choiceColour(name)), name);
    return item;
  }));
  charts.bytes.describe(`Bytes a frame, now ${state.minute.bytes_mean ?? "none"}; chosen: ${used.join(", ") || "nothing"}`);

  const ms = (n) => `${Math.round(n)} ms`;
  charts.latency.lines(span, [
    { points: rows.map((r) => [r[0], r[5]]), width: 1, colour: "--soft" }, { points: rows.map((r) => [r[0], r[4]]), width: 2, colour: "--accent" },
  ], { unit: ms, limit: state.deadline_ms || undefined });
  const last = rows.findLast((r) => r[4] !== null);
  charts.latency.describe(`Latency, last median ${last ? ms(last[4]) : "unknown"}, deadline ${state.deadline_ms ? ms(state.deadline_ms) : "none"}`);

  charts.link.lines(span, [{ points: rows.map((r) => [r[0], r[6]]), width: 2, colour: "--accent" }], { unit: bits });
  charts.link.describe(state.link ? `The link is believed to carry ${bits(state.link.bitrate_bps)}` : "The link is not known");
}

function showState(state) {
  keptS = state.kept_s;
  for (const row of state.seconds) seconds.set(row[0], row);
  for (const number of seconds.keys()) if (number <= state.now - keptS || number > state.now) seconds.delete(number);
  since = state.now - 2;
  put($("title"), state.camera);
  document.title = `${state.camera}: headtail`;
  const [text, kind] = connection(state);
  put($("connection"), text);
  $("connection").className = `badge ${kind}`;
  put($("decision"), decision(state));
  put($("sees"), state.sees ? `Sees ${state.sees}` : "Sees nothing it knows");
  $("picture").alt = `${state.camera}: ${state.sees || "nothing known"}`;
  showFacts(state);
  showOutcomes(state);
  draw(state);
}

function notice(text) {
  $("notice").hidden = !text;
  put($("notice"), text);
}

async function look() {
  try {
    const answer = await fetch(`/api/state?since=${since}&${query}`, { signal: AbortSignal.timeout(5000) });
    if (answer.status === 401 || answer.status === 403) { location.replace("/"); return; }
    if (answer.status === 503) { notice(`The camera has not begun yet: ${await answer.text()}.`); return; }
    if (!answer.ok) throw new Error(await answer.text());
    const state = await answer.json();
    if (failures) { since = 0; startPicture(); }
    failures = 0;
    notice("");
    showState(state);
  } catch (error) {
    failures += 1;
    if (failures > 1) {
      notice("This device does not answer; what stands here is old. The page goes on trying.");
      put($("connection"), "device not reached");
      $("connection").className = "badge bad";
    }
  }
}

// ---------------------------------------------------------------- the picture

let pictureTimer;
function startPicture() {
  clearTimeout(pictureTimer);
  if (document.hidden) { $("picture").removeAttribute("src"); return; }
  $("picture").src = `/stream.mjpg?${query}&t=${Date.now()}`;
}
$("picture").addEventListener("error", () => {
  $("picture").hidden = true;
  $("no-picture").hidden = false;
  clearTimeout(pictureTimer);
  pictureTimer = setTimeout(startPicture, 2000);
});
$("picture").addEventListener("load", () => { $("picture").hidden = false; $("no-picture").hidden = true; });
document.addEventListener("visibilitychange", () => { startPicture(); if (!document.hidden) look(); });

async function listCameras() {
  const names = await (await fetch("/api/cameras")).json();
  if (names.length < 2) return;
  const nav = $("cameras");
  nav.hidden = false;
  names.forEach((name, i) => {
    const link = element("a", name);
    link.href = `/?camera=${encodeURIComponent(name)}`;
    if (name === camera || (camera === null && i === 0)) link.setAttribute("aria-current", "page");
    nav.append(link);
  });
}

startPicture();
look();
listCameras().catch(() => {});
setInterval(() => { if (!document.hidden) look(); }, 1000);
