// Pictures as SVG: maps of layers by columns, lines over layers, bars; and their export as PNG, SVG and CSV.

import { button, cut, h, svg } from "./core.js";

const DASHES = ["", "7 4", "2 4", "10 3 2 3", "1 3", "14 4"];
const MARKERS = ["M-4-4h8v8h-8z", "M0-5L5 4H-5z", "M0-5L5 0 0 5-5 0z", "M-4 0H4M0-4V4", "M-4-4L4 4M4-4L-4 4", "M-5-4H5L0 5z"];
const LEVELS = 12;
const room = () => (innerWidth < 600 ? 330 : 620);

/** A picture under its title, which states the finding, with buttons to save it. rows: returns its numbers, after a row of
    their names. `drawing` is an SVG, or several, which are saved as one. */
export function figure(title, name, drawing, rows, ...below) {
  const drawings = [drawing].flat(), exports = { CSV: () => save(csv(rows()), "text/csv", `${name}.csv`) };
  if (drawings[0]?.viewBox) {
    exports.SVG = () => save(source(collage(drawings, title)), "image/svg+xml", `${name}.svg`);
    exports.PNG = () => savePng(collage(drawings, title), name);
  }
  return h("figure", {}, h("div", { class: "title" }, h("h3", {}, title), h("span", { class: "exports" },
    Object.entries(exports).map(([kind, act]) => button(kind, act, { "aria-label": `Save ${title} as ${kind}` })))),
  Array.isArray(drawing) ? h("div", { class: "maps" }, drawings) : drawing, below);
}

/** A map of cells [column, row, value] (row 0 at the bottom), each coloured by its share of the highest. `say(column,
    row, value)` returns a cell's text, `pick(column, row)` is called when one is chosen. `rows` and `columns`: their
    labels; `chosen`: [column, row], either may be -1; `top` returns the label of the highest value. */
export function heatMap(cells, rows, columns, { label, title = "", top: most, say, pick, read, chosen = [-1, -1], height = 90, width = 220 }) {
  const top = Math.max(...cells.map((cell) => cell[2]), 0), left = 24, above = title ? 16 : 2;
  const size = [(width - left) / columns.length, height / rows.length];
  const box = (c, r, w = 1, n = 1) => `M${(left + c * size[0]).toFixed(2)} ${(above + (rows.length - r - n) * size[1]).toFixed(2)}h${(w * size[0]).toFixed(2)}v${(n * size[1]).toFixed(2)}h${(-w * size[0]).toFixed(2)}z`;
  const paths = Array(LEVELS).fill(""), values = new Map();
  for (const [c, r, value] of cells) {
    paths[Math.min(LEVELS - 1, Math.floor((LEVELS * value) / top))] += box(c, r);
    values.set(`${c} ${r}`, value);
  }
  const cursor = svg("path", { class: "cursor" });
  const named = [0, rows.length - 1].map((r) => svg("text", { class: "tick", x: left - 4, y: above + (rows.length - r - 0.5) * size[1] + 4, "text-anchor": "end" }, String(rows[r])));
  const marks = [chosen[0] >= 0 && box(chosen[0], 0, 1, rows.length), chosen[1] >= 0 && box(0, chosen[1], columns.length)].filter(Boolean);
  const under = columns.length > 16 ? [] : columns.map((name, c) => name && svg("text", { class: "tick under", x: left + (c + 0.5) * size[0], y: height + above + 9, "text-anchor": "middle" }, String(name).slice(0, size[0] / 4.6)));
  const map = svg("svg", { viewBox: `0 0 ${width} ${height + above + (under.length ? 12 : 2)}`, class: "heat", role: "img", "data-legend": "Rows: layers, the first at the bottom. Darker cells are nearer to the map's own highest value.", tabindex: 0, "aria-label": `${label}. Arrow keys read its cells, Enter chooses one.` },
    title && svg("text", { class: "name", x: left, y: 11 }, title), most && svg("text", { class: "tick", x: width, y: 11, "text-anchor": "end" }, most(top)), svg("path", { class: "field", d: box(0, 0, columns.length, rows.length) }),
    paths.map((d, i) => d && svg("path", { class: "hot", d, "fill-opacity": ((i + 1) / LEVELS).toFixed(2) })), named,
    marks.map((d) => svg("path", { class: "mark", d })), cursor, under);
  const at = [Math.max(chosen[0], 0), Math.max(chosen[1], 0)];
  const move = (c, r) => {
    at[0] = Math.min(columns.length - 1, Math.max(0, c));
    at[1] = Math.min(rows.length - 1, Math.max(0, r));
    cursor.setAttribute("d", box(...at));
    read.textContent = say(...at, values.get(at.join(" ")) ?? 0);
  };
  const point = (event) => {
    const seen = map.getBoundingClientRect(), scale = width / seen.width;
    move(Math.floor(((event.clientX - seen.left) * scale - left) / size[0]), Math.floor(rows.length - ((event.clientY - seen.top) * scale - above) / size[1]));
  };
  map.addEventListener("pointermove", point);
  map.addEventListener("click", (event) => { point(event); pick?.(...at); });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [0, 1], ArrowDown: [0, -1], ArrowLeft: [-1, 0], ArrowRight: [1, 0], Enter: [0, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(at[0] + step[0], at[1] + step[1]);
    if (event.key === "Enter") pick?.(...at);
  });
  return map;
}

