// The page of `tvfast merge --report`: what a merge did to the base, and where its time went.

const DATA = JSON.parse(document.getElementById("data").textContent);
const NAMES = namesOf(DATA.models);
const OUT = DATA.outcome;
const EACH = DATA.models.map((_, k) => k);
const TENSORS = Object.entries(DATA.tensors).map(([name, row]) => ({ name, ...row }));
const AXIS = layersOf(Object.keys(DATA.layers));
const METHODS = [...new Set(TENSORS.map((row) => row.method))].filter((name) => name !== "copy");
const SEEN = TENSORS.reduce((sum, row) => sum + row.n_seen, 0);

const drift = (row) => row.drift ?? NaN;
const kept = (row, k) => row.kept[k] ?? NaN;
const agreement = (row, k) => row.sign_agreement[k] ?? NaN;
const likeness = (row, k) => row.cosines[k] ?? NaN;
const spent = (row) => Object.values(row.seconds).reduce((sum, value) => sum + value, 0);
const some = (value) => DATA.total && EACH.some((k) => known(value(DATA.total, k)));
const range = (values, format) => {
  const [low, high] = [Math.min(...values.filter(known)), Math.max(...values.filter(known))].map(format);
  return low === high ? low : `${low.replace(/\u00a0%$/, "")} – ${high}`;
};
const perModel = (value) => EACH.map((k) => ({
  name: NAMES[k], color: color(k), dash: dash(k), values: AXIS.names.map((name) => value(DATA.layers[name], k)),
}));

function head() {
  return [
    make("h1", {}, `What the merge made of ${NAMES.length} ${NAMES.length === 1 ? "model" : "models"}`),
    make("p", { class: "lead" }, `${METHODS.join(", ") || "copied"}, on ${OUT.device}: ${whole(DATA.n_tensors)} tensors in ${OUT.out}.`),
    make("ul", { class: "members" }, NAMES.map((name, k) => make("li", {}, swatch(k), make("b", {}, name),
      DATA.models[k] !== name ? make("small", {}, DATA.models[k]) : null))),
  ];
}

function summary() {
  const all = DATA.total;
  const moved = OUT.read_bytes + OUT.written_bytes;
  const tiles = [tile("Time", seconds(OUT.seconds), `${bytes(moved / Math.max(OUT.seconds, 1e-9))}/s read and written`, "", "",
    `${bytes(OUT.read_bytes)} read, ${bytes(OUT.written_bytes)} written, at most ${bytes(OUT.peak_bytes)} of memory.`)];
  if (known(drift(all))) {
    tiles.push(tile("Drift", percent(drift(all)), "of the base's norm", "", "",
      "How far the result is from the base, ‖θ − θ₀‖ / ‖θ₀‖. Near 0 the merge changed little; large drift is where abilities of the base get lost."));
  }
  if (some(kept)) {
    tiles.push(tile("Kept share", range(EACH.map((k) => kept(all, k)), percent), "of the entries of each model", "", "",
      "What the method's trim or drop let through, before signs are elected and models are added."));
  }
  if (some(agreement)) {
    const least = Math.min(...EACH.map((k) => agreement(all, k)).filter(known));
    tiles.push(tile("Sign agreement", range(EACH.map((k) => agreement(all, k)), percent), "of what each model changed",
      least > 0.8 ? "Mostly kept" : "Partly reversed", least > 0.8 ? "good" : "care",
      "The share of a model's changes that the result does not turn into their opposite."));
  }
  if (some(likeness)) {
    tiles.push(tile("Likeness", range(EACH.map((k) => likeness(all, k)), fixed), "cosine of the result and each model", "", "",
      "How much of the merged task vector points the way of each model; an even range means that no model was drowned."));
  }
  return section("summary", "Summary", "", make("div", { class: "tiles" }, tiles));
}

function effects() {
  if (!AXIS.names.length || !known(drift(DATA.total)) && !some(kept)) return null;
  const one = [{ name: "drift", color: color(0), values: AXIS.names.map((name) => drift(DATA.layers[name])) }];
  const share = (value, title, says) => (some(value) ? figure(title, says,
    [legend(perModel(value)), lines({ axis: AXIS, series: perModel(value), unit: "%", scale: 100, format: percent, label: `${title} by layer` })], "third") : null);
  return section("effects", "Effects", "", make("div", { class: "figures" },
    known(drift(DATA.total)) ? figure("Drift by layer", "‖θ − θ₀‖ / ‖θ₀‖ of all tensors of a layer. A peak is a layer that the merge rewrote most: the first to look at when the result disappoints.",
      [lines({ axis: AXIS, series: one, unit: "% of the base's norm", scale: 100, format: percent, label: "Drift from the base by layer" })]) : null,
    share(kept, "Kept share", "Entries that the method kept of each model. It should be the density that was asked for; ties make it differ."),
    share(agreement, "Sign agreement", "Changes of a model that keep their direction in the result. A model far below the others was outvoted there."),
    some(likeness) ? figure("Likeness", "Cosine between the merged task vector and each model's. The higher a line, the more of that model is in the layer.",
      [legend(perModel(likeness)), lines({ axis: AXIS, series: perModel(likeness), unit: "cosine", format: fixed, label: "Likeness to each model by layer" })], "third") : null));
}

