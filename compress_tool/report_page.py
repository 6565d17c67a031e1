"""The frame of report.html: head, style, sections. Nothing in it points outside of the file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import Final

STYLE: Final = """
:root { color: #1f2933; background: #f5f7fa; font: 16px/1.55 system-ui, sans-serif; }
body { max-width: 64rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
p { margin: .2rem 0 .8rem; color: #52606d; max-width: 52rem; } code { font-size: .92em; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px;
  padding: 1.2rem 1.4rem; margin-top: 1.2rem; }
.wide { overflow-x: auto; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.6rem; margin-top: 1rem; }
.facts div { color: #52606d; font-size: .9rem; }
.facts b { display: block; font-size: 1.45rem; color: #1f2933; font-weight: 600; }
img { width: 100%; height: auto; display: block; margin: .4rem 0 .8rem; }
details { margin-top: .5rem; } summary { cursor: pointer; color: #2a5a80; font-size: .92rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .26rem .7rem; border-bottom: 1px solid #e4e7eb;
  white-space: nowrap; font-size: .92rem; }
th { color: #52606d; font-weight: 600; font-size: .86rem; }
th.text, td.text { text-align: left; }
tr:last-child td { border-bottom: 0; }
@media print {
  :root { background: #fff; font-size: 12px; } body { max-width: none; padding: 0; }
  section { border: 0; padding: .6rem 0; } img, tr, h2 { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } th, td { padding: .15rem .4rem; }
}
"""


def page_html(title: str, sections: Sequence[str]) -> str:
    """The whole page; `title` is escaped already."""
    body = "\n".join(f"<section>{section}</section>" for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def picture(png: bytes, alt: str) -> str:
    """A figure inside the page, with the words for those who cannot see it."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def folded(summary: str, content: str) -> str:
    """Content behind a line that opens it."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def heading(title: str, text: str = "") -> str:
    return f"<h2>{html.escape(title)}</h2>" + (f"<p>{text}</p>" if text else "")
