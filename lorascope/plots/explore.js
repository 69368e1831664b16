// Controls, chart and table of one explorer. Python chooses options, rows and figure; this script shows the state and
// reports choices. The controls are plain HTML elements, so keyboards and screen readers work as on any page.
// The page requests plotly.js once. As part of this script it would take longer to load than the two seconds after
// which anywidget gives up and drops all messages of the kernel.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  // A focused control gets all keys, instead of JupyterLab's shortcuts.
  if (["button", "input", "select"].includes(tag) || "tabindex" in attributes)
    element.setAttribute("data-lm-suppress-shortcuts", "");
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
// Light text means a dark background. The canvas converts any notation of a color, such as oklch.
const isDark = (element) => {
  const canvas = make("canvas", { width: 1, height: 1 }).getContext("2d");
  canvas.fillStyle = getComputedStyle(element).color;
  canvas.fillRect(0, 0, 1, 1);
  const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
  return 0.3 * red + 0.6 * green + 0.1 * blue > 128;
};
const load = (model) =>
  new Promise((resolve) => {
    model.on("msg:custom", (_, [source]) =>
      resolve(import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))),
    );
    model.send("plotly.js");
  });
// Return a function that tells whether a part of the state has changed since its last call.
const watch = () => {
  const seen = {};
  return (name, value) => seen[name] !== (seen[name] = JSON.stringify(value));
};
// The views of a dial. The numbers at every stop of its slider are in the state, so nothing waits for Python.
const makeDial = (model) => {
  const part = make("select", { size: 7 });
  const scale = make("input", { type: "range", min: 0 });
  const scaleName = make("output", { "aria-live": "off" }); // the slider announces its own text
  const ticks = make("div", { class: "ticks", "aria-hidden": "true" });
  const plot = make("div", { role: "img" });
  const caption = make("caption");
  const body = make("tbody");
  const names = ["", "value", "change from scale 1", "its 95% interval over rows"];
  const headings = names.map((name) => make("th", { scope: "col", class: "value" }, name));
  const head = make("thead", {}, make("tr", {}, ...headings));
  const listing = make("div", { class: "listing", tabindex: 0, role: "region", "aria-label": "Numbers at this scale" });
  listing.append(make("table", {}, caption, head, body));
  const slider = make("div", { class: "slider" }, make("label", {}, make("span", {}, "Scale"), scale), ticks);
  const controls = make("div", { class: "controls" });
  controls.append(make("div", {}, make("label", {}, make("span", {}, "Part"), part)));
  controls.append(make("div", {}, slider, scaleName));
  const views = make("div", { class: "views dial" }, plot, make("div", {}, listing));

  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const parts = Object.keys(model.get("curves"));
  part.append(...parts.map((value) => make("option", { value }, value)));
  part.addEventListener("change", () => set("part", part.value));
  scale.addEventListener("input", () => set("scale", model.get("options").scale[scale.value]));
  const changed = watch();
  const update = (canDraw) => {
    const { title, figure, stops } = model.get("curves")[model.get("part")];
    const number = model.get("options").scale.indexOf(model.get("scale"));
    const { name, cells, x, y } = stops[number];
    part.value = model.get("part");
    scale.max = stops.length - 1;
    scale.value = number;
    scaleName.textContent = name;
    scale.setAttribute("aria-valuetext", name);
    if (changed("part", part.value)) {
      ticks.replaceChildren(...stops.map(({ tick }) => make("span", {}, tick)));
      for (const [index, tick] of [...ticks.children].entries()) tick.style.left = `${(100 * index) / scale.max}%`;
    }
    caption.textContent = `${part.value}, scale ${name}`;
    plot.setAttribute("aria-label", `${title}, scale ${name}`);
    const toRow = ([axis, ...texts]) =>
      make("tr", {}, make("th", { scope: "row" }, axis), ...texts.map((text) => make("td", { class: "value" }, text)));
    body.replaceChildren(...cells.map(toRow));
    if (!canDraw || !changed("drawn", [figure, number])) return;
    const { data, layout } = JSON.parse(figure);
    const marker = { size: 16, color: "transparent", line: { width: 2, color: layout.font.color } };
    data.push({ x: [x], y: [y], mode: "markers", marker, hoverinfo: "skip", showlegend: false });
    Plotly.react(plot, data, layout, model.get("config"));
  };
  return { controls, views, plot, update };
};

