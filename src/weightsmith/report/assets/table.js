// Tables: sorted by their heads, and of a long one only the rows in sight are in the page.

const ROW_HEIGHT = 28;
// Above this many rows a table scrolls within its own box; above that many only the rows in sight are drawn.
const TALL = 24;
const LONG = 150;

/** Columns from names, units and rows of values.
 * @param {[string, Unit?][]} heads
 * @param {Value[][]} rows
 * @returns {Table} */
function tableOf(heads, rows) {
  const columns = heads.map(([label, unit], number) => ({
    label,
    unit,
    get: (/** @type {number} */ row) => rows[row][number],
  }));
  return { columns, length: rows.length };
}

/** A column is one of words if its unit says so.
 * @param {Column} column */
function isText(column) {
  return column.unit === "text";
}

/**
 * Compare two values; what is missing comes last either way.
 * @param {Value} first
 * @param {Value} second
 * @param {number} direction
 */
function compare(first, second, direction) {
  if (first === null || second === null) return Number(first === null) - Number(second === null);
  if (typeof first === "number" && typeof second === "number") return direction * (first - second);
  return direction * String(first).localeCompare(String(second), "en", { numeric: true });
}

/**
 * A table whose heads sort it.
 * @param {string} caption
 * @param {Table} table
 * @param {{rows?: number[], sort?: {column: number, direction: number}}} [kept] what is shown; kept between drawings
 * @returns {HTMLElement}
 */
function sortable(caption, table, kept = {}) {
  const order = sorted(table, kept);
  const body = element("tbody");
  const long = order.length > LONG;
  const heads = table.columns.map((column, number) => head(column, number, kept, resort));
  const grid = element(
    "table",
    { "aria-rowcount": order.length + 1, class: long ? "long" : null },
    element("caption", { class: "unseen" }, caption),
    long ? widths(table) : null,
    element("thead", {}, element("tr", {}, ...heads)),
    body,
  );
  const box = element(
    "div",
    { class: order.length > TALL ? "scroll tall" : "scroll", tabindex: "0", role: "region", "aria-label": caption },
    grid,
  );

  /** @param {number} number */
  function resort(number) {
    const same = kept.sort?.column === number;
    const first = isText(table.columns[number]) ? 1 : -1;
    kept.sort = { column: number, direction: same ? -(kept.sort?.direction ?? 1) : first };
    const fresh = sortable(caption, table, kept);
    box.replaceWith(fresh);
    fresh.scrollLeft = box.scrollLeft;
    /** @type {HTMLElement} */ (fresh.querySelectorAll("th button")[number]).focus();
  }

  if (!long) {
    body.append(...order.map((row) => line(table, row)));
    return box;
  }
  let first = -1;
  const show = () => {
    const begin = Math.max(0, Math.floor(box.scrollTop / ROW_HEIGHT) - 10);
    // Redrawn in steps, not at every pixel.
    if (first >= 0 && Math.abs(begin - first) < 5) return;
    first = begin;
    const end = Math.min(order.length, begin + Math.ceil((box.clientHeight || 560) / ROW_HEIGHT) + 20);
    const rows = order.slice(begin, end).map((row, number) => {
      const made = line(table, row);
      made.setAttribute("aria-rowindex", String(begin + number + 2));
      return made;
    });
    body.replaceChildren(gap(begin), ...rows, gap(order.length - end));
  };
  box.addEventListener("scroll", show, { passive: true });
  show();
  return box;
}

/**
 * @param {Table} table
 * @param {{rows?: number[], sort?: {column: number, direction: number}}} kept
 * @returns {number[]}
 */
function sorted(table, kept) {
  const rows = kept.rows ?? Array.from({ length: table.length }, (_, number) => number);
  if (!kept.sort) return rows;
  const { column, direction } = kept.sort;
  const get = table.columns[column].get;
  return [...rows].sort((first, second) => compare(get(first), get(second), direction) || first - second);
}

/** Fixed widths, so that columns do not move while a long table is scrolled.
 * @param {Table} table */
function widths(table) {
  const group = element("colgroup");
  for (const column of table.columns) {
    const made = element("col");
    let most = column.label.length + 6;
    if (column.wide)
      for (let row = 0; row < table.length; row++) most = Math.max(most, 0.9 * String(column.get(row)).length + 3);
    made.style.width = `${Math.min(Math.max(most, 9), 64)}ch`;
    group.append(made);
  }
  return group;
}

/**
 * @param {Column} column
 * @param {number} number
 * @param {{sort?: {column: number, direction: number}}} kept
 * @param {(number: number) => void} resort
 */
function head(column, number, kept, resort) {
  const by = kept.sort?.column === number ? kept.sort.direction : 0;
  const unit = unitName(column.unit);
  const mark = element("span", { class: "mark", "aria-hidden": "true" }, by > 0 ? "▲" : by < 0 ? "▼" : "↕");
  const made = element(
    "th",
    {
      scope: "col",
      class: isText(column) ? "text" : null,
      "aria-sort": by > 0 ? "ascending" : by < 0 ? "descending" : "none",
    },
    element("button", { type: "button", onclick: () => resort(number) }, column.label, unit ? ` (${unit})` : "", mark),
  );
  // Long heads break into lines, but not after every word.
  const letters = column.label.length;
  made.style.minWidth = `${letters <= 16 ? letters + 2 : Math.min(24, Math.max(13, letters / 2 + 2))}ch`;
  return made;
}

/** @param {Table} table
 * @param {number} row */
function line(table, row) {
  const made = element("tr");
  for (const column of table.columns) {
    const value = column.get(row);
    const text = say(value, column.unit, true);
    const kind = isText(column) ? (text.length > 60 && text.includes(" ") ? "text sentence" : "text") : null;
    made.append(element("td", { class: kind, title: text.length > 60 ? text : null }, text));
  }
  return made;
}

/** @param {number} rows */
function gap(rows) {
  const made = element("tr", { class: "gap", "aria-hidden": "true" });
  made.style.height = `${rows * ROW_HEIGHT}px`;
  return made;
}
