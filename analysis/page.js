(() => {
  "use strict";
  // Figures: the layout is the author's, a narrow screen gets smaller type and its colour bars below.
  const drawn = [];
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
  if (window.Plotly) {
    scripts.forEach(script => drawn.push(draw(script)));
    Promise.all(drawn).then(() => {
      document.body.dataset.figures = String(drawn.length);
      document.dispatchEvent(new Event("figures"));
    });
  } else if (scripts.length) {
    document.getElementById("undrawn").hidden = false;
    document.querySelectorAll("figure").forEach(figure => { figure.hidden = true; });
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
