// Heads of columns become buttons that sort: first ascending, then descending, unknown values last.
"use strict";

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];

  function compare(left, right, sign) {
    if (left.matches("th")) {
      return sign * left.textContent.localeCompare(right.textContent, undefined, { numeric: true });
    }
    const [a, b] = [left.dataset.value, right.dataset.value];
    if (!a || !b) return Number(!a) - Number(!b);
    return sign * (Number(a) - Number(b));
  }

  function sort(column) {
    const descending = heads[column].getAttribute("aria-sort") === "ascending";
    for (const head of heads) if (head.hasAttribute("aria-sort")) head.setAttribute("aria-sort", "none");
    heads[column].setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...body.rows];
    rows.sort((a, b) => compare(a.cells[column], b.cells[column], descending ? -1 : 1));
    body.append(...rows);
  }

  heads.forEach((head, column) => {
    if ("fixed" in head.dataset) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.onclick = () => sort(column);
    head.append(button);
    head.setAttribute("aria-sort", "none");
  });
}

document.querySelectorAll("table.sortable").forEach(sortable);
