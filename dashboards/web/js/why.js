// "Why this clock": /v1/explain as a sentence and a table, and the clock plans that are armed.
import { ApiError, get } from "./api.js";
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

// What is told of each control, a row each; an answer of null is "not known".
const FACTS = [
  ["Requested", (page, c) => interval(c.control, c.outcome ? c.outcome.requested : c.setpoint?.value) ?? "baseline"],
  ["Accepted", (page, c) => interval(c.control, c.outcome?.accepted)],
  ["Enforced", (page, c) => ofControl(c.control)(c.outcome?.enforced ?? (c.control === "power_limit" ? page.reading?.power_limit_enforced_mw : null))],
  ["Observed", (page, c) => ofControl(c.control)(c.outcome?.observed)],
  ["Verdict", (page, c) => (c.outcome ? verdict(c.outcome) : "nothing was asked for")],
  ["Winner", winner],
  ["Not served", (page, c) => refused(c) || "nothing"],
  ["Device limits", (page, c) => interval(c.control, c.device)],
  ["Site limits", (page, c) => interval(c.control, c.site) ?? "none"],
  ["Baseline", (page, c) => interval(c.control, c.baseline) ?? "unlocked"],
  ["Last change by", (page, c) => c.last_change_by ?? "nobody"],
];

function refused(control) {
  const said = (control.setpoint?.refused ?? []).map((r) => `${r.want.source} wanted ${interval(control.control, r.want.interval)}: ${r.why}`);
  if (control.setpoint?.deferred_until_ns) said.push("a step down waits for the minimum dwell");
  return said.join("; ");
}

function controls(table, page) {
  if (table.tHead.rows[0].cells.length !== page.controls.length + 1)
    table.tHead.rows[0].append(...page.controls.map((c) => el("th", { scope: "col" }, CONTROLS[c.control] ?? c.control)));
  syncRows(table.tBodies[0], FACTS, ([name]) => name,
    ([name]) => el("tr", {}, el("th", { scope: "row" }, name), ...page.controls.map(() => cell(null, "wrap"))),
    (row, [name, tell]) => page.controls.forEach((c, i) => {
      const outOfReach = name === FACTS[0][0] ? `cannot be controlled: ${c.unavailable_reason}` : "";
      setValue(row.cells[i + 1], c.available ? tell(page, c) : outOfReach);
    }));
}

export async function refreshWhy(state) {
  if (!state.selected) return;
  const uuid = state.selected;
  let page;
  try { page = await get(`/v1/explain/${encodeURIComponent(uuid)}`); } catch (error) {
    if (!(error instanceof ApiError) || error.status >= 500) throw error; // a lost connection is said elsewhere
    setText($("why-sentence"), `Not to be seen: ${error.message}${error.hint ? ` (${error.hint})` : ""}.`);
    $("why-table").tBodies[0].replaceChildren();
    $("why-plans").replaceChildren();
    setValue($("why-reasons"), null);
    return;
  }
  if (uuid !== state.selected) return;
  setText($("why-health"), page.health === "up" ? "" : `health: ${page.health}`);
  setText($("why-sentence"), sentence(page) ?? "");
  controls($("why-table"), page);
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
