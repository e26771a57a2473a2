// The page: one state, one stream, a few polls. What changed is asked for again at once; nothing is computed that the API can say.
import { ApiError, Poll, Stream, get } from "./api.js";
import { $, announce, el, setText, syncRows } from "./dom.js";
import { History } from "./history.js";
import { refreshTimeline, renderJobs } from "./jobs.js";
import { remember, renderEvents, renderGpus, renderTiles, seed, setPace, speak } from "./gpus.js";
import { fetchReplicas, renderInference } from "./pools.js";
import { refreshWhy, renderLeases } from "./why.js";

const LIVE_HZ = 2, KEPT_EVENTS = 100, STALE_S = 5;
const state = { node: null, snapshot: null, leases: [], leasesKnown: false, jobs: [], jobsKnown: false, replicas: [], events: [], selected: null, job: null };
const wall = () => new Date().toLocaleTimeString("en-GB");

function badges() {
  const { node } = state;
  if (!node) return;
  document.title = `${node.hostname}: powerd`;
  setText($("host"), node.hostname);
  const scaled = node.time_scale !== null && node.time_scale !== 1 ? (node.time_scale === 0 ? ", stepped time" : `, time ×${node.time_scale}`) : "";
  const shown = [
    node.simulated && ["simulated" + scaled, "warn"],
    node.panic && ["panic: all at baseline", "bad"],
    node.quiesced && ["quiesced", "warn"],
    !node.control && [node.control_why || "monitor only", node.panic || node.quiesced ? "" : "warn"],
    !node.hw_connected && ["powerd-hw is not connected", "bad"],
    !node.config_reload_ok && [`configuration refused: ${node.config_error}`, "bad"],
    node.driver_version && [`driver ${node.driver_version}`, ""],
    [`powerd ${node.version}`, ""],
  ].filter(Boolean);
  syncRows($("badges"), shown, ([text]) => text, () => el("span", { class: "badge" }), (span, [text, kind]) => { span.className = `badge ${kind}`; setText(span, text); });
}

function choices() {
  const select = $("why-gpu");
  if (select.options.length === state.node.gpus.length) return;
  select.replaceChildren(...state.node.gpus.map((gpu) => el("option", { value: gpu.gpu.uuid }, `${gpu.gpu.index} ${gpu.gpu.name}`)));
  if (!state.node.gpus.some((gpu) => gpu.gpu.uuid === state.selected)) state.selected = state.node.gpus[0]?.gpu.uuid ?? null;
  select.value = state.selected;
}

function link(name, text) {
  const badge = $("link");
  if (badge.dataset.state !== name || badge.textContent !== text) { badge.dataset.state = name; setText(badge, text); }
  document.body.dataset.link = name;
}

function render() {
  renderGpus(state, select);
  renderTiles(state);
}

function select(uuid) {
  state.selected = uuid;
  $("why-gpu").value = uuid;
  polls.why.now();
  render();
  $("why").scrollIntoView({ block: "nearest" });
  announce(`Why this clock: GPU ${state.node.gpus.find((gpu) => gpu.gpu.uuid === uuid)?.gpu.index}`, true);
}

function selectJob(job) {
  state.job = state.job === job ? null : job;
  renderJobs(state, selectJob);
  polls.timeline.now();
}

async function allowed(path, otherwise) {
  try { return await get(path); } catch (error) {
    if (error instanceof ApiError && error.status === 403) return otherwise; // this user may not see it; the rest goes on
    throw error;
  }
}

const polls = {
  node: new Poll(5, async () => {
    const first = !state.node;
    state.node = await get("/v1/node");
    setPace(state.node.time_scale);
    badges();
    choices();
    render();
    if (first) { renderEvents(state); polls.why.now(); history.poll.now(); }
  }),
  leases: new Poll(2, async () => {
    state.leases = (await get("/v1/leases")).filter((lease) => lease.state !== "ended");
    state.leasesKnown = true;
    renderLeases(state);
    render();
  }),
  why: new Poll(2, () => (state.node ? refreshWhy(state) : null)),
  jobs: new Poll(3, async () => {
    state.jobs = await allowed("/v1/jobs", []);
    state.jobsKnown = true;
    renderJobs(state, selectJob);
    renderTiles(state);
  }),
  pools: new Poll(2, async () => {
    state.replicas = await fetchReplicas();
    renderInference(state, select);
  }),
  timeline: new Poll(10, () => refreshTimeline(state)),
};
const history = new History(state);

let soon = null;
const handlers = {
  snapshot(view) {
    state.snapshot = view;
    remember(view);
    render();
    link(view.age_s > STALE_S ? "stale" : "live", view.age_s > STALE_S ? `samples are ${Math.round(view.age_s)} s old` : "live");
    handlers.seen = wall();
  },
  event(event) {
    state.events.unshift(event);
    state.events.length = Math.min(state.events.length, KEPT_EVENTS);
    renderEvents(state);
    speak(event);
    clearTimeout(soon); // several come together
    soon = setTimeout(() => { polls.leases.now(); polls.why.now(); polls.node.now(); polls.pools.now(); }, 100);
  },
  state(name, why, wait) {
    const lost = $("lost");
    if (name === "live") {
      lost.hidden = true;
      link("live", "live");
      Object.values(polls).forEach((poll) => poll.now());
      history.poll.now();
      return;
    }
    link("down", "no connection");
    lost.hidden = false;
    const seen = handlers.seen ? ` Figures are from ${handlers.seen}.` : "";
    setText(lost, `No connection: ${why}.${seen}${wait === null ? "" : " Trying again."}`);
  },
};

async function begin() {
  try {
    state.events = (await get(`/v1/events?limit=${KEPT_EVENTS}`)).reverse();
    renderEvents(state);
    seed(await get("/v1/history?since=2m&points=120&columns=power_mw,sm_clock_mhz,utilization_percent"));
  } catch { /* what fails here is said where it is shown */ }
}

$("why-gpu").addEventListener("change", (change) => select(change.target.value));
addEventListener("theme", () => { render(); renderInference(state, select); });
begin();
new Stream(LIVE_HZ, handlers);
