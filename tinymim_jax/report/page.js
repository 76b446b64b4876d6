"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = () => innerWidth < 640;
  let printing = false;
  const element = (name, attributes, parent) => parent.appendChild(Object.assign(document.createElement(name), attributes));

  const layoutOf = (layout, traces) => {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => printing ? { ink: "#000", soft: "#444", line: "#ccc", card: "#fff", accent: "#000" }[name] : style.getPropertyValue("--" + name).trim();
    const axis = { gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), ticks: "", fixedrange: narrow() };
    const names = traces.filter((t) => t.showlegend !== false && t.type === "scatter" && t.name).map((t) => t.name);
    const columns = Math.max(1, Math.floor((narrow() ? innerWidth - 60 : 900) / (40 + 7.5 * Math.max(1, ...names.map((n) => n.length)))));
    const below = names.length ? 24 * Math.ceil(names.length / columns) + 30 : 0;
    return {
      hovermode: "closest", ...layout, height: layout.height + below, autosize: true, showlegend: names.length > 0,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("soft") },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("accent") },
      margin: { l: 56, r: 16, t: 28, b: 48 + below },
      legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink") }, namelength: -1 },
      xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis },
    };
  };
  const draw = (box) => {
    const { data: traces, layout } = structuredClone(data.charts[box.dataset.chart]);
    box.dataset.drawn = box.dataset.chart;
    if (narrow()) for (const trace of traces) if (trace.mode === "markers+text") trace.mode = "markers";  // no room: names answer a tap
    return Plotly.react(box, traces, layoutOf(layout, traces), {
      responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"], displayModeBar: narrow() ? false : "hover",
    });
  };
  const boxes = [...document.querySelectorAll(".plot")];
  for (const box of boxes) box.style.minHeight = `${data.charts[box.dataset.chart].layout.height}px`;  // nothing jumps as they are drawn
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }, { rootMargin: "300px" });
  addEventListener("load", () => setTimeout(() => {  // the page can be read before the library is run
    element("script", { textContent: document.getElementById("plotly").textContent }, document.body);
    boxes.forEach((box) => seen.observe(box));
  }));
  const again = (all) => boxes.filter((box) => all || box.dataset.drawn).forEach(draw);
  dark.addEventListener("change", () => again(false));
  addEventListener("beforeprint", () => { printing = true; again(true); });
  addEventListener("afterprint", () => { printing = false; again(false); });

  const show = (box) => {
    const { axes, grids, images } = data.pictures[box.dataset.pictures];
    const inputs = [...box.querySelectorAll("[data-axis]")];
    const chosen = inputs.map((input) => Number(input.value));
    inputs.forEach((input, i) => { if (input.type === "range") input.previousElementSibling.firstElementChild.textContent = axes[i][1][chosen[i]]; });
    const grid = grids[chosen.join()], place = box.querySelector(".grid");
    place.replaceChildren();
    box.querySelector(".said").textContent = grid ? grid.title : "Not shown here: the page is at most 8 MB.";
    if (!grid) return;
    const count = Math.max(...grid.rows.map((row) => row.length)), labelled = grid.labels.some(Boolean), beside = labelled && !narrow();
    const size = Math.min(grid.rows.length > 1 ? 130 : 260, 1000 / count);
    place.style.gridTemplateColumns = `${beside ? "minmax(min-content, 6.5rem) " : ""}repeat(${count}, minmax(0, ${size}px))`;
    if (grid.columns.some(Boolean)) {
      if (beside) element("span", {}, place);
      for (let i = 0; i < count; i++) element("span", { textContent: grid.columns[i] || "" }, place);
    }
    grid.rows.forEach((row, i) => {
      if (labelled) element("span", { textContent: grid.labels[i] || "", className: beside ? "row" : "above" }, place);
      for (let j = 0; j < count; j++) {
        const cell = element("span", { className: "cell" }, place);
        if (j >= row.length) continue;
        const [image, caption] = row[j], [source, isSmall] = images[image];
        const what = [grid.title, grid.labels[i], grid.columns[j], caption].filter(Boolean).join(", ");
        element("img", { src: source, alt: what, className: isSmall ? "small" : "" }, cell);
        if (grid.box && j === 0) Object.assign(element("i", {}, cell).style, grid.box);
        if (caption) element("span", { textContent: caption }, cell);
      }
    });
  };
  const remembered = (control) => `${location.pathname} ${control.id}`;
  for (const control of document.querySelectorAll("select, input[type=range]")) {
    try { const value = sessionStorage.getItem(remembered(control)); if (value !== null) control.value = value; } catch { /* private */ }
    if (control.value === "") control.value = "0";
    control.addEventListener("input", () => { try { sessionStorage.setItem(remembered(control), control.value); } catch { /* private */ } });
  }
  for (const box of document.querySelectorAll("[data-pictures]")) {
    box.addEventListener("input", () => show(box));
    show(box);
  }
  for (const select of document.querySelectorAll("[data-metric]")) {
    const box = document.getElementById(select.dataset.metric);
    const change = () => {
      const keys = Object.keys(data.charts), key = select.selectedOptions[0]?.dataset.chart;
      if (!keys.includes(key)) return;
      box.dataset.chart = key;
      box.setAttribute("aria-label", select.selectedOptions[0].dataset.said);
      if (box.dataset.drawn) draw(box);
    };
    select.addEventListener("input", change);
    change();
  }
})();
