// What is compared, what to do about it, and on which figures that rests.

const LEVELS = {
  error: { mark: "✕", name: "Problem" },
  warning: { mark: "!", name: "Warning" },
  note: { mark: "i", name: "Note" },
  good: { mark: "✓", name: "Good" },
};

/**
 * A section of the page; null where there is nothing in it.
 * @param {string} id
 * @param {string} title
 * @param {...(Node | null)} children
 */
function section(id, title, ...children) {
  const shown = children.filter((one) => one !== null);
  if (!shown.length) return null;
  return element(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title` }, title),
    ...shown,
  );
}

/**
 * A table under a heading; null where it has no rows.
 * @param {string} title
 * @param {string} about
 * @param {[string, Unit?][]} heads
 * @param {Value[][]} rows
 */
function titled(title, about, heads, rows) {
  if (!rows.length) return null;
  return element(
    "div",
    { class: "block" },
    title ? element("h3", {}, title) : null,
    about ? element("p", { class: "about" }, about) : null,
    sortable(title || about, tableOf(heads, rows)),
  );
}

/** @param {Data} data */
function title(data) {
  // Where nobody named a base, the first model is an input of the merge like the others.
  const first = data.kind !== "models" && !data.baseNamed && data.inputs.length ? [0] : [];
  const names = [...first, ...data.inputs].map((one) => data.models[one].label);
  const listed = names.length > 4 ? `${names.length} models` : names.join(", ");
  const base = data.models[0].label;
  if (data.kind === "merged") return [data.merged?.path ?? "A merge", ...(listed ? [listed] : [])].join(": ");
  if (data.kind === "recipe") return `Before the merge: ${listed}`;
  return names.length ? `${listed} against ${base}` : base;
}

/** @param {Data} data */
function summary(data) {
  return section(
    "summary",
    "Summary",
    standIn(data),
    notes(data),
    findings("What to do", data.advice),
    findings("What was found", data.findings),
    compared(data),
    trainedFromBase(data),
  );
}

/** @param {Data} data */
function standIn(data) {
  if (data.baseNamed || !data.inputs.length) return null;
  const name = data.models[0].label;
  return element(
    "p",
    { class: "callout" },
    `No base was named, so ${name} stands in for it: figures say how the other models differ from ${name}, not what training changed.`,
  );
}

/** What the figures below do not cover stands before them.
 * @param {Data} data */
function notes(data) {
  if (!data.notes.length) return null;
  return element("ul", { class: "callout", id: "notes" }, ...data.notes.map((one) => element("li", {}, one)));
}

/** @param {string} heading
 * @param {Finding[]} all */
function findings(heading, all) {
  if (!all.length) return null;
  const list = element("ol", { class: "findings" }, ...all.map(finding));
  return element("div", { class: "block" }, element("h3", {}, heading), list);
}

/** @param {Finding} one */
function finding(one) {
  const { mark, name } = LEVELS[one.level];
  const { layer, component, tensor } = one.scope;
  const where = [
    ...one.models,
    ...[tensor, tensor ? null : layer, component && !tensor ? componentName(component) : null],
  ];
  const about = where.filter((part) => part !== null).join(", ");
  return element(
    "li",
    { class: `finding level-${one.level}` },
    element("span", { class: "level" }, element("span", { class: "badge", "aria-hidden": "true" }, mark), name),
    element("h4", {}, one.title),
    element("div", { class: "prose" }, ...prose(one.text)),
    one.action ? toCopy(one.action) : null,
    one.figures.length ? element("dl", { class: "figures" }, ...one.figures.map(restsOn)) : null,
    about ? element("p", { class: "quiet" }, `About ${about}`) : null,
  );
}

/** Lines of a recipe, or a command, and a button that copies them.
 * @param {string} text */
function toCopy(text) {
  const lines = element("pre", { tabindex: "0" }, text);
  const button = element("button", { type: "button", class: "copy", onclick: copy }, "Copy");
  function copy() {
    navigator.clipboard.writeText(text).then(
      () => (button.textContent = "Copied"),
      // Where the browser does not let a page do it, a person can: the lines are selected.
      () => getSelection()?.selectAllChildren(lines),
    );
  }
  return element("div", { class: "action" }, lines, "clipboard" in navigator ? button : null);
}

/** @param {Figure} one */
function restsOn(one) {
  return element("div", {}, element("dt", {}, one.name), element("dd", {}, withUnit(one)));
}

/** @param {Figure} one */
function withUnit({ value, unit }) {
  if (unit === "share") return say(value, "share");
  if (unit === "cosine") return say(value, "cosine");
  if (unit === "bytes") return say(value, "bytes");
  const whole = value !== null && Number.isInteger(value);
  const text = say(value, whole ? "count" : "norm");
  // These say what kind of number it is, not what it counts.
  return ["", "p", "ratio", "number", "rank", "z"].includes(unit) ? text : `${text} ${unit}`;
}

/** @param {Data} data */
function compared(data) {
  const rows = data.models.map((one, number) => [
    one.label,
    number === 0 ? (data.baseNamed ? "base" : "stands in for the base") : number === data.result ? "result" : "input",
    one.parameters,
    one.bytes,
    one.dtypes.map((part) => part.dtype).join(", "),
    one.tensors,
    one.layers,
    one.architectures.join(", ") || one.modelType || null,
    one.reference + (one.computed ? " (computed)" : ""),
  ]);
  /** @type {[string, Unit?][]} */
  const heads = [
    ["Model", "text"],
    ["Part", "text"],
    ["Parameters", "count"],
    ["Size", "bytes"],
    ["Dtypes", "text"],
    ["Tensors", "count"],
    ["Layers", "count"],
    ["Architecture", "text"],
    ["Named as", "text"],
  ];
  return titled("What is compared", "", heads, rows);
}

const P_VALUE =
  "p is the chance that weights which have nothing to do with the base's lie as near to them as the model's do, at most.";

/** @param {Data} data */
function trainedFromBase(data) {
  if (!data.baseTests.length) return null;
  const names = [...new Set(data.baseTests.flatMap((one) => one.figures.map((figure) => figure.name)))];
  const unit = (/** @type {string} */ name) => {
    const found = data.baseTests.flatMap((one) => one.figures).filter((figure) => figure.name === name);
    if (found[0].unit === "share" || found[0].unit === "cosine") return /** @type {Unit} */ (found[0].unit);
    return found.every(({ value }) => value === null || Number.isInteger(value)) ? "count" : "norm";
  };
  /** @type {[string, Unit?][]} */
  const heads = [
    ["Model", "text"],
    ["Trained from it", "text"],
    ["p if it were unrelated", "norm"],
    ...names.map((name) => /** @type {[string, Unit]} */ ([name, unit(name)])),
  ];
  const rows = data.baseTests.map((one) => [
    one.model,
    one.shares === null ? "not known" : one.shares ? "yes" : "no",
    one.p,
    ...names.map((name) => one.figures.find((figure) => figure.name === name)?.value ?? null),
  ]);
  return titled(`Were the models trained from ${data.models[0].label}?`, P_VALUE, heads, rows);
}
