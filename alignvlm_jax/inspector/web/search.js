// Where a word is: P of its tokens, or neighbouring patches that spell it.

const LEAST_PIECE = 0.002; // of P, for a patch to count as saying a piece of a word
const LEAST_CHAIN = 0.1; // geometric mean over a chain's patches

/** Where a word is: the patches that say it, and rows of neighbours that spell it. */
function locate(query) {
  const key = keyOf(query);
  const words = (wordsOfKey.get(key) ?? []).filter((word) => !state.refused.has(word));
  const values = new Float32Array(TOTAL);
  for (const word of words) {
    for (let place = firstPlace[word]; place < firstPlace[word + 1]; place++) {
      values[patchOfEntry[byWord[place]]] += entryShare[byWord[place]];
    }
  }
  let single = 0;
  let expected = 0;
  for (const t of patchesOf(state.layer)) {
    expected += values[t];
    single = Math.max(single, values[t]);
  }
  const chains = spelled(key.replace(/\s+/g, ""));
  for (const chain of chains) for (const t of chain.patches) values[t] = Math.max(values[t], chain.score);
  return { values, single, expected, chains, title: finding(query.trim(), single, expected, chains) };
}

/**
 * Rows of neighbouring patches whose words, read from left to right, spell the letters; one patch between two may be
 * skipped. Of all ways from a first patch the likeliest: its score is the geometric mean of the patches' P.
 */
function spelled(letters) {
  if (letters.length < 2) return [];
  const pieces = new Map(); // patch -> its words that occur in the letters
  const own = new Set(patchesOf(state.layer));
  keys.forEach((key, word) => {
    if (!key || key.length >= letters.length || state.refused.has(word) || !letters.includes(key)) return;
    for (let place = firstPlace[word]; place < firstPlace[word + 1]; place++) {
      const entry = byWord[place];
      const t = patchOfEntry[entry];
      if (entryShare[entry] < LEAST_PIECE || !own.has(t)) continue;
      if (!pieces.has(t)) pieces.set(t, []);
      pieces.get(t).push({ key, log: Math.log(entryShare[entry]) });
    }
  });
  const known = new Map();
  function best(t, at) {
    const place = t * (letters.length + 1) + at;
    if (known.has(place)) return known.get(place);
    let found = null;
    for (const { key, log } of pieces.get(t) ?? []) {
      if (!letters.startsWith(key, at)) continue;
      let way = { log, patches: [t] };
      if (at + key.length < letters.length) {
        const next = neighbour(t, 1, 0);
        const after = next < 0 ? -1 : neighbour(next, 1, 0);
        const ways = [next, after].filter((u) => u >= 0).map((u) => best(u, at + key.length)).filter(Boolean);
        if (!ways.length) continue;
        const rest = ways.reduce((one, other) => (other.log > one.log ? other : one));
        way = { log: log + rest.log, patches: [t, ...rest.patches] };
      }
      if (!found || way.log > found.log) found = way;
    }
    known.set(place, found);
    return found;
  }
  const chains = [];
  for (const t of pieces.keys()) {
    const found = best(t, 0);
    const score = found ? Math.exp(found.log / found.patches.length) : 0;
    if (score >= LEAST_CHAIN) chains.push({ patches: found.patches, score });
  }
  return chains.sort((one, other) => other.score - one.score);
}

function finding(query, single, expected, chains) {
  const said = [];
  if (single > 0) said.push(`at most ${percent(single)} in a patch, ${short(expected)} patches’ worth in all`);
  if (chains.length) {
    const times = chains.length === 1 ? "once" : `${chains.length} times`;
    said.push(`spelled by neighbours ${times}, at best ${percent(chains[0].score)} a piece`);
  }
  if (!said.length) {
    said.push(`not among the ${text.kept} likeliest words of any patch, so below ${percent(unheld())} in each`);
  }
  return `“${query}”: ${said.join("; ")}`;
}

/** Below what the probability of a word lies wherever the page does not hold it. */
function unheld() {
  let most = text.floor;
  for (const t of patchesOf(state.layer)) {
    if (firstEntry[t + 1] - firstEntry[t] === text.kept) most = Math.max(most, entryShare[firstEntry[t + 1] - 1]);
  }
  return most;
}

/** Looks for a word and shows where it is; nothing typed goes back to what was shown before. */
function search(query, { typed = false } = {}) {
  if (keyOf(query) !== keyOf(state.query)) state.refused.clear();
  state.query = query;
  if (!typed) $("search").value = query;
  const option = document.querySelector("#views [value=find]");
  option.disabled = !query.trim();
  if (!query.trim()) {
    state.found = null;
    showVariants([]);
    if (state.view === "find") setView(state.before ?? "page");
    return;
  }
  state.found = locate(query);
  showVariants(wordsOfKey.get(keyOf(query)) ?? []);
  if (state.view !== "find") {
    state.before = state.view;
    setView("find");
  }
  draw();
}

/** The tokens that are spelled like the query: with a blank before, with a capital. Each can be left out. */
function showVariants(words) {
  const chips = words.length < 2 ? [] : words.map((word) => {
    const chip = document.createElement("button");
    chip.type = "button";
    spell(chip, text.words[word]);
    chip.setAttribute("aria-pressed", String(!state.refused.has(word)));
    chip.title = `${short(mass[word])} patches' worth`;
    chip.addEventListener("click", () => {
      if (!state.refused.delete(word)) state.refused.add(word);
      search(state.query);
      $("variants").children[words.indexOf(word)].focus();
    });
    return chip;
  });
  $("variants").replaceChildren(...chips);
  $("variants-group").hidden = !chips.length;
}

let suggested = [];
let chosen = -1;
function suggest() {
  const key = keyOf($("search").value);
  suggested = [];
  if ($("search").value.trim()) {
    const best = new Map();
    keys.forEach((other, word) => {
      if (other !== key && other.startsWith(key)) best.set(other, Math.max(best.get(other) ?? 0, peak[word]));
    });
    suggested = [...best].sort((one, other) => other[1] - one[1]).slice(0, 7);
  }
  chosen = -1;
  $("suggestions").replaceChildren(...suggested.map(([word, share], i) => {
    const item = document.createElement("li");
    item.id = `suggestion-${i}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.append(word, make("span", { textContent: percent(share) }));
    item.addEventListener("pointerdown", (event) => { event.preventDefault(); choose(i); });
    return item;
  }));
  openSuggestions(suggested.length > 0);
}

function openSuggestions(open) {
  $("suggestions").hidden = !open;
  $("search").setAttribute("aria-expanded", String(open));
  if (!open) $("search").removeAttribute("aria-activedescendant");
}

function choose(i) {
  openSuggestions(false);
  search(suggested[i][0]);
}

function showOften() {
  const sums = new Map();
  keys.forEach((key, word) => {
    if (!isBlank(text.words[word])) sums.set(key, (sums.get(key) ?? 0) + mass[word]);
  });
  const most = [...sums].sort((one, other) => other[1] - one[1]).slice(0, 14);
  $("often").replaceChildren(...most.map(([word, sum]) => {
    const chip = make("button", { type: "button", textContent: word, title: `${short(sum)} patches' worth` });
    chip.addEventListener("click", () => search(word));
    return chip;
  }));
}
