// The page of `tvfast inspect`: how task vectors relate, and what that says of a merge.

const DATA = JSON.parse(document.getElementById("data").textContent);
const [BASE, ...MODELS] = DATA.checkpoints;
const [BASE_NAME, ...NAMES] = namesOf(DATA.checkpoints.map((one) => one.path));
const FOUND = DATA.task_vectors;
const K = MODELS.length;
const EACH = MODELS.map((_, k) => k);
const PAIRS = EACH.flatMap((k) => EACH.slice(0, k).map((j) => [j, k]));
const TENSORS = Object.entries(FOUND.tensors).map(([name, row]) => ({ name, ...row }));
const AXIS = layersOf(Object.keys(FOUND.layers));

// Figures of a row of the data.
const change = (row, k) => (row.base_norm > 0 ? (row.norms[k] ?? NaN) / row.base_norm : NaN);
const cosine = (row, [j, k]) => row.cosines[j][k] ?? NaN;
const meanCosine = (row) => mean(PAIRS.map((pair) => cosine(row, pair)));
const meanChange = (row) => mean(EACH.map((k) => change(row, k)));
const density = (row, k) => 1 - row.sparsity[k];
const meanDensity = (row) => mean(EACH.map((k) => density(row, k)));
const meanTied = (row) => mean(row.tie_mass);
const conflict = (row) => row.sign_conflict;
const chance = (row) => row.sign_conflict_by_chance;

// Several rows as if they were one vector.
function together(rows) {
  if (rows.length < 2) return rows[0];
  const n = rows.reduce((sum, row) => sum + row.n_elements, 0) || 1;
  const share = (of) => rows.reduce((sum, row) => sum + of(row) * row.n_elements, 0) / n;
  const length = (of) => Math.sqrt(rows.reduce((sum, row) => sum + (of(row) ?? NaN) ** 2, 0));
  const norms = EACH.map((k) => length((row) => row.norms[k]));
  const dot = (j, k) => rows.reduce((sum, row) => sum + (row.cosines[j][k] ?? 0) * row.norms[j] * row.norms[k], 0);
  return {
    n_elements: n, norms, base_norm: length((row) => row.base_norm),
    cosines: EACH.map((j) => EACH.map((k) => (norms[j] * norms[k] > 0 ? dot(j, k) / (norms[j] * norms[k]) : null))),
    sign_conflict: share(conflict), sign_conflict_by_chance: share(chance),
    sparsity: EACH.map((k) => share((row) => row.sparsity[k])), tie_mass: EACH.map((k) => share((row) => row.tie_mass[k])),
  };
}

const perModel = (value) => EACH.map((k) => ({
  name: NAMES[k], color: color(k), dash: dash(k), values: AXIS.names.map((name) => value(FOUND.layers[name], k)),
}));
const perLayer = (name, value, k, style) => ({ name, color: color(k), dash: style ?? dash(k), values: AXIS.names.map((one) => value(FOUND.layers[one])) });
const range = (values, format) => {
  const [low, high] = [Math.min(...values.filter(known)), Math.max(...values.filter(known))].map(format);
  return low === high ? low : `${low.replace(/\u00a0%$/, "")} – ${high}`;
};

const closest = (row) => {
  const [j, k] = PAIRS.filter((pair) => known(cosine(row, pair))).reduce((best, pair) => (cosine(row, pair) > cosine(row, best) ? pair : best));
  return `${NAMES[j]} and ${NAMES[k]}`;
};

function head() {
  const others = K <= 3 ? NAMES.join(", ").replace(/, ([^,]*)$/, " and $1") : `${K} models`;
  const member = (one, name, key, role = "") => make("li", {}, key, make("b", {}, name),
    make("small", {}, `${role}${whole(one.parameters)} parameters, ${bytes(one.bytes)}, ${Object.keys(one.dtypes).join(", ")}`),
    one.path !== name ? make("small", {}, one.path) : null);
  return [
    make("h1", {}, `How ${others} ${K === 1 ? "differs" : "differ"} from ${BASE_NAME}`),
    make("p", { class: "lead" }, "A task vector τ = θ − θ₀ is what fine-tuning changed in the base θ₀. These figures tell how much each model changed, where, and whether the changes get in each other's way when they are merged."),
    make("ul", { class: "members" }, member(BASE, BASE_NAME, make("span", { class: "key hollow" }), "the base θ₀, "),
      MODELS.map((one, k) => member(one, NAMES[k], swatch(k)))),
  ];
}

