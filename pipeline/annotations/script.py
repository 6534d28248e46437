"""The lines of script in a page: enlarge pictures, sort and filter a table. No word of the data.

Without script the page says and shows the same. A page with script names its hash in its policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.annotations.html import escape_text

# Pictures in buttons: see html.cell.
ZOOM = """
const large = document.createElement("dialog");
const shut = document.createElement("button");
shut.textContent = "close";
shut.addEventListener("click", () => large.close());
large.addEventListener("click", event => { if (event.target === large) large.close(); });
for (const cell of document.querySelectorAll("button.cell")) cell.addEventListener("click", () => {
  const text = document.createElement("p");
  text.textContent = cell.firstChild.alt;
  large.replaceChildren(cell.firstChild.cloneNode(), text, shut);
  large.setAttribute("aria-label", cell.firstChild.alt);
  if (!large.isConnected) document.querySelector("main").append(large);
  large.showModal();
  shut.focus();
});
"""

# The table of sortable_table. Numbers begin with the largest, texts with the first.
SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => head.firstChild.addEventListener("click", () => {
    const text = head.classList.contains("text"), before = head.getAttribute("aria-sort");
    const up = before ? before === "descending" : text;
    const value = row => text ? row.cells[at].textContent : parseFloat(row.cells[at].textContent);
    const less = (a, b) => text ? a.localeCompare(b, "en", {numeric: true})
      : (isNaN(a) - isNaN(b)) * (up ? 1 : -1) || a - b;
    rows.sort((a, b) => less(value(a), value(b)) * (up ? 1 : -1));
    body.append(...rows);
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
  }));
  const box = table.closest("section"), only = box.querySelector("select");
  const find = box.querySelector("input"), said = box.querySelector("output");
  const filter = () => {
    const words = find.value.toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const right = !only.value || row.cells[1].textContent === only.value;
      row.hidden = !right || !row.textContent.toLowerCase().includes(words);
      shown += !row.hidden;
    }
    said.textContent = shown + " of " + rows.length + " rows";
  };
  only.addEventListener("change", filter);
  find.addEventListener("input", filter);
  filter();
}
"""


def sortable_table(
    title: str, columns: Sequence[tuple[str, bool]], rows: Sequence[Sequence[str]]
) -> str:
    """A table with a search box and a choice of what the second column says; for SORT.

    `columns`: heads, and whether they are over text. Cells are text.
    """

    def mark(text: bool) -> str:
        return ' class="text"' if text else ""

    head = "".join(
        f'<th scope="col"{mark(text)}><button type="button">{escape_text(name)}</button></th>'
        for name, text in columns
    )
    body = []
    for row in rows:
        first, *rest = (
            f"{mark(text)}>{escape_text(value, 80)}"
            for value, (_, text) in zip(row, columns, strict=True)
        )
        others = "".join(f"<td{cell}</td>" for cell in rest)
        body.append(f'<tr><th scope="row"{first}</th>{others}</tr>\n')
    # As the cells say it: the script compares them.
    some = dict.fromkeys(escape_text(row[1], 80) for row in rows)
    choices = "".join(f"<option>{one}</option>" for one in some)
    return f"""<div class="filter">
<label>find <input type="search"></label>
<label>{escape_text(columns[1][0])} <select><option value="">all</option>{choices}</select></label>
<output>{len(rows):,} rows</output>
</div>
<div class="scroll tall" role="region" aria-label="{escape_text(title)}" tabindex="0">
<table class="sortable"><thead><tr>{head}</tr></thead>
<tbody>
{"".join(body)}</tbody></table></div>
"""
