"use strict";
// The frames of viz.html. Every text from outside is set as text, never as HTML.
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const { t: nSteps, h, w } = data.grid;
const perStep = h * w;
const find = id => document.getElementById(id);

function bytes(text) { return Uint8Array.from(atob(text), one => one.charCodeAt(0)); }
function element(tag, text, kind) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}
function hex(colour) { return [1, 3, 5].map(at => parseInt(colour.slice(at, at + 2), 16)); }

const scores = new Float32Array(bytes(data.scores).buffer);
const ranks = new Uint16Array(bytes(data.ranks).buffer);
const links = data.links && {
  cells: new Int32Array(bytes(data.links.cells).buffer), weights: new Float32Array(bytes(data.links.weights).buffer),
};
const groups = data.groups && { of: new Int32Array(bytes(data.groups.of).buffer),
  members: new Int32Array(bytes(data.groups.members).buffer) };
const ramp = data.ramp.map(hex);
const colours = data.subspaces.map(one => hex(one.colour));
const LESS = hex("#0072b2"), MORE = hex("#e69f00");

const state = { frame: 0, view: "scores", layer: 0, head: 0, rank: null, token: null, timer: null };
const stage = { box: find("stage"), image: find("stage").querySelector("img"),
  canvas: find("stage").querySelector("canvas") };

// A score's percentile: the share of the scores below it, those equal to it by half.
let percentiles = null;
function percentileScores() {
  if (percentiles) return percentiles;
  const order = Float32Array.from(scores).sort(), place = new Map();
  for (let first = 0; first < order.length;) {
    let end = first;
    while (end < order.length && order[end] === order[first]) end++;
    place.set(order[first], (first + end) / 2 / order.length);
    first = end;
  }
  return percentiles = scores.map(one => place.get(one));
}

const maps = new Map();
function attentionLevels(which) {
  const layer = data.attention[state.layer], key = `${which} ${state.layer}`;
  if (!maps.has(key)) maps.set(key, bytes(layer[which]));
  return maps.get(key).subarray(state.head * scores.length, (state.head + 1) * scores.length);
}

// For a cell: its colour, and how much of the opacity it gets, from 0 to 1.
function paint() {
  if (state.view === "groups" && (state.token !== null || state.rank === null))
    return cell => [[0, 0, 0], cell === state.token || groups.of[cell] >= 0 &&
      (state.token === null || groups.of[cell] === groups.of[state.token]) ? 0 : 0.8];
  if (state.rank !== null) return cell => ranks[cell] === state.rank ? [colours[state.rank], 0.75] : [[0, 0, 0], 0.8];
  if (state.view === "subspaces") return cell => [colours[ranks[cell]], 0.9];
  if (state.view === "before" || state.view === "after") {
    const levels = attentionLevels(state.view);
    return cell => [ramp[levels[cell]], levels[cell] / 255];
  }
  if (state.view === "change") {
    const before = attentionLevels("before"), after = attentionLevels("after");
    return cell => {
      const change = (after[cell] ** 2 - before[cell] ** 2) / 255 ** 2;
      return [change < 0 ? LESS : MORE, Math.sqrt(Math.abs(change))];
    };
  }
  const values = find("percentile").checked ? percentileScores() : scores;
  return cell => [ramp[Math.round(255 * values[cell])], values[cell]];
}

function drawStep(canvas, step, paints) {
  const context = canvas.getContext("2d"), picture = context.createImageData(w, h), pixels = picture.data;
  const opacity = 255 * find("opacity").value / 100;
  for (let n = 0; n < perStep; n++) {
    const [colour, part] = paints(step * perStep + n);
    pixels[4 * n] = colour[0]; pixels[4 * n + 1] = colour[1]; pixels[4 * n + 2] = colour[2];
    pixels[4 * n + 3] = Math.round(opacity * part);
  }
  context.putImageData(picture, 0, 0);
}

