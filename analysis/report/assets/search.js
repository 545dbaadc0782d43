// Search for latents by the text that they fire on: the rule of analysis/latents/search.py, and the same numbers.

const DOUBT = 2;
const SHOWN = { "\n": "\u23ce", "\t": "\u2192", "\r": " " };

/** Text in lower case with signs for line ends and tabs, a list: every character stays one. */
function folded(text) {
  return [...text].map((sign) => {
    const low = SHOWN[sign] ?? sign.toLowerCase();
    return [...low].length === 1 ? low : sign;
  });
}

function termsOf(query) {
  return folded(query.replaceAll("\\n", "\n")).join("").split(",").map((part) => part.split(/\s+/).filter(Boolean).join(" ")).filter(Boolean);
}

/** Whether no word goes on at a place of a list of characters. */
function betweenWords(signs, at) {
  const word = (sign) => sign !== undefined && /[\p{L}\p{N}_]/u.test(sign);
  return !(word(signs[at - 1]) && word(signs[at]));
}

/** How much a window counts for the terms: 1, 1/2 or 0. */
function strength([text, lengths, place], terms) {
  const signs = folded(text), whole = signs.join(""), edges = [0];
  let best = 0;
  for (const sign of lengths) edges.push(edges.at(-1) + sign.codePointAt(0) - 48);
  for (const term of terms.filter((one) => whole.includes(one))) {
    const wanted = [...term];
    for (let start = Math.max(0, edges[place] - wanted.length + 1); start < edges[place + 1]; start++) {
      const end = start + wanted.length;
      if (!wanted.every((sign, i) => signs[start + i] === sign)) continue;
      if (!edges.includes(start) && !betweenWords(signs, start)) continue;
      best = Math.max(best, edges.includes(end) || betweenWords(signs, end) ? 1 : 0.5);
    }
  }
  return best;
}

/** The latents that a query finds, the most specific first. contents: of each, its packed contexts; `latent` is its place there. */
function rank(contents, query) {
  const terms = termsOf(query), found = [];
  let total = 0;
  contents.forEach(({ texts = [], contexts }, latent) => {
    const sizes = contexts?.activation ?? [], top = Math.max(...sizes);
    let mass = 0, share = 0, hits = 0;
    texts.forEach((window, i) => {
      const h = quick(window[0], terms) ? strength(window, terms) : 0;
      mass += sizes[i] / top;
      share += (sizes[i] / top) * h;
      hits += h > 0;
    });
    if (!hits) return;
    const score = share / (mass + DOUBT);
    total += score;
    found.push({ latent, score, hits, contexts: texts.length });
  });
  for (const hit of found) hit.times = hit.score / (total / contents.length);
  return found.sort((a, b) => b.score - a.score || a.latent - b.latent);
}

/** Whether a text may hold a term: it surely does not if plain, and without it. */
function quick(text, terms) {
  if (/[^\x20-\x7e]/.test(text)) return true;
  const low = text.toLowerCase();
  return terms.some((term) => low.includes(term));
}
