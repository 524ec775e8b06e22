// The documents behind a mark of a chart: a few that the summary kept, and the query for all.
const data = JSON.parse(document.getElementById("data").textContent);
const count = (n) => Math.round(n).toLocaleString("en-US");
const plural = (n, noun) => count(n) + " " + noun + (n === 1 ? "" : "s");
function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let n = bytes, unit = 0;
  while (n >= 999.5 && unit < units.length - 1) { n /= 1000; unit += 1; }
  return +n.toPrecision(3) + " " + units[unit];
}

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

// Marks of one chart are one stop of the Tab key; arrow keys move among them, Enter opens one.
function rove(root, selector, open) {
  const all = () => [...root.querySelectorAll(selector)];
  const stop = (mark) => { for (const other of all()) other.setAttribute("tabindex", other === mark ? 0 : -1); };
  stop(all()[0]);
  root.addEventListener("keydown", (event) => {
    const mark = event.target.closest(selector), marks = all();
    if (!mark) return;
    const at = marks.indexOf(mark);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: marks.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") open(mark, true);
    else if (to === undefined) return;
    else if (marks[to]) { stop(marks[to]); marks[to].focus(); }
    event.preventDefault();
  });
  root.addEventListener("click", (event) => {
    const mark = event.target.closest(selector);
    if (mark) { stop(mark); open(mark, event.detail === 0); }
  });
}

// What stands below a chart once one of its marks is opened: a few documents, and how to list all.
let opened = null;
function showBehind(figure, title, documents, query, mark, byKeyboard) {
  closeBehind();
  const close = make("button", { type: "button", "aria-label": "Close" }, "\u00d7");
  const heading = make("h4", { tabindex: -1 }, title);
  const panel = make("div", { class: "behind", role: "region", "aria-label": "Documents behind the bar" }, close, heading);
  if (documents.length) {
    const rows = documents.map(([bits, , , , id, bytes, tokens, link]) => make("tr", {},
      make("th", { scope: "row" }, link ? make("a", { href: "#" + link }, id) : id),
      make("td", { class: "n" }, bits.toFixed(3)), make("td", { class: "n" }, count(tokens)), make("td", { class: "n" }, count(bytes))));
    const names = ["document", "bits/byte", "tokens", "bytes"].map((name, i) => make("th", { scope: "col", ...(i && { class: "n" }) }, name));
    panel.append(make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...names)), make("tbody", {}, ...rows))));
  }
  panel.append(make("p", { class: "note" }, documents.length ? "A few of them, drawn at random or because they stand out. All, with DuckDB:" : "The summary keeps no example. With DuckDB:"));
  panel.append(withCopy(query));
  const id = documents.length ? documents[0][4] : "ID";
  panel.append(make("p", { class: "note" }, "One of them, in full:"), withCopy("logitmill inspect " + word(data.uri) + " --doc " + word(id)));
  const back = () => { closeBehind(); const at = mark.isConnected ? mark : figure.querySelector("[tabindex='0']"); if (at) at.focus(); };
  close.addEventListener("click", back);
  panel.addEventListener("keydown", (event) => { if (event.key === "Escape") back(); });
  figure.append(panel);
  mark.classList.add("open");
  opened = { panel, mark };
  if (byKeyboard) heading.focus();
  panel.scrollIntoView({ block: "nearest" });
}
function closeBehind() {
  if (!opened) return;
  opened.panel.remove();
  opened.mark.classList.remove("open");
  opened = null;
}
function word(text) { return /^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replaceAll("'", "'\"'\"'") + "'"; }
function withCopy(text) {
  // A line may end before an option of a command, and not within its name.
  const pieces = text.split(/(?<!\S)(--[a-z][a-z-]*)/).map((piece, n) => n % 2 ? make("span", { class: "option" }, piece) : piece);
  const button = make("button", { type: "button", class: "copy" }, "Copy"), pre = make("pre", {}, ...pieces);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(pre);
      button.textContent = "Selected";
    }
  });
  return make("div", { class: "copied" }, pre, button);
}

// Charts that were drawn before: what is behind a mark is known by its label.
for (const chart of document.querySelectorAll("[data-behind]")) {
  const known = data.behind[chart.dataset.behind];
  for (const mark of chart.querySelectorAll(".role-mark [aria-label], .cell")) {
    mark.behind = known[mark.getAttribute("aria-label")];
    if (!mark.behind) continue;
    mark.classList.add("opens");
    mark.setAttribute("role", "button");
  }
  if (chart.querySelector(".opens")) rove(chart, ".opens", (mark, byKeyboard) => {
    const [query, ...places] = mark.behind, isKept = data.tokens || !query.includes("{tokens}");
    const text = query.replace("{scores}", data.scores).replace("{tokens}", data.tokens || "read_parquet('RUN/tokens/*.parquet')");
    const documents = places.length ? data.examples.filter((e) => e[1] === places[0] && (places.length < 2 || e[2] === places[1])) : [];
    const note = isKept ? "" : "-- needs the tier tokens, which this run has not kept: --keep tokens\n";
    showBehind(chart.closest("figure, section"), mark.getAttribute("aria-label"), documents.slice(0, 8), note + text, mark, byKeyboard);
  });
}
