// Values under the pointer, and the same by arrow keys: one list of points serves both.

const SVG = "http://www.w3.org/2000/svg";
// How far from a point the pointer still means it, in pixels.
const REACH = 24;

const tooltip = element("div", { id: "tooltip", "aria-hidden": "true", hidden: true });
// What is read aloud when the keyboard moves through a plot.
const aloud = element("div", { class: "unseen", role: "status", "aria-live": "polite" });

/**
 * Show what is said of a point beside it.
 * @param {string[]} said a heading, and lines
 * @param {number} x of the window
 * @param {number} y
 */
function showTooltip(said, x, y) {
  tooltip.replaceChildren(element("strong", {}, said[0]), ...said.slice(1).map((one) => element("div", {}, one)));
  tooltip.hidden = false;
  const { width, height } = tooltip.getBoundingClientRect();
  const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
  const top = y + 16 + height > innerHeight ? y - 16 - height : y + 16;
  tooltip.style.left = `${Math.max(4, Math.min(left, innerWidth - width - 4))}px`;
  tooltip.style.top = `${Math.max(4, top)}px`;
}

function hideTooltip() {
  tooltip.hidden = true;
}

/**
 * Make the points of a plot reachable.
 * @param {SVGSVGElement} picture
 * @param {Point[]} points
 * @param {string} about what the plot shows, for those who do not see it
 */
function reachable(picture, points, about) {
  picture.setAttribute("tabindex", "0");
  picture.setAttribute("role", "application");
  picture.setAttribute("aria-roledescription", "plot");
  picture.setAttribute("aria-label", `${about} Arrow keys go from value to value.`);
  /** @type {Point | null} */
  let now = null;
  const cursor = document.createElementNS(SVG, "rect");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("visibility", "hidden");
  picture.append(cursor);

  /** @param {Point | null} point
   * @param {{x: number, y: number} | null} place */
  function go(point, place) {
    now = point;
    cursor.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return hideTooltip();
    const width = point.width ?? 14;
    const height = point.height ?? 14;
    for (const [name, value] of Object.entries({ x: point.x - width / 2, y: point.y - height / 2, width, height })) {
      cursor.setAttribute(name, String(value));
    }
    cursor.setAttribute("rx", point.width ? "1" : "7");
    const matrix = picture.getScreenCTM();
    const shown = place ?? (matrix ? new DOMPoint(point.x, point.y).matrixTransform(matrix) : { x: 0, y: 0 });
    showTooltip(point.said, shown.x, shown.y);
    if (!place) aloud.textContent = point.said.join(", ");
  }

  const pointed = (/** @type {PointerEvent} */ event) => {
    const matrix = picture.getScreenCTM();
    if (!matrix) return;
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    go(nearest(points, x, y), { x: event.clientX, y: event.clientY });
  };
  picture.addEventListener("pointermove", pointed);
  picture.addEventListener("pointerdown", pointed);
  picture.addEventListener("pointerleave", () => go(null, null));
  picture.addEventListener("blur", () => go(null, null));
  picture.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return go(null, null);
    if (!event.key.startsWith("Arrow") || event.altKey || event.ctrlKey || event.metaKey || !points.length) return;
    event.preventDefault();
    const next = now ? neighbour(points, now, event.key) : points[0];
    const matrix = picture.getScreenCTM();
    if (matrix) inSight(picture, new DOMPoint(next.x, next.y).matrixTransform(matrix).x);
    go(next, null);
  });
}

/** Scroll a plot's box until a place is in it.
 * @param {Element} picture
 * @param {number} x of the window */
function inSight(picture, x) {
  const box = picture.closest(".scroll");
  if (!box) return;
  const { left, right } = box.getBoundingClientRect();
  if (x < left + 40) box.scrollLeft -= left + 80 - x;
  if (x > right - 40) box.scrollLeft += x - right + 80;
}

/**
 * The point that a place means: the cell it is in, or the nearest within reach.
 * @param {Point[]} points
 * @param {number} x
 * @param {number} y
 * @returns {Point | null}
 */
function nearest(points, x, y) {
  let best = null;
  let least = REACH ** 2;
  for (const point of points) {
    const [across, up] = [Math.abs(point.x - x), Math.abs(point.y - y)];
    if (point.width && point.height) {
      if (across <= point.width / 2 && up <= point.height / 2) return point;
    } else if (across ** 2 + up ** 2 < least) {
      least = across ** 2 + up ** 2;
      best = point;
    }
  }
  return best;
}

/**
 * The next point in the direction of an arrow key; the same one at an edge.
 * @param {Point[]} points
 * @param {Point} now
 * @param {string} key
 */
function neighbour(points, now, key) {
  const across = key === "ArrowLeft" || key === "ArrowRight";
  const sign = key === "ArrowRight" || key === "ArrowDown" ? 1 : -1;
  let best = now;
  let least = Infinity;
  for (const point of points) {
    if (across && point.series !== now.series) continue;
    const along = sign * (across ? point.x - now.x : point.y - now.y);
    const aside = Math.abs(across ? point.y - now.y : point.x - now.x);
    const far = across ? along : along + 8 * aside;
    if (along > 0.01 && far < least) {
      least = far;
      best = point;
    }
  }
  return best;
}
