// The page: its sections in order, their list, and what happens to all plots at once.

// Controls, invisible letters, marks that turn the direction of writing, and halves of characters; lines may break.
const UNSEEN =
  /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|\p{Cs}/gu;

/** A name could turn round the sentence that it stands in, or look like another: what is not seen is written out.
 * @param {string} text */
function seen(text) {
  return text.replace(UNSEEN, (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

/** @returns {Data} */
function readData() {
  const text = document.getElementById("data")?.textContent ?? "";
  return JSON.parse(text, (_, value) => (typeof value === "string" ? seen(value) : value));
}

function redrawAll() {
  hideTooltip();
  for (const one of figures) one.redraw();
}

/** @param {HTMLElement[]} sections */
function contents(sections) {
  const links = sections.map((one) =>
    element("li", {}, element("a", { href: `#${one.id}` }, one.querySelector("h2")?.textContent ?? "")),
  );
  return element("nav", { "aria-label": "Sections" }, element("ul", {}, ...links));
}

function followSize() {
  let width = innerWidth;
  let timer = 0;
  addEventListener("resize", () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      // On a phone the height changes while one scrolls; plots depend on the width alone.
      if (innerWidth !== width) redrawAll();
      width = innerWidth;
    }, 150);
  });
}

/** Paper is white, and has room for all plots. */
function followPrinting() {
  addEventListener("beforeprint", () => {
    printing = true;
    document.documentElement.classList.add("printing");
    redrawAll();
    for (const one of figures) one.draw();
  });
  addEventListener("afterprint", () => {
    printing = false;
    document.documentElement.classList.remove("printing");
    redrawAll();
  });
}

function start() {
  const data = readData();
  const made = [
    summary,
    recipe,
    composition,
    taskVectors,
    between,
    spectra,
    distributions,
    subspaces,
    health,
    vocabularies,
    tensors,
    aboutReport,
  ];
  const sections = made.map((one) => one(data)).filter((one) => one !== null);
  const heading = title(data);
  const header = element(
    "header",
    {},
    element("div", {}, element("p", { class: "quiet" }, "weightsmith report"), element("h1", {}, heading)),
    themeSwitch(redrawAll),
  );
  const main = element("main", { id: "content", tabindex: "-1" }, ...sections);
  document.body.replaceChildren(
    element("a", { class: "skip", href: "#content" }, "Skip to the content"),
    header,
    contents(sections),
    main,
    tooltip,
    aloud,
  );
  addEventListener("scroll", hideTooltip, { passive: true });
  followSize();
  followPrinting();
}

start();
