// What an opened latent shows: examples by layer, activations by layer, neighbours, tokens. Functions of data that return HTML.

const PER_BLOCK = 64; // as in analysis/report/examples.py
const contents = new Map();
let showAll = false; // further examples of a layer

/** What analysis/report/examples.py packed under a name, unpacked once; null where there is none. */
function content(name) {
  if (!contents.has(name)) {
    const block = document.getElementById(`latent-${name}`);
    contents.set(name, block ? inflate(block).then((buffer) => JSON.parse(new TextDecoder().decode(buffer))) : null);
  }
  return contents.get(name);
}

function escaped(text) {
  return text.replace(/[&<>"]/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

/** Text with line ends made visible. */
function visible(text) {
  return escaped(text.replaceAll("\n", "\u23ce").replaceAll("\t", "\u2192"));
}

/** The tokens of a packed window: [text, lengths, place of its token] and a level for each; see analysis/report/windows.py. */
function tokensOf([text, lengths], levels) {
  const signs = [...text], tokens = [];
  let at = 0;
  [...lengths].forEach((sign, i) => {
    const length = sign.codePointAt(0) - 48;
    tokens.push({ text: signs.slice(at, at + length).join(""), level: parseInt(levels[i], 36) / 35 });
    at += length;
  });
  return tokens;
}

/** A window as text, each token coloured by its activation, the example's own framed. */
function windowHtml(window, levels, top) {
  return tokensOf(window, levels).map((token, i) => {
    if (!token.text) return "";
    const words = visible(token.text), own = i === window[2];
    if (!token.level && !own) return words;
    const kind = token.level > 0.55 ? ' class="hot"' : "";
    const said = `style="--a:${token.level.toFixed(2)}" title="activation about ${(token.level * top).toPrecision(2)}"`;
    return own ? `<mark${kind} ${said}>${words}</mark>` : `<i${kind} ${said}>${words}</i>`;
  }).join("");
}

/** The tokens that a latent promotes and suppresses, and its examples, those of a layer together. */
function examplesHtml(latent) {
  const { texts, examples, promoted, suppressed } = latent;
  const words = (name, list) => (list ? `<p><b>${name}</b> ${list.map((word) => `<code>${visible(word)}</code>`).join(" ")}</p>` : "");
  const tokens = words("Promotes", promoted) + words("Suppresses", suppressed);
  if (!examples) return tokens;
  const top = Math.max(...examples.activation), further = examples.rank.some((rank) => rank > 0);
  const lines = examples.layer.map((layer, i) => {
    const first = examples.rank[i] === 0, activation = examples.activation[i];
    const name = `<th${first ? "" : ' class="soft"'}>${layer}</th>`;
    return `<tr${first ? "" : ' class="further"'}>${name}<td class="size"><b style="width:${(100 * activation) / top}%"></b>${show(activation)}</td><td class="text">${windowHtml(texts[examples.text[i]], examples.levels[i], top)}</td></tr>`;
  });
  const more = further ? `<button type="button" class="more" aria-pressed="${showAll}">${showAll ? "Only the strongest of each layer" : "More examples of a layer"}</button>` : "";
  const note = document.getElementById("latent-note")?.textContent ?? "";
  return `${tokens}<h4>Most active at, by layer</h4>
    <div class="key"><span>activation 0</span><i></i><span>${show(top)} (units of the standardised residual stream)</span>${more}</div>
    <table class="examples${showAll ? " all" : ""}"><thead><tr><th>Layer</th><th>Activation</th><th>Strongest example, its token framed</th></tr></thead><tbody>${lines.join("")}</tbody></table>
    ${note ? `<p class="note">${escaped(note)}</p>` : ""}`;
}

/** Layers x bins of a latent's activations as {first, n, counts: one row of n bins for each layer, top}; `first` is the
    number of its first bin. */
function histogramOf(rows, layers) {
  const first = Math.min(...rows.map((row) => row[1])), end = Math.max(...rows.map((row) => row[1] + row.length - 2));
  const of = new Map(rows.map((row) => [row[0], row]));
  const counts = layers.map((layer) => {
    const [, low, ...found] = of.get(layer) ?? [layer, 0];
    return Array.from({ length: end - first }, (_, bin) => found[first + bin - low] ?? 0);
  });
  return { first, n: end - first, counts, top: Math.max(...counts.flat()) };
}

/** Heat map, layer x activation, of the number of tokens; colours by its logarithm. */
function histogramHtml({ first, n, counts, top }, layers, edges, colours) {
  const scale = (count) => (top > 1 ? Math.log(count) / Math.log(top) : 1);
  const width = 1000 / n, height = 1000 / layers.length;
  const cells = counts.flatMap((row, r) => row.map((count, bin) => {
    const colour = count ? `#${colours[Math.round(scale(count) * (colours.length - 1))]}` : "transparent";
    return `<rect data-cell="${r} ${bin}" x="${(bin * width).toFixed(1)}" y="${(1000 - (r + 1) * height).toFixed(1)}" width="${(width + 0.5).toFixed(1)}" height="${(height + 0.5).toFixed(1)}" fill="${colour}"/>`;
  }));
  const every = Math.ceil(layers.length / 8), step = Math.ceil((n + 1) / 6);
  const y = layers.map((layer, r) => (r % every ? "" : `<span class="yt" style="left:0;bottom:${(100 * (r + 0.5)) / layers.length}%">${layer}</span>`));
  const x = Array.from({ length: n + 1 }, (_, bin) => (bin % step ? "" : `<span class="xt" style="left:${(100 * bin) / n}%;bottom:0">${show(edges[first + bin]).replace(/\.?0+$/, "")}</span>`));
  const stops = colours.map((colour) => `#${colour}`).join(",");
  return `<div class="histogram"><h4>Activations by layer</h4><p class="yname">layer (after block)</p>
    <div class="plot tall" tabindex="0" role="img" aria-label="Heat map: tokens by layer and activation, at most ${top} in a cell. Arrow keys read its cells.">
    <svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">${cells.join("")}</svg>${y.join("")}${x.join("")}
    <span class="xl" style="left:50%;bottom:0">activation (standardised units, log scale)</span></div>
    <div class="key"><span>1</span><i style="background:linear-gradient(to right,${stops})"></i><span>${integer(top)} tokens (log scale)</span></div>
    <p class="readout" aria-live="polite">Point at a cell, touch it, or use the arrow keys.</p></div>`;
}

/** Let the pointer and the arrow keys read the cells of a histogram in `place`. */
function readHistogram(place, { first, n, counts }, layers, edges) {
  const plot = place.querySelector(".histogram .plot"), said = place.querySelector(".histogram .readout");
  let [row, bin] = [0, 0];
  const say = (r, b) => {
    [row, bin] = [Math.min(layers.length - 1, Math.max(0, r)), Math.min(n - 1, Math.max(0, b))];
    plot.querySelector(".chosen")?.classList.remove("chosen");
    plot.querySelector(`[data-cell="${row} ${bin}"]`).classList.add("chosen");
    const [low, high] = [edges[first + bin], edges[first + bin + 1]].map(show);
    said.textContent = `layer ${layers[row]}, activation ${low} to ${high}: ${integer(counts[row][bin])} tokens`;
  };
  const point = (event) => { const cell = event.target.dataset?.cell; if (cell) say(...cell.split(" ").map(Number)); };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("click", point);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    say(row + move[0], bin + move[1]);
  });
}

/** Links to the latents whose decoder rows are nearest. */
function neighboursHtml(near, data, kinds) {
  if (!near) return "";
  const lines = near.map(([latent, cosine]) => {
    const row = data.latent.indexOf(latent);
    const kind = data.kind ? `${kinds[data.kind[row]]}, ` : "";
    return `<li><a href="#latent-${latent}">${latent}</a> <b>${cosine.toFixed(2)}</b> <span class="soft">${kind}mean layer ${show(data.layer_mean[row])}</span></li>`;
  });
  return `<div class="near"><h4>Neighbours, by cosine of decoder rows (\u22121 to 1)</h4><ol>${lines.join("")}</ol></div>`;
}

/** For each row whether a promoted token, or the marked token of an example, contains the text. */
async function textTest(text, n) {
  const wanted = text.toLowerCase(), found = new Uint8Array(n);
  for (const [word, steps] of Object.entries((await content("words")) ?? {})) {
    let row = 0;
    if (word.includes(wanted)) for (const step of steps) found[(row += step)] = 1;
  }
  return (i) => found[i];
}
