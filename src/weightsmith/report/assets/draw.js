// What all plots share: panels, legends, scales and the axis of layers.

const FONT = "system-ui, sans-serif";
// Scales around a middle reach so far at least: noise is not drawn as if it were something.
const LEAST_REACH = 0.1;

/**
 * Draw with Observable Plot in the page's own type and colours.
 * @param {{[name: string]: any}} options
 * @returns {any} the picture, with Plot's scales
 */
function picture(options) {
  const { ink } = theme();
  const made = Plot.plot({
    ...options,
    style: { background: "transparent", color: ink, fontFamily: FONT, fontSize: "12px", overflow: "visible" },
  });
  // Plot lets pictures shrink; text must stay readable, so boxes scroll instead.
  made.style.maxWidth = "none";
  return made;
}

/**
 * @param {string} title
 * @param {...Element} children
 */
function panel(title, ...children) {
  const heading = title ? element("h4", { class: "drawn" }, shortened(title, 40)) : null;
  return element("div", { class: "panel" }, heading, ...children);
}

/** @param {string} name
 * @param {number} most */
function shortened(name, most) {
  return name.length > most ? `${name.slice(0, most - 1)}…` : name;
}

/** Place of a value on one of a picture's axes: the middle of its band.
 * @param {any} made
 * @param {"x" | "y"} axis
 * @param {any} value
 * @returns {number} */
function along(made, axis, value) {
  const scale = made.scale(axis);
  return scale.apply(value) + (scale.bandwidth ?? 0) / 2;
}

/**
 * The colours of a measure over all values shown.
 * @param {Measure} measure
 * @param {(number | null)[]} values
 * @param {boolean} [log]
 * @returns {Colours}
 */
function colours(measure, values, log = false) {
  const { sequential, diverging } = theme();
  const known = /** @type {number[]} */ (values.filter((one) => one !== null));
  if (measure.pivot !== undefined) {
    const pivot = measure.pivot;
    const far = Math.max(LEAST_REACH, ...known.map((one) => Math.abs(one - pivot)));
    const reach = Math.min(measure.most ?? Infinity, Math.ceil(far * 20) / 20);
    return { type: "diverging", domain: [pivot - reach, pivot + reach], pivot, interpolate: diverging };
  }
  const most = known.reduce((one, other) => Math.max(one, other), 0) || 1;
  if (!log) return { type: "linear", domain: [0, most], interpolate: sequential };
  const positive = known.filter((one) => one > 0);
  const least = positive.reduce((one, other) => Math.min(one, other), most);
  return { type: "log", domain: [Math.min(least, most / 2), most], interpolate: sequential };
}

/** The colour of a value, as Plot draws it.
 * @param {Colours} scale
 * @param {number} value */
function colourOf(scale, value) {
  return Plot.scale({ color: scale }).apply(value);
}

/**
 * A ramp of colours with its numbers.
 * @param {Measure} measure
 * @param {Colours} scale
 */
function ramp(measure, scale) {
  const made = Plot.legend({
    color: scale,
    width: 300,
    height: 50,
    marginLeft: 20,
    marginRight: 24,
    marginTop: 8,
    marginBottom: 24,
    ticks: 4,
    tickFormat: tickFormat(measure.unit, scale.type === "log"),
    style: { fontFamily: FONT, fontSize: "12px" },
  });
  made.style.overflow = "visible";
  made.setAttribute("role", "img");
  made.setAttribute(
    "aria-label",
    `Colours from ${say(scale.domain[0], measure.unit)} to ${say(scale.domain[1], measure.unit)}`,
  );
  for (const text of made.querySelectorAll("text")) text.setAttribute("fill", theme().ink);
  return element("div", { class: "legend" }, element("span", { class: "drawn" }, measure.label), made);
}

/** @param {Unit} unit
 * @param {boolean} [log]
 * @returns {(value: number) => string} */
