// "Why this clock": /v1/explain as a sentence and a table, and the clock plans that are armed.
import { get } from "./api.js";
import { $, cell, el, setText, setValue, syncRows } from "./dom.js";
import { CONTROLS, interval, ofControl, reasons, remaining, verdict, want } from "./format.js";
import { planStrip } from "./strips.js";

const plans = new Map(); // lease -> views with their clocks

function sentence(page) {
  const control = page.controls.find((c) => c.control === "sm_clock");
  if (!control) return null;
  if (!control.available) return `The SM clock cannot be controlled: ${control.unavailable_reason}.`;
  const setpoint = control.setpoint;
  const now = page.reading?.sm_clock_mhz;
  const running = now === null || now === undefined ? "" : ` It runs at ${now} MHz now.`;
  if (!setpoint?.winner) return `Nobody wants an SM clock of this GPU: it is at its baseline.${running}`;
  const said = control.outcome ? ` (${verdict(control.outcome)})` : "";
  return `SM clock ${interval("sm_clock", setpoint.value) ?? "at baseline"} because of ${setpoint.winner}: ${setpoint.reason || "no reason given"}${said}.${running}`;
}

function winner(page, control) {
  const by = control.setpoint?.winner;
  if (!by) return "nobody: baseline";
  const lease = page.leases.find((candidate) => candidate.id === by);
  return `${by}${lease ? ` of ${lease.user}` : ""}: ${control.setpoint.reason || "no reason given"}`;
}

function controlRow(row, page, control) {
  const show = ofControl(control.control);
  const outcome = control.outcome;
  const cells = row.cells;
  setText(cells[0], CONTROLS[control.control] ?? control.control);
  if (!control.available) {
    setText(cells[1], `cannot be controlled: ${control.unavailable_reason}`);
    for (let i = 2; i < cells.length; i++) setText(cells[i], "");
    return;
  }
  const requested = outcome ? outcome.requested : control.setpoint?.value;
  setText(cells[1], interval(control.control, requested) ?? "baseline");
  setValue(cells[2], interval(control.control, outcome?.accepted));
  setValue(cells[3], show(outcome?.enforced));
  setValue(cells[4], show(outcome?.observed));
  setValue(cells[5], verdict(outcome));
  setText(cells[6], winner(page, control));
  const refused = (control.setpoint?.refused ?? []).map((r) => `${r.want.source} wanted ${interval(control.control, r.want.interval)}: ${r.why}`);
  if (control.setpoint?.deferred_until_ns) refused.push("a step down waits for the minimum dwell");
  setText(cells[7], refused.join("; ") || "nothing");
  setValue(cells[8], interval(control.control, control.device));
  setText(cells[9], interval(control.control, control.site) ?? "none");
  setText(cells[10], interval(control.control, control.baseline) ?? "unlocked");
}

export async function refreshWhy(state) {
  if (!state.selected) return;
  const uuid = state.selected;
  const page = await get(`/v1/explain/${encodeURIComponent(uuid)}`);
  if (uuid !== state.selected) return;
  setText($("why-health"), page.health === "up" ? "" : `health: ${page.health}`);
  setText($("why-sentence"), sentence(page) ?? "");
  syncRows($("why-table").tBodies[0], page.controls, (control) => control.control,
    () => el("tr", {}, el("th", { scope: "row" }), ...Array.from({ length: 10 }, (_, i) => cell(null, [0, 5, 6].includes(i) ? "wrap" : ""))),
    (row, control) => controlRow(row, page, control));
  setValue($("why-reasons"), page.reading ? reasons(page.reading.clock_event_reasons) : null);
  await refreshPlans(page, state);
}

// The clocks of a plan come with its own route only, once; where it stands comes with explain.
async function refreshPlans(page, state) {
  for (const view of page.plans) {
    const known = plans.get(view.lease)?.find((plan) => plan.number === view.number);
    if (!known) plans.set(view.lease, await get(`/v1/leases/${encodeURIComponent(view.lease)}/plans`));
  }
  const capabilities = state.node.gpus.find((gpu) => gpu.gpu.uuid === page.uuid);
  syncRows($("why-plans"), page.plans, (view) => view.number, () => el("div"), (box, view) => {
    const plan = plans.get(view.lease)?.find((candidate) => candidate.number === view.number)?.plan ?? null;
    planStrip(box, view, plan, capabilities?.sm_clocks_mhz ?? []);
  });
  for (const lease of plans.keys()) if (!state.leases.some((candidate) => candidate.id === lease)) plans.delete(lease);
}

export function renderLeases(state) {
  const index = new Map((state.node?.gpus ?? []).map((gpu) => [gpu.gpu.uuid, gpu.gpu.index]));
  $("leases-none").hidden = state.leases.length > 0 || !state.leasesKnown;
  $("lease-table").hidden = !state.leases.length;
  syncRows($("lease-table").tBodies[0], state.leases, (lease) => lease.id,
    () => el("tr", {}, el("th", { scope: "row" }), ...Array.from({ length: 8 }, (_, i) => cell(null, i === 7 ? "n" : [2, 3, 6].includes(i) ? "wrap" : ""))),
    (row, lease) => {
      const cells = row.cells;
      const outcomes = [...new Set(lease.outcomes.map((o) => `${CONTROLS[o.control] ?? o.control} ${verdict(o)}`))];
      const refused = lease.refused.map((r) => `${CONTROLS[r.control] ?? r.control} not served on GPU ${index.get(r.uuid) ?? r.uuid}: ${r.why}`);
      setText(cells[0], lease.id);
      setText(cells[1], lease.user || String(lease.uid));
      setText(cells[2], lease.gpus.map((uuid) => index.get(uuid) ?? uuid).join(", "));
      setText(cells[3], lease.wants.map(want).join("; "));
      setText(cells[4], lease.reason || "no reason given");
      setText(cells[5], lease.job ?? "");
      setText(cells[6], lease.detached ? `${lease.state}, detached` : lease.state);
      setText(cells[7], [...outcomes, ...new Set(refused)].join("; "));
      setValue(cells[8], remaining(lease.expires_in_s));
    });
}
