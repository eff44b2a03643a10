// A figure: what is chosen, the plot, the same as a table, and what can be saved of both.

/** All figures, for redrawing.
 * @type {{draw: () => void, redraw: () => void}[]} */
const figures = [];
// Drawn when they come near the window, so that the page opens at once.
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) if (entry.isIntersecting) entry.target.dispatchEvent(new Event("insight"));
  },
  { rootMargin: "600px" },
);

/**
 * @param {string} id also the name of its files
 * @param {string} title
 * @param {string} about what it shows and how it is read
 * @param {Control[]} controls
 * @param {(state: State, width: number) => Drawn} draw
 * @param {string} [note] how figures were sampled
 * @returns {HTMLElement}
 */
function figure(id, title, about, controls, draw, note = "") {
  /** @type {State} */
  const state = Object.fromEntries(controls.map((one) => [one.key, one.value]));
  const plots = element("div", { class: "plots" });
  const scroll = element("div", { class: "scroll" }, plots);
  const twin = element("div", { class: "twin", hidden: true });
  /** @type {Drawn | null} */
  let drawn = null;
  let kept = {};
  let stale = true;

  const asTable = element("button", { type: "button", "aria-pressed": "false", onclick: toggle }, "Show as table");
  const toPng = element("button", { type: "button", onclick: savePng }, "PNG");
  const toCsv = element("button", { type: "button", onclick: () => drawn && saveCsv(id, drawn.table) }, "CSV");
  const bar = element("div", { class: "controls" }, ...controls.map((one) => control(id, one, state, redraw)));
  bar.append(element("div", { class: "actions" }, asTable, toPng, toCsv));
  toPng.setAttribute("aria-label", `Save as PNG: ${title}`);
  toCsv.setAttribute("aria-label", `Save the data as CSV: ${title}`);
  const made = element(
    "figure",
    { id, class: "undrawn" },
    element("figcaption", {}, element("h3", {}, title), element("p", {}, about)),
    bar,
    scroll,
    twin,
    note ? element("p", { class: "note" }, note) : null,
  );

  function redraw() {
    kept = {};
    stale = true;
    if (!made.classList.contains("undrawn")) paint();
  }
  function paint() {
    if (!stale) return;
    stale = false;
    made.classList.remove("undrawn");
    hideTooltip();
    const room = Math.max(scroll.clientWidth || made.clientWidth, 280);
    plots.style.setProperty("--room", `${room}px`);
    drawn = draw(state, room);
    plots.replaceChildren(...drawn.nodes);
    if (!twin.hidden) twin.replaceChildren(sortable(title, drawn.table, kept));
  }
  function toggle() {
    paint();
    const show = twin.hidden;
    twin.hidden = !show;
    scroll.hidden = show;
    toPng.hidden = show;
    asTable.textContent = show ? "Show as plot" : "Show as table";
    asTable.setAttribute("aria-pressed", String(show));
    if (show && drawn) twin.replaceChildren(sortable(title, drawn.table, kept));
  }
  function savePng() {
    png(plots, title)
      .then((blob) => download(`${id}.png`, blob))
      .catch((/** @type {Error} */ error) => (aloud.textContent = `Not saved: ${error.message}`));
  }
  made.addEventListener("keydown", (event) => {
    const writes = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
    if (event.key !== "t" || writes || event.ctrlKey || event.metaKey || event.altKey) return;
    toggle();
    asTable.focus();
  });
  made.addEventListener("insight", () => {
    watcher.unobserve(made);
    paint();
  });
  watcher.observe(made);
  figures.push({ draw: paint, redraw });
  return made;
}

/**
 * @param {string} id
 * @param {Control} one
 * @param {State} state
 * @param {() => void} changed
 */
function control(id, one, state, changed) {
  const key = `${id}-${one.key}`;
  if (one.kind === "several") return several(key, one, state, changed);
  if (one.kind === "toggle") {
    const box = /** @type {HTMLInputElement} */ (element("input", { type: "checkbox", id: key, checked: one.value }));
    box.addEventListener("change", () => {
      state[one.key] = box.checked;
      changed();
    });
    return element("label", { class: "control check", for: key }, box, one.label);
  }
  const choice = /** @type {HTMLSelectElement} */ (element("select", { id: key }));
  for (const option of one.options ?? []) choice.append(element("option", { value: option.value }, option.label));
  choice.value = String(one.value);
  choice.addEventListener("change", () => {
    state[one.key] = choice.value;
    changed();
  });
  return element("label", { class: "control", for: key }, element("span", {}, one.label), choice);
}

/**
 * @param {string} key
 * @param {Control} one
 * @param {State} state
 * @param {() => void} changed
 */
function several(key, one, state, changed) {
  const boxes = (one.options ?? []).map((option) => {
    const checked = Array.isArray(one.value) && one.value.includes(option.value);
    const box = /** @type {HTMLInputElement} */ (element("input", { type: "checkbox", value: option.value, checked }));
    box.addEventListener("change", () => {
      state[one.key] = boxes.filter((other) => other.checked).map((other) => other.value);
      changed();
    });
    return box;
  });
  const labels = boxes.map((box, number) =>
    element("label", { class: "check" }, box, one.options?.[number].label ?? ""),
  );
  return element("fieldset", { class: "control", id: key }, element("legend", {}, one.label), ...labels);
}

/**
 * A control that chooses one of several.
 * @param {string} key
 * @param {string} label
 * @param {Option[]} options
 * @returns {Control}
 */
function choose(key, label, options) {
  return { key, label, kind: "choice", options, value: options[0].value };
}

/**
 * A control that chooses some of several; the first few are chosen.
 * @param {string} key
 * @param {string} label
 * @param {string[]} names
 * @param {number} [most]
 * @returns {Control}
 */
function pick(key, label, names, most = 8) {
  const options = names.map((name, number) => ({ value: String(number), label: name }));
  return { key, label, kind: "several", options, value: options.slice(0, most).map((one) => one.value) };
}

/** A control over everything or one component; none where there are no figures of components.
 * @param {Data} data
 * @param {Scoped} scoped
 * @param {"components" | "cells"} place
 * @param {string} measure
 * @returns {Control[]} */
function byComponent(data, scoped, place, measure) {
  return scoped[place]?.[measure]
    ? [
        ofComponent(
          data,
          data.components.map((_, number) => number),
        ),
      ]
    : [];
}

/** @param {Data} data
 * @param {number[]} shown
 * @returns {Control} */
function ofComponent(data, shown) {
  const options = shown.map((number) => ({ value: String(number), label: componentName(data.components[number]) }));
  return choose("component", "Component", [{ value: "all", label: "all" }, ...options]);
}

/** @param {Measure[]} measures
 * @returns {Control} */
function ofMeasure(measures) {
  return choose(
    "measure",
    "Measure",
    measures.map((one) => ({ value: one.key, label: one.label })),
  );
}
