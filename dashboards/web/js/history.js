// Charts of what is stored. Buckets that nobody stored are null: a gap in the line, "without data" in the table, never 0.
import { ApiError, Poll, get } from "./api.js";
import { $, announce, css, el, setText } from "./dom.js";
import { seriesColour, seriesDash } from "./colours.js";
import { celsius, duration, megahertz, moment, percent, watts } from "./format.js";

const RANGES = [["15m", "15 min", 900, 5], ["1h", "1 h", 3600, 15], ["24h", "24 h", 86400, 60], ["7d", "7 d", 604800, 300]];
const MEASURES = [
  ["power_mw", "Power", "W", 1 / 1000, watts], ["sm_clock_mhz", "SM clock", "MHz", 1, megahertz],
  ["temperature_c", "Temperature", "°C", 1, celsius], ["utilization_percent", "Utilisation", "%", 1, percent],
];
const POINTS = 3700, HEIGHT = 220, TABLE_ROWS = 30;

// All series on one time axis, one bucket after the other, null where there is none.
export function aligned(view, column, factor) {
  const step = Math.max(1, ...view.series.map((series) => series.step_s));
  const first = Math.floor(view.since_s / step) * step;
  const count = Math.max(1, Math.ceil((view.until_s - first) / step));
  const time = Array.from({ length: count }, (_, i) => first + i * step);
  const lines = view.series.map((series) => {
    const line = Array(count).fill(null);
    series.time_s.forEach((t, i) => {
      const value = series.columns[column]?.[i] ?? null;
      const at = Math.round((t - first) / step);
      if (value !== null && at >= 0 && at < count) line[at] = value * factor;
    });
    return line;
  });
  return [time, ...lines];
}

// 24-hour times; days where the span has several.
function label(time, span_s) {
  const date = new Date(time * 1000);
  const day = date.toLocaleDateString("en-GB", { weekday: "short", day: "numeric" });
  if (span_s > 2 * 86400) return date.getHours() === 0 ? day : "";
  return date.toLocaleTimeString("en-GB", span_s < 300 ? {} : { hour: "2-digit", minute: "2-digit" });
}

function figures(line, step) {
  let low = Infinity, high = -Infinity, sum = 0, known = 0, latest = null;
  for (const value of line) {
    if (value === null) continue;
    low = Math.min(low, value); high = Math.max(high, value); sum += value; known += 1; latest = value;
  }
  return known ? { low, high, mean: sum / known, latest, without_s: (line.length - known) * step } : { low: null, high: null, mean: null, latest: null, without_s: line.length * step };
}

