// Colours that mean something: one per GPU (and a dash pattern, since eight hues are too many for some eyes), and a scale for clocks.

const LIGHT = ["#0072b2", "#c04a00", "#00794f", "#a8327d", "#6a5400", "#2a7fb8", "#7a3fb5", "#4d4d4d"];
const DARK = ["#56b4e9", "#ff9a4d", "#2fd0a0", "#f092cc", "#f0e442", "#9cc9ff", "#c3a0ff", "#c8c8c8"];
const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3]];

const dark = () => document.documentElement.dataset.theme === "dark";
export const seriesColour = (index) => (dark() ? DARK : LIGHT)[index % 8];
export const seriesDash = (index) => DASHES[(Math.floor(index / 8) * 2 + (index % 8 >= 4 ? 1 : 0)) % DASHES.length];

// From slow (dark blue) to fast (yellow): rises in lightness too, so that it reads without hue.
const STOPS = [[38, 34, 98], [49, 84, 142], [33, 129, 141], [56, 170, 116], [150, 205, 60], [247, 222, 53]];
export function clockColour(mhz, low, high) {
  const at = high > low ? Math.min(1, Math.max(0, (mhz - low) / (high - low))) * (STOPS.length - 1) : STOPS.length - 1;
  const i = Math.min(STOPS.length - 2, Math.floor(at));
  const part = at - i;
  return `rgb(${STOPS[i].map((v, n) => Math.round(v + (STOPS[i + 1][n] - v) * part)).join(" ")})`;
}