// What one token stands for, outlined, and in groups of several, once a step, how many that are in the whole video.
function drawGroups(box, step) {
  const canvas = box.querySelector(".over");
  if (!canvas) return;
  const context = canvas.getContext("2d"), { width, height } = canvas, x = width / w, y = height / h;
  context.clearRect(0, 0, width, height);
  if (state.view !== "groups") return;
  const at = (row, column) => row < 0 || column < 0 || row === h || column === w ? -1 :
    groups.of[step * perStep + row * w + column];
  const path = new Path2D(), places = new Map();
  for (let row = 0; row <= h; row++) for (let column = 0; column <= w; column++) {
    const one = at(row, column);
    if (row < h && one !== at(row, column - 1)) { path.moveTo(column * x, row * y); path.lineTo(column * x, (row + 1) * y); }
    if (column < w && one !== at(row - 1, column)) { path.moveTo(column * x, row * y); path.lineTo((column + 1) * x, row * y); }
    if (one < 0 || groups.members[step * perStep + row * w + column] === 1) continue;
    if (!places.has(one)) places.set(one, []);
    places.get(one).push([row, column]);
  }
  Object.assign(context, { font: `${Math.min(x / 2.2, y / 1.3, width / 24)}px sans-serif`, textAlign: "center",
    textBaseline: "middle", lineJoin: "round" });
  for (const [colour, thick] of [["#000", 4], ["#fff", 1.5]]) {
    Object.assign(context, { strokeStyle: colour, lineWidth: thick * width / 960 });
    context.stroke(path);
  }
  Object.assign(context, { strokeStyle: "#000", fillStyle: "#fff", lineWidth: 4 * width / 960 });
  for (const cells of places.values()) {
    const mean = n => cells.reduce((sum, cell) => sum + cell[n], 0) / cells.length, middle = [mean(0), mean(1)];
    const off = cell => (cell[0] - middle[0]) ** 2 + (cell[1] - middle[1]) ** 2;
    const [row, column] = cells.reduce((best, cell) => off(cell) < off(best) ? cell : best);
    const text = groups.members[step * perStep + row * w + column], place = [(column + 0.5) * x, (row + 0.5) * y];
    context.strokeText(text, ...place);
    context.fillText(text, ...place);
  }
}
// The canvas of the outlines, finer than a pixel a token.
function addOver(box, width, frame) {
  const canvas = element("canvas", undefined, "over");
  box.append(canvas);
  fitOver(box, width, frame);
}
function fitOver(box, width, frame) {
  const canvas = box.querySelector(".over");
  if (canvas) Object.assign(canvas, { width, height: Math.round(width * frame.size[0] / frame.size[1]) });
}

// The first frame of each step; a step without one is shown by the last frame there is.
const firstFrames = Array.from({ length: nSteps }, (_, step) => {
  const found = data.frames.findIndex(one => one.step === step);
  return found < 0 ? data.frames.length - 1 : found;
});
function stepOf(frame) { return data.frames[frame].step; }
function linksOf(cell) {
  const found = [];
  for (let n = 0; links && n < data.links.each; n++) {
    const at = cell * data.links.each + n;
    if (links.cells[at] >= 0) found.push({ cell: links.cells[at], weight: links.weights[at] });
  }
  return found;
}
function mark(box, step) {
  box.querySelectorAll(".mark").forEach(one => one.remove());
  if (state.token === null) return;
  const marks = [[state.token, "mark"], ...linksOf(state.token).map(one => [one.cell, "mark link"])];
  for (const [cell, kind] of marks) {
    if (Math.floor(cell / perStep) !== step) continue;
    const made = element("span", undefined, kind), place = cell % perStep;
    Object.assign(made.style, { left: `${100 * (place % w) / w}%`, top: `${100 * Math.floor(place / w) / h}%`,
      width: `${100 / w}%`, height: `${100 / h}%` });
    box.append(made);
  }
}
function drawStage(paints = paint()) {
  drawStep(stage.canvas, stepOf(state.frame), paints);
  drawGroups(stage.box, stepOf(state.frame));
  mark(stage.box, stepOf(state.frame));
}
function drawAll() {
  const paints = paint();
  drawStage(paints);
  steps.forEach((one, step) => { drawStep(one.canvas, step, paints); drawGroups(one.box, step); mark(one.box, step); });
  for (const one of find("views").children) one.setAttribute("aria-pressed", String(one.value === state.view));
  [...find("subspaces").children].forEach((one, rank) => one.setAttribute("aria-pressed", String(rank === state.rank)));
  find("of-attention").hidden = !["before", "after", "change"].includes(state.view);
  say();
}