function summary() {
  const all = FOUND.total;
  const tiles = [];
  if (K > 1) {
    const c = meanCosine(all);
    const [mark, tone, says] = !known(c) ? ["", "", "An angle needs two models that differ from the base by finite numbers."] : c > 0.5 ? ["Much alike", "care", "The models changed nearly the same things. Average them; a sum would count the shared change several times."]
      : c > 0.15 ? ["Partly shared", "care", "A sum overshoots along what the models share. Use a scale below 1, or a mean of agreeing entries as in TIES."]
        : c > -0.05 ? ["Independent", "good", "The task vectors are close to orthogonal, so that their sum keeps most of each."]
          : ["Opposed", "care", "What one model adds, another takes away. Expect each to lose; merge fewer, or with smaller weights."];
    tiles.push(tile("Direction", fixed(c), K > 2 ? `mean cosine, ${range(PAIRS.map((pair) => cosine(all, pair)), fixed)}` : "cosine", mark, tone, K > 2 && known(c) ? `${says} Most alike: ${closest(all)}.` : says));
    const part = conflict(all) / chance(all);
    const [mark2, tone2, says2] = !known(part) ? ["", "", "Signs can clash only where two models differ from the base."] : part < 0.9 ? ["Less than by chance", "good", "The models agree on signs more often than unrelated ones would."]
      : part <= 1.05 ? ["As by chance", "good", "Signs clash as often as in unrelated models; trimming small entries first, as TIES does, removes most clashes."]
        : ["More than by chance", "care", "The models pull the same entries in opposite directions. A method that elects signs loses one side."];
    tiles.push(tile("Sign conflict", percent(conflict(all)), `of entries; by chance ${percent(chance(all))}`, mark2, tone2, says2));
  }
  const least = Math.min(...all.norms), ratio = Math.max(...all.norms) / least;
  const size = range(EACH.map((k) => change(all, k)), percent);
  if (K > 1) {
    const [mark, tone, says] = !all.norms.every(known) ? ["Not finite", "care", "A model holds NaN or infinity, so that its change has no size."]
      : least === 0 ? ["Unchanged", "care", "A model equals the base and adds nothing."]
      : ratio < 1.5 ? ["Balanced", "good", "Equal weights give every model a similar say."]
      : ratio < 3 ? ["Uneven", "care", `The largest change is ${digits(ratio, 2)} times the smallest and leads a plain sum.`]
        : ["Lopsided", "care", `The largest change is ${digits(ratio, 2)} times the smallest and drowns it; weigh the models or normalise.`];
    tiles.push(tile("Size of the change", size, "of the base's norm", mark, tone, says));
  } else tiles.push(tile("Size of the change", size, "of the base's norm", "", "", "How far fine-tuning moved the weights, as norms ‖τ‖ / ‖θ₀‖."));
  tiles.push(tile("Density", range(EACH.map((k) => density(all, k)), percent), "of entries changed", "", "",
    meanDensity(all) > 0.9 ? "Nearly every entry moved, mostly by little: methods that drop small entries have much to drop."
      : "The rest equals the base: its change was zero, or lost when the weights were rounded."));
  const tied = Math.max(...all.tie_mass);
  tiles.push(tile("Tie mass", range(all.tie_mass, percent), "of entries equal the threshold of the top 20\u00a0%", tied > 0.01 ? "Many ties" : "Few ties", tied > 0.01 ? "care" : "good",
    tied > 0.01 ? "Libraries keep different shares of so many tied entries, and a trim keeps more or less than it was told." : "A trim keeps the share that it was told: hardly an entry equals the threshold."));
  return section("summary", "Summary", "", make("div", { class: "tiles" }, tiles));
}

