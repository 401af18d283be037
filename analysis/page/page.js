(() => {
  "use strict";
  // Figures: the layout is the author's, a narrow screen gets smaller type and its colour bars below.
  const draw = script => {
    const canvas = document.getElementById(script.dataset.for);
    const {data, layout} = JSON.parse(script.textContent);
    if (window.innerWidth < 640) {
      layout.font.size = 11;
      const below = {orientation: "h", y: -0.26, yanchor: "top", x: 0.5, len: 0.9, thickness: 8, title: {side: "top"}};
      if (layout.coloraxis) {
        Object.assign(layout.coloraxis.colorbar, below, {title: {text: "depth", side: "top"}, y: -0.14});
        layout.height += 40;
      }
      data.filter(trace => trace.type === "heatmap").forEach(trace => {
        const plot = layout.height - layout.margin.t - layout.margin.b;
        Object.assign(trace.colorbar, below, {y: -48 / plot});  // below the axis and its title
        layout.height += 46;
        layout.margin.b += 46;
        layout.xaxis.dtick *= 2;
      });
      canvas.style.height = `${layout.height}px`;
    }
    const drawable = layout.dragmode === "select" ? [] : ["select2d", "lasso2d"];
    const config = {responsive: true, displaylogo: false, modeBarButtonsToRemove: [...drawable, "autoScale2d"]};
    return Plotly.newPlot(canvas, data, layout, config);
  };
  const scripts = [...document.querySelectorAll("script[data-for]")];
  const unpack = async () => {  // plotly.js is base64 of gzip, which makes the file less than half as large
    const packed = document.getElementById("plotly");
    if (!packed) return;
    const bytes = Uint8Array.from(atob(packed.textContent), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  };
  const drawAll = async () => {
    if (!window.Plotly) throw new Error("no plotly.js");
    await Promise.all(scripts.map(draw));
    document.body.dataset.figures = String(scripts.length);
    document.dispatchEvent(new Event("figures"));
  };
  if (scripts.length) {
    unpack().then(drawAll).catch(reason => {
      if (window.Plotly) throw reason;
      document.getElementById("undrawn").hidden = false;
      document.querySelectorAll("figure").forEach(figure => { figure.hidden = true; });
    });
  }

  // The table of all trials sorts by a click on a heading; empty cells stay at the end.
  const table = document.getElementById("all-trials");
  if (table) {
    const body = table.tBodies[0];
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") !== "descending";
        [...cell.parentNode.cells].forEach(other => other.removeAttribute("aria-sort"));
        cell.setAttribute("aria-sort", down ? "descending" : "ascending");
        const value = row => {
          const td = row.cells[column];
          if (td.className === "t") return td.textContent;
          const number = parseFloat(td.dataset.v ?? td.textContent.replace("\u2212", "-").replaceAll(",", ""));
          return Number.isNaN(number) ? null : number;
        };
        const sign = down ? -1 : 1;
        [...body.rows].sort((a, b) => {
          const x = value(a), y = value(b);
          if (x === null || y === null) return (x === null) - (y === null);
          return x < y ? -sign : x > y ? sign : 0;
        }).forEach(row => body.append(row));
      });
    });
  }

  // A link into something folded opens it.
  const unfold = hash => {
    const target = hash.length > 1 ? document.getElementById(hash.slice(1)) : null;
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
  };
  document.addEventListener("click", event => {
    const link = event.target.closest("a[href^='#']");
    if (link) unfold(link.hash);
  });
  unfold(location.hash);

  const copy = document.getElementById("copy");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      const command = document.getElementById("command");
      try {
        await navigator.clipboard.writeText(command.textContent);
        copy.textContent = "Copied";
      } catch {  // not allowed in this frame: select it, so that one key copies
        getSelection().selectAllChildren(command);
      }
    });
  }
})();
