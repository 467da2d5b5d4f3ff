"use strict";
// Every table sorts by its headers. A form hides the rows of the table it names in data-table that
// lack its words, or whose tier is not checked. Without this script the page is whole.

const NONE = "\u2013";

function compared(a, b, words) {
  if (words) return a.localeCompare(b, "en", { numeric: true });
  return parseFloat(a.replace("*", "")) - parseFloat(b.replace("*", ""));
}

function sort(table, column, words, direction) {
  const keyed = [...table.tBodies[0].rows].map((row) => [row.cells[column].textContent.trim(), row]);
  const known = keyed.filter(([key]) => key !== NONE);
  const missing = keyed.filter(([key]) => key === NONE);
  known.sort(([a], [b]) => direction * compared(a, b, words));
  table.tBodies[0].append(...[...known, ...missing].map(([, row]) => row));
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  for (const [column, header] of headers.entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const ascending = header.ariaSort !== "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      sort(table, column, header.classList.contains("words"), ascending ? 1 : -1);
    });
  }
}

for (const form of document.querySelectorAll("form[data-table]")) {
  const table = document.getElementById(form.dataset.table);
  const rows = [...table.tBodies[0].rows];
  const tierColumn = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent.trim() === "tier");
  const boxes = [...form.querySelectorAll("[name=tier]")];
  const update = () => {
    const wanted = form.elements.words.value.trim().toLowerCase();
    const unchecked = boxes.filter((box) => !box.checked).map((box) => box.value);
    for (const row of rows) {
      const tier = tierColumn < 0 ? "" : row.cells[tierColumn].textContent.trim();
      row.hidden = unchecked.includes(tier) || !row.textContent.toLowerCase().includes(wanted);
    }
    const shown = rows.filter((row) => !row.hidden).length;
    form.querySelector("output").textContent = `${shown} of ${rows.length} shown`;
  };
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  update();
}
