// Timelines coloured by clock: a plan's instructions, and a job's GPUs over time. Each has its figures as text beside it.
import { canvas2d, css, el, setText } from "./dom.js";
import { clockColour } from "./colours.js";
import { duration, megahertz, moment } from "./format.js";

export function scale(low, high) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const box = el("div", { class: "scale" }, `${low} MHz`, canvas, `${high} MHz`);
  requestAnimationFrame(() => {
    const [context, width, height] = canvas2d(canvas);
    for (let x = 0; x < width; x++) { context.fillStyle = clockColour(x, 0, width); context.fillRect(x, 0, 1.5, height); }
  });
  return box;
}

// Neighbours of one clock together: [first, last, MHz].
export function runs(clocks) {
  const found = [];
  clocks.forEach((mhz, i) => {
    if (found.length && found.at(-1)[2] === mhz) found.at(-1)[1] = i;
    else found.push([i, i, mhz]);
  });
  return found;
}

export function planStrip(box, view, plan, supported) {
  if (!box.firstChild) {
    box.append(el("h3"), el("p", { class: "quiet" }));
    if (plan) {
      const low = Math.min(...plan.clocks_mhz, supported[0] ?? Infinity), high = Math.max(...plan.clocks_mhz, supported.at(-1) ?? 0);
      box.scale = [low, high];
      const parts = runs(plan.clocks_mhz);
      box.append(
        el("div", { class: "strip" }, el("span", {}, "one iteration"), el("canvas", {
          role: "img", "aria-label": `Clocks of ${plan.clocks_mhz.length} instructions, ${Math.min(...plan.clocks_mhz)} to ${Math.max(...plan.clocks_mhz)} MHz, ${parts.length - 1} changes`,
        })),
        scale(low, high),
        el("p", { class: "quiet" }, "Instructions in their order, all drawn equally wide: how long each takes is not part of a plan."),
        el("details", {}, el("summary", {}, "Clocks as a table"), el("table", {},
          el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Instructions"), el("th", { scope: "col", class: "n" }, "SM clock"))),
          el("tbody", {}, ...parts.map(([first, last, mhz]) => el("tr", {},
            el("td", {}, first === last ? String(first) : `${first} to ${last}`), el("td", { class: "n" }, megahertz(mhz))))))));
    } else box.append(el("p", { class: "quiet" }, "Its clocks are not known: it was armed before this powerd started."));
  }
  setText(box.children[0], `Clock plan ${view.id} of lease ${view.lease}`);
  const at = view.index === null ? "no beat yet" : `step ${view.step}, instruction ${view.index} of ${view.instructions}`;
  const cut = view.ceiling_mhz === null ? "" : `, cut to ${view.ceiling_mhz} MHz`;
  const time = plan ? `, planned iteration ${duration(plan.iteration_s)}, safe clock ${megahertz(plan.safe_mhz) ?? "the lease's own"}` : "";
  setText(box.children[1], `${view.state}${view.why ? ` (${view.why})` : ""}: ${at}${cut}, ${view.switches} clocks set${time}`);
  if (!plan) return;
  const [context, width, height] = canvas2d(box.querySelector(".strip canvas"));
  const step = width / plan.clocks_mhz.length;
  for (const [first, last, mhz] of runs(plan.clocks_mhz)) {
    context.fillStyle = clockColour(Math.min(mhz, view.ceiling_mhz ?? mhz), ...box.scale);
    context.fillRect(first * step, 0, (last - first + 1) * step + 0.5, height);
  }
  if (view.index !== null) {
    context.strokeStyle = css("--text");
    context.lineWidth = 2;
    context.strokeRect(view.index * step, 1, Math.max(2, step), height - 2);
  }
}

// One row per GPU over the time of a job; a bucket without a sample stays empty.
export function jobStrip(box, job, view, gpus) {
  const clocks = view.series.flatMap((series) => series.columns.sm_clock_mhz ?? []).filter((value) => value !== null);
  const supported = gpus.flatMap((gpu) => gpu.sm_clocks_mhz);
  const low = Math.min(...clocks, supported.length ? Math.min(...supported) : Infinity);
  const high = Math.max(...clocks, supported.length ? Math.max(...supported) : 0);
  box.hidden = false;
  box.replaceChildren(el("h3", { id: "job-timeline-title" }, `SM clock during job ${job.job}`),
    el("p", { class: "quiet" }, `${moment(view.since_s)} to ${moment(view.until_s)}; a gap is a time without samples.`));
  if (!clocks.length) { box.append(el("p", {}, "No sample of its GPUs is stored for this time.")); return; }
  const strip = el("div", { class: "strip" });
  const body = el("tbody");
  for (const series of view.series) {
    const name = `GPU ${gpus.find((gpu) => gpu.gpu.uuid === series.uuid)?.gpu.index ?? series.uuid}`;
    const values = series.columns.sm_clock_mhz ?? [];
    const known = values.filter((value) => value !== null);
    const canvas = el("canvas", { role: "img", "aria-label": `${name}: ${known.length ? `SM clock ${Math.round(Math.min(...known))} to ${Math.round(Math.max(...known))} MHz` : "no sample"}` });
    strip.append(el("span", {}, name), canvas);
    const mean = known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
    const row = [megahertz(mean), megahertz(known.length ? Math.min(...known) : null), megahertz(known.length ? Math.max(...known) : null)];
    const silent = Math.max(0, view.until_s - view.since_s - known.length * series.step_s);
    body.append(el("tr", {}, el("th", { scope: "row" }, name), ...row.map((text) => el("td", { class: "n" }, text ?? "not known")),
      el("td", { class: "n" }, duration(Math.round(silent)))));
    requestAnimationFrame(() => {
      const [context, width, height] = canvas2d(canvas);
      const x = (time) => ((time - view.since_s) / (view.until_s - view.since_s)) * width;
      values.forEach((value, i) => {
        if (value === null) return;
        context.fillStyle = clockColour(value, low, high);
        context.fillRect(x(series.time_s[i]), 0, x(series.time_s[i] + series.step_s) - x(series.time_s[i]) + 0.5, height);
      });
    });
  }
  const heads = ["GPU", "Mean", "Lowest", "Highest", "Without data"].map((text, i) => el("th", { scope: "col", class: i ? "n" : "" }, text));
  box.append(strip, scale(Math.round(low), Math.round(high)),
    el("details", {}, el("summary", {}, "SM clocks as a table"), el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body)));
}
