"use strict";
// Texts of models are set as text, never as markup.
const made = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
};
const points = (value) => (value === null || value === undefined ? "no score" : `${Number(value).toFixed(2)} points`);
const oneLine = (text, most = 90) => {
  const line = text.replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most)}…` : line || "(empty)";
};

function judgements(title, found) {
  if (!found.length) return null;
  const items = found.map((one) =>
    made("div", { class: "judgement" },
      made("p", { class: "soft" }, [one.name || one.id || "", one.judge, one.model && `by ${one.model}`,
        one.unreadable ? `unreadable: ${one.unreadable}` : points(one.points)].filter(Boolean).join(" · ")),
      one.text ? made("div", { class: "text" }, one.text) : null));
  return made("details", {}, made("summary", {}, `${title} (${found.length})`), ...items);
}

function response(one) {
  const facts = [points(one.score), one.role === "actor" ? null : one.role, one.model,
    one.finish === "stop" ? "complete" : `ended by ${one.finish}`, `${one.chars} characters`].filter(Boolean);
  return made("div", { class: `answer ${one.side}` },
    made("header", {}, made("strong", {}, `response ${one.id.split("/").pop()}`),
      one.side ? made("span", { class: "side" }, one.side === "chosen" ? "✓ chosen" : "✗ rejected") : null,
      made("span", {}, facts.join(" · "))),
    one.thought ? made("details", {}, made("summary", {}, "thought"), made("div", { class: "text" }, one.thought)) : null,
    made("div", { class: "text" }, one.text),
    judgements("judgements", one.judgements));
}

function prompt(one) {
  const pairs = one.pairs.map((pair) =>
    `${pair.chosen.split("/").pop()} over ${pair.rejected.split("/").pop()}` +
    (pair.kind === "actor" ? "" : ` (${pair.kind})`) + (pair.gap === null ? "" : `, ${pair.gap.toFixed(2)} apart`));
  return [
    made("p", { class: "soft" }, `${one.id}, iteration ${one.iteration}`),
    made("div", { class: "text prompt" }, one.prompt),
    made("p", {}, pairs.length ? `Pairs: ${pairs.join("; ")}.` : "No pair."),
    ...one.responses.map(response),
    judgements("comparisons", one.comparisons),
  ];
}

function held(one, state) {
  const first = one.answers[0];
  const other = one.answers.find((answer) => answer.model === state.model) || one.answers[one.answers.length - 1];
  const shown = other === first ? [first] : [first, other];
  return [
    made("p", { class: "soft" }, one.id),
    made("div", { class: "text prompt" }, one.prompt),
    ...shown.map((answer) => {
      const body = made("div", { class: "text" });
      if (other.diff && state.diff && shown.length > 1) {
        for (const [kind, piece] of other.diff) {
          if (kind === " ") body.append(piece);
          else if (kind === "-" && answer === first) body.append(made("del", {}, piece));
          else if (kind === "+" && answer === other) body.append(made("ins", {}, piece));
        }
      } else body.append(answer.text);
      const scores = Object.entries(answer.scores).map(([judge, score]) => `${points(score)} by ${judge}`);
      return made("div", { class: "answer" },
        made("header", {}, made("strong", {}, answer.model), made("span", {}, scores.join(" · ") || "no score")), body);
    }),
  ];
}

function browse(root, all, small, texts, render, state) {
  const list = root.querySelector(".list"), detail = root.querySelector(".detail"), find = root.querySelector(".find");
  let current = null;
  const open = (one, button) => {
    current = one;
    for (const other of list.querySelectorAll("button")) other.setAttribute("aria-current", String(other === button));
    detail.replaceChildren(...render(one, state).filter(Boolean));
    detail.scrollTop = 0;
  };
  const draw = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let kept = all.filter((one) => (state.iteration === undefined || state.iteration === "" || String(one.iteration) === state.iteration));
    kept = kept.filter((one) => { const text = texts(one).toLowerCase(); return words.every((word) => text.includes(word)); });
    if (state.order) kept = kept.filter((one) => one[state.order] > 0).sort((a, b) => b[state.order] - a[state.order]);
    list.replaceChildren(...kept.map((one) => {
      const button = made("button", { type: "button" }, oneLine(one.prompt), made("small", {}, small(one, state)));
      button.addEventListener("click", () => open(one, button));
      return made("li", {}, button);
    }));
    root.querySelector(".count").textContent = `${kept.length} shown`;
    const at = Math.max(0, kept.indexOf(current));
    if (kept.length) open(kept[at], list.querySelectorAll("button")[at]);
    else detail.replaceChildren("Nothing is like that.");
  };
  list.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const buttons = [...list.querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + step];
    if (next) { next.focus(); next.click(); event.preventDefault(); }
  });
  find.addEventListener("input", draw);
  for (const name of ["iteration", "order", "model"]) {
    const select = root.querySelector(`select.${name}`);
    if (select) select.addEventListener("change", () => { state[name] = select.value; draw(); });
  }
  const diff = root.querySelector(".diff");
  if (diff) diff.addEventListener("change", () => { state.diff = diff.checked; draw(); });
  draw();
}

const SHOWN = {
  gap: (one) => `gap ${one.gap.toFixed(2)}`, unreadable: (one) => `${one.unreadable} unreadable`,
  chars: (one) => `${one.chars} characters`, spread: (one) => `spread ${one.spread.toFixed(2)}`,
};
for (const root of document.querySelectorAll(".browser")) {
  const data = JSON.parse(document.getElementById(`${root.dataset.run}-data`).textContent);
  if (root.classList.contains("heldout")) {
    const select = root.querySelector(".model");
    for (const model of data.models.slice(1)) select.append(made("option", { value: model }, model));
    select.value = data.models[data.models.length - 1] || "";
    browse(root, data.heldout, (one) => one.id,
      (one) => [one.prompt, ...one.answers.map((answer) => answer.text)].join("\n"), held,
      { model: select.value, diff: true });
  } else {
    const select = root.querySelector(".iteration");
    for (const number of new Set(data.samples.map((one) => one.iteration)))
      select.append(made("option", { value: String(number) }, String(number)));
    const small = (one, state) => state.order ? SHOWN[state.order](one)
      : `iteration ${one.iteration}, ${one.responses.length} responses, ${one.pairs.length ? "pair" : "no pair"}`;
    browse(root, data.samples, small,
      (one) => [one.id, one.prompt, ...one.responses.map((answer) => answer.text)].join("\n"), prompt,
      { iteration: "", order: "" });
  }
}

// What a mark of a plot stands for, under the pointer.
const tip = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest ? event.target.closest("svg [aria-label][role='graphics-symbol']") : null;
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  tip.style.left = `${Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
});
