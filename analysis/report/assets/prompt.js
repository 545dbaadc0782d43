// Heat maps of prompts (layer x latent and layer x token) and of a latent's activations. Uses report.js.

/** An element with a class, text and CSS properties. */
function element(tag, className, text = "", style = {}) {
  const made = Object.assign(document.createElement(tag), { className, textContent: text });
  Object.assign(made.style, style);
  return made;
}

/** The values [rows x columns] as a picture, one pixel each, last row on top. `log`: colour by logarithm, 0 transparent. */
function heatCanvas(values, height, n, colours, top, log) {
  const canvas = Object.assign(document.createElement("canvas"), { width: Math.max(1, n), height: Math.max(1, height) });
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  const place = (value) => (log && top > 1 ? Math.log(value) / Math.log(top) : value / top);
  values.forEach((value, i) => {
    const [red, green, blue] = colours[value ? Math.round(place(value) * (colours.length - 1)) : 0];
    image.data.set([red, green, blue, log && !value ? 0 : 255], 4 * ((height - 1 - Math.floor(i / n)) * n + (i % n)));
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Draw values [rows x columns] as a map in `place`, last row on top. `say(row, column, value)` is called where the pointer
    or the arrow keys go, `pick(column)` when a column is chosen. */
function heatMap(place, values, rows, columns, colours, { name, chosen = -1, pick, say, labels = true, log = false, unit = "activation" }) {
  const n = columns.length, height = rows.length, top = values.reduce((a, b) => Math.max(a, b), 0);
  const canvas = heatCanvas(values, height, n, colours, top, log);
  const described = { role: "img", tabindex: 0, "aria-label": `Heat map of ${name}: ${height} layers, ${n} columns, highest value ${(log ? integer : show)(top)}. Arrow keys read its cells.` };
  for (const [attribute, words] of Object.entries(described)) canvas.setAttribute(attribute, words);
  /** Names along an edge of the map, evenly skipped so that at most `most` remain. */
  const named = (className, names, most, style) => {
    const every = Math.ceil(names.length / most), edge = element("div", className);
    names.forEach((text, i) => { if (i % every === 0) edge.append(element("span", "", text, style(i))); });
    return edge;
  };
  const side = named("rows", rows, labels ? 10 : 4, (r) => ({ top: `${(100 * (height - r - 0.5)) / height}%` }));
  const frame = element("div", "frame"), cell = element("div", "cell");
  frame.append(canvas);
  if (chosen >= 0 && n) frame.append(element("div", "chosen", "", { left: `${(100 * chosen) / n}%`, width: `${100 / n}%` }));
  place.replaceChildren(side, frame);
  if (labels) {
    frame.append(named("cols", columns, 32, (c) => ({ left: `${(100 * (c + 0.6)) / n}%` })));
    const stops = colours.filter((_, i) => i % 16 === 0 || i === 255).map((colour) => `rgb(${colour})`);
    const key = element("div", "key");
    key.append(log ? "1" : "0", element("i", "", "", { background: `linear-gradient(to right, ${stops})` }), `${(log ? integer : show)(top)} ${unit}; rows: layer (after block)`);
    place.append(key);
  }
  if (!n) return;
  const at = { r: 0, c: 0 };
  /** Frame the cell nearest to (r, c) and say what it holds. */
  const read = (r, c) => {
    [at.r, at.c] = [Math.min(height - 1, Math.max(0, r)), Math.min(n - 1, Math.max(0, c))];
    const box = canvas.getBoundingClientRect(), size = [box.width / n, box.height / height];
    Object.assign(cell.style, { left: `${at.c * size[0]}px`, top: `${(height - 1 - at.r) * size[1]}px`, width: `${size[0]}px`, height: `${size[1]}px` });
    frame.append(cell);
    say(at.r, at.c, values[at.r * n + at.c]);
  };
  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    read(height - 1 - Math.floor(((event.clientY - box.top) / box.height) * height), Math.floor(((event.clientX - box.left) / box.width) * n));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("click", (event) => { point(event); pick?.(at.c); });
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    read(at.r + move[0], at.c + move[1]);
  });
}

/** 256 colours [red, green, blue] interpolated between hexadecimal anchors. */
function ramp(anchors) {
  const points = anchors.map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (points.length - 1), low = Math.min(Math.floor(at), points.length - 2);
    return [0, 1, 2].map((k) => Math.round(points[low][k] + (at - low) * (points[low + 1][k] - points[low][k])));
  });
}

