// Single matrices and single entries: spectra, the spaces they span, and how changes are distributed.

/** Short names of matrices, by layer and component where that tells them apart.
 * @param {Data} data
 * @param {string[]} tensors
 * @returns {Map<string, string>} */
function matrixNames(data, tensors) {
  const places = new Map(data.tensors.names.map((name, number) => [name, number]));
  const short = (/** @type {string} */ tensor) => {
    const place = places.get(tensor);
    const layer = place === undefined ? null : data.tensors.layers[place];
    const component = place === undefined ? null : data.tensors.components[place];
    if (layer === null || component === null || layer === undefined || component === undefined) return tensor;
    return `${layerName(data, layer)}, ${componentName(data.components[component])}`;
  };
  const names = new Map([...new Set(tensors)].map((tensor) => [tensor, short(tensor)]));
  const seen = d3.rollup(
    [...names.values()],
    (/** @type {string[]} */ all) => all.length,
    (/** @type {string} */ one) => one,
  );
  for (const [tensor, name] of names) if (seen.get(name) > 1) names.set(tensor, shortened(tensor, 30));
  return names;
}

/** @param {Data} data */
function spectra(data) {
  if (!data.spectra.length) return null;
  return section("spectra", "Spectra", singularValues(data), ranksNeeded(data));
}

/** @param {Data} data */
function singularValues(data) {
  const names = matrixNames(
    data,
    data.spectra.map((one) => one.tensor),
  );
  const options = [...names].map(([tensor, name]) => ({ value: tensor, label: name }));
  return figure(
    "singular-values",
    "Singular values",
    "Of one task matrix for each model, the largest first; both axes are logarithmic. A steep fall means that an adapter of low rank holds most of the change.",
    [choose("tensor", "Matrix", options)],
    (state, width) => {
      const shown = data.spectra.filter((one) => one.tensor === state.tensor);
      const curved = shown.map((one) => {
        const kept = one.indices.map((_, number) => number).filter((number) => one.values[number] > 0);
        return {
          name: data.models[one.model].label,
          style: data.inputs.indexOf(one.model),
          at: kept.map((number) => one.indices[number]),
          values: kept.map((number) => one.values[number]),
          said: kept.map(
            (number) => `singular value ${say(one.indices[number], "count")}: ${say(one.values[number], "norm")}`,
          ),
        };
      });
      const rows = shown.flatMap((one) =>
        one.indices.map((index, number) => [data.models[one.model].label, index, one.values[number]]),
      );
      const table = tableOf(
        [
          ["Model", "text"],
          ["Number", "count"],
          ["Singular value", "norm"],
        ],
        rows,
      );
      if (!curved.some((one) => one.at.length))
        return { nodes: [element("p", { class: "quiet" }, "No model changed this matrix.")], table };
      const y = { ...named("singular value"), type: "log", tickFormat: tickFormat("norm", true), ticks: 6 };
      return {
        nodes: [
          key(curved),
          curves(curved, { width, x: "number of the singular value", y, about: "Singular values." }),
        ],
        table,
      };
    },
    sampled(data, "spectra"),
  );
}

/** @param {Data} data */
function ranksNeeded(data) {
  const names = matrixNames(
    data,
    data.spectra.map((one) => one.tensor),
  );
  const energies = data.spectra[0].energies;
  /** @type {[string, Unit?][]} */
  const heads = [
    ["Matrix", "text"],
    ["Model", "text"],
    ["Rows", "count"],
    ["Columns", "count"],
    ["Norm", "norm"],
    ["Effective rank", "norm"],
    ["Stable rank", "norm"],
  ];
  for (const one of energies) heads.push([`Rank for ${Number((100 * one).toPrecision(4))}%`, "count"]);
  heads.push(["Values computed", "text"]);
  const rows = data.spectra.map((one) => [
    names.get(one.tensor) ?? one.tensor,
    data.models[one.model].label,
    one.shape[0],
    one.shape[1],
    one.norm,
    one.effectiveRank,
    one.stableRank,
    ...one.ranks,
    one.exact ? "all" : `leading ${say(one.computed, "count")}`,
  ]);
  return titled(
    "What rank an extracted adapter would need",
    "Ranks hold the given share of the energy: the sum of squared singular values. The effective rank is the exponential of the entropy of the singular values (Roy and Vetterli 2007); the stable rank is the squared norm over the largest squared singular value. A dash: not known from the values computed.",
    heads,
    rows,
  );
}

