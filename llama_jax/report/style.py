"""The style sheets of the pages."""

COLOURS = {
    'ink': ('#1c1e21', '#e6e7e9'),
    'soft': ('#5f6670', '#9aa1ab'),
    'line': ('#e3e4e6', '#303338'),
    'trend': ('#1f5fbf', '#7fb0f5'),
    'raw': ('#a9c4ea', '#35527d'),
    'held-out': ('#c2571a', '#f0975a'),
    'xz': ('#6b4fa0', '#b59be6'),
    'zlib': ('#2e7d5b', '#6cc49a'),
}
"""On light and on dark: of text and lines, and of the curves of one run."""

ARM_COLOURS = (
    *(('#1f5fbf', '#7fb0f5'), ('#c2571a', '#f0975a'), ('#2e7d5b', '#6cc49a')),
    *(('#8a45b8', '#c79bf0'), ('#c0284f', '#f5839d'), ('#0b7f8c', '#4fc3d0')),
    *(('#8a6d00', '#d9b83f'), ('#b03a9e', '#ea8bdb'), ('#7a5236', '#cfa684')),
    *(('#5b6470', '#a6aeb8'),),
)
"""Colours of the arms of a comparison, on light and on dark; then they begin anew, dashed."""


def arm_style(index: int) -> str:
    """Classes of the arm at `index` of the grid."""
    turn, colour = divmod(index, len(ARM_COLOURS))
    return f'arm arm-{colour}' + ' again' * bool(turn)


def arm_colour(index: int) -> tuple[str, str]:
    """On light and on dark."""
    return ARM_COLOURS[index % len(ARM_COLOURS)]


def _variables(dark: bool) -> str:
    """Colours by name, and those of drawings by what they are on light: --c-1f5fbf."""
    named = {f'--{name}': pair[dark] for name, pair in COLOURS.items()}
    drawn = {f'--c-{x[0][1:]}': x[dark] for x in (*COLOURS.values(), *ARM_COLOURS)}
    return ' '.join(f'{name}: {value};' for name, value in {**named, **drawn}.items())


CSS = (
    f':root {{ {_variables(False)} }}\n'
    f'@media (prefers-color-scheme: dark) {{ :root {{ {_variables(True)} }} }}'
    """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #fff; --mark: #edf2fa;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #131416; --card: #1a1c1f; --mark: #222b38; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 44px 0 12px; }
p { margin: 0; }
.soft, .note, .axis, .missing { color: var(--soft); }
.lead { color: var(--soft); margin-top: 6px; overflow-wrap: anywhere; }
.note { font-size: 13px; margin-top: 8px; }
.warning { border-left: 3px solid var(--held-out); padding: 2px 0 2px 12px; margin-top: 12px; }
sup { line-height: 0; font-size: .75em; }

.top { display: grid; grid-template-columns: 5fr 7fr; gap: 16px; margin-top: 28px; }
.card, figure {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px;
}
.card h3 { font-size: 13px; font-weight: 600; margin: 0; color: var(--soft); }
.big { font-size: 44px; font-weight: 600; line-height: 1.15; letter-spacing: -.02em; }
.big small { font-size: 15px; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 9px 10px; margin: 16px 0 14px;
  align-items: center; font-size: 13px; }
.bars b { font-weight: 400; }
.bars i { display: block; height: 14px; border-radius: 2px; background: currentColor; }
.bars .held-out { color: var(--held-out); }
.bars .xz { color: var(--xz); opacity: .75; }
.bars .zlib { color: var(--zlib); opacity: .75; }
.facts { display: grid; grid-template-columns: repeat(3, 1fr); gap: 18px 16px; margin: 0; }
.facts dt { font-size: 13px; color: var(--soft); }
.facts dd { margin: 0; font-size: 23px; font-weight: 600; line-height: 1.25; white-space: nowrap; }
.facts dd small { display: block; font-size: 12px; font-weight: 400; color: var(--soft);
  white-space: normal; }
.num, .bars, .facts dd, figure { font-variant-numeric: tabular-nums; }

.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 0; min-width: 0; }
figcaption span { color: var(--soft); }
.keys { font-size: 12px; color: var(--soft); min-height: 20px; display: flex; flex-wrap: wrap;
  gap: 0 14px; }
.key::before { content: ''; display: inline-block; width: 14px; height: 0; margin-right: 5px;
  border-top: 2px solid currentColor; vertical-align: 4px; }
.key.raw::before { border-color: var(--raw); }
.key.trend::before { border-color: var(--trend); }
.key.held-out::before { border-color: var(--held-out); }
figure svg { display: block; width: 100%; height: auto; margin-top: 6px; overflow: visible;
  stroke-linejoin: round; }
.axis { font-size: 12px; text-align: center; margin-top: -2px; }
.missing { padding: 36px 12px; text-align: center; }

details { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  margin-top: 8px; }
summary { cursor: pointer; padding: 9px 14px; font-weight: 600; }
summary span { font-weight: 400; color: var(--soft); margin-left: 6px; }
details > :not(summary) { margin: 0 14px 14px; }
pre, code, td { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono',
  'Noto Sans Mono CJK SC', monospace; font-size: 13px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45; tab-size: 4;
  unicode-bidi: isolate; border-top: 1px solid var(--line); padding-top: 12px; max-height: 32em;
  overflow-y: auto; }
pre b { background: var(--mark); color: var(--trend); border-radius: 2px; }
pre.command { border: 0; padding: 0; margin: 0; }
table { border-collapse: collapse; width: calc(100% - 28px); }
td, th { text-align: left; vertical-align: top; padding: 3px 12px 3px 0;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 400; color: var(--soft); font-size: 13px; width: 40%; }
td pre { border: 0; padding: 0; margin: 0; }
.card table { width: 100%; }
.events th { width: 8em; }
.pair { margin-top: 12px; }
.pair th { width: 6em; }
.card tr:first-child > * { border-top: 0; }
footer { margin-top: 40px; font-size: 13px; color: var(--soft); }

@media (max-width: 800px) {
  main { padding: 22px 14px 48px; }
  .top, .charts { grid-template-columns: minmax(0, 1fr); }
  .facts { grid-template-columns: repeat(2, 1fr); }
  h1 { font-size: 25px; }
  h2 { margin-top: 34px; }
  th { width: 57%; }
  .card, figure { padding: 14px; }
}
@media print {
  .top, .charts { break-inside: avoid; }
  pre { max-height: none; }
}
"""
)


