// What all parts of the page use. Everything comes from the JSON block; text enters the page as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const runs = new Map(data.runs.map((run) => [run.id, run]));
const labels = Object.keys(data.methods);
const done = data.runs.filter((run) => run.state === "done");

function put(parent, tag, attributes = {}, ...children) {
  const space = tag in { svg: 1, g: 1, path: 1, line: 1, text: 1, polyline: 1 } || parent instanceof SVGElement;
  const node = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== undefined));
  parent.append(node);
  return node;
}
const colour = (label) => `var(${data.methods[label].colour})`;
function mark(parent, label) {
  const svg = put(parent, "svg", { class: "mark", viewBox: "-1.2 -1.2 2.4 2.4", "aria-hidden": "true" });
  put(svg, "path", { d: data.methods[label].outline, fill: colour(label) });
}
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
// Half the 95 % interval of the mean; data.bars has its length in standard deviations, by the number of values.
const halfInterval = (values) =>
  data.bars[values.length] ? data.bars[values.length] * Math.sqrt(values.reduce((sum, v) => sum + (v - mean(values)) ** 2, 0) / (values.length - 1)) : null;
const whole = (value) => Math.round(value).toLocaleString("en-US");
const short = (value) => {
  const [unit, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([u]) => Math.abs(value) >= u) ?? [1, ""];
  return `${+(value / unit).toPrecision(3)}${letter}`;
};
const written = {
  share: (value) => (100 * value).toFixed(2), count: whole, seconds: (value) => value.toFixed(value < 100 ? 1 : 0),
  bytes: (value) => (value / 2 ** 20).toFixed(2), rate: (value) => value.toFixed(1), ratio: (value) => value.toFixed(3),
  flops: short, state: (value) => data.states[value],
};
const shown = (value, kind) => (value === null || value === undefined ? "–" : (written[kind] ?? String)(value));

// Theme: the system's, until the button is used.
const root = document.documentElement;
const storedTheme = (value) => { try { value ? localStorage.setItem("theme", value) : (value = localStorage.getItem("theme")); } catch { /* no storage */ } return value; };
if (storedTheme()) root.dataset.theme = storedTheme();
$("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = storedTheme(dark ? "light" : "dark");
});

function fill(select, options) {
  for (const [value, name] of options) put(select, "option", { value }, name);
}

// Scales: the position of a value, and the ticks.
function linear(values, from, to, wanted = 5) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || Math.abs(high) || 1) * 0.08;
  [low, high] = [low - pad, high + pad];
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) ticks.push(+(n * step).toPrecision(10));
  return { at: (value) => from + ((value - low) / (high - low)) * (to - from), ticks };
}
function logarithmic(values, from, to) {
  const positive = values.filter((value) => value > 0), zero = positive.length < values.length;
  if (!positive.length) return linear(values, from, to);
  const low = Math.log10(Math.min(...positive)) - 0.15, high = Math.log10(Math.max(...positive)) + 0.15;
  const start = zero ? from + (to - from) * 0.14 : from;
  const at = (value) => value > 0 ? start + ((Math.log10(value) - low) / (high - low)) * (to - start) : from + (to - from) * 0.04;
  const parts = high - low > 2.5 ? [1] : [1, 2, 5], ticks = zero ? [0] : [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const part of parts) {
      const tick = part * 10 ** power;
      if (Math.log10(tick) >= low && Math.log10(tick) <= high) ticks.push(tick);
    }
  return { at, ticks, breakAt: zero ? (start + at(0)) / 2 : undefined };
}

// The settings with a finished run.
const measured = data.settings.map((name, n) => [n, name]).filter(([n]) => done.some((run) => run.setting === n));
