// The token map: rows of text whose tokens are coloured by what the model predicted at the chosen step. Its data come
// from tokens.py. Every text of theirs goes in as text, never as markup.
"use strict";
{
const map = JSON.parse(document.getElementById("token-map").textContent);
const $ = (id) => document.getElementById(id);
const rows = map.rows.map((data) => ({data, element: null, tokens: []}));
const targetOf = new Map(); // token element -> {row, index}, its index among the row's targets
let chosen = null; // the token element that was last focused

// ---- what the data say

const nats = (thousandths) => (thousandths ?? NaN) / 1000;
const shownStep = () => map.steps[$("step").value];
const selected = (name) => document.querySelector(`input[name=${name}]:checked`).value;
const saveAt = (row, step) => row.data.saves.find((save) => save.step === step);

/** The save that the chosen step is compared with; undefined if the row has none that is earlier. */
function earlierSave(row) {
  const since = $("since").value;
  return row.data.saves.find((save) => save.step < shownStep() && (since === "first" || save.step === Number(since)));
}

/** What the run that this one is compared with saved of the row at that step; undefined if it did not. */
const otherSave = (row) => row.data.others.find((save) => save.step === shownStep());

/** What the colours of a row's targets show, in nats, NaN = unknown. A change, or a difference, is that of the NLL. */
function shownValues(row, colour) {
  const {logprob, entropy} = saveAt(row, shownStep());
  if (colour === "entropy") return entropy.map(nats);
  if (colour === "nll") return logprob.map((now) => -nats(now));
  if (colour === "other") {
    const theirs = otherSave(row)?.logprob;
    return logprob.map((ours, index) => nats(ours) - nats(theirs?.[index]));
  }
  const before = earlierSave(row)?.logprob;
  return logprob.map((now, index) => nats(before?.[index]) - nats(now));
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const meanNll = (save) => -mean(save.logprob.map(nats).filter(Number.isFinite));

// ---- how numbers and tokens are written

const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
const plain = (value, digits) => (Number.isFinite(value) ? value.toFixed(digits).replace("-", "−") : "unknown");
const visible = (text) => text.replace(/^ /, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";

function percent(logprob) {
  if (Number.isNaN(logprob)) return "unknown";
  const value = 100 * Math.exp(logprob);
  return value < 0.01 ? "< 0.01 %" : `${value.toPrecision(3)} %`;
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- the rows

/** The row's element: one part for each section, tags included. Made once, when it is first shown. */
function build(row) {
  const {kind, sample_id, tokens, sections, targets} = row.data;
  const title = make("h3", {}, `${kind === "probe" ? "probe row" : "row"} ${sample_id}`, " ", make("small"));
  row.element = make("article", {className: "row"}, title);
  row.element.setAttribute("role", "group");
  row.element.setAttribute("aria-label", title.firstChild.data);
  const indexAt = new Map(targets.map((token, index) => [token, index]));
  let section = "", text;
  const isBlank = (token) => !indexAt.has(token) && !map.strings[tokens[token]].trim();
  const length = tokens.findLastIndex((_, token) => !isBlank(token)) + 1; // without what ends the template
  tokens.slice(0, length).forEach((string, token) => {
    const own = map.sections[sections[token]];
    // what stands between two parts, and the end of the turn, follow the part before them
    if (own !== section && !(own === "answer" && section && section !== "prompt")) {
      section = own;
      text = make("p");
      const part = make("div", {className: "part"}, make("b", {}, section), text);
      part.dataset.section = section;
      row.element.append(part);
    }
    text.append(tokenElement(row, map.strings[string], indexAt.get(token)));
  });
}

function tokenElement(row, text, index) {
  if (index === undefined) return make("span", {className: "no-target"}, text);
  const element = make("span", {className: text ? "token" : "token piece", tabIndex: -1}, text.replaceAll("\n", "↵\n"));
  element.setAttribute("role", "option");
  targetOf.set(element, {row, index});
  row.tokens.push(element);
  return element;
}

/** Show the rows that the chosen step saved, in the colours of that step. */
function draw() {
  const step = shownStep(), colour = selected("colour");
  const end = map.scale[colour === "other" ? "change" : colour];
  $("step-shown").textContent = `step ${step}`;
  $("step").setAttribute("aria-valuetext", `step ${step}`);
  for (const row of rows) {
    const found = findIn(row);
    const save = row.data.kind === selected("kind") && found ? saveAt(row, step) : undefined;
    if (save && !row.element) build(row);
    if (row.element) row.element.hidden = !save;
    if (!save) continue;
    markFound(row, found);
    row.element.querySelector("small").textContent = remark(row, save);
    const values = shownValues(row, colour);
    row.tokens.forEach((element, index) => {
      const value = values[index];
      element.classList.toggle("unknown", Number.isNaN(value));
      element.classList.toggle("likelier", value < 0);
      element.style.setProperty("--strength", `${100 * Math.sqrt(Math.min(1, Math.abs(value || 0) / end))}%`);
    });
  }
  arrange(step);
  drawLegend(colour, end);
  if (!chosen || chosen.closest(".row").hidden) choose(visibleTokens()[0]);
  else describe(chosen);
}

/** Put the shown rows in the chosen order; those that are hard for the model first, or those of the data. */
function arrange(step) {
  const order = shownRows();
  if ($("order").value === "nll") order.sort((one, other) => meanNll(saveAt(other, step)) - meanNll(saveAt(one, step)));
  const focused = document.activeElement;
  order.forEach((row, index) => {
    if ($("rows").children[index] !== row.element) $("rows").insertBefore(row.element, $("rows").children[index] ?? null);
  });
  if (focused !== document.activeElement && !focused.closest("[hidden]")) focused.focus(); // moving an element takes its focus
}

const shownRows = () => rows.filter((row) => row.element && !row.element.hidden);

/** Where the row's text has what is looked for: [start, end], empty if nothing is; undefined if it is not there. */
function findIn(row) {
  const wanted = $("find").value.toLowerCase();
  const start = row.data.tokens.map((string) => map.strings[string]).join("").toLowerCase().indexOf(wanted);
  return start < 0 ? undefined : [start, start + wanted.length];
}

function markFound(row, [start, end]) {
  const starts = [];
  row.data.tokens.reduce((at, string) => (starts.push(at), at + map.strings[string].length), 0);
  row.tokens.forEach((element, index) => {
    const token = row.data.targets[index], after = starts[token + 1] ?? Infinity;
    element.classList.toggle("found", starts[token] < end && after > start);
  });
}

function remark(row, save) {
  const texts = [`mean NLL ${plain(meanNll(save), 2)} nats`];
  if (selected("colour") === "change") {
    const before = earlierSave(row);
    if (before) texts.push(`${signed(meanNll(save) - meanNll(before), 2)} since step ${before.step}`);
    else texts.push($("since").value === "first" ? "not saved before" : `not saved at step ${$("since").value}`);
  } else if (selected("colour") === "other") {
    const theirs = otherSave(row);
    texts.push(theirs ? `${signed(meanNll(theirs) - meanNll(save), 2)} in the other run` : "not saved there at this step");
  } else if (row.data.saves.length > 1) {
    texts.push(`saved ${row.data.saves.length} times`);
  }
  return texts.join(" · ");
}

function drawLegend(colour, end) {
  const [least, , most] = $("legend").children;
  $("legend").classList.toggle("two-sided", ["change", "other"].includes(colour));
  [least.textContent, most.textContent] = {
    nll: ["0", `${end} nats (${percent(-end)}) or more`],
    entropy: ["0", `${end} nats or more`],
    change: [`−${end} (likelier)`, `+${end} nats (less likely)`],
    other: [`−${end} (likelier there)`, `+${end} nats (less likely there)`],
  }[colour];
}

// ---- what the model predicted at one token

function describe(element) {
  const {row, index} = targetOf.get(element);
  const save = saveAt(row, shownStep());
  const before = earlierSave(row);
  const logprob = nats(save.logprob[index]), rank = save.rank[index];
  const facts = [
    ["probability", percent(logprob)],
    ["NLL", `${plain(-logprob, 2)} nats`],
    ["rank, 0 = likeliest", rank < 0 ? "unknown" : rank],
    ["entropy", `${plain(nats(save.entropy[index]), 2)} nats`],
  ];
  if (before) facts.push([`at step ${before.step}`, percent(nats(before.logprob[index]))]);
  const theirs = otherSave(row);
  if (theirs) facts.push(["in the other run", percent(nats(theirs.logprob[index]))]);
  const list = make("dl");
  for (const [name, value] of facts) list.append(make("dt", {}, name), make("dd", {}, value));
  const part = map.sections[row.data.sections[row.data.targets[index]]];
  $("prediction").hidden = false;
  $("described").replaceChildren(
    make("h3", {}, visible(map.strings[row.data.labels[index]])),
    make("small", {className: "soft"}, `token ${row.data.targets[index]} of row ${row.data.sample_id}, ${part}, step ${save.step}`),
    list,
    alternatives(row, save, index),
    ...history(row, save, index),
  );
}

/** The likeliest tokens there, the one that stands in the text, and what is left for all others. */
function alternatives(row, save, index) {
  const label = row.data.labels[index];
  const exact = nats(save.logprob[index]); // in the list it may be rounded
  const likeliest = save.top[index].map((string, nth) => [string, string === label ? exact : nats(save.top_logprob[index][nth])]);
  if (!save.top[index].includes(label)) likeliest.push([label, exact]);
  const table = make("table", {}, make("caption", {className: "soft"}, "What it expected here"));
  const add = (text, logprob, className) => {
    const bar = make("td", {className: "bar"});
    bar.style.setProperty("--width", `${100 * Math.exp(logprob)}%`);
    table.append(make("tr", {className}, make("td", {}, text), make("td", {className: "number"}, percent(logprob)), bar));
  };
  for (const [string, logprob] of likeliest) add(visible(map.strings[string]), logprob, string === label ? "label" : "");
  const rest = 1 - likeliest.reduce((sum, [, logprob]) => sum + Math.exp(logprob), 0);
  add("all others", Math.log(Math.max(rest, 0)), "soft");
  return table;
}

/** Its probability at every saved step, as bars. */
function history(row, save, index) {
  if (row.data.saves.length < 2) return [];
  const bars = make("div", {id: "history"});
  for (const other of row.data.saves) {
    const bar = make("i", {title: `step ${other.step}: ${percent(nats(other.logprob[index]))}`});
    bar.classList.toggle("now", other === save);
    bar.style.setProperty("--height", `${100 * Math.exp(nats(other.logprob[index]))}%`);
    bars.append(bar);
  }
  const [first, last] = [row.data.saves[0].step, row.data.saves.at(-1).step];
  return [make("p", {className: "soft caption"}, `Its probability, steps ${first} to ${last}`), bars];
}

// ---- choosing: pointer, keyboard, controls

/** In the order in which they stand. */
const visibleTokens = () => [...$("rows").querySelectorAll(".row:not([hidden]) .token")];

/** Make this the one token that Tab reaches, and describe it. */
function choose(element) {
  chosen?.setAttribute("aria-selected", "false");
  if (chosen) chosen.tabIndex = -1;
  chosen = element ?? null;
  if (!chosen) return $("described").replaceChildren($("find").value ? "No row of this step has that text." : "No row was saved at this step.");
  chosen.setAttribute("aria-selected", "true");
  chosen.tabIndex = 0;
  describe(chosen);
}

/** The token that a key leads to from the chosen one; undefined for any other key. */
function tokenFor(key) {
  const tokens = visibleTokens(), {row, index} = targetOf.get(chosen);
  const shown = shownRows().sort((one, other) => (one.element.compareDocumentPosition(other.element) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1));
  const inRow = (other) => other?.tokens[Math.min(index, other.tokens.length - 1)];
  switch (key) {
    case "ArrowLeft": return tokens[tokens.indexOf(chosen) - 1];
    case "ArrowRight": return tokens[tokens.indexOf(chosen) + 1];
    case "ArrowUp": return inRow(shown[shown.indexOf(row) - 1]);
    case "ArrowDown": return inRow(shown[shown.indexOf(row) + 1]);
    case "Home": return row.tokens[0];
    case "End": return row.tokens.at(-1);
  }
}

$("rows").addEventListener("mouseover", (event) => targetOf.has(event.target) && describe(event.target));
$("rows").addEventListener("mouseleave", () => chosen && describe(chosen));
$("rows").addEventListener("focusin", (event) => targetOf.has(event.target) && choose(event.target));
$("rows").addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  if (["PageUp", "PageDown"].includes(event.key)) {
    $("step")[event.key === "PageUp" ? "stepUp" : "stepDown"]();
    draw();
    chosen?.focus(); // the row that had the focus may not be of this step
  } else if (!tokenFor(event.key)) {
    return;
  } else {
    tokenFor(event.key).focus();
  }
  event.preventDefault();
});
$("controls").addEventListener("input", draw);
$("controls").addEventListener("submit", (event) => event.preventDefault());

$("close").addEventListener("click", () => ($("prediction").hidden = true));

const kinds = {probe: "probe", logits: "trained batches"};
for (const [kind, text] of Object.entries(kinds).filter(([kind]) => rows.some((row) => row.data.kind === kind))) {
  const input = make("input", {type: "radio", name: "kind", value: kind, checked: !$("kinds").querySelector("input")});
  $("kinds").append(make("label", {}, input, text));
}
$("since").append(make("option", {value: "first"}, "its first save"));
for (const step of map.steps.slice(0, -1)) $("since").append(make("option", {value: step}, `step ${step}`));
draw();
}
