// Looks at every element as it is laid out, and leaves what is wrong where `--dump-dom` shows it.
const found = [], say = (what, element) => found.push(what + ": " + element.textContent.trim().slice(0, 60));
const width = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > width) found.push("the page is wider than the window");
const numbers = text => text.match(/[\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const probe = document.body.appendChild(document.createElement("i"));
const named = name => { probe.style.color = `var(${name})`; return numbers(getComputedStyle(probe).color); };
function ground(element) {
  for (let e = element; e; e = e.parentElement) {
    if (e.matches("td.v")) return named("--bar");  // a bar may lie below the number
    const colour = numbers(getComputedStyle(e).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
}
const scrolls = element => { for (let e = element; e; e = e.parentElement)
  if (getComputedStyle(e).overflowX === "auto") return true; return false; };
let words = 0;
for (const element of document.querySelectorAll("body *")) {
  const box = element.getBoundingClientRect(), style = getComputedStyle(element);
  if (!box.width || !element.checkVisibility()) continue;
  if (box.right > width + 1 && !scrolls(element)) say("beyond the edge", element);
  if (style.overflowX === "hidden" && element.scrollWidth > element.clientWidth + 1) say("clipped", element);
  if (element.matches("svg text")) {
    const frame = element.ownerSVGElement.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1) say("clipped in its figure", element);
  }
  if (element.matches("th")) {
    const range = document.createRange(); range.selectNodeContents(element);
    if (range.getBoundingClientRect().width > box.width + 1) say("wider than its column", element);
  }
  if (![...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || element.closest("svg")) continue;
  words += 1;
  const [one, other] = [numbers(style.color), ground(element)].map(light).sort((a, b) => b - a);
  if ((one + .05) / (other + .05) < 4.5) say("contrast " + ((one + .05) / (other + .05)).toFixed(2), element);
}
for (const image of document.querySelectorAll("img")) if (!image.alt) found.push("img without alt");
for (const figure of document.querySelectorAll("svg"))
  if (figure.getAttribute("role") !== "img" || !figure.getAttribute("aria-label")) found.push("svg without a label");
for (const head of document.querySelectorAll("th")) if (!head.scope) say("th without scope", head);
for (const table of document.querySelectorAll("table")) if (!table.querySelector("th")) say("table without th", table);
document.documentElement.dataset.found = JSON.stringify({found, words});
