// The charts: SVG at the width that there is, so that text keeps its size; the values under the pointer, or under the
// arrow keys, stand below. Their data come from charts.py. Everything of theirs goes in as text, never as markup.
"use strict";
{
const charts = JSON.parse(document.getElementById("chart-data").textContent);
const HEIGHT = 220, TOP = 10, RIGHT = 12, BOTTOM = 36, DASHES = ["", "7 3", "8 3 2 3", "2 3", "6 3 2 3 2 3"];

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function html(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function shown(value) {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
}

/** Round numbers from low to high, about `count` of them. */
function ticks(low, high, count, isWhole) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max([1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough) * power, isWhole ? 1 : 0);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({length: Math.floor(high / step + 1e-9) - first + 1}, (_, index) => (first + index) * step);
}

/** Powers of ten, and where there are few of them also their doubles and fives. */
function logTicks(low, high) {
  const powers = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) powers.push(10 ** power);
  const few = powers.length < 4 ? [1, 2, 5] : [1];
  return powers.flatMap((power) => few.map((factor) => factor * power)).filter((tick) => tick >= low && tick <= high);
}

/** [least, most] of y with some room; a logarithmic axis has none for what is not positive. */
function extentOf(chart, isLog) {
  if (chart.limits && !isLog) return chart.limits;
  const values = chart.series.flatMap((one) => [...one.points.map((point) => point[1]), ...one.bounds.flatMap((bound) => bound.slice(1))]);
  const known = values.filter((value) => value !== null && (!isLog || value > 0));
  if (!known.length) return isLog ? [0.1, 1] : [0, 1];
  let [low, high] = [Math.min(...known), Math.max(...known)];
  if (isLog) return low === high ? [low / 2, high * 2] : [low / 1.1, high * 1.1];
  if (chart.from_zero) low = 0;
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [chart.from_zero ? 0 : low - room, high + room];
}

/** A curve of the second run has the colour of the first one's, and is dotted; alone, each has a dash of its own. */
function styleOf(chart, index) {
  const ofFirst = chart.series.filter((one) => !one.of_run).length;
  const isSecond = chart.series[index].of_run === 1;
  const dashes = ofFirst === chart.series.length ? DASHES[index % 5] : isSecond ? "3 3" : "";
  return {colour: `var(--series-${((isSecond ? index - ofFirst : index) % 5) + 1})`, dashes};
}

