// The recipe, and of a merged folder how much of each input is in it.

/** @type {Measure[]} */
const SHARES = [
  { key: "contribution", label: "share of the result's change", unit: "share", about: "" },
  { key: "coefficient", label: "coefficient", unit: "norm", about: "" },
  { key: "cosine", label: "cosine with the result's change", unit: "cosine", about: "", pivot: 0, most: 1 },
];

/** @param {Data} data */
function recipe(data) {
  const known = data.recipe;
  if (!known) return null;
  const names = [...new Set(known.inputs.flatMap((one) => Object.keys(one.parameters)))];
  /** @type {[string, Unit?][]} */
  const heads = [["Model", "text"], ...names.map((name) => /** @type {[string, Unit]} */ ([name, "text"]))];
  const facts = [
    `Method: ${known.method}`,
    known.dtype ? `written in ${known.dtype}` : "",
    known.steps.length ? `after the steps ${known.steps.join(", ")}` : "",
  ];
  return section(
    "recipe",
    "Recipe",
    element("p", {}, `${facts.filter(Boolean).join("; ")}.`),
    names.length
      ? titled(
          "Parameters of each model",
          "",
          heads,
          known.inputs.map((one) => [one.model, ...names.map((name) => one.parameters[name] ?? null)]),
        )
      : null,
    titled(
      "Parameters for all",
      "",
      [
        ["Parameter", "text"],
        ["Value", "text"],
      ],
      Object.entries(known.parameters),
    ),
    element("details", {}, element("summary", {}, "The whole recipe"), element("pre", { tabindex: "0" }, known.text)),
  );
}

/** @param {Data} data */
function composition(data) {
  const measures = present(SHARES, data.composition, "layers");
  return section(
    "composition",
    "What is in the result",
    measures.length ? shares(data, measures) : null,
    wholeResult(data),
    ...folder(data),
  );
}

/** @param {Data} data
 * @param {Measure[]} measures */
function shares(data, measures) {
  if (!data.baseNamed) return coefficients(data, measures);
  const names = data.inputs.map((one) => data.models[one].label);
  return figure(
    "composition-by-layer",
    "How much of each input is in the result",
    "The result's change is fitted by the task vectors of its inputs, layer by layer (least squares). Shares add up to what the fit explains; the rest is what the method made of it: what was trimmed, rescaled or drawn at random.",
    [ofMeasure(measures), ...byComponent(data, data.composition, "cells", measures[0].key)],
    (state, width) => {
      const measure = /** @type {Measure} */ (measures.find((one) => one.key === state.measure));
      const series = names.map((name, number) => ({
        name,
        style: number,
        values: layersOf(data, data.composition, state.component, measure.key, number),
      }));
      if (measure.key !== "contribution") return lineDrawing(data, series, measure, width);
      const explained = layersOf(data, data.explained, state.component, "rSquared", 0);
      const rest = explained.map((one) => (one === null ? null : Math.max(0, 1 - one)));
      const all = [...series, { name: "not explained", style: 6, values: rest }];
      const table = lineDrawing(data, all, measure, width).table;
      return { nodes: [key(all, { block: true }), bars(data, all, measure, width)], table };
    },
  );
}

/** Seen from the first model, shares of the change are the others' alone; but what the others do not have of a mean is
 * the first one's.
 * @param {Data} data
 * @param {Measure[]} measures */
function coefficients(data, measures) {
  const measure = measures.find((one) => one.key === "coefficient");
  if (!measure) return null;
  const names = data.inputs.map((one) => data.models[one].label);
  return figure(
    "composition-by-layer",
    "How much of each input is in the result",
    "The result is fitted by a sum of the models, layer by layer (least squares). No base was named, so the coefficients of all models add up to 1.",
    [...byComponent(data, data.composition, "cells", measure.key)],
    (state, width) => {
      const known = names.map((_, number) => layersOf(data, data.composition, state.component, measure.key, number));
      const values = [data.layers.map((_, layer) => rest(known.map((one) => one[layer]))), ...known];
      const all = [data.models[0].label, ...names];
      const series = all.map((name, number) => ({ name, style: number, values: values[number] }));
      return lineDrawing(data, series, measure, width);
    },
  );
}

/** What is missing to 1, where anything is known.
 * @param {(number | null)[]} parts
 * @returns {number | null} */
function rest(parts) {
  const known = parts.filter((one) => one !== null);
  return known.length ? known.reduce((left, one) => left - one, 1) : null;
}

/** @param {Data} data */
function wholeResult(data) {
  const total = data.composition.total ?? {};
  if (!total.coefficient) return null;
  const rows = data.inputs.map((one, number) => [
    data.models[one].label,
    ...SHARES.map((measure) => total[measure.key]?.[number]?.[0] ?? null),
  ]);
  if (!data.baseNamed) {
    const first = rest(data.inputs.map((_, number) => total.coefficient[number]?.[0] ?? null));
    rows.unshift([data.models[0].label, ...SHARES.map((one) => (one.key === "coefficient" ? first : null))]);
  }
  const explained = data.explained.total ?? {};
  const of = (/** @type {string} */ name) => explained[name]?.[0]?.[0] ?? null;
  const about = `The fit explains ${say(of("rSquared"), "share")} of the result's change, whose norm is ${say(of("norm"), "norm")}; the norm of the rest is ${say(of("residual"), "norm")}.`;
  /** @type {[string, Unit?][]} */
  const heads = [["Input", "text"], ...SHARES.map((one) => /** @type {[string, Unit]} */ ([one.label, one.unit]))];
  return titled("Over the whole model", about, heads, rows);
}

/** @param {NonNullable<Data["merged"]>["run"]} run */
function took(run) {
  if (!run) return [];
  const before = run.resumed ? `; ${run.resumed} of ${run.tensors} tensors had been written by a run before` : "";
  const threads = run.threads === 1 ? "1 thread" : `${run.threads} threads`;
  const moved = `${say(run.bytes_read, "bytes")} read, ${say(run.bytes_written, "bytes")} written`;
  return [element("p", {}, `It took ${say(run.seconds, "seconds")} with ${threads}${before}; ${moved}.`)];
}

/** @param {Data} data */
function folder(data) {
  const known = data.merged;
  if (!known) return [];
  const written = known.written ? `, ${known.written.replace("T", " ").replace("+00:00", " UTC")}` : "";
  return [
    element("p", {}, `${known.path} was written by weightsmith ${known.version} (${known.arithmetic})${written}.`),
    ...took(known.run),
    titled(
      "Files of the result",
      "",
      [
        ["File", "text"],
        ["Size", "bytes"],
      ],
      Object.entries(known.files),
    ),
    titled(
      "Files that it was made from",
      "",
      [
        ["File", "text"],
        ["Size then", "bytes"],
        ["Now", "text"],
      ],
      known.inputs.map((one) => [one.path, one.nbytes, one.state]),
    ),
  ];
}
