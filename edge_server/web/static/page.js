// The server's page. Everything that comes from outside is put in as text, never as HTML.
import { Chart } from "/static/chart.js";
import { $, bits, bytes, element, put } from "/static/words.js";

const seconds = new Map();
let since = 0, failures = 0;
const ms = (n) => `${n < 10 ? n.toFixed(1) : Math.round(n)} ms`;
const count = (n) => n.toLocaleString("en");
const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);

function span(s) {
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`;
}

function fill(id, rows, numbers) {
  $(id).tBodies[0].replaceChildren(...rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((text, i) => element("td", text, numbers.includes(i) ? "n" : undefined)));
    return row;
  }));
}

function showFacts(state) {
  const minute = state.minute;
  const rows = [
    ["Up for", span(state.up_s)],
    ["Version", `${state.version}, backend ${state.backend}`],
    ["Sessions", count(state.session_count)],
    ["Frames", `${minute.answered_per_s} answered a second, ${minute.refused_per_s} refused`],
    ["Received", `${bytes(minute.bytes_per_s)} a second`],
    ["Queue", `${count(state.load.waiting)} waiting; 95 % wait less than ${ms(state.load.queue_ms)}`],
    ["Tail", `95 % take less than ${ms(state.load.tail_ms)}`],
    ["Grants sent", count(state.grants)],
  ];
  $("facts").replaceChildren(...rows.flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function showRefused(state) {
  const calls = Object.entries(state.refused_calls);
  $("refused").replaceChildren(...(calls.length ? calls.map(([code, n]) => element("li", `${count(n)} ${n === 1 ? "call" : "calls"}: ${code}`)) : [element("li", "Nothing was refused.")]));
  fill("refusals", state.refusals.map(([ago, code, text]) => [span(ago), code, text]), [0]);
  $("refusals").parentElement.hidden = !state.refusals.length;
}

function showSessions(state) {
  fill("sessions", state.sessions.map((s) => [
    s.who, s.model, s.id, count(s.answered), count(s.refused), `${s.in_flight} of ${s.max_in_flight}`,
    s.granted_bps ? bits(s.granted_bps) : "not limited", ms(s.link_queue_ms),
  ]), [3, 4, 5, 6, 7]);
  $("no-sessions").hidden = state.session_count > 0;
  $("sessions-box").hidden = !state.session_count;
  if (state.session_count > state.sessions.length) {
    $("no-sessions").hidden = false;
    put($("no-sessions"), `The first ${state.sessions.length} of ${count(state.session_count)}.`);
  } else put($("no-sessions"), "No camera is connected.");
}

const charts = Object.fromEntries(["frames", "bytes", "total", "tail"].map((name) => [name, new Chart($(`chart-${name}`))]));

function draw(state) {
  const rows = [...seconds.values()].sort((a, b) => a[0] - b[0]);
  const time = { from: state.now - state.kept_s, to: state.now };
  const line = (column, width = 2, colour = "--accent") => ({ points: rows.map((r) => [r[0], r[column]]), width, colour });
  charts.frames.bars(time, rows.map((r) => [r[0], [r[1], r[2]]]), ["--good", "--bad"].map((c) => charts.frames.colour(c)));
  charts.bytes.lines(time, [line(3)], { unit: bytes });
  charts.total.lines(time, [line(6, 1, "--soft"), line(5)], { unit: ms });
  charts.tail.lines(time, [line(4)], { unit: ms });
  const all = (column) => rows.reduce((total, r) => total + r[column], 0);
  charts.frames.describe(`Frames of the last five minutes: answered ${all(1)}, refused ${all(2)}`);
  charts.bytes.describe(`Received, now ${bytes(state.minute.bytes_per_s)} a second`);
  const last = rows.findLast((r) => r[5] !== null);
  charts.total.describe(`Time in the server, last median ${last ? ms(last[5]) : "unknown"}`);
  charts.tail.describe(`Tail, last median ${last ? ms(last[4]) : "unknown"}`);
}

function showState(state) {
  for (const row of state.seconds) seconds.set(row[0], row);
  for (const number of seconds.keys()) if (number <= state.now - state.kept_s || number > state.now) seconds.delete(number);
  since = state.now - 2;
  put($("connection"), state.draining ? "ending: takes no new frames" : "serving");
  $("connection").className = `badge ${state.draining ? "bad" : "good"}`;
  showFacts(state);
  showRefused(state);
  fill("models", state.models.map((m) => [
    m.name, m.task, m.sha256, count(m.sessions), count(m.frames.result ?? 0), count(sum(m.frames) - (m.frames.result ?? 0)), bytes(m.payload_bytes),
  ]), [3, 4, 5, 6]);
  showSessions(state);
  draw(state);
}

async function look() {
  try {
    const answer = await fetch(`/api/state?since=${since}`, { signal: AbortSignal.timeout(5000) });
    if (answer.status === 401 || answer.status === 403) { location.replace("/"); return; }
    if (!answer.ok) throw new Error(await answer.text());
    const state = await answer.json();
    if (failures) { since = 0; seconds.clear(); }
    failures = 0;
    $("notice").hidden = true;
    showState(state);
  } catch (error) {
    failures += 1;
    if (failures > 1) {
      $("notice").hidden = false;
      put($("notice"), "The server does not answer; what stands here is old. The page goes on trying.");
      put($("connection"), "server not reached");
      $("connection").className = "badge bad";
    }
  }
}

look();
setInterval(() => { if (!document.hidden) look(); }, 1000);
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
