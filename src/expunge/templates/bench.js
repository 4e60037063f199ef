
// The table of cells: sorted by its heads, filtered by the fields above it; points follow. Without script it is a table.
const cells = document.querySelector("table.cells");
const heads = [...cells.tHead.rows[0].cells];
const titles = heads.map((head) => head.textContent);
const lines = [...cells.tBodies[0].rows];
const form = document.querySelector("form.filters");
const fields = [...form.querySelectorAll("select")];
const search = form.querySelector("input");
const dots = [...document.querySelectorAll(".dots use")];

const collator = new Intl.Collator("en", { numeric: true });
for (const [number, head] of heads.entries()) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: titles[number] });
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const numeric = head.classList.contains("number");
    const keyed = lines.map((line) => [line, numeric ? Number.parseFloat(line.cells[number].textContent) : line.cells[number].textContent]);
    keyed.sort(([, one], [, other]) => {
      if (numeric && (Number.isNaN(one) || Number.isNaN(other))) return Number.isNaN(one) - Number.isNaN(other); // what has no number comes last
      const order = numeric ? one - other : collator.compare(one, other);
      return down ? -order : order;
    });
    cells.tBodies[0].append(...keyed.map(([line]) => line));
  });
}

function filter() {
  const wanted = fields.filter((field) => field.value !== "").map((field) => [Number(field.dataset.column), field.value]);
  const word = search.value.trim().toLowerCase();
  let count = 0;
  for (const line of lines) {
    const shown = wanted.every(([column, value]) => line.cells[column].textContent === value) && line.textContent.toLowerCase().includes(word);
    line.hidden = !shown;
    count += shown;
  }
  for (const dot of dots) dot.classList.toggle("out", lines[dot.dataset.n].hidden);
  document.querySelector(".count").textContent = count === lines.length ? count + " cells" : count + " of " + lines.length + " cells";
}
form.hidden = false;
form.addEventListener("input", filter);
form.addEventListener("reset", () => setTimeout(filter));
form.addEventListener("submit", (event) => event.preventDefault());

// A name in a leaderboard shows the cells behind it.
for (const link of document.querySelectorAll("a[data-method]")) {
  link.addEventListener("click", () => {
    form.reset();
    for (const field of fields) if (field.dataset.name in link.dataset) field.value = link.dataset[field.dataset.name];
    filter();
  });
}

// Pointing at a chart tells the numbers of the nearest cell, from the table; pressing goes to the cell's page.
const REACH = 20;
for (const plot of document.querySelectorAll(".plot[data-cells]")) {
  const area = plot.querySelector(".area");
  const points = [...plot.querySelectorAll("use")].map((use) => [use, Number.parseFloat(use.getAttribute("x")) / 100, Number.parseFloat(use.getAttribute("y")) / 100]);
  let found = null;
  const leave = () => {
    found?.classList.remove("pointed-at");
    found = null;
    readout.hidden = true;
    plot.classList.remove("found");
  };
  const near = (event) => {
    const box = area.getBoundingClientRect();
    let least = REACH;
    let first = null;
    for (const [use, x, y] of points) {
      if (use.classList.contains("out")) continue;
      const distance = Math.hypot(box.left + x * box.width - event.clientX, box.top + y * box.height - event.clientY);
      if (distance < least) [least, first] = [distance, use];
    }
    return first;
  };
  plot.addEventListener("pointerleave", leave);
  plot.addEventListener("pointermove", (event) => {
    const next = near(event);
    if (next === null) return leave();
    found?.classList.remove("pointed-at");
    found = next;
    found.classList.add("pointed-at");
    plot.classList.toggle("found", found.dataset.n !== undefined);
    if (found.dataset.role) return tell(event, found.dataset.role + " model", []);
    const line = lines[found.dataset.n];
    const pairs = [...line.cells].slice(1).map((cell, number) => [titles[number + 1], cell.textContent]);
    tell(event, line.cells[0].textContent, pairs.filter((pair) => pair[1] !== "–"));
  });
  plot.addEventListener("click", (event) => {
    const link = lines[near(event)?.dataset.n]?.querySelector("a");
    if (link) location.href = link.href;
  });
}
