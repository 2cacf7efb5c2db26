"use strict";
// Building blocks of the pages. Every name goes through text nodes and attributes, never through markup.

const SPACE = document.getElementById("space").namespaceURI;
const TIP = document.getElementById("tip");

function put(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const make = (tag, attributes, ...children) => put(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) => put(document.createElementNS(SPACE, tag), attributes, children);

// Numbers as text.

const known = (value) => typeof value === "number" && Number.isFinite(value);
const raised = (n) => [...String(n)].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
const digits = (value, n = 3) => {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) {
    const [factor, exponent] = value.toExponential(n - 1).split("e");
    return `${factor}·10${raised(Number(exponent))}`;
  }
  const after = size === 0 ? 0 : Math.max(0, n - 1 - Math.floor(Math.log10(size)));
  return value.toFixed(Math.min(after, 8));
};
const percent = (share) => (known(share) ? `${share === 0 ? "0" : digits(100 * share)}\u00a0%` : "–");
const fixed = (value) => (known(value) ? value.toFixed(3).replace("-", "−") : "–");
const whole = (value) => value.toLocaleString("en");
const bytes = (value) => {
  const prefixes = ["B", "KB", "MB", "GB", "TB", "PB"];
  let at = 0;
  while (Math.round(value) >= 1000 && at < prefixes.length - 1) [value, at] = [value / 1000, at + 1];
  return `${at ? digits(value) : value} ${prefixes[at]}`;
};
const seconds = (value) => (value < 60 ? `${digits(value)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`);
const mean = (values) => {
  const some = values.filter(known);
  return some.length ? some.reduce((sum, value) => sum + value, 0) / some.length : NaN;
};
const natural = new Intl.Collator("en", { numeric: true }).compare;
// A name that may be broken behind its dots and underscores.
const breakable = (name) => name.split(/(?<=[._/])/).flatMap((part) => [part, make("wbr")]);
const color = (k) => `var(--s${k % 8})`;
const dash = (k) => ["", "7 4", "2 4", "10 3 2 3"][Math.floor(k / 8) % 4];
const swatch = (k) => make("span", { class: "key", style: `--key:${color(k)}` });

// Parts of a page.

function section(id, title, lead, ...children) {
  return make("section", { id, "aria-labelledby": `${id}-title` },
    make("h2", { id: `${id}-title` }, title), lead ? make("p", { class: "lead" }, lead) : null, ...children);
}

function figure(title, says, parts, size = "") {
  return make("figure", { class: `card ${size}` },
    make("figcaption", {}, make("h3", {}, title), make("p", { class: "says" }, says)), ...parts);
}

function tile(title, value, small, mark, tone, says) {
  return make("div", { class: "card tile" }, make("h3", {}, title),
    make("div", { class: "value" }, value, small ? make("small", {}, ` ${small}`) : null),
    make("p", {}, mark ? make("span", { class: `mark ${tone}` }, `${mark}. `) : null, says));
}

function legend(series) {
  if (series.length < 2) return null;
  return make("ul", { class: "legend" }, series.map((one) => make("li", {},
    draw("svg", { width: 22, height: 10, "aria-hidden": "true" }, draw("line", {
      x1: 1, x2: 21, y1: 5, y2: 5, stroke: one.color, "stroke-width": 2.5, "stroke-dasharray": one.dash,
    })), one.name)));
}

function navigation(sections) {
  return make("nav", { "aria-label": "Figures" }, make("ul", {}, sections.map((one) =>
    make("li", {}, make("a", { href: `#${one.id}` }, one.querySelector("h2").textContent)))));
}

// Drawings know their width in pixels, so that text keeps its size; they are made anew when it changes.
function chart(paint) {
  const box = make("div", { class: "chart" });
  let width = 0;
  const again = () => {
    const found = Math.floor(box.clientWidth);
    if (found > 0 && found !== width) box.replaceChildren(paint((width = found)));
  };
  new ResizeObserver(again).observe(box);
  box.repaint = () => { width = 0; again(); };
  return box;
}

