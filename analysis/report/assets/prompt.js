// Heat maps of prompts: layer x latent, layer x token. Uses `unpack` and `show` of report.js.

/** A map of values [rows x columns], last row on top, into `place`; `pick(column)` where one is chosen. */
function heatMap(place, values, rows, columns, colours, { name, chosen = -1, pick, say, labels = true }) {
  const n = columns.length, height = rows.length;
  const top = values.reduce((a, b) => Math.max(a, b), 0);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, n);
  canvas.height = Math.max(1, height);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Heat map of ${name}: ${height} layers, ${n} columns, highest value ${show(top)}`);
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let r = 0; r < height; r++) {
    for (let c = 0; c < n; c++) {
      const [red, green, blue] = colours[top ? Math.round((values[r * n + c] / top) * (colours.length - 1)) : 0];
      image.data.set([red, green, blue, 255], 4 * ((height - 1 - r) * n + c));
    }
  }
  context.putImageData(image, 0, 0);
  const frame = document.createElement("div"), side = document.createElement("div");
  frame.className = "frame";
  side.className = "rows";
  const everyRow = Math.ceil(height / (labels ? 10 : 4));
  rows.forEach((row, r) => {
    if (r % everyRow) return;
    const label = document.createElement("span");
    label.textContent = row;
    label.style.top = `${(100 * (height - r - 0.5)) / height}%`;
    side.append(label);
  });
  frame.append(canvas);
  if (chosen >= 0 && n) {
    const mark = document.createElement("div");
    mark.className = "chosen";
    mark.style.left = `${(100 * chosen) / n}%`;
    mark.style.width = `${100 / n}%`;
    frame.append(mark);
  }
  if (labels) {
    const under = document.createElement("div");
    under.className = "cols";
    const every = Math.ceil(n / 32);
    columns.forEach((column, c) => {
      if (c % every) return;
      const label = document.createElement("span");
      label.textContent = column;
      label.style.left = `${(100 * (c + 0.6)) / n}%`;
      under.append(label);
    });
    frame.append(under);
  }
  const key = document.createElement("div");
  key.className = "key";
  const scale = document.createElement("i");
  scale.style.background = `linear-gradient(to right, ${colours.filter((_, i) => i % 16 === 0 || i === 255).map((c) => `rgb(${c})`).join(",")})`;
  key.append("0", scale, `${show(top)} activation; rows: layer (after block)`);
  place.replaceChildren(side, frame, ...(labels ? [key] : []));
  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.min(n - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * n)));
    const r = Math.min(height - 1, Math.max(0, height - 1 - Math.floor(((event.clientY - box.top) / box.height) * height)));
    return [r, c];
  };
  canvas.addEventListener("mousemove", (event) => { const [r, c] = cell(event); say(r, c, values[r * n + c]); });
  canvas.addEventListener("click", (event) => { const [r, c] = cell(event); say(r, c, values[r * n + c]); pick?.(c); });
}

/** 256 colours [red, green, blue] from a few anchors in hexadecimal. */
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
  const shown = (text) => (text === "" ? "\u00b7" : text.replaceAll("\n", "\u21b5"));
  const state = { token: -1, latent: 0 };
  const sparse = (keep, place, size) => {
    const values = new Float32Array(size);
    for (let i = 0; i < data.latent.length; i++) {
      if (keep(i)) { const at = place(i); values[at] = Math.max(values[at], data.activation[i]); }
    }
    return values;
  };
  const byMeanLayer = (ranks) => ranks.sort((a, b) => latents[a][1] - latents[b][1] || latents[a][0] - latents[b][0]);
  /** The strongest latents over all tokens, or at one. */
  const strongest = (n) => {
    if (state.token < 0) return byMeanLayer(latents.slice(0, n).map((_, rank) => rank));
    const mass = new Float64Array(latents.length);
    for (let i = 0; i < data.latent.length; i++) if (data.position[i] === state.token) mass[data.latent[i]] += data.activation[i];
    const ranks = [...mass.keys()].filter((rank) => mass[rank] > 0).sort((a, b) => mass[b] - mass[a]);
    return byMeanLayer(ranks.slice(0, n));
  };
  const ofLatent = (rank) => sparse((i) => data.latent[i] === rank, (i) => data.layer[i] * tokens.length + data.position[i], layers.length * tokens.length);
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
    find("tokens-title").textContent = latents.length ? `Layer \u00d7 token: latent ${latents[state.latent][0]}` : "No latent is active";
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
    const panel = document.createElement("div"), title = document.createElement("h4"), map = document.createElement("div");
    title.textContent = `latent ${latents[rank][0]}, mean layer ${show(latents[rank][1])}`;
    map.className = "map";
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

for (const view of document.querySelectorAll(".prompt")) {
  promptView(view).catch((error) => {
    view.querySelector(".readout").textContent = `The maps could not be made: ${error.message}`;
    console.error(error);
  });
}
