// Search for latents by the text they fire on, by the rule of analysis/latents/search.py and with the same numbers.

const DOUBT = 2;
const SHOWN = { "\n": "\u23ce", "\t": "\u2192", "\r": " " };

/** Text in lower case, with symbols for line ends and tabs, as a list of as many characters as the text has. */
function folded(text) {
  return [...text].map((sign) => {
    const low = SHOWN[sign] ?? sign.toLowerCase();
    return [...low].length === 1 ? low : sign;
  });
}

function termsOf(query) {
  return folded(query.replaceAll("\\n", "\n")).join("").split(",").map((part) => part.split(/\s+/).filter(Boolean).join(" ")).filter(Boolean);
}

/** How much a window counts for the terms: 1, 1/2 or 0. */
function strength([text, lengths, place], terms) {
  const plain = /^[\x20-\x7e]*$/.test(text) && text.toLowerCase();
  if (plain && !terms.some((term) => plain.includes(term))) return 0; // most windows end here
  const signs = folded(text), ends = [0], word = (sign) => /[\p{L}\p{N}_]/u.test(sign ?? " ");
  for (const sign of lengths) ends.push(ends.at(-1) + sign.codePointAt(0) - 48);
  const edge = (at) => ends.includes(at) || !(word(signs[at - 1]) && word(signs[at])); // of a token or a word
  let best = 0;
  for (const term of terms) {
    const wanted = [...term];
    for (let start = Math.max(0, ends[place] - wanted.length + 1); start < ends[place + 1]; start++) {
      if (!wanted.every((sign, i) => signs[start + i] === sign) || !edge(start)) continue;
      best = Math.max(best, edge(start + wanted.length) ? 1 : 0.5);
    }
  }
  return best;
}

/** The latents that a query finds, the most specific first. contents: each one's packed contexts; `latent` is the index there. */
function rank(contents, query) {
  const terms = termsOf(query), found = [];
  let total = 0;
  contents.forEach(({ texts = [], contexts }, latent) => {
    const sizes = contexts?.activation ?? [], top = Math.max(...sizes);
    let mass = 0, share = 0, hits = 0;
    texts.forEach((window, i) => {
      const h = strength(window, terms);
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
