// Small lines in the cells of a table. A time without a value is a gap; the figure beside it is what a screen reader reads.
import { canvas2d, css, el } from "./dom.js";

export function sparkCell() {
  return el("td", { class: "n spark" }, el("canvas", { "aria-hidden": "true" }), el("span", { class: "v" }));
}

// `bound` is drawn as a dashed line: what the values are promised to stay below.
export function drawSpark(canvas, time_s, values, { span_s, gap_s, low, bound = null }) {
  const [context, width, height] = canvas2d(canvas);
  const known = values.filter((value) => value !== null);
  if (!known.length) return;
  const highest = Math.max(...known, bound ?? -Infinity), lowest = Math.min(low ?? highest, ...known);
  const span = highest - lowest || 1, end = time_s.at(-1);
  const at = (value) => height - 2 - ((value - lowest) / span) * (height - 4);
  if (bound !== null) {
    context.strokeStyle = css("--bad");
    context.lineWidth = 1;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(0, at(bound));
    context.lineTo(width, at(bound));
    context.stroke();
    context.setLineDash([]);
  }
  context.strokeStyle = css("--accent");
  context.lineWidth = 1.5;
  context.beginPath();
  let before = null;
  values.forEach((value, i) => {
    const time = time_s[i];
    if (value === null) { before = null; return; }
    const x = width - ((end - time) / span_s) * width, y = at(value);
    if (before === null || time - before > gap_s) { context.moveTo(x, y); context.lineTo(x + 0.5, y); } else context.lineTo(x, y);
    before = time;
  });
  context.stroke();
}
