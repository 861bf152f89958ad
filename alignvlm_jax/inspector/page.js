"use strict";
// In order: the data unpacked; where patches are; what is being looked at; drawing; the words of a patch; the search;
// the answer; pointer, keys and buttons. A patch is its number t: tile after tile, row by row. Nothing is a DOM element
// that there could be thousands of: patches are painted on two canvases, the page below, the cursor above.

const $ = (id) => document.getElementById(id);

// ---------------------------------------------------------------- the data

const data = JSON.parse($("data").textContent);
const text = data.text;
const COLUMNS = data.columns;
const PATCHES = data.rows * data.columns; // of a tile
const TOTAL = data.tiles.length * PATCHES;
const NUM_WORDS = text.words.length;

function numbers(base64, Type) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Type(bytes.buffer); // little-endian, as every machine with a browser is
}

const entryWord = numbers(text.entries, NUM_WORDS <= 65536 ? Uint16Array : Uint32Array);
const entryShare = Float32Array.from(numbers(text.probabilities, Uint16Array), (code) => Math.exp((code / 65535) * text.lowest));
const effective = Float32Array.from(numbers(text.entropy, Uint16Array), (code) => text.vocabulary ** (code / 65535));
const leftOut = data.leftOut ? numbers(data.leftOut, Uint8Array) : null;

// The words of patch t are entries firstEntry[t] to firstEntry[t + 1], likeliest first.
const firstEntry = new Uint32Array(TOTAL + 1);
numbers(text.counts, Uint16Array).forEach((count, t) => { firstEntry[t + 1] = firstEntry[t] + count; });

// The inverted index: the places of word w are byWord[firstPlace[w]] to byWord[firstPlace[w + 1]], each an entry.
const firstPlace = new Uint32Array(NUM_WORDS + 1);
const byWord = new Uint32Array(entryWord.length);
const patchOfEntry = new Uint32Array(entryWord.length);
const mass = new Float64Array(NUM_WORDS); // of a word: P summed over the patches
const peak = new Float32Array(NUM_WORDS); // of a word: its largest P
for (const word of entryWord) firstPlace[word + 1]++;
for (let word = 0; word < NUM_WORDS; word++) firstPlace[word + 1] += firstPlace[word];
{
  const next = firstPlace.slice();
  for (let t = 0; t < TOTAL; t++) {
    for (let entry = firstEntry[t]; entry < firstEntry[t + 1]; entry++) {
      const word = entryWord[entry];
      patchOfEntry[entry] = t;
      byWord[next[word]++] = entry;
      mass[word] += entryShare[entry];
      if (entryShare[entry] > peak[word]) peak[word] = entryShare[entry];
    }
  }
}

const BLANKS = { " ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥" };
const marked = (word) => word.replace(/[ \n\r\t]/g, (blank) => BLANKS[blank]);
const isBlank = (word) => word.trim() === "";
/** What a word is looked up by: no blanks around it, no capitals. */
const keyOf = (word) => (isBlank(word) ? marked(word) : word.trim().toLowerCase().normalize("NFC"));
const keys = text.words.map(keyOf);
const wordsOfKey = new Map();
keys.forEach((key, word) => {
  const found = wordsOfKey.get(key);
  if (found) found.push(word);
  else wordsOfKey.set(key, [word]);
});

