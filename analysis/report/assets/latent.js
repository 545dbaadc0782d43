// What an opened latent shows: contexts, activations by layer, neighbours, tokens. Most functions turn data into HTML.

const PER_BLOCK = 64; // as in analysis/report/examples.py
const contents = new Map();
let showAll = false; // also show contexts that are not the strongest of a layer

/** What analysis/report/examples.py packed under a name, unpacked once; null if there is none. */
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

const visible = (text) => escaped(signs(text));
/** A word by itself; if it is all spaces, they are made visible. */
const wordHtml = (word) => `<code>${word.trim() ? visible(word) : visible(word).replaceAll(" ", "\u00b7").replaceAll("\u00a0", "\u237d")}</code>`;

/** The tokens of a packed window: [text, lengths, place of its token] and a level for each; see analysis/report/examples.py. */
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

/** A window as text: each token coloured by its activation, the context's own token framed. */
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

/** The tokens that a latent promotes and suppresses, and its contexts, each once with the layers at which it is one. */
function examplesHtml(latent) {
  const { texts, contexts, promoted, suppressed, explained } = latent, about = document.getElementById("latent-note");
  const words = (name, list) => (list ? `<p><b>${name}</b> ${list.map(wordHtml).join(" ")}</p>` : "");
  const said = (explained ?? []).map(([where, words, scores]) => `<p><b>Explained, ${where}</b> ${escaped(words)} <small>${escaped(scores)}</small></p>`).join("");
  const tokens = said + words("Promotes", promoted) + words("Suppresses", suppressed);
  const chance = about?.dataset.chance && !promoted ? `<p class="note">Promoted tokens are not shown: the latent is no nearer to any token's logit than random directions are (cosine ${about.dataset.chance}).</p>` : "";
  if (!contexts) return tokens + chance + (about?.textContent ? `<p class="note">${escaped(about.textContent)}</p>` : "");
  const top = Math.max(...contexts.activation), further = texts.length > contexts.foremost;
  const lines = texts.map((window, i) => {
    const activation = contexts.activation[i];
    return `<tr${i < contexts.foremost ? "" : ' class="further"'}><th title="most active at layer ${contexts.layer[i]}">${contexts.layers[i].replaceAll("-", "\u2013")}</th><td class="size"><b style="width:${(100 * activation) / top}%"></b>${show(activation)}</td><td class="text">${windowHtml(window, contexts.levels[i], top)}</td></tr>`;
  });
  const more = further ? `<button type="button" class="more" aria-pressed="${showAll}">${showAll ? "Only the strongest per layer" : "More contexts"}</button>` : "";
  return `${tokens}<h4>Strongest contexts, each shown once</h4>
    <div class="key"><span>activation 0</span><i></i><span>${show(top)} (units of the standardised residual stream)</span>${more}</div>
    <table class="examples${showAll ? " all" : ""}"><thead><tr><th title="layers at which it is among the latent's strongest contexts">Layers</th><th>Highest activation</th><th>Context (its token is framed)</th></tr></thead><tbody>${lines.join("")}</tbody></table>
    ${chance}${about?.textContent ? `<p class="note">${escaped(about.textContent)}</p>` : ""}`;
}

/** Links to the prompts in which a latent is among the strongest. */
function promptLinks(latent) {
  const found = [...document.querySelectorAll("[id^=prompt-data-]")].flatMap((block, i) => (JSON.parse(block.dataset.latents).some(([one]) => one === latent) ? [`<a href="#prompt-${i}">prompt ${i + 1}</a>`] : []));
  return found.length ? `<span>Active in ${found.join(", ")}</span>` : "";
}

/** A heat map in `place` of the number of tokens, layer x activation. rows: for each layer at which the latent fired, its
    number, the first bin with a count, and the counts from there on; edges: those of all bins. */
function histogram(place, rows, layers, edges, colours) {
  const first = Math.min(...rows.map((row) => row[1])), n = Math.max(...rows.map((row) => row[1] + row.length - 2)) - first;
  const counts = new Float32Array(layers.length * n);
  for (const [layer, low, ...found] of rows) counts.set(found, layers.indexOf(layer) * n + low - first);
  const map = element("div", "map"), said = element("p", "readout", "Point at a cell, touch it, or use the arrow keys.");
  said.setAttribute("aria-live", "polite");
  place.replaceChildren(element("h4", "", "Activations by layer"), map, said);
  const columns = Array.from({ length: n }, (_, bin) => show(edges[first + bin]).replace(/\.?0+$/, ""));
  heatMap(map, counts, layers, columns, ramp(colours), {
    name: "tokens by layer and activation", log: true, unit: "tokens (log scale); columns: activation (lower edge), standardised units",
    say: (r, c, count) => { said.textContent = `layer ${layers[r]}, activation ${show(edges[first + c])} to ${show(edges[first + c + 1])}: ${integer(count)} token${count === 1 ? "" : "s"}`; },
  });
}

/** Links to the latents with the nearest decoder rows. */
function neighboursHtml(near, data, kinds) {
  if (!near) return "";
  const lines = near.map(([latent, cosine]) => {
    const row = data.latent.indexOf(latent);
    const kind = data.kind ? `${kinds[data.kind[row]]}, ` : "";
    return `<li><a href="#latent-${latent}">${latent}</a> <b>${cosine.toFixed(2)}</b> <span class="soft">${kind}mean layer ${show(data.layer_mean[row])}</span></li>`;
  });
  return `<div class="near"><h4>Neighbours, by cosine of decoder rows (\u22121 to 1)</h4><ol>${lines.join("")}</ol></div>`;
}

/** The latents that fire on a query, or promote it, by their index in the table; the most specific first. */
async function findText(query, promoted, n) {
  const blocks = await Promise.all(Array.from({ length: Math.ceil(n / PER_BLOCK) }, (_, i) => content(`block-${i}`)));
  const contents = blocks.flatMap((block) => block ?? []);
  if (!promoted) return rank(contents, query);
  const token = folded(query).join("").trim();
  return contents.flatMap((one, latent) => {
    const place = (one.promoted ?? []).findIndex((word) => folded(word).join("").trim() === token);
    return place < 0 ? [] : [{ latent, score: 1 - place / one.promoted.length }];
  });
}
