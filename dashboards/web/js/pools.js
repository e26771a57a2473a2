// Inference pools and their replicas, as the daemon follows them. Latencies are judged by the daemon; here they are only shown.
import { get } from "./api.js";
import { $, cell, el, setText, setValue, syncRows } from "./dom.js";
import { duration, joules, megahertz, percent, remaining, watts } from "./format.js";
import { drawSpark, sparkCell } from "./sparks.js";

const SPAN_S = 120, GAP_S = 7; // a look every two seconds, of the time of the person who looks
const TRAILS = ["ttft_p99_s", "tbt_p99_s", "power_w"];
const STATES = { fresh: "good", idle: "", starting: "", stale: "warn" };
const trails = new Map(); // id of a replica -> { time_s: [], column: [] }
let served = null; // whether this daemon knows of replicas

function remember(replicas) {
  const now = performance.now() / 1000;
  for (const replica of replicas) {
    if (!trails.has(replica.id)) trails.set(replica.id, { time_s: [], ...Object.fromEntries(TRAILS.map((name) => [name, []])) });
    const line = trails.get(replica.id);
    line.time_s.push(now);
    for (const name of TRAILS) line[name].push(replica[name]);
    const drop = line.time_s.findIndex((time) => time >= now - SPAN_S);
    if (drop > 0) for (const values of Object.values(line)) values.splice(0, drop);
  }
  for (const id of trails.keys()) if (!replicas.some((replica) => replica.id === id)) trails.delete(id);
}

// An older daemon has no such route; asking for it would only fill the console.
export async function fetchReplicas() {
  served ??= "/v1/replicas" in (await get("/openapi.json")).paths;
  const replicas = served ? await get("/v1/replicas") : [];
  remember(replicas);
  return replicas;
}

const known = (values) => values.filter((value) => value !== null && value !== undefined);
const sum = (values) => (known(values).length ? known(values).reduce((a, b) => a + b, 0) : null);
const count = (value) => (value === null || value === undefined ? null : String(value));
const rate = (value) => (value === null ? null : `${value.toFixed(value < 10 ? 2 : 1)} /s`);
const power = (value) => watts(value === null ? null : value * 1000);

// "200 ms of 500 ms": so much of what is promised; a miss is said, not only coloured.
function latency(node, value_s, slo_s) {
  const promised = slo_s !== null, missed = promised && value_s !== null && value_s > slo_s;
  setValue(node, value_s === null ? null : `${missed ? "missed: " : ""}${duration(value_s)}${promised ? ` of ${duration(slo_s)}` : ""}`);
  node.classList.toggle("miss", missed);
}

// The slowest replica against its own promise stands for the pool.
function worst(members, name, promise) {
  const told = members.filter((replica) => replica[name] !== null && replica.slo[promise] !== null);
  if (!told.length) return [null, null];
  const slowest = told.reduce((a, b) => (b[name] / b.slo[promise] > a[name] / a.slo[promise] ? b : a));
  return [slowest[name], slowest.slo[promise]];
}

function grouped(replicas) {
  const pools = new Map();
  for (const replica of replicas) {
    const key = `${replica.pool} TP${replica.tp}`;
    if (!pools.has(key)) pools.set(key, []);
    pools.get(key).push(replica);
  }
  return [...pools].sort(([a], [b]) => a.localeCompare(b));
}

function stood(members) {
  const states = new Map();
  for (const { state } of members) states.set(state, (states.get(state) ?? 0) + 1);
  return [...states].map(([state, number]) => `${number} ${state}`).join(", ");
}

function energy(members) {
  const told = members.filter((replica) => replica.energy_j !== null && replica.energy_window_s >= 1);
  if (!told.length) return null;
  return `${joules(sum(told.map((replica) => replica.energy_j)))} in ${remaining(Math.max(...told.map((replica) => replica.energy_window_s)))}`;
}