function percent(share) {
  // With spaces that do not break.
  if (share >= 0.9995) return "100\u00a0%";
  if (share >= 0.0995) return `${Math.round(share * 100)}\u00a0%`;
  if (share >= 0.001) return `${(share * 100).toPrecision(2)}\u00a0%`;
  return share >= 0.0001 ? `${(share * 100).toFixed(2)}\u00a0%` : "<\u00a00.01\u00a0%";
}
const short = (number) => (number >= 99.5 ? Math.round(number).toLocaleString("en") : Number(number.toPrecision(2)).toString());
const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(2)}`;

// ---------------------------------------------------------------- where patches are

/** [left, top, right, bottom] on the page, in its pixels. */
function rectangle(t) {
  const { xs, ys } = data.tiles[Math.floor(t / PATCHES)];
  const row = Math.floor((t % PATCHES) / COLUMNS);
  const column = t % COLUMNS;
  return [xs[column], ys[row], xs[column + 1], ys[row + 1]];
}

const onPage = (t) => {
  const [left, top, right, bottom] = rectangle(t);
  return right > left && bottom > top;
};

/** The interval of rising edges that holds a number, or -1. */
function interval(edges, at) {
  if (!(at >= edges[0] && at < edges[edges.length - 1])) return -1;
  let low = 0;
  let high = edges.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (edges[middle] <= at) low = middle;
    else high = middle;
  }
  return low;
}

/** The patch of the layer that looks at a point of the page, or -1. */
function patchAt(x, y) {
  for (const tile of data.layers[state.layer].tiles) {
    const column = interval(data.tiles[tile].xs, x);
    const row = column < 0 ? -1 : interval(data.tiles[tile].ys, y);
    if (row >= 0) return tile * PATCHES + row * COLUMNS + column;
  }
  return -1;
}

/** The next patch in a direction, over the border of a tile too; -1 at the page's edge. */
function neighbour(t, dx, dy) {
  const [left, top, right, bottom] = rectangle(t);
  const x = (left + right) / 2;
  const y = (top + bottom) / 2;
  // A strip at a tile's edge may belong to no patch: look a little further.
  for (const further of [0.02, 0.3, 0.6, 0.9]) {
    const found = patchAt(
      x + dx * ((right - left) / 2 + further * (right - left)),
      y + dy * ((bottom - top) / 2 + further * (bottom - top)),
    );
    if (found >= 0 && found !== t) return found;
  }
  return -1;
}

function* patchesOf(layer) {
  for (const tile of data.layers[layer].tiles) {
    for (let t = tile * PATCHES; t < (tile + 1) * PATCHES; t++) yield t;
  }
}

// ---------------------------------------------------------------- what is being looked at

const state = {
  view: "page", // page, words, doubt, answer, find
  layer: 0,
  zoom: 1,
  patch: -1, // whose words are shown
  held: false,
  question: 0,
  map: 0, // of the answer: 0 all of it, 1 its first token, ...
  query: "",
  refused: new Set(), // words that are spelled like the query, but not counted
  found: null,
};
const picture = new Image();
const colours = {};

function readColours() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "quiet", "line", "sheet", "find", "doubt", "for", "against", "focus"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
}

// ---------------------------------------------------------------- drawing

const viewport = $("viewport");
const base = $("base").getContext("2d");
const cursor = $("cursor").getContext("2d");
const frame = { width: 0, height: 0, scale: 1, left: 0, top: 0 }; // of what is seen; where the page lies in it
const MOST_INK = 0.7;
const PALE = 0.2; // a word whose largest P is below this gets less than the full colour

const isNarrow = () => matchMedia("(max-width: 860px)").matches;

/** Sizes the viewport and its canvases after the window's and the zoom. */
function layOut() {
  const { width, height } = data.image;
  const narrow = isNarrow();
  const room = narrow ? innerHeight * 0.42 : Math.max(320, innerHeight - 190);
  const across = Math.max(80, viewport.parentElement.clientWidth - 2);
  const fit = Math.min(across / width, room / height);
  viewport.style.height = `${Math.max(140, Math.ceil(height * fit)) + 2}px`;
  frame.width = viewport.clientWidth;
  frame.height = viewport.clientHeight;
  frame.scale = fit * state.zoom;
  const whole = { x: Math.floor(width * frame.scale), y: Math.floor(height * frame.scale) };
  $("spacer").style.width = `${Math.max(frame.width, whole.x)}px`;
  $("spacer").style.height = `${Math.max(frame.height, whole.y)}px`;
  // Scroll bars take room.
  frame.width = viewport.clientWidth;
  frame.height = viewport.clientHeight;
  viewport.classList.toggle("fits", state.zoom === 1);
  const dense = Math.min(devicePixelRatio || 1, 2);
  for (const context of [base, cursor]) {
    const canvas = context.canvas;
    canvas.width = Math.round(frame.width * dense);
    canvas.height = Math.round(frame.height * dense);
    canvas.style.width = `${frame.width}px`;
    canvas.style.height = `${frame.height}px`;
    context.setTransform(dense, 0, 0, dense, 0, 0);
  }
  place();
  draw();
}

function place() {
  frame.left = Math.max(0, (frame.width - data.image.width * frame.scale) / 2) - viewport.scrollLeft;
  frame.top = Math.max(0, (frame.height - data.image.height * frame.scale) / 2) - viewport.scrollTop;
}

/** A rectangle of the page on the screen, on whole pixels so that neighbours neither overlap nor leave gaps. */
function onScreen([left, top, right, bottom]) {
  const x = Math.round(frame.left + left * frame.scale);
  const y = Math.round(frame.top + top * frame.scale);
  return [x, y, Math.round(frame.left + right * frame.scale) - x, Math.round(frame.top + bottom * frame.scale) - y];
}

const isSeen = ([x, y, width, height]) =>
  width > 0 && height > 0 && x < frame.width && y < frame.height && x + width > 0 && y + height > 0;

let drawing = 0;
/** Draws with the next frame, once. */
function draw() {
  if (!drawing) drawing = requestAnimationFrame(() => { drawing = 0; drawPage(); drawCursor(); });
}

function drawPage() {
  base.clearRect(0, 0, frame.width, frame.height);
  const { width, height } = data.image;
  const [x, y, across, down] = onScreen([0, 0, width, height]);
  base.imageSmoothingQuality = "high";
  base.globalAlpha = 1;
  if (state.view === "words") {
    base.fillStyle = colours.sheet;
    base.fillRect(x, y, across, down);
    base.globalAlpha = 0.1;
  }
  if (picture.complete) base.drawImage(picture, x, y, across, down);
  base.globalAlpha = 1;
  if (state.view !== "words" && document.documentElement.dataset.theme === "dark") {
    base.fillStyle = "rgba(0, 0, 0, 0.14)"; // paper in a dark room
    base.fillRect(x, y, across, down);
  }
  if (state.view === "words") drawWords();
  else if (state.view !== "page") drawHeat(heat());
  drawTiles();
  base.globalAlpha = 1;
}

/** What colours the patches: a number from -1 to 1 for each, and what the legend says of it. */
function heat() {
  if (state.view === "doubt") {
    let most = 2;
    for (const t of patchesOf(state.layer)) if (onPage(t)) most = Math.max(most, effective[t]);
    const value = (t) => Math.log(Math.max(effective[t], 1)) / Math.log(most);
    return { value, colour: colours.doubt, title: "Among how many words a patch is undecided", ticks: ["1", short(Math.sqrt(most)), short(most)] };
  }
  if (state.view === "answer") {
    const map = answerMap();
    let most = 1e-9;
    for (const t of patchesOf(state.layer)) most = Math.max(most, Math.abs(map[t]));
    const token = state.map ? `“${marked(asked().tokens[state.map - 1].text)}”` : "the answer";
    return { value: (t) => map[t] / most, colour: colours.for, against: colours.against, title: `What each patch gave to ${token}, in nats${parts(map)}`, ticks: [signed(-most), "0", signed(most)] };
  }
  const values = state.found.values;
  // What is nowhere likely stays pale.
  let most = PALE;
  for (const t of patchesOf(state.layer)) most = Math.max(most, values[t]);
  return { value: (t) => Math.sqrt(values[t] / most), colour: colours.find, title: state.found.title, ticks: ["0", percent(most / 4), percent(most)] };
}

/** What of a map lies in each layer, and on patches that see none of the page: where there is more than one place. */
function parts(map) {
  const said = data.layers.map(({ name }, layer) => [name, 0, layer]);
  let padding = 0;
  for (const sum of said) {
    for (const t of patchesOf(sum[2])) {
      if (onPage(t)) sum[1] += map[t];
      else padding += map[t];
    }
  }
  if (Math.abs(padding) >= 0.05) said.push(["padding", padding]);
  return said.length < 2 ? "" : `: ${said.map(([name, sum]) => `${name} ${signed(sum)}`).join(", ")}`;
}

function drawHeat({ value, colour, against, title, ticks }) {
  base.fillStyle = `rgb(${colour})`;
  let below = false;
  for (const t of patchesOf(state.layer)) {
    const amount = value(t);
    if (Math.abs(amount) < 0.012) continue;
    const box = onScreen(rectangle(t));
    if (!isSeen(box)) continue;
    if (amount < 0 !== below) {
      below = amount < 0;
      base.fillStyle = `rgb(${below ? against : colour})`;
    }
    base.globalAlpha = Math.min(1, Math.abs(amount)) * MOST_INK;
    base.fillRect(...box);
  }
  base.globalAlpha = 1;
  const left = against ? `rgba(${against}, ${MOST_INK}), rgba(${against}, 0) 50%, ` : "";
  legend(title, `linear-gradient(to right, ${left}rgba(${colour}, 0)${against ? " 50%" : ""}, rgba(${colour}, ${MOST_INK}))`, ticks);
}

let told = "";
function legend(title, gradient, ticks) {
  // A screen reader hears what is written here: only when it is new.
  if (told === (told = [title, gradient, ticks].join("|"))) return;
  $("legend-title").textContent = title;
  $("scale").hidden = !gradient;
  if (!gradient) return;
  $("ramp").style.background = gradient;
  $("ticks").replaceChildren(...ticks.map((tick) => Object.assign(document.createElement("span"), { textContent: tick })));
}

const MONO_WIDTH = 0.602; // of a monospaced letter, in units of its size

function drawWords() {
  base.fillStyle = colours.ink;
  base.textAlign = "center";
  base.textBaseline = "middle";
  const family = getComputedStyle(document.documentElement).getPropertyValue("--mono");
  let size = 0;
  for (const t of patchesOf(state.layer)) {
    const [x, y, width, height] = onScreen(rectangle(t));
    if (!isSeen([x, y, width, height])) continue;
    const entry = firstEntry[t];
    let word = text.words[entryWord[entry]].trim();
    // Sure words are black, unsure ones fade.
    base.globalAlpha = 0.16 + 0.84 * entryShare[entry];
    if (!word) {
      base.fillRect(x + width / 2 - 0.75, y + height / 2 - 0.75, 1.5, 1.5);
      continue;
    }
    const fitting = Math.min(height * 0.74, (width * 0.96) / (MONO_WIDTH * word.length));
    const wanted = Math.max(fitting, Math.min(height * 0.32, 8));
    if (wanted < 4) {
      const length = Math.min(0.84, 0.14 * word.length) * width; // too small to read: a dash as long as the word
      base.fillRect(x + (width - length) / 2, y + height * 0.36, length, Math.max(1, height * 0.28));
      continue;
    }
    const rounded = Math.round(wanted * 2) / 2;
    if (rounded !== size) base.font = `${(size = rounded)}px ${family}`;
    const most = Math.max(1, Math.floor((width * 0.98) / (MONO_WIDTH * size)));
    if (word.length > most) word = most > 2 ? `${word.slice(0, most - 1)}…` : word.slice(0, most);
    base.fillText(word, x + width / 2, y + height / 2);
  }
  legend("The likeliest word of each patch; faint where it is unsure. Zoom in to read small ones.", null);
}

function drawTiles() {
  if (state.view === "page") legend("Point at a patch, or tap it: its words are listed beside the page.", null);
  const tiles = data.layers[state.layer].tiles;
  if (tiles.length < 2) return;
  base.globalAlpha = 0.4;
  base.strokeStyle = colours.quiet;
  base.lineWidth = 1;
  for (const tile of tiles) {
    const [x, y, width, height] = onScreen(data.tiles[tile].box);
    base.strokeRect(x + 0.5, y + 0.5, width, height);
  }
}

function drawCursor() {
  cursor.clearRect(0, 0, frame.width, frame.height);
  if (state.patch < 0) return;
  const [x, y, width, height] = onScreen(rectangle(state.patch));
  if (!width || !height) return;
  // A light line within a dark one is seen on anything.
  cursor.strokeStyle = "rgba(255, 255, 255, 0.9)";
  cursor.lineWidth = state.held ? 6 : 4;
  cursor.strokeRect(x, y, width, height);
  cursor.strokeStyle = `${state.held ? colours.focus : "#111"}`;
  cursor.lineWidth = state.held ? 3 : 1.5;
  cursor.strokeRect(x, y, width, height);
}

// ---------------------------------------------------------------- the words of a patch

const SHOWN_WORDS = 8;
const rows = Array.from({ length: SHOWN_WORDS }, () => {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  const [fill, word, share] = ["fill", "word", "share"].map((name) => {
    const part = document.createElement("span");
    part.className = name;
    return part;
  });
  fill.setAttribute("aria-hidden", "true");
  button.append(word, share, fill);
  item.append(button);
  const row = { item, button, fill, word, share, index: -1 };
  button.addEventListener("click", () => search(keys[row.index]));
  $("words").append(item);
  return row;
});
const crop = $("crop").getContext("2d");

/** A word with its blanks made visible, faintly. */
function spell(element, word) {
  const inner = isBlank(word) ? "" : word.trim();
  const [before, after] = inner ? word.split(inner).map(marked) : [marked(word), ""];
  const mark = (blank) => Object.assign(document.createElement("span"), { className: "mark", textContent: blank });
  element.replaceChildren(...(before ? [mark(before)] : []), inner, ...(after ? [mark(after)] : []));
}

/** Makes a patch the one that is shown. */
function show(t, { held = state.held } = {}) {
  if (t === state.patch && held === state.held) return;
  state.patch = t;
  state.held = held;
  drawCursor();
  describe();
}

function describe() {
  const t = state.patch;
  if (t < 0) return;
  const start = firstEntry[t];
  const count = firstEntry[t + 1] - start;
  const top = text.words[entryWord[start]];
  $("patch-title").textContent = isBlank(top) ? `${marked(top)} (blank)` : `“${top.trim()}”`;
  $("patch-place").textContent = `${placeOf(t)}${state.held ? " · held" : ""}`;
  const words = effective[t];
  $("patch-doubt").textContent = `${words < 1.05 ? "1.0" : short(words)} effective words`;
  const map = answerMap();
  $("patch-share").textContent = map ? gift(map[t]) : "";
  let known = 0;
  for (let entry = start; entry < start + count; entry++) known += entryShare[entry];
  let listed = 0;
  rows.forEach((row, i) => {
    row.item.hidden = i >= count;
    if (i >= count) return;
    const share = entryShare[start + i];
    listed += share;
    row.index = entryWord[start + i];
    const word = text.words[row.index];
    spell(row.word, word);
    row.share.textContent = percent(share);
    row.fill.style.transform = `scaleX(${share < 0.004 ? 0 : share})`;
    row.button.title = "Find it on the page";
  });
  const more = Math.max(0, count - SHOWN_WORDS);
  const rest = [];
  if (more) rest.push(`${more} more: ${percent(Math.max(0, known - listed))}`);
  rest.push(`all words not kept: ${percent(Math.max(0, 1 - known))}`);
  $("rest").textContent = rest.join(" · ");
  drawCrop(t);
}

function gift(share) {
  const to = state.map ? "this token" : "the answer";
  return Math.abs(share) < 0.005 ? `Gave nothing to ${to}` : `Gave ${signed(share)} nats to ${to}`;
}

function placeOf(t) {
  const tile = Math.floor(t / PATCHES);
  const row = Math.floor((t % PATCHES) / COLUMNS) + 1;
  const layer = data.layers[state.layer];
  const name = layer.name === "thumbnail" ? "thumbnail" : `tile ${layer.tiles.indexOf(tile) + 1} of ${layer.tiles.length}`;
  const note = leftOut && leftOut[t] ? " · not shown to the language model" : "";
  return `${name} · row ${row}, column ${(t % COLUMNS) + 1}${note}`;
}

function drawCrop(t) {
  const [left, top, right, bottom] = rectangle(t);
  const side = crop.canvas.width;
  // Three patches across.
  const scale = side / (3 * Math.max(right - left, bottom - top));
  const x = side / 2 - ((left + right) / 2) * scale;
  const y = side / 2 - ((top + bottom) / 2) * scale;
  crop.clearRect(0, 0, side, side);
  crop.imageSmoothingQuality = "high";
  if (picture.complete) crop.drawImage(picture, x, y, data.image.width * scale, data.image.height * scale);
  const box = [x + left * scale, y + top * scale, (right - left) * scale, (bottom - top) * scale];
  crop.strokeStyle = "rgba(255, 255, 255, 0.9)";
  crop.lineWidth = 7;
  crop.strokeRect(...box);
  crop.strokeStyle = "#111";
  crop.lineWidth = 3;
  crop.strokeRect(...box);
}

let speaking = 0;
/** Tells a screen reader, once the keys rest. */
function speak() {
  clearTimeout(speaking);
  speaking = setTimeout(() => {
    const start = firstEntry[state.patch];
    const said = [];
    for (let entry = start; entry < Math.min(start + 3, firstEntry[state.patch + 1]); entry++) {
      said.push(`${marked(text.words[entryWord[entry]].trim()) || "blank"}, ${percent(entryShare[entry])}`);
    }
    $("spoken").textContent = `${placeOf(state.patch)}: ${said.join("; ")}`;
  }, 180);
}

// ---------------------------------------------------------------- the search

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
  if (!said.length) said.push(`not among the ${text.kept} likeliest words of any patch, so below ${percent(unheld())} in each`);
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
    item.append(word, Object.assign(document.createElement("span"), { textContent: percent(share) }));
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
    const chip = Object.assign(document.createElement("button"), { type: "button", textContent: word, title: `${short(sum)} patches' worth` });
    chip.addEventListener("click", () => search(word));
    return chip;
  }));
}

