// Where on the page each patch looks, and which patch is beside it.

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