function renderPools(replicas) {
  syncRows($("pool-table").tBodies[0], grouped(replicas), ([key]) => key,
    () => el("tr", {}, el("th", { scope: "row" }), ...Array.from({ length: 10 }, (_, i) => cell(null, i === 1 ? "" : "n"))),
    (row, [, members]) => {
      const { cells } = row, judged = members.filter((replica) => replica.within_slo !== null);
      setText(cells[0], members[0].pool);
      setText(cells[1], String(members[0].tp));
      setText(cells[2], stood(members));
      setValue(cells[3], judged.length ? `${judged.filter((replica) => replica.within_slo).length} of ${judged.length}` : null);
      latency(cells[4], ...worst(members, "ttft_p99_s", "ttft_s"));
      latency(cells[5], ...worst(members, "tbt_p99_s", "tbt_s"));
      setValue(cells[6], count(sum(members.map((replica) => replica.running))));
      setValue(cells[7], count(sum(members.map((replica) => replica.waiting))));
      setValue(cells[8], rate(sum(members.map((replica) => replica.requests_per_s))));
      setValue(cells[9], power(sum(members.map((replica) => replica.power_w))));
      setValue(cells[10], energy(members));
    });
}

function mean(values) {
  return known(values).length ? sum(values) / known(values).length : null;
}

function why(replica) {
  const age = replica.state === "stale" && replica.age_s !== null ? `; last good metrics ${remaining(replica.age_s)} ago` : "";
  const note = replica.note && !replica.reason.includes(replica.note) ? `; ${replica.note}` : "";
  return replica.reason + note + age;
}

function replicaRow(replica, select) {
  const button = el("button", { type: "button", class: "plain", onclick: () => select(replica.gpus[0]), "aria-label": `Replica ${replica.name}: why is its clock as it is` }, replica.name);
  return el("tr", {}, el("th", { scope: "row" }, button), cell(null), cell(null, "n"), cell(null), el("td", {}, el("span", { class: "badge" })),
    cell(null, "n"), cell(null, "n"), cell(null, "why"), sparkCell(), sparkCell(), cell(null, "n"), cell(null, "n"), cell(null, "n"), sparkCell(), cell(null, "n"));
}

function renderReplicas(state, select) {
  const index = new Map((state.node?.gpus ?? []).map((gpu) => [gpu.gpu.uuid, gpu.gpu.index]));
  const clocks = new Map((state.snapshot?.readings ?? []).map((reading) => [reading.uuid, reading.sm_clock_mhz]));
  const sorted = [...state.replicas].sort((a, b) => a.pool.localeCompare(b.pool) || a.name.localeCompare(b.name));
  syncRows($("replica-table").tBodies[0], sorted, (replica) => replica.id, (replica) => replicaRow(replica, select),
    (row, replica) => {
      const { cells } = row, line = trails.get(replica.id), badge = cells[4].firstChild;
      setText(cells[1], replica.pool);
      setText(cells[2], String(replica.tp));
      setText(cells[3], replica.gpus.map((uuid) => index.get(uuid) ?? uuid).join(", "));
      badge.className = `badge ${STATES[replica.state] ?? ""}`;
      setText(badge, replica.state);
      setValue(cells[5], megahertz(mean(replica.gpus.map((uuid) => clocks.get(uuid)))));
      setText(cells[6], replica.clock_mhz === null ? "full clock" : `≤ ${megahertz(replica.clock_mhz)}`);
      setText(cells[7], why(replica));
      latency(cells[8].lastChild, replica.ttft_p99_s, replica.slo.ttft_s);
      latency(cells[9].lastChild, replica.tbt_p99_s, replica.slo.tbt_s);
      setValue(cells[10], count(replica.running));
      setValue(cells[11], count(replica.waiting));
      setValue(cells[12], percent(replica.kv_used_ratio === null ? null : replica.kv_used_ratio * 100));
      setValue(cells[13].lastChild, power(replica.power_w));
      setValue(cells[14], energy([replica]));
      if (!line) return;
      const drawn = { span_s: SPAN_S, gap_s: GAP_S, low: 0 };
      drawSpark(cells[8].firstChild, line.time_s, line.ttft_p99_s, { ...drawn, bound: replica.slo.ttft_s });
      drawSpark(cells[9].firstChild, line.time_s, line.tbt_p99_s, { ...drawn, bound: replica.slo.tbt_s });
      drawSpark(cells[13].firstChild, line.time_s, line.power_w, drawn);
    });
}

// A node that never had a replica while somebody looked shows no empty section.
export function renderInference(state, select) {
  const { replicas } = state;
  if (replicas.length) $("pools").hidden = $("pools-link").hidden = false;
  $("pools-none").hidden = replicas.length > 0;
  $("pools-tables").hidden = !replicas.length;
  renderPools(replicas);
  renderReplicas(state, select);
}