// ---------------------------------------------------------------- the answer

const asked = () => data.questions[state.question];
const maps = data.questions.map(({ maps }) => maps && {
  scales: maps.scales,
  values: numbers(maps.values, Int16Array),
});

/** The patches' shares in what is chosen of the answer, or null. */
let shares = { of: "", map: null };
function answerMap() {
  const found = maps[state.question];
  if (!found) return null;
  const of = `${state.question}/${state.map}`;
  if (shares.of !== of) {
    const part = found.values.subarray(state.map * TOTAL, (state.map + 1) * TOTAL);
    shares = { of, map: Float32Array.from(part, (value) => (value / 32767) * found.scales[state.map]) };
  }
  return shares.map;
}

function showAnswer() {
  $("asked").hidden = !data.questions.length;
  document.querySelector("#views [value=answer]").disabled = !maps[state.question];
  if (!data.questions.length) return;
  const { question, answer, tokens } = asked();
  $("question").textContent = question;
  const found = maps[state.question];
  const eachToken = found && found.scales.length > 1;
  $("answer").classList.toggle("empty", !tokens.length);
  if (eachToken) $("answer").replaceChildren(...tokens.flatMap((token, i) => [blankBefore(token, i), tokenButton(token, i + 1)]));
  else $("answer").textContent = tokens.length ? answer : "no answer";
  showAnswerNote();
  if (data.questions.length < 2) return;
  $("questions").hidden = false;
  $("questions").replaceChildren(...data.questions.map(({ question }, i) => {
    const tab = Object.assign(document.createElement("button"), { type: "button", textContent: String(i + 1), title: question });
    tab.setAttribute("aria-label", `Question ${i + 1}: ${question}`);
    tab.setAttribute("aria-pressed", String(i === state.question));
    tab.addEventListener("click", () => {
      Object.assign(state, { question: i, map: 0 });
      showAnswer();
      $("questions").children[i].focus();
      setView(maps[i] ? "answer" : "page");
      describe();
    });
    return tab;
  }));
}

