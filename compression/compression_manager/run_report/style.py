"""The style sheet of the pages: light and dark, on screen and on paper."""

STYLE = """\
:root {
  --back: #f6f7f9; --card: #ffffff; --text: #1c2024; --quiet: #5f6b76; --rule: #dfe3e8;
  --c0: #1c6dd0; --c1: #d9730d; --c2: #2b8a3e; --c3: #c2255c;
  --c4: #7048e8; --c5: #0b7285; --c6: #846a00; --c7: #495057;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171a; --card: #1d2125; --text: #e6e9ec; --quiet: #9aa5b1; --rule: #343a40;
    --c0: #6cb2ff; --c1: #ffa94d; --c2: #69db7c; --c3: #faa2c1;
    --c4: #b197fc; --c5: #66d9e8; --c6: #ffd43b; --c7: #ced4da;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 34px 0 10px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
p { margin: 6px 0; }
.remark { color: var(--quiet); max-width: 75ch; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 12px;
  margin: 20px 0; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px; }
.card span { color: var(--quiet); font-size: 13px; display: block; }
.card b { font-size: 18px; font-weight: 650; line-height: 1.35; display: block; }
figure { margin: 0 0 14px; padding: 12px 14px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 8px; break-inside: avoid; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
figcaption small { font-weight: 400; font-size: 12px; color: var(--quiet); margin-left: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11px; fill: var(--quiet); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke: currentColor; }
.faint { stroke-width: 1; opacity: .28; }
.band { fill: var(--c0); opacity: .16; }
.grid { stroke: var(--rule); fill: none; }
.zero { stroke: var(--quiet); stroke-dasharray: 3 3; fill: none; opacity: .7; }
circle { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.c6 { color: var(--c6); } .c7 { color: var(--c7); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 20px; margin: 6px 0 0;
  padding: 0; font-size: 13px; }
.key { display: inline-block; width: 14px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.pairs { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(430px, 100%), 1fr));
  margin-bottom: 12px; }
.pairs figure { margin: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px; }
.tiles figure { margin: 0; padding: 8px 10px; }
.tiles figcaption { font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; background: var(--card);
  border: 1px solid var(--rule); }
th, td { text-align: left; padding: 5px 10px; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: anywhere; }
th { color: var(--quiet); font-weight: 600; font-size: 13px; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  padding: 12px 14px; overflow-x: auto; font-size: 13px; line-height: 1.45; }
details > summary { cursor: pointer; }
.layers { background: var(--card); border: 1px solid var(--rule); border-radius: 8px;
  overflow-x: auto; }
.layers > * { min-width: 760px; border-bottom: 1px solid var(--rule); }
.layers > :last-child { border-bottom: 0; }
.row { display: grid; gap: 12px; padding: 6px 14px; align-items: center; font-size: 14px;
  grid-template-columns: minmax(150px, 5fr) minmax(90px, 3fr) 62px 62px 130px 86px 86px 78px; }
.row > :nth-child(n+6) { text-align: right; font-variant-numeric: tabular-nums; }
.row > :nth-child(-n+2) { overflow-wrap: anywhere; }
summary.row > :first-child::before { content: "\\25B8"; color: var(--quiet); margin-right: 6px; }
details[open] > summary.row > :first-child::before { content: "\\25BE"; }
summary.row { list-style: none; }
summary.row::-webkit-details-marker { display: none; }
.head { color: var(--quiet); font-size: 13px; font-weight: 600; }
.total { font-weight: 650; }
.float { color: var(--quiet); }
.inside { padding: 2px 14px 12px 30px; }
.inside table { font-size: 13px; }
.bar { height: 12px; background: color-mix(in srgb, var(--c0) 22%, transparent);
  border-radius: 3px; overflow: hidden; min-width: 1px; }
.bar i { display: block; height: 100%; background: var(--c0); }
@media print {
  body { background: none; font-size: 12px; }
  main { max-width: none; padding: 0; }
  details::details-content { content-visibility: visible; block-size: auto; }
  h2 { break-after: avoid; }
  .pairs { grid-template-columns: 1fr 1fr; }
  .layers { overflow: visible; }
  .layers > * { min-width: 0; }
  .row { gap: 8px; padding: 4px 8px; font-size: 12px;
    grid-template-columns: minmax(80px, 2fr) minmax(70px, 1fr) 42px 42px 80px 60px 60px 56px; }
  .inside { padding: 2px 8px 8px; }
  .inside table { font-size: 10px; }
  .inside th, .inside td { padding: 3px 5px; font-size: inherit; }
  tr, .row { break-inside: avoid; }
}
"""
