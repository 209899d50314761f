// The table of runs.
function table() {
  const head = put($("table").tHead, "tr"), body = $("table").tBodies[0];
  const rows = data.runs.map((run) => {
    const row = put(body, "tr");
    for (const column of data.columns) {
      const cell = put(row, "td", { class: column.kind === "text" || column.kind === "state" ? undefined : "number" });
      if (column.key === "label") {
        const link = put(cell, run.id ? "a" : "span", { class: "method", href: run.id ? `#run=${run.id}` : undefined });
        mark(link, run.label);
        link.append(run.label);
      } else if (column.kind === "state") put(cell, "span", { class: `state ${run.state}`, title: run.reason ?? run.remarks?.join("\n") }, shown(run.state, "state") + (run.remarks?.length ? " ⚠" : ""));
      else cell.textContent = shown(run[column.key], column.kind);
    }
    return { run, row, text: data.columns.map((column) => run[column.key]).concat(run.id, run.reason).join(" ").toLowerCase() };
  });
  for (const column of data.columns) {
    const cell = put(head, "th", { scope: "col", "aria-sort": "none", class: column.kind === "text" || column.kind === "state" ? undefined : "number" });
    const button = put(cell, "button", { type: "button" }, column.name);
    button.addEventListener("click", () => {
      const downFirst = cell.classList.contains("number");
      const direction = cell.getAttribute("aria-sort") === (downFirst ? "descending" : "ascending") === downFirst ? "ascending" : "descending";
      for (const other of head.cells) other.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      rows.sort(({ run: a }, { run: b }) => {
        const [p, q] = [a[column.key] ?? null, b[column.key] ?? null];
        if (p === null || q === null) return (p === null) - (q === null); // missing values stay at the end
        return sign * (typeof p === "number" ? p - q : String(p).localeCompare(String(q), "en", { numeric: true }));
      });
      body.append(...rows.map(({ row }) => row));
    });
  }
  const choices = data.filters.map((column) => {
    const values = [...new Set(data.runs.map((run) => run[column.key]))];
    if (values.length < 2) return () => true;
    const select = put(put($("filters"), "label", {}, column.name), "select", { id: `filter-${column.key}` });
    fill(select, [["", "all"], ...values.map((value, n) => [String(n), shown(value, column.kind)])]);
    select.addEventListener("change", apply);
    return (run) => select.value === "" || run[column.key] === values[+select.value];
  });
  function apply() {
    const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { run, row, text } of rows) {
      row.hidden = !(words.every((word) => text.includes(word)) && choices.every((fits) => fits(run)));
      count += !row.hidden;
    }
    $("shown").textContent = `${whole(count)} of ${whole(rows.length)} runs`;
  }
  $("filter").addEventListener("input", apply);
  apply();
}
table();

