// The trade-off plot.
const hidden = new Set();
const tip = $("tip");
function showTip(target, text) {
  tip.textContent = text;
  tip.hidden = false;
  const box = target.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(box.right + 10, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(8, Math.min(box.top - 8, innerHeight - tip.offsetHeight - 8))}px`;
}
function scatter() {
  const cost = data.costs[+$("at-cost").value], metric = data.metrics[+$("at-metric").value];
  const here = done.filter((run) => run.setting === +$("at-setting").value && run[metric.key] !== null && run[cost.key] !== null);
  const points = labels.filter((label) => !hidden.has(label)).flatMap((label) => {
    const own = here.filter((run) => run.label === label);
    if (!own.length) return [];
    const ys = own.map((run) => run[metric.key]);
    return [{ label, own, x: mean(own.map((run) => run[cost.key])), y: mean(ys), bar: halfInterval(ys) }];
  });
  const cited = data.published.filter((row) => row.setting === +$("at-setting").value && row.cost === cost.key && metric.key === row.metric && !hidden.has(row.method));
  const chart = $("scatter");
  chart.replaceChildren();
  const seeds = [...new Set(points.map((point) => point.own.length))].sort((a, b) => a - b);
  $("scatter-note").textContent = points.length
    ? `Large: mean over ${seeds.length > 1 ? `${seeds[0]} to ${seeds.at(-1)}` : seeds[0]} seed${seeds.at(-1) > 1 ? "s" : ""}; ${data.barsCaption}. Small: single seeds. Line: Pareto front. Dashed: full fine-tuning; dotted: the head alone.` +
      `${cited.length ? " Hollow markers: published scores." : ""} Select a point to open its run.`
    : "No finished run of this setting has this metric and this cost.";
  if (!points.length) return;
  const width = chart.clientWidth, narrow = width < 560, height = Math.round(Math.max(300, Math.min(520, width * 0.5)));
  const [left, right, top, bottom] = [50, width - 14, 14, height - 46];
  const svg = put(chart, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${metric.name} by ${cost.name}` });
  const xs = [...points.map((p) => p.x), ...cited.map((c) => c.x), ...here.filter((run) => !hidden.has(run.label)).map((run) => run[cost.key])];
  const positive = xs.filter((value) => value > 0);
  const useLog = cost.log || Math.max(...positive) > 10 * Math.min(...positive);
  const x = (useLog ? logarithmic : linear)(xs, left, right, narrow ? 3 : 6);
  const y = linear(
    [...points.flatMap((p) => [p.y - (p.bar ?? 0), p.y + (p.bar ?? 0)]), ...cited.map((c) => c.y), ...here.filter((run) => !hidden.has(run.label)).map((run) => run[metric.key])],
    bottom, top);
  for (const tick of y.ticks) {
    put(svg, "line", { class: "grid", x1: left, x2: right, y1: y.at(tick), y2: y.at(tick) });
    put(svg, "text", { x: left - 8, y: y.at(tick) + 4, "text-anchor": "end" }, String(+(100 * tick).toPrecision(6)));
  }
  put(svg, "line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom });
  let last = -Infinity;
  for (const tick of x.ticks) {
    put(svg, "line", { class: "axis", x1: x.at(tick), x2: x.at(tick), y1: bottom, y2: bottom + 4 });
    if (x.at(tick) - last < 34) continue;
    last = x.at(tick);
    put(svg, "text", { x: last, y: bottom + 18, "text-anchor": "middle" }, short(tick / cost.unit));
  }
  if (x.breakAt) put(svg, "path", { class: "axis", d: `M${x.breakAt - 5} ${bottom + 5}l4 -10m3 10l4 -10`, fill: "none" });
  put(svg, "text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, `${narrow ? cost.name : cost.axis}${useLog ? " (log)" : ""}`);
  put(svg, "text", { x: left, y: top - 2, "text-anchor": "start" }, `${metric.name}, %`);
  for (const [label, dash] of Object.entries(data.lines)) {
    const reference = points.find((point) => point.label === label);
    if (reference) put(svg, "line", { class: "reference", x1: left, x2: right, y1: y.at(reference.y), y2: y.at(reference.y), "stroke-dasharray": dash });
  }
  let best = -Infinity;
  const front = [...points].sort((a, b) => a.x - b.x || b.y - a.y).filter((point) => point.y > best && ((best = point.y), true));
  put(svg, "path", { class: "front", d: front.map((p, n) => (n ? `H${x.at(p.x)}V${y.at(p.y)}` : `M${x.at(p.x)} ${y.at(p.y)}`)).join("") });

  const marker = (parent, label, at, size, attributes) =>
    put(parent, "path", { d: data.methods[label].outline, transform: `translate(${at[0]} ${at[1]}) scale(${size})`, ...attributes });
  if ($("at-seeds").checked)
    for (const point of points) if (point.own.length > 1)
      for (const run of point.own) {
        const dot = marker(svg, point.label, [x.at(run[cost.key]), y.at(run[metric.key])], 3, { class: "seed", fill: colour(point.label), "aria-hidden": "true" });
        dot.addEventListener("click", () => { location.hash = `run=${run.id}`; });
      }
  const taken = [];
  for (const row of cited) {
    const at = [x.at(row.x), y.at(row.y)];
    const node = marker(svg, row.method, at, 6, { class: "cited", stroke: colour(row.method), tabindex: 0, role: "img", "aria-label": `published: ${row.label}, ${metric.name} ${shown(row.y, "share")} %, ${row.source}` });
    describe(node, `${row.label}, published\n${metric.name} ${shown(row.y, "share")} %\n${row.source} (${row.sure})`);
    taken.push([at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7]);
  }
  for (const point of points) {
    const at = [x.at(point.x), y.at(point.y)];
    const text = [
      `${point.label}, ${point.own.length > 1 ? `mean of ${point.own.length} seeds` : "one seed"}`,
      `${metric.name} ${shown(point.y, "share")}${point.bar === null ? "" : ` ± ${shown(point.bar, "share")}`} %`,
      `${cost.name} ${shown(point.x, cost.kind)}${{ bytes: " MiB", seconds: " s" }[cost.kind] ?? ""}`,
    ];
    const link = put(svg, "a", { href: `#run=${point.own[0].id}`, class: "point-link", "aria-label": text.join(", ") });
    if (point.bar) put(link, "path", { class: "bar", stroke: colour(point.label), fill: "none", d: `M${at[0]} ${y.at(point.y - point.bar)}V${y.at(point.y + point.bar)}m-4 0h8M${at[0] - 4} ${y.at(point.y - point.bar)}h8` });
    put(link, "circle", { class: "ring", cx: at[0], cy: at[1], r: 11, "pointer-events": "all" });
    marker(link, point.label, at, 6.5, { class: "point", fill: colour(point.label) });
    describe(link, text.join("\n"));
    taken.push([at[0] - 8, at[1] - 8, at[0] + 8, at[1] + 8]);
  }
  // Names where there is room for them; the others are in the tooltip and the legend.
  for (const point of [...points].sort((a, b) => b.y - a.y)) {
    const at = [x.at(point.x), y.at(point.y)];
    const name = put(svg, "text", { class: "name", "aria-hidden": "true" }, point.label);
    const wide = name.getComputedTextLength();
    const places = [[11, 4], [-wide - 11, 4], [-wide / 2, -13], [-wide / 2, 22], [9, -9], [9, 17], [-wide - 9, -9], [-wide - 9, 17]];
    const free = places.map(([dx, dy]) => [at[0] + dx, at[1] + dy - 10, at[0] + dx + wide, at[1] + dy + 3]).find((box) =>
      box[0] >= left && box[2] <= width && box[1] >= 0 && box[3] < bottom &&
      taken.every((other) => box[2] < other[0] || box[0] > other[2] || box[3] < other[1] || box[1] > other[3]));
    if (!free) { name.remove(); continue; }
    name.setAttribute("x", free[0]);
    name.setAttribute("y", free[3] - 3);
    taken.push(free);
  }
}
function describe(node, text) {
  for (const event of ["pointerenter", "focus"]) node.addEventListener(event, () => showTip(node, text));
  for (const event of ["pointerleave", "blur"]) node.addEventListener(event, () => { tip.hidden = true; });
}
function legend() {
  for (const label of labels.filter((name) => done.some((run) => run.label === name))) {
    const button = put($("legend"), "button", { type: "button", "aria-pressed": "true" });
    mark(button, label);
    button.append(label);
    button.addEventListener("click", () => {
      const off = hidden.delete(label) ? false : !!hidden.add(label);
      button.setAttribute("aria-pressed", String(!off));
      scatter();
    });
  }
}
fill($("at-setting"), measured);
fill($("at-cost"), data.costs.map((cost, n) => [n, cost.name]));
fill($("at-metric"), data.metrics.map((metric, n) => [n, metric.name]));
for (const id of ["at-setting", "at-cost", "at-metric", "at-seeds"]) $(id).addEventListener("change", scatter);
legend();
scatter();
let wide = innerWidth;
addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; scatter(); } });
