"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("curves").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 700px)");

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function traceOf(curve, chart) {
    const trace = {
      type: "scatter", x: curve.x, y: curve.y, name: curve.name,
      line: { color: colour(curve.colour), width: curve.faint ? 1 : curve.line, shape: curve.steps ? "hv" : "linear" },
      mode: curve.points ? "lines+markers" : "lines",
      hovertemplate: `%{y:${chart.format}}${chart.suffix}<extra>${curve.name}</extra>`,
    };
    if (curve.points) trace.marker = { size: curve.x.length > 60 ? 4 : 7, color: colour(curve.colour) };
    if (curve.faint) trace.hoverinfo = "skip", delete trace.hovertemplate;
    return trace;
  }

  function layoutOf(chart) {
    const axis = {
      gridcolor: colour("--grid"), zeroline: false, linecolor: colour("--line"), automargin: true,
      tickfont: { size: 11.5, color: colour("--soft") },
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: getComputedStyle(document.body).fontFamily, color: colour("--ink") },
      margin: { l: 44, r: 8, t: 6, b: 34 }, showlegend: false, hovermode: "x unified",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { size: 12.5, color: colour("--ink") } },
      dragmode: narrow.matches ? false : "zoom",
      xaxis: { ...axis, showgrid: false, tickformat: ",~s", hoverformat: ",d", unifiedhovertitle: { text: "step %{x:,d}" },
               nticks: narrow.matches ? 5 : 9, range: chart.range },
      yaxis: { ...axis, tickformat: chart.ticks, rangemode: chart.from_zero ? "tozero" : "normal", nticks: 6 },
    };
  }

  const options = { displayModeBar: false, responsive: true, showTips: false };
  function draw() {
    for (const chart of charts) {
      Plotly.react(`plot-${chart.id}`, chart.curves.map((curve) => traceOf(curve, chart)), layoutOf(chart), options);
    }
  }
  draw();
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
})();
