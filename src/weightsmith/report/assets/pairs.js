// Between models: whether their task vectors go together.

/** @type {Measure[]} */
const AGREEMENTS = [
  { key: "cosine", label: "cosine of task vectors", unit: "cosine", about: "", pivot: 0, most: 1 },
  {
    key: "sameSign",
    label: "sign agreement",
    unit: "share",
    about: "share of the entries that both moved in which they have one sign",
    pivot: 0.5,
    most: 0.5,
  },
  {
    key: "conflict",
    label: "conflicting mass",
    unit: "share",
    about: "share of both task vectors' mass against the sign that the two elect",
    apart: true,
  },
  { key: "bothMoved", label: "entries that both moved", unit: "share", about: "" },
  { key: "equal", label: "entries that are equal", unit: "share", about: "" },
  { key: "distance", label: "distance of the models", unit: "norm", about: "", apart: true },
];
/** @type {Measure[]} */
const CONFLICTS = [
  { key: "share", label: "conflicting mass of all models", unit: "share", about: "" },
  { key: "contested", label: "contested entries", unit: "share", about: "" },
];

/** @type {Option[]} */
const ALIKE = [
  { value: "model", label: "as given" },
  { value: "alike", label: "most alike first" },
];

/** @param {Data} data */
function between(data) {
  if (!data.pairs.length) return null;
  return section(
    "between-models",
    "Between models",
    overall(data),
    byLayer(data),
    conflict(data),
    overlaps(data),
    overlapsByLayer(data),
  );
}

/** Figures over everything or one component.
 * @param {Data} data
 * @param {Scoped} scoped
 * @param {string | undefined} component
 * @param {string} measure
 * @param {number} subject
 * @returns {number | null} */
function figureOf(data, scoped, component, measure, subject) {
  if (component === undefined || component === "all") return scoped.total?.[measure]?.[subject]?.[0] ?? null;
  return scoped.components?.[measure]?.[subject]?.[Number(component)] ?? null;
}

/** Figures layer by layer, of all components or one.
 * @param {Data} data
 * @param {Scoped} scoped
 * @param {string | undefined} component
 * @param {string} measure
 * @param {number} subject
 * @returns {(number | null)[]} */
function layersOf(data, scoped, component, measure, subject) {
  if (component === undefined || component === "all")
    return scoped.layers?.[measure]?.[subject] ?? data.layers.map(() => null);
  /** @type {(number | null)[]} */
  const found = data.layers.map(() => null);
  data.cells.forEach(([layer, part], number) => {
    if (part === Number(component)) found[layer] = scoped.cells?.[measure]?.[subject]?.[number] ?? null;
  });
  return found;
}

/** @param {Data} data */
function overall(data) {
  const measures = present(AGREEMENTS, data.agreements, "total");
  if (!measures.length) return null;
  const names = data.inputs.map((one) => data.models[one].label);
  return figure(
    "agreement",
    "Each two models, over all layers",
    "The cosine is 1 where two task vectors point the same way, 0 where they have nothing to do with each other, −1 where one undoes the other.",
    [
      ofMeasure(measures),
      ...byComponent(data, data.agreements, "components", measures[0].key),
      ...(names.length > 2 ? [choose("order", "Order", ALIKE)] : []),
    ],
    (state) => {
      const measure = /** @type {Measure} */ (measures.find((one) => one.key === state.measure));
      const values = names.map(() => names.map(() => /** @type {number | null} */ (null)));
      data.pairs.forEach(([first, second], pair) => {
        const value = figureOf(data, data.agreements, state.component, measure.key, pair);
        const [row, column] = [data.inputs.indexOf(first), data.inputs.indexOf(second)];
        values[row][column] = value;
        values[column][row] = value;
      });
      const scale = colours(measure, values.flat());
      const own = names.map((_, number) => number);
      const order = state.order === "alike" ? byMean(values, measure.apart ? 1 : -1) : own;
      const rows = pairsIn(data, order).map(([first, second, pair]) => [
        names[first],
        names[second],
        ...measures.map((one) => figureOf(data, data.agreements, state.component, one.key, pair)),
      ]);
      const heads = measures.map((one) => /** @type {[string, Unit]} */ ([one.label, one.unit]));
      return {
        nodes: [ramp(measure, scale), matrix(names, values, measure, scale, order)],
        table: tableOf([["First", "text"], ["Second", "text"], ...heads], rows),
      };
    },
  );
}

