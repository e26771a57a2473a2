// The table of GPUs: what each does now, with the last two minutes as a line. A time without a sample is a gap in the line.
import { $, announce, cell, el, setText, setValue, syncRows } from "./dom.js";
import { celsius, megahertz, percent, reasons, want, watts } from "./format.js";
import { drawSpark, sparkCell } from "./sparks.js";

const SPAN_S = 120, GAP_S = 3.5; // of the time of the person who looks: a simulated node's may run faster
let pace = 1;
const SPARKS = { power: "power_mw", clock: "sm_clock_mhz", utilisation: "utilization_percent" };
const trails = new Map(); // uuid -> { time_s: [], column: [] }

function trail(uuid) {
  if (!trails.has(uuid)) trails.set(uuid, { time_s: [], ...Object.fromEntries(Object.values(SPARKS).map((name) => [name, []])) });
  return trails.get(uuid);
}

export function setPace(timeScale) { pace = Math.max(1, timeScale ?? 1); }

// What was stored before the page was opened, so that the lines do not begin empty.
export function seed(view) {
  for (const series of view.series) {
    const line = trail(series.uuid);
    const first = line.time_s[0] ?? Infinity;
    const count = series.time_s.filter((t) => t < first).length;
    line.time_s.unshift(...series.time_s.slice(0, count));
    for (const name of Object.values(SPARKS)) line[name].unshift(...(series.columns[name] ?? Array(count).fill(null)).slice(0, count));
  }
}

export function remember(snapshot) {
  const now = snapshot.wall_ns / 1e9;
  for (const reading of snapshot.readings) {
    const line = trail(reading.uuid);
    if (now <= line.time_s.at(-1)) continue;
    line.time_s.push(now);
    for (const name of Object.values(SPARKS)) line[name].push(reading[name]);
    const drop = line.time_s.findIndex((t) => t >= now - SPAN_S * pace);
    if (drop > 0) for (const values of Object.values(line)) values.splice(0, drop);
  }
}

function draw(canvas, line, name, lowest) {
  drawSpark(canvas, line.time_s, line[name], { span_s: SPAN_S * pace, gap_s: GAP_S * pace, low: lowest });
}

export function renderGpus(state, select) {
  const byUuid = new Map((state.snapshot?.readings ?? []).map((reading) => [reading.uuid, reading]));
  const body = $("gpu-table").tBodies[0];
  syncRows(
    body,
    state.node?.gpus ?? [],
    (gpu) => gpu.gpu.uuid,
    (gpu) => el("tr", {},
      el("th", { scope: "row" }, el("button", {
        type: "button", class: "plain", onclick: () => select(gpu.gpu.uuid),
        "aria-label": `GPU ${gpu.gpu.index}, ${gpu.gpu.name}: why is it set as it is`,
      }, `${gpu.gpu.index} ${gpu.gpu.name.replace(/^NVIDIA /, "")}`)),
      sparkCell(), cell(null, "n"), sparkCell(), cell(null, "n"), cell(null, "n"), sparkCell(), cell(null), cell(null, "wrap")),
    (row, gpu) => {
      const { uuid } = gpu.gpu;
      const reading = byUuid.get(uuid) ?? {};
      const cells = row.cells;
      const holders = state.leases.filter((lease) => lease.gpus.includes(uuid) && lease.state !== "ended");
      if (state.selected === uuid) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
      setValue(cells[1].lastChild, watts(reading.power_mw));
      setValue(cells[2], watts(reading.power_limit_enforced_mw));
      setValue(cells[3].lastChild, megahertz(reading.sm_clock_mhz));
      setValue(cells[4], megahertz(reading.memory_clock_mhz));
      setValue(cells[5], celsius(reading.temperature_c));
      setValue(cells[6].lastChild, percent(reading.utilization_percent));
      const health = reading.health && reading.health !== "up" ? `GPU ${reading.health}` : null;
      setValue(cells[7], health ?? reasons(reading.clock_event_reasons));
      setText(cells[8], holders.map((lease) => `${lease.wants.map(want).join(", ")}: ${lease.reason || lease.id}`).join("; ") || "nobody: baseline");
      const line = trail(uuid);
      draw(cells[1].firstChild, line, SPARKS.power, 0);
      draw(cells[3].firstChild, line, SPARKS.clock, 0);
      draw(cells[6].firstChild, line, SPARKS.utilisation, 0);
    },
  );
}

function tile(list, name, value, note) {
  let box = list.querySelector(`[data-tile="${name}"]`);
  if (!box) list.append((box = el("div", { "data-tile": name }, el("dt", {}, name), el("dd", {}, el("span"), el("small")))));
  setValue(box.querySelector("dd span"), value);
  setText(box.querySelector("small"), note);
}

export function renderTiles(state) {
  const readings = state.snapshot?.readings ?? [];
  const sum = (name) => {
    const known = readings.map((reading) => reading[name]).filter((value) => value !== null && value !== undefined);
    return [known.length ? known.reduce((a, b) => a + b, 0) : null, known.length];
  };
  const total = state.node?.gpus.length ?? 0;
  const of = (count) => (count === total ? `all ${total} GPUs` : `${count} of ${total} GPUs are known`);
  const list = $("tiles");
  const [power, powered] = sum("power_mw");
  const [limit, limited] = sum("power_limit_enforced_mw");
  tile(list, "Power now", watts(power), of(powered));
  tile(list, "Power limits", watts(limit), of(limited));
  tile(list, "Leases", String(state.leases.length), "that you may see");
  const running = state.jobs.filter((job) => job.state === "running").length;
  tile(list, "Jobs running", String(running), `${state.jobs.length} known`);
  // Weighted by energy. A job whose saving was not measured counts for nothing: no estimate stands in for it.
  const measured = state.jobs.filter((job) => job.saving_fraction !== null && job.energy_j > 0);
  const energy = measured.reduce((a, job) => a + job.energy_j, 0);
  const saving = measured.length ? measured.reduce((a, job) => a + job.saving_fraction * job.energy_j, 0) / energy : null;
  const note = measured.length ? `per step; measured by ${measured.length} of ${state.jobs.length} jobs` : "no job has measured a baseline";
  tile(list, "Saving so far", saving === null ? "not measured" : `${(saving * 100).toFixed(1)} %`, note);
}

const SPOKEN = { lease_granted: "lease granted", lease_ended: "lease ended", gpu_lost: "GPU lost", panic: "panic", quiesced: "quiesced", resumed: "resumed",
  replica_stale: "replica stale, at full clock", replica_recovered: "replica recovered" };

export function renderEvents(state) {
  const index = new Map((state.node?.gpus ?? []).map((gpu) => [gpu.gpu.uuid, `GPU ${gpu.gpu.index}`]));
  syncRows($("event-table").tBodies[0], state.events, (event) => event.seq, (event) => el("tr", {},
    el("td", {}, new Date(event.wall_ns / 1e6).toLocaleTimeString("en-GB")), el("td", {}, event.kind.replaceAll("_", " ")),
    cell(""), cell(event.subject ?? ""), cell(event.detail, "wrap")),
  (row, event) => setText(row.cells[2], event.uuid ? (index.get(event.uuid) ?? event.uuid) : ""));
}

export function speak(event) {
  if (SPOKEN[event.kind]) announce(`${SPOKEN[event.kind]}: ${event.subject ?? ""} ${event.detail}`.trim());
}
