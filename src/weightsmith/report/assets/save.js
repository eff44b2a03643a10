// What a person takes along: a plot as PNG, its data as CSV.

/**
 * Write a table as CSV (RFC 4180). Words that a spreadsheet would take for a formula get an apostrophe before them.
 * @param {Table} table
 * @param {number[]} [rows] which, all if not given
 */
function csv(table, rows) {
  const shown = rows ?? Array.from({ length: table.length }, (_, number) => number);
  const heads = table.columns.map((column) =>
    csvCell(column.unit === "share" ? `${column.label} (share)` : column.label),
  );
  const lines = shown.map((row) => table.columns.map((column) => csvCell(column.get(row))).join(","));
  return [heads.join(","), ...lines, ""].join("\r\n");
}

/** @param {Value | undefined} value */
function csvCell(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "number") return String(value);
  const safe = /^[\s]*[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) || safe !== value ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/**
 * Hand a file to the person.
 * @param {string} name
 * @param {Blob} content
 */
function download(name, content) {
  const address = URL.createObjectURL(content);
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/** @param {string} name
 * @param {Table} table
 * @param {number[]} [rows] */
function saveCsv(name, table, rows) {
  // The mark at the front tells spreadsheets that it is UTF-8.
  download(`${name}.csv`, new Blob(["\ufeff", csv(table, rows)], { type: "text/csv;charset=utf-8" }));
}

/**
 * Draw everything that a box shows, pictures and words, as it stands there.
 * @param {HTMLElement} box
 * @param {string} title
 * @returns {Promise<Blob>}
 */
async function png(box, title) {
  const { ink, ground } = theme();
  const scale = 2;
  const margin = 16;
  const top = 40;
  const outer = box.getBoundingClientRect();
  const ends = [...box.querySelectorAll(".drawn, svg")].map((one) => one.getBoundingClientRect().right - outer.left);
  const width = Math.max(480, ...ends) + 2 * margin;
  const height = box.scrollHeight + top + margin;
  const canvas = /** @type {HTMLCanvasElement} */ (element("canvas", { width: width * scale, height: height * scale }));
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.scale(scale, scale);
  context.fillStyle = ground;
  context.fillRect(0, 0, width, height);
  context.fillStyle = ink;
  context.font = "600 15px system-ui, sans-serif";
  context.fillText(title, margin, 26, width - 2 * margin);
  /** @param {DOMRect} place
   * @returns {[number, number]} */
  const at = (place) => [place.left - outer.left + margin, place.top - outer.top + top];
  for (const words of box.querySelectorAll(".drawn")) {
    const style = getComputedStyle(words);
    const [x, y] = at(words.getBoundingClientRect());
    context.font = `${style.fontWeight} ${style.fontSize} system-ui, sans-serif`;
    context.fillStyle = style.color;
    context.textBaseline = "top";
    context.fillText(words.textContent ?? "", x, y + 2);
  }
  for (const picture of box.querySelectorAll("svg")) {
    const place = picture.getBoundingClientRect();
    const image = await loaded(picture, place);
    context.drawImage(image, ...at(place), place.width, place.height);
  }
  return new Promise((done, failed) => {
    canvas.toBlob(
      (blob) => (blob ? done(blob) : failed(new Error("the picture is too large to be saved"))),
      "image/png",
    );
  });
}

/**
 * @param {SVGSVGElement} picture
 * @param {DOMRect} place
 * @returns {Promise<HTMLImageElement>}
 */
function loaded(picture, place) {
  const copy = /** @type {SVGSVGElement} */ (picture.cloneNode(true));
  for (const mark of copy.querySelectorAll(".cursor")) mark.remove();
  const style = getComputedStyle(picture);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", String(place.width));
  copy.setAttribute("height", String(place.height));
  copy.setAttribute("font-family", "system-ui, sans-serif");
  copy.setAttribute("font-size", style.fontSize);
  copy.style.color = style.color;
  copy.style.overflow = "visible";
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(new XMLSerializer().serializeToString(copy))}`;
  return image.decode().then(() => image);
}
