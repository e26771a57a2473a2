// Numbers for people. Every function answers null for what is not known; the caller shows a gap.

const number = (value, digits) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits, useGrouping: false });
const known = (value) => value !== null && value !== undefined;

export const watts = (mw) => (known(mw) ? `${number(mw / 1000, mw < 100_000 ? 1 : 0)} W` : null);
export const megahertz = (mhz) => (known(mhz) ? `${number(mhz, 0)} MHz` : null);
export const celsius = (c) => (known(c) ? `${number(c, 0)} °C` : null);
export const percent = (value, digits = 0) => (known(value) ? `${number(value, digits)} %` : null);
export const fraction = (value) => (known(value) ? `${number(value * 100, 1)} %` : null);

export function joules(j) {
  if (!known(j)) return null;
  const [scale, unit] = Math.abs(j) >= 3.6e6 ? [3.6e6, "kWh"] : Math.abs(j) >= 1000 ? [1000, "kJ"] : [1, "J"];
  return `${number(j / scale, Math.abs(j / scale) < 100 ? 2 : 0)} ${unit}`;
}

export function duration(s) {
  if (!known(s)) return null;
  if (s < 1) return `${number(s * 1000, 0)} ms`;
  if (s < 100) return `${number(s, s < 10 ? 2 : 1)} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min ${number(s % 60, 0)} s`;
  return `${Math.floor(s / 3600)} h ${number((s % 3600) / 60, 0)} min`;
}

// Whole seconds: what counts down must not flicker.
export const remaining = (s) => (known(s) ? (s < 120 ? `${Math.round(s)} s` : s < 7200 ? `${Math.round(s / 60)} min` : `${number(s / 3600, 1)} h`) : null);

export const clock = (wallNs) => new Date(wallNs / 1e6).toLocaleTimeString("en-GB");
export const moment = (s) => new Date(s * 1000).toLocaleString("en-GB", { dateStyle: "short", timeStyle: "medium" });

export const CONTROLS = { power_limit: "Power limit", sm_clock: "SM clock", memory_clock: "Memory clock" };
export const UNBOUNDED = 1_000_000;
export const ofControl = (control) => (control === "power_limit" ? watts : megahertz);

export function interval(control, value) {
  if (!value) return null;
  const text = ofControl(control);
  if (value.low === value.high) return text(value.low);
  if (value.high >= UNBOUNDED) return `≥ ${text(value.low)}`;
  return value.low === 0 ? `≤ ${text(value.high)}` : `${text(value.low)} to ${text(value.high)}`;
}

export function want(spec) {
  const text = ofControl(spec.control);
  const name = CONTROLS[spec.control] ?? spec.control;
  if (known(spec.low) && known(spec.high)) return spec.low === spec.high ? `${name} ${text(spec.high)}` : `${name} ${text(spec.low)} to ${text(spec.high)}`;
  return known(spec.high) ? `${name} ≤ ${text(spec.high)}` : `${name} ≥ ${text(spec.low)}`;
}

const VERDICTS = {
  pending: "asked for, not confirmed yet", applied: "applied", pending_load: "set; shows under load",
  overridden: "set, but something overrides it", failed: "the driver refused",
};
export const verdict = (outcome) => (outcome ? (VERDICTS[outcome.verdict] ?? outcome.verdict) + (outcome.detail ? ` (${outcome.detail})` : "") : null);

// Clock event reason bits as powerd names them (powerd.model), most telling last.
const REASONS = [
  [0x1, "idle"], [0x2, "applications clocks"], [0x4, "power cap"], [0x8, "hardware slowdown"], [0x10, "sync boost"],
  [0x20, "software thermal"], [0x40, "hardware thermal"], [0x80, "power brake"], [0x100, "display clocks"], [0x200, "board limit"],
  [0x400, "reliability"],
];
export function reasons(bits) {
  if (!known(bits)) return null;
  const names = REASONS.filter(([bit]) => bits & bit).map(([, name]) => name);
  return names.length ? names.join(", ") : "none";
}
