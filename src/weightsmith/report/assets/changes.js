// Task vectors: how far each model is from the base, and where.

/** @type {Measure[]} */
const CHANGES = [
  { key: "relative", label: "relative norm", unit: "share", about: "norm of the task vector over that of the base" },
  { key: "norm", label: "norm of the task vector", unit: "norm", about: "" },
  { key: "changed", label: "share of entries changed", unit: "share", about: "" },
  { key: "largest", label: "largest change of an entry", unit: "norm", about: "" },
  {
    key: "against",
    label: "mass against the elected sign",
    unit: "share",
    about: "share of a task vector's mass that TIES would drop, untrimmed",
  },
  { key: "deltaCosineBase", label: "cosine of task vector and base", unit: "cosine", about: "", pivot: 0, most: 1 },
];

/** Measures that there are values of.
 * @param {Measure[]} measures
 * @param {Scoped} scoped
 * @param {Places} [place] */
function present(measures, scoped, place = "cells") {
  return measures.filter((one) => scoped[place]?.[one.key]);
}

/** @param {Data} data */
function taskVectors(data) {
  const measures = present(CHANGES, data.changes);
  if (!measures.length) return null;
  return section("task-vectors", "Task vectors", byCell(data, measures), perModel(data));
}

/**
 * @param {Data} data
 * @param {Measure[]} measures
 */
function byCell(data, measures) {
  const names = data.changed.map((one) => data.models[one].label);
  const controls = [
    ofMeasure(measures),
    choose("scale", "Colours", [
      { value: "shared", label: "one scale for all" },
      { value: "own", label: "a scale for each" },
      { value: "log", label: "one scale, logarithmic" },
    ]),
    ofMaps(),
    ...(names.length > 1 ? [pick("models", "Models", names)] : []),
  ];
  return figure(
    "task-vectors-by-layer",
    "Where each model changed",
    "Layers from left to right, components from top to bottom; one map for each model.",
    controls,
    (state, width) => {
      const measure = /** @type {Measure} */ (measures.find((one) => one.key === state.measure));
      const all = data.changes.cells?.[measure.key] ?? [];
      const shown = names.length > 1 ? state.models.map(Number) : [0];
      return maps(
        data,
        shown.map((/** @type {number} */ one) => ({ name: names[one], values: all[one] })),
        measure,
        state.scale,
        state.order,
        width,
      );
    },
  );
}

/**
 * Heat maps side by side, with their table.
 * @param {Data} data
 * @param {{name: string, values: (number | null)[]}[]} shown
 * @param {Measure} measure
 * @param {string} kind of scale: shared, own or log
 * @param {string} by what they are ordered
 * @param {number} width
 * @returns {Drawn}
 */
function maps(data, shown, measure, kind, by, width) {
  const order = mapOrder(data, shown, by);
  const table = cellTable(data, shown, measure, order);
  const known = shown.filter((one) => one.values.some((value) => value !== null));
  if (!known.length) return { nodes: [element("p", { class: "quiet" }, "Nothing is chosen that has values.")], table };
  const step = cellWidth(data, known.length, width);
  const shared = colours(
    measure,
    known.flatMap((one) => one.values),
    kind === "log",
  );
  const panels = known.map(({ name, values }) => {
    const scale = kind === "own" ? colours(measure, values) : shared;
    const made = heatMap(data, name, values, measure, scale, step, order);
    if (kind === "own") made.append(ramp(measure, scale));
    return made;
  });
  const legend = kind === "own" ? [] : [ramp(measure, shared)];
  return { nodes: [...legend, element("div", { class: "panels" }, ...panels)], table };
}

/**
 * @param {Data} data
 * @param {{name: string, values: (number | null)[]}[]} shown
 * @param {Measure} measure
 * @param {Order} order
 */
function cellTable(data, shown, measure, order) {
  const rows = order.cells.map((number) => [
    data.layers[data.cells[number][0]].key,
    componentName(data.components[data.cells[number][1]]),
    ...shown.map((one) => one.values[number] ?? null),
  ]);
  return tableOf(
    [
      ["Layer", "text"],
      ["Component", "text"],
      ...measured(
        shown.map((one) => one.name),
        measure,
      ),
    ],
    rows,
  );
}

/** Heads of columns of one measure.
 * @param {string[]} names
 * @param {Measure} measure
 * @returns {[string, Unit][]} */
function measured(names, measure) {
  return names.map((name) => [name || measure.label, measure.unit]);
}

/** @param {Data} data */
function perModel(data) {
  const total = data.changes.total ?? {};
  const names = data.changed.map((one) => data.models[one].label);
  const measures = [...present(CHANGES, data.changes, "total")];
  /** @type {[string, Unit?][]} */
  const heads = [["Model", "text"], ...measures.map((one) => /** @type {[string, Unit]} */ ([one.label, one.unit]))];
  const rows = names.map((name, number) => [name, ...measures.map((one) => total[one.key][number][0])]);
  return titled("Over the whole model", "", heads, rows);
}
