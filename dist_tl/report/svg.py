"""Matplotlib figures as inline SVG: themed, with unique ids, deterministic output.

Figures are drawn in placeholder colours that are replaced by CSS variables of the HTML page, so one
drawing works in the light and the dark theme. Text stays text. Every plot is drawn for a wide and
for a narrow window, because text scaled with the image would be unreadable on a phone.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure

WIDE, NARROW = 1000, 350
POINTS_PER_INCH = 72  # one SVG unit is one point, so sizes below are CSS pixels at scale 1

# Placeholder colours that no plot uses otherwise.
INK, MUTED, LINE, PAPER = "#0a0001", "#0a0002", "#0a0003", "#0a0004"
ARM, REFERENCE, ON_BAR = "#0a0005", "#0a0006", "#0a0007"
GENERATE, TRAIN, TRIAL, OTHER = "#0a0008", "#0a0009", "#0a000a", "#0a000b"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--paper)",
    ARM: "var(--arm)",
    REFERENCE: "var(--reference)",
    ON_BAR: "var(--on-bar)",
    GENERATE: "var(--generate)",
    TRAIN: "var(--train)",
    TRIAL: "var(--trial)",
    OTHER: "var(--other)",
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "dist_tl",
    "text.parse_math": False,  # an arm may be named a$b$c
    "font.size": 12,
    "axes.titlesize": 12,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
}


@dataclass(frozen=True)
class Drawing:
    """A figure and the hover texts of its artists, by gid."""

    figure: Figure
    titles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """SVG markup of one plot for wide and narrow windows; the style sheet selects one."""

    wide: Markup
    narrow: Markup


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty transparent figure, sized in CSS pixels and not registered with pyplot."""
    size = (width / POINTS_PER_INCH, height / POINTS_PER_INCH)
    return Figure(figsize=size, dpi=POINTS_PER_INCH, facecolor="none", layout="constrained")


def responsive(draw: Callable[[int], Drawing], *, name: str, label: str) -> Plot:
    """Draws a plot for both widths.

    Args:
        draw: returns the figure for a width in CSS pixels.
        name: unique name of the plot; prefix of all ids in its SVG.
        label: accessible description of the plot.
    """
    with _report_style():
        wide = _markup(draw(WIDE), f"{name}-w", label)
        narrow = _markup(draw(NARROW), f"{name}-n", label)
    return Plot(wide=wide, narrow=narrow)


@contextmanager
def _report_style() -> Iterator[None]:
    # The reset keeps settings of the user's matplotlibrc out of the report.
    with style.context(_STYLE, after_reset=True):
        yield


def _markup(drawing: Drawing, prefix: str, label: str) -> Markup:
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    for element in root.iter():
        _make_local(element, prefix)
    _add_titles(root, prefix, drawing.titles)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    text = ElementTree.tostring(root, encoding="unicode")
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return Markup(text)


def _strip(root: ElementTree.Element) -> None:
    """Removes metadata and the style sheet, which would apply to the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)


def _make_local(element: ElementTree.Element, prefix: str) -> None:
    """Strips XML namespaces, as HTML requires, and makes ids unique on the page."""
    element.tag = element.tag.rpartition("}")[2]
    attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
    for name, value in attributes.items():
        if name == "id":
            attributes[name] = f"{prefix}-{value}"
        elif name == "href":
            attributes[name] = f"#{prefix}-{value.removeprefix('#')}"
        elif name in {"clip-path", "style"}:
            attributes[name] = value.replace("url(#", f"url(#{prefix}-")
        elif name in {"d", "x", "y", "transform"}:
            attributes[name] = re.sub(r"(\.\d\d)\d+", r"\1", value)
    element.attrib = attributes


def _add_titles(root: ElementTree.Element, prefix: str, titles: Mapping[str, str]) -> None:
    by_id = {element.get("id"): element for element in root.iter() if element.get("id")}
    for gid, text in titles.items():
        title = ElementTree.Element("title")
        title.text = text
        by_id[f"{prefix}-{gid}"].insert(0, title)