function showTip(title, rows, x, y) {
  TIP.replaceChildren(make("b", {}, title), ...rows.map(([key, name, value]) => make("div", {},
    key ? make("span", { class: "key", style: `--key:${key}` }) : null, make("span", {}, name), make("span", {}, value))));
  TIP.hidden = false;
  const { width, height } = TIP.getBoundingClientRect();
  TIP.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
  TIP.style.top = `${y - height - 12 > 4 ? y - height - 12 : y + 18}px`;
}
const hideTip = () => { TIP.hidden = true; };
const say = (text) => { document.getElementById("said").textContent = text; };
addEventListener("scroll", hideTip, { passive: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());

// Lets a pointer, a finger or the arrow keys point at one of n places of a drawing.
function pointed(svg, n, placeOf, describe, mark) {
  let at = -1;
  const point = (next, x, y, spoken) => {
    at = next;
    const { title, rows } = describe(at);
    mark(at);
    showTip(title, rows, x, y);
    if (spoken) say(`${title}: ${rows.map(([, name, value]) => `${name} ${value}`).join(", ")}`);
  };
  const leave = () => { mark(-1); hideTip(); };
  const byPointer = (event) => {
    const box = svg.getBoundingClientRect();
    const found = placeOf(event.clientX - box.left, event.clientY - box.top);
    if (found >= 0 && found < n) point(found, event.clientX, event.clientY);
    else leave();
  };
  put(svg, {
    tabindex: 0, onpointermove: byPointer, onpointerdown: byPointer, onpointerleave: leave, onblur: leave,
    onkeydown: (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, Home: -n, End: n }[event.key];
      if (!step || !n) return;
      event.preventDefault();
      const box = svg.getBoundingClientRect();
      point(Math.max(0, Math.min(n - 1, at + step)), box.left + box.width / 2, box.top + 40, true);
    },
  }, []);
}

// The distance of about n round values between two numbers.
function stepOf(low, high, n) {
  const rough = (high - low) / n || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((m) => m * size).find((step) => step >= rough * 0.999);
}

// Axes of a drawing: a scale for values, its grid, and the room that is left.
function frame(width, height, low, high, unit, format) {
  const step = stepOf(low, high, 4);
  const top = Math.ceil(high / step - 1e-9) * step;
  const bottom = Math.floor(low / step + 1e-9) * step;
  const shown = Array.from({ length: Math.round((top - bottom) / step) + 1 }, (_, i) => bottom + i * step);
  const texts = shown.map((value) => format(value, step));
  const left = 10 + 7 * Math.max(...texts.map((text) => text.length));
  const room = { left, right: width - 8, top: 24, bottom: height - 38 };
  const y = (value) => room.bottom - ((value - bottom) / (top - bottom || 1)) * (room.bottom - room.top);
  const grid = shown.map((value, i) => [
    draw("line", { class: Math.abs(value) < step * 1e-6 ? "axis" : "grid", x1: left, x2: room.right, y1: y(value), y2: y(value) }),
    draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, texts[i]),
  ]);
  return { room, y, nodes: [grid.flat(), draw("text", { x: 0, y: 11 }, unit)].flat() };
}
const byStep = (scale = 1) => (value, step) => {
  const size = step * scale;
  let after = Math.max(0, -Math.floor(Math.log10(size) + 1e-9));
  if (Math.abs(Number(size.toFixed(after)) / size - 1) > 1e-6) after += 1; // 0.25
  return (value * scale).toFixed(after).replace(/^-(?=.*[1-9])/, "−").replace("-", "");
};

