// What is being looked at.

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