/** Lines over layers. series: {name, values}, told apart by dash, marker and a label at the highest point as well as by
    colour; a null value leaves a gap. */
export function lines(series, layers, { label, unit, format, width = room(), height = 190 }) {
  const top = Math.max(...series.flatMap(({ values }) => values), 0) || 1, low = Math.min(...series.flatMap(({ values }) => values), 0);
  const x = (i) => 44 + ((width - 60) * i) / Math.max(layers.length - 1, 1), y = (v) => 14 + (height - 48) * (1 - (v - low) / (top - low));
  const ticks = [...new Set([0, 1, 2, 3].map((i) => Math.round((i * (layers.length - 1)) / 3)))];
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "img", "aria-label": `${label}; over layers ${layers[0]} to ${layers.at(-1)}` },
    [low, (low + top) / 2, top].map((v) => [svg("path", { class: "grid", d: `M44 ${y(v)}H${width - 16}` }), svg("text", { class: "tick", x: 40, y: y(v) + 4, "text-anchor": "end" }, format(v))]),
    ticks.map((i) => svg("text", { class: "tick", x: x(i), y: height - 18, "text-anchor": "middle" }, String(layers[i]))),
    svg("text", { class: "tick", x: width / 2, y: height - 3, "text-anchor": "middle" }, `layer (after block); ${unit}`),
    series.map(({ name, values }, k) => {
      const d = values.map((v, i) => (v === null ? "" : `${i && values[i - 1] !== null ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`)).join("");
      const peak = values.indexOf(Math.max(...values));
      return [svg("path", { class: `curve c${k % 6}`, d, "stroke-dasharray": DASHES[k % 6] }),
        svg("path", { class: `dot c${k % 6}`, d: MARKERS[k % 6], transform: `translate(${x(peak).toFixed(1)} ${y(values[peak]).toFixed(1)})` }),
        series.length > 1 && svg("text", { class: "name", x: x(peak), y: y(values[peak]) - 6, "text-anchor": peak > layers.length * 0.8 ? "end" : "start" }, name),
        values.map((v, i) => v !== null && svg("circle", { class: "touch", cx: x(i), cy: y(v), r: 5 }, svg("title", {}, `${name}, layer ${layers[i]}: ${format(v)}`)))];
    }));
}

/** Latents as lines, each run from a filled dot at its first layer to a ring at its last.
    rows: {name, words, on: Map from a layer's index to the activation, chosen, pick}. */
export function switches(rows, layers, { label, width = room(), left = width / 3 }) {
  const high = 20, x = (i) => left + ((width - left - 74) * i) / Math.max(layers.length - 1, 1), height = rows.length * high + 34;
  const every = Math.ceil(layers.length / 10);
  return svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "lines", role: "group", "aria-label": label, "data-legend": "Dot: first layer of a run. Ring: its last. Line width: activation, scaled for each latent. Right: its highest activation." },
    layers.map((layer, i) => i % every === 0 && [svg("path", { class: "grid", d: `M${x(i)} 4V${height - 30}` }), svg("text", { class: "tick", x: x(i), y: height - 18, "text-anchor": "middle" }, String(layer))]),
    svg("text", { class: "tick", x: (left + width - 74) / 2, y: height - 3, "text-anchor": "middle" }, "layer (after block)"),
    rows.map(({ name, words, on, chosen, pick }, k) => {
      const places = [...on.keys()].sort((a, b) => a - b), top = Math.max(...on.values()), y = 14 + k * high;
      const runs = places.filter((i) => !on.has(i - 1)).map((first) => { let last = first; while (on.has(last + 1)) last++; return [first, last]; });
      const peak = places.find((i) => on.get(i) === top), highest = `${show(top)} at ${layers[peak]}`;
      const where = `${name}: on at layers ${runs.map(([a, b]) => (a === b ? layers[a] : `${layers[a]} to ${layers[b]}`)).join(", ")}; highest ${highest}`;
      const act = (event) => { if (!event.key || event.key === "Enter" || event.key === " ") { event.preventDefault(); pick(); } };
      return svg("g", { class: chosen ? "switch chosen" : "switch", role: "button", tabindex: 0, onclick: act, onkeydown: act, "aria-label": where },
        svg("title", {}, where), svg("path", { class: "touch", d: `M0 ${y - 10}H${width}V${y + 10}H0z` }), svg("text", { class: "name", x: left - 12, y: y + 4, "text-anchor": "end" }, cut(words, Math.floor(left / 6.5))),
        svg("text", { class: "tick", x: width, y: y + 4, "text-anchor": "end" }, highest),
        runs.map(([first, last]) => [
          ...Array.from({ length: last - first }, (_, i) => svg("path", { class: "span", d: `M${x(first + i)} ${y}H${x(first + i + 1)}`, "stroke-width": (1 + (5 * on.get(first + i)) / top).toFixed(1) })),
          svg("circle", { class: "ring", cx: x(last), cy: y, r: 4 }), svg("circle", { class: "start", cx: x(first), cy: y, r: first === last ? 2 : 4 })]));
    }));
}

