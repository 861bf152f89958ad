// The answer, and the contribution of each patch to its tokens.

const currentQuestion = () => data.questions[state.question];
const maps = data.questions.map(({ maps }) => maps && {
  scales: maps.scales,
  values: numbers(maps.values, Int16Array),
});

// The selected map, unpacked once and kept, because every frame that is drawn needs it.
let unpacked = { key: "", map: null };
/** Returns the patches' shares in the selected token or in the whole answer, or null without an attribution. */
function answerMap() {
  const packed = maps[state.question];
  if (!packed) return null;
  const key = `${state.question}/${state.map}`;
  if (unpacked.key !== key) {
    const codes = packed.values.subarray(state.map * TOTAL, (state.map + 1) * TOTAL);
    unpacked = { key, map: Float32Array.from(codes, (code) => (code / 32767) * packed.scales[state.map]) };
  }
  return unpacked.map;
}

/** Updates the card with the question, the answer and the tabs of other questions. */
function showAnswer() {
  $("question-card").hidden = !data.questions.length;
  document.querySelector("#views [value=answer]").disabled = !maps[state.question];
  if (!data.questions.length) return;
  const { question, answer, tokens } = currentQuestion();
  $("question").textContent = question;
  const packed = maps[state.question];
  const hasTokenMaps = packed && packed.scales.length > 1;
  $("answer").classList.toggle("empty", !tokens.length);
  if (hasTokenMaps) {
    const parts = tokens.flatMap((token, i) => [spaceBefore(token, i), tokenButton(token, i + 1)]);
    $("answer").replaceChildren(...parts);
  } else $("answer").textContent = tokens.length ? answer : "no answer";
  showAnswerNote();
  if (data.questions.length < 2) return;
  $("questions").hidden = false;
  $("questions").replaceChildren(...data.questions.map(({ question }, i) => {
    const tab = make("button", { type: "button", textContent: String(i + 1), title: question });
    tab.setAttribute("aria-label", `Question ${i + 1}: ${question}`);
    tab.setAttribute("aria-pressed", String(i === state.question));
    tab.addEventListener("click", () => {
      Object.assign(state, { question: i, map: 0 });
      showAnswer();
      $("questions").children[i].focus();
      setView(maps[i] ? "answer" : "page");
      describe();
    });
    return tab;
  }));
}

/** Returns the white space before a token, which stays outside its button; the first token has none. */
const spaceBefore = ({ text }, i) => (i && !isBlank(text) ? text.slice(0, text.length - text.trimStart().length) : "");

function tokenButton(token, map) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "token";
  button.textContent = isBlank(token.text) ? marked(token.text) : token.text.trimStart();
  button.setAttribute("aria-pressed", String(state.map === map));
  button.setAttribute("aria-label", `Token ${map}: ${marked(token.text)}`);
  button.addEventListener("click", () => {
    state.map = state.map === map ? 0 : map;
    [...$("answer").children].forEach((other, i) => other.setAttribute("aria-pressed", String(state.map === i + 1)));
    showAnswerNote();
    setView("answer");
    describe();
  });
  return button;
}

/** Updates the note below the answer: the probability of the selected token, or of the whole answer. */
function showAnswerNote() {
  const { tokens } = currentQuestion();
  const packed = maps[state.question];
  const probability = (log) => percent(Math.exp(log));
  if (!packed) {
    $("answer-note").textContent = "";
  } else if (state.map) {
    const { logProb, blankLogProb } = tokens[state.map - 1];
    $("answer-note").textContent =
      `Probability of this token: ${probability(logProb)}; on a blank page: ${probability(blankLogProb)}.`;
  } else {
    const sum = (name) => tokens.reduce((total, token) => total + token[name], 0);
    const hint = packed.scales.length > 1 ? " Select a part of the answer to see where it came from." : "";
    const [here, blank] = [sum("logProb"), sum("blankLogProb")].map(probability);
    $("answer-note").textContent = `Probability of this answer: ${here}; on a blank page: ${blank}.${hint}`;
  }
}
