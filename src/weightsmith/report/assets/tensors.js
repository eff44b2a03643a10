// All tensors: filtered by name and component, sorted by any column.

/** Columns of the table for what is chosen.
 * @param {Data} data
 * @param {string} measure
 * @returns {Column[]} */
function tensorColumns(data, measure) {
  const { names, components, layers, shapes, dtypes, dtypeNames } = data.tensors;
  /** @type {Column[]} */
  const columns = [
    { label: "Tensor", unit: "text", wide: true, get: (row) => names[row] },
    {
      label: "Component",
      unit: "text",
      get: (row) => (components[row] === null ? null : componentName(data.components[components[row]])),
    },
    { label: "Shape", unit: "text", get: (row) => shapes[row].join(" × ") },
    { label: "Entries", unit: "count", get: (row) => shapes[row].reduce((one, other) => one * other, 1) },
  ];
  const [kind, name] = measure.split(".");
  if (kind === "dtypes") {
    data.models.forEach((one, number) =>
      columns.push({ label: one.label, unit: "text", get: (row) => dtypeNames[dtypes[number][row]] ?? null }),
    );
  } else if (kind === "changes") {
    const unit = CHANGES.find((one) => one.key === name)?.unit;
    data.changed.forEach((one, number) =>
      columns.push({
        label: data.models[one].label,
        unit,
        get: (row) => data.changes.tensors?.[name][number][row] ?? null,
      }),
    );
  } else if (kind === "agreements") {
    const unit = AGREEMENTS.find((one) => one.key === name)?.unit;
    data.pairs.forEach((_, pair) =>
      columns.push({
        label: pairName(data, pair),
        unit,
        get: (row) => data.agreements.tensors?.[name][pair][row] ?? null,
      }),
    );
  } else {
    const found = CONFLICTS.find((one) => one.key === name);
    columns.push({
      label: found?.label ?? name,
      unit: "share",
      get: (row) => data.conflicts.tensors?.[name][0][row] ?? null,
    });
  }
  return columns;
}

/** @param {Data} data
 * @returns {Option[]} */
function tensorMeasures(data) {
  const of = (/** @type {Measure[]} */ measures, /** @type {Scoped} */ scoped, /** @type {string} */ kind) =>
    present(measures, scoped, "tensors").map((one) => ({ value: `${kind}.${one.key}`, label: one.label }));
  return [
    ...of(CHANGES, data.changes, "changes"),
    ...of(AGREEMENTS, data.agreements, "agreements"),
    ...(data.inputs.length > 2 ? of(CONFLICTS, data.conflicts, "conflicts") : []),
    { value: "dtypes.", label: "dtype" },
  ];
}

/** @param {Data} data */
function tensors(data) {
  const all = data.tensors.names;
  if (!all.length) return null;
  const filter = /** @type {HTMLInputElement} */ (
    element("input", {
      type: "search",
      id: "tensor-filter",
      placeholder: "words of the name",
      autocomplete: "off",
      spellcheck: "false",
    })
  );
  const part = /** @type {HTMLSelectElement} */ (
    element("select", { id: "tensor-component" }, element("option", { value: "" }, "all"))
  );
  data.components.forEach((one, number) =>
    part.append(element("option", { value: String(number) }, componentName(one))),
  );
  const measure = /** @type {HTMLSelectElement} */ (element("select", { id: "tensor-measure" }));
  for (const one of tensorMeasures(data)) measure.append(element("option", { value: one.value }, one.label));
  const count = element("p", { class: "note", role: "status", id: "tensor-count" });
  const place = element("div");
  /** @type {{rows?: number[], sort?: {column: number, direction: number}}} */
  const kept = {};
  const table = () => ({ columns: tensorColumns(data, measure.value), length: all.length });
  const show = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    kept.rows = all.flatMap((name, row) => {
      const fits =
        (part.value === "" || data.tensors.components[row] === Number(part.value)) &&
        words.every((one) => name.toLowerCase().includes(one));
      return fits ? [row] : [];
    });
    count.textContent = `${say(kept.rows.length, "count")} of ${say(all.length, "count")} tensors`;
    place.replaceChildren(sortable("Tensors", table(), kept));
  };
  filter.addEventListener("input", show);
  part.addEventListener("change", show);
  measure.addEventListener("change", () => {
    if (kept.sort && kept.sort.column > 3) delete kept.sort;
    show();
  });
  const save = element(
    "button",
    {
      type: "button",
      "aria-label": "Save the shown tensors as CSV",
      onclick: () => saveCsv("tensors", table(), sorted(table(), kept)),
    },
    "CSV",
  );
  show();
  return section(
    "tensors",
    "Tensors",
    element(
      "p",
      { class: "about" },
      "The tensors that the base and at least one model hold in the same shape. Heads of columns sort them.",
    ),
    element(
      "div",
      { class: "controls" },
      labelled("Name has", filter),
      labelled("Component", part),
      labelled("Measure", measure),
      element("div", { class: "actions" }, save),
    ),
    count,
    data.pairTensorsLeftOut
      ? element(
          "p",
          { class: "note" },
          "There are too many tensors for figures of pairs of models here; --json has them.",
        )
      : null,
    place,
  );
}

/** @param {string} text
 * @param {HTMLElement} field */
function labelled(text, field) {
  return element("label", { class: "control", for: field.id }, element("span", {}, text), field);
}
