"""Style sheet of the report: one column, light, and fit for paper."""

STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --blue: 0, 114, 178; }
* { box-sizing: border-box; }
html { background: #fff; color: var(--ink); -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans",
  sans-serif; max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .25rem; font-weight: 650;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; font-weight: 650; }
p { margin: .5rem 0; max-width: 46rem; }
.lead { max-width: none; }
.lead, figcaption, .soft { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 1rem 2.75rem; margin: 1.75rem 0 0; padding: 0; }
.cards div { min-width: 6rem; }
.cards dt { color: var(--soft); font-size: .875rem; }
.cards dd { margin: 0; font-size: 1.9rem; line-height: 1.2; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.interval { display: block; color: var(--soft); font-size: .8125rem; font-weight: 400;
  line-height: 1.4; white-space: nowrap; }
.notes { border-left: 4px solid #e69f00; background: #fffbeb; padding: .6rem 1rem;
  margin: 1.5rem 0 0; }
.notes p { margin: .2rem 0; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9375rem; }
th, td { padding: .4rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; }
th:first-child { padding-left: 0; }
th[scope=row], .left { text-align: left; overflow-wrap: anywhere; }
.scroll th[scope=row], .scroll .left { min-width: 7rem; }
table.settings td { text-align: left; overflow-wrap: anywhere; }
table.settings th { color: var(--soft); font-weight: 400; white-space: nowrap; }
table.confusion td { border: 1px solid #fff; text-align: center; min-width: 3.5rem; }
table.confusion thead th { text-align: center; }
table.confusion .soft { font-weight: 400; }
figure { margin: 0 0 2rem; }
figure > img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .9375rem; margin-top: .5rem; }
.pair { display: grid; grid-auto-columns: 1fr; grid-auto-flow: column;
  gap: 1rem; }
.pair img { width: 100%; height: auto; display: block; }
.example h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }
table.runs th:first-child { min-width: 9.5rem; }
table.runs .left { min-width: 5.5rem; }
table svg.swatch { vertical-align: middle; overflow: visible; }
.right { color: #00714f; } .wrong { color: #b04a00; }
.scale { display: flex; align-items: center; gap: .6rem; font-size: .9375rem; margin: 1rem 0; }
.scale span.bar { width: 10rem; height: .7rem; background: linear-gradient(to right,
  #000004, #57106e, #bc3754, #f98e09, #fcffa4); }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.25rem; align-items: baseline;
  margin: .75rem 0; }
.controls[hidden] { display: none; }
.controls label { color: var(--soft); font-size: .9375rem; }
.controls input, .controls select { font: inherit; color: var(--ink); padding: .2rem .4rem;
  border: 1px solid #9ca3af; border-radius: .25rem; background: #fff; max-width: 14rem; }
.controls output { color: var(--soft); font-size: .9375rem; }
.predictions td.left { min-width: 6rem; }
.predictions thead th { white-space: nowrap; }
.predictions td, .predictions th { vertical-align: middle; }
.predictions tbody th { font-weight: 400; min-width: 10rem; }
.predictions thead button { font: inherit; font-weight: 600; color: inherit; background: none;
  border: 0; padding: .2rem 0; cursor: pointer; text-align: left; }
.predictions thead button:hover { text-decoration: underline; }
.predictions thead th[aria-sort=ascending] button::after { content: " ▲"; }
.predictions thead th[aria-sort=descending] button::after { content: " ▼"; }
.predictions .picture { padding: .15rem .6rem .15rem 0; width: 4.5rem; }
.predictions .picture img { display: block; width: 4rem; height: 4rem; object-fit: contain;
  background: #000; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
button:focus-visible, input:focus-visible, select:focus-visible { outline: 2px solid #0072b2;
  outline-offset: 2px; }
@media print {
  .controls { display: none; }
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  figure, tr, .cards, .notes { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
}
@media (max-width: 40rem) { body { padding: 1.25rem 1rem 3rem; } .pair { gap: .5rem; } }
"""
