"""Matplotlib figures as SVG that lives inside a page: themed, of unique ids, of steady bytes.

Figures are drawn in stand-in colours, which become the page's CSS variables, so that one drawing
serves light and dark. Text stays text. Every plot is drawn twice, for a wide and for a narrow
window, because letters scaled with the picture would be unreadable on a phone.
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

# Stand-ins: colours that no plot uses for themselves.
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
    """A figure and the hover texts of its parts, by the gid of the artist."""

    figure: Figure
    titles: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plot:
    """One plot as two pieces of markup; the page's style shows the one that fits."""

    wide: Markup
    narrow: Markup


def new_figure(width: float, height: float) -> Figure:
    """An empty transparent figure of that many CSS pixels, owned by nobody but the caller."""
    size = (width / POINTS_PER_INCH, height / POINTS_PER_INCH)
    return Figure(figsize=size, dpi=POINTS_PER_INCH, facecolor="none", layout="constrained")


def responsive(draw: Callable[[int], Drawing], *, name: str, label: str) -> Plot:
    """Draw for both widths.

    Args:
        draw: makes the figure for a width in CSS pixels.
        name: unique on the page; every id in the SVG starts with it.
        label: what the plot shows, for people who do not see it.
    """
    with _our_style():
        wide = _markup(draw(WIDE), f"{name}-w", label)
        narrow = _markup(draw(NARROW), f"{name}-n", label)
    return Plot(wide=wide, narrow=narrow)


@contextmanager
def _our_style() -> Iterator[None]:
    # The reset keeps a reader's own matplotlibrc out of the page.
    with style.context(_STYLE, after_reset=True):
        yield


def _markup(drawing: Drawing, prefix: str, label: str) -> Markup:
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    for element in root.iter():
        _localise(element, prefix)
    _add_titles(root, prefix, drawing.titles)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return Markup(text)


def _strip(root: ElementTree.Element) -> None:
    """Drop what only a stand-alone file needs; its style sheet would leak into the page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in {"metadata", "style"}:
                parent.remove(child)


def _localise(element: ElementTree.Element, prefix: str) -> None:
    """HTML knows the SVG elements by their bare names; ids must be unique on the whole page."""
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
