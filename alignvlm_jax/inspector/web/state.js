// State of the user interface.

const state = {
  view: "page", // page, words, doubt, answer, find
  layer: 0,
  zoom: 1,
  patch: -1, // the selected patch, whose words are listed
  pinned: false, // whether the patch stays selected when the pointer moves
  question: 0,
  map: 0, // attribution map: 0 is the whole answer, 1 its first token, ...
  query: "",
  excluded: new Set(), // words that match the query but are not counted
  result: null, // result of the search
};
const pageImage = new Image();
const colors = {};

function readColors() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ink", "quiet", "line", "sheet", "find", "doubt", "for", "against", "focus"]) {
    colors[name] = style.getPropertyValue(`--${name}`).trim();
  }
}