class Chart {
  constructor([column, title, unit, factor, show], history) {
    Object.assign(this, { column, title, unit, factor, history });
    this.show = (value) => show(value === null ? null : value / factor) ?? "not known";
    this.readout = el("output", { "aria-live": "off" });
    this.whole = el("button", { type: "button", hidden: true, onclick: () => this.reset() }, `Whole range of ${title.toLowerCase()}`);
    this.box = el("div", { class: "chart", role: "img", tabindex: "0", "data-chart": column });
    this.table = el("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": `${title}, table` });
    this.details = el("details", { ontoggle: () => this.fill() }, el("summary", {}, `${title} as a table`), this.table);
    this.figure = el("figure", {}, el("figcaption", {}, el("span", {}, `${title} (${unit})`), this.whole, this.readout), this.box, this.details);
    this.box.addEventListener("keydown", (key) => this.move(key));
    new ResizeObserver(() => this.plot?.setSize({ width: Math.max(200, this.box.clientWidth), height: HEIGHT })).observe(this.box);
  }

  options(names) {
    const axis = () => ({ stroke: () => css("--muted"), grid: { stroke: () => css("--grid"), width: 1 }, ticks: { stroke: () => css("--grid"), width: 1 } });
    return {
      width: Math.max(200, this.box.clientWidth), height: HEIGHT,
      cursor: { sync: { key: "history" }, drag: { x: true, y: false } },
      scales: { x: { time: true }, y: { range: (u, low, high) => (low === null ? [0, 1] : [Math.min(0, low), high * 1.05 || 1]) } },
      axes: [{ ...axis(), values: (u, ticks) => ticks.map((t) => label(t, u.scales.x.max - u.scales.x.min)) }, { ...axis(), size: 58 }],
      series: [{}, ...names.map((label, i) => ({ label, stroke: () => seriesColour(i), dash: seriesDash(i), width: 1.4, points: { show: false }, spanGaps: false, show: this.history.visible(i) }))],
      hooks: { setCursor: [(u) => this.read(u)], setScale: [(u, name) => { if (name === "x" && this.plot === u) this.whole.hidden = !this.zoomed(); }] },
    };
  }

  draw(view, names) {
    const data = aligned(view, this.column, this.factor);
    this.step = data[0].length > 1 ? data[0][1] - data[0][0] : 1;
    const whole = !this.plot || this.range !== this.history.range || !this.zoomed();
    if (!this.plot || this.names !== names.join()) {
      this.plot?.destroy();
      this.plot = new uPlot(this.options(names), data, this.box);
    } else this.plot.setData(data, whole);
    if (!whole) this.plot.redraw();
    this.names = names.join();
    this.range = this.history.range;
    this.box.setAttribute("aria-label", this.summary(names));
    this.fill();
  }

  zoomed() {
    const { min, max } = this.plot.scales.x, time = this.plot.data[0];
    return min > time[0] || max < time.at(-1);
  }

  reset() {
    const time = this.plot.data[0];
    this.plot.setScale("x", { min: time[0], max: time.at(-1) });
    this.plot.setCursor({ left: -10, top: -10 });
    if (document.activeElement === this.whole) this.box.focus(); // the button goes away
  }

  summary(names) {
    const said = names.map((name, i) => {
      const { low, high, without_s } = figures(this.plot.data[i + 1], this.step);
      return low === null ? `${name} no data` : `${name} ${this.show(low)} to ${this.show(high)}${without_s >= 60 ? `, ${duration(without_s)} without data` : ""}`;
    });
    return `${this.title} over ${this.history.label}: ${said.join("; ")}. Arrow keys move the cursor; a table follows.`;
  }

  at(u) {
    const i = u.cursor.idx;
    if (i === null || i === undefined) return "";
    const values = u.series.slice(1).map((series, n) => (series.show ? `${series.label.replace("GPU ", "")}: ${this.show(u.data[n + 1][i])}` : null)).filter(Boolean);
    return `${moment(u.data[0][i])}  ${values.join("  ")}`;
  }

  read(u) { setText(this.readout, this.at(u)); }

  move(key) {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -60, PageDown: 60 }[key.key];
    const u = this.plot;
    if (!u || (by === undefined && key.key !== "Escape" && key.key !== "Home" && key.key !== "End")) return;
    key.preventDefault();
    const time = u.data[0], [first, last] = u.series[0].idxs; // what is in view
    if (key.key === "Escape") { this.reset(); return; }
    const from = u.cursor.idx ?? last;
    const to = key.key === "Home" ? first : key.key === "End" ? last : Math.min(last, Math.max(first, from + by));
    u.setCursor({ left: Math.min(u.over.clientWidth, Math.max(0, u.valToPos(time[to], "x"))), top: HEIGHT / 3 });
    announce(this.at(u), true);
  }

  // Rows exist only while somebody has the table open.
  fill() {
    if (!this.details.open || !this.plot) return;
    const u = this.plot, labels = u.series.slice(1).map((series) => series.label);
    const head = (...names) => el("thead", {}, el("tr", {}, ...names.map((name, i) => el("th", { scope: "col", class: i ? "n" : "" }, name))));
    const rows = labels.map((label, i) => {
      const f = figures(u.data[i + 1], this.step);
      return el("tr", {}, el("th", { scope: "row" }, label), ...[f.mean, f.low, f.high, f.latest].map((v) => el("td", { class: "n" }, this.show(v))), el("td", { class: "n" }, duration(f.without_s)));
    });
    const stride = Math.max(1, Math.ceil(u.data[0].length / TABLE_ROWS));
    const course = [];
    for (let i = u.data[0].length - 1; i >= 0; i -= stride)
      course.push(el("tr", {}, el("th", { scope: "row" }, moment(u.data[0][i])), ...labels.map((_, n) => el("td", { class: "n" }, this.show(u.data[n + 1][i])))));
    this.table.replaceChildren(
      el("table", {}, el("caption", { class: "hidden" }, `${this.title} over ${this.history.label}, summed up`), head("GPU", "Mean", "Lowest", "Highest", "Latest", "Without data"), el("tbody", {}, ...rows)),
      el("table", {}, el("caption", { class: "hidden" }, `${this.title} over ${this.history.label}, newest first`), head("Time", ...labels), el("tbody", {}, ...course)));
  }
}

