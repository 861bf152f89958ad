// Input: pointer, touch, keyboard and buttons.

/** Switches to a view: page, words, doubt, answer or find. */
function setView(view) {
  state.view = view;
  document.querySelector(`#views [value=${view}]`).checked = true;
  draw();
}

/** Switches between the tiles and the thumbnail. */
function setLayer(layer) {
  // Stay at the same place of the page: select the new layer's patch at the center of the current patch.
  const [left, top, right, bottom] = state.patch < 0 ? [0, 0, 0, 0] : rectangle(state.patch);
  state.layer = layer;
  if (state.query.trim()) state.result = locate(state.query);
  show(patchAt((left + right) / 2, (top + bottom) / 2));
  describe();
  draw();
}

/** Zooms by a factor (0: fits the page) and keeps the point (x, y) of the viewport in place. */
function zoom(factor, x = frame.width / 2, y = frame.height / 2) {
  // The largest zoom makes the narrowest patch 88 pixels wide.
  let narrowest = 1e9;
  for (const t of patchesOf(state.layer)) {
    const [left, , right] = rectangle(t);
    if (right > left) narrowest = Math.min(narrowest, right - left);
  }
  const maxZoom = Math.max(1, 88 / (narrowest * (frame.scale / state.zoom)));
  const before = frame.scale;
  const point = [(x - frame.left) / before, (y - frame.top) / before];
  state.zoom = factor ? Math.min(maxZoom, Math.max(1, state.zoom * factor)) : 1;
  layOut();
  viewport.scrollLeft = point[0] * frame.scale - x;
  viewport.scrollTop = point[1] * frame.scale - y;
  place();
}

/** Returns the point of the page, in its pixels, that a pointer event refers to. */
function pointOf(event) {
  const box = viewport.getBoundingClientRect();
  return [
    (event.clientX - box.left - viewport.clientLeft - frame.left) / frame.scale,
    (event.clientY - box.top - viewport.clientTop - frame.top) / frame.scale,
  ];
}

/** Scrolls a patch into view if the page is larger than the viewport. */
function reveal(t) {
  const [x, y, width, height] = onScreen(rectangle(t));
  const margin = 24;
  viewport.scrollLeft += Math.min(0, x - margin) + Math.max(0, x + width + margin - frame.width);
  viewport.scrollTop += Math.min(0, y - margin) + Math.max(0, y + height + margin - frame.height);
}

viewport.addEventListener("pointermove", (event) => {
  if (event.pointerType === "touch" || state.pinned) return;
  const t = patchAt(...pointOf(event));
  if (t >= 0) show(t);
});

viewport.addEventListener("click", (event) => {
  const t = patchAt(...pointOf(event));
  if (t < 0) return;
  show(t, { pinned: !(state.pinned && t === state.patch) });
  // On a phone the words are below the page. Scroll them into view; the page is sticky and stays visible.
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
    const t = neighbor(state.patch, ...STEPS[event.key]);
    if (t >= 0) {
      show(t);
      reveal(t);
    }
    announce();
  } else if (event.key === "Enter" || event.key === " ") {
    show(state.patch, { pinned: !state.pinned });
    announce();
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
  if (event.key === "Escape" && state.pinned) show(state.patch, { pinned: false });
});

$("search").addEventListener("input", () => {
  search($("search").value, { typed: true });
  suggest();
});
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    if (activeSuggestion >= 0) acceptSuggestion(activeSuggestion);
    openSuggestions(false);
  } else if (event.key === "Escape") {
    openSuggestions(false);
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && suggestions.length) {
    event.preventDefault();
    openSuggestions(true);
    const step = event.key === "ArrowDown" ? 1 : -1;
    // Without an active suggestion (-1), up selects the last one and down the first.
    const start = activeSuggestion < 0 && step < 0 ? 0 : activeSuggestion;
    activeSuggestion = (start + step + suggestions.length) % suggestions.length;
    [...$("suggestions").children].forEach((item, i) => {
      item.setAttribute("aria-selected", String(i === activeSuggestion));
    });
    $("search").setAttribute("aria-activedescendant", `suggestion-${activeSuggestion}`);
  }
});
$("search").addEventListener("blur", () => openSuggestions(false));

$("views").addEventListener("change", (event) => setView(event.target.value));
$("layers").addEventListener("change", (event) => setLayer(Number(event.target.value)));
$("zoom-in").addEventListener("click", () => zoom(1.5));
$("zoom-out").addEventListener("click", () => zoom(1 / 1.5));
$("zoom-fit").addEventListener("click", () => zoom(0));

const darkScheme = matchMedia("(prefers-color-scheme: dark)");
function setTheme(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  readColors();
  draw();
  describe();
}
$("theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme !== "dark"));
darkScheme.addEventListener("change", () => setTheme(darkScheme.matches));

new ResizeObserver(layOut).observe(viewport.parentElement);
addEventListener("resize", layOut);
