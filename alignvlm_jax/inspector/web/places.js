// The place of each patch on the page, and its neighbors.

/** Returns [left, top, right, bottom] of a patch, in pixels of the page. */
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

/** Returns the index of the interval between increasing edges that contains a value, or -1. */
function interval(edges, value) {
  if (!(value >= edges[0] && value < edges[edges.length - 1])) return -1;
  let low = 0;
  let high = edges.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (edges[middle] <= value) low = middle;
    else high = middle;
  }
  return low;
}

/** Returns the patch of the current layer that covers a point of the page, or -1. */
function patchAt(x, y) {
  for (const tile of data.layers[state.layer].tiles) {
    const column = interval(data.tiles[tile].xs, x);
    const row = column < 0 ? -1 : interval(data.tiles[tile].ys, y);
    if (row >= 0) return tile * PATCHES + row * COLUMNS + column;
  }
  return -1;
}

/** Returns the next patch in a direction, across tile borders, or -1 at the edge of the page. */
function neighbor(t, dx, dy) {
  const [left, top, right, bottom] = rectangle(t);
  const x = (left + right) / 2;
  const y = (top + bottom) / 2;
  // A strip at the edge of a tile may belong to no patch, so try several distances beyond the patch's border.
  for (const distance of [0.02, 0.3, 0.6, 0.9]) {
    const other = patchAt(
      x + dx * ((right - left) / 2 + distance * (right - left)),
      y + dy * ((bottom - top) / 2 + distance * (bottom - top)),
    );
    if (other >= 0 && other !== t) return other;
  }
  return -1;
}

/** Yields the patches of a layer. */
function* patchesOf(layer) {
  for (const tile of data.layers[layer].tiles) {
    for (let t = tile * PATCHES; t < (tile + 1) * PATCHES; t++) yield t;
  }
}
