"""report.html: one file, no script, nothing from the network. Every title says what was found in this job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from .gallery import Thumbnails, draw_rows, user
from .numbers import CONTEXT, SAMPLES, TEXTS, plain
from .plots import Curve, draw_bars, draw_curves
from .style import STYLE

NAMES = {"raw": "Raw", "caption": "Caption", "generated": "Generated"}
SECTIONS = {
    "rows": "Rows in, rows out",
    "texts": "The three texts",
    "tags": "Tags and facts",
    "support": "Is it true?",
    "clip": "Image-text match",
    "repeats": "Repetition",
    "cost": "Failures, time and cost",
    "worst": "Worst rows",
    "random": "Random rows",
    "settings": "Settings",
}
Results = Mapping[str, Any]


def draw_page(
    results: Results, worst: Sequence[dict[str, Any]], random: Sequence[dict[str, Any]], thumbnails: Thumbnails
) -> Iterator[bytes]:
    """The page in pieces. results: the content of report.json; worst, random: rows to show (of `cut_row`)."""
    title = plain(results["about"].get("title") or "Descriptions", 160)
    yield (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>\n'
    ).encode()
    yield _head(title, results).encode()
    drawn = {
        "rows": _draw_account,
        "texts": _draw_texts,
        "tags": _draw_tags,
        "support": _draw_support,
        "clip": _draw_clip,
        "repeats": _draw_repeats,
        "cost": _draw_cost,
    }
    for name, draw in drawn.items():
        yield f'<h2 id="{name}">{SECTIONS[name]}</h2>\n{draw(results)}\n'.encode()
    why = {
        "worst": f"Up to {SAMPLES}: most unsupported nouns first, then most rejects, then the lowest CLIP score.",
        "random": f"Up to {SAMPLES}, by a hash of the id: the same rows in every report of these data.",
    }
    for name, rows in (("worst", worst), ("random", random)):
        yield f'<h2 id="{name}">{SECTIONS[name]}</h2>\n<p class="why">{why[name]}</p>\n'.encode()
        yield draw_rows(rows, thumbnails).encode()
    yield f'<h2 id="settings">{SECTIONS["settings"]}</h2>\n{_draw_settings(results)}\n</body></html>\n'.encode()


# ---- pieces of a page ------------------------------------------------------------------------------------------------


def _card(title: str, why: str, content: str) -> str:
    return f'<section class="card"><h3>{title}</h3><p class="why">{why}</p>{content}</section>'


def _pair(*cards: str) -> str:
    return f'<div class="pair">{"".join(cards)}</div>'


def _empty(text: str) -> str:
    return f'<div class="empty">{text}</div>'


def _legend(texts: Sequence[str]) -> str:
    return '<div class="legend">' + "".join(f'<span class="{text}">{NAMES[text]}</span>' for text in texts) + "</div>"


def _bars(bars: Sequence[tuple[str, float, str, str]]) -> str:
    """(name, share of the track 0..1, value as shown, class) lying bars."""
    lines = (
        f'<li class="{kind}"><span class="name user" dir="auto">{escape(plain(name, 120))}</span>'
        f'<span class="track"><i style="width:{100 * min(1, max(0, share)):.1f}%"></i></span>'
        f'<span class="value">{value}</span></li>'
        for name, share, value, kind in bars
    )
    return f'<ul class="bars">{"".join(lines)}</ul>'


def _counted(counts: Mapping[str, int], whole: int, kind: str = "") -> str:
    """Bars of counts, each as a share of `whole`, the longest one filling the track."""
    most = max(counts.values(), default=1)
    return _bars([(name, n / most, f"{n:,} &middot; {percent(n, whole)}", kind) for name, n in counts.items()])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], last_is_sum: bool = False) -> str:
    """The first column holds names, the others numbers."""
    heads = "".join(f"<th{' class=number' if place else ''}>{name}</th>" for place, name in enumerate(head))
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="sum"' if last_is_sum and number == len(rows) - 1 else ""
        cells = (f'<td class="{"number" if place else "name"}">{cell}</td>' for place, cell in enumerate(row))
        lines.append(f"<tr{kind}>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def percent(part: float, whole: float) -> str:
    """A share for people: 12.3 %; what is not quite 0 or 100 % does not look like it."""
    if not whole:
        return "-"
    share = 100 * part / whole
    if 0 < share < 0.05:
        return "&lt; 0.1 %"
    return "&gt; 99.9 %" if 99.95 < share < 100 else f"{share:.1f} %"


def _duration(seconds: float) -> str:
    """Seconds in a unit that people read."""
    for least, size, name in ((3 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / size:,.1f} {name}"
    return f"{seconds:.3g} s"


def _money(amount: float | None, currency: object) -> str:
    return "-" if amount is None else f"{amount:,.2f} {user(plain(currency or '', 12))}"


# ---- sections --------------------------------------------------------------------------------------------------------


def _head(title: str, results: Results) -> str:
    rows, tokens = results["rows"], results["tokens"].get("generated")
    rates = results["composers"].values()
    judged = sum(rate["rows"] for rate in rates)
    mean = sum(rate["mean"] * rate["rows"] for rate in rates)
    repeats = results["duplicates"]["exact"] + results["duplicates"]["near"]
    facts = [
        (f"{rows['in']:,}", "rows in"),
        (f"{rows['kept']:,}" if rows["undecided"] < max(1, rows["in"]) else "-", "rows kept"),
        (f"{results['words']['generated']['texts']:,}", "generated texts"),
        (percent(mean, judged), "of their nouns without support"),
        (percent(tokens["over"], tokens["rows"]) if tokens else "-", f"longer than {CONTEXT} tokens"),
        (percent(repeats, rows["in"]), "repeat another row"),
        (_duration(results["cost"]["seconds"]) if results["stages"] else "-", "of work"),
    ]
    if results["cost"]["money"] is not None:
        facts.append((_money(results["cost"]["money"], results["cost"]["currency"]), "for tokens"))
    cards = "".join(f'<div class="fact"><b>{value}</b><span>{name}</span></div>' for value, name in facts)
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in SECTIONS.items())
    subtitle = "Raw text + caption + tags &rarr; a third text for each picture. All numbers are in report.json, too."
    return f'<h1>{user(title)}</h1><p class="soft">{subtitle}</p><nav>{links}</nav><div class="facts">{cards}</div>\n'


def _draw_account(results: Results) -> str:
    rows = results["rows"]
    lines = [("kept", rows["kept"]), *((f"dropped: {why}", n) for why, n in rows["dropped"].items())]
    if rows["undecided"]:
        lines.append(("not selected yet", rows["undecided"]))
    table = [(user(name), f"{n:,}", percent(n, rows["in"])) for name, n in lines]
    table.append(("rows in", f"{sum(n for _, n in lines):,}", ""))
    dropped = sum(rows["dropped"].values())
    title = f"{rows['kept']:,} of {rows['in']:,} rows are kept, {dropped:,} dropped"
    if rows["in"] and rows["undecided"] == rows["in"]:
        title = f"Rows in: {rows['in']:,}, none selected or dropped yet"
    account = _card(title, "Every row is in exactly one line.", _table(["", "rows", "share"], table, last_is_sum=True))
    engines, written = results["engines"], sum(results["engines"].values())
    top = next(iter(engines.items()), None)
    title = f"{percent(top[1], written)} of the texts are by {user(plain(top[0], 60))}" if top else "No text was chosen"
    why = "Whose text was taken. Where the composer's was rejected or missing, rules, caption or raw text stand in."
    return _pair(account, _card(title, why, _counted(engines, written) if top else _empty("not measured")))


def _draw_texts(results: Results) -> str:
    tokens, words = results["tokens"], results["words"]
    curves = []
    for text, counts in tokens.items():
        shares = {int(length): n / counts["rows"] for length, n in counts["histogram"].items()}
        most = max(CONTEXT + 10, min(max(shares), 160))
        bins = [(start, sum(shares.get(start + k, 0) for k in range(3))) for start in range(0, most, 3)]
        curves.append(Curve(NAMES[text], text, bins))
    generated = tokens.get("generated")
    title = "Token lengths were not measured"
    if generated:
        over = f"{percent(generated['over'], generated['rows'])} have" if generated["over"] else "none has"
        title = f"Half of the generated texts have up to {generated['median']} tokens; {over} more than {CONTEXT}"
    why = f"CLIP tokens, start and end included, in bins of 3. What lies right of {CONTEXT} is cut off in training."
    plot = draw_curves(curves, "tokens", "share of texts", title, steps=True, line=(CONTEXT, f"context {CONTEXT}"))
    lengths = _card(title, why, _legend(list(tokens)) + plot if tokens else _empty("not measured"))
    present = [text for text in TEXTS if words[text]["texts"]]
    growth = [Curve(NAMES[text], text, words[text]["growth"]) for text in present]
    ratio = words["generated"]["vocabulary"] / max(1, words["raw"]["vocabulary"])
    title = f"The generated texts use {ratio:.2f} times as many different words as the raw ones"
    if "raw" not in present or "generated" not in present:
        title = "Different words"
    why = "Different words up to there, in the order of the rows. The flatter, the more the texts repeat their words."
    plot = draw_curves(growth, "texts", "different words", title)
    vocabulary = _card(title, why, _legend(present) + plot if present else _empty("there are no texts"))
    return _pair(lengths, vocabulary) + _pair(_draw_lengths(results))


def _draw_lengths(results: Results) -> str:
    rows = []
    for text in TEXTS:
        words, tokens = results["words"][text], results["tokens"].get(text)
        if words["texts"]:
            lengths = [f"{tokens[name]:,}" if tokens else "-" for name in ("median", "p95", "longest")]
            over = percent(tokens["over"], tokens["rows"]) if tokens else "-"
            distinct = (words[f"distinct_{size}"] for size in (1, 2, 3))
            shares = ["-" if share is None else f"{share:.3f}" for share in distinct]
            rows.append([NAMES[text], f"{words['texts']:,}", *lengths, over, f"{words['vocabulary']:,}", *shares])
    head = ["", "texts", "median tokens", "95 % up to", "longest", f"over {CONTEXT}", "different words"]
    why = "distinct-n: different runs of n words / all of them. Lower: more repetition; it falls as a set grows."
    table = _table([*head, "distinct-1", "distinct-2", "distinct-3"], rows) if rows else _empty("there are no texts")
    return _card("Length and variety in figures", why, table)


def _draw_survival(results: Results) -> str:
    kept, facts = results["survival"], results["facts"]
    bars = []
    for name, share in (
        (f"rare words (in {kept['rare_rows']} rows or fewer)", kept["rare_share_kept"]),
        ("all words", kept["share_kept"]),
    ):
        if share is not None:
            bars.append((name, share, percent(share, 1), "generated"))
    title = "What survives of the raw texts is not known"
    if kept["rare_share_kept"] is not None:
        title = f"{percent(kept['rare_share_kept'], 1)} of the rare words of raw texts survive"
    why = "Words that the raw and the generated text of a row share. Rare ones are what only the raw text knows."
    content = _bars(bars) if bars else _empty("no row has both texts")
    if facts["rows"]:
        lost, share = f"{facts['lost']:,}", percent(facts["losing"], facts["rows"])
        content += f'<p class="note">{share} of the rows lose a fact (a number or a name) of their raw text, {lost} '
        content += "facts in all.</p>"
    return _card(title, why, content)


def _draw_tags(results: Results) -> str:
    tags = results["tags"]
    if not tags["rows"]:
        return _pair(_card("No row has tags", "", _empty("not measured")), _draw_survival(results))
    counts = {int(number): n for number, n in tags["per_image"].items()}
    mean = sum(number * n for number, n in counts.items()) / tags["rows"]
    title = f"A picture has {mean:.1f} tags; {percent(counts.get(0, 0), tags['rows'])} have none"
    sources = ", ".join(f"{user(plain(name, 60))} ({n:,})" for name, n in [*tags["sources"].items()][:5])
    last = min(max(counts), 40)
    shares = [(number, counts.get(number, 0) / tags["rows"]) for number in range(last)]
    shares.append((last, sum(n for number, n in counts.items() if number >= last) / tags["rows"]))
    plot = draw_bars(shares, "tags" + (f" ({last}: or more)" if max(counts) > last else ""), "share of pictures", title)
    per_image = _card(title, f"Tags by source: {sources}.", plot)
    coverage = tags["coverage"]
    bars = [
        (NAMES[text], n["named"] / max(1, n["tags"]), percent(n["named"], n["tags"]), text)
        for text, n in coverage.items()
    ]
    title = "Coverage was not measured"
    if "generated" in coverage:
        own, other = coverage["generated"], coverage.get("caption")
        title = f"The generated texts name {percent(own['named'], own['tags'])} of the tags"
        title += f", captions {percent(other['named'], other['tags'])}" if other else ""
    why = "Tags whose words are in the text. Tags that were taken from the texts themselves do not count."
    named = _card(title, why, _bars(bars) if bars else _empty("no tag comes from a picture"))
    return _pair(per_image, f'<div class="stack">{named}{_draw_survival(results)}</div>')


def _draw_support(results: Results) -> str:
    composers = results["composers"]
    lines, best = [], None
    for name, rates in sorted(composers.items(), key=lambda item: -item[1]["rows"]):
        best = best or (name, rates)
        most = max(rates["histogram"])
        spark = "".join(f'<i style="height:{max(1, round(22 * n / most))}px"></i>' for n in rates["histogram"])
        cells = [percent(rates["mean"], 1), percent(rates["any"], rates["rows"]), f'<span class="spark">{spark}</span>']
        lines.append([user(plain(name, 60)), f"{rates['rows']:,}", *cells])
    title = "Unsupported nouns were not measured"
    if best:
        title = f"{percent(best[1]['mean'], 1)} of the nouns by {user(plain(best[0], 60))} have no support"
    why = "Nouns that neither raw text, caption, tags nor OCR text support, of what each composer wrote, taken or not. "
    why += "Spread: texts by their share of such nouns, none (green), up to 10 %, .. up to 100 %."
    head = ["composer", "texts", "of nouns", "texts with any", "spread"]
    support = _card(title, why, _table(head, lines) if lines else _empty("not measured"))
    rejected, rows = results["rejected_rows"], results["rows"]["in"]
    title = "No composed text is rejected"
    if rejected:
        title = f"In {percent(rejected, rows)} of the rows the composed text is rejected"
    why = "Why a composed text was not taken; a text may have several reasons. Another text takes its place."
    content = _counted(results["rejects"], rows, "bad") if results["rejects"] else _empty("none is rejected")
    languages = results["languages"]
    if len(languages) > 1:
        names = ", ".join(f"{user(plain(name, 20))} {n:,}" for name, n in languages.items())
        content += f'<p class="note">Languages: {names}.</p>'
    return _pair(support, _card(title, why, content))


def _draw_clip(results: Results) -> str:
    clip = results["clip"]
    if not clip:
        return _empty("CLIP scores were not measured: no checkpoint was given.")
    curves = []
    scores = {text: {float(s): n for s, n in c["histogram"].items()} for text, c in clip["texts"].items()}
    low = min(min(found) for found in scores.values())
    high = max(max(found) for found in scores.values())
    width = max(0.005, round((high - low) / 40 / 0.005) * 0.005)
    for text, found in scores.items():
        rows = clip["texts"][text]["rows"]
        shares: dict[int, float] = {}
        for score, n in found.items():
            shares[int((score - low) / width + 1e-6)] = shares.get(int((score - low) / width + 1e-6), 0) + n / rows
        bins = [(low + place * width, shares.get(place, 0.0)) for place in range(int((high - low) / width) + 2)]
        curves.append(Curve(NAMES[text], text, bins))
    means = {text: c["mean"] for text, c in clip["texts"].items()}
    title = ", ".join(f"{NAMES[text].lower()} {mean:.3f}" for text, mean in means.items())
    plot = _legend(list(scores)) + draw_curves(curves, "cosine", "share of texts", title, steps=True)
    left = _card(f"Mean score: {title}", "Cosine of picture and text by the checkpoint. Further right: better.", plot)
    share = clip["generated_above_raw"]
    title = (
        "No row has scores of both texts"
        if share is None
        else f"{percent(share, 1)} of the generated texts score higher than the raw one"
    )
    why = f"Share of the {clip['pairs']:,} rows whose generated text matches its picture better than the raw text does."
    table = [[NAMES[text], f"{c['rows']:,}", f"{c['mean']:.4f}"] for text, c in clip["texts"].items()]
    return _pair(left, _card(title, why, _table(["", "texts measured", "mean score"], table)))


def _draw_repeats(results: Results) -> str:
    found, rows = results["duplicates"], max(1, results["rows"]["in"])
    title = f"{found['exact']:,} texts repeat an earlier one word for word, {found['near']:,} almost"
    if not found["exact"] + found["near"]:
        title = "No text repeats an earlier one"
    lines = []
    for group in found["groups"]:
        texts = "<br>".join(user(text) for text in group.get("texts", ()))
        lines.append(
            f"<li><b>{group['repeats']:,} &times;</b><span>{texts or user(plain(group['id'], 80))}</span></li>"
        )
    why = f"{percent(found['exact'], rows)} and {percent(found['near'], rows)} of the rows. The largest groups: how "
    why += "often the first text is repeated" + ("." if found["counts_exact"] else ", at least.")
    content = f'<ul class="groups">{"".join(lines)}</ul>' if lines else _empty("none, or not looked for")
    repeats = _card(title, why, content)
    openings = results["openings"]
    title = f"{percent(openings['share_of_top'], 1)} of the texts begin in one of {SAMPLES} ways"
    if openings["different"] <= SAMPLES:
        title = f"Different openings of texts: {openings['different']}"
    why = f"The first four words; {openings['different']:,}{'' if openings['exact'] else ' or more'} different ones."
    texts = max(1, results["words"]["generated"]["texts"])
    content = (
        _counted(dict(openings["top"][:14]), texts, "generated") if openings["top"] else _empty("there are no texts")
    )
    return _pair(repeats, _card(title, why, content))


def _draw_cost(results: Results) -> str:
    stages, cost = results["stages"], results["cost"]
    lines = []
    for name, stage in stages.items():
        rate = stage["rows_per_second"]
        rate = "-" if rate is None else f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
        tokens = [f"{stage[column]:,}" if stage[column] else "-" for column in ("prompt_tokens", "completion_tokens")]
        cells = [f"{stage['rows']:,}", f"{stage['failed']:,}", _duration(stage["seconds"]), rate, *tokens]
        lines.append([user(plain(name, 40)), *cells])
    head = ["stage", "rows", "failed", "time", "rows/s", "prompt tokens", "answer tokens"]
    slow = max(stages.items(), key=lambda item: item[1]["seconds"], default=None)
    title = f"{_duration(cost['seconds'])}, most of it for {user(plain(slow[0], 40))}" if slow else "No times"
    latency = results["milliseconds"]
    why = "Seconds of work, the stages one after the other; tokens as the server counted them."
    if latency:
        why += f" One row's text took {latency['50']:,} ms in the median, {latency['95']:,} ms at 95 %."
    timing = _card(title, why, _table(head, lines) if lines else _empty("not measured"))
    failed = sum(stage["rows"] for stage in results["failures"].values())
    reasons = {
        f"{stage}, {why}".replace(", failed:", ":"): n
        for stage, top in results["failures"].items()
        for why, n in top["reasons"].items()
    }
    title = f"{failed:,} results are missing" if failed else "Nothing failed"
    why = "By stage and reason. What failed is tried again by the next run; the row itself is never lost."
    content = _counted(reasons, max(1, results["rows"]["in"]), "bad") if reasons else _empty("nothing failed")
    missing = _card(title, why, content)
    scale = [
        [
            f"{line['rows']:,}",
            _duration(3600 * line["hours"]),
            f"{line['prompt_tokens']:,}",
            f"{line['completion_tokens']:,}",
            _money(line["money"], cost["currency"]),
        ]
        for line in results["scale"]
    ]
    title = f"{results['scale'][1]['rows']:,} rows would take {scale[1][1]}" if scale else "No rates were measured"
    why = "At the rates of this job on this machine and server; money at the prices given."
    why += "" if cost["money"] is not None else " No prices were given."
    head = ["rows", "time", "prompt tokens", "answer tokens", "cost"]
    scaled = _card(title, why, _table(head, scale) if scale else _empty("not measured"))
    return _pair(timing) + _pair(scaled, missing)


def _draw_settings(results: Results) -> str:
    parts = []
    for name in ("settings", "versions", "prices"):
        if results["about"].get(name):
            text = json.dumps(results["about"][name], indent=1, ensure_ascii=False, default=str)
            lines = "\n".join(plain(line, 400) for line in text.splitlines()[:400])
            parts.append(f"<details><summary>{name}</summary><pre>{escape(lines)}</pre></details>")
    return "".join(parts) or _empty("none were given")