const blankBefore = ({ text }, i) => (i && !isBlank(text) ? text.slice(0, text.length - text.trimStart().length) : "");

function tokenButton(token, map) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "token";
  button.textContent = isBlank(token.text) ? marked(token.text) : token.text.trimStart();
  button.setAttribute("aria-pressed", String(state.map === map));
  button.setAttribute("aria-label", `Token ${map}: ${marked(token.text)}`);
  button.addEventListener("click", () => {
    state.map = state.map === map ? 0 : map;
    for (const [i, other] of [...$("answer").children].entries()) other.setAttribute("aria-pressed", String(state.map === i + 1));
    showAnswerNote();
    setView("answer");
    describe();
  });
  return button;
}

function showAnswerNote() {
  const { tokens } = asked();
  const found = maps[state.question];
  const chance = (log) => percent(Math.exp(log));
  if (!found) {
    $("answer-note").textContent = "";
  } else if (state.map) {
    const { logProb, blankLogProb } = tokens[state.map - 1];
    $("answer-note").textContent = `This token: ${chance(logProb)}; on a blank page: ${chance(blankLogProb)}.`;
  } else {
    const sum = (name) => tokens.reduce((total, token) => total + token[name], 0);
    const each = found.scales.length > 1 ? " Choose a part of it to see where that came from." : "";
    $("answer-note").textContent = `The model gave it ${chance(sum("logProb"))}; on a blank page: ${chance(sum("blankLogProb"))}.${each}`;
  }
}

