// Draws the page with its colors and words on one canvas, and the cursor on a second canvas above it. There is no DOM
// element per patch: a page may have thousands.

const viewport = $("viewport");
const base = $("base").getContext("2d");
const cursor = $("cursor").getContext("2d");
// Size of the viewport, and scale and offset of the page in it.
const frame = { width: 0, height: 0, scale: 1, left: 0, top: 0 };
const MAX_ALPHA = 0.7;
const FULL_COLOR_AT = 0.2; // A word whose largest P is below this gets less than the full color.

const isNarrow = () => matchMedia("(max-width: 860px)").matches;

/** Sizes the viewport and its canvases for the window size and the zoom. */
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
  const scaled = { width: Math.floor(width * frame.scale), height: Math.floor(height * frame.scale) };
  $("spacer").style.width = `${Math.max(frame.width, scaled.width)}px`;
  $("spacer").style.height = `${Math.max(frame.height, scaled.height)}px`;
  // Measure again: the spacer may have added scroll bars, which take up space.
  frame.width = viewport.clientWidth;
  frame.height = viewport.clientHeight;
  viewport.classList.toggle("fits", state.zoom === 1);
  const density = Math.min(devicePixelRatio || 1, 2); // canvas pixels per CSS pixel
  for (const context of [base, cursor]) {
    const canvas = context.canvas;
    canvas.width = Math.round(frame.width * density);
    canvas.height = Math.round(frame.height * density);
    canvas.style.width = `${frame.width}px`;
    canvas.style.height = `${frame.height}px`;
    context.setTransform(density, 0, 0, density, 0, 0);
  }
  place();
  draw();
}

/** Computes the offset of the page: centered if it fits, otherwise scrolled. */
function place() {
  frame.left = Math.max(0, (frame.width - data.image.width * frame.scale) / 2) - viewport.scrollLeft;
  frame.top = Math.max(0, (frame.height - data.image.height * frame.scale) / 2) - viewport.scrollTop;
}

/** Returns [x, y, width, height] on the screen of a rectangle of the page. */
function onScreen([left, top, right, bottom]) {
  // Edges, not sizes, are rounded to whole pixels: neighbors neither overlap nor leave gaps.
  const x = Math.round(frame.left + left * frame.scale);
  const y = Math.round(frame.top + top * frame.scale);
  return [x, y, Math.round(frame.left + right * frame.scale) - x, Math.round(frame.top + bottom * frame.scale) - y];
}

const isVisible = ([x, y, width, height]) =>
  width > 0 && height > 0 && x < frame.width && y < frame.height && x + width > 0 && y + height > 0;

let pendingFrame = 0;
/** Redraws with the next frame; several calls before it redraw once. */
function draw() {
  if (!pendingFrame) pendingFrame = requestAnimationFrame(() => { pendingFrame = 0; drawPage(); drawCursor(); });
}

function drawPage() {
  base.clearRect(0, 0, frame.width, frame.height);
  const { width, height } = data.image;
  const [x, y, across, down] = onScreen([0, 0, width, height]);
  base.imageSmoothingQuality = "high";
  base.globalAlpha = 1;
  if (state.view === "words") {
    base.fillStyle = colors.sheet;
    base.fillRect(x, y, across, down);
    base.globalAlpha = 0.1;
  }
  if (pageImage.complete) base.drawImage(pageImage, x, y, across, down);
  base.globalAlpha = 1;
  if (state.view !== "words" && document.documentElement.dataset.theme === "dark") {
    base.fillStyle = "rgba(0, 0, 0, 0.14)"; // White paper is too bright in the dark theme.
    base.fillRect(x, y, across, down);
  }
  if (state.view === "words") drawWords();
  else if (state.view !== "page") drawHeat(heat());
  drawTiles();
  base.globalAlpha = 1;
}

/** Returns the coloring of the current view: a value from -1 to 1 for each patch, the colors, and the legend. */
function heat() {
  if (state.view === "doubt") {
    // Logarithmic scale from 1 to the largest number of effective words.
    let max = 2;
    for (const t of patchesOf(state.layer)) if (onPage(t)) max = Math.max(max, effective[t]);
    const value = (t) => Math.log(Math.max(effective[t], 1)) / Math.log(max);
    const ticks = ["1", short(Math.sqrt(max)), short(max)];
    return { value, color: colors.doubt, title: "Effective number of words per patch", ticks };
  }
  if (state.view === "answer") {
    const map = answerMap();
    let max = 1e-9;
    for (const t of patchesOf(state.layer)) max = Math.max(max, Math.abs(map[t]));
    const target = state.map ? `“${marked(currentQuestion().tokens[state.map - 1].text)}”` : "the answer";
    const title = `Contribution of each patch to ${target}, in nats${layerSums(map)}`;
    const ticks = [signed(-max), "0", signed(max)];
    return { value: (t) => map[t] / max, color: colors.for, against: colors.against, title, ticks };
  }
  const values = state.result.values;
  // A word that is unlikely everywhere stays pale.
  let max = FULL_COLOR_AT;
  for (const t of patchesOf(state.layer)) max = Math.max(max, values[t]);
  const ticks = ["0", percent(max / 4), percent(max)];
  return { value: (t) => Math.sqrt(values[t] / max), color: colors.find, title: state.result.title, ticks };
}

