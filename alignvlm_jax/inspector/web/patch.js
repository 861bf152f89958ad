// The panel that lists the words of one patch.

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

/** Writes a word into an element, with faint marks for white space. */
function showWord(element, word) {
  const inner = isBlank(word) ? "" : word.trim();
  const [before, after] = inner ? word.split(inner).map(marked) : [marked(word), ""];
  const mark = (space) => make("span", { className: "mark", textContent: space });
  element.replaceChildren(...(before ? [mark(before)] : []), inner, ...(after ? [mark(after)] : []));
}

/** Selects a patch; a pinned patch stays selected when the pointer moves. */
function show(t, { pinned = state.pinned } = {}) {
  if (t === state.patch && pinned === state.pinned) return;
  state.patch = t;
  state.pinned = pinned;
  drawCursor();
  describe();
}

/** Updates the panel: the words of the selected patch, its place, and its share in the answer. */
function describe() {
  const t = state.patch;
  if (t < 0) return;
  const start = firstEntry[t];
  const count = firstEntry[t + 1] - start;
  const top = text.words[entryWord[start]];
  $("patch-title").textContent = isBlank(top) ? `${marked(top)} (white space)` : `“${top.trim()}”`;
  $("patch-place").textContent = `${placeOf(t)}${state.pinned ? " · pinned" : ""}`;
  const words = effective[t];
  $("patch-doubt").textContent = `${words < 1.05 ? "1.0" : short(words)} effective words`;
  const map = answerMap();
  $("patch-share").textContent = map ? contribution(map[t]) : "";
  let known = 0; // sum of P over all words kept of the patch
  for (let entry = start; entry < start + count; entry++) known += entryShare[entry];
  let listed = 0; // sum of P over the words shown in the list
  rows.forEach((row, i) => {
    row.item.hidden = i >= count;
    if (i >= count) return;
    const share = entryShare[start + i];
    listed += share;
    row.index = entryWord[start + i];
    const word = text.words[row.index];
    showWord(row.word, word);
    row.share.textContent = percent(share);
    row.fill.style.transform = `scaleX(${share < 0.004 ? 0 : share})`;
    row.button.title = "Find it on the page";
  });
  const more = Math.max(0, count - SHOWN_WORDS);
  const rest = [];
  if (more) rest.push(`${more} more: ${percent(Math.max(0, known - listed))}`);
  rest.push(`words not kept: ${percent(Math.max(0, 1 - known))}`);
  $("rest").textContent = rest.join(" · ");
  drawCrop(t);
}

const contribution = (share) => (Math.abs(share) < 0.005 ? "No contribution" : `Contribution: ${signed(share)} nats`);

/** Returns the place of a patch as text: its tile, row and column. */
function placeOf(t) {
  const tile = Math.floor(t / PATCHES);
  const row = Math.floor((t % PATCHES) / COLUMNS) + 1;
  const { name: layer, tiles } = data.layers[state.layer];
  const name = layer === "thumbnail" ? layer : `tile ${tiles.indexOf(tile) + 1} of ${tiles.length}`;
  const note = unusedPatches && unusedPatches[t] ? " · not shown to the language model" : "";
  return `${name} · row ${row}, column ${(t % COLUMNS) + 1}${note}`;
}

/** Draws the part of the page around a patch. */
function drawCrop(t) {
  const [left, top, right, bottom] = rectangle(t);
  const side = crop.canvas.width;
  // The crop is three patches wide, with the selected one in the center.
  const scale = side / (3 * Math.max(right - left, bottom - top));
  const x = side / 2 - ((left + right) / 2) * scale;
  const y = side / 2 - ((top + bottom) / 2) * scale;
  crop.clearRect(0, 0, side, side);
  crop.imageSmoothingQuality = "high";
  if (pageImage.complete) crop.drawImage(pageImage, x, y, data.image.width * scale, data.image.height * scale);
  const box = [x + left * scale, y + top * scale, (right - left) * scale, (bottom - top) * scale];
  crop.strokeStyle = "rgba(255, 255, 255, 0.9)";
  crop.lineWidth = 7;
  crop.strokeRect(...box);
  crop.strokeStyle = "#111";
  crop.lineWidth = 3;
  crop.strokeRect(...box);
}

let announcement = 0;
/** Announces the selected patch to screen readers. */
function announce() {
  // Wait for a pause: while an arrow key repeats, only the last patch is announced.
  clearTimeout(announcement);
  announcement = setTimeout(() => {
    const start = firstEntry[state.patch];
    const words = [];
    for (let entry = start; entry < Math.min(start + 3, firstEntry[state.patch + 1]); entry++) {
      words.push(`${marked(text.words[entryWord[entry]].trim()) || "white space"}, ${percent(entryShare[entry])}`);
    }
    $("announcement").textContent = `${placeOf(state.patch)}: ${words.join("; ")}`;
  }, 180);
}