// ---------------------------------------------------------------- pointer, keys and buttons

function setView(view) {
  state.view = view;
  document.querySelector(`#views [value=${view}]`).checked = true;
  draw();
}

function setLayer(layer) {
  const [left, top, right, bottom] = state.patch < 0 ? [0, 0, 0, 0] : rectangle(state.patch);
  state.layer = layer;
  if (state.query.trim()) state.found = locate(state.query);
  show(patchAt((left + right) / 2, (top + bottom) / 2));
  describe();
  draw();
}

/** Zooms by a factor, with a point of the viewport staying where it is. */
function zoom(factor, x = frame.width / 2, y = frame.height / 2) {
  let finest = 1e9;
  for (const t of patchesOf(state.layer)) {
    const [left, , right] = rectangle(t);
    if (right > left) finest = Math.min(finest, right - left);
  }
  const most = Math.max(1, 88 / (finest * (frame.scale / state.zoom)));
  const before = frame.scale;
  const point = [(x - frame.left) / before, (y - frame.top) / before];
  state.zoom = factor ? Math.min(most, Math.max(1, state.zoom * factor)) : 1;
  layOut();
  viewport.scrollLeft = point[0] * frame.scale - x;
  viewport.scrollTop = point[1] * frame.scale - y;
  place();
}

