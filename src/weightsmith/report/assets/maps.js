// Heat maps of layers by components, and matrices of models by models.

const LABELS = 104;

/** How wide the cells of heat maps are, and how many maps stand side by side.
 * @param {Data} data
 * @param {number} count
 * @param {number} width */
function cellWidth(data, count, width) {
  const columns = data.layers.length;
  const across = Math.max(1, Math.min(count, Math.floor((width + 24) / (LABELS + 9 * columns + 36))));
  const room = (width + 24) / across - 24 - LABELS - 12;
  return Math.max(7, Math.min(30, room / columns));
}

/**
 * Layers by components.
 * @param {Data} data
 * @param {string} title
 * @param {(number | null)[]} values one for each cell
 * @param {Measure} measure
 * @param {Colours} scale
 * @param {number} step width of a cell
 */
function heatMap(data, title, values, measure, scale, step) {
  const { ink } = theme();
  const rows = data.cells.flatMap(([layer, component], number) =>
    values[number] === null || values[number] === undefined
      ? []
      : [{ layer, component, value: /** @type {number} */ (values[number]) }],
  );
  const components = data.components
    .map((_, number) => number)
    .filter((one) => rows.some((row) => row.component === one));
  const height = 22;
  const made = picture({
    width: LABELS + step * data.layers.length + 12,
    height: height * components.length + 46,
    marginLeft: LABELS,
    marginRight: 12,
    marginTop: 6,
    marginBottom: 40,
    x: { ...layerAxis(data, step), type: "band", padding: 0, tickSize: 3 },
    y: {
      type: "band",
      domain: components,
      padding: 0,
      label: null,
      tickSize: 0,
      tickFormat: (/** @type {number} */ one) => componentName(data.components[one]),
    },
    color: scale,
    marks: [
      Plot.cell(rows, { x: "layer", y: "component", fill: "value", inset: 0.5 }),
      // What is zero has no place on a log scale, and stands as a dot.
      scale.type === "log"
        ? Plot.dot(
            rows.filter((row) => row.value <= 0),
            { x: "layer", y: "component", r: 1.5, fill: ink },
          )
        : null,
    ],
  });
  const points = rows.map((row) => ({
    x: along(made, "x", row.layer),
    y: along(made, "y", row.component),
    width: step,
    height,
    series: String(row.component),
    said: [
      title || measure.label,
      `${layerName(data, row.layer)}, ${componentName(data.components[row.component])}`,
      `${measure.label}: ${say(row.value, measure.unit)}`,
    ],
  }));
  reachable(made, points, `${title ? `${title}: ` : ""}${measure.label}, layers by components.`);
  return panel(title, made);
}

/**
 * Models by models, with numbers.
 * @param {string[]} names
 * @param {(number | null)[][]} values
 * @param {Measure} measure
 * @param {Colours} scale
 */
function matrix(names, values, measure, scale) {
  const longest = Math.max(...names.map((one) => shortened(one, 18).length));
  const side = names.length > 6 ? 64 : Math.min(112, Math.max(68, 14 + 7 * longest));
  const left = 14 + 7 * longest;
  const rows = names.flatMap((_, first) =>
    names.flatMap((_, second) => {
      const value = values[first][second];
      return value === null ? [] : [{ first, second, value }];
    }),
  );
  const name = (/** @type {number} */ one) => shortened(names[one], 18);
  const domain = names.map((_, number) => number);
  const height = Math.min(side, 44);
  const made = picture({
    width: left + side * names.length + 8,
    height: height * names.length + 30,
    marginLeft: left,
    marginTop: 24,
    marginRight: 8,
    marginBottom: 6,
    x: {
      type: "band",
      domain,
      axis: "top",
      padding: 0,
      label: null,
      tickSize: 0,
      tickFormat: (/** @type {number} */ one) => shortened(names[one], Math.floor((side - 10) / 7)),
    },
    y: { type: "band", domain, padding: 0, label: null, tickSize: 0, tickFormat: name },
    color: scale,
    marks: [
      Plot.cell(rows, { x: "second", y: "first", fill: "value", inset: 1 }),
      Plot.text(rows, {
        x: "second",
        y: "first",
        text: (/** @type {{value: number}} */ row) =>
          measure.unit === "cosine" ? say(row.value, "cosine") : say(row.value, measure.unit, true),
        fill: (/** @type {{value: number}} */ row) => inkOn(colourOf(scale, row.value)),
      }),
    ],
  });
  const points = rows.map((row) => ({
    x: along(made, "x", row.second),
    y: along(made, "y", row.first),
    width: side,
    height,
    series: String(row.first),
    said: [`${names[row.first]} – ${names[row.second]}`, `${measure.label}: ${say(row.value, measure.unit)}`],
  }));
  reachable(made, points, `${measure.label} of each two models.`);
  return panel("", made);
}
