// What keeps people from using the page as it is shown now: a list of texts,
// empty when all is well. Evaluated by `Browser::assert_usable`.
(() => {
  const found = [];
  const about = (node) => `<${node.tagName.toLowerCase()}> ${JSON.stringify((node.textContent ?? "").trim().slice(0, 60))}`;
  const complain = (node, what) => found.push(`${about(node)} ${what}`);
  const isShown = (node) => node.checkVisibility({ visibilityProperty: true }) && !node.closest(".unseen, .skip:not(:focus)")
    // On a narrow screen, a table's head is only read aloud.
    && !(node.closest("thead") && getComputedStyle(node.closest("thead")).position === "absolute");
  const dialog = document.querySelector("dialog[open]");
  const root = dialog ?? document.body;
  const all = [...root.querySelectorAll("*")].filter(isShown);

  // Nothing is cut off, and nobody has to scroll sideways.
  if (document.documentElement.scrollWidth > innerWidth) {
    found.push(`the page is ${document.documentElement.scrollWidth} wide in a window of ${innerWidth}`);
  }
  for (const node of all) {
    const box = node.getBoundingClientRect();
    if (box.width > 0 && (box.right > innerWidth + 0.5 || box.left < -0.5)) complain(node, "reaches out of the window");
  }

  // One first heading, and no level left out.
  const headings = [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].filter(isShown);
  const levels = headings.map((node) => Number(node.tagName[1]));
  if (!dialog && levels.filter((level) => level === 1).length !== 1) found.push("there is not one h1");
  levels.forEach((level, at) => {
    if (at > 0 && level > levels[at - 1] + 1) complain(headings[at], `follows a heading of level ${levels[at - 1]}`);
  });
  for (const tag of ["header", "main", "footer"]) {
    if (document.querySelectorAll(`body > ${tag}`).length !== 1) found.push(`there is not one ${tag}`);
  }
  if (!document.documentElement.lang) found.push("the page's language is not said");

  // What is referred to is there, once.
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of ids.filter((id, at) => ids.indexOf(id) !== at)) found.push(`the id ${id} is there twice`);
  for (const name of ["aria-labelledby", "aria-describedby", "for"]) {
    for (const node of document.querySelectorAll(`[${name}]`)) {
      for (const id of node.getAttribute(name).split(" ")) {
        if (!ids.includes(id)) complain(node, `refers by ${name} to ${id}, which is not there`);
      }
    }
  }
  for (const node of all.filter((node) => node.matches("table"))) {
    if (!node.caption?.textContent) complain(node, "has no caption");
    if (node.querySelectorAll("thead th:not([scope])").length > 0) complain(node, "has a header without scope");
  }

  // Controls can be hit (WCAG 2.2: 24 px).
  for (const node of all.filter((node) => node.matches("button, input[type=text]"))) {
    const box = node.getBoundingClientRect();
    if (box.width < 24 || box.height < 24) complain(node, `is only ${box.width} × ${box.height} large`);
  }

  // Text stands out from what is behind it (WCAG AA).
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([red, green, blue]) => {
    const [r, g, b] = [red, green, blue].map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return rgba("canvas");
  };
  let texts = 0;
  for (const node of all) {
    const own = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
    if (!own || node.closest(":disabled")) continue;
    texts += 1;
    const style = getComputedStyle(node);
    const colour = rgba(node instanceof SVGElement ? style.fill : style.color);
    const [light, dark] = [luminance(colour), luminance(behind(node))].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    if (contrast < (large ? 3 : 4.5)) complain(node, `has a contrast of ${contrast.toFixed(2)}`);
    if (size < 11) complain(node, `is only ${size} px high`);
  }
  if (texts === 0) found.push("no text is shown");
  return found;
})()
