"use strict";
// Sorting: numbers as numbers, rows without a value last, failed rows after those.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("num");
      const now = head.getAttribute("aria-sort");
      const first = numeric ? "descending" : "ascending";
      const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const failed = (row) => row.classList.contains("failed");
      const key = (row) => row.cells[column]?.dataset.sort ?? "";
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        if (failed(a) || failed(b)) return failed(a) - failed(b);
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Filtering: what the leaderboard hides is hidden in every figure and table of the page.
const tools = document.querySelector(".tools");
const field = document.getElementById("filter");
const buttons = [...tools.querySelectorAll("button[data-group]")];
const sizes = [...tools.querySelectorAll("button[data-size]")];
const models = [...document.querySelectorAll("table.board tbody tr")];
const elsewhere = [...document.querySelectorAll("[data-row]")];
const shared = [...document.querySelectorAll("[data-rows]")];

function filter() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const pressed = (one) => one.getAttribute("aria-pressed") === "true";
  const group = buttons.find(pressed).dataset.group;
  const size = sizes.find(pressed)?.dataset.size ?? "";
  const hidden = new Set();
  let matches = 0;
  for (const row of models) {
    const text = row.dataset.find.toLowerCase();
    const match = words.every((word) => text.includes(word))
      && (group === "" || row.dataset.group === group)
      && (size === "" || row.dataset.size === size);
    const keep = "keep" in row.dataset;
    matches += match && !keep;
    if (!match && !keep) hidden.add(row.dataset.row);
  }
  for (const one of elsewhere) one.classList.toggle("out", hidden.has(one.dataset.row));
  for (const one of shared) {
    one.classList.toggle("out", one.dataset.rows.split(" ").every((row) => hidden.has(row)));
  }
  const all = models.filter((row) => !("keep" in row.dataset)).length;
  document.getElementById("shown").textContent = `${matches} of ${all} compressed models`;
  document.getElementById("nothing").hidden = matches > 0 || all === 0;
}

function press(button, among) {
  for (const one of among) one.setAttribute("aria-pressed", String(one === button));
  filter();
}

for (const among of [buttons, sizes]) {
  for (const button of among) button.addEventListener("click", () => press(button, among));
}
field.addEventListener("input", filter);
document.getElementById("reset").addEventListener("click", () => {
  field.value = "";
  if (sizes.length) press(sizes[0], sizes);
  press(buttons[0], buttons);
  field.focus();
});
tools.hidden = false;
filter();

// A link to a closed part opens it.
function reveal() {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  for (let part = target; part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
}
addEventListener("hashchange", reveal);
reveal();

// A figure is saved as it is seen: every style that the page gives it is written into the copy.
const STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity",
  "stroke-linejoin", "opacity", "color", "font-family", "font-size", "font-weight", "text-anchor", "display"];

function standalone(figure) {
  const copy = figure.cloneNode(true);
  const [from, to] = [[figure, ...figure.querySelectorAll("*")], [copy, ...copy.querySelectorAll("*")]];
  from.forEach((one, place) => {
    const style = getComputedStyle(one);
    to[place].setAttribute("style", STYLES.map((name) => `${name}:${style.getPropertyValue(name)}`).join(";"));
  });
  const box = figure.viewBox.baseVal;
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  const paper = document.createElementNS(figure.namespaceURI, "rect");
  paper.setAttribute("width", "100%");
  paper.setAttribute("height", "100%");
  paper.setAttribute("fill", getComputedStyle(document.body).backgroundColor);
  copy.prepend(paper);
  return new XMLSerializer().serializeToString(copy);
}

function save(name, address) {
  const link = document.createElement("a");
  link.download = name;
  link.href = address;
  link.click();
}

function saved(figure, name, kind) {
  const address = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(standalone(figure))}`;
  if (kind === "SVG") return save(`${name}.svg`, address);
  const picture = new Image();
  picture.addEventListener("load", () => {
    const canvas = document.createElement("canvas");
    const box = figure.viewBox.baseVal;
    [canvas.width, canvas.height] = [2 * box.width, 2 * box.height];
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    save(`${name}.png`, canvas.toDataURL("image/png"));
  });
  picture.src = address;
}

for (const figure of document.querySelectorAll("figure[data-name]")) {
  const picture = figure.querySelector("svg");
  if (!picture) continue;
  const line = document.createElement("div");
  line.className = "save";
  for (const kind of ["SVG", "PNG"]) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "plain";
    button.textContent = `Save as ${kind}`;
    button.addEventListener("click", () => saved(picture, figure.dataset.name, kind));
    line.append(button);
  }
  figure.append(line);
}
