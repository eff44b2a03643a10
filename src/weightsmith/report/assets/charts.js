// The other plots: lines, dots, bars and curves.

/**
 * A measure from layer to layer, a line for each model or pair; chance lines have no symbols.
 * @param {Data} data
 * @param {Series[]} series
 * @param {Measure} measure
 * @param {number} width
 */
function lines(data, series, measure, width) {
  const { series: shades, grid, quiet } = theme();
  const left = 52;
  const step = Math.min(56, Math.max(8, (Math.min(width, 1000) - left - 30) / data.layers.length));
  const rows = (/** @type {Series} */ one) =>
    one.values.map((value, layer) => ({ layer, value: value ?? NaN, part: stretch(data, layer) }));
  const known = series.flatMap((one) => one.values.filter((value) => value !== null));
  // No line goes through what stands alone, such as the layers' surroundings.
  const alone = (/** @type {ReturnType<typeof rows>} */ all) =>
    all.filter(
      (one, number) =>
        ![all[number - 1], all[number + 1]].some((other) => other?.part === one.part && !Number.isNaN(other.value)),
    );
  const marks = series.flatMap((one) => {
    const shade = one.chance ? quiet : shades[one.style % shades.length];
    const dash = one.chance ? "1 3" : nth(DASHES, one.style);
    const channels = { x: "layer", y: "value", z: "part", stroke: shade };
    return [
      Plot.line(rows(one), { ...channels, strokeWidth: 1.75, strokeDasharray: dash }),
      one.chance
        ? Plot.dot(alone(rows(one)), { ...channels, r: 3.2, symbol: "plus" })
        : Plot.dot(rows(one), {
            ...channels,
            fill: shade,
            r: step > 12 ? 3.2 : 2.4,
            symbol: nth(SYMBOLS, one.style),
            strokeWidth: 1,
          }),
    ];
  });
  const made = picture({
    ...frame(data, left, step),
    x: { ...layerAxis(data, step), type: "point", padding: 0.5 },
    y: {
      ...named(measure.label),
      nice: true,
      zero: measure.pivot === undefined || measure.pivot === 0,
      tickFormat: tickFormat(measure.unit),
      ticks: 6,
      domain: reach(known, measure),
    },
    marks: [
      Plot.gridY({ stroke: grid, strokeOpacity: 1, ticks: 6 }),
      measure.pivot === undefined ? null : Plot.ruleY([measure.pivot], { stroke: quiet }),
      ...marks,
    ],
  });
  const points = series
    .filter((one) => !one.chance)
    .flatMap((one) =>
      one.values.flatMap((value, layer) =>
        value === null
          ? []
          : [
              {
                x: along(made, "x", layer),
                y: along(made, "y", value),
                series: one.name,
                said: [one.name, layerName(data, layer), `${measure.label}: ${say(value, measure.unit)}`],
              },
            ],
      ),
    );
  reachable(made, points, `${measure.label}, layer by layer.`);
  return panel("", made);
}

/** Size and margins of a plot over the layers.
 * @param {Data} data
 * @param {number} left
 * @param {number} step */
function frame(data, left, step) {
  const width = left + step * data.layers.length + 30;
  return { width, height: 314, marginLeft: left, marginRight: 30, marginTop: 28, marginBottom: 42 };
}

/** An axis says above its end what it measures.
 * @param {string} label */
function named(label) {
  return { label, labelAnchor: "top", labelArrow: "none" };
}

/** What an axis must hold: all values, and what they are measured from.
 * @param {(number | null)[]} values
 * @param {Measure} measure */
function reach(values, measure) {
  const known = /** @type {number[]} */ (values);
  const from = measure.pivot ?? 0;
  const around = measure.pivot === undefined ? [from] : [from - LEAST_REACH, from + LEAST_REACH];
  const least = Math.min(
    ...around,
    known.reduce((one, other) => Math.min(one, other), from),
  );
  const most = Math.max(
    ...around,
    known.reduce((one, other) => Math.max(one, other), from),
  );
  return least === most ? [least, least + 1] : [least, most];
}

/**
 * Values of several rows as dots, one for each model or pair, with what chance would give.
 * @param {{row: string, name: string, style: number, value: number, chance: number | null}[]} values
 * @param {Measure} measure
 * @param {number} width
 */
