"""HTML parsed to elements with attributes and texts, for tests of pages."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "input"}
CELLS, TERMS = {"td", "th"}, {"dt", "dd"}
# Optional end tags: a start tag ends these elements.
ENDS = {"tr": CELLS | {"tr"}, "td": CELLS, "th": CELLS, "dt": TERMS, "dd": TERMS, "p": {"p"},
        "option": {"option"}}  # fmt: skip


@dataclass
class Element:
    tag: str
    attrs: dict
    inner: list["Element"] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.pieces).split())

    @property
    def classes(self) -> list[str]:
        return (self.attrs.get("class") or "").split()

    def all(self, tag: str, name: str | None = None) -> list["Element"]:
        """Return the elements inside, with class `name` if it is given."""
        return [e for e in self.inner if e.tag == tag and (name is None or name in e.classes)]

    def rows(self) -> list[list[str]]:
        """Return the texts of a table's cells."""
        return [[c.text for c in row.inner if c.tag in CELLS] for row in self.all("tr")]


class _Parser(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        while self.open[-1].tag in ENDS.get(tag, ()):
            self.open.pop()
        element = Element(tag, dict(attrs))
        for outer in self.open:
            outer.inner.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if any(element.tag == tag for element in self.open):
            while self.open.pop().tag != tag:
                pass

    def handle_data(self, data):
        for element in self.open:
            element.pieces.append(data)


def parsed(text: str) -> Element:
    """Return the root element of a page."""
    return _Parser(text).root


def outside(page: Element) -> list[str]:
    """Return the addresses that a page loads or could send to."""
    loads = [e.attrs.get("src") for e in page.inner] + [
        e.attrs.get("href") or "" for e in page.inner if e.tag == "link"
    ]
    forms = [e.tag for e in page.inner if e.tag in ("form", "iframe", "object", "base")]
    return [*filter(None, loads), *forms]