function draw(figure, chart, isLog) {
  const holder = figure.querySelector(".plot"), width = Math.max(holder.clientWidth, 200);
  const [low, high] = extentOf(chart, isLog);
  const yTicks = isLog ? logTicks(low, high) : ticks(low, high, 5, false);
  const left = 14 + 7 * Math.max(...yTicks.map((tick) => shown(tick).length), 2) + (chart.y ? 14 : 0);
  const xs = chart.series.flatMap((one) => one.points.map((point) => point[0]));
  let [start, end] = chart.diagonal ? [0, 1] : [Math.min(...xs), Math.max(...xs)];
  const side = (end - start || 1) * (chart.is_scatter ? 0.06 : chart.diagonal ? 0 : 0.02);
  [start, end] = [start - side, end + side];
  const x = (value) => left + ((value - start) / (end - start)) * (width - left - RIGHT);
  const scale = isLog ? Math.log10 : (value) => value;
  const y = (value) => TOP + ((scale(high) - scale(value)) / (scale(high) - scale(low))) * (HEIGHT - TOP - BOTTOM);
  const floor = HEIGHT - BOTTOM;
  const root = svg("svg", {width, height: HEIGHT, role: "img", tabindex: 0, "aria-label": [chart.title, chart.numbers, chart.caption].filter(Boolean).join(", ")});

  chart.phases.forEach(([from, to, name], index) => {
    const [x1, x2] = [x(Math.max(from, start)), x(Math.min(to, end))];
    const band = svg("rect", {x: x1, y: TOP, width: Math.max(x2 - x1, 0), height: floor - TOP, class: index % 2 ? "phase odd" : "phase"});
    band.append(svg("title", {}, name));
    root.append(band);
    if (x2 - x1 > 7 * name.length) root.append(svg("text", {x: (x1 + x2) / 2, y: TOP + 12, "text-anchor": "middle"}, name));
  });
  for (const tick of yTicks) {
    root.append(svg("line", {x1: left, x2: width - RIGHT, y1: y(tick), y2: y(tick), class: "grid"}));
    root.append(svg("text", {x: left - 6, y: y(tick) + 4, "text-anchor": "end"}, shown(tick)));
  }
  for (const tick of ticks(start, end, Math.max(2, Math.min(6, width / 90)), chart.x === "step")) {
    root.append(svg("line", {x1: x(tick), x2: x(tick), y1: floor, y2: floor + 4, class: "axis"}));
    root.append(svg("text", {x: x(tick), y: floor + 17, "text-anchor": "middle"}, shown(tick)));
  }
  root.append(svg("line", {x1: left, x2: width - RIGHT, y1: floor, y2: floor, class: "axis"}));
  root.append(svg("text", {x: (left + width - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle", class: "name"}, chart.x));
  if (chart.y) root.append(svg("text", {x: 0, y: 0, transform: `translate(11 ${(TOP + floor) / 2}) rotate(-90)`, "text-anchor": "middle", class: "name"}, chart.y));
  if (chart.diagonal) root.append(svg("line", {x1: x(0), y1: y(0), x2: x(1), y2: y(1), class: "diagonal"}));

  const drawable = (value) => value !== null && (!isLog || value > 0);
  chart.series.forEach((one, index) => {
    const {colour, dashes} = styleOf(chart, index);
    if (one.bounds.length && !isLog) {
      const edge = [...one.bounds.map(([at, , most]) => [at, most]), ...one.bounds.toReversed().map(([at, least]) => [at, least])];
      root.append(svg("polygon", {points: edge.map(([at, value]) => `${x(at)},${y(value)}`).join(" "), fill: colour, opacity: 0.2}));
    }
    let path = "", isDown = false;
    for (const [at, value] of one.points) {
      if (drawable(value)) path += `${isDown ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
      isDown = drawable(value);
    }
    if (!chart.is_scatter) root.append(svg("path", {d: path, class: "curve", stroke: colour, "stroke-dasharray": dashes}));
    if (chart.is_scatter || one.points.length < 25) {
      for (const [at, value] of one.points) if (drawable(value)) root.append(mark(x(at), y(value), chart.is_scatter ? index : 0, colour));
    }
  });

  const cursor = svg("line", {y1: TOP, y2: floor, class: "cursor", visibility: "hidden"});
  root.append(cursor);
  holder.replaceChildren(root);
  addReadout(figure, root, chart, cursor, x, y);
}

/** A point; in a scatter each series has a shape of its own, to be told apart without colour. */
function mark(x, y, shape, colour) {
  if (shape === 0) return svg("circle", {cx: x, cy: y, r: 3, fill: colour});
  if (shape === 1) return svg("rect", {x: x - 3, y: y - 3, width: 6, height: 6, fill: colour});
  return svg("path", {d: `M${x} ${y - 4}l4 7h-8z`, fill: colour});
}

/** The values of one x below the chart: the one nearest to the pointer, or that the arrow keys have come to. */
function addReadout(figure, root, chart, cursor, x, y) {
  const output = figure.querySelector("output");
  const all = chart.series.flatMap(({name, points, labels}) => points.map(([at, value], index) => ({at, value, name, label: labels[index]})));
  const ats = [...new Set(all.map(({at}) => at))].sort((one, other) => one - other);
  let index = -1;
  const tell = (at, texts) => {
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    cursor.setAttribute("visibility", "visible");
    output.textContent = texts.join(" · ");
  };
  const show = (nth) => {
    index = Math.max(0, Math.min(ats.length - 1, nth));
    const here = all.filter(({at}) => at === ats[index]);
    tell(ats[index], [`${chart.x} ${shown(ats[index])}`, ...here.map(({name, value, label}) => `${name} ${shown(value)}` + (label ? ` (${label})` : ""))]);
  };
  const nearest = (distance) => ats.reduce((best, _, nth) => (distance(ats[nth]) < distance(ats[best]) ? nth : best), 0);
  root.addEventListener("pointermove", (event) => {
    const box = root.getBoundingClientRect(), [px, py] = [event.clientX - box.left, event.clientY - box.top];
    if (!chart.is_scatter) return show(nearest((at) => Math.abs(x(at) - px)));
    const far = ({at, value}) => Math.hypot(x(at) - px, y(value) - py);
    const {at, value, label} = all.reduce((best, one) => (far(one) < far(best) ? one : best));
    tell(at, [label, `${chart.x} ${shown(at)}`, `${chart.y} ${shown(value)}`]);
  });
  root.addEventListener("keydown", (event) => {
    const target = {ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: ats.length - 1}[event.key];
    if (target === undefined) return;
    show(target);
    event.preventDefault();
  });
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    output.textContent = "";
  };
  root.addEventListener("pointerleave", hide);
  root.addEventListener("blur", hide);
}

function drawLegend(figure, chart) {
  if (chart.series.length < 2) return;
  const items = chart.series.map((one, index) => {
    const {colour, dashes} = styleOf(chart, index);
    const sample = svg("svg", {width: 26, height: 10, "aria-hidden": true});
    sample.append(chart.is_scatter ? mark(13, 5, index, colour) : svg("path", {d: "M1 5H25", class: "curve", stroke: colour, "stroke-dasharray": dashes}));
    return html("li", {}, sample, one.name);
  });
  figure.querySelector(".plot").before(html("ul", {className: "legend"}, ...items));
}

const figures = [...document.querySelectorAll("figure[data-chart]")].map((figure) => [figure, charts[figure.dataset.chart]]);
const log = document.getElementById("log");
const drawAll = () => {
  for (const [figure, chart] of figures) draw(figure, chart, log.checked && figure.closest("#training") !== null);
};
for (const [figure, chart] of figures) drawLegend(figure, chart);
log.addEventListener("input", drawAll);
addEventListener("resize", drawAll);
drawAll();
}
