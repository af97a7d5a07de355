"""The report's only script: sorting and filtering of the predictions; allowed by its hash."""

import base64
import hashlib

SCRIPT = """
"use strict";
const table = document.querySelector("table.predictions");
const form = document.querySelector("form.controls");
if (table && form) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const text = (row, column) => row.cells[column].textContent;
  const filter = () => {
    const wanted = {
      1: form.key.value.toLowerCase(), 2: form.label.value,
      3: form.guess.value, 4: form.verdict.value,
    };
    let shown = 0;
    for (const row of rows) {
      const fits = text(row, 1).toLowerCase().includes(wanted[1])
        && [2, 3, 4].every((c) => !wanted[c] || text(row, c) === wanted[c]);
      row.hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = shown + " of " + rows.length + " images";
  };
  const sort = (button) => {
    const column = Number(button.dataset.column);
    const heading = button.parentElement;
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const compare = (a, b) => text(a, column).localeCompare(
      text(b, column), undefined, { numeric: true });
    rows.sort((a, b) => (down ? -1 : 1) * compare(a, b));
    body.append(...rows);
  };
  table.tHead.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) sort(button);
  });
  form.addEventListener("input", filter);
  form.addEventListener("change", filter);  // all that some browsers send of a select
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter();
}
"""

# For the page's Content-Security-Policy: this script runs, and no other.
SCRIPT_HASH = f"sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}"
