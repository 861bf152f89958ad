// Facts about the page and its numbers, and the start of the script.

function showFacts() {
  const cells = data.layers[0].tiles.length;
  const whole = data.layers.length > 1 ? " and a thumbnail" : "";
  const parts = [`${cells} ${cells === 1 ? "tile" : "tiles"}${whole} of ${data.rows} × ${data.columns} patches`];
  parts.push(`vocabulary of ${text.vocabulary.toLocaleString("en")} words`);
  if (data.checkpoint) parts.push(`model: ${data.checkpoint}`);
  $("name").textContent = data.name;
  $("facts").textContent = parts.join(" · ");
  $("layers").hidden = data.layers.length < 2;

  const attributed = data.questions.filter((question) => question.maps);
  $("attributed").hidden = !attributed.length;
  const facts = {
    vocabulary: text.vocabulary.toLocaleString("en"),
    kept: text.kept,
    floor: `${(text.floor * 100).toPrecision(1)}\u00a0%`,
    known: percent(entryShare.reduce((sum, share) => sum + share, 0) / TOTAL),
    missingBound: percent(missingBound()),
    steps: attributed[0]?.steps,
    missing: percent(Math.max(0, ...attributed.map((question) => question.missing))),
  };
  for (const place of document.querySelectorAll("[data-fact]")) place.textContent = facts[place.dataset.fact];
}

/** Returns the patch selected at first: the largest contribution to the answer, or else the likeliest word. */
function firstPatch() {
  const map = answerMap();
  let patch = -1;
  let best = -Infinity;
  for (const t of patchesOf(0)) {
    if (!onPage(t)) continue;
    const entry = firstEntry[t];
    // A probability is at most 1, so the penalty of 2 ranks white space behind every other word.
    const score = map ? map[t] : entryShare[entry] - (isBlank(text.words[entryWord[entry]]) ? 2 : 0);
    if (score > best) [patch, best] = [t, score];
  }
  return patch;
}

pageImage.addEventListener("load", () => { draw(); describe(); });
pageImage.src = data.image.url;
document.querySelector("#views [value=find]").disabled = true;
showFacts();
showAnswer();
showFrequentWords();
state.patch = firstPatch();
setTheme(darkScheme.matches);
setView(maps[0] ? "answer" : "words");
layOut();

// For tests and the browser's console.
window.inspector = { data, state, frame, rectangle, patchAt, neighbor, locate, findChains, answerMap, drawPage };
