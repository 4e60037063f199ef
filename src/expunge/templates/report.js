"use strict";
// Three conveniences; the page is whole without them. Text goes in as text, never as markup.
const readout = document.querySelector(".readout");

// Shows a title and lines of a name and a value beside the pointer.
function tell(event, title, pairs) {
  const first = Object.assign(document.createElement("strong"), { textContent: title });
  const lines = pairs.map((pair) => {
    const line = document.createElement("span");
    line.append(...pair.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
    return line;
  });
  readout.replaceChildren(first, ...lines);
  readout.hidden = false;
  const size = readout.getBoundingClientRect();
  const left = event.clientX + 16 + size.width > window.innerWidth ? event.clientX - size.width - 16 : event.clientX + 16;
  readout.style.left = Math.max(4, left) + "px";
  readout.style.top = Math.max(4, Math.min(event.clientY - size.height - 8, window.innerHeight - size.height - 4)) + "px";
}

// Pointing at a chart tells the numbers of the nearest step, from the chart's own table.
for (const plot of document.querySelectorAll(".plot[data-numbers]")) {
  const table = document.querySelector("#" + plot.dataset.numbers + " table");
  const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const rows = [...table.tBodies[0].rows].filter((row) => row.dataset.at !== undefined);
  const area = plot.querySelector(".area");
  const pointed = plot.querySelector(".pointed");
  const leave = () => {
    readout.hidden = true;
    pointed.setAttribute("visibility", "hidden");
  };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const at = (100 * (event.clientX - box.left)) / box.width;
    if (at < -2 || at > 102 || rows.length === 0) return leave();
    const distance = (row) => Math.abs(Number(row.dataset.at) - at);
    const row = rows.reduce((best, one) => (distance(one) < distance(best) ? one : best));
    pointed.setAttribute("x1", row.dataset.at + "%");
    pointed.setAttribute("x2", row.dataset.at + "%");
    pointed.setAttribute("visibility", "visible");
    const pairs = [...row.cells].slice(1).map((cell, number) => [names[number + 1], cell.textContent]);
    tell(event, names[0] + " " + row.cells[0].textContent, pairs.filter((pair) => pair[1] !== ""));
  });
}

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  });
}

// On paper everything is open.
let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const one of opened) one.open = true;
});
window.addEventListener("afterprint", () => {
  for (const one of opened) one.open = false;
});
