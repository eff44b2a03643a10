// Heat maps of layers by components, and matrices of models by models.

const LABELS = 104;

/** A control over the order of heat maps.
 * @returns {Control} */
function ofMaps(label = "Order") {
  return choose("order", label, [
    { value: "model", label: "as in the model" },
    { value: "components", label: "components by value" },
    { value: "layers", label: "layers by value" },
    { value: "both", label: "both by value" },
  ]);
}

/** Numbers of things by the mean of what is known of each; where nothing is known comes last.
 * @param {(number | null)[][]} values of each thing
 * @param {number} [direction] -1 for the largest first
 * @returns {number[]} */
function byMean(values, direction = -1) {
  const means = values.map((one) => /** @type {Value} */ (d3.mean(one) ?? null));
  return means
    .map((_, number) => number)
    .sort((one, other) => compare(means[one], means[other], direction) || one - other);
}

/**
 * The order of heat maps: one for all that are shown, so that the same place is the same cell in each.
 * @param {Data} data
 * @param {{values: (number | null)[]}[]} shown
 * @param {string} by model, components, layers or both
 * @returns {Order}
 */
function mapOrder(data, shown, by) {
  const [layers, components] = [data.layers, data.components].map((all, side) => {
    const known = all.map(() => /** @type {(number | null)[]} */ ([]));
    if (by === "both" || by === ["layers", "components"][side])
      data.cells.forEach((cell, number) => known[cell[side]].push(...shown.map((one) => one.values[number] ?? null)));
    return byMean(known);
  });
  const cells = d3.sort(
    data.cells.keys(),
    (/** @type {number} */ one) => layers.indexOf(data.cells[one][0]),
    (/** @type {number} */ one) => components.indexOf(data.cells[one][1]),
  );
  return { layers: by === "model" || by === "components" ? null : layers, components, cells };
}

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
 * @param {Order} order
 */
function heatMap(data, title, values, measure, scale, step, order) {
  const { ink } = theme();
  const rows = order.cells.flatMap((number) => {
    const [layer, component] = data.cells[number];
    const value = values[number];
    return value === null || value === undefined ? [] : [{ layer, component, value }];
  });
  const components = order.components.filter((one) => rows.some((row) => row.component === one));
  const height = 22;
  const made = picture({
    width: LABELS + step * data.layers.length + 12,
    height: height * components.length + 46,
    marginLeft: LABELS,
    marginRight: 12,
    marginTop: 6,
    marginBottom: 40,
    x: { ...layerAxis(data, step, order.layers), type: "band", padding: 0, tickSize: 3 },
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
 * @param {number[]} domain models in the order of rows and columns
 */
function matrix(names, values, measure, scale, domain) {
  const longest = Math.max(...names.map((one) => shortened(one, 18).length));
  const side = names.length > 6 ? 64 : Math.min(112, Math.max(68, 14 + 7 * longest));
  const left = 14 + 7 * longest;
  const rows = domain.flatMap((first) =>
    domain.flatMap((second) => {
      const value = values[first][second];
      return value === null ? [] : [{ first, second, value }];
    }),
  );
  const name = (/** @type {number} */ one) => shortened(names[one], 18);
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
