"""Numbers as people read them, and pieces of HTML whose texts are escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape


def number(value: float | str, digits: int = 4) -> str:
    """Return a number with so many significant digits, without needless zeros."""
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def size(count: int) -> str:
    """Return bytes in the largest unit that leaves at least one."""
    amount = float(count)
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def duration(seconds: float) -> str:
    """Return a time as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int] = ()
) -> str:
    """Return an HTML table of texts; `numeric` columns are aligned to the right."""
    classes = dict.fromkeys(numeric, ' class="number"')

    def line(cells: Sequence[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{classes.get(column, '')}>{escape(cell)}</{tag}>"
            for column, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide"><table><thead>{line(header, "th")}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, content: str) -> str:
    """Return a section with a heading; empty if there is no content."""
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def remark(text: str) -> str:
    """Return a paragraph in a quieter color."""
    return f'<p class="remark">{escape(text)}</p>'


def document(title: str, body: Iterable[str], style: str) -> str:
    """Return a whole page in ASCII, so that no encoding on the way can damage it."""
    inner = "\n".join(filter(None, body))
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{inner}\n</main>\n</body>\n</html>\n"
    )
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")
