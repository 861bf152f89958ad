// What is said of the page and of its numbers; and the start.

function showFacts() {
  const cells = data.layers[0].tiles.length;
  const whole = data.layers.length > 1 ? " and a thumbnail" : "";
  const parts = [`${cells} ${cells === 1 ? "tile" : "tiles"}${whole} of ${data.rows} × ${data.columns} patches`];
  parts.push(`${text.vocabulary.toLocaleString("en")} words to choose from`);
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
    unheld: percent(unheld()),
    steps: attributed[0]?.steps,
    missing: percent(Math.max(0, ...attributed.map((question) => question.missing))),
  };
  for (const place of document.querySelectorAll("[data-fact]")) place.textContent = facts[place.dataset.fact];
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
window.inspector = { data, state, frame, rectangle, patchAt, neighbour, locate, spelled, answerMap, drawPage };
