"use strict";
// The interactive parts of the page. Everything comes from the JSON block; text enters the page as text, never as markup.
(() => {
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
  const spread = (values) =>
    values.length < 2 ? null : Math.sqrt(values.reduce((sum, v) => sum + (v - mean(values)) ** 2, 0) / (values.length - 1));
  const whole = (value) => Math.round(value).toLocaleString("en-US");
  const short = (value) => {
    const [unit, letter] = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([u]) => Math.abs(value) >= u) ?? [1, ""];
    return `${+(value / unit).toPrecision(3)}${letter}`;
  };
  const written = {
    share: (value) => (100 * value).toFixed(2), count: whole, seconds: (value) => value.toFixed(value < 100 ? 1 : 0),
    bytes: (value) => (value / 2 ** 20).toFixed(2), rate: (value) => value.toFixed(1), ratio: (value) => value.toFixed(3),
  };
  const shown = (value, kind) => (value === null || value === undefined ? "–" : (written[kind] ?? String)(value));

  // Theme: the system's, until the switch is used.
  const root = document.documentElement;
  const remember = (value) => { try { value ? localStorage.setItem("theme", value) : (value = localStorage.getItem("theme")); } catch { /* no storage */ } return value; };
  if (remember()) root.dataset.theme = remember();
  $("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = remember(dark ? "light" : "dark");
  });

  function fill(select, options) {
    for (const [value, name] of options) put(select, "option", { value }, name);
  }

  // Scales: where a value stands, and where the ticks are.
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

  // The scatter.
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
    const cost = data.costs[+$("at-cost").value], figure = data.figures[+$("at-figure").value];
    const here = done.filter((run) => run.setting === +$("at-setting").value && run[figure.key] !== null && run[cost.key] !== null);
    const points = labels.filter((label) => !hidden.has(label)).flatMap((label) => {
      const own = here.filter((run) => run.label === label);
      if (!own.length) return [];
      const ys = own.map((run) => run[figure.key]);
      return [{ label, own, x: mean(own.map((run) => run[cost.key])), y: mean(ys), bar: spread(ys) }];
    });
    const cited = data.published.filter((row) => row.setting === +$("at-setting").value && row.cost === cost.key && figure.key === row.metric && !hidden.has(row.look));
    const chart = $("scatter");
    chart.replaceChildren();
    const seeds = [...new Set(points.map((point) => point.own.length))].sort((a, b) => a - b);
    $("scatter-note").textContent = points.length
      ? `Large: mean over ${seeds.length > 1 ? `${seeds[0]} to ${seeds.at(-1)}` : seeds[0]} seed${seeds.at(-1) > 1 ? "s" : ""}; bars: ± one standard deviation over seeds` +
        `${seeds[0] === 1 ? ", none for one seed" : ""}. Small: single seeds. Line: Pareto front. Dashed: full; dotted: linear.` +
        `${cited.length ? " Hollow: published figures." : ""} A point opens its run.`
      : "No finished run has this figure and this cost here.";
    if (!points.length) return;
    const width = chart.clientWidth, narrow = width < 560, height = Math.round(Math.max(300, Math.min(520, width * 0.5)));
    const [left, right, top, bottom] = [50, width - 14, 14, height - 46];
    const svg = put(chart, "svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": `${figure.name} against ${cost.name}` });
    const xs = [...points.map((p) => p.x), ...cited.map((c) => c.x), ...here.filter((run) => !hidden.has(run.label)).map((run) => run[cost.key])];
    const positive = xs.filter((value) => value > 0);
    const useLog = cost.log || Math.max(...positive) > 10 * Math.min(...positive);
    const x = (useLog ? logarithmic : linear)(xs, left, right, narrow ? 3 : 6);
    const y = linear(
      [...points.flatMap((p) => [p.y - (p.bar ?? 0), p.y + (p.bar ?? 0)]), ...cited.map((c) => c.y), ...here.filter((run) => !hidden.has(run.label)).map((run) => run[figure.key])],
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
    put(svg, "text", { x: left, y: top - 2, "text-anchor": "start" }, `${figure.name}, %`);
    for (const [name, dash] of [["full", "7 5"], ["linear", "2 4"]]) {
      const reference = points.find((point) => point.label === name);
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
          const dot = marker(svg, point.label, [x.at(run[cost.key]), y.at(run[figure.key])], 3, { class: "seed", fill: colour(point.label), "aria-hidden": "true" });
          dot.addEventListener("click", () => { location.hash = `run=${run.id}`; });
        }
    const taken = [];
    for (const row of cited) {
      const at = [x.at(row.x), y.at(row.y)];
      const node = marker(svg, row.look, at, 6, { class: "cited", stroke: colour(row.look), tabindex: 0, role: "img", "aria-label": `published: ${row.label}, ${figure.name} ${shown(row.y, "share")} %, ${row.source}` });
      describe(node, `${row.label}, published\n${figure.name} ${shown(row.y, "share")} %\n${row.source} (${row.sure})`);
      taken.push([at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7]);
    }
    for (const point of points) {
      const at = [x.at(point.x), y.at(point.y)];
      const text = [
        `${point.label}, ${point.own.length > 1 ? `mean of ${point.own.length} seeds` : "one seed"}`,
        `${figure.name} ${shown(point.y, "share")}${point.bar === null ? "" : ` ± ${shown(point.bar, "share")}`} %`,
        `${cost.name} ${shown(point.x, cost.kind)}${{ bytes: " MiB", seconds: " s" }[cost.kind] ?? ""}`,
      ];
      const link = put(svg, "a", { href: `#run=${point.own[0].id}`, class: "point-link", "aria-label": text.join(", ") });
      if (point.bar) put(link, "path", { class: "bar", stroke: colour(point.label), fill: "none", d: `M${at[0]} ${y.at(point.y - point.bar)}V${y.at(point.y + point.bar)}m-4 0h8M${at[0] - 4} ${y.at(point.y - point.bar)}h8` });
      put(link, "circle", { class: "ring", cx: at[0], cy: at[1], r: 11, "pointer-events": "all" });
      marker(link, point.label, at, 6.5, { class: "point", fill: colour(point.label) });
      describe(link, text.join("\n"));
      taken.push([at[0] - 8, at[1] - 8, at[0] + 8, at[1] + 8]);
    }
    // Names where there is room for them; the others are in the tip and the legend.
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
        } else if (column.kind === "state") put(cell, "span", { class: `state ${run.state}`, title: run.reason ?? undefined }, run.state.replaceAll("_", " "));
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
          if (p === null || q === null) return (p === null) - (q === null); // what has no figure stays at the end
          return sign * (typeof p === "number" ? p - q : String(p).localeCompare(String(q), "en", { numeric: true }));
        });
        body.append(...rows.map(({ row }) => row));
      });
    }
    const choices = data.filters.map((column) => {
      const values = [...new Set(data.runs.map((run) => run[column.key]))];
      if (values.length < 2) return () => true;
      const select = put(put($("filters"), "label", {}, column.name), "select", { id: `filter-${column.key}` });
      fill(select, [["", "all"], ...values.map((value, n) => [String(n), String(value).replaceAll("_", " ")])]);
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
    if (run.state !== "done") put(body, "p", {}, put(body, "span", { class: `state ${run.state}` }, run.state.replaceAll("_", " ")), ` ${run.reason ?? ""}`);
    else {
      const tiles = put(body, "dl", { class: "tiles" });
      for (const column of data.tiles) {
        const tile = put(tiles, "div");
        put(tile, "dt", {}, column.name);
        put(tile, "dd", {}, shown(run[column.key], column.kind));
      }
    }
    put(body, "h3", {}, "Repeat it");
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
      put(body, "h3", {}, "Samples: image, truth, prediction");
      for (const [sample, prediction] of run.predictions) {
        const strip = put(body, "div", { class: "strip" }), of = data.samples[sample];
        picture(strip, of.image, of.name);
        picture(strip, of.truth, "truth");
        picture(strip, prediction, run.label);
      }
    } else if (run.state === "done") put(body, "p", { class: "note" }, data.withoutPictures);
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

  // Pictures: each method beside the truth, and the images on which it differs most from the reference.
  function gallery() {
    const setting = +$("of-setting").value;
    const firsts = labels.flatMap((label) => done.find((run) => run.label === label && run.setting === setting && run.predictions) ?? []);
    const samples = [...new Set(firsts.flatMap((run) => run.predictions.map(([sample]) => sample)))].sort((a, b) => a - b);
    $("gallery").replaceChildren();
    if (samples.length) {
      const grid = put($("gallery"), "table"), head = put(put(grid, "thead"), "tr"), body = put(grid, "tbody");
      for (const name of ["", "image", "truth"]) put(head, "th", { scope: "col" }, name);
      for (const run of firsts) {
        const cell = put(put(head, "th", { scope: "col" }), "a", { class: "method", href: `#run=${run.id}` });
        mark(cell, run.label);
        cell.append(run.label);
      }
      for (const sample of samples) {
        const row = put(body, "tr"), of = data.samples[sample];
        put(row, "th", { scope: "row", title: of.name }, of.name);
        const image = (number, alt) => {
          const cell = put(row, "td");
          if (number !== undefined && number !== null) put(cell, "img", { src: data.pictures[number], alt });
        };
        image(of.image, `image ${of.name}`);
        image(of.truth, `truth of ${of.name}`);
        for (const run of firsts) image(run.predictions.find(([own]) => own === sample)?.[1], `prediction of ${run.label} for ${of.name}`);
      }
    } else put($("gallery"), "p", { class: "note" }, data.withoutPictures);
    const compared = Object.keys(data.extremes[setting] ?? {}), select = $("of-method"), before = select.value;
    select.replaceChildren();
    fill(select, compared.map((label) => [label, label]));
    if (compared.includes(before)) select.value = before;
    select.parentElement.hidden = !compared.length;
    extremes(firsts);
  }
  function extremes(firsts) {
    const setting = +$("of-setting").value, label = $("of-method").value, found = data.extremes[setting]?.[label];
    $("extremes").replaceChildren();
    $("extremes-title").textContent = found ? `${label} against ${data.reference}` : "";
    if (!found) return;
    for (const [heading, list] of [["Helps most", found.helps], ["Hurts most", found.hurts]]) {
      const box = put($("extremes"), "div");
      put(box, "h4", {}, heading);
      if (!list.length) put(box, "p", { class: "none" }, "no image");
      const items = put(box, "ol");
      for (const [name, value, reference] of list) {
        const item = put(items, "li"), line = put(item, "div", { class: "figures" });
        put(line, "span", {}, name);
        put(line, "span", {}, `${shown(value, "share")} against ${shown(reference, "share")} (${value >= reference ? "+" : "−"}${shown(Math.abs(value - reference), "share")})`);
        const sample = data.samples.findIndex((one) => one.setting === setting && one.name === name.replaceAll("/", "-"));
        if (sample < 0) continue;
        const strip = put(item, "div", { class: "strip" });
        picture(strip, data.samples[sample].image, "image");
        picture(strip, data.samples[sample].truth, "truth");
        for (const who of [data.reference, label])
          picture(strip, firsts.find((run) => run.label === who)?.predictions.find(([own]) => own === sample)?.[1], who);
      }
    }
  }

  const settings = data.settings.map((name, n) => [n, name]);
  const measured = settings.filter(([n]) => done.some((run) => run.setting === n));
  fill($("at-setting"), measured);
  fill($("at-cost"), data.costs.map((cost, n) => [n, cost.name]));
  fill($("at-figure"), data.figures.map((figure, n) => [n, figure.name]));
  for (const id of ["at-setting", "at-cost", "at-figure", "at-seeds"]) $(id).addEventListener("change", scatter);
  legend();
  scatter();
  let wide = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== wide) { wide = innerWidth; scatter(); } });
  table();
  if ($("pictures")) {
    fill($("of-setting"), measured);
    $("of-setting").addEventListener("change", gallery);
    $("of-method").addEventListener("change", gallery);
    gallery();
  }
  addEventListener("hashchange", route);
  route();
})();