/** @param {Data} data */
function subspaces(data) {
  if (!data.subspaces.length) return null;
  const names = matrixNames(
    data,
    data.subspaces.map((one) => one.tensor),
  );
  const pairs = data.pairs.map((_, pair) => pairName(data, pair));
  /** @type {Measure} */
  const measure = { key: "left", label: "overlap of subspaces", unit: "share", about: "" };
  const ranks = [...new Set(data.subspaces.map((one) => one.rank))].sort((one, other) => one - other).join(", ");
  return section(
    "subspaces",
    "Subspaces",
    figure(
      "subspace-overlap",
      "Do leading singular vectors span the same space?",
      `100% where the leading ${ranks} singular vectors of two task matrices span the same space, 0% where their spaces are orthogonal. Crosses mark what random spaces would give.`,
      [
        choose("side", "Side", [
          { value: "left", label: "left: of outputs" },
          { value: "right", label: "right: of inputs" },
        ]),
        ...(names.size > 1
          ? [
              choose("order", "Order", [
                { value: "model", label: "as in the model" },
                { value: "value", label: "matrices by value" },
              ]),
            ]
          : []),
        ...(pairs.length > 1 ? [pick("pairs", "Pairs", pairs, 6)] : []),
      ],
      (state, width) => {
        const shown = pairs.length > 1 ? state.pairs.map(Number) : [0];
        const style = styled(pairs, shown);
        const left = state.side === "left";
        const found = data.subspaces
          .filter((one) => shown.includes(one.pair))
          .map((one) => ({
            row: names.get(one.tensor) ?? one.tensor,
            name: pairs[one.pair],
            style: style(one.pair),
            value: left ? one.left : one.right,
            chance: left ? one.chanceLeft : one.chanceRight,
          }));
        const rows = [...new Set(found.map((one) => one.row))];
        const grouped = rows.map((row) => found.filter((one) => one.row === row));
        const order = byMean(grouped.map((group) => group.map((one) => one.value)));
        const listed = state.order === "value" ? order.flatMap((number) => grouped[number]) : found;
        return dotDrawing(listed, ["Matrix", "Pair"], measure, width);
      },
      sampled(data, "subspaces"),
    ),
  );
}

/** @param {Data} data */
function distributions(data) {
  const known = data.histograms;
  if (!known.length) return null;
  const parts = data.components.map((_, number) => number).filter((one) => known.some((row) => row.component === one));
  return section(
    "distribution",
    "Distribution",
    figure(
      "histogram",
      "How large single changes are",
      "Share of the entries by the size of their change, in steps of √2: entries that grew above the axis, entries that fell below it. Entries that did not change are in the table beneath.",
      [ofComponent(data, parts)],
      (state, width) => {
        const component = state.component === "all" ? null : Number(state.component);
        const shown = known.filter((one) => one.component === component);
        const curved = shown.flatMap((one) => signed(data, one));
        const rows = shown.flatMap((one) =>
          one.positive.map((share, bin) => [
            data.models[one.model].label,
            one.edges[bin],
            one.edges[bin + 1],
            share,
            one.negative[bin],
          ]),
        );
        const table = tableOf(
          [
            ["Model", "text"],
            ["Above", "norm"],
            ["Up to", "norm"],
            ["Grew", "share"],
            ["Fell", "share"],
          ],
          rows,
        );
        if (!curved.length)
          return { nodes: [element("p", { class: "quiet" }, "No model changed anything here.")], table };
        const y = {
          ...named("share of the entries"),
          tickFormat: (/** @type {number} */ value) => tickFormat("share")(Math.abs(value)),
          ticks: 6,
        };
        const keys = shown.map((one) => ({
          name: data.models[one.model].label,
          style: data.changed.indexOf(one.model),
        }));
        return {
          nodes: [
            key(keys),
            curves(curved, { width, x: "size of the change", y, step: true, about: "Distribution of changes." }),
          ],
          table,
        };
      },
      sampled(data, "histogram"),
    ),
    moments(data),
  );
}

/** The two curves of a histogram: up for what grew, down for what fell; empty bins at both ends are left out.
 * @param {Data} data
 * @param {Histogram} one */
function signed(data, one) {
  const bins = one.positive.map((_, bin) => bin).filter((bin) => one.positive[bin] + one.negative[bin] > 0);
  if (!bins.length) return [];
  const shown = d3.range(bins[0], bins[bins.length - 1] + 1);
  const middle = (/** @type {number} */ bin) =>
    Math.sqrt(one.edges[bin] * one.edges[bin + 1]) || one.edges[bin + 1] / Math.SQRT2;
  const range = (/** @type {number} */ bin) => `${say(one.edges[bin], "norm")} to ${say(one.edges[bin + 1], "norm")}`;
  const name = data.models[one.model].label;
  const style = data.changed.indexOf(one.model);
  return [
    { sign: 1, shares: one.positive, word: "grew" },
    { sign: -1, shares: one.negative, word: "fell" },
  ].map(({ sign, shares, word }) => ({
    name: `${name}, ${word}`,
    style,
    at: shown.map(middle),
    values: shown.map((/** @type {number} */ bin) => sign * shares[bin]),
    said: shown.map((/** @type {number} */ bin) => `${say(shares[bin], "share")} ${word} by ${range(bin)}`),
  }));
}

/** @param {Data} data */
function moments(data) {
  /** @type {[string, Unit?][]} */
  const heads = [
    ["Component", "text"],
    ["Model", "text"],
    ["Entries counted", "count"],
    ["Unchanged", "share"],
    ["Mean", "norm"],
    ["Deviation", "norm"],
    ["Excess kurtosis", "norm"],
  ];
  for (const top of data.histograms[0].tops) heads.push([`Reached by ${topName(top)}`, "norm"]);
  const rows = data.histograms.map((one) => [
    one.component === null ? "all" : componentName(data.components[one.component]),
    data.models[one.model].label,
    one.entries,
    one.zero,
    one.mean,
    one.deviation,
    one.kurtosis,
    ...one.quantiles,
  ]);
  return titled(
    "In numbers",
    "Excess kurtosis is 0 for a normal distribution and 3 for Laplace's: the higher it is, the more a few entries carry the change, and the better trimming does.",
    heads,
    rows,
  );
}