export default {
  async render({ model, el }) {
    const quantity = make("select", { size: 7 }); // a list shows how many there are, and scrolls
    const layers = make("select", { multiple: "", size: 7 });
    const roles = make("select", { multiple: "", size: 7 });
    const step = make("input", { type: "range", min: 0 });
    const stepName = make("output", { "aria-live": "off" }); // the slider announces its own text
    const tabs = make("div", { class: "tabs", role: "tablist", "aria-label": "Figure" });
    const tabNames = { chart: "One chart", multiples: "Small multiples", dial: "Dial" };
    for (const value of model.get("options").view)
      tabs.append(make("button", { role: "tab", type: "button", value }, tabNames[value]));
    const note = make("p", { role: "alert" });
    const plot = make("div", { role: "img" });
    const status = make("p", { role: "status" });
    const caption = make("caption");
    const head = make("thead");
    const body = make("tbody");
    const listing = make("div", { class: "listing", tabindex: 0, role: "region", "aria-label": "Rows" });
    listing.append(make("table", {}, caption, head, body));
    const root = make("div", { class: "lorascope-explorer" });
    const controls = make("div", { class: "controls" });
    for (const [name, control] of Object.entries({ Quantity: quantity, Layers: layers, Roles: roles, Step: step }))
      controls.append(make("div", {}, make("label", {}, make("span", {}, name), control)));
    controls.lastChild.append(stepName);
    const views = make("div", {}, note, make("div", { class: "views" }, plot, make("div", {}, status, listing)));
    const dial = model.get("part") && makeDial(model);
    root.append(controls, tabs, views);
    if (dial) {
      tabs.before(dial.controls);
      root.append(dial.views);
    }
    el.append(root);

    const report = (name, value) => {
      model.set("asked", model.get("asked") + 1);
      model.set(name, value);
      model.save_changes();
    };
    const chosen = (select) => [...select.selectedOptions].map((option) => option.value);
    quantity.addEventListener("change", () => report("quantity", quantity.value));
    layers.addEventListener("change", () => report("layers", chosen(layers)));
    roles.addEventListener("change", () => report("roles", chosen(roles)));
    step.addEventListener("input", () => report("step", model.get("options").step[step.value]));
    tabs.addEventListener("click", ({ target }) => target.value && report("view", target.value));
    const boxes = () => [...body.querySelectorAll("input")];
    // Checkboxes change only the listed rows: others can be selected in the chart.
    root.addEventListener("change", ({ target }) => {
      if (!listing.contains(target)) return;
      if (head.contains(target)) for (const box of boxes()) box.checked = target.checked;
      const rows = new Set(model.get("selection"));
      for (const box of boxes()) box.checked ? rows.add(+box.value) : rows.delete(+box.value);
      report("selection", [...rows]);
    });

    const changed = watch();
    const offer = (select, name, text = (value) => value) => {
      const values = model.get("options")[name];
      const selected = [model.get(name)].flat();
      if (changed(`options ${name}`, values))
        select.replaceChildren(...values.map((value) => make("option", { value }, text(value))));
      for (const option of select.options)
        if (option.selected !== selected.includes(option.value)) option.selected = !option.selected;
      select.disabled = values.length < (select.multiple ? 3 : 2); // "all" and a single value are the same choice
    };
    const list = ({ columns, cells, labels, title }) => {
      caption.textContent = title;
      const all = make("input", { type: "checkbox", "aria-label": "Select all listed rows" });
      const names = columns.map((name) => make("th", { scope: "col", class: name }, name));
      head.replaceChildren(make("tr", {}, make("th", { scope: "col" }, all), ...names));
      body.replaceChildren(
        ...cells.map((row, number) => {
          const name = row.map((cell, column) => `${columns[column]} ${cell}`).join(", ");
          const box = make("input", { type: "checkbox", value: labels[number], "aria-label": `Select ${name}` });
          const texts = row.map((cell, column) => make("td", { class: columns[column] }, cell));
          return make("tr", {}, make("td", {}, box), ...texts);
        }),
      );
    };
    const dots = () => plot.data.flatMap((trace, number) => (trace.meta ? [number] : []));
    let [drawing, marking] = [false, false];
    const select = (rows) => {
      const isSame = `${rows}` === `${model.get("selection")}`;
      report("selection", rows);
      if (isSame) mark(rows); // Plotly has dimmed dots, also for a click that selects none
    };
    const draw = (figure) => {
      plot.hidden = !figure;
      if (!figure) return;
      const { data, layout } = JSON.parse(figure);
      const isFirst = !plot.layout;
      Plotly.react(plot, data, layout, model.get("config"));
      if (!isFirst) return;
      plot.on("plotly_deselect", () => select([]));
      plot.on("plotly_selected", (event) => {
        if (!event || marking) return;
        select(event.points.flatMap(({ data, pointNumber }) => data.meta?.[pointNumber] ?? []));
      });
    };
    const mark = async (selection) => {
      const rows = new Set(selection);
      const isSelected = (labels) => labels.some((label) => rows.has(label));
      const numbers = ({ meta }) => meta.flatMap((labels, number) => (isSelected(labels) ? [number] : []));
      const selectedpoints = dots().map((number) => (rows.size ? numbers(plot.data[number]) : null));
      marking = true; // removing the outline of a selection reports an empty one
      await Plotly.update(plot, { selectedpoints }, { selections: [] }, dots());
      Plotly.Fx.unhover(plot); // else the text at the pointer stays
      marking = false;
    };
    const show = () => {
      const isDial = model.get("view") === "dial";
      for (const tab of tabs.children) tab.setAttribute("aria-selected", tab.value === model.get("view"));
      for (const element of [controls, views]) element.hidden = isDial;
      if (!dial) return;
      for (const element of [dial.controls, dial.views]) element.hidden = !isDial;
      dial.update(drawing && isDial);
    };
    let isPressed = false;
    const update = () => {
      show();
      // A state that lacks the last choice would undo it, and elements that change during a click would lose the click.
      if (isPressed || model.get("answered") < model.get("asked")) return;
      const [rows, steps, selection] = [model.get("listing"), model.get("options").step, model.get("selection")];
      offer(quantity, "quantity", (name) => `${name}: ${model.get("symbols")[name]}`);
      offer(layers, "layers");
      offer(roles, "roles");
      step.max = steps.length - 1;
      step.value = steps.indexOf(model.get("step"));
      step.disabled = steps.length < 2;
      stepName.textContent = model.get("step") < 0 ? "as stored" : model.get("step");
      step.setAttribute("aria-valuetext", stepName.textContent);
      if (changed("listing", rows)) list(rows);
      plot.setAttribute("aria-label", rows.title);
      note.textContent = rows.note;
      status.textContent = rows.count + (selection.length ? `, ${selection.length} selected` : "");
      const picked = new Set(selection);
      for (const box of boxes()) box.checked = picked.has(+box.value);
      head.querySelector("input").checked = boxes().every((box) => box.checked);
      if (!drawing) return;
      const redrawn = changed("figure", model.get("figure"));
      if (redrawn) draw(model.get("figure"));
      if ((changed("selection", selection) || redrawn) && model.get("figure")) mark(selection);
    };
    const follow = () => {
      if (!el.isConnected) return;
      const dark = isDark(el);
      root.style.colorScheme = dark ? "dark" : "light"; // of the browser's own controls
      model.set("dark", dark);
      // The chart has room for its text at this width, and grows with its container. It is drawn anew every 20 pixels.
      model.set("width", Math.min(Math.max(20 * Math.floor(el.clientWidth / 20), 260), 600));
      model.save_changes();
    };
    const theme = new MutationObserver(follow);
    for (const page of [document.documentElement, document.body]) theme.observe(page, { attributes: true });
    const size = new ResizeObserver(() => {
      follow();
      for (const figure of dial ? [plot, dial.plot] : [plot])
        if (figure.layout && figure.offsetWidth) Plotly.Plots.resize(figure);
    });
    size.observe(el);
    const press = () => (isPressed = true);
    const release = () => {
      isPressed = false;
      setTimeout(update); // after the click
    };
    root.addEventListener("pointerdown", press);
    for (const name of ["pointerup", "pointercancel"]) window.addEventListener(name, release);
    model.on("change", update);
    update();
    await (window.lorascopePlotly ??= load(model));
    drawing = true;
    update();
    return () => {
      size.disconnect();
      theme.disconnect();
      for (const name of ["pointerup", "pointercancel"]) window.removeEventListener(name, release);
      model.off("change", update);
      Plotly.purge(plot);
      if (dial) Plotly.purge(dial.plot);
    };
  },
};
