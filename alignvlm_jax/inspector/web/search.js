// Finds a word on the page: patches that name it, and chains of neighboring patches that spell it.

const MIN_PIECE = 0.002; // minimum P of a piece of a word for its patch to be part of a chain
const MIN_CHAIN = 0.1; // minimum score of a chain: the geometric mean of P over its patches

/** Returns the map of a word, the chains that spell it, and the text of the legend. */
function locate(query) {
  const key = keyOf(query);
  const words = (wordsOfKey.get(key) ?? []).filter((word) => !state.excluded.has(word));
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
  const chains = findChains(key.replace(/\s+/g, ""));
  for (const chain of chains) for (const t of chain.patches) values[t] = Math.max(values[t], chain.score);
  return { values, single, expected, chains, title: resultText(query.trim(), single, expected, chains) };
}

/**
 * Returns chains of neighboring patches whose words, read from left to right, spell the letters, best chain first. One
 * patch between two others may be skipped. For each first patch only the likeliest chain is returned. The score of a
 * chain is the geometric mean of its patches' P.
 */
function findChains(letters) {
  if (letters.length < 2) return [];
  const pieces = new Map(); // patch -> its words that occur in the letters
  const inLayer = new Set(patchesOf(state.layer));
  keys.forEach((key, word) => {
    if (!key || key.length >= letters.length || state.excluded.has(word) || !letters.includes(key)) return;
    for (let place = firstPlace[word]; place < firstPlace[word + 1]; place++) {
      const entry = byWord[place];
      const t = patchOfEntry[entry];
      if (entryShare[entry] < MIN_PIECE || !inLayer.has(t)) continue;
      if (!pieces.has(t)) pieces.set(t, []);
      pieces.get(t).push({ key, log: Math.log(entryShare[entry]) });
    }
  });
  // Dynamic programming: best(t, position) is the likeliest chain from patch t that spells letters[position...].
  const memo = new Map();
  function best(t, position) {
    const cell = t * (letters.length + 1) + position;
    if (memo.has(cell)) return memo.get(cell);
    let bestChain = null;
    for (const { key, log } of pieces.get(t) ?? []) {
      if (!letters.startsWith(key, position)) continue;
      let chain = { log, patches: [t] };
      if (position + key.length < letters.length) {
        const next = neighbor(t, 1, 0);
        // One patch may be skipped, for example a space between two pieces.
        const afterNext = next < 0 ? -1 : neighbor(next, 1, 0);
        const rests = [next, afterNext]
          .filter((u) => u >= 0).map((u) => best(u, position + key.length)).filter(Boolean);
        if (!rests.length) continue;
        const rest = rests.reduce((one, other) => (other.log > one.log ? other : one));
        chain = { log: log + rest.log, patches: [t, ...rest.patches] };
      }
      if (!bestChain || chain.log > bestChain.log) bestChain = chain;
    }
    memo.set(cell, bestChain);
    return bestChain;
  }
  const chains = [];
  for (const t of pieces.keys()) {
    const chain = best(t, 0);
    const score = chain ? Math.exp(chain.log / chain.patches.length) : 0;
    if (score >= MIN_CHAIN) chains.push({ patches: chain.patches, score });
  }
  return chains.sort((one, other) => other.score - one.score);
}

/** Returns the result of a search as text. */
function resultText(query, single, expected, chains) {
  const parts = [];
  if (single > 0) parts.push(`at most ${percent(single)} in a patch, ${short(expected)} expected on the page`);
  if (chains.length) {
    const times = chains.length === 1 ? "once" : `${chains.length} times`;
    parts.push(`spelled by neighbors ${times}, at best ${percent(chains[0].score)} per piece`);
  }
  if (!parts.length) {
    parts.push(`not among the ${text.kept} likeliest words of any patch: below ${percent(missingBound())} in each`);
  }
  return `“${query}”: ${parts.join("; ")}`;
}

