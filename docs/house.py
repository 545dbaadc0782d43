"""Draws the house: docs/images/house.svg, and the tables of CONTRIBUTING.md, from the code's imports and docstrings.

    python docs/house.py            # writes both
    python docs/house.py --check    # exit code 1 where they are not what the code says

A room is a folder; the words in it are its modules and their lines, those of the core (docs/tour.md) in bold. An arrow
from one package to another carries the number of modules of the second that modules of the first import.
"""

import ast
import re
import sys
from collections import Counter
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE, PAGE, TOUR = ROOT / "docs/images/house.svg", ROOT / "CONTRIBUTING.md", ROOT / "docs/tour.md"
FLOORS = (("analysis",), ("harvest", "train"), ("store",), ("residscope",))
"""Packages from the top floor down: each imports from the floors below it."""
COLOURS = {  # of a package's floor, and of its ink
    "analysis": ("#f6eddf", "#8a5a17"),
    "harvest": ("#e6f1e4", "#2f6b35"),
    "train": ("#e6ebf7", "#2d4f94"),
    "store": ("#f5e7ed", "#8d2f5d"),
    "residscope": ("#efefef", "#4a4a4a"),
}
BEGIN, END = "<!-- made by docs/house.py: begin -->", "<!-- made by docs/house.py: end -->"
LINE, PAD, ROOM, GAP, ALLEY = 15, 12, 160, 12, 44
"""In pixels: a line of text, the space inside a package, a room's width, the space between rooms, between packages."""
COLUMNS = {"harvest": 2, "train": 4}
"""Rooms side by side in a package; in all others as many as in these two together."""


class Module(NamedTuple):
    """One source file."""

    path: Path
    lines: int
    says: str
    """First sentence of its docstring."""
    imports: frozenset[str]
    """Modules of ours that it imports."""


def modules() -> dict[str, list[Module]]:
    """The modules of every folder, such as train/kernels; empty __init__.py files are left out."""
    found: dict[str, list[Module]] = {}
    for package in COLOURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            if text.strip():
                tree = ast.parse(text)
                says = first_sentence(ast.get_docstring(tree) or "")
                module = Module(path, len(text.splitlines()), says, frozenset(_imports(tree)))
                found.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(module)
    return found


def _imports(tree: ast.AST) -> set[str]:
    named = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return {name for name in named if name.partition(".")[0] in COLOURS}


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s(?=[^a-z])", paragraph, maxsplit=1)[0].rstrip(".") + "."


def core() -> list[str]:
    """The files that docs/tour.md walks through, in its order."""
    return re.findall(r"^### \d+\. \[`([a-z_/]+\.py)`\]", TOUR.read_text(encoding="utf-8"), re.MULTILINE)


def page(found: dict[str, list[Module]]) -> str:
    """CONTRIBUTING.md, with a table for each folder between the two marks."""
    parts = []
    for folder, inside in found.items():
        rows = [f"| `{module.path.name}` | {module.lines} | {module.says} |" for module in inside]
        head = [f"**{folder}/** ({sum(module.lines for module in inside):,} lines)", ""]
        parts.append("\n".join([*head, "| module | lines | what is in it |", "|---|---:|---|", *rows]))
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + rest.split(END)[1]


class Box(NamedTuple):
    """A rectangle of the picture, in pixels."""

    left: float
    top: float
    width: float
    height: float

    def svg(self, radius: int, fill: str, ink: str) -> str:
        """It, drawn with round corners."""
        place = f'x="{self.left:.0f}" y="{self.top:.0f}" width="{self.width:.0f}" height="{self.height:.0f}"'
        return f'<rect {place} rx="{radius}" fill="{fill}" stroke="{ink}"/>'


def picture(found: dict[str, list[Module]]) -> str:
    """The house as SVG."""
    bold = set(core())
    body: list[str] = []
    boxes: dict[str, Box] = {}
    top = 8.0
    for floor in FLOORS:
        left = 8.0
        for package in floor:
            rooms = {folder: inside for folder, inside in found.items() if folder.partition("/")[0] == package}
            width = _width(COLUMNS[package]) if package in COLUMNS else sum(map(_width, COLUMNS.values())) + ALLEY
            drawn, boxes[package] = _package(package, rooms, bold, Box(left, top, width, 0))
            body += drawn
            left += width + ALLEY
        top += max(boxes[package].height for package in floor) + ALLEY
    size = f'viewBox="0 0 {left - ALLEY + 8:.0f} {top - ALLEY + 8:.0f}" font-family="sans-serif" font-size="11"'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f'<defs>{tip}<path d="M0 0 8 4 0 8z" fill="#555"/></marker></defs>',
            '<rect width="100%" height="100%" fill="white"/>',
            *body,
            *_arrows(found, boxes),
            "</svg>\n",
        ]
    )