/** Values as bars side by side, each with a tooltip. names: layers; top: label of the highest value. */
export function bars(values, names, { label, say, top: words, width = 300, height = 102 }) {
  const top = Math.max(...values, 0) || 1, peak = values.indexOf(Math.max(...values)), step = (width - 8) / values.length, ticks = [0, Math.floor((names.length - 1) / 2), names.length - 1];
  return svg("svg", { viewBox: `0 0 ${width} ${height + 16}`, class: "bars", role: "img", "aria-label": label },
    svg("path", { class: "grid", d: `M4 ${height}H${width - 4}` }),
    values.map((v, i) => svg("path", { class: "bar-of", d: `M${4 + i * step} ${height}v${(-(height - 14) * v) / top}h${step * 0.86}V${height}z` }, svg("title", {}, say(i)))),
    svg("text", { class: "tick", x: 4 + (peak + 0.43) * step, y: 10, "text-anchor": peak < values.length / 2 ? "start" : "end" }, words),
    [...new Set(ticks)].map((i) => svg("text", { class: "tick", x: 4 + (i + 0.43) * step, y: height + 13, "text-anchor": i ? "middle" : "start" }, i ? String(names[i]) : `layer ${names[i]}`)));
}

const PAINT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity", "font-size", "font-family", "font-weight"];

/** Drawings side by side in one SVG, under their title and legend, with their styles written into it so that it looks the
    same wherever it is opened. */
function collage(drawings, title) {
  const boxes = drawings.map((drawing) => drawing.viewBox.baseVal), across = drawings.length > 1 ? Math.min(4, drawings.length) : 1;
  const [w, t] = [Math.max(...boxes.map((b) => b.width)) + 12, Math.max(...boxes.map((b) => b.height)) + 12];
  const { legend } = drawings[0].dataset, above = legend ? 40 : 24, words = Math.max(title.length * 7.4, (legend ?? "").length * 5.2) + 12;
  const size = [Math.max(w * across, words), t * Math.ceil(drawings.length / across) + above], { color, fontFamily } = getComputedStyle(document.body);
  const line = (y, px, text) => svg("text", { x: 6, y, fill: color, "font-size": px, "font-family": fontFamily }, text);
  const copies = drawings.map((drawing, i) => {
    const copy = drawing.cloneNode(true), from = [drawing, ...drawing.querySelectorAll("*")];
    [copy, ...copy.querySelectorAll("*")].forEach((part, k) => {
      const seen = getComputedStyle(from[k]);
      for (const name of PAINT) part.setAttribute(name, seen.getPropertyValue(name));
    });
    for (const [name, value] of Object.entries({ x: (i % across) * w + 6, y: Math.floor(i / across) * t + 6 + above, width: boxes[i].width, height: boxes[i].height })) copy.setAttribute(name, value);
    return copy;
  });
  return svg("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${size[0]} ${size[1]}`, width: size[0], height: size[1] },
    svg("path", { d: `M0 0H${size[0]}V${size[1]}H0z`, fill: getComputedStyle(document.body).backgroundColor }), line(18, 14, title), legend && line(34, 10, legend), copies);
}

const source = (drawing) => new XMLSerializer().serializeToString(drawing);

function csv(rows) {
  const cell = (value) => (/[",\n\r]/.test(String(value ?? "")) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
  return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function save(content, type, name) {
  const at = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  h("a", { href: at, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(at), 10000);
}

async function savePng(drawing, name) {
  const image = new Image(), canvas = document.createElement("canvas");
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(source(drawing))}`;
  await image.decode();
  [canvas.width, canvas.height] = [2 * image.width, 2 * image.height];
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  save(await new Promise((done) => canvas.toBlob(done)), "image/png", `${name}.png`);
}
