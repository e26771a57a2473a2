// Jobs as they report themselves, and the clocks of one of them over its time.
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
