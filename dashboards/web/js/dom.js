// The little that is needed of the DOM. Text is always set as text, never as markup: names and reasons are other people's.

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function setText(node, text) {
  node.classList.remove("missing");
  if (node.textContent !== text) node.textContent = text;
}

// A value, or a dash that a screen reader calls "not known". What is missing is never 0.
export function setValue(node, text) {
  if (text !== null && text !== undefined) {
    node.classList.remove("missing");
    setText(node, text);
  } else if (!node.classList.contains("missing")) {
    node.classList.add("missing");
    node.replaceChildren(el("span", { "aria-hidden": "true" }, "–"), el("span", { class: "hidden" }, "not known"));
  }
}

export function cell(text, className = "") {
  const node = el("td", { class: className });
  setValue(node, text);
  return node;
}

// Brings the children of a table body to a list of items, reusing rows by key so that focus and selection stay.
export function syncRows(parent, items, key, create, update) {
  const known = new Map([...parent.children].map((row) => [row.dataset.key, row]));
  let at = parent.firstElementChild;
  for (const item of items) {
    const name = String(key(item));
    let row = known.get(name);
    known.delete(name);
    if (!row) {
      row = create(item);
      row.dataset.key = name;
    }
    if (row === at) at = at.nextElementSibling;
    else parent.insertBefore(row, at);
    update(row, item);
  }
  for (const row of known.values()) row.remove();
}

export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Sharp lines on any screen: (2D context, CSS width, CSS height), cleared.
export function canvas2d(canvas) {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width, height];
}

// Polite messages, gathered so that they come no more often than a listener can bear; what somebody asked for comes at once.
const PAUSE_MS = 3000, MOST = 3;
let waiting = [], spokenAt = -PAUSE_MS, timer = null;

function speakNow() {
  timer = null;
  spokenAt = performance.now();
  const more = waiting.length > MOST ? `; and ${waiting.length - MOST} more` : "";
  setText($("announce"), waiting.slice(0, MOST).join("; ") + more);
  waiting = [];
}

export function announce(text, urgent = false) {
  waiting.push(text);
  if (urgent) { clearTimeout(timer); speakNow(); }
  else timer ??= setTimeout(speakNow, Math.max(0, spokenAt + PAUSE_MS - performance.now()));
}