// One run.
function pairs(parent, entries) {
  const list = put(parent, "dl", { class: "pairs" });
  for (const [name, value] of entries) {
    const pair = put(list, "div");
    put(pair, "dt", {}, name);
    put(pair, "dd", {}, String(value));
  }
}
function curve(parent, name, xs, ys, label) {
  const known = xs.map((step, n) => [step, ys[n]]).filter(([, value]) => value !== null);
  if (known.length < 2) return;
  const box = put(parent, "div", { class: "small" });
  put(box, "h3", {}, name);
  const [width, height, left, bottom] = [420, 190, 44, 164];
  const svg = put(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${name}: from ${short(known[0][1])} to ${short(known.at(-1)[1])}` });
  const x = linear(known.map(([step]) => step), left, width - 6, 4), y = linear(known.map(([, value]) => value), bottom, 8, 4);
  for (const tick of y.ticks) {
    put(svg, "line", { class: "grid", x1: left, x2: width - 6, y1: y.at(tick), y2: y.at(tick) });
    put(svg, "text", { x: left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, short(tick));
  }
  for (const tick of x.ticks) if (tick >= 0) put(svg, "text", { x: x.at(tick), y: bottom + 18, "text-anchor": "middle" }, short(tick));
  put(svg, "polyline", { points: known.map(([step, value]) => `${x.at(step).toFixed(1)},${y.at(value).toFixed(1)}`).join(" "), fill: "none", stroke: colour(label), "stroke-width": 2 });
}
function picture(parent, number, caption) {
  if (number === null || number === undefined) return;
  const frame = put(parent, "figure");
  put(frame, "img", { src: data.pictures[number], alt: caption });
  put(frame, "figcaption", {}, caption);
}
function openRun(run) {
  const body = $("run-body");
  body.replaceChildren();
  const head = put(body, "div", { class: "run-head" });
  const title = put(head, "h2", { id: "run-title" });
  mark(title, run.label);
  title.append(run.label);
  put(head, "button", { type: "button", "aria-label": "Close" }, "×").addEventListener("click", () => $("run").close());
  put(body, "p", { class: "note" }, `${data.settings[run.setting]} · seed ${run.seed} · ${run.id}`);
  const siblings = data.runs.filter((other) => other.id && other.label === run.label && other.setting === run.setting);
  if (siblings.length > 1) {
    const list = put(body, "p", { class: "seeds" }, "seeds");
    for (const other of siblings) put(list, "a", { href: `#run=${other.id}`, "aria-current": other === run ? "true" : undefined }, String(other.seed));
  }
  if (run.state !== "done") put(body, "p", {}, put(body, "span", { class: `state ${run.state}` }, shown(run.state, "state")), ` ${run.reason ?? ""}`);
  else {
    const tiles = put(body, "dl", { class: "tiles" });
    for (const column of data.tiles) {
      const tile = put(tiles, "div");
      put(tile, "dt", {}, column.name);
      put(tile, "dd", {}, shown(run[column.key], column.kind));
    }
  }
  for (const remark of run.remarks ?? []) put(body, "p", { class: "note" }, remark);
  put(body, "h3", {}, "Repeat this run");
  const command = put(body, "div", { class: "command" });
  const code = put(command, "code", {}, run.command);
  const copy = put(command, "button", { type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(run.command); copy.textContent = "Copied"; }
    catch { getSelection().selectAllChildren(code); }
  });
  if (run.curve) {
    const two = put(body, "div", { class: "two" });
    curve(two, "mIoU of the training crops, %", run.curve.step, run.curve.miou.map((value) => value === null ? null : 100 * value), run.label);
    curve(two, "Loss", run.curve.step, run.curve.loss, run.label);
  }
  if (run.predictions) {
    put(body, "h3", {}, "Samples: image, ground truth, prediction");
    for (const [sample, prediction] of run.predictions) {
      const strip = put(body, "div", { class: "strip" }), of = data.samples[sample];
      picture(strip, of.image, of.name);
      picture(strip, of.truth, "ground truth");
      picture(strip, prediction, run.label);
    }
  } else if (run.state === "done") put(body, "p", { class: "note" }, data.withoutSamples);
  if (run.iou) {
    put(body, "h3", {}, "IoU of each class, %");
    const list = put(put(body, "table", { class: "classes" }), "tbody");
    data.classes[run.classes].forEach(([name, swatch], n) => {
      const row = put(list, "tr"), cell = put(row, "th", { scope: "row" });
      if (swatch) put(cell, "span", { class: "swatch" }).style.background = swatch;
      cell.append(name);
      const bar = put(put(row, "td"), "div", { class: "track" });
      if (run.iou[n] !== null) Object.assign(put(bar, "div").style, { width: `${100 * run.iou[n]}%`, background: colour(run.label) });
      put(row, "td", {}, run.iou[n] === null ? "absent" : shown(run.iou[n], "share"));
    });
  }
  put(body, "h3", {}, "Spec");
  pairs(body, run.spec);
  if (run.provenance) {
    put(body, "h3", {}, "Provenance");
    pairs(body, run.provenance);
    const more = put(body, "details");
    put(more, "summary", {}, "Packages");
    pairs(more, data.packages[run.packages]);
  }
  if (!$("run").open) $("run").showModal();
  $("run").scrollTop = 0;
}
function route() {
  const run = runs.get(/^#run=([0-9a-f]+)$/.exec(location.hash)?.[1]);
  tip.hidden = true;
  if (run) openRun(run);
  else if ($("run").open) $("run").close();
}
$("run").addEventListener("close", () => { if (location.hash.startsWith("#run=")) history.replaceState(null, "", " "); });
$("run").addEventListener("click", (event) => { if (event.target === $("run")) $("run").close(); });
addEventListener("hashchange", route);