def _width(columns: int) -> float:
    return 2 * PAD + columns * ROOM + (columns - 1) * GAP


def _text(x: float, y: float, words: str, how: str) -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" {how}>{escape(words)}</text>'


def _package(package: str, rooms: dict[str, list[Module]], bold: set[str], place: Box) -> tuple[list[str], Box]:
    """A package, its rooms side by side in rows: what is drawn, and `place` with the height that this takes."""
    fill, ink = COLOURS[package]
    in_a_row = max(1, int((place.width - PAD) // (ROOM + GAP)))
    drawn: list[str] = []
    names, y = sorted(rooms, key=lambda name: (name.count("/") > 0, name)), place.top + 30
    for start in range(0, len(names), in_a_row):
        row = names[start : start + in_a_row]
        height = max(len(rooms[name]) for name in row) * LINE + 32
        for column, name in enumerate(row):
            room = Box(place.left + PAD + column * (ROOM + GAP), y, ROOM, height)
            drawn += [room.svg(5, "white", ink), *_room(name, rooms[name], bold, room, ink)]
        y += height + GAP
    lines = sum(module.lines for inside in rooms.values() for module in inside)
    title = _text(place.left + PAD, place.top + 20, f"{package}, {lines:,} lines", f'fill="{ink}" font-size="14"')
    box = place._replace(height=y - place.top)
    return [box.svg(9, fill, ink), title, *drawn], box


def _room(name: str, inside: list[Module], bold: set[str], room: Box, ink: str) -> list[str]:
    """A room's name, its modules and their lines."""
    drawn = [_text(room.left + 8, room.top + 18, f"{name}/", f'fill="{ink}" font-weight="bold"')]
    for at, module in enumerate(inside):
        y = room.top + 36 + at * LINE
        in_core = module.path.relative_to(ROOT).as_posix() in bold
        drawn.append(_text(room.left + 8, y, module.path.stem, 'font-weight="bold"' if in_core else 'fill="#444"'))
        drawn.append(_text(room.left + ROOM - 8, y, str(module.lines), 'text-anchor="end" fill="#999"'))
    return drawn


def _arrows(found: dict[str, list[Module]], boxes: dict[str, Box]) -> list[str]:
    """From each package to those below that it imports, but for residscope, which all import: down to the next floor,
    or through the alley between two packages to the one after it."""
    counts: Counter[tuple[str, str]] = Counter()
    for folder, inside in found.items():
        here = folder.partition("/")[0]
        imported = {name for module in inside for name in module.imports}
        counts.update((here, there) for name in imported if (there := name.partition(".")[0]) != here)
    alley = boxes["train"].left - ALLEY / 2
    drawn = []
    for (above, below), count in sorted(counts.items()):
        a, b = boxes[above], boxes[below]
        if b.top <= a.top or (below == "residscope" and above != "store"):
            continue
        left, right = max(a.left, b.left), min(a.left + a.width, b.left + b.width)
        x = alley if (above, below) == ("analysis", "store") else (left + right) / 2
        ink = COLOURS[above][1]
        line = f'd="M{x:.0f} {a.top + a.height:.0f}V{b.top:.0f}" stroke="{ink}" marker-end="url(#tip)"'
        drawn += [f"<path {line}/>", _text(x + 5, b.top - 8, str(count), f'fill="{ink}"')]
    return drawn


def main() -> int:
    """Write the picture and the tables, or with --check compare them."""
    found = modules()
    made = {PICTURE: picture(found), PAGE: page(found)}
    if "--check" in sys.argv[1:]:
        old = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in made}
        stale = [str(path.relative_to(ROOT)) for path, text in made.items() if old[path] != text]
        print(*stale, "should be made again: python docs/house.py" if stale else "up to date", file=sys.stderr)
        return bool(stale)
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