function dots(values, measure, width) {
  const { series: shades, grid, ink } = theme();
  const names = [...new Set(values.map((one) => one.row))];
  const left = Math.min(190, 16 + 6.6 * Math.max(...names.map((one) => one.length)));
  const styles = [...new Set(values.map((one) => one.style))];
  const each = 9;
  const height = each * styles.length + 14;
  const rows = values.map((one) => ({ ...one, dy: (styles.indexOf(one.style) - (styles.length - 1) / 2) * each }));
  const most = Math.max(...values.map((one) => Math.max(one.value, one.chance ?? 0)));
  const marks = styles.flatMap((style) => {
    const mine = rows.filter((one) => one.style === style);
    const shade = shades[style % shades.length];
    const dy = mine[0].dy;
    return [
      Plot.ruleY(mine, { y: "row", x1: 0, x2: "value", stroke: shade, strokeOpacity: 0.35, strokeWidth: 2, dy }),
      Plot.dot(
        mine.filter((one) => one.chance !== null),
        { y: "row", x: "chance", symbol: "plus", stroke: ink, r: 3.5, dy },
      ),
      Plot.dot(mine, {
        y: "row",
        x: "value",
        symbol: nth(SYMBOLS, style),
        fill: shade,
        stroke: shade,
        r: 3.5,
        dy,
      }),
    ];
  });
  const made = picture({
    width: Math.max(340, Math.min(width, 900)),
    height: height * names.length + 58,
    marginLeft: left,
    marginRight: 24,
    marginTop: 10,
    marginBottom: 40,
    x: {
      domain: [0, measure.unit === "share" ? Math.min(1, most * 1.05) : most * 1.05],
      label: measure.label,
      labelArrow: "none",
      tickFormat: tickFormat(measure.unit),
      ticks: 5,
    },
    y: { type: "band", domain: names, label: null, padding: 0, tickSize: 0 },
    marks: [Plot.gridX({ stroke: grid, strokeOpacity: 1, ticks: 5 }), ...marks],
  });
  const points = rows.map((one) => ({
    x: along(made, "x", one.value),
    y: along(made, "y", one.row) + one.dy,
    series: one.row,
    said: [
      one.name,
      one.row,
      `${measure.label}: ${say(one.value, measure.unit)}`,
      ...(one.chance === null ? [] : [`by chance: ${say(one.chance, measure.unit)}`]),
    ],
  }));
  reachable(made, points, `${measure.label}.`);
  return panel("", made);
}

/**
 * Parts of a whole, layer by layer, on top of each other; what is negative goes down.
 * @param {Data} data
 * @param {Series[]} series
 * @param {Measure} measure
 * @param {number} width
 */
function bars(data, series, measure, width) {
  const { series: shades, grid, ink } = theme();
  const left = 56;
  const step = Math.min(56, Math.max(10, (Math.min(width, 1000) - left - 30) / data.layers.length));
  const rows = data.layers.flatMap((_, layer) => {
    let [up, down] = [0, 0];
    return series.flatMap((one) => {
      const value = one.values[layer];
      if (value === null || value === undefined) return [];
      const from = value >= 0 ? up : down;
      if (value >= 0) up += value;
      else down += value;
      return [
        {
          layer,
          value,
          low: Math.min(from, from + value),
          high: Math.max(from, from + value),
          name: one.name,
          shade: shades[one.style % shades.length],
        },
      ];
    });
  });
  const made = picture({
    ...frame(data, left, step),
    x: { ...layerAxis(data, step), type: "band", padding: 0.12 },
    y: { ...named(measure.label), tickFormat: tickFormat(measure.unit), ticks: 6, nice: true },
    marks: [
      Plot.gridY({ stroke: grid, strokeOpacity: 1, ticks: 6 }),
      Plot.barY(rows, { x: "layer", y1: "low", y2: "high", fill: "shade", inset: 0.4 }),
      Plot.ruleY([0], { stroke: ink }),
    ],
  });
  const points = rows.map((row) => ({
    x: along(made, "x", row.layer),
    y: (along(made, "y", row.low) + along(made, "y", row.high)) / 2,
    width: step,
    height: Math.max(3, Math.abs(along(made, "y", row.low) - along(made, "y", row.high))),
    series: row.name,
    said: [row.name, layerName(data, row.layer), `${measure.label}: ${say(row.value, measure.unit)}`],
  }));
  reachable(made, points, `${measure.label}, layer by layer.`);
  return panel("", made);
}

/**
 * Curves over an axis of magnitudes or numbers, both by powers.
 * @param {{name: string, style: number, at: number[], values: number[], said: string[]}[]} curves
 * @param {{width: number, x: string, y: {[name: string]: any}, step?: boolean, about: string, base?: number}} options
 */
function curves(curves, options) {
  const { series: shades, grid, quiet } = theme();
  const marks = curves.flatMap((one) => {
    const shade = shades[one.style % shades.length];
    const rows = one.at.map((x, number) => ({ x, y: one.values[number] }));
    return [
      Plot.line(rows, {
        x: "x",
        y: "y",
        stroke: shade,
        strokeWidth: 1.75,
        strokeDasharray: nth(DASHES, one.style),
        curve: options.step ? "step" : "linear",
      }),
      options.step
        ? null
        : Plot.dot(rows, {
            x: "x",
            y: "y",
            r: 2.6,
            fill: shade,
            stroke: shade,
            symbol: nth(SYMBOLS, one.style),
          }),
    ];
  });
  const made = picture({
    width: Math.max(330, Math.min(options.width, 900)),
    height: 334,
    marginLeft: 60,
    marginRight: 24,
    marginTop: 28,
    marginBottom: 42,
    x: {
      type: "log",
      label: options.x,
      labelArrow: "none",
      tickFormat: tickFormat("norm", true),
      ticks: Math.max(4, options.width / 90),
    },
    y: options.y,
    marks: [
      Plot.gridY({ stroke: grid, strokeOpacity: 1, ticks: 6 }),
      options.step ? Plot.ruleY([0], { stroke: quiet }) : null,
      ...marks,
    ],
  });
  const points = curves.flatMap((one) =>
    one.at.map((x, number) => ({
      x: along(made, "x", x),
      y: along(made, "y", one.values[number]),
      series: one.name,
      said: [one.name, one.said[number]],
    })),
  );
  reachable(made, points, options.about);
  return panel("", made);
}