function percent(part) { return `${(100 * part).toFixed(1)}%`; }
function say() {
  const scale = find("scale");
  scale.replaceChildren();
  const bar = element("span", undefined, "ramp");
  const gradient = (from, ...to) => { bar.style.background = `linear-gradient(to right, ${[from, ...to].join(",")})`; };
  if (state.view === "groups" && (state.token !== null || state.rank === null)) return scale.append(
    groups.of.some(one => one < 0) ? "Outlined: tokens that were kept. Dark: tokens that were dropped." :
    "Outlined: tokens for which one stands; in groups of several the number of their tokens in the whole video.");
  if (state.rank !== null) return scale.append("Bright: the tokens of the chosen subspace.");
  if (state.view === "subspaces") return scale.append("A subspace has one colour in all frames.");
  if (state.view === "scores") {
    gradient("transparent", ...data.ramp.filter((_, n) => n % 32 === 31));
    return scale.append(find("percentile").checked ? "percentile of the score 0 " : "score 0 ", bar, " 1");
  }
  const layer = data.attention[state.layer], top = percent(layer.top[state.head]);
  find("attention-said").textContent = "text after the video looks at visual tokens: " +
    `${percent(layer.shares[0][state.head])} before the gate, ${percent(layer.shares[1][state.head])} after`;
  if (state.view === "change") {
    gradient(`rgb(${LESS})`, "transparent", `rgb(${MORE})`);
    return scale.append("less attention ", bar, ` more, by up to ${top} of a text token's; square root scale`);
  }
  gradient("transparent", ...data.ramp.filter((_, n) => n % 32 === 31));
  scale.append("attention 0 ", bar, ` ${top} of a text token's, on one token; square root scale, the same before and after`);
}

function where(cell) {
  const step = Math.floor(cell / perStep), place = cell % perStep;
  const { moment, grid } = data.frames[firstFrames[step]];  // whose own rows and columns may be fewer
  const [row, column] = [Math.floor(Math.floor(place / w) * grid[0] / h), Math.floor(place % w * grid[1] / w)];
  return `${moment}, row ${row + 1}, column ${column + 1}`;
}
function choose(cell) {
  state.token = cell;
  state.rank = ranks[cell];
  const one = data.subspaces[state.rank];
  find("token").replaceChildren(element("p", `Token at ${where(cell)}: score ${scores[cell].toFixed(3)}, ` +
    `subspace ${one.name} (${one.size} tokens, ${percent(one.share)}).` +
    (!groups ? "" : groups.of[cell] < 0 ? " It was dropped." :
      ` One token stands for it and ${groups.members[cell] - 1} others.`)));
  const found = linksOf(cell), list = element("ol");
  for (const link of found) {
    const button = element("button", `${where(link.cell)}: weight ${link.weight.toFixed(3)}`);
    button.type = "button";
    button.addEventListener("click", () => { goTo(Math.floor(link.cell / perStep)); choose(link.cell); });
    const item = element("li");
    item.append(button);
    list.append(item);
  }
  find("links").replaceChildren(...(links ? [element("p", found.length ?
    "Its strongest links: the tokens that express it" : "No token expresses it.", "quiet"), list] : []));
  drawAll();
}
function chooseSubspace(rank) {
  state.token = null;
  state.rank = state.rank === rank ? null : rank;
  const one = data.subspaces[rank];
  find("token").replaceChildren(element("p", state.rank === null ? "No subspace is chosen." :
    `Subspace ${one.name}: ${one.size} tokens, ${percent(one.share)} of all.`));
  find("links").replaceChildren();
  drawAll();
}
function release() { state.token = state.rank = null; find("token").replaceChildren(); find("links").replaceChildren();
  drawAll(); }