/** The inputs of pairs and their numbers, as a matrix with that order of the inputs has them above its diagonal.
 * @param {Data} data
 * @param {number[]} order */
function pairsIn(data, order) {
  const place = (/** @type {number} */ input) => order.indexOf(input);
  return data.pairs
    .map((both, pair) => {
      const [first, second] = both
        .map((one) => data.inputs.indexOf(one))
        .sort((one, other) => place(one) - place(other));
      return [first, second, pair];
    })
    .sort((one, other) => place(one[0]) - place(other[0]) || place(one[1]) - place(other[1]));
}

/** @param {Data} data */
function byLayer(data) {
  const measures = present(AGREEMENTS, data.agreements, "layers");
  if (!measures.length) return null;
  const names = data.pairs.map((_, pair) => pairName(data, pair));
  const controls = [
    ofMeasure(measures),
    choose("view", "View", [
      { value: "lines", label: "lines" },
      { value: "maps", label: "heat maps" },
    ]),
    ...byComponent(data, data.agreements, "cells", measures[0].key),
    ofMaps("Order of heat maps"),
    ...(names.length > 1 ? [pick("pairs", "Pairs", names, 6)] : []),
  ];
  return figure(
    "agreement-by-layer",
    "Each two models, layer by layer",
    "Where lines fall, or conflicting mass rises, a merge loses most; such layers can be given other parameters by rules or schedules.",
    controls,
    (state, width) => {
      const measure = /** @type {Measure} */ (measures.find((one) => one.key === state.measure));
      const shown = names.length > 1 ? state.pairs.map(Number) : [0];
      const style = styled(names, shown);
      if (state.view === "maps") {
        const all = data.agreements.cells?.[measure.key] ?? [];
        const chosen = shown.map((/** @type {number} */ one) => ({
          name: names[one],
          values: all[one] ?? data.cells.map(() => null),
        }));
        return maps(data, chosen, measure, "shared", state.order, width);
      }
      const series = shown.map((/** @type {number} */ one) => ({
        name: names[one],
        style: style(one),
        values: layersOf(data, data.agreements, state.component, measure.key, one),
      }));
      return lineDrawing(data, series, measure, width);
    },
  );
}

/**
 * Lines with their legend and table.
 * @param {Data} data
 * @param {Series[]} series
 * @param {Measure} measure
 * @param {number} width
 * @returns {Drawn}
 */
function lineDrawing(data, series, measure, width) {
  const rows = data.layers.map((one, number) => [one.key, ...series.map((line) => line.values[number] ?? null)]);
  const table = tableOf(
    [
      ["Layer", "text"],
      ...measured(
        series.map((one) => one.name),
        measure,
      ),
    ],
    rows,
  );
  if (!series.some((one) => one.values.some((value) => value !== null))) {
    return { nodes: [element("p", { class: "quiet" }, "Nothing is chosen that has values.")], table };
  }
  const solid = series.filter((one) => !one.chance);
  return { nodes: [key(solid, { chance: solid.length < series.length }), lines(data, series, measure, width)], table };
}

/** @param {Data} data */
function conflict(data) {
  const measures = present(CONFLICTS, data.conflicts);
  if (!measures.length || data.inputs.length < 3) return null;
  return figure(
    "conflict",
    "All models together",
    "Conflicting mass is the share of all task vectors' mass against the elected sign: the sum of min(P, M) over the sum of P + M, where P adds up positive values of the models and M the sizes of negative ones (TIES, arXiv:2306.01708, without trimming); at most 50%. Contested entries are those that two or more models move, not all in one direction.",
    [ofMeasure(measures), ofMaps()],
    (state, width) => {
      const measure = /** @type {Measure} */ (measures.find((one) => one.key === state.measure));
      return maps(
        data,
        [{ name: "", values: data.conflicts.cells?.[measure.key]?.[0] ?? [] }],
        measure,
        "shared",
        state.order,
        width,
      );
    },
  );
}

/** @type {Measure} */
const OVERLAP = { key: "overlap", label: "overlap", unit: "share", about: "" };

