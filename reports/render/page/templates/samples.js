// Samples: each method beside the ground truth, and the images on which it differs most from the reference.
function gallery() {
  const setting = +$("of-setting").value;
  const firsts = labels.flatMap((label) => done.find((run) => run.label === label && run.setting === setting && run.predictions) ?? []);
  const samples = [...new Set(firsts.flatMap((run) => run.predictions.map(([sample]) => sample)))].sort((a, b) => a - b);
  $("gallery").replaceChildren();
  if (samples.length) {
    const grid = put($("gallery"), "table"), head = put(put(grid, "thead"), "tr"), body = put(grid, "tbody");
    for (const name of ["", "image", "ground truth"]) put(head, "th", { scope: "col" }, name);
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
      image(of.truth, `ground truth of ${of.name}`);
      for (const run of firsts) image(run.predictions.find(([own]) => own === sample)?.[1], `prediction of ${run.label} for ${of.name}`);
    }
  } else put($("gallery"), "p", { class: "note" }, data.withoutSamples);
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
  $("extremes-title").textContent = found ? `${label} compared with ${data.reference}` : "";
  if (!found) return;
  for (const [heading, list] of [["Largest gain", found.gains], ["Largest loss", found.losses]]) {
    const box = put($("extremes"), "div");
    put(box, "h4", {}, heading);
    if (!list.length) put(box, "p", { class: "none" }, "no image");
    const items = put(box, "ol");
    for (const [name, value, reference] of list) {
      const item = put(items, "li"), line = put(item, "div", { class: "scores" });
      put(line, "span", {}, name);
      put(line, "span", {}, `${shown(value, "share")}, ${data.reference} ${shown(reference, "share")} (${value >= reference ? "+" : "−"}${shown(Math.abs(value - reference), "share")})`);
      const sample = data.samples.findIndex((one) => one.setting === setting && one.name === name.replaceAll("/", "-"));
      if (sample < 0) continue;
      const strip = put(item, "div", { class: "strip" });
      picture(strip, data.samples[sample].image, "image");
      picture(strip, data.samples[sample].truth, "ground truth");
      for (const who of [data.reference, label])
        picture(strip, firsts.find((run) => run.label === who)?.predictions.find(([own]) => own === sample)?.[1], who);
    }
  }
}
if ($("samples")) {
  fill($("of-setting"), measured);
  $("of-setting").addEventListener("change", gallery);
  $("of-method").addEventListener("change", gallery);
  gallery();
}
route();