function pointOf(event) {
  const box = viewport.getBoundingClientRect();
  return [
    (event.clientX - box.left - viewport.clientLeft - frame.left) / frame.scale,
    (event.clientY - box.top - viewport.clientTop - frame.top) / frame.scale,
  ];
}

/** Brings a patch into sight where the page is larger than the viewport. */
function reveal(t) {
  const [x, y, width, height] = onScreen(rectangle(t));
  const margin = 24;
  viewport.scrollLeft += Math.min(0, x - margin) + Math.max(0, x + width + margin - frame.width);
  viewport.scrollTop += Math.min(0, y - margin) + Math.max(0, y + height + margin - frame.height);
}

viewport.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch" || state.held) return;
  const t = patchAt(...pointOf(event));
  if (t >= 0) show(t);
});

viewport.addEventListener("click", (event) => {
  const t = patchAt(...pointOf(event));
  if (t < 0) return;
  show(t, { held: !(state.held && t === state.patch) });
  // On a phone the words lie below the page: they come into sight, and the page stays.
  if (isNarrow() && $("patch").getBoundingClientRect().top > innerHeight - 200) {
    const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    $("stage").scrollIntoView({ block: "start", behavior: smooth ? "smooth" : "auto" });
  }
});

viewport.addEventListener("scroll", () => { place(); draw(); });

