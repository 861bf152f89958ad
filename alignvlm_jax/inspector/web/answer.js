// The answer, and what each of its tokens owes to each patch.

const asked = () => data.questions[state.question];
const maps = data.questions.map(({ maps }) => maps && {
  scales: maps.scales,
  values: numbers(maps.values, Int16Array),
});

/** The patches' shares in what is chosen of the answer, or null. */
let shares = { of: "", map: null };
function answerMap() {
  const found = maps[state.question];
  if (!found) return null;
  const of = `${state.question}/${state.map}`;
  if (shares.of !== of) {
    const part = found.values.subarray(state.map * TOTAL, (state.map + 1) * TOTAL);
    shares = { of, map: Float32Array.from(part, (value) => (value / 32767) * found.scales[state.map]) };
  }
  return shares.map;
}

function showAnswer() {
  $("asked").hidden = !data.questions.length;
  document.querySelector("#views [value=answer]").disabled = !maps[state.question];
  if (!data.questions.length) return;
  const { question, answer, tokens } = asked();
  $("question").textContent = question;
  const found = maps[state.question];
  const eachToken = found && found.scales.length > 1;
  $("answer").classList.toggle("empty", !tokens.length);
  if (eachToken) {
    const parts = tokens.flatMap((token, i) => [blankBefore(token, i), tokenButton(token, i + 1)]);
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

const blankBefore = ({ text }, i) => (i && !isBlank(text) ? text.slice(0, text.length - text.trimStart().length) : "");

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

function showAnswerNote() {
  const { tokens } = asked();
  const found = maps[state.question];
  const chance = (log) => percent(Math.exp(log));
  if (!found) {
    $("answer-note").textContent = "";
  } else if (state.map) {
    const { logProb, blankLogProb } = tokens[state.map - 1];
    $("answer-note").textContent = `This token: ${chance(logProb)}; on a blank page: ${chance(blankLogProb)}.`;
  } else {
    const sum = (name) => tokens.reduce((total, token) => total + token[name], 0);
    const each = found.scales.length > 1 ? " Choose a part of it to see where that came from." : "";
    const [here, blank] = [sum("logProb"), sum("blankLogProb")].map(chance);
    $("answer-note").textContent = `The model gave it ${here}; on a blank page: ${blank}.${each}`;
  }
}
