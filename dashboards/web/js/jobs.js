// Jobs as they report themselves, and the clocks of one of them over its time. Pools only where the daemon has them.
import { ApiError, get } from "./api.js";
import { $, cell, el, setText, setValue, syncRows } from "./dom.js";
import { duration, fraction, joules } from "./format.js";
import { jobStrip } from "./strips.js";

export function renderJobs(state, select) {
  const index = new Map((state.node?.gpus ?? []).map((gpu) => [gpu.gpu.uuid, gpu.gpu.index]));
  $("jobs-none").hidden = state.jobs.length > 0 || !state.jobsKnown;
  $("job-table").hidden = !state.jobs.length;
  syncRows($("job-table").tBodies[0], state.jobs, (job) => job.job,
    (job) => el("tr", {}, el("th", { scope: "row" }, el("button", { type: "button", class: "plain", onclick: () => select(job.job), "aria-label": `Job ${job.job}: its clocks over time` }, job.job)),
      ...Array.from({ length: 9 }, (_, i) => cell(null, i >= 2 && i <= 7 ? "n" : ""))),
    (row, job) => {
      const cells = row.cells;
      if (state.job === job.job) row.setAttribute("aria-current", "true");
      else row.removeAttribute("aria-current");
      const all = job.steps + job.lost_steps;
      setText(cells[1], job.last_detail && job.state === "failed" ? `failed: ${job.last_detail}` : job.state);
      setText(cells[2], job.gpus.map((uuid) => index.get(uuid) ?? uuid).join(", "));
      setText(cells[3], job.lost_steps ? `${job.steps} (${job.lost_steps} lost)` : String(job.steps));
      setValue(cells[4], all ? fraction(job.steps / all) : null);
      setValue(cells[5], duration(job.time_s));
      setValue(cells[6], joules(job.energy_j) && joules(job.energy_j) + (job.unmeasured_steps ? ` without ${job.unmeasured_steps} steps` : ""));
      setValue(cells[7], joules(job.energy_per_retained_step_j));
      setText(cells[8], fraction(job.saving_fraction) ?? "not measured");
      setText(cells[9], job.plan ?? "none");
    });
}

export async function refreshTimeline(state) {
  const job = state.jobs.find((candidate) => candidate.job === state.job);
  const box = $("job-timeline");
  if (!job) { box.hidden = true; return; }
  if (!job.gpus.length) { box.hidden = false; box.replaceChildren(el("p", {}, `Job ${job.job} has reported no step yet: its GPUs are not known.`)); return; }
  const gpus = job.gpus.map((uuid) => `gpu=${encodeURIComponent(uuid)}`).join("&");
  const since = job.begin_wall_ns / 1e9;
  const until = job.end_wall_ns === null ? "" : `&until=${Math.max(since + 1, job.end_wall_ns / 1e9)}`;
  try {
    const view = await get(`/v1/history?${gpus}&since=${since}${until}&points=600&columns=sm_clock_mhz`);
    if (state.job === job.job) jobStrip(box, job, view, state.node.gpus.filter((gpu) => job.gpus.includes(gpu.gpu.uuid)));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    box.hidden = false;
    box.replaceChildren(el("p", {}, `Its clocks over time cannot be shown: ${error.message}.`));
  }
}

// A daemon without inference has no such route; asking for it would only fill the console.
export async function poolsExist() {
  const document = await get("/openapi.json");
  return "/v1/replicas" in document.paths;
}

export async function refreshPools() {
  const replicas = await get("/v1/replicas");
  const rows = Array.isArray(replicas) ? replicas : (replicas.replicas ?? []);
  $("pools").hidden = $("pools-link").hidden = !rows.length;
  const plain = (value) => value === null || typeof value !== "object";
  const names = [...new Set(rows.flatMap((row) => Object.keys(row).filter((name) => plain(row[name]))))];
  const table = $("pool-table");
  table.tHead.replaceChildren(el("tr", {}, ...names.map((name) => el("th", { scope: "col" }, name.replaceAll("_", " ")))));
  table.tBodies[0].replaceChildren(...rows.map((row) => el("tr", {}, ...names.map((name) => cell(row[name] === null || row[name] === undefined ? null : String(row[name]))))));
}