// Values along the layers. `axis` is { names, ticks: text of each, title }; series are { name, color, dash, values }.
function lines({ axis, series, unit, scale = 1, format, from = 0, label }) {
  return chart((width) => {
    const height = width < 500 ? 210 : 250;
    const values = series.flatMap((one) => one.values).filter(known);
    const low = Math.min(from, ...values);
    const most = Math.max(low, ...values);
    const high = most > low ? most : low + 1 / scale;
    const { room, y, nodes } = frame(width, height, low, high, unit, byStep(scale));
    const n = axis.names.length;
    const x = (i) => room.left + (n > 1 ? (i * (room.right - room.left)) / (n - 1) : (room.right - room.left) / 2);
    const every = Math.max(1, ...[1, 2, 5, 10, 20, 50, 100, 200].filter((step, i, all) => !i || n / all[i - 1] > width / 56));
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label }, nodes);
    for (let i = 0; i < n; i += every) {
      svg.append(draw("text", { x: x(i), y: room.bottom + 17, "text-anchor": "middle" }, axis.ticks[i]));
    }
    svg.append(draw("text", { x: (room.left + room.right) / 2, y: height - 4, "text-anchor": "middle" }, axis.title));
    for (const one of series) {
      let path = "", broken = true;
      one.values.forEach((value, i) => {
        if (known(value)) path += `${broken ? "M" : "L"}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
        broken = !known(value);
      });
      svg.append(draw("path", { class: "curve", d: path, stroke: one.color, "stroke-dasharray": one.dash }));
      if (n === 1 && known(one.values[0])) svg.append(draw("circle", { cx: x(0), cy: y(one.values[0]), r: 4, fill: one.color }));
    }
    const cursor = draw("line", { class: "cursor", y1: room.top, y2: room.bottom, visibility: "hidden" });
    svg.append(cursor);
    pointed(svg, n,
      (px) => (px < room.left - 12 ? -1 : Math.round(((px - room.left) / (room.right - room.left)) * (n - 1))),
      (i) => ({ title: axis.names[i], rows: series.map((one) => [one.color, one.name, format(one.values[i])]) }),
      (i) => put(cursor, i < 0 ? { visibility: "hidden" } : { visibility: "visible", x1: x(i), x2: x(i) }, []));
    return svg;
  });
}

// Shares of magnitudes in octaves; series as for `lines`, of exponents from `first` on.
function octaves({ first, series, unit, label }) {
  return chart((width) => {
    const height = width < 500 ? 230 : 280;
    const n = Math.max(...series.map((one) => one.values.length));
    const { room, y, nodes } = frame(width, height, 0, Math.max(...series.flatMap((one) => one.values), 1e-9), unit, byStep(100));
    const step = (room.right - room.left) / n;
    const every = Math.max(1, Math.ceil(46 / step));
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label }, nodes);
    for (let i = 0; i <= n; i += 1) {
      if ((first + i) % every) continue;
      svg.append(draw("line", { class: "grid", x1: room.left + i * step, x2: room.left + i * step, y1: room.bottom, y2: room.bottom + 4 }));
      svg.append(draw("text", { x: room.left + i * step, y: room.bottom + 17, "text-anchor": "middle" }, `2${raised(first + i)}`));
    }
    svg.append(draw("text", { x: (room.left + room.right) / 2, y: height - 4, "text-anchor": "middle" }, "|τ|, one step per octave (a factor of 2)"));
    for (const one of series) {
      const steps = one.values.map((value, i) => `V${y(value).toFixed(1)}H${(room.left + (i + 1) * step).toFixed(1)}`).join("");
      const path = `M${room.left.toFixed(1)} ${room.bottom}${steps}V${room.bottom}`;
      svg.append(draw("path", { d: `${path}Z`, fill: one.color, "fill-opacity": 0.12 }));
      svg.append(draw("path", { class: "curve", d: path, stroke: one.color, "stroke-dasharray": one.dash }));
    }
    const cursor = draw("rect", { y: room.top, height: room.bottom - room.top, width: step, fill: "var(--soft)", "fill-opacity": 0.14, visibility: "hidden" });
    svg.append(cursor);
    pointed(svg, n, (px) => Math.floor((px - room.left) / step),
      (i) => ({
        title: `${digits(2 ** (first + i))} ≤ |τ| < ${digits(2 ** (first + i + 1))}`,
        rows: series.map((one) => [one.color, one.name, percent(one.values[i])]),
      }),
      (i) => put(cursor, i < 0 ? { visibility: "hidden" } : { visibility: "visible", x: room.left + i * step }, []));
    return svg;
  });
}
// The colour of a value: from `low` to `high`, or to both sides of zero where `low` is negative.
function shade(value, low, high) {
  if (!known(value)) return "transparent";
  const signed = low < 0;
  const part = signed ? Math.abs(value) / Math.max(-low, high) : (value - low) / (high - low || 1);
  const end = signed && value < 0 ? "var(--over)" : "var(--heat)";
  return `color-mix(in oklab, ${end} ${(100 * Math.max(0, Math.min(1, part))).toFixed(1)}%, var(--cold))`;
}
function scaleOf(low, high, format) {
  const stops = [0, 0.25, 0.5, 0.75, 1].map((t) => shade(low + t * (high - low), low, high));
  return make("div", { class: "scale" }, make("span", {}, format(low)),
    make("i", { style: `background:linear-gradient(90deg, ${stops.join(", ")})` }), make("span", {}, format(high)));
}

// Rows of cells over the layers; `value(row, column)`.
function heat({ rows, axis, value, low, high, format, label }) {
  return chart((width) => {
    const left = 8 + 6.6 * Math.max(...rows.map((name) => name.length));
    const n = axis.names.length;
    const w = (width - left - 4) / n, h = width < 500 ? 22 : 26;
    const height = rows.length * h + 40;
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
    rows.forEach((row, r) => {
      svg.append(draw("text", { x: left - 6, y: r * h + h / 2 + 4, "text-anchor": "end" }, row));
      for (let i = 0; i < n; i += 1) {
        svg.append(draw("rect", {
          x: (left + i * w).toFixed(2), y: r * h, width: (w - (w > 5 ? 1 : 0)).toFixed(2), height: h - 1,
          style: `fill:${shade(value(r, i), low, high)}`,
        }));
      }
    });
    const every = Math.max(1, ...[1, 2, 5, 10, 20, 50, 100].filter((step, i, all) => !i || all[i - 1] * w < 26));
    for (let i = 0; i < n; i += every) {
      svg.append(draw("text", { x: left + (i + 0.5) * w, y: rows.length * h + 16, "text-anchor": "middle" }, axis.ticks[i]));
    }
    svg.append(draw("text", { x: left + (n * w) / 2, y: height - 4, "text-anchor": "middle" }, axis.title));
    const outline = draw("rect", { class: "outline", width: Math.max(w, 3), height: h, visibility: "hidden" });
    svg.append(outline);
    pointed(svg, n * rows.length,
      (px, py) => {
        const i = Math.floor((px - left) / w), r = Math.floor(py / h);
        return i < 0 || i >= n || r < 0 || r >= rows.length ? -1 : r * n + i;
      },
      (at) => ({ title: `${axis.names[at % n]}.${rows[Math.floor(at / n)]}`, rows: [[null, "value", format(value(Math.floor(at / n), at % n))]] }),
      (at) => put(outline, at < 0 ? { visibility: "hidden" }
        : { visibility: "visible", x: left + (at % n) * w, y: Math.floor(at / n) * h }, []));
    return svg;
  });
}

// A table that is searched and sorted. Columns are { title, of, value(row), text(row), share, left, key }.
function table({ caption, columns, rows, sorted = -1, descending = true, page = 100 }) {
  const body = make("tbody");
  const heads = columns.map((column, i) => make("th", { scope: "col", class: column.left ? "text" : "" },
    make("button", { type: "button", onclick: () => sort(i) }, column.key ?? null,
      make("span", {}, column.title, column.of ? make("small", {}, column.of) : null))));
  const more = make("button", { type: "button", class: "more", onclick: () => { limit = Infinity; fill(); } });
  const count = make("span", { class: "note", role: "status" });
  let shown = rows, limit = page, at = sorted, down = descending;
  const most = columns.map((column) => (column.share ? Math.max(...rows.map((row) => column.value(row)).filter(known), 0) : 0));
  const cell = (row, column, i) => {
    if (!i) return make("th", { scope: "row" }, breakable(column.text(row)));
    const value = column.share ? column.value(row) : 0;
    const bar = column.share && known(value) && most[i] > 0;
    return make("td", bar ? { class: "bar", style: `--w:${((100 * Math.max(0, value)) / most[i]).toFixed(1)}%` } : { class: column.left ? "text" : "" }, column.text(row));
  };
  function fill() {
    body.replaceChildren(...shown.slice(0, limit).map((row) => make("tr", {}, columns.map((column, i) => cell(row, column, i)))));
    more.hidden = shown.length <= limit;
    more.textContent = `Show all ${whole(shown.length)}`;
    count.textContent = shown.length === rows.length ? `${whole(rows.length)} rows` : `${whole(shown.length)} of ${whole(rows.length)} rows`;
  }
  function order() {
    if (at < 0) return;
    const { value } = columns[at];
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (typeof x === "string") return natural(x, y);
      if (!known(x) || !known(y)) return known(x) ? (down ? 1 : -1) : known(y) ? (down ? -1 : 1) : 0;
      return x - y;
    };
    shown = [...shown].sort((a, b) => (down ? compare(b, a) : compare(a, b)));
    heads.forEach((head, i) => (i === at ? head.setAttribute("aria-sort", down ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
  }
  function sort(i) {
    down = at === i ? !down : typeof columns[i].value(rows[0] ?? {}) !== "string";
    at = i;
    order();
    fill();
  }
  function search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    shown = rows.filter((row) => words.every((word) => columns[0].text(row).toLowerCase().includes(word)));
    limit = page;
    order();
    fill();
  }
  order();
  fill();
  const wide = make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption },
    make("table", {}, make("caption", { class: "unseen" }, caption), make("thead", {}, make("tr", {}, heads)), body));
  return { node: make("div", {}, wide, make("div", { class: "row" }, count, more)), search };
}

// Several tables of which one is seen, with one box to search in it.
function tables(entries, hint) {
  const input = make("input", { type: "search", "aria-label": hint, placeholder: hint, oninput: () => made[at].search(input.value) });
  const place = make("div");
  const made = {};
  let at = entries[0][0];
  const show = (name) => {
    at = name;
    made[name] ??= entries.find(([key]) => key === name)[1]();
    made[name].search(input.value);
    place.replaceChildren(made[name].node);
  };
  const choice = make("fieldset", { "aria-label": "Rows" }, entries.map(([name], i) => make("label", {},
    make("input", { type: "radio", name: "rows", checked: i === 0, onchange: () => show(name) }), name)));
  show(at);
  return make("div", {}, make("div", { class: "row", style: "margin-top:12px" }, choice, input), place);
}

function choice(label, options, chosen) {
  const select = make("select", { onchange: () => chosen(select.value) }, options.map(([value, text]) => make("option", { value }, text)));
  return make("label", { class: "row" }, label, select);
}

// The layers that have a number, in order, as an axis.
function layersOf(names) {
  const numbered = names.filter((name) => /\.\d+$/.test(name)).sort(natural);
  const prefixes = [...new Set(numbered.map((name) => name.replace(/\.\d+$/, "")))];
  return {
    names: numbered, ticks: numbered.map((name) => name.match(/\d+$/)[0]),
    title: prefixes.length === 1 ? `layer (${prefixes[0]})` : `layer (${prefixes.join(", then ")})`,
  };
}

// What a page calls its models: the end of each path that tells it from the others.
function namesOf(paths) {
  const parts = paths.map((path) => path.split("/").filter(Boolean));
  return parts.map((own, k) => {
    for (let n = 1; n < own.length; n += 1) {
      const name = own.slice(-n).join("/");
      const twins = parts.filter((other) => other.slice(-n).join("/") === name);
      if (twins.every((other) => other.join("/") === own.join("/"))) return twins.length > 1 ? `${name} (${k})` : name;
    }
    return paths.indexOf(paths[k]) === paths.lastIndexOf(paths[k]) ? paths[k] : `${paths[k]} (${k})`;
  });
}
