"""Makes the Data Docs of Great Expectations a site that needs no network.

As they come, their pages load styles, scripts and a logo from six other hosts: without a network the front page is
empty, and with one every look at the data is seen there. Here the pages get a small style of their own instead, and
a front page made of plain links.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 0; position: relative}
nav.navbar.border-bottom {border-bottom: 1px solid #ddd; padding: .4em 2em; height: auto !important}
nav ol, nav ul {list-style: none; padding: 0; margin: 0} nav ol li {display: inline-block; padding: 0 .7em}
a {color: #1f5f99; text-decoration: none} a:hover {text-decoration: underline} .mr-auto img {display: none}
.container-fluid {padding: 0 2em} .container-fluid .container-fluid {padding: 0}
body > .container-fluid > .row {display: flex; gap: 2em; margin-top: 1em}
.col-md-2 {flex: 0 0 220px} .col-md-10 {flex: 1; min-width: 0} .sticky {position: sticky; top: 1em}
.ge-navigation-sidebar-link {display: block; padding: .1em 0}
.alert {background: #eef1f4; padding: .5em 1em; border-radius: 4px} h4, h5, h6 {margin: .3em 0; font-size: 1.05em}
table {border-collapse: collapse; width: 100%; margin: .5em 0} th {text-align: left}
td, th {border-top: 1px solid #ddd; padding: .35em .7em; vertical-align: top} .sticky td, nav td {border: 0}
.text-success, .holds {color: #1a7f37} .text-danger, .fails {color: #b42318}
.fa-check-circle::before {content: "\\2714"} .fa-times::before {content: "\\2718"} .fa-comment::before {content: "\\270e"}
i {font-style: normal} .badge {background: #e5e9ee; border-radius: 3px; padding: 0 .4em}
.cooltip {position: relative} .cooltip .top {display: none} .cooltip:hover .top {display: block; position: absolute;
  top: 1.6em; left: 0; transform: none; z-index: 2; background: #222; color: #fff; padding: .5em 1em; min-width: 18em}
[data-toggle="collapse"], footer {display: none} main {padding: 1em 2em; max-width: 900px}
"""

_REMOTE = (
    re.compile(r"<script\b.*?</script>", re.DOTALL),  # those of the pages themselves need the remote jQuery
    re.compile(r'<link\b[^>]*href="https?://[^>]*>'),
    re.compile(r'<link\b[^>]*rel="preconnect"[^>]*>'),
    re.compile(r'<img\b[^>]*src="https?://[^>]*>'),
    re.compile(r"<footer>.*?</footer>", re.DOTALL),  # an invitation to a newsletter
    re.compile(
        r'<div class="card mb-3">.*?Validation Filter:.*?</label>\s*</div>\s*</div>\s*</div>\s*</div>\s*</div>', re.DOTALL
    ),
)
_REMOTE_PICTURE = re.compile(r"url\(['\"]?https?://[^)]*\)")


@dataclass(frozen=True)
class Result:
    """A line of the front page: a suite, its rows, and how many of its expectations fail; `noted`: of these, how many
    are only for information."""

    suite: str
    rows: int
    expectations: int
    failed: int
    noted: int = 0


def make_local(docs: Path, results: Sequence[Result]) -> None:
    """Rewrites the site in the folder `docs` so that nothing on it is loaded from elsewhere."""
    for page in [*docs.rglob("*.html"), *docs.rglob("*.css")]:
        text = page.read_text(encoding="utf-8")
        for pattern in _REMOTE:
            text = pattern.sub("", text)
        text = _REMOTE_PICTURE.sub("none", text)
        page.write_text(text.replace("</head>", f"<style>{STYLE}</style>\n</head>"), encoding="utf-8")
    (docs / "index.html").write_text(_index(docs, results), encoding="utf-8")


def _index(docs: Path, results: Sequence[Result]) -> str:
    lines = []
    for result in results:
        page = next((docs / "validations" / result.suite).rglob("*.html"))
        link = Path(os.path.relpath(page, docs)).as_posix()
        broken = result.failed - result.noted
        verdict = f"{broken} of {result.expectations} fail" if broken else "all hold"
        verdict += f", but for {result.noted} for information" if result.noted else ""
        lines.append(
            f'<tr><td class="{"fails" if broken else "holds"}">{verdict}</td>'
            f'<td><a href="{escape(link)}">{escape(result.suite)}</a></td><td>{result.rows:,}</td>'
            f'<td><a href="expectations/{escape(result.suite)}.html">{result.expectations} expectations</a></td></tr>'
        )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Data Docs</title><style>{STYLE}</style></head>\n'
        "<body><main><h1>Data Docs</h1>\n<table><tr><th>result</th><th>suite</th><th>rows</th><th>what is expected</th></tr>\n"
        + "\n".join(lines)
        + "\n</table>\n<p>Made with Great Expectations.</p></main></body></html>\n"
    )