/** Returns the sums of a map over each layer and over the padding as text, or "" if there is only one sum. */
function layerSums(map) {
  const sums = data.layers.map(({ name }) => [name, 0]);
  let padding = 0;
  sums.forEach((sum, layer) => {
    for (const t of patchesOf(layer)) {
      if (onPage(t)) sum[1] += map[t];
      else padding += map[t];
    }
  });
  if (Math.abs(padding) >= 0.05) sums.push(["padding", padding]);
  return sums.length < 2 ? "" : `: ${sums.map(([name, sum]) => `${name} ${signed(sum)}`).join(", ")}`;
}

/** Draws the coloring that `heat` returns, with its legend. */
function drawHeat({ value, color, against, title, ticks }) {
  base.fillStyle = `rgb(${color})`;
  let isNegative = false;
  for (const t of patchesOf(state.layer)) {
    const amount = value(t);
    if (Math.abs(amount) < 0.012) continue;
    const box = onScreen(rectangle(t));
    if (!isVisible(box)) continue;
    // Setting fillStyle is slow, so it is set only when the sign changes.
    if (amount < 0 !== isNegative) {
      isNegative = amount < 0;
      base.fillStyle = `rgb(${isNegative ? against : color})`;
    }
    base.globalAlpha = Math.min(1, Math.abs(amount)) * MAX_ALPHA;
    base.fillRect(...box);
  }
  base.globalAlpha = 1;
  const left = against ? `rgba(${against}, ${MAX_ALPHA}), rgba(${against}, 0) 50%, ` : "";
  const right = `rgba(${color}, 0)${against ? " 50%" : ""}, rgba(${color}, ${MAX_ALPHA})`;
  legend(title, `linear-gradient(to right, ${left}${right})`, ticks);
}

let lastLegend = "";
function legend(title, gradient, ticks) {
  // Screen readers announce every write to this live region, so it is written only when the text changes.
  if (lastLegend === (lastLegend = [title, gradient, ticks].join("|"))) return;
  $("legend-title").textContent = title;
  $("scale").hidden = !gradient;
  if (!gradient) return;
  $("ramp").style.background = gradient;
  $("ticks").replaceChildren(...ticks.map((tick) => make("span", { textContent: tick })));
}

const MONO_WIDTH = 0.602; // width of a monospaced letter, relative to the font size

/** Draws the likeliest word of each patch, in a font size that fits the patch. */
function drawWords() {
  base.fillStyle = colors.ink;
  base.textAlign = "center";
  base.textBaseline = "middle";
  const family = getComputedStyle(document.documentElement).getPropertyValue("--mono");
  let size = 0;
  for (const t of patchesOf(state.layer)) {
    const [x, y, width, height] = onScreen(rectangle(t));
    if (!isVisible([x, y, width, height])) continue;
    const entry = firstEntry[t];
    let word = text.words[entryWord[entry]].trim();
    // Likely words are black, unlikely ones faint.
    base.globalAlpha = 0.16 + 0.84 * entryShare[entry];
    if (!word) { // White space is drawn as a dot.
      base.fillRect(x + width / 2 - 0.75, y + height / 2 - 0.75, 1.5, 1.5);
      continue;
    }
    // The largest font size that fits the patch. Long words are not shrunk below a readable size, but cut.
    const fittingSize = Math.min(height * 0.74, (width * 0.96) / (MONO_WIDTH * word.length));
    const fontSize = Math.max(fittingSize, Math.min(height * 0.32, 8));
    if (fontSize < 4) { // Too small to read: a bar whose length is proportional to the word's.
      const length = Math.min(0.84, 0.14 * word.length) * width;
      base.fillRect(x + (width - length) / 2, y + height * 0.36, length, Math.max(1, height * 0.28));
      continue;
    }
    // Setting the font is slow, so sizes are rounded to half a pixel and the font is set only when the size changes.
    const rounded = Math.round(fontSize * 2) / 2;
    if (rounded !== size) base.font = `${(size = rounded)}px ${family}`;
    const room = Math.max(1, Math.floor((width * 0.98) / (MONO_WIDTH * size)));
    if (word.length > room) word = room > 2 ? `${word.slice(0, room - 1)}…` : word.slice(0, room);
    base.fillText(word, x + width / 2, y + height / 2);
  }
  legend("The likeliest word of each patch; faint where the model is unsure. Zoom in to read small words.", null);
}

/** Draws the borders of the tiles, if there are several. */
function drawTiles() {
  if (state.view === "page") legend("Point at a patch or tap it to list its words.", null);
  const tiles = data.layers[state.layer].tiles;
  if (tiles.length < 2) return;
  base.globalAlpha = 0.4;
  base.strokeStyle = colors.quiet;
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
  // A dark line on a wider light one is visible on any background.
  cursor.strokeStyle = "rgba(255, 255, 255, 0.9)";
  cursor.lineWidth = state.pinned ? 6 : 4;
  cursor.strokeRect(x, y, width, height);
  cursor.strokeStyle = `${state.pinned ? colors.focus : "#111"}`;
  cursor.lineWidth = state.pinned ? 3 : 1.5;
  cursor.strokeRect(x, y, width, height);
}