let shown = null;
function show(frame) {
  state.frame = Math.max(0, Math.min(frame, data.frames.length - 1));
  const one = data.frames[state.frame];
  stage.image.src = one.image;
  if (shown !== one.size.join()) {
    shown = one.size.join();
    stage.box.style.maxWidth = `calc(80vh * ${one.size[1] / one.size[0]})`;
    Object.assign(stage.image, { width: one.size[1], height: one.size[0] });
    fitOver(stage.box, 960, one);
  }
  find("frame").value = state.frame;
  find("when").textContent = `${one.moment}, frame ${state.frame + 1} of ${data.frames.length}`;
  find("frame").setAttribute("aria-valuetext", find("when").textContent);
  const now = stepOf(state.frame);
  steps.forEach((step, n) => step.button.setAttribute("aria-pressed", String(n === now)));
  drawStage();
}
function goTo(step) { show(firstFrames[step]); }
function play(go) {
  clearInterval(state.timer);
  state.timer = go ? setInterval(() => show((state.frame + 1) % data.frames.length), 250) : null;
  find("play").textContent = go ? "Pause" : "Play";
  find("play").setAttribute("aria-pressed", String(go));
}

// What is made once.
const views = [["scores", "scores"], ["subspaces", "subspaces"]];
if (groups) views.push(["groups", "merged tokens"]);
if (data.attention) views.push(["before", "attention before the gate"], ["after", "attention after the gate"],
  ["change", "change of attention"]);
for (const [value, name] of views) {
  const button = element("button", name);
  Object.assign(button, { type: "button", value });
  button.addEventListener("click", () => { state.token = state.rank = null; state.view = value; drawAll(); });
  find("views").append(button);
}
data.subspaces.forEach((one, rank) => {
  const button = element("button"), swatch = element("span", undefined, "swatch");
  button.type = "button";
  swatch.style.background = one.colour;
  button.append(swatch, `${one.name}: ${one.size}, ${percent(one.share)}`);
  button.addEventListener("click", () => chooseSubspace(rank));
  find("subspaces").append(button);
});
const steps = Array.from({ length: nSteps }, (_, step) => {
  const button = element("button"), box = element("span", undefined, "picture"), canvas = element("canvas");
  const first = data.frames[firstFrames[step]], image = element("img");
  button.type = "button";
  box.style.display = "block";
  Object.assign(image, { src: first.image, alt: "", loading: "lazy", width: first.size[1], height: first.size[0] });
  Object.assign(canvas, { width: w, height: h });
  box.append(image, canvas);
  if (groups) addOver(box, 320, first);
  button.append(box, first.moment);
  button.addEventListener("click", () => goTo(step));
  find("steps").append(button);
  return { button, box, canvas };
});
Object.assign(stage.canvas, { width: w, height: h });
if (groups) addOver(stage.box, 960, data.frames[0]);
find("frame").max = data.frames.length - 1;
for (const layer of data.attention || []) find("layer").append(element("option", layer.layer));
for (const name of data.attention ? data.attention[0].heads : []) find("head").append(element("option", name));

// What the user does.
find("layer").addEventListener("change", event => { state.layer = event.target.selectedIndex; drawAll(); });
find("head").addEventListener("change", event => { state.head = event.target.selectedIndex; drawAll(); });
find("frame").addEventListener("input", event => show(Number(event.target.value)));
find("opacity").addEventListener("input", drawAll);
find("percentile").addEventListener("change", drawAll);
find("play").addEventListener("click", () => play(state.timer === null));
stage.box.addEventListener("click", event => {
  const box = stage.canvas.getBoundingClientRect();
  const column = Math.floor(w * (event.clientX - box.left) / box.width);
  const row = Math.floor(h * (event.clientY - box.top) / box.height);
  choose(stepOf(state.frame) * perStep + Math.min(Math.max(row, 0), h - 1) * w + Math.min(Math.max(column, 0), w - 1));
});
stage.box.addEventListener("keydown", event => {
  const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!move) return;
  event.preventDefault();
  const start = stepOf(state.frame) * perStep;
  const here = state.token !== null && stepOf(state.frame) === Math.floor(state.token / perStep) ? state.token - start
    : Math.floor(h / 2) * w + Math.floor(w / 2) - move[0] * w - move[1];
  const row = Math.min(Math.max(Math.floor(here / w) + move[0], 0), h - 1);
  choose(start + row * w + Math.min(Math.max(here % w + move[1], 0), w - 1));
});
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === "Escape") release();
  else if (event.key === ",") show(state.frame - 1);
  else if (event.key === ".") show(state.frame + 1);
  else if (event.key === " " && !event.target.closest("button, input, select, summary")) {
    event.preventDefault();
    play(state.timer === null);
  }
});
show(0);
drawAll();
})();