def _arms(dark: bool) -> str:
    return ' '.join(f'.arm-{i} {{ --arm: {c[dark]}; }}' for i, c in enumerate(ARM_COLOURS))


SERIES_CSS = (
    _arms(False)
    + f'\n@media (prefers-color-scheme: dark) {{ {_arms(True)} }}'
    + """
.key.arm::before { border-color: var(--arm); }
.key.again::before { border-top-style: dashed; }
"""
)
"""Curves of several arms or sets."""

TABLE_CSS = """
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.data { width: 100%; font-variant-numeric: tabular-nums; }
.data th, .data td { font-family: inherit; font-size: 13px; padding: 5px 16px 5px 0; width: auto;
  overflow-wrap: normal; white-space: nowrap; vertical-align: baseline; }
.data th:last-child, .data td:last-child { padding-right: 0; }
.data thead th { border-top: 0; vertical-align: bottom; line-height: 1.35; white-space: pre-line; }
.data .right { text-align: right; }
.data tbody th { color: var(--ink); position: sticky; left: 0; background: var(--card); }
.data .wide { white-space: normal; overflow-wrap: anywhere; min-width: 16em; }
.data .none { color: var(--soft); }
.data .code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono',
  'Noto Sans Mono CJK SC', monospace; font-size: 12px; }
.data tr.open th, .data tr.open td, .data tr.beside th, .data tr.beside td { color: var(--soft); }
.data tr.beside th { font-style: italic; }
.data b { font-weight: 700; }
.tables .card + .card, .charts + .card { margin-top: 12px; }
@media (max-width: 800px) {
  .data th, .data td { padding-right: 12px; }
  .data tbody th { padding-right: 10px; }
}
"""
"""Tables of `tables.Table`."""

COMPARISON_CSS = (
    SERIES_CSS
    + TABLE_CSS
    + """
main { max-width: 1280px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-top: 18px; font-size: 13px; }
a { color: var(--trend); text-decoration: none; }
a:hover { text-decoration: underline; }
.key.front::before { border-color: var(--soft); border-top-style: dashed; }
.key.absent::before { border-top-style: dotted; }
.key.cloud::before { height: 9px; width: 9px; border: 0; border-radius: 50%;
  background: var(--arm); vertical-align: -1px; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 7px;
  background: var(--arm); }
.card + .card { margin-top: 12px; }
h2 + .soft { margin-bottom: 12px; }
.card pre { border: 0; padding: 0; margin: 6px 0 0; }
figure .note { margin-top: 4px; }
"""
)
"""What the page of a comparison adds."""