function norms() {
  if (!AXIS.names.length) return null;
  const series = perModel(change);
  return section("size", "Size", "", make("div", { class: "figures" }, figure("How much each layer changed",
    "Norm of the task vector over that of the base, ‖τ‖ / ‖θ₀‖, for all tensors of a layer. Where one line is far above the others, that model decides what a plain sum does there.",
    [legend(series), lines({ axis: AXIS, series, unit: "% of the base's norm", scale: 100, format: percent, label: "Relative norms of the task vectors by layer" })])));
}

function matrix() {
  const all = FOUND.total;
  return make("div", { class: "wide" }, make("table", { class: "matrix" },
    make("caption", { class: "unseen" }, "Cosines between the task vectors of whole models"),
    make("thead", {}, make("tr", {}, make("th"), NAMES.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, EACH.map((j) => make("tr", {}, make("th", { scope: "row" }, NAMES[j]), EACH.map((k) => {
      const value = all.cosines[j][k];
      const strong = known(value) && Math.abs(value) > 0.55;
      return make("td", { style: `background:${shade(value, -1, 1)}${strong ? ";color:var(--card)" : ""}` }, j === k ? "1" : fixed(value));
    }))))));
}

function direction() {
  if (K < 2) return null;
  const many = PAIRS.length > 6;
  const of = (pick) => (row) => pick(...PAIRS.map((pair) => cosine(row, pair)).filter(known));
  const series = many
    ? [perLayer("largest", of(Math.max), 1, "2 4"), perLayer("mean", meanCosine, 0, ""), perLayer("smallest", of(Math.min), 2, "7 4")]
    : PAIRS.map((pair, i) => perLayer(`${NAMES[pair[0]]}, ${NAMES[pair[1]]}`, (row) => cosine(row, pair), i));
  return section("direction", "Direction", "", make("div", { class: "figures" },
    figure("Cosines of whole models", "0: independent changes, which add up without harm. 1: the same change, better averaged than summed. Below 0: opposed.", [matrix()], "third"),
    AXIS.names.length ? figure("Cosines by layer", "Layers where two models are alike share what they learned; those near 0 can be merged freely.",
      [legend(series), lines({ axis: AXIS, series, unit: "cosine", format: fixed, label: "Cosines between task vectors by layer" })], "two") : null));
}

function signs() {
  if (!AXIS.names.length) return null;
  const clash = [perLayer("found", conflict, 0, ""), { ...perLayer("by chance", chance, 0, "3 4"), color: "var(--soft)" }];
  const share = (title, says, series, label) => figure(title, says,
    [legend(series), lines({ axis: AXIS, series, unit: "% of entries", scale: 100, format: percent, label })], K > 1 ? "third" : "half");
  return section("signs", "Signs and ties", "", make("div", { class: "figures" },
    K > 1 ? share("Sign conflict", "Entries where one model goes up and another down; dashed: what random signs would give. A solid line above it means that the models fight in this layer.", clash, "Sign conflict by layer") : null,
    share("Density", "Entries that differ from the base. The sparser the changes, the less often two models touch the same entry.", perModel(density), "Density by layer"),
    share("Tie mass", "Entries that equal the threshold of a trim to the top 20 %. Where it is high, the trimmed share depends on how ties are kept.", perModel((row, k) => row.tie_mass[k]), "Tie mass by layer")));
}

function magnitudes() {
  const found = FOUND.histograms;
  const layers = { "": found.total, ...found.layers };
  const sums = (rows) => rows.map((row) => row.reduce((sum, n) => sum + n, 0));
  let layer = "";
  const all = sums(found.total); // octaves with hardly anything are left out at both ends
  const seen = found.total[0].map((_, i) => EACH.some((k) => found.total[k][i] > 1e-4 * all[k]));
  const [begin, end] = [Math.max(0, seen.indexOf(true)), seen.lastIndexOf(true) + 1 || seen.length];
  const paint = () => octaves({
    first: found.first_exponent + begin, unit: "% of changed entries", label: "Histogram of the magnitudes of the task vectors",
    series: EACH.map((k) => {
      const total = sums(layers[layer])[k] || 1;
      return { name: NAMES[k], color: color(k), dash: dash(k), values: layers[layer][k].slice(begin, end).map((n) => n / total) };
    }),
  });
  const place = make("div", {}, paint());
  const names = Object.keys(found.layers).sort(natural);
  const select = choice("Layer", [["", "all together"], ...names.map((name) => [name, name])], (value) => { layer = value; place.replaceChildren(paint()); });
  return section("magnitudes", "Magnitudes", "", make("div", { class: "figures" }, figure("How large single changes are",
    "Magnitudes |τ| of the entries that changed. Curves on top of each other mean that one threshold suits all models; a long way between them means that a global threshold keeps one model and drops another.",
    [make("div", { class: "row" }, select, legend(perModel(change))), place])));
}

function map() {
  if (AXIS.names.length < 2) return null;
  const cells = {};
  const modules = [];
  for (const row of TENSORS) {
    if (!AXIS.names.includes(row.layer)) continue;
    if (!modules.includes(row.module)) modules.push(row.module);
    (cells[`${row.layer} ${row.module}`] ??= []).push(row);
  }
  modules.sort(natural);
  for (const key of Object.keys(cells)) cells[key] = together(cells[key]);
  const metrics = [
    ["Change: mean", meanChange, percent], ...(K > 1 ? EACH.map((k) => [`Change: ${NAMES[k]}`, (row) => change(row, k), percent]) : []),
    ...(K > 1 ? [["Mean cosine", meanCosine, fixed], ["Sign conflict", conflict, percent], ["Sign conflict above chance", (row) => conflict(row) - chance(row), percent]] : []),
    ["Density", meanDensity, percent], ["Tie mass", meanTied, percent],
  ];
  const place = make("div"), scale = make("div");
  const paint = (at) => {
    const [name, metric, format] = metrics[at];
    const value = (r, i) => { const cell = cells[`${AXIS.names[i]} ${modules[r]}`]; return cell ? metric(cell) : NaN; };
    const values = Object.values(cells).map(metric).filter(known);
    const high = Math.max(...values), signed = Math.min(...values) < 0;
    const low = signed ? -Math.max(high, -Math.min(...values)) : 0;
    const top = signed ? -low : high;
    scale.replaceChildren(scaleOf(low, top, format));
    place.replaceChildren(heat({ rows: modules, axis: AXIS, value, low, high: top, format, label: `${name} by layer and kind of module` }));
  };
  const select = choice("Show", metrics.map(([name], i) => [i, name]), (value) => paint(Number(value)));
  paint(0);
  return section("map", "Map", "", make("div", { class: "figures" }, figure("Where in the model",
    "Every kind of module in every layer. Rows and columns that stand out are kinds of modules and layers that may deserve weights or densities of their own in the recipe.",
    [make("div", { class: "row" }, select, scale), place])));
}

function numbers() {
  const one = K <= 4;
  const columns = (first) => [
    { title: first, value: (row) => row.name ?? "", text: (row) => row.name },
    { title: "Elements", value: (row) => row.n_elements, text: (row) => whole(row.n_elements) },
    ...(one ? EACH.map((k) => ({ title: "Change", of: NAMES[k], key: swatch(k), value: (row) => change(row, k), text: (row) => percent(change(row, k)), share: true }))
      : [{ title: "Mean change", value: meanChange, text: (row) => percent(meanChange(row)), share: true }]),
    ...(PAIRS.length > 3 ? [{ title: "Mean cosine", value: meanCosine, text: (row) => fixed(meanCosine(row)) }]
      : PAIRS.map((pair) => ({ title: "Cosine", of: `${NAMES[pair[0]]}, ${NAMES[pair[1]]}`, value: (row) => cosine(row, pair), text: (row) => fixed(cosine(row, pair)) }))),
    ...(K > 1 ? [{ title: "Sign conflict", value: conflict, text: (row) => percent(conflict(row)), share: true }, { title: "By chance", value: chance, text: (row) => percent(chance(row)) }] : []),
    { title: K > 1 ? "Mean density" : "Density", value: meanDensity, text: (row) => percent(meanDensity(row)), share: true },
    { title: K > 1 ? "Mean tie mass" : "Tie mass", value: meanTied, text: (row) => percent(meanTied(row)), share: true },
    ...(one ? EACH.map((k) => ({ title: "Norm", of: NAMES[k], key: swatch(k), value: (row) => row.norms[k], text: (row) => digits(row.norms[k], 4) })) : []),
  ];
  const rows = (found) => Object.entries(found).map(([name, row]) => ({ name, ...row }));
  const shapes = [{ title: "Shape", left: true, value: (row) => row.n_elements, text: (row) => row.shape.join(" × ") || "scalar" }, { title: "Type", left: true, value: (row) => row.dtype ?? "", text: (row) => row.dtype }];
  const tensors = columns("Tensor");
  tensors.splice(1, 1, ...shapes);
  return section("numbers", "Numbers", "Every figure of every tensor; a click on a heading sorts.", tables([
    ["Tensors", () => table({ caption: "Task vectors of every tensor", columns: tensors, rows: TENSORS, sorted: 0, descending: false })],
    ["Layers", () => table({ caption: "Task vectors of every layer", columns: columns("Layer"), rows: rows(FOUND.layers), sorted: 0, descending: false })],
    ["Modules", () => table({ caption: "Task vectors of every kind of module", columns: columns("Kind of module"), rows: rows(FOUND.modules), sorted: 2 })],
  ], "Search names, e.g. 31 q_proj"));
}

function files() {
  const found = DATA.differences;
  const list = (title, items) => (items.length ? make("details", {}, make("summary", {}, `${title} (${whole(items.length)})`), make("pre", { tabindex: 0 }, items.join("\n"))) : null);
  const differences = [
    ...found.missing.map((one) => list(`Tensors that ${one.path} lacks`, one.tensors)),
    list("Shapes that differ", Object.entries(found.shapes).map(([name, row]) => `${name}: ${row.map((shape) => (shape ? `[${shape.join(", ")}]` : "none")).join(", ")}`)),
    list("Storage types that differ", Object.entries(found.dtypes).map(([name, row]) => `${name}: ${row.map((type) => type ?? "none").join(", ")}`)),
    list("Not compared", Object.entries(found.not_compared).map(([name, why]) => `${name}: ${why}`)),
  ].filter(Boolean);
  return section("files", "Files", differences.length ? "What keeps tensors out of the figures above, or out of a merge."
    : "All checkpoints hold the same tensors, in the same shapes and storage types.", differences,
  make("details", {}, make("summary", {}, "Checkpoints"), DATA.checkpoints.map((one) => make("dl", {},
    Object.entries({ Path: one.path, Files: `${one.files.length}, ${bytes(one.files.reduce((sum, file) => sum + file.bytes, 0))}`, Tensors: whole(one.tensors), Parameters: whole(one.parameters), ...one.config })
      .flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, String(value))])))));
}

const SECTIONS = (FOUND.total ? [summary(), norms(), direction(), signs(), magnitudes(), map(), numbers(), files()] : [files()]).filter(Boolean);
document.title = `How ${NAMES.join(", ")} ${K === 1 ? "differs" : "differ"} from ${BASE_NAME}`;
document.getElementById("head").append(...head().flat());
document.getElementById("head").after(navigation(SECTIONS));
document.getElementById("main").replaceChildren(...SECTIONS, make("footer", {}, `${whole(TENSORS.length)} tensors compared by tvfast inspect.`));
document.documentElement.dataset.ready = "yes";
