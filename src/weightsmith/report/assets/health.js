// What is wrong with models or differs between them.

const KINDS = {
  missing: "missing in the model",
  extra: "only in the model",
  shape: "another shape",
  dtype: "another dtype",
  tied: "tied or not",
};

/** @param {Data} data */
function health(data) {
  const { nonfinite, rows, differences } = data.health;
  const listed = (/** @type {(number | string)[]} */ all, /** @type {number} */ count) =>
    all.length ? all.join(", ") + (count > all.length ? " …" : "") : null;
  return section(
    "health",
    "Health",
    titled(
      "Entries that are not finite",
      "They take no part in any figure.",
      [
        ["Model", "text"],
        ["Tensor", "text"],
        ["Entries", "count"],
        ["NaN", "count"],
        ["Infinite", "count"],
      ],
      nonfinite.map((one) => [one.model, one.tensor, one.entries, one.nan, one.infinite]),
    ),
    titled(
      "Dead and duplicated rows",
      "Dead rows are zero throughout; in a table of tokens, rows of padding often are.",
      [
        ["Model", "text"],
        ["Tensor", "text"],
        ["Rows", "count"],
        ["Dead", "count"],
        ["Dead here alone", "count"],
        ["First dead", "text"],
        ["Duplicated", "count"],
        ["First duplicated (of which)", "text"],
      ],
      rows.map((one) => [
        one.model,
        one.tensor,
        one.rows,
        one.dead,
        one.new_dead,
        listed(one.first_dead, one.dead),
        one.duplicated,
        listed(
          one.first_duplicated.map(([row, of]) => `${row} (${of})`),
          one.duplicated,
        ),
      ]),
    ),
    titled(
      "Tensors that differ from the base's",
      "",
      [
        ["Model", "text"],
        ["Tensor", "text"],
        ["What differs", "text"],
        ["In the base", "text"],
        ["In the model", "text"],
      ],
      differences.map((one) => [
        one.model,
        one.tensor,
        KINDS[/** @type {keyof KINDS} */ (one.kind)] ?? one.kind,
        one.base || null,
        one.found || null,
      ]),
    ),
  );
}

/** @param {Data} data */
function vocabularies(data) {
  const known = data.models.filter((one) => one.vocabulary !== null || one.embeddingRows !== null);
  const base = data.models[0].vocabulary?.fingerprint;
  return section(
    "vocabularies",
    "Vocabularies",
    titled(
      "Tokens of each model",
      "",
      [
        ["Model", "text"],
        ["Tokens", "count"],
        ["Rows of embeddings", "count"],
        ["Fingerprint", "text"],
        ["Tokens as the base's", "text"],
      ],
      known.map((one) => [
        one.label,
        one.vocabulary?.size ?? null,
        one.embeddingRows,
        one.vocabulary?.fingerprint ?? null,
        one === data.models[0] || !base || !one.vocabulary ? null : one.vocabulary.fingerprint === base ? "yes" : "no",
      ]),
    ),
    titled(
      "Differences from the base's",
      "",
      [
        ["Model", "text"],
        ["Added", "count"],
        ["Removed", "count"],
        ["Moved to other ids", "count"],
        ["Some of them", "text"],
      ],
      data.health.tokens.map((one) => [one.model, one.added, one.removed, one.moved, one.examples.join("  ")]),
    ),
  );
}

/** @param {Data} data */
function aboutReport(data) {
  const licences = document.getElementById("licences");
  return section(
    "about",
    "About",
    element(
      "p",
      {},
      `Made by weightsmith ${data.version}. ${data.exact ? "Nothing was sampled." : "Figures not named here are over all entries."}`,
    ),
    titled(
      data.exact ? "What was chosen" : "What was sampled or chosen",
      "",
      [
        ["Statistic", "text"],
        ["Looked at", "count"],
        ["Of", "count"],
        ["Unit", "text"],
        ["Rule", "text"],
      ],
      data.sampling.map((one) => [one.statistic, one.looked_at, one.of, one.unit, one.rule]),
    ),
    titled(
      "How long it took",
      "",
      [
        ["Stage", "text"],
        ["Time", "seconds"],
        ["Read", "bytes"],
      ],
      data.timings.map((one) => [one.stage, one.seconds, one.nbytes]),
    ),
    element(
      "details",
      {},
      element("summary", {}, "Licences of the plotting code in this page"),
      element("pre", {}, licences?.textContent?.trim() ?? ""),
    ),
  );
}