/** @param {number} top */
function topName(top) {
  return `top ${Number((100 * top).toPrecision(3))}%`;
}

/** @param {Data} data */
function overlaps(data) {
  if (!data.overlaps.total?.overlap) return null;
  const names = data.pairs.map((_, pair) => pairName(data, pair));
  const tops = data.tops.length;
  return figure(
    "overlap",
    "Do they change the same entries?",
    "Of the entries that each of two models changed most, the share that both have in common. Crosses mark what chance would give.",
    [
      ...byComponent(data, data.overlaps, "components", "overlap"),
      ...(names.length > 1 ? [pick("pairs", "Pairs", names, 6)] : []),
    ],
    (state, width) => {
      const shown = names.length > 1 ? state.pairs.map(Number) : [0];
      const style = styled(names, shown);
      const found = data.tops.flatMap((top, number) =>
        shown.map((/** @type {number} */ pair) => ({
          row: topName(top),
          name: names[pair],
          style: style(pair),
          value: figureOf(data, data.overlaps, state.component, "overlap", pair * tops + number),
          chance: figureOf(data, data.overlaps, state.component, "chance", pair * tops + number),
        })),
      );
      return dotDrawing(found, ["Entries", "Pair"], OVERLAP, width);
    },
    sampled(data, "overlap"),
  );
}

/**
 * Dots with their legend and table.
 * @param {{row: string, name: string, style: number, value: number | null, chance: number | null}[]} found
 * @param {[string, string]} heads
 * @param {Measure} measure
 * @param {number} width
 * @returns {Drawn}
 */
function dotDrawing(found, heads, measure, width) {
  const rows = found.map((one) => [one.row, one.name, one.value, one.chance]);
  const table = tableOf(
    [
      [heads[0], "text"],
      [heads[1], "text"],
      [measure.label, measure.unit],
      ["by chance", measure.unit],
    ],
    rows,
  );
  const known = /** @type {(typeof found[0] & {value: number})[]} */ (found.filter((one) => one.value !== null));
  if (!known.length) return { nodes: [element("p", { class: "quiet" }, "Nothing is chosen that has values.")], table };
  const series = [...new Map(known.map((one) => [one.name, { name: one.name, style: one.style }])).values()];
  const chance = known.some((one) => one.chance !== null);
  return { nodes: [key(series, { chance, dots: true }), dots(known, measure, width)], table };
}

/** Lines of what chance would give: one where it is the same for all pairs.
 * @param {{name: string, values: (number | null)[]}[]} pairs
 * @returns {Series[]} */
function chances(pairs) {
  const same = pairs.every((one) => one.values.every((value, layer) => value === pairs[0].values[layer]));
  if (same) return pairs.slice(0, 1).map(({ values }) => ({ name: "chance", style: 0, values, chance: true }));
  return pairs.map(({ name, values }) => ({ name: `chance, ${name}`, style: 0, values, chance: true }));
}

/** @param {Data} data */
function overlapsByLayer(data) {
  if (!data.overlaps.layers?.overlap) return null;
  const names = data.pairs.map((_, pair) => pairName(data, pair));
  const tops = data.tops.length;
  const options = data.tops.map((top, number) => ({ value: String(number), label: topName(top) }));
  return figure(
    "overlap-by-layer",
    "The same, layer by layer",
    "",
    [
      choose("top", "Entries", options),
      ...byComponent(data, data.overlaps, "cells", "overlap"),
      ...(names.length > 1 ? [pick("pairs", "Pairs", names, 6)] : []),
    ],
    (state, width) => {
      const shown = names.length > 1 ? state.pairs.map(Number) : [0];
      const style = styled(names, shown);
      const of = (/** @type {string} */ measure, /** @type {number} */ pair) =>
        layersOf(data, data.overlaps, state.component, measure, pair * tops + Number(state.top));
      /** @type {Series[]} */
      const series = shown.map((/** @type {number} */ pair) => ({
        name: names[pair],
        style: style(pair),
        values: of("overlap", pair),
      }));
      series.push(
        ...chances(shown.map((/** @type {number} */ pair) => ({ name: names[pair], values: of("chance", pair) }))),
      );
      return lineDrawing(data, series, OVERLAP, width);
    },
    sampled(data, "overlap"),
  );
}
