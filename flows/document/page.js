
// What the model expected in a token's place: of the one pointed at, else of the one chosen.
{
  const tokens = document.querySelector(".tokens");
  const panel = document.getElementById("candidates");
  const data = document.getElementById("expected");
  const places = new Map([...tokens.children].map((token, place) => [token, place]));
  const chance = (thousandths) => Math.exp(-thousandths / 1000);
  const percent = (p) => (p >= 0.9995 || p === 0 ? (100 * p).toFixed(0) : p < 0.0005 ? "< 0.1" : (100 * p).toFixed(1)) + " %";

  function add(list, kind, name, p) {
    const line = document.createElement("li");
    line.className = kind;
    const label = document.createElement(kind === "rest" ? "span" : "code");
    label.textContent = name;
    const bar = document.createElement("span");
    bar.className = "share";
    bar.style.width = 100 * p + "%";
    const number = document.createElement("span");
    number.className = "p";
    number.textContent = percent(p);
    line.append(label, bar, number);
    list.append(line);
  }

  function expect(token) {
    panel.hidden = !token;
    if (!token) return;
    const { names, rows } = expected;
    const [own, ownChance, rest, ...others] = rows[places.get(token)];
    panel.querySelector("h3").textContent = "In place of \u201c" + names[own] + "\u201d the model expected";
    const list = panel.querySelector("ol");
    list.replaceChildren();
    let isThere = false;
    for (let i = 0; i < others.length; i += 2) {
      isThere ||= others[i] === own;
      add(list, others[i] === own ? "own" : "", names[others[i]], chance(others[i + 1]));
    }
    if (!isThere) add(list, "own", names[own], chance(ownChance));
    add(list, "rest", isThere ? "all others" : "all others, this one too", chance(rest));
  }

  const expected = data && JSON.parse(data.textContent);
  const chosen = () => tokens.querySelector(".on");
  if (expected) {
    tokens.addEventListener("pointerover", (event) => expect(event.target.closest(".tokens > span") || chosen()));
    tokens.addEventListener("pointerleave", () => expect(chosen()));
    for (const type of ["click", "keydown"]) tokens.addEventListener(type, () => expect(chosen()));
  }
  // A link to a token chooses it, as a tap would.
  for (const link of document.querySelectorAll('#surprising a')) {
    link.addEventListener("click", () => document.querySelector(link.getAttribute("href")).click());
  }
}
