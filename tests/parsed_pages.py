"""HTML pages as trees, parsed as a browser parses them."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

LONE = {"meta", "br", "link", "img", "input", "hr"}


class Node:
    """Element with its parts: nodes and text."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes, self.parts = tag, attributes, []

    def all(self, tag: str = "", class_: str = "") -> list[Node]:
        """Return all descendants with this tag and class, in the order of the page."""
        return [
            node
            for node in self.walk()
            if tag in ("", node.tag) and (not class_ or class_ in node.attributes.get("class", "").split())
        ]

    def walk(self) -> Iterator[Node]:
        for part in self.parts:
            if isinstance(part, Node):
                yield part
                yield from part.walk()

    @property
    def text(self) -> str:
        return "".join(part.text if isinstance(part, Node) else part for part in self.parts)


class Tree(HTMLParser):
    """Page as a tree; tags that are not nested correctly fail an assertion."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        self.feed(page)
        self.close()
        assert self.open == [self.root], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(node)
        if tag not in LONE:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if data.strip():  # white space between elements is not content
            self.open[-1].parts.append(data)
