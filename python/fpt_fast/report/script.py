"""The only script of our pages: sorting and filtering of a table; allowed by its hash.

A control filters the column that its ``data-column`` names.
"""

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
    const controls = Array.from(form.elements).filter((e) => e.dataset.column);
    let shown = 0;
    for (const row of rows) {
      const fits = controls.every((control) => {
        const column = Number(control.dataset.column);
        const cell = text(row, column);
        if (control.type === "search") {
          return cell.toLowerCase().includes(control.value.toLowerCase());
        }
        // A cell with several names has an element for each.
        const names = Array.from(row.cells[column].children, (name) => name.textContent);
        return !control.value || cell === control.value || names.includes(control.value);
      });
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
    // Numbers by what they are worth, signs and decimals included; names as people sort them.
    const compare = (a, b) => (a && b && !isNaN(a) && !isNaN(b)
      ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    rows.sort((a, b) => (down ? -1 : 1) * compare(text(a, column), text(b, column)));
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
