"use strict";
// The table of latents: unpack the numbers, filter, sort, show a page of rows, open a row. No library, no request.

const DASH = "\u2013";
const PAGE = 50;

/** The arrays of one data block: base64 of a zlib stream of little-endian arrays, described by data-index. */
async function unpack(block) {
  const buffer = await inflate(block);
  const types = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array, f8: Float64Array, f2: Uint16Array };
  return Object.fromEntries(JSON.parse(block.dataset.index).map(([name, type, start, end]) => {
    const values = new types[type](buffer.slice(start, end));
    return [name, type === "f2" ? fromHalf(values) : values];
  }));
}

/** The bytes of a block: base64 of a zlib stream. */
async function inflate(block) {
  const packed = atob(block.textContent.trim());
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

/** Non-negative 16-bit floats as 32-bit floats; NaN for infinite or negative ones. */
function fromHalf(bits) {
  const table = new Float32Array(0x10000).fill(NaN);
  for (let b = 0; b < 0x7c00; b++) {
    table[b] = b < 1024 ? b * 2 ** -24 : (1 + (b & 1023) / 1024) * 2 ** ((b >> 10) - 15);
  }
  return Float32Array.from(bits, (b) => table[b]);
}

/** Scale rows to sum to 1; their values are parts of the row's highest. */
function toShares(parts, width) {
  const sums = new Float32Array(parts.length / width);
  parts.forEach((part, i) => { sums[Math.floor(i / width)] += part; });
  return Float32Array.from(parts, (part, i) => part / sums[Math.floor(i / width)]);
}

/** Text with characters that cannot be seen, or change the writing direction, made visible: as residscope/escape.py does,
    but with a symbol where there is one. */
function signs(text) {
  return text.replace(/[\0-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff]/g, (sign) => ({ "\n": "\u23ce", "\t": "\u2192" })[sign]
    ?? (sign < " " ? String.fromCharCode(0x2400 + sign.charCodeAt(0)) : `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`));
}

function integer(x) {
  return Math.round(x).toLocaleString("en");
}

/** Three significant digits; an en dash where the number is not defined. */
function show(x) {
  if (!Number.isFinite(x)) return DASH;
  if (x === 0) return "0";
  const exponent = Number(x.toExponential(2).split("e")[1]);
  if (exponent < -4 || exponent > 6) return x.toExponential(2).replace("e", "\u00d710^").replaceAll("-", "\u2212");
  const digits = Math.max(0, 2 - exponent);
  return x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function percent(p) {
  if (p === 0) return "0 %";
  return p < 1e-4 ? "< 0.01 %" : `${(100 * p).toPrecision(p < 0.1 ? 2 : 3)} %`;
}

/** A latent's numbers: columns of the table, facts of an opened row, and sort keys. `wide`: not on a phone; `rest`: not in the table. */
const COLUMNS = [
  { key: "latent", name: "Latent", format: String },
  { key: "match", name: "Match", hint: "share of its contexts that match the search, 0 to 1", format: show },
  { key: null, name: "Fires on", hint: "words that set its top contexts apart from the text as a whole", words: true },
  { key: "kind", name: "Kind", hint: "kind of its layer profile", wide: true },
  { key: null, name: "P(layer | latent)", hint: "first layer on the left; each row is scaled to its own highest layer" },
  { key: "count", name: "Firings", hint: "(token, layer) pairs at which it fired", format: integer },
  { key: "n_tokens", name: "Tokens", hint: "tokens at which it fired at one layer or more", format: integer, rest: true },
  { key: "mass_share", name: "Share of mass", hint: "of the activation mass of all latents", format: percent, rest: true },
  { key: "mean", name: "Mean activation", hint: "units of the standardised residual stream", format: show, rest: true },
  { key: "layer_mean", name: "Mean layer", hint: "mean of P(layer | latent)", format: show },
  { key: "layer_std", name: "Spread", hint: "standard deviation of P(layer | latent), in layers", format: show },
  { key: "ratio", name: "Aggregate / token", hint: "variance over all tokens / variance within a token", format: show, wide: true },
  { key: "context_overlap", name: "Context overlap", hint: "share of its top contexts that two layers have in common, 0 to 1", format: show, wide: true },
  { key: "entropy", name: "Entropy, bits", hint: "of P(layer | latent)", format: show, rest: true },
  { key: "n_layers_active", name: "Layers active", hint: "layers at which it fired at least once", format: integer, rest: true },
];

/** Bars over layers as an SVG of 1000 x 1000; with `tips`, each layer shows its value as a tooltip. */
function bars(values, tips) {
  const width = 1000 / values.length;
  const top = Math.max(...values) || 1;
  let path = "", hover = "";
  values.forEach((value, i) => {
    const height = (1000 * value) / top;
    if (height) path += `M${(i * width).toFixed(1)} 1000v${-height.toFixed(1)}h${(width * 0.86).toFixed(1)}V1000z`;
    if (tips) hover += `<rect class="hover" x="${i * width}" y="0" width="${width}" height="1000"><title>${tips[i]}</title></rect>`;
  });
  return `<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true"><path class="share" d="${path}"/>${hover}</svg>`;
}

/** A small chart of a latent: bars over the layers, with the highest value and a few layers labelled. */
function layerPanel(title, values, format, layers) {
  const tips = values.map((value, i) => `layer ${layers[i]}: ${format(value)}`);
  const last = layers.length - 1;
  const named = [...new Set([0, Math.round(last / 3), Math.round((2 * last) / 3), last])];
  const ticks = named.map((i) => `<span class="xt" style="left:${(100 * (i + 0.43)) / layers.length}%;bottom:0">${layers[i]}</span>`);
  return `<div><h4>${title}</h4><div class="plot">${bars(values, tips)}${ticks.join("")}
    <span class="yt" style="left:0;bottom:100%">${format(Math.max(...values))}</span><span class="yt" style="left:0;bottom:0">0</span>
    <span class="xl" style="left:50%;bottom:0">layer (after block)</span></div></div>`;
}

/** The charts of an opened row. */
function panelsHtml(row, data, layers) {
  const probs = profile(data.probs, row, layers), shares = layerPanel("P(layer | latent), share of activation mass", probs, percent, layers);
  if (!data.counts) return shares;
  const counts = profile(data.counts, row, layers);
  const total = data.mean[row] * data.count[row];
  const means = probs.map((p, i) => (counts[i] ? (p * total) / counts[i] : 0));
  return shares + layerPanel("Firings (tokens at the layer)", counts, integer, layers)
    + layerPanel("Mean activation where it fired (standardised units)", means, show, layers);
}

/** All the numbers of an opened row. */
function factsHtml(columns, row, data) {
  const facts = columns.filter((c) => c.key && !["latent", "match"].includes(c.key)).map((c) => [c.name, c.format(data[c.key][row]), c.hint]);
  facts.push(["Within a token", `${show(data.within_token[row])} layers\u00b2`, "part of the variance of its layer"]);
  facts.push(["Between tokens", `${show(data.between_tokens[row])} layers\u00b2`, "part of the variance of its layer"]);
  if (data.context_chance) facts.push(["Context overlap by chance", show(data.context_chance[row]), "0 to 1"]);
  if (data.within_token[row] === 0) facts.push(["Aggregate / token: not defined", "one layer per token"]);
  return `<dl>${facts.map(([name, value, hint]) => `<div title="${hint ?? ""}"><dt>${name}</dt><dd>${value}</dd></div>`).join("")}</dl>`;
}

/** Share of a row's mass at layers `low` to `high`, inclusive. */
function massBetween(probs, row, layers, low, high) {
  return layers.reduce((sum, layer, i) => sum + (low <= layer && layer <= high ? probs[row * layers.length + i] : 0), 0);
}

function profile(matrix, row, layers) {
  return Array.from(matrix.subarray(row * layers.length, (row + 1) * layers.length));
}

/** A test whether a number is in a search such as "17, 40-60"; null for a search without numbers. */
function numberTest(text) {
  const ranges = [...text.matchAll(/(\d+)(?:\s*[-\u2013]\s*(\d+))?/g)].map((m) => [Number(m[1]), Number(m[2] ?? m[1])]);
  return ranges.length ? (n) => ranges.some(([low, high]) => low <= n && n <= high) : null;
}

async function latentTable(block) {
  const find = (id) => document.getElementById(id);
  const [table, status, pages, filters, search] = ["table", "status", "pages", "filters", "search"].map((id) => find(`latent-${id}`));
  const [kind, from, to, sort, order, within] = ["kind", "from", "to", "sort", "order", "in"].map((id) => find(`latent-${id}`));
  if (typeof DecompressionStream === "undefined") {
    status.textContent = "This browser cannot unpack the table (it has no DecompressionStream); the numbers are in latents.parquet.";
    return;
  }
  const data = await unpack(block);
  const [layers, kinds, colours] = [block.dataset.layers, block.dataset.kinds, block.dataset.colours].map((text) => JSON.parse(text));
  const edges = JSON.parse(find("latent-note")?.dataset.edges ?? "[]");
  const words = await content("words"), prompted = document.querySelector("[id^=prompt-data-]");
  if (data.probs instanceof Uint8Array) data.probs = toShares(data.probs, layers.length);
  const columns = COLUMNS.filter((c) => (c.words ? words : c.key === null || ["ratio", "match"].includes(c.key) || data[c.key]));
  columns.filter((c) => c.key === "kind").forEach((c) => { c.format = (i) => kinds[i]; });
  const n = data.latent.length;
  data.ratio = Float32Array.from(data.within_token, (within, i) => (within + data.between_tokens[i]) / within);
  const state = { key: "count", down: true, page: 0, rows: [], open: new Set(), asked: "" };
  const [head, body] = [table.tHead, table.tBodies[0]];
  const limits = [...filters.querySelectorAll("[data-column]")];

  let asking = 0, shownColumns = [];
  async function select() {
    const text = search.value.trim(), mine = ++asking;
    const isText = /[^\d\s,\u2013-]/.test(text), query = isText ? `${within.value} ${text}` : "";
    if (isText && query !== state.asked) status.textContent = "Searching \u2026";
    const hits = isText ? await findText(text, within.value === "promoted", n) : [];
    if (mine !== asking) return; // overtaken by a newer selection
    if (query && !state.asked) state.before = [state.key, state.down];
    if (!isText && state.key === "match") [state.key, state.down] = state.before ?? ["count", true];
    if (query && query !== state.asked) [state.key, state.down] = ["match", true];
    state.asked = query;
    data.match = new Float32Array(isText ? n : 0);
    for (const hit of hits) data.match[hit.latent] = hit.score;
    const byNumber = isText ? null : numberTest(text);
    const bounds = limits.filter((input) => input.value !== "").map((input) => [data[input.dataset.column], input.dataset.end === "low" ? 1 : -1, Number(input.value)]);
    const limited = from.value !== "" || to.value !== "", wanted = kind.value && kinds.indexOf(kind.value);
    const [low, high] = [from.value === "" ? -Infinity : Number(from.value), to.value === "" ? Infinity : Number(to.value)];
    const rows = [...data.latent.keys()].filter((i) => (isText ? data.match[i] > 0 : !byNumber || byNumber(data.latent[i]))
      && (wanted === "" || data.kind[i] === wanted)
      && !(limited && massBetween(data.probs, i, layers, low, high) < 0.5)
      && bounds.every(([values, sign, bound]) => sign * (values[i] - bound) >= 0));
    const values = data[state.key], sign = state.down ? -1 : 1;
    const place = (i) => (Number.isFinite(values[i]) ? sign * values[i] : Infinity); // undefined numbers last
    state.rows = rows.sort((a, b) => { const [x, y] = [place(a), place(b)]; return x < y ? -1 : x > y ? 1 : a - b; });
    state.page = 0;
    draw();
  }

  function rowHtml(i) {
    const open = state.open.has(i);
    const cells = shownColumns.map((c) => {
      if (c.words) return `<td class="words">${words[i].map(wordHtml).join(" ")}</td>`;
      if (!c.key) return `<td class="profile">${bars(profile(data.probs, i, layers))}</td>`;
      const value = c.format(data[c.key][i]);
      return c.key === "latent" ? `<td><button class="open" aria-expanded="${open}">${value}</button></td>` : `<td${c.wide ? ' class="wide"' : ""}>${value}</td>`;
    });
    return `<tr data-row="${i}">${cells.join("")}</tr>${open ? detailHtml(i) : ""}`;
  }

  /** An opened latent: a header line that stays in sight, examples (filled in once unpacked), charts. */
  function detailHtml(i) {
    const latent = data.latent[i];
    return `<tr class="detail" data-detail="${i}"><td colspan="${shownColumns.length}"><div class="head"><b>Latent ${latent}</b>
      <span>${kinds[data.kind[i]]}, mean layer ${show(data.layer_mean[i])}, spread ${show(data.layer_std[i])} layers, ${integer(data.count[i])} firings</span>
      <a href="#latent-${latent}">Link</a>${prompted ? promptLinks(latent) : ""}<button type="button" class="close" aria-label="Close latent ${latent}">Close</button></div>
      <div class="sides"><div class="looks"></div><div class="panels"><div class="near-place"></div><div class="map-place"></div>${panelsHtml(i, data, layers)}</div></div>
      ${factsHtml(columns, i, data)}</td></tr>`;
  }

  /** Fill in what an opened latent shows from its packed block. */
  async function fillDetail(place) {
    const row = Number(place.dataset.detail), block = await content(`block-${Math.floor(row / PER_BLOCK)}`);
    if (!block) { place.querySelector(".looks").remove(); return; }
    const latent = block[row % PER_BLOCK];
    place.querySelector(".looks").innerHTML = examplesHtml(latent);
    place.querySelector(".near-place").innerHTML = neighboursHtml(latent.near, data, kinds);
    if (latent.histogram) histogram(place.querySelector(".map-place"), latent.histogram, layers, edges, colours);
  }

  function draw() {
    shownColumns = columns.filter((c) => !c.rest && (c.key !== "match" || state.asked));
    const from = state.page * PAGE, shown = state.rows.slice(from, from + PAGE);
    head.innerHTML = `<tr>${shownColumns.map((c) => {
      const sort = c.key === state.key ? ` aria-sort="${state.down ? "descending" : "ascending"}"` : "";
      const arrow = sort ? (state.down ? " \u2193" : " \u2191") : "";
      const name = c.key ? `<button type="button" data-key="${c.key}">${c.name}${arrow}</button>` : c.name;
      return `<th${c.wide || c.words ? ` class="${c.words ? "words" : "wide"}"` : ""}${sort} title="${c.hint ?? ""}">${name}</th>`;
    }).join("")}</tr>`;
    body.innerHTML = shown.map(rowHtml).join("");
    for (const place of body.querySelectorAll(".detail")) fillDetail(place).catch(console.error);
    sort.value = state.key;
    sort.querySelector('[value="match"]').disabled = !state.asked;
    order.textContent = state.down ? "\u2193 highest first" : "\u2191 lowest first";
    status.textContent = state.rows.length === n ? `${integer(n)} live latents` : `${integer(state.rows.length)} of ${integer(n)} live latents`;
    if (state.asked && state.key === "match" && state.down) status.textContent += ", the most specific first";
    if (n && !state.rows.length) status.textContent = !state.asked ? "No live latent matches: it is dead on these tokens or filtered out."
      : within.value === "promoted" ? "No latent whose direction is above chance promotes that token."
      : "No latent has it among its strongest contexts, the only ones on this page; some latents may fire on it more weakly.";
    const last = Math.max(0, Math.ceil(state.rows.length / PAGE) - 1);
    pages.querySelector("span").textContent = shown.length ? `${integer(from + 1)} to ${integer(from + shown.length)} of ${integer(state.rows.length)}` : "";
    for (const button of pages.querySelectorAll("button")) {
      const page = state.page + Number(button.dataset.step);
      button.disabled = page < 0 || page > last;
    }
  }

  function follow() {
    const asked = /^#latent-(\d+)$/.exec(location.hash);
    if (!asked) return;
    reset();
    search.value = asked[1];
    const row = data.latent.indexOf(Number(asked[1]));
    if (row >= 0) state.open.add(row);
    select().then(() => {
      (body.querySelector(`[data-row="${row}"]`) ?? find("latents")).scrollIntoView();
      body.querySelector(`[data-row="${row}"] .open`)?.focus({ preventScroll: true });
    });
  }

  function reset() {
    for (const input of [search, kind, from, to, within, ...limits]) input.value = "";
  }

  head.addEventListener("click", (event) => {
    const key = event.target.closest("button")?.dataset.key;
    if (!key) return;
    state.down = key === state.key ? !state.down : key !== "latent";
    state.key = key;
    select().then(() => head.querySelector(`[data-key="${key}"]`).focus());
  });
  body.addEventListener("click", (event) => {
    if (event.target.closest(".more")) {
      showAll = !showAll;
      const place = event.target.closest(".detail");
      fillDetail(place).then(() => place.querySelector(".more").focus(), console.error);
      return;
    }
    const closing = event.target.closest(".close")?.closest(".detail");
    if (closing) {
      state.open.delete(Number(closing.dataset.detail));
      draw();
      body.querySelector(`[data-row="${closing.dataset.detail}"] .open`).focus();
      return;
    }
    const row = event.target.closest("tr[data-row]");
    if (!row) return;
    const i = Number(row.dataset.row);
    if (!state.open.delete(i)) state.open.add(i);
    draw();
    body.querySelector(`[data-row="${i}"] .open`).focus({ preventScroll: true });
  });
  sort.append(...columns.filter((c) => c.key).map((c) => new Option(c.name, c.key)));
  filters.addEventListener("input", (event) => { if (event.target !== sort) select(); });
  sort.addEventListener("change", () => { state.key = sort.value; state.down = sort.value !== "latent"; select(); });
  order.addEventListener("click", () => { state.down = !state.down; select(); });
  find("latent-reset").addEventListener("click", () => { reset(); select(); });
  pages.addEventListener("click", (event) => {
    const step = Number(event.target.dataset?.step ?? 0);
    if (!step) return;
    state.page += step;
    draw();
    table.scrollIntoView();
  });
  addEventListener("hashchange", follow);
  document.addEventListener("click", (event) => { // a link to the address that the page already has fires no hashchange
    if (event.target.closest('a[href^="#latent-"]')?.hash === location.hash) follow();
  });
  select();
  follow();
  for (const part of [table, pages, filters]) part.hidden = false;
}

/** Track the making of a part of the page; if it fails, say so in `place`. */
function reported(making, what, place) {
  made.push(making.catch((error) => {
    place.textContent = `The ${what} could not be shown: ${error.message}`;
    console.error(error);
  }));
}

const made = [];

const latentBlock = document.getElementById("latent-data");
if (latentBlock) reported(latentTable(latentBlock), "table", document.getElementById("latent-status"));
