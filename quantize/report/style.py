"""How the page looks, and the little it does.

Colours are variables, so that light and dark differ in one place. The script only adds tooltips and
makes cells of the maps lead to their numbers; all numbers are there without it.
"""

CSS = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--line:#e3e6eb;--text:#171a20;
--dim:#5d6573;--link:#1f5fbf;--bad:#d42a3c;--bad-page:#fdf0f1;--warn:#96610a;--warn-page:#fdf6e7;
--good:#1c7a49;--good-page:#edf8f1;--moe:#2c728e;--linear:#5ec962;--rest:#b9c0cb;--bar:#3b6f9e;
--paper:#fff;--ink:#9aa2af;--shade:#f1f3f6}
@media(prefers-color-scheme:dark){:root{--page:#0f1216;--card:#171b21;--line:#2a303a;--text:#e8ebf0;
--dim:#9aa3b2;--link:#82b4ff;--bad:#ff6b78;--bad-page:#2a171b;--warn:#e9b252;--warn-page:#271f11;
--good:#5fd394;--good-page:#12241b;--moe:#3fa0bf;--linear:#5ec962;--rest:#4a5361;--bar:#6fa8dc;
--paper:#2a303a;--ink:#8b94a3;--shade:#1d222a}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1160px;margin:0 auto;padding:36px 20px 64px}
h1,h2,h3,p,ul,dl,figure,table{margin:0;padding:0}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;overflow-wrap:anywhere}
h2{font-size:18px;letter-spacing:-.01em}
h3{font-size:13px;font-weight:500;color:var(--dim)}
a{color:var(--link);text-decoration:none}
a:hover{text-decoration:underline}
code,pre,.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.9em}
code,.name{overflow-wrap:anywhere}
ul{list-style:none}
.defs{position:absolute}
.kicker{font-size:13px;font-weight:600;color:var(--moe);letter-spacing:.02em}
.from{color:var(--dim);margin-top:4px}
.setup{display:flex;flex-wrap:wrap;gap:2px 26px;margin-top:10px}
.setup b{font-weight:500}
.setup span{color:var(--dim);margin-right:8px;font-weight:400}
.card,.tile,.verdict{background:var(--card);border:1px solid var(--line);border-radius:12px}
section{margin-top:16px}
.card{padding:22px 24px 24px}
.about{color:var(--dim);margin-top:4px;max-width:84ch}
.verdict{display:flex;gap:14px;padding:16px 20px;margin-top:22px;border-left-width:5px}
.verdict p{color:var(--dim)}
.verdict ul{margin-top:8px}
.verdict li{margin-top:4px;overflow-wrap:anywhere}
.verdict li b{font-weight:600}
.mark{flex:none;width:28px;height:28px;border-radius:50%;color:var(--card);font-weight:700;
display:grid;place-items:center}
.good{border-left-color:var(--good);background:var(--good-page)}.good .mark{background:var(--good)}
.warn{border-left-color:var(--warn);background:var(--warn-page)}.warn .mark{background:var(--warn)}
.bad{border-left-color:var(--bad);background:var(--bad-page)}.bad .mark{background:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:16px}
.tile{padding:14px 18px}
.big{font-size:28px;font-weight:650;letter-spacing:-.02em;line-height:1.25}
.big small{font-size:14px;font-weight:400;color:var(--dim);letter-spacing:0}
.sizes{grid-column:1/-1;padding:16px 24px}
.sizes table{width:100%;border-collapse:collapse}
.sizes th{text-align:left;font-weight:500;color:var(--dim);width:64px}
.sizes td{white-space:nowrap;padding:3px 14px 3px 0;font-weight:600;width:1%}
.sizes .bars{width:auto;padding-right:0}
.bars div{display:flex;height:14px;border-radius:4px;overflow:hidden;background:var(--shade)}
.key,.legend ul{display:flex;flex-wrap:wrap;gap:4px 22px;color:var(--dim);font-size:13px}
.key{margin-top:8px}
.key i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:7px}
i.moe{background:var(--moe)}i.linear{background:var(--linear)}i.rest{background:var(--rest)}
.legend{display:flex;flex-wrap:wrap;align-items:flex-start;gap:12px 36px;margin:16px 0 18px}
.legend ul{flex:1 1 320px;flex-direction:column}
.legend li{display:flex;align-items:center;gap:8px}
.legend li b{font-weight:600;color:var(--text)}
.ramp{width:380px;max-width:100%;font-size:12px}
.ramp div{height:14px;border-radius:4px}
.ramp p{display:flex;justify-content:space-between}
.ramp p+p{color:var(--dim);line-height:1.2}
figcaption{font-size:13px;font-weight:600;margin-bottom:4px}
.wide{overflow-x:auto}
svg{display:block}
svg text{fill:var(--dim);font-size:11px;text-anchor:end}
svg .top,svg .tick{text-anchor:middle}
svg .note{text-anchor:start}
a text{cursor:pointer}
a:hover text{fill:var(--link)}
.map image{image-rendering:pixelated}
svg[data-live]{cursor:crosshair}
.grid{stroke:var(--card);fill:none;stroke-width:1;shape-rendering:crispEdges}
path.far{fill:#d42a3c}
path.zero{fill:url(#hatch)}
path.exact{fill:var(--paper);stroke:var(--ink);stroke-width:1}
.ring,.halo{fill:none;stroke-width:2}
.halo{stroke:#fff;stroke-width:4.5}
.ring.far{stroke:#d42a3c}.ring.zero{stroke:#171a20}
.ring.exact{stroke:#fff}.halo.exact{stroke:#171a20}
.paper{fill:var(--paper)}.ink{fill:var(--ink)}
.small{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:20px 24px;margin-top:20px}
.scroll{overflow:auto;max-height:420px}
table.worst,table.numbers{border-collapse:collapse;font-size:14px;width:100%}
caption{text-align:left;font-size:13px;font-weight:600;padding-bottom:4px}
.worst,.numbers{margin-top:0}
.small+.scroll{margin-top:24px}
.worst th,.worst td,.numbers th,.numbers td{text-align:left;padding:4px 14px 4px 0;
border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
.worst thead th,.numbers thead th{color:var(--dim);font-size:13px;position:sticky;top:0;
background:var(--card)}
.numbers th,.numbers td{text-align:right}
td.far,tr.far td:nth-child(n+4){color:var(--bad);font-weight:600}
td.zero,td.exact{color:var(--warn);font-weight:600}
tr:target{background:var(--warn-page);outline:2px solid var(--warn);outline-offset:-2px}
tr[id]{scroll-margin:90px}
.head,.total,summary{display:grid;gap:16px;align-items:center;
grid-template-columns:minmax(0,1.6fr) 150px minmax(170px,.9fr) minmax(150px,.8fr) minmax(86px,.5fr)}
.calibration :is(.head,.total,summary){
grid-template-columns:minmax(0,1fr) 150px minmax(0,180px) 280px minmax(0,100px)}
.head{font-size:13px;color:var(--dim);padding:12px 0 4px 20px}
.total{padding:5px 0 9px 20px;font-size:14px}
summary{padding:5px 0 5px 20px;cursor:pointer;list-style:none;position:relative;font-size:14px}
summary::-webkit-details-marker{display:none}
summary::before{content:"";position:absolute;left:4px;top:50%;width:6px;height:6px;
border:solid var(--dim);border-width:0 1.5px 1.5px 0;transform:translate(0,-60%) rotate(-45deg)}
details[open]>summary::before{transform:translate(0,-75%) rotate(45deg)}
summary:hover{background:var(--shade)}
details{border-top:1px solid var(--line)}
.alone summary{display:block}
.chip{display:inline-block;font-size:12px;font-weight:600;padding:0 8px;border-radius:9px;
white-space:nowrap;margin-right:4px}
.chip.far{color:var(--bad);background:var(--bad-page)}
.chip.zero,.chip.exact,.chip.few{color:var(--warn);background:var(--warn-page)}
.verdict .chip{background:var(--card);border:1px solid;margin-right:8px}
.inside{display:grid;grid-template-columns:minmax(0,540px) minmax(0,1fr);gap:32px;
padding:14px 0 24px 20px;scroll-margin-top:60px}
.inside p{color:var(--dim);font-size:13px;margin-top:8px}
.histogram{max-width:100%;height:auto}
.spark{overflow:visible}
.bar{fill:var(--bar)}
.histogram .bar:hover{fill:var(--moe)}
.few{fill:var(--warn)}.few-page{fill:var(--warn-page)}
.axis{stroke:var(--ink);fill:none;stroke-width:1}
.shade{fill:var(--shade)}
dl{display:grid;align-content:start;grid-template-columns:110px minmax(0,1fr);gap:8px 16px;
margin-top:12px}
dt{color:var(--dim)}
dd{margin:0}
pre{margin:0;padding:10px 14px;background:var(--shade);border-radius:8px;white-space:pre-wrap}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--text);color:var(--page);
font-size:13px;line-height:1.45;padding:7px 11px;border-radius:8px;white-space:pre;max-width:90vw}
@media(max-width:900px){.tiles{grid-template-columns:repeat(2,1fr)}
.small{grid-template-columns:minmax(0,1fr)}.head{display:none}
.total,summary,.calibration :is(.total,summary){grid-template-columns:1fr 150px;gap:2px 12px}
.inside{grid-template-columns:minmax(0,1fr)}.card{padding:18px 16px}}
@media print{.scroll{max-height:none}body{background:none}}
"""

JS = """
(() => {
  const tip = document.getElementById("tip");
  const rowAt = (map, event) => {
    const box = map.getBoundingClientRect(), d = map.dataset;
    const column = Math.floor((event.clientX - box.left - d.x) / d.w);
    const row = Math.floor((event.clientY - box.top - d.y) / d.h);
    return document.getElementById(`${d.key}${row}-${column}`);
  };
  for (const map of document.querySelectorAll("svg[data-key]")) {
    map.dataset.live = "";
    map.addEventListener("mousemove", (event) => {
      const row = rowAt(map, event);
      tip.hidden = !row;
      if (!row) return;
      const table = row.closest("table"), heads = table.tHead.rows[0].cells;
      const lines = Array.from(
        row.cells, (cell, i) => `${heads[i].textContent} ${cell.textContent}`);
      tip.textContent = [table.caption.textContent, ...lines].join("\\n");
      const x = event.clientX + 16, y = event.clientY + 16;
      tip.style.left = `${Math.min(x, innerWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${Math.min(y, innerHeight - tip.offsetHeight - 8)}px`;
    });
    map.addEventListener("mouseleave", () => { tip.hidden = true; });
    map.addEventListener("click", (event) => {
      const row = rowAt(map, event);
      if (!row || event.target.closest("a")) return;
      row.closest("details").open = true;
      location.hash = row.id;
    });
  }
})();
"""
