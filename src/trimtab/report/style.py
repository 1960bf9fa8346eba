"""The style of a report's page, and the script that draws its figures. Neither fetches anything from the network."""

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --card: #f6f7f9; --text: #1d2129; --quiet: #5b6472; --line: #d9dde3;
        --good: #1a7f37; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171c; --card: #1d2129; --text: #e8eaee; --quiet: #a3acb9; --line: #363d48; --good: #5fd07f;
          --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 1200px; background: var(--back); color: var(--text);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; } .quiet { color: var(--quiet); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .8rem; min-width: 0; }
.card h3 { margin-top: 0; } .figure { width: 100%; min-height: 320px; overflow: hidden; }
.head { display: flex; justify-content: space-between; align-items: baseline; gap: .6rem; min-height: 2rem; }
button { font: inherit; font-size: .85rem; color: var(--text); background: var(--back); border: 1px solid var(--line);
         border-radius: 6px; padding: .2rem .6rem; cursor: pointer; white-space: nowrap; }
button[aria-pressed="true"] { background: var(--text); color: var(--back); }
.wide + .grid, .wide + .wide { margin-top: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
         overflow-wrap: anywhere; }
th { font-weight: 600; } thead th { overflow-wrap: normal; }
tbody th { color: var(--quiet); font-weight: 400; white-space: nowrap; }
td.n, th.n { text-align: right; } td.n { white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); }
table.answers td, table.facts td { min-width: 8rem; } tbody th { min-width: 6rem; overflow-wrap: normal; }
details { margin: .6rem 0; } summary { cursor: pointer; } pre { overflow-x: auto; font-size: .85rem; margin: .4rem 0; }
@media (max-width: 600px) {
  body { padding: .8rem; font-size: 15px; }
  tbody th { white-space: normal; }
  .stack, .stack tbody, .stack tr, .stack th { display: block; } .stack thead { display: none; }
  .stack tr { border-bottom: 1px solid var(--line); padding: .35rem 0; }
  .stack tbody th { border: 0; padding: 0; color: var(--text); }
  .stack td { display: grid; grid-template-columns: minmax(4.5rem, 28%) 1fr; gap: .8rem; border: 0; padding: .1rem 0; }
  .stack td.n { grid-template-columns: 1fr auto; }
  .stack td::before { content: attr(data-label); color: var(--quiet); text-align: left; overflow-wrap: anywhere; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
}
"""
SCRIPT = """
const on = new Set();  // figures whose switch is on
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }
function axis(given) {
  return Object.assign({ gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"),
                         automargin: true }, given);
}
function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    for (const line of figure.layout.shapes || []) line.line.color = colour(line.name || "--bad");
    for (const note of figure.layout.annotations || []) note.font = { color: colour(note.name || "--bad") };
    const switched = on.has(id) ? figure.switch.yaxis : {};
    const layout = Object.assign({ height: 320 }, figure.layout, {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: { color: colour("--text"), family: "system-ui, 'DejaVu Sans', sans-serif", size: 12 },
      margin: { l: 8, r: 12, t: 12, b: 8 },
      xaxis: axis(figure.layout.xaxis), yaxis: axis(Object.assign({}, figure.layout.yaxis, switched)),
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    });
    Plotly.react(id, figure.data, layout, { responsive: true, displayModeBar: false });
  }
}
draw();
const resized = new ResizeObserver(seen => seen.forEach(entry => Plotly.Plots.resize(entry.target)));
for (const id of Object.keys(figures)) resized.observe(document.getElementById(id));
for (const button of document.querySelectorAll("button[data-figure]")) {
  button.addEventListener("click", () => {
    const id = button.dataset.figure;
    if (!on.delete(id)) on.add(id);
    button.setAttribute("aria-pressed", on.has(id));
    draw();
  });
}
dark.addEventListener("change", draw);
"""