/** Returns an upper bound of the probability of a word in patches that do not list it. */
function missingBound() {
  let bound = text.floor;
  for (const t of patchesOf(state.layer)) {
    // Only a patch with a full list can have dropped words above the floor.
    if (firstEntry[t + 1] - firstEntry[t] === text.kept) bound = Math.max(bound, entryShare[firstEntry[t + 1] - 1]);
  }
  return bound;
}

/** Finds a word and shows its map; an empty query returns to the view before the search. */
function search(query, { typed = false } = {}) {
  if (keyOf(query) !== keyOf(state.query)) state.excluded.clear();
  state.query = query;
  if (!typed) $("search").value = query;
  const option = document.querySelector("#views [value=find]");
  option.disabled = !query.trim();
  if (!query.trim()) {
    state.result = null;
    showVariants([]);
    if (state.view === "find") setView(state.previousView ?? "page");
    return;
  }
  state.result = locate(query);
  showVariants(wordsOfKey.get(keyOf(query)) ?? []);
  if (state.view !== "find") {
    state.previousView = state.view;
    setView("find");
  }
  draw();
}

/** Lists the tokens that count as the query, such as those with a leading space or a capital. Each can be excluded. */
function showVariants(words) {
  const chips = words.length < 2 ? [] : words.map((word) => {
    const chip = document.createElement("button");
    chip.type = "button";
    showWord(chip, text.words[word]);
    chip.setAttribute("aria-pressed", String(!state.excluded.has(word)));
    chip.title = `${short(mass[word])} expected on the page`;
    chip.addEventListener("click", () => {
      if (!state.excluded.delete(word)) state.excluded.add(word);
      search(state.query);
      $("variants").children[words.indexOf(word)].focus();
    });
    return chip;
  });
  $("variants").replaceChildren(...chips);
  $("variants-group").hidden = !chips.length;
}

let suggestions = []; // [word, largest P] of each
let activeSuggestion = -1;
/** Lists up to seven words that begin with the text in the search field, likeliest first. */
function suggest() {
  const key = keyOf($("search").value);
  suggestions = [];
  if ($("search").value.trim()) {
    const best = new Map();
    keys.forEach((other, word) => {
      if (other !== key && other.startsWith(key)) best.set(other, Math.max(best.get(other) ?? 0, peak[word]));
    });
    suggestions = [...best].sort((one, other) => other[1] - one[1]).slice(0, 7);
  }
  activeSuggestion = -1;
  $("suggestions").replaceChildren(...suggestions.map(([word, share], i) => {
    const item = document.createElement("li");
    item.id = `suggestion-${i}`;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.append(word, make("span", { textContent: percent(share) }));
    // pointerdown comes before the blur event that closes the list; preventDefault keeps the focus in the field.
    item.addEventListener("pointerdown", (event) => { event.preventDefault(); acceptSuggestion(i); });
    return item;
  }));
  openSuggestions(suggestions.length > 0);
}

function openSuggestions(open) {
  $("suggestions").hidden = !open;
  $("search").setAttribute("aria-expanded", String(open));
  if (!open) $("search").removeAttribute("aria-activedescendant");
}

function acceptSuggestion(i) {
  openSuggestions(false);
  search(suggestions[i][0]);
}

/** Lists the words with the largest sum of P over the page. */
function showFrequentWords() {
  const sums = new Map();
  keys.forEach((key, word) => {
    if (!isBlank(text.words[word])) sums.set(key, (sums.get(key) ?? 0) + mass[word]);
  });
  const frequent = [...sums].sort((one, other) => other[1] - one[1]).slice(0, 14);
  $("frequent").replaceChildren(...frequent.map(([word, sum]) => {
    const chip = make("button", { type: "button", textContent: word, title: `${short(sum)} expected on the page` });
    chip.addEventListener("click", () => search(word));
    return chip;
  }));
}