function times() {
  const phases = DATA.total.seconds;
  const sum = Object.values(phases).reduce((a, b) => a + b, 0) || 1;
  const says = { reading: "waiting for inputs", merging: "arithmetic", writing: "checksums and writes", streaming: "tensors in pieces: all of it" };
  const phaseTable = make("div", { class: "wide" }, make("table", {},
    make("caption", { class: "unseen" }, "Time of all workers together by phase"),
    make("thead", {}, make("tr", {}, ["Phase", "", "Time", "Share"].map((text, i) => make("th", { scope: "col", class: i === 1 ? "text" : "" }, text)))),
    make("tbody", {}, Object.entries(phases).map(([name, value]) => make("tr", {}, make("th", { scope: "row", style: "min-width:6rem" }, name), make("td", { class: "text" }, says[name]),
      make("td", {}, seconds(value)), make("td", { class: "bar", style: `--w:${((100 * value) / sum).toFixed(1)}%` }, percent(value / sum)))))));
  const slowest = [...TENSORS].sort((a, b) => spent(b) - spent(a)).slice(0, 12);
  const columns = [
    { title: "Tensor", value: (row) => row.name ?? "", text: (row) => row.name },
    { title: "Shape", left: true, value: (row) => row.n_elements, text: (row) => row.shape.join(" × ") || "scalar" },
    { title: "Time", value: spent, text: (row) => seconds(spent(row)), share: true },
  ];
  return section("times", "Time", "", make("div", { class: "figures" },
    figure("Where the workers were", "Seconds of all workers together. If most are reading or writing, the disk sets the pace; if most are merging, more cores help.", [phaseTable], "half"),
    figure("Slowest tensors", "Small tensors are handled together and share their time by bytes.", [table({ caption: "The slowest tensors", columns, rows: slowest, sorted: 2 }).node], "half")));
}

function numbers() {
  const columns = (first, withShape) => [
    { title: first, value: (row) => row.name ?? "", text: (row) => row.name },
    ...(withShape ? [{ title: "Shape", left: true, value: (row) => row.n_elements, text: (row) => row.shape.join(" × ") || "scalar" },
      { title: "Type", left: true, value: (row) => row.dtype ?? "", text: (row) => row.dtype }, { title: "Method", left: true, value: (row) => row.method ?? "", text: (row) => row.method }] : []),
    { title: "Drift", value: drift, text: (row) => percent(drift(row)), share: true },
    ...[["Kept", kept, percent], ["Agreement", agreement, percent], ["Likeness", likeness, fixed]].flatMap(([title, value, format]) => (some(value)
      ? EACH.map((k) => ({ title, of: NAMES[k], key: swatch(k), value: (row) => (row.kept ? value(row, k) : NaN), text: (row) => format(value(row, k)) })) : [])),
    { title: "Time", value: (row) => (row.seconds ? spent(row) : 0), text: (row) => seconds(spent(row)), share: true },
  ];
  const rows = (found) => Object.entries(found).map(([name, row]) => ({ name, ...row }));
  return section("numbers", "Numbers", "Every figure of every tensor; a click on a heading sorts.", tables([
    ["Tensors", () => table({ caption: "Every tensor of the merge", columns: columns("Tensor", true), rows: TENSORS, sorted: 0, descending: false })],
    ["Layers", () => table({ caption: "Every layer of the merge", columns: columns("Layer"), rows: rows(DATA.layers), sorted: 0, descending: false })],
    ["Modules", () => table({ caption: "Every kind of module", columns: columns("Kind of module"), rows: rows(DATA.modules), sorted: 1 })],
  ], "Search names, e.g. 31 q_proj"));
}

function recipe() {
  const facts = {
    Output: OUT.out, Device: `${OUT.device}: ${OUT.device_why}`, Passes: OUT.n_passes, Shards: OUT.shards.length,
    "Kept from before": OUT.resumed_bytes ? bytes(OUT.resumed_bytes) : null,
    "Seen of the result": DATA.total ? `${percent(SEEN / (TENSORS.reduce((sum, row) => sum + row.n_elements, 0) || 1))}, in runs of ${whole(DATA.sample.run)} elements` : null,
    "Merged by this run": TENSORS.length < DATA.n_tensors ? `${whole(TENSORS.length)} of ${whole(DATA.n_tensors)} tensors` : null,
  };
  return section("recipe", "Recipe", "",
    make("div", { class: "figures" },
      figure("What was asked for", "The recipe as it was given.", [make("pre", { tabindex: 0 }, DATA.recipe)], "half"),
      figure("What was done", "Facts of the run.", [make("dl", {}, Object.entries(facts).filter(([, value]) => value !== null)
        .flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))])),
      OUT.warnings.length ? make("details", { open: true }, make("summary", {}, "Warnings"), make("ul", {}, OUT.warnings.map((text) => make("li", {}, text)))) : null], "half")));
}

const SECTIONS = (DATA.total ? [summary(), effects(), times(), numbers(), recipe()] : [recipe()]).filter(Boolean);
document.title = `Merge of ${NAMES.join(", ")}`;
document.getElementById("head").append(...head());
document.getElementById("head").after(navigation(SECTIONS));
document.getElementById("main").replaceChildren(...SECTIONS, make("footer", {}, "Written by tvfast merge --report."));
document.documentElement.dataset.ready = "yes";