async function promptView(view) {
  const block = document.getElementById(view.dataset.block);
  const data = await unpack(block);
  const [layers, tokens, latents] = ["layers", "tokens", "latents"].map((name) => JSON.parse(block.dataset[name]));
  const colours = ramp(JSON.parse(block.dataset.colours));
  const find = (name) => view.querySelector(`.${name}`);
  const readout = find("readout"), atToken = find("at-token"), atLatent = find("at-latent");
  const shown = (text) => (text === "" ? "\u00b7" : signs(text));
  const state = { token: -1, latent: 0 };
  const sparse = (keep, place, size) => {
    const values = new Float32Array(size);
    for (let i = 0; i < data.latent.length; i++) {
      if (keep(i)) { const at = place(i); values[at] = Math.max(values[at], data.activation[i]); }
    }
    return values;
  };
  const byMeanLayer = (ranks) => ranks.sort((a, b) => latents[a][1] - latents[b][1] || latents[a][0] - latents[b][0]);
  /** The most specific latents, or the strongest at the chosen token, by mean layer. */
  const strongest = (n) => {
    if (state.token < 0) return byMeanLayer(latents.slice(0, n).map((_, rank) => rank));
    const mass = new Float64Array(latents.length);
    for (let i = 0; i < data.latent.length; i++) if (data.position[i] === state.token) mass[data.latent[i]] += data.activation[i];
    const ranks = [...mass.keys()].filter((rank) => mass[rank] > 0).sort((a, b) => mass[b] - mass[a]);
    return byMeanLayer(ranks.slice(0, n));
  };
  const ofLatent = (rank) => sparse((i) => data.latent[i] === rank, (i) => data.layer[i] * tokens.length + data.position[i], layers.length * tokens.length);
  const link = (rank) => Object.assign(element("a", "", `latent ${latents[rank][0]}`), { href: `#latent-${latents[rank][0]}` });
  const say = (words) => { readout.textContent = words; };
  const name = (token) => `\u201c${shown(tokens[token])}\u201d`;

  function draw() {
    const ranks = strongest(48), column = new Map(ranks.map((rank, c) => [rank, c]));
    const where = state.token < 0 ? "highest activation over all tokens" : `at token ${state.token}, ${name(state.token)}`;
    find("latents-title").textContent = `Layer \u00d7 latent: ${where}`;
    const values = sparse(
      (i) => column.has(data.latent[i]) && (state.token < 0 || data.position[i] === state.token),
      (i) => data.layer[i] * ranks.length + column.get(data.latent[i]), layers.length * ranks.length);
    heatMap(find("by-latent"), values, layers, ranks.map((rank) => String(latents[rank][0])), colours, {
      name: "layer by latent", chosen: column.get(state.latent) ?? -1,
      pick: (c) => { state.latent = ranks[c]; draw(); },
      say: (r, c, value) => say(`latent ${latents[ranks[c]]?.[0]} (mean layer ${show(latents[ranks[c]]?.[1])}), layer ${layers[r]}: activation ${show(value)}`),
    });
    find("tokens-title").replaceChildren(...(latents.length ? ["Layer \u00d7 token: ", link(state.latent)] : ["No latent is active"]));
    heatMap(find("by-token"), ofLatent(state.latent), layers, tokens.map(shown), colours, {
      name: "layer by token", chosen: state.token, pick: (c) => { state.token = state.token === c ? -1 : c; draw(); },
      say: (r, c, value) => say(`token ${c} ${name(c)}, layer ${layers[r]}: activation ${show(value)}`),
    });
    atToken.value = String(state.token);
    atLatent.value = String(state.latent);
  }

  atToken.append(new Option("all tokens", "-1"), ...tokens.map((token, i) => new Option(`${i}: ${shown(token)}`, String(i))));
  atLatent.append(...latents.map(([latent, mean], rank) => new Option(`${latent} (mean layer ${show(mean)})`, String(rank))));
  atToken.addEventListener("change", () => { state.token = Number(atToken.value); draw(); });
  atLatent.addEventListener("change", () => { state.latent = Number(atLatent.value); draw(); });
  for (const rank of byMeanLayer(latents.slice(0, 12).map((_, i) => i))) {
    const panel = element("div", ""), map = element("div", "map");
    const title = element("h4", "");
    title.append(link(rank), `, mean layer ${show(latents[rank][1])}`);
    panel.append(title, map);
    find("maps").append(panel);
    heatMap(map, ofLatent(rank), layers, tokens.map(shown), colours, {
      name: `latent ${latents[rank][0]}`, labels: false, pick: () => { state.latent = rank; draw(); },
      say: (r, c, value) => say(`latent ${latents[rank][0]}, token ${c} ${name(c)}, layer ${layers[r]}: activation ${show(value)}`),
    });
  }
  draw();
  say("Point at a cell to read it; choose a column to follow it.");
  for (const part of view.querySelectorAll("[hidden]")) part.hidden = false;
}

for (const view of document.querySelectorAll(".prompt")) reported(promptView(view), "maps", view.querySelector(".readout"));
// Tables and maps have moved the section that the address names; scroll there again, unless the browser restores its place.
const arrived = performance.getEntriesByType("navigation")[0]?.type === "navigate";
Promise.all(made).then(() => { if (arrived && !location.hash.startsWith("#latent-")) document.getElementById(location.hash.slice(1))?.scrollIntoView(); });