viewport.addEventListener("wheel", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  event.preventDefault();
  const box = viewport.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 240), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
viewport.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in STEPS) {
    const t = neighbour(state.patch, ...STEPS[event.key]);
    if (t >= 0) {
      show(t);
      reveal(t);
    }
    speak();
  } else if (event.key === "Enter" || event.key === " ") {
    show(state.patch, { held: !state.held });
    speak();
  } else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") zoom(0);
  else return;
  event.preventDefault();
});

document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== $("search")) {
    event.preventDefault();
    $("search").focus();
    $("search").select();
  }
  if (event.key === "Escape" && state.held) show(state.patch, { held: false });
});

$("search").addEventListener("input", () => {
  search($("search").value, { typed: true });
  suggest();
});
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    if (chosen >= 0) choose(chosen);
    openSuggestions(false);
  } else if (event.key === "Escape") {
    openSuggestions(false);
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && suggested.length) {
    event.preventDefault();
    openSuggestions(true);
    const step = event.key === "ArrowDown" ? 1 : -1;
    chosen = (chosen + step + suggested.length + (chosen < 0 && step < 0 ? 1 : 0)) % suggested.length;
    [...$("suggestions").children].forEach((item, i) => item.setAttribute("aria-selected", String(i === chosen)));
    $("search").setAttribute("aria-activedescendant", `suggestion-${chosen}`);
  }
});
$("search").addEventListener("blur", () => openSuggestions(false));

