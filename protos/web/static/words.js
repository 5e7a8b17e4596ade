// What both pages need to say something: elements made of text, and numbers that a person can read.
export const $ = (id) => document.getElementById(id);
export function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
export const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const short = (n) => (Number.isInteger(n) || n >= 100 ? Math.round(n) : n.toFixed(1));
export function bytes(n) {
  if (n >= 1e7) return `${short(n / 1e6)} MB`;
  return n >= 10000 ? `${short(n / 1000)} kB` : `${Math.round(n).toLocaleString("en")} B`;
}
export const bits = (n) => (n >= 1e6 ? `${short(n / 1e6)} Mbit/s` : `${Math.round(n / 1e3)} kbit/s`);
