// The page, its colours and its words, on one canvas, and the cursor on another above it: no element for each patch.

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
    const ticks = ["1", short(Math.sqrt(most)), short(most)];
    return { value, colour: colours.doubt, title: "Among how many words a patch is undecided", ticks };
  }
  if (state.view === "answer") {
    const map = answerMap();
    let most = 1e-9;
    for (const t of patchesOf(state.layer)) most = Math.max(most, Math.abs(map[t]));
    const token = state.map ? `“${marked(asked().tokens[state.map - 1].text)}”` : "the answer";
    const title = `What each patch gave to ${token}, in nats${parts(map)}`;
    const ticks = [signed(-most), "0", signed(most)];
    return { value: (t) => map[t] / most, colour: colours.for, against: colours.against, title, ticks };
  }
  const values = state.found.values;
  // What is nowhere likely stays pale.
  let most = PALE;
  for (const t of patchesOf(state.layer)) most = Math.max(most, values[t]);
  const ticks = ["0", percent(most / 4), percent(most)];
  return { value: (t) => Math.sqrt(values[t] / most), colour: colours.find, title: state.found.title, ticks };
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
  const right = `rgba(${colour}, 0)${against ? " 50%" : ""}, rgba(${colour}, ${MOST_INK})`;
  legend(title, `linear-gradient(to right, ${left}${right})`, ticks);
}

let told = "";
function legend(title, gradient, ticks) {
  // A screen reader hears what is written here: only when it is new.
  if (told === (told = [title, gradient, ticks].join("|"))) return;
  $("legend-title").textContent = title;
  $("scale").hidden = !gradient;
  if (!gradient) return;
  $("ramp").style.background = gradient;
  $("ticks").replaceChildren(...ticks.map((tick) => make("span", { textContent: tick })));
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