function tickFormat(unit, log = false) {
  return (value) => {
    // On a log axis only powers of ten are written.
    if (log && Math.abs(Math.log10(value) - Math.round(Math.log10(value))) > 1e-9) return "";
    if (unit === "share") return `${Number((100 * value).toPrecision(3))}%`;
    const size = Math.abs(value);
    const text =
      size !== 0 && (size < 1e-3 || size >= 1e5)
        ? value.toExponential().replace("e+", "e")
        : String(Number(value.toPrecision(4)));
    return text.replace("-", MINUS).replace("e-", `e${MINUS}`);
  };
}

/**
 * The legend of lines and dots.
 * @param {{name: string, style: number}[]} series
 * @param {{chance?: boolean, dots?: boolean, block?: boolean}} [marks]
 */
function key(series, marks = {}) {
  const { series: shades, quiet, ink } = theme();
  const entries = series.map(({ name, style }) => {
    const shade = shades[style % shades.length];
    const parts = marks.block
      ? [Plot.dot([0], { x: 0, y: 0, r: 7, symbol: "square", fill: shade })]
      : [
          marks.dots
            ? null
            : Plot.ruleY([0], {
                x1: -1,
                x2: 1,
                stroke: shade,
                strokeWidth: 2,
                strokeDasharray: nth(DASHES, style),
              }),
          Plot.dot([0], { x: 0, y: 0, r: 4, symbol: nth(SYMBOLS, style), fill: shade, stroke: shade }),
        ];
    return entry(parts, name);
  });
  if (marks.chance) {
    const rule = marks.dots
      ? Plot.dot([0], { x: 0, y: 0, r: 5, symbol: "plus", stroke: ink })
      : Plot.ruleY([0], { x1: -1, x2: 1, stroke: quiet, strokeWidth: 1.5, strokeDasharray: "1 3" });
    entries.push(entry([rule], "chance"));
  }
  return element("div", { class: "legend key" }, ...entries);
}

/** @param {any[]} marks
 * @param {string} name */
function entry(marks, name) {
  const sample = Plot.plot({
    width: 34,
    height: 16,
    margin: 2,
    axis: null,
    x: { domain: [-1, 1] },
    y: { domain: [-1, 1] },
    marks,
  });
  sample.setAttribute("aria-hidden", "true");
  return element("span", { class: "entry" }, sample, element("span", { class: "drawn" }, shortened(name, 40)));
}

/**
 * The axis of layers, and which of its ticks have room for a number.
 * @param {Data} data
 * @param {number} step pixels from layer to layer
 * @param {number[] | null} [order] of the layers, where it is not the model's
 */
function layerAxis(data, step, order = null) {
  const layers = data.layers;
  const every = [1, 2, 5, 10, 20, 50, 100].find((one) => one * step >= 22) ?? 200;
  const words = layers.flatMap((one, number) => (one.where === "layer" ? [] : [number]));
  // The words before and after take more room than numbers.
  const free = (/** @type {number} */ number) => words.every((one) => Math.abs(one - number) * step >= 28);
  const ticks = layers.flatMap((one, number) =>
    one.where !== "layer" || ((one.index ?? 0) % every === 0 && free(number)) ? [number] : [],
  );
  const format = (/** @type {number} */ number) => {
    const { where, index } = layers[number];
    return where === "layer" ? String(index) : where;
  };
  const many = stacks(data);
  if (order) {
    // Numbers that do not run say nothing of those between: as many stand as have room, with the stack's name if need be.
    const name = (/** @type {number} */ one) =>
      many.length > 1 && layers[one].where === "layer" ? layerName(data, one) : format(one);
    let free = -Infinity;
    const fitting = order.filter((number, place) => {
      const half = 3.5 * name(number).length + 2;
      if (place * step - half < free) return false;
      free = place * step + half;
      return true;
    });
    return { domain: order, ticks: fitting, tickFormat: name, label: "layers, by value", labelArrow: "none" };
  }
  const label = many.length > 1 ? `layers of ${many.join(", then of ")}` : "layer";
  return { domain: layers.map((_, number) => number), ticks, tickFormat: format, label, labelArrow: "none" };
}

/** Layers that a line may go through without a break: those of one stack.
 * @param {Data} data
 * @param {number} number */
function stretch(data, number) {
  const { where, stack } = data.layers[number];
  return where === "layer" ? stack : where;
}
