// One message redraws the chart in place. The theme follows the page: light text means a dark background.
// The page requests plotly.js once. As part of this script it would take longer to load than the two seconds after
// which anywidget gives up and drops all messages of the kernel.
const isDark = (el) => {
  const [red, green, blue] = (getComputedStyle(el).color.match(/[\d.]+/g) ?? [0, 0, 0]).map(Number);
  return 0.3 * red + 0.6 * green + 0.1 * blue > 128;
};
const load = (model) =>
  new Promise((resolve) => {
    model.on("msg:custom", (_, [source]) =>
      resolve(import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })))),
    );
    model.send("plotly.js");
  });
export default {
  async render({ model, el }) {
    const plot = el.appendChild(document.createElement("div"));
    plot.setAttribute("role", "img");
    const follow = () => {
      if (!el.isConnected || isDark(el) === model.get("dark")) return;
      model.set("dark", isDark(el));
      model.save_changes();
    };
    const draw = () => {
      if (!model.get("figure")) return;
      const { data, layout } = JSON.parse(model.get("figure"));
      plot.setAttribute("aria-label", layout.title.text);
      Plotly.react(plot, data, layout, model.get("config"));
    };
    const theme = new MutationObserver(follow);
    theme.observe(document.body, { attributes: true });
    const size = new ResizeObserver(() => {
      const lists = el.closest(".lorascope-explorer")?.querySelectorAll("select") ?? [];
      for (const list of lists) list.setAttribute("data-lm-suppress-shortcuts", ""); // arrow keys select options
      follow();
      if (plot.layout && plot.offsetWidth) Plotly.Plots.resize(plot);
    });
    size.observe(el);
    await (window.lorascopePlotly ??= load(model));
    model.on("change:figure", draw);
    draw();
    return () => {
      size.disconnect();
      theme.disconnect();
      Plotly.purge(plot);
    };
  },
};
