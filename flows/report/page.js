
"use strict";
// A mark of a chart says what it stands for in its aria-label: show that where the pointer is.
const tip = document.getElementById("tip");
function showTip(event) {
  const mark = event.target.closest(".chart .role-mark [aria-label], .chart .bar");
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.getAttribute("aria-label");
  const { width, height } = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 12, document.documentElement.clientWidth - width - 8);
  const y = event.clientY - height - 12;
  tip.style.left = Math.max(8, x) + "px";
  tip.style.top = (y < 8 ? event.clientY + 16 : y) + "px";
}
for (const type of ["pointermove", "pointerdown"]) document.addEventListener(type, showTip);
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

// A token's numbers are in its title: say them below the text for a tap or the arrow keys as well.
for (const tokens of document.querySelectorAll(".tokens")) {
  const readout = tokens.nextElementSibling;
  let at = -1;
  function select(index) {
    const all = tokens.children;
    if (index < 0 || index >= all.length) return;
    if (at >= 0) all[at].classList.remove("on");
    at = index;
    all[at].classList.add("on");
    all[at].scrollIntoView({ block: "nearest" });
    readout.textContent = "Token " + (at + 1) + " \u201c" + all[at].textContent + "\u201d: " + all[at].title;
  }
  tokens.addEventListener("click", (event) => {
    const token = event.target.closest("span");
    if (token) select([...tokens.children].indexOf(token));
  });
  tokens.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -at, End: tokens.children.length - 1 - at }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    select(at < 0 ? 0 : at + step);
  });
}