$("views").addEventListener("change", (event) => setView(event.target.value));
$("layers").addEventListener("change", (event) => setLayer(Number(event.target.value)));
$("zoom-in").addEventListener("click", () => zoom(1.5));
$("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
$("zoom-fit").addEventListener("click", () => zoom(0));

const darkness = matchMedia("(prefers-color-scheme: dark)");
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  readColours();
  draw();
  describe();
}
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
darkness.addEventListener("change", () => setTheme(darkness.matches));

new ResizeObserver(layOut).observe(viewport.parentElement);
addEventListener("resize", layOut);

// ---------------------------------------------------------------- the words around it

function showFacts() {
  $("name").textContent = data.name;
  const cells = data.layers[0].tiles.length;
  const parts = [`${cells} ${cells === 1 ? "tile" : "tiles"}${data.layers.length > 1 ? " and a thumbnail" : ""} of ${data.rows} × ${data.columns} patches`];
  parts.push(`${text.vocabulary.toLocaleString("en")} words to choose from`);
  if (data.checkpoint) parts.push(`model: ${data.checkpoint}`);
  $("facts").textContent = parts.join(" · ");
  $("layers").hidden = data.layers.length < 2;

  let known = 0;
  for (const share of entryShare) known += share;
  const notes = [
    "The connector of this model, ALIGN, gives the language model a mixture of its own words for every patch: P, a probability for each of " +
      `${text.vocabulary.toLocaleString("en")} words, and with it the mean of their embeddings. What you see is that P. The language model is shown nothing else of the picture.`,
    `Of each patch the ${text.kept} likeliest words are kept here, those above ${(text.floor * 100).toPrecision(1)} %. ` +
      `On average that is ${percent(known / TOTAL)} of P; what is missing is said beside each list. A word that is not found may still have up to ${percent(unheld())} in a patch.`,
    "Effective words is exp(entropy of P): 1 for a sure patch, as many as there are words for one that has no idea.",
    "A patch's words come from an encoder in which all patches of a tile attend to each other: a patch can name what is beside it.",
    "A word in several pieces is looked for as neighbouring patches that spell it from left to right (one patch in between may be skipped); " +
      "its figure is the geometric mean of the pieces' probabilities, which is a score and not a probability.",
  ];
  const attributed = data.questions.filter((question) => question.maps);
  if (attributed.length) {
    const worst = Math.max(...attributed.map((question) => question.missing));
    notes.push(
      "Which patches the answer leaned on: integrated gradients of its log-probability, from a white page of this size to this page, in " +
        `${attributed[0].steps} steps, with respect to what the decoder is given for each patch. The shares of all patches add up to how much likelier the page made the answer ` +
        `(here but for ${percent(worst)} of it at most). They tell how the decoder used the patches, not how the encoder came to its words; patches that say the same share the credit; ` +
        "and a negative share means that the patch spoke against the answer.",
    );
  }
  $("notes").replaceChildren(...notes.map((note) => Object.assign(document.createElement("p"), { textContent: note })));
}

/** The patch to begin with: what the answer leaned on most, or the surest word of the page. */
function firstPatch() {
  const map = answerMap();
  let found = -1;
  let best = -Infinity;
  for (const t of patchesOf(0)) {
    if (!onPage(t)) continue;
    const entry = firstEntry[t];
    const merit = map ? map[t] : entryShare[entry] - (isBlank(text.words[entryWord[entry]]) ? 2 : 0);
    if (merit > best) [found, best] = [t, merit];
  }
  return found;
}

picture.addEventListener("load", () => { draw(); describe(); });
picture.src = data.image.url;
document.querySelector("#views [value=find]").disabled = true;
showFacts();
showAnswer();
showOften();
state.patch = firstPatch();
setTheme(darkness.matches);
setView(maps[0] ? "answer" : "words");
layOut();

// For tests, and for whoever opens the console.
window.inspector = { data, state, frame, rectangle, patchAt, neighbour, locate, spelled, answerMap, drawPage, firstEntry, entryWord, entryShare, effective };
