"use strict";
// Unpacks the data (packing.py describes the encoding) and formats numbers and words. Patches are numbered tile by
// tile, and row by row within a tile; `t` is such a number.

const $ = (id) => document.getElementById(id);
const make = (tag, properties) => Object.assign(document.createElement(tag), properties);

const data = JSON.parse($("data").textContent);
const text = data.text;
const COLUMNS = data.columns;
const PATCHES = data.rows * data.columns; // patches per tile
const TOTAL = data.tiles.length * PATCHES;
const NUM_WORDS = text.words.length;

/** Returns the numbers of a base64 string as a typed array. */
function numbers(base64, Type) {
  const binary = atob(base64);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return new Type(bytes.buffer); // The data is little-endian, and so is every platform that browsers run on.
}

const entryWord = numbers(text.entries, NUM_WORDS <= 65536 ? Uint16Array : Uint32Array);
const entryShare = Float32Array.from(numbers(text.probabilities, Uint16Array), (code) =>
  Math.exp((code / 65535) * text.lowest),
);
// Effective number of words of each patch: exp(entropy) = V ** (entropy / ln V).
const effective = Float32Array.from(numbers(text.entropy, Uint16Array), (code) => text.vocabulary ** (code / 65535));
const unusedPatches = data.leftOut ? numbers(data.leftOut, Uint8Array) : null;

// The words of patch t are the entries from firstEntry[t] up to firstEntry[t + 1], likeliest first.
const firstEntry = new Uint32Array(TOTAL + 1);
numbers(text.counts, Uint16Array).forEach((count, t) => { firstEntry[t + 1] = firstEntry[t] + count; });

// Inverted index: the entries of word w are byWord[firstPlace[w]] up to byWord[firstPlace[w + 1]].
const firstPlace = new Uint32Array(NUM_WORDS + 1);
const byWord = new Uint32Array(entryWord.length);
const patchOfEntry = new Uint32Array(entryWord.length);
const mass = new Float64Array(NUM_WORDS); // sum of a word's P over the patches
const peak = new Float32Array(NUM_WORDS); // largest P of a word
// Counting sort: count the entries of each word, sum up the counts, then put each entry in its place.
for (const word of entryWord) firstPlace[word + 1]++;
for (let word = 0; word < NUM_WORDS; word++) firstPlace[word + 1] += firstPlace[word];
{
  const next = firstPlace.slice(); // next free place of each word
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

// Visible marks for white space.
const MARKS = { " ": "␣", "\n": "⏎", "\r": "⏎", "\t": "⇥" };
const marked = (word) => word.replace(/[ \n\r\t]/g, (space) => MARKS[space]);
const isBlank = (word) => word.trim() === "";
/** Returns the key that a word is looked up by: trimmed, in lower case. */
const keyOf = (word) => (isBlank(word) ? marked(word) : word.trim().toLowerCase().normalize("NFC"));
const keys = text.words.map(keyOf);
const wordsOfKey = new Map();
keys.forEach((key, word) => {
  const words = wordsOfKey.get(key);
  if (words) words.push(word);
  else wordsOfKey.set(key, [word]);
});

function percent(share) {
  // \u00a0 is a no-break space.
  if (share >= 0.9995) return "100\u00a0%";
  if (share >= 0.0995) return `${Math.round(share * 100)}\u00a0%`;
  if (share >= 0.001) return `${(share * 100).toPrecision(2)}\u00a0%`;
  return share >= 0.0001 ? `${(share * 100).toFixed(2)}\u00a0%` : "<\u00a00.01\u00a0%";
}
const short = (number) =>
  number >= 99.5 ? Math.round(number).toLocaleString("en") : Number(number.toPrecision(2)).toString();
const signed = (number) => `${number < 0 ? "−" : "+"}${Math.abs(number).toFixed(2)}`;
