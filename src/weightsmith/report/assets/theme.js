// Colours: of light and dark, and safe for eyes that do not tell all of them apart.

// Told apart by dash and symbol too; each has a contrast of 3 and more to its ground.
const LIGHT_SERIES = ["#0f62b0", "#c2410c", "#00796b", "#8e24aa", "#856400", "#c2185b", "#475569", "#5d4037"];
const DARK_SERIES = ["#6cb0ff", "#ff9d5c", "#4fd1b5", "#d79bff", "#e6c229", "#ff8fb3", "#b5bfca", "#d1a58f"];
const DASHES = ["none", "6 3", "2 2", "8 3 2 3", "1 3", "10 3", "4 4", "12 3 2 3 2 3"];
const SYMBOLS = ["circle", "triangle", "square", "diamond", "cross", "star", "wye", "times"];
// Orange against, violet along.
const LIGHT_DIVERGING = ["#8c4404", "#e08214", "#fdd09a", "#f4f4f4", "#cfcbe6", "#8073ac", "#3d1a6e"];
const DARK_DIVERGING = ["#ffc27a", "#d9851f", "#7a4a12", "#2b3036", "#4d4383", "#8f81d0", "#d6cbff"];

/** The dash or symbol of a style. Colours come round after eight, and then go with others of these.
 * @param {string[]} all
 * @param {number} style */
function nth(all, style) {
  return all[(style + Math.floor(style / all.length)) % all.length];
}

/** The style of each of those shown: its own where there are enough for all of them, else by its place.
 * @param {string[]} names all that could be shown
 * @param {number[]} shown
 * @returns {(one: number) => number} */
function styled(names, shown) {
  return (one) => (names.length > SYMBOLS.length ? shown.indexOf(one) : one);
}

/** Set while the page is printed. */
let printing = false;

/** @returns {boolean} */
function isDark() {
  if (printing) return false;
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

/** @returns {Theme} */
function theme() {
  const dark = isDark();
  const style = getComputedStyle(document.documentElement);
  const colour = (/** @type {string} */ name) => style.getPropertyValue(name).trim();
  return {
    dark,
    ink: colour("--ink"),
    quiet: colour("--quiet"),
    grid: colour("--grid"),
    ground: colour("--ground"),
    series: dark ? DARK_SERIES : LIGHT_SERIES,
    // The darkest end is left out, which a dark ground would swallow.
    sequential: (t) => d3.interpolateViridis(dark ? 0.12 + 0.88 * t : 1 - t),
    diverging: d3.interpolateRgbBasis(dark ? DARK_DIVERGING : LIGHT_DIVERGING),
  };
}

/** Black or white, whichever is read on a colour.
 * @param {string} ground */
function inkOn(ground) {
  const luminance = (/** @type {string} */ colour) => {
    const { r, g, b } = d3.rgb(colour);
    const linear = [r, g, b].map((one) => {
      const part = one / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const light = luminance(ground);
  return (1 + 0.05) / (light + 0.05) > (light + 0.05) / 0.05 ? "#ffffff" : "#000000";
}

/**
 * The switch between light, dark and what the system says.
 * @param {() => void} redraw
 */
function themeSwitch(redraw) {
  const choice = element("select", {
    id: "theme",
    onchange: () => {
      const chosen = /** @type {HTMLSelectElement} */ (choice).value;
      if (chosen === "system") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = chosen;
      redraw();
    },
  });
  for (const name of ["system", "light", "dark"]) choice.append(element("option", { value: name }, name));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  return element("label", { class: "control", for: "theme" }, element("span", {}, "Theme"), choice);
}
