// What a user does on viz.html, and what is seen after each act; tests/app/test_run_page.py judges it.
const said = [], find = id => document.getElementById(id);
const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const pixel = (canvas, at) => {
  copy.clearRect(0, 0, 6, 4); copy.drawImage(canvas, 0, 0);
  return [...copy.getImageData(0, 0, 6, 4).data].slice(4 * at, 4 * at + 4);
};
const stage = find("stage").querySelector("canvas"), other = () => [...document.querySelectorAll("#steps canvas")];
const at = (row, column) => {
  const box = stage.getBoundingClientRect();
  return { bubbles: true, clientX: box.left + box.width * (column + .5) / 6,
    clientY: box.top + box.height * (row + .5) / 4 };
};
const key = (name, target = document.body) =>
  target.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const press = name => [...document.querySelectorAll("#views button")].find(one => one.textContent === name).click();
const note = (name, value) => said.push([name, value]);
note("first score", pixel(stage, 0));
note("alpha", pixel(other()[2], 22)[3]);
find("opacity").value = 0; find("opacity").dispatchEvent(new Event("input"));
note("untouched", pixel(other()[2], 22)[3]);
find("opacity").value = 100; find("opacity").dispatchEvent(new Event("input"));
find("percentile").click();
note("percentile", pixel(other()[1], 0)[3]); find("percentile").click();
note("attention hidden", getComputedStyle(find("of-attention")).display === "none");
stage.parentElement.dispatchEvent(new MouseEvent("click", at(1, 2)));
note("token", find("token").textContent);
note("links", [...find("links").querySelectorAll("button")].map(one => one.textContent));
note("marks", document.querySelectorAll("#stage .mark:not(.link)").length);
const isLit = (canvas, n) => pixel(canvas, n).slice(0, 3).some(one => one > 0);
note("lit", other().map(canvas => Array.from({ length: 24 }, (_, n) => isLit(canvas, n))));
key("ArrowRight", find("stage"));
note("moved", find("token").textContent);
key("Escape");
note("ended", document.querySelectorAll(".mark").length);
press("attention after the gate");
note("attention shown", getComputedStyle(find("of-attention")).display !== "none");
find("layer").selectedIndex = 1; find("layer").dispatchEvent(new Event("change"));
find("head").selectedIndex = 2; find("head").dispatchEvent(new Event("change"));
note("after", pixel(stage, 9)[3]);
note("share", find("attention-said").textContent);
press("attention before the gate");
note("before", pixel(stage, 9)[3]);
find("frame").value = 4; find("frame").dispatchEvent(new Event("input"));
note("when", find("when").textContent);
note("image", find("stage").querySelector("img").src === JSON.parse(find("data").textContent).frames[4].image);
key(",");
note("back", find("when").textContent);
key(" ");
note("playing", find("play").textContent); key(" ");
note("paused", find("play").textContent);
const controls = [...document.querySelectorAll("button, input, select")];
note("unnamed", controls.filter(one => !one.textContent && !(one.labels || []).length).length);
note("wide", document.documentElement.scrollWidth > innerWidth);
const left = document.createElement("pre");
Object.assign(left, { id: "said", textContent: JSON.stringify(said) });
document.body.append(left);