export class History {
  constructor(state) {
    this.state = state;
    this.range = "15m";
    this.hiddenGpus = new Set();
    this.charts = MEASURES.map((measure) => new Chart(measure, this));
    $("charts").append(...this.charts.map((chart) => chart.figure));
    RANGES.forEach(([name, label]) => $("ranges").append(el("label", {}, el("input", { type: "radio", name: "range", value: name, checked: name === this.range, onchange: () => this.choose(name) }), label)));
    addEventListener("theme", () => this.theme());
    this.poll = new Poll(RANGES[0][3], () => this.refresh());
  }

  get label() { return RANGES.find(([name]) => name === this.range)[1]; }

  visible(i) { return !this.hiddenGpus.has(this.state.node?.gpus[i]?.gpu.uuid); }

  choose(name) {
    this.range = name;
    this.poll.seconds = RANGES.find(([range]) => range === name)[3];
    setText($("history-state"), "reading …");
    this.poll.now();
  }

  legend(gpus) {
    if ($("shown").querySelectorAll("label").length === gpus.length) return;
    $("shown").replaceChildren($("shown").firstElementChild, ...gpus.map((gpu, i) => {
      const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
      swatch.style.borderTopColor = seriesColour(i);
      swatch.style.borderTopStyle = seriesDash(i).length ? "dashed" : "solid";
      const box = el("input", { type: "checkbox", checked: true, onchange: () => this.toggle(i, gpu.gpu.uuid, box.checked) });
      return el("label", {}, box, swatch, `GPU ${gpu.gpu.index}`);
    }));
  }

  toggle(i, uuid, shown) {
    if (shown) this.hiddenGpus.delete(uuid);
    else this.hiddenGpus.add(uuid);
    for (const chart of this.charts) chart.plot?.setSeries(i + 1, { show: shown });
  }

  theme() {
    $("shown").querySelectorAll(".swatch").forEach((swatch, i) => { swatch.style.borderTopColor = seriesColour(i); });
    for (const chart of this.charts) chart.plot?.redraw();
  }

  async refresh() {
    const gpus = this.state.node?.gpus ?? [];
    if (!gpus.length) return;
    const range = this.range;
    try {
      const chosen = gpus.map((gpu) => `gpu=${encodeURIComponent(gpu.gpu.uuid)}`).join("&");
      const view = await get(`/v1/history?${chosen}&since=${range}&points=${POINTS}&columns=${MEASURES.map(([name]) => name).join()}`);
      if (range !== this.range) return;
      this.legend(gpus);
      for (const chart of this.charts) chart.draw(view, gpus.map((gpu) => `GPU ${gpu.gpu.index}`));
      const step = Math.max(...view.series.map((series) => series.step_s));
      setText($("history-state"), `One point per ${duration(step)}; a gap is a time without samples. Drag to zoom, Escape or a double click to go back.`);
      $("charts").dataset.range = range;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status === 403) this.poll.seconds = 60; // rights change rarely
      setText($("history-state"), `No history: ${error.message}${error.hint ? ` (${error.hint})` : ""}`);
    }
  }
}
