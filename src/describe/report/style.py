"""How the page looks: light or dark as the reader's system is, from a phone's width on. The three texts have colors of
Okabe and Ito, which people who see few colors can tell apart; a bit darker on white, lighter in the dark."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f3; --card: #fff; --ink: #1b1d21; --soft: #5d636d; --rule: #e3e3de;
  --well: #efefea; --raw: #c65500; --caption: #0068a8; --generated: #008a63; --bar: #6b7789; --bad: #b3261e;
  --bad-soft: #fbe6e4; --good: #1b7f4b; }
@media (prefers-color-scheme: dark) { :root { --paper: #121417; --card: #1b1e23; --ink: #e7e9ec; --soft: #9aa1ac;
  --rule: #2c3037; --well: #24282f; --raw: #f1914f; --caption: #62b6f2; --generated: #3ccb9b; --bar: #8b96a8;
  --bad: #ff8a80; --bad-soft: #3b2220; --good: #5fd197; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
  background: var(--paper); margin: 0 auto; max-width: 1240px; padding: 28px 24px 60px; }
h1 { font-size: 1.65em; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2em; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 1em; line-height: 1.35; margin: 0 0 2px; text-wrap: pretty; }
p { margin: 0; } .soft, .why, small { color: var(--soft); } .why { font-size: .86em; margin-bottom: 8px; }
.number, td.number { font-variant-numeric: tabular-nums; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0 18px; font-size: .9em; }
a { color: var(--caption); text-decoration: none; } a:hover { text-decoration: underline; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(126px, 1fr)); gap: 10px; }
.fact, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.fact b { display: block; font-size: 1.4em; line-height: 1.25; font-weight: 650; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.fact > span { color: var(--soft); font-size: .84em; line-height: 1.3; display: block; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px;
  margin-bottom: 14px; }
.card { padding: 14px 16px; min-width: 0; }
.stack { display: grid; gap: 14px; } .note { margin-top: 10px; font-size: .89em; }
.wide { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12.5px system-ui, sans-serif; fill: var(--soft); } svg .label { fill: var(--ink); }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg path { fill: none; } svg .grid { stroke: var(--rule); } svg .axis, svg .mark { stroke: var(--soft); }
svg .limit { stroke: var(--bad); stroke-width: 1.3; stroke-dasharray: 5 4; } svg .limit-text { fill: var(--bad); }
svg .line { stroke-width: 2; stroke-linejoin: round; } svg .bar { fill: var(--bar); }
svg .line.raw { stroke: var(--raw); } svg .line.caption { stroke: var(--caption); }
svg .line.generated { stroke: var(--generated); } svg .area { opacity: .14; }
svg .area.raw, svg .dot.raw { fill: var(--raw); } svg .area.caption, svg .dot.caption { fill: var(--caption); }
svg .area.generated, svg .dot.generated { fill: var(--generated); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: .86em; margin: 2px 0 4px; }
.legend span::before { content: ""; display: inline-block; width: 12px; height: 4px; border-radius: 2px;
  margin-right: 6px; vertical-align: middle; background: var(--bar); }
.legend .raw::before { background: var(--raw); } .legend .caption::before { background: var(--caption); }
.legend .generated::before { background: var(--generated); }
table { border-collapse: collapse; width: 100%; font-size: .89em; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 500; text-align: left; vertical-align: bottom; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); } tr:last-child td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; } td.number, th.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; } td.name { overflow-wrap: normal; min-width: 6em; }
tr.sum td { font-weight: 650; border-top: 1px solid var(--soft); }
.bars { list-style: none; margin: 4px 0 0; padding: 0; font-size: .89em; }
.bars li { display: grid; grid-template-columns: minmax(0, 36%) 1fr 8.8em; gap: 10px; align-items: center;
  padding: 2.5px 0; }
.bars .name { overflow-wrap: anywhere; line-height: 1.3; }
.bars .track { background: var(--well); border-radius: 3px; height: 10px; overflow: hidden; }
.bars .track i { display: block; height: 100%; background: var(--bar); border-radius: 3px; min-width: 1px; }
.bars .raw i { background: var(--raw); } .bars .caption i { background: var(--caption); }
.bars .generated i { background: var(--generated); } .bars .bad i { background: var(--bad); }
.bars .value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.spark { display: inline-flex; align-items: flex-end; gap: 1px; height: 22px; vertical-align: middle; }
.spark i { width: 6px; background: var(--bar); min-height: 1px; } .spark i:first-child { background: var(--good); }
.row { display: grid; grid-template-columns: 224px minmax(0, 1fr); gap: 16px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: 12px; margin-bottom: 12px; overflow: hidden; }
.row img, .row .none { width: 224px; max-width: 100%; border-radius: 6px; display: block; }
.row .none { aspect-ratio: 4 / 3; background: var(--well); color: var(--soft); font-size: .84em; display: grid;
  place-items: center; text-align: center; padding: 12px; overflow-wrap: anywhere; }
.texts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px; }
.texts h4 { font-size: .78em; font-weight: 600; margin: 0 0 2px; color: var(--soft); }
.texts .raw h4 b { color: var(--raw); } .texts .caption h4 b { color: var(--caption); }
.texts .generated h4 b { color: var(--generated); } .texts p { line-height: 1.42; }
.user { overflow-wrap: anywhere; unicode-bidi: isolate; }
.about { display: flex; flex-wrap: wrap; gap: 4px 12px; font-size: .82em; color: var(--soft); margin-bottom: 8px;
  align-items: baseline; } .about .id { font-weight: 650; color: var(--ink); }
.chip { border: 1px solid var(--rule); border-radius: 20px; padding: 0 8px; font-size: .8em; color: var(--soft);
  display: inline-block; margin: 0 4px 4px 0; max-width: 100%; overflow-wrap: anywhere; }
.chip.bad { color: var(--bad); border-color: currentColor; } .tags { margin-top: 10px; }
mark { background: var(--bad-soft); color: var(--bad); border-radius: 3px; padding: 0 2px; }
.refused { margin-top: 10px; border-left: 3px solid var(--bad); padding: 2px 0 2px 10px; font-size: .92em; }
.groups { list-style: none; margin: 0; padding: 0; font-size: .89em; } .groups li { padding: 6px 0;
  border-bottom: 1px solid var(--rule); display: grid; grid-template-columns: 4.2em 1fr; gap: 8px; }
.groups li:last-child { border: 0; } .groups b { font-variant-numeric: tabular-nums; }
.empty { color: var(--soft); padding: 18px 0; text-align: center; background: var(--well); border-radius: 8px;
  font-size: .9em; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--caption); padding: 4px 0; }
pre { background: var(--well); padding: 12px; border-radius: 8px; overflow-x: auto; font-size: .82em; }
@media (max-width: 820px) { .texts { grid-template-columns: 1fr; gap: 8px; } }
@media (max-width: 620px) { body { padding: 18px 12px 40px; } .row { grid-template-columns: 1fr; gap: 10px; }
  .row img { width: 100%; max-height: 300px; object-fit: contain; background: var(--well); }
  .row .none { width: 100%; } .facts { grid-template-columns: repeat(2, 1fr); } svg text { font-size: 15px; }
  .bars li { grid-template-columns: minmax(0, 40%) 1fr 7.6em; gap: 6px; } th, td { padding-right: 10px; } }
@media print { body { background: #fff; } .card, .row, .fact { break-inside: avoid; } }
"""
