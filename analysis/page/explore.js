(() => {
  "use strict";
  // The controls above the figures: modules, layers and a floor of reliability. They filter every figure and table by
  // trial, and move the pick: the rule is applied to the settings that are left. What is drawn around in a figure filters
  // the others as well.
  const form = document.getElementById("explore");
  const get = id => document.getElementById(id);
  const {modules, layers, floor: ruled, best, margin, same, fields, settings: listed, others} = JSON.parse(get("explore-data").textContent);
  const settings = listed.map(row => Object.fromEntries(fields.map((name, i) => [name, row[i]])));
  const trials = new Map(others.map(([id, layer, module]) => [id, {layer, module, setting: id}]));
  settings.forEach(({ids, layer, module}) => ids.forEach(id => trials.set(id, {layer, module, setting: ids[0]})));
  const slider = get("floor"), from = get("from-layer"), to = get("to-layer");
  const chips = [...form.querySelectorAll("input[name=module]")];
  const percent = share => `${(100 * share).toFixed(1)}%`;
  slider.max = Math.floor(1000 * best + 1e-6) / 10;  // rounded up, it would be above the best
  form.hidden = false;

  let floor = null;  // until the slider is moved, reliable is what the rule compared with the best
  let chosen = null;  // trials that were drawn around in the front
  let brushed = null;  // trials whose lines cross the ranges drawn along the axes of the parallel coordinates
  const within = id => {
    const trial = trials.get(id);
    if (!trial) return true;
    const {layer, module, setting} = trial;
    return (!chips.length || chips[module].checked)
      && (!from || (layer >= layers[from.value] && layer <= layers[to.value]))
      && (!chosen || chosen.has(setting));
  };
  const shown = id => within(id) && (!brushed || !trials.has(id) || brushed.has(trials.get(id).setting));

  const whole = new Map();  // canvas of each figure, once drawn -> its data as drawn
  const figures = () => [...whole.keys()];
  const remember = canvas => {
    const of = trace => trace.type === "heatmap" ? {z: trace.z} : trace.type === "parcoords"
      ? {values: new Map(trace.dimensions.map(axis => [axis.label, axis.values])), color: trace.line.color}
      : {x: trace.x, y: trace.y};
    whole.set(canvas, canvas.data.map(trace => trace.customdata ? {ids: trace.customdata, ...of(trace)} : null));
  };
  const filter = canvas => {
    const scatters = [], ys = [];
    whole.get(canvas).forEach((kept, index) => {
      if (!kept) return;
      if (kept.z) {
        const z = kept.z.map((line, i) => line.map((value, j) => kept.ids[i][j] && !shown(kept.ids[i][j]) ? null : value));
        Plotly.restyle(canvas, {z: [z]}, [index]);
      } else if (kept.values) {  // its own ranges leave their other lines there, in grey; the axes may have been moved
        const left = kept.ids.map(within), keep = list => list.filter((_, i) => left[i]);
        const change = {"line.color": [keep(kept.color)]};
        canvas.data[index].dimensions.forEach((axis, place) => {
          change[`dimensions[${place}].values`] = [keep(kept.values.get(axis.label))];
        });
        Plotly.restyle(canvas, change, [index]);
      } else {
        scatters.push(index);
        ys.push(kept.y.map((y, i) => shown(kept.ids[i]) ? y : null));
      }
    });
    if (ys.length) Plotly.restyle(canvas, {y: ys}, scatters);
  };
  const ranges = axis => {  // along an axis: [[low, high], ...], none where nothing is drawn
    const range = axis.constraintrange ?? [];
    return Array.isArray(range[0]) ? range : range.length ? [range] : [];
  };
  const brush = canvas => {  // what the ranges keep, of all lines
    const index = canvas.data.findIndex(trace => trace.type === "parcoords"), kept = whole.get(canvas)[index];
    const drawn = canvas.data[index].dimensions.filter(axis => ranges(axis).length);
    const inside = (axis, i) => ranges(axis).some(([low, high]) => {
      const value = kept.values.get(axis.label)[i];
      return value >= low && value <= high;
    });
    brushed = drawn.length ? new Set(kept.ids.filter((_, i) => drawn.every(axis => inside(axis, i)))) : null;
  };
  const front = document.querySelector('script[data-for="plot-front"]');
  const marks = new Map();  // setting -> its place in the figure of the front, and what hovering over it says, without its name
  (front ? JSON.parse(front.textContent).data : []).forEach(trace => trace.customdata?.forEach((id, i) => {
    marks.set(id, {x: trace.x[i], y: trace.y[i], hover: trace.text[i].split("<br>").slice(1).join("; ")});
  }));
  const about = id => marks.has(id) ? new DOMParser().parseFromString(marks.get(id).hover, "text/html").body.textContent : null;
  const mark = (canvas, id, position) => {
    if (canvas.id === "plot-front") {
      const ring = canvas.data.findIndex(trace => trace.name === "pick" && !trace.customdata), at = marks.get(id);
      if (ring < 0) return;
      Plotly.restyle(canvas, {x: [at ? [at.x] : []], y: [at ? [at.y] : []]}, [ring]);
      const label = canvas.layout.annotations.findIndex(note => note.name === "pick");  // drawn with the ring
      const [low, high] = canvas.layout.xaxis.range, key = `annotations[${label}].`;
      const text = `<b>${position.replace(/&/g, "&amp;").replace(/</g, "&lt;")}</b>`;
      Plotly.relayout(canvas, at
        ? {[key + "x"]: at.x, [key + "y"]: at.y, [key + "text"]: text, [key + "ax"]: at.x > (low + high) / 2 ? -46 : 46, [key + "visible"]: true}
        : {[key + "visible"]: false});
    }
    const map = whole.get(canvas).find(kept => kept?.z);
    if (map) {  // its only shape is the frame of the pick
      const row = id ? map.ids.findIndex(line => line.includes(id)) : -1, column = row < 0 ? -1 : map.ids[row].indexOf(id);
      Plotly.relayout(canvas, row < 0 ? {"shapes[0].visible": false} : {
        "shapes[0].visible": true, "shapes[0].x0": column - 0.5, "shapes[0].x1": column + 0.5,
        "shapes[0].y0": row - 0.5, "shapes[0].y1": row + 0.5});
    }
  };

  const rows = [...document.querySelectorAll("tr[data-trial]")];
  const pickOf = left => {  // the rule of analysis/stats/pick.py; the settings come in the order of its last step
    const reliable = left.filter(one => floor === null ? one.reliable : one.reliability >= floor - same);
    const harmless = reliable.filter(one => one.high === null || one.high >= -same);
    const least = Math.max(...reliable.map(one => one.change));
    const able = harmless.length ? harmless : reliable.filter(one => one.high >= least - same);
    const drift = one => one.drift ?? Infinity;
    const calmest = Math.min(...able.map(drift));
    return able.find(one => drift(one) <= calmest + margin + same);
  };
  const movePick = () => {
    get("floor-value").textContent = floor === null ? "about that of the best" : percent(floor);
    const left = settings.filter(({ids}) => shown(ids[0]));
    const pick = pickOf(left), id = pick?.ids[0] ?? null;
    const position = pick ? `${pick.layer}.${modules[pick.module]}` : "";
    const say = get("floor-pick");
    say.replaceChildren();
    say.dataset.pick = id ?? "";
    const bold = document.createElement("b");
    if (pick) {
      bold.textContent = position;
      say.append("Pick: ", bold, `: ${about(id) ?? `reliability ${percent(pick.reliability)}`}. `);
      if (pick.run) {
        const code = document.createElement("code");
        code.textContent = `--from-run ${pick.run}`;
        say.append(code, ". ");
      }
      if (pick.misses) {
        const link = document.createElement("a");
        link.href = `#misses-${pick.misses}`;
        link.textContent = "Which edits fail there";
        say.append(link, ". ");
      }
    } else {
      say.append(floor === null ? "No setting shown is about as reliable as the best of the study; lower the floor to pick one. " : "No setting shown reaches the reliability asked for. ");
    }
    say.append(`${left.length} of ${settings.length} settings shown.`);
    if (pick && !marks.has(id)) say.append(" It is not drawn in the figure of the front.");
    if (chosen || brushed) say.append(" Only those drawn around in a figure; Reset shows all.");
    rows.forEach(row => row.classList.toggle("picked", id !== null && trials.get(row.dataset.trial)?.setting === id));
    figures().forEach(canvas => mark(canvas, id, position));
  };
  const filterAll = () => {
    if (from) get("layers-value").textContent = `${layers[from.value]} to ${layers[to.value]}`;
    rows.forEach(row => { row.hidden = !shown(row.dataset.trial); });
    figures().forEach(filter);
    movePick();
  };
  let due = 0;
  const soon = work => { cancelAnimationFrame(due); due = requestAnimationFrame(work); };

  slider.addEventListener("input", () => { floor = slider.value / 100; soon(movePick); });
  [from, to].forEach(end => end?.addEventListener("input", () => {
    if (+from.value > +to.value) (end === from ? to : from).value = end.value;
    soon(filterAll);
  }));
  chips.forEach(chip => chip.addEventListener("change", () => soon(filterAll)));
  form.addEventListener("submit", event => event.preventDefault());
  const reset = () => {
    floor = null;
    chosen = brushed = null;
    slider.value = (100 * ruled).toFixed(1);
    chips.forEach(chip => { chip.checked = true; });
    if (from) [from.value, to.value] = [0, layers.length - 1];
    figures().forEach(canvas => {
      if (canvas.layout.selections?.length) Plotly.relayout(canvas, {selections: []});
      canvas.data.forEach((trace, index) => trace.dimensions?.forEach((axis, place) => {
        if (ranges(axis).length) Plotly.restyle(canvas, {[`dimensions[${place}].constraintrange`]: [null]}, [index]);
      }));
    });
    filterAll();
  };
  form.addEventListener("reset", event => { event.preventDefault(); reset(); });

  // In the figures: the legend of the front switches modules, a frame or lasso in it keeps settings, a frame drawn over a
  // map keeps its layers and modules, and a range along an axis of the parallel coordinates keeps the lines that cross it.
  const attach = () => {
    [...document.querySelectorAll(".canvas")].filter(canvas => canvas.data).forEach(canvas => {
      remember(canvas);
      const map = canvas.data.find(trace => trace.type === "heatmap");
      if (canvas.id === "plot-front") {
        canvas.on("plotly_legendclick", event => {
          const chip = chips[trials.get(canvas.data[event.curveNumber].customdata?.[0])?.module];
          if (chip) chip.click();
          return false;
        });
        canvas.on("plotly_selected", event => {
          chosen = event?.points.length ? new Set(event.points.map(mark => mark.customdata)) : null;
          soon(filterAll);
        });
        canvas.on("plotly_deselect", () => { chosen = null; soon(filterAll); });
      } else if (canvas.data.some(trace => trace.type === "parcoords")) {
        canvas.on("plotly_restyle", ([change]) => {
          if (!Object.keys(change).some(key => key.endsWith("constraintrange"))) return;
          brush(canvas);
          soon(filterAll);
        });
      } else if (map) {
        canvas.on("plotly_selected", event => {
          if (!event?.range) return;
          const inside = ([a, b], n) => [a, b].sort((p, q) => p - q).map(Math.round).map(i => Math.max(0, Math.min(n - 1, i)));
          const [first, last] = inside(event.range.x, map.x.length), [top, bottom] = inside(event.range.y, map.y.length);
          if (from) [from.value, to.value] = [first, last].map(column => layers.indexOf(+map.x[column]));
          chips.forEach((chip, index) => { chip.checked = index >= top && index <= bottom; });
          Plotly.relayout(canvas, {selections: []});
          soon(filterAll);
        });
      }
    });
    movePick();
  };
  reset();
  if (document.body.dataset.figures) attach();
  else document.addEventListener("figures", attach);
})();
