// Elements and words: names come from files of strangers, so all text becomes text nodes, never markup.

/**
 * Make an element.
 * @param {string} tag
 * @param {{[name: string]: any}} [attributes] those that begin with "on" are listeners; null and false are left out
 * @param {...(Node | string | null)} children
 * @returns {HTMLElement}
 */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children) if (child !== null) made.append(child);
  return made;
}

/**
 * Turn text with `code` in it into nodes.
 * @param {string} text
 * @returns {(Node | string)[]}
 */
function prose(text) {
  return text.split("`").map((part, number) => (number % 2 === 0 ? part : element("code", {}, part)));
}

const MINUS = "\u2212";
const NONE = "\u2014";

/**
 * Write a number with so many significant digits, without an exponent where it reads well.
 * @param {number} value
 * @param {number} digits
 */
function significant(value, digits) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential(digits - 1).replace("e+", "e");
  const decimals = Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toFixed(decimals);
}

/**
 * Write a value for a person; shares become per cent.
 * @param {Value | undefined} value
 * @param {Unit | undefined} unit
 * @param {boolean} [bare] without its unit, which a head of a column says
 * @returns {string}
 */
function say(value, unit, bare = false) {
  if (value === null || value === undefined) return NONE;
  if (typeof value === "string") return value;
  return written(value, unit, bare).replace(/^-/, MINUS).replace("e-", `e${MINUS}`);
}

/**
 * @param {number} value
 * @param {Unit | undefined} unit
 * @param {boolean} bare
 */
function written(value, unit, bare) {
  switch (unit) {
    case "share": {
      const percent = 100 * value;
      const small = value !== 0 && Math.abs(percent) < 0.005;
      return (small ? percent.toExponential(1) : percent.toFixed(2)) + (bare ? "" : "\u202f%");
    }
    case "cosine":
      return value.toFixed(3).replace(/^-(0\.000)$/, "$1");
    case "count":
      return value.toLocaleString("en-US");
    case "bytes":
      return bytes(value);
    case "seconds":
      return `${value.toFixed(2)}${bare ? "" : "\u202fs"}`;
    default:
      return significant(value, 4);
  }
}

/** @param {number} value */
function bytes(value) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.max(value, 1)) / 3)));
  const unit = ["bytes", "kB", "MB", "GB", "TB"][power];
  return `${power === 0 ? value : (value / 1000 ** power).toFixed(2)}\u202f${unit}`;
}

/** What a column's head says of its numbers.
 * @param {Unit | undefined} unit */
function unitName(unit) {
  return unit === "share" ? "%" : unit === "seconds" ? "s" : "";
}

/** @param {string} name */
function componentName(name) {
  return name.replaceAll("_", " ");
}

/**
 * @param {Data} data
 * @param {number} number
 * @returns {string}
 */
function layerName(data, number) {
  const one = data.layers[number];
  if (one.where !== "layer") return one.where === "before" ? "before the layers" : "after the layers";
  return stacks(data).length > 1 ? `${one.stack} ${one.index}` : `layer ${one.index}`;
}

/** Names of all stacks of layers.
 * @param {Data} data */
function stacks(data) {
  return [...new Set(data.layers.filter((one) => one.where === "layer").map((one) => one.stack))];
}

/**
 * Write how far a statistic was sampled; empty where it was not.
 * @param {Data} data
 * @param {string} statistic
 */
function sampled(data, statistic) {
  return data.sampling
    .filter((one) => one.statistic === statistic)
    .map((one) => {
      const share = `${say(one.looked_at, "count")} of ${say(one.of, "count")} ${one.unit}`;
      return `${one.unit === "matrices" ? "Chosen" : "Sampled"}: ${share}; ${one.rule}.`;
    })
    .join(" ");
}

/** @param {Data} data
 * @param {number} pair */
function pairName(data, pair) {
  const [first, second] = data.pairs[pair];
  return `${data.models[first].label} – ${data.models[second].label}`;
}
