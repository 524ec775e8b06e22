// The histogram whose groups, weight and cutoffs the reader chooses.
const explorer = document.getElementById("explorer");
const SVG = "http://www.w3.org/2000/svg";
const AREA = { left: 62, right: 412, top: 26, bottom: 218, width: 430, height: 265 };
const MAX_BARS = 48, FACTORS = [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000], MAX_COLORS = 9, MAX_EDGE = 5000;
const AXES = ["source", "language", "size"];
const percent = (part, all) => (all ? (100 * part / all).toFixed(1) : "0.0") + "\u202f%";
const edge = (b) => String(+(b * data.width).toFixed(2));

function draw(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

if (data.groups.length) {
  const form = explorer.querySelector("form");
  const charts = { histogram: explorer.querySelector("#histogram svg"), ecdf: explorer.querySelector("#ecdf svg") };
  const outputs = Object.fromEntries([...explorer.querySelectorAll("[data-part]")].map((row) => [row.dataset.part, row]));
  // A cutoff is a share of what is shown, or an edge of a bin; whatever was set last.
  const cuts = [{ share: 0.3 }, { share: 0.6 }];
  let view = null;

  document.getElementById("static-histogram").remove();
  explorer.hidden = false;
  for (const axis of [0, 1, 2]) {
    const names = data.names[axis], select = form.elements[AXES[axis]];
    names.forEach((name, i) => select.append(make("option", { value: i }, name)));
    select.closest("label").hidden = names.length < 2;
    const colour = form.elements.colour.querySelector("[value='" + AXES[axis] + "']");
    if (names.length < 2 && axis) colour.remove();
  }

  const isChosen = (places) => AXES.every((axis, i) => {
    const value = form.elements[axis].value;
    return value === "" || +value === places[i];
  });

  // Bins of what is chosen: documents and bytes in all and by series, from the first bin to the last.
  function addUp() {
    const axis = AXES.indexOf(form.elements.colour.value);
    const groups = data.groups.filter(isChosen);
    const bins = new Map();
    for (const group of groups) {
      let bin = 0;
      group[3].forEach((step, i) => {
        bin += step;
        if (!bins.has(bin)) bins.set(bin, { documents: 0, bytes: 0, series: new Map() });
        const into = bins.get(bin), series = Math.min(group[axis], MAX_COLORS - 1);
        const part = into.series.get(series) || { documents: 0, bytes: 0 };
        into.series.set(series, part);
        for (const sums of [into, part]) { sums.documents += group[4][i]; sums.bytes += group[5][i]; }
      });
    }
    const sorted = [...bins.entries()].sort((a, b) => a[0] - b[0]);
    const total = { documents: 0, bytes: 0 };
    for (const [, sums] of sorted) { total.documents += sums.documents; total.bytes += sums.bytes; }
    const names = data.names[axis], series = [...new Set(groups.map((group) => Math.min(group[axis], MAX_COLORS - 1)))].sort((a, b) => a - b);
    const label = (s) => (s === MAX_COLORS - 1 && names.length > MAX_COLORS ? "others" : names[s]);
    return { bins: sorted, total, series, label };
  }

  // Bars that show all bins, or all but a long thin tail.
  function scaleOf(bins, total) {
    const first = bins[0][0];
    let last = bins[bins.length - 1][0], seen = 0, near = last;
    for (const [bin, sums] of bins) {
      seen += sums.documents;
      if (seen >= 0.995 * total.documents) { near = bin; break; }
    }
    if (last - first > 1.5 * (near - first) + 5) last = near;
    const factor = FACTORS.find((f) => (last - first) / f < MAX_BARS) || FACTORS[FACTORS.length - 1];
    const bar = (bin) => Math.floor(Math.min(bin, last) / factor);
    return { factor, bar, first: bar(first) * factor, stop: (bar(last) + 1) * factor, last, beyond: bins[bins.length - 1][0] > last };
  }

  function below(cut, weight) {
    let sum = 0;
    for (const [bin, sums] of view.bins) if (bin < cut) sum += sums[weight];
    return sum;
  }

  // The edge of a bin below which there is nearest to a share of the weight.
  function edgeAt(share) {
    const weight = form.elements.weight.value, wanted = share * view.total[weight];
    let seen = 0, best = [Infinity, view.bins[0][0]];
    for (const [bin, sums] of view.bins) {
      if (Math.abs(seen - wanted) < best[0]) best = [Math.abs(seen - wanted), bin];
      seen += sums[weight];
      if (Math.abs(seen - wanted) < best[0]) best = [Math.abs(seen - wanted), bin + 1];
    }
    return best[1];
  }
  const meant = (cut) => (cut.edge === undefined ? edgeAt(cut.share) : cut.edge);
  function edges() {
    const low = meant(cuts[0]);
    return [low, Math.max(low, meant(cuts[1]))];
  }

  function niceStep(span, wanted) {
    const raw = span / wanted, power = 10 ** Math.floor(Math.log10(raw));
    return [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw);
  }
  const short = (n) => (n >= 1e3 ? +(n / 10 ** (3 * Math.floor(Math.log10(n) / 3))).toPrecision(3) + ["", "k", "M", "G", "T", "P"][Math.floor(Math.log10(n) / 3)] : String(+n.toPrecision(3)));

  function frame(x, y, yTitle, yText) {
    const parts = [], middle = (AREA.left + AREA.right) / 2;
    const text = (attributes, words) => draw("text", { class: "tick", ...attributes }, words);
    for (const tick of y.ticks) {
      parts.push(draw("line", { class: "grid", x1: AREA.left, x2: AREA.right, y1: y.at(tick), y2: y.at(tick) }));
      parts.push(text({ x: AREA.left - 6, y: y.at(tick) + 4, "text-anchor": "end" }, yText(tick)));
    }
    for (const tick of x.ticks) parts.push(text({ x: x.at(tick), y: AREA.bottom + 17, "text-anchor": "middle" }, String(+tick.toFixed(4))));
    parts.push(draw("line", { class: "axis", x1: AREA.left, x2: AREA.right, y1: AREA.bottom, y2: AREA.bottom }));
    parts.push(draw("text", { x: middle, y: AREA.height - 8, "text-anchor": "middle" }, "bits per byte"));
    parts.push(draw("text", { x: 12, y: (AREA.top + AREA.bottom) / 2, "text-anchor": "middle", transform: "rotate(-90 12 " + (AREA.top + AREA.bottom) / 2 + ")" }, yTitle));
    return draw("g", { "aria-hidden": "true" }, ...parts);
  }

  function linear(from, to, start, stop, wanted) {
    const step = niceStep(to - from, wanted), ticks = [];
    for (let tick = Math.ceil(from / step - 1e-9) * step; tick <= to * (1 + 1e-9); tick += step) ticks.push(tick);
    return { ticks, at: (value) => start + (value - from) / (to - from) * (stop - start) };
  }

  function drawHistogram(scale, x) {
    const weight = form.elements.weight.value, bars = new Map();
    for (const [bin, sums] of view.bins) {
      const bar = scale.bar(bin);
      if (!bars.has(bar)) bars.set(bar, { documents: 0, bytes: 0, series: new Map() });
      const into = bars.get(bar);
      into.documents += sums.documents; into.bytes += sums.bytes;
      for (const [s, part] of sums.series) into.series.set(s, (into.series.get(s) || 0) + part[weight]);
    }
    const most = Math.max(...[...bars.values()].map((bar) => bar[weight]));
    const y = linear(0, most || 1, AREA.bottom, AREA.top, 5), [low, high] = edges();
    const drawn = [...bars.entries()].sort((a, b) => a[0] - b[0]).map(([bar, sums]) => {
      const start = bar * scale.factor, stop = start + scale.factor;
      const left = x.at(start * data.width), width = x.at(stop * data.width) - left;
      const isLast = scale.beyond && stop === scale.stop;
      const span = isLast ? edge(start) + " bits/byte and more" : edge(start) + " to " + edge(stop) + " bits/byte";
      const group = draw("g", { class: "bar" + (stop > low && start < high ? "" : " out"), role: "button", tabindex: -1, "data-key": "bar" + bar,
        "aria-label": span + ": " + plural(sums.documents, "document") + ", " + size(sums.bytes) });
      group.append(draw("rect", { class: "reach", x: left, width, y: AREA.top, height: AREA.bottom - AREA.top }));
      let sum = 0;
      for (const s of view.series) {
        const value = sums.series.get(s);
        if (!value) continue;
        const top = y.at(sum + value);
        group.append(draw("rect", { x: left, width: width * 0.92, y: top, height: Math.max(0, y.at(sum) - top), fill: "var(--c" + s + ")" }));
        sum += value;
      }
      group.behind = { start, stop: isLast ? null : stop, span };
      return group;
    });
    const yTitle = weight === "bytes" ? "bytes" : "documents";
    charts.histogram.replaceChildren(frame(x, y, yTitle, short), ...drawn, ...[0, 1].map((i) => handle(i, scale, x)));
  }

  function handle(i, scale, x) {
    const cut = edges()[i], at = x.at(Math.min(Math.max(cut, scale.first), scale.stop) * data.width), weight = form.elements.weight.value;
    const said = edge(cut) + " bits per byte, " + percent(below(cut, weight), view.total[weight]) + " of " + weight + " below";
    return draw("g", { class: "cut", role: "slider", tabindex: 0, "data-key": "cut" + i, "data-cut": i,
      "aria-label": (i ? "Upper" : "Lower") + " cutoff", "aria-valuemin": edge(scale.first), "aria-valuemax": edge(scale.stop),
      "aria-valuenow": edge(cut), "aria-valuetext": said, "aria-orientation": "horizontal" },
    draw("rect", { class: "reach", x: at - 12, width: 24, y: 0, height: 24 }),
    draw("line", { x1: at, x2: at, y1: 14, y2: AREA.bottom }),
    draw("path", { d: "M" + at + " 18l-6 -7v-8h12v8z" }));
  }

  function drawEcdf(scale, x) {
    const weight = form.elements.weight.value, y = linear(0, 1, AREA.bottom, AREA.top, 5), lines = [];
    for (const s of view.series) {
      let all = 0, seen = 0, path = "M" + AREA.left + " " + AREA.bottom;
      for (const [, sums] of view.bins) all += (sums.series.get(s) || { [weight]: 0 })[weight];
      if (!all) continue;
      for (const [bin, sums] of view.bins) {
        const part = sums.series.get(s);
        if (!part || bin >= scale.stop) continue;
        path += "H" + x.at((bin + 1) * data.width).toFixed(1) + "V" + y.at((seen += part[weight]) / all).toFixed(1);
      }
      lines.push(draw("path", { class: "step", d: path + "H" + AREA.right, stroke: "var(--c" + s + ")" }));
    }
    for (const cut of edges()) {
      const at = x.at(Math.min(Math.max(cut, scale.first), scale.stop) * data.width);
      lines.push(draw("line", { class: "mark", x1: at, x2: at, y1: AREA.top, y2: AREA.bottom }));
    }
    charts.ecdf.replaceChildren(frame(x, y, "share of " + weight + " below", (t) => Math.round(100 * t) + " %"), ...lines);
  }

  function tell() {
    const [low, high] = edges(), weight = form.elements.weight.value;
    const parts = { below: [0, low], between: [low, high], above: [high, Infinity] };
    for (const [name, [from, to]] of Object.entries(parts)) {
      for (const unit of ["documents", "bytes"]) {
        const sum = to === Infinity ? view.total[unit] - below(from, unit) : below(to, unit) - below(from, unit);
        const [value, share] = outputs[name].querySelectorAll("[data-unit=" + unit + "]");
        value.textContent = unit === "bytes" ? size(sum) : count(sum);
        value.title = count(sum) + " " + unit;
        share.textContent = percent(sum, view.total[unit]);
      }
    }
    const shares = [low, high].map((cut, i) => {
      const isAsMeant = cuts[i].edge === undefined && meant(cuts[i]) === cut;
      return +(100 * (isAsMeant ? cuts[i].share : below(cut, weight) / view.total[weight])).toFixed(1);
    });
    [low, high].forEach((cut, i) => {
      const name = i ? "upper" : "lower", bits = form.elements[name + "-bits"], share = form.elements[name + "-share"];
      // What is being typed is left alone.
      if (document.activeElement !== bits) bits.value = edge(cut);
      if (document.activeElement !== share) share.value = shares[i];
    });
    const kept = [withCopy(query([low, high]))];
    if (AXES.every((axis) => form.elements[axis].value === "")) {
      const command = "logitmill filter " + word(data.uri) + " --keep " + shares.join(":") + " --by none --weight " + weight + " --out kept.parquet";
      kept.push(make("p", { class: "note" }, "Or at the exact percentiles, as a file of ids:"), withCopy(command));
    }
    explorer.querySelector("#kept").replaceChildren(...kept);
    explorer.querySelector("#legend").replaceChildren(...(view.series.length < 2 ? [] : view.series.map((s) =>
      make("li", {}, make("i", { style: "background:var(--c" + s + ")" }), view.label(s)))));
  }

  // The conditions are those of the bins, to the last bit: a document at an edge is where the page counts it.
  function query([from, to], limit) {
    const bits = "bits_per_byte / " + data.width;
    const wheres = ["status = 'ok'", ...(from ? [bits + " >= " + from] : []), ...(to === null ? [] : [bits + " < " + to])];
    AXES.forEach((axis, i) => {
      const value = form.elements[axis].value;
      if (value !== "" && data.wheres[i][value] !== "true") wheres.push(data.wheres[i][value]);
    });
    const span = edge(from) + (to === null ? " bits/byte and more" : " to " + edge(to) + " bits/byte");
    return "-- " + span + "\nSELECT doc_id" + (limit ? ", bits_per_byte, num_tokens_scored, num_bytes" : "") + "\nFROM " + data.scores +
      "\nWHERE " + wheres.join("\n  AND ") + (limit ? "\nORDER BY bits_per_byte\nLIMIT " + limit : "");
  }

  function render() {
    const focused = document.activeElement && document.activeElement.dataset.key;
    closeBehind();
    view = addUp();
    explorer.querySelector("#nothing").hidden = view.total.documents > 0;
    explorer.querySelector("#drawn").hidden = !view.total.documents;
    if (!view.total.documents) return;
    const scale = scaleOf(view.bins, view.total);
    const x = linear(scale.first * data.width, scale.stop * data.width, AREA.left, AREA.right, 8);
    view.scale = scale;
    drawHistogram(scale, x);
    drawEcdf(scale, x);
    tell();
    const bars = charts.histogram.querySelectorAll(".bar");
    (charts.histogram.querySelector("[data-key='" + focused + "'].bar") || bars[0]).setAttribute("tabindex", 0);
    if (focused) { const again = charts.histogram.querySelector("[data-key='" + focused + "']"); if (again) again.focus(); }
  }

  function setEdge(i, to) {
    const least = i ? edges()[0] : 0;
    cuts[i] = { edge: Math.round(Math.min(Math.max(to, least), MAX_EDGE)) };
    render();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", (event) => {
    const [name, what] = event.target.name.split("-"), i = name === "upper" ? 1 : 0, value = parseFloat(event.target.value);
    if (what && !(value >= 0)) return;
    if (what === "bits") cuts[i] = { edge: Math.round(Math.min(value / data.width, MAX_EDGE)) };
    if (what === "share") cuts[i] = { share: Math.min(value, 100) / 100 };
    render();
  });
  form.addEventListener("focusout", () => setTimeout(() => { if (view.total.documents) tell(); }));
  charts.histogram.addEventListener("keydown", (event) => {
    const cut = event.target.dataset.cut;
    if (cut === undefined) return;
    const at = edges()[cut], far = Math.max(10, view.scale.factor * 5);
    const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + far, PageDown: at - far, Home: view.scale.first, End: view.scale.stop }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    setEdge(+cut, to);
  });
  let dragged = null;
  charts.histogram.addEventListener("pointerdown", (event) => {
    const cut = event.target.closest(".cut");
    if (!cut) return;
    dragged = +cut.dataset.cut;
    cut.focus();
    charts.histogram.setPointerCapture(event.pointerId);
    event.preventDefault();
  });
  charts.histogram.addEventListener("pointermove", (event) => {
    if (dragged === null) return;
    const box = charts.histogram.getBoundingClientRect(), across = (event.clientX - box.left) / box.width * AREA.width;
    const share = Math.min(1, Math.max(0, (across - AREA.left) / (AREA.right - AREA.left)));
    setEdge(dragged, view.scale.first + share * (view.scale.stop - view.scale.first));
  });
  for (const type of ["pointerup", "pointercancel"]) charts.histogram.addEventListener(type, () => { dragged = null; });
  render();
  rove(charts.histogram, ".bar", (bar, byKeyboard) => {
    const { start, stop, span } = bar.behind;
    const inBar = ([bits, ...places]) => bits / data.width >= start && (stop === null || bits / data.width < stop) && isChosen(places);
    showBehind(charts.histogram.closest("figure"), bar.getAttribute("aria-label"), data.examples.filter(inBar).slice(0, 8), query([start, stop], 20), bar, byKeyboard);
  });
}
