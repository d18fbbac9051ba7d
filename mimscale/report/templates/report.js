"use strict";
(function () {
  const ends = JSON.parse(document.getElementById("axes").textContent);
  const form = document.getElementById("controls");
  const formats = { step: "0.[0]a", samples: "0.[0]a", hours: "0.[00]" };
  const models = (figure) => [...figure.references()];
  let figures = [];

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const ink = of("--ink"), soft = of("--soft"), line = of("--line");
    for (const figure of figures) {
      for (const model of models(figure)) {
        if (/Axis$/.test(model.type)) {
          model.major_label_text_color = soft;
          model.axis_line_color = model.major_tick_line_color = line;
        } else if (model.type === "Grid") {
          model.grid_line_color = line;
        } else if (model.type === "GlyphRenderer" && model.name === "ink") {
          model.glyph.line_color = model.glyph.type === "VSpan" ? soft : ink;
        }
      }
    }
  }

  function show() {
    const axis = form.axis.value, [start, end] = ends[axis];
    const from = Math.min(+form.from.value, +form.to.value - 1), to = Math.max(+form.to.value, from + 1);
    for (const figure of figures) {
      for (const model of models(figure)) {
        if (model.type === "GlyphRenderer" && model.glyph.x.field !== axis) model.glyph.x = { field: axis };
        if (/Axis$/.test(model.type) && figure.below.includes(model)) model.formatter.format = formats[axis];
      }
      figure.x_range.setv({ start: start + ((end - start) * from) / 100, end: start + ((end - start) * to) / 100 });
    }
  }

  function begin() {
    figures = Bokeh.documents.flatMap((each) => each.roots());
    if (matchMedia("(pointer: coarse)").matches) for (const figure of figures) figure.toolbar.active_drag = null;
    colours();
    show();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colours);
    form.addEventListener("input", show);
    form.all.addEventListener("click", () => { form.from.value = 0; form.to.value = 100; show(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    document.documentElement.dataset.ready = "yes";
  }

  const wait = () => (window.Bokeh && Bokeh.documents.length ? begin() : setTimeout(wait, 30));
  wait();
})();
