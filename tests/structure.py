"""The package as its imports draw it: files and lines per room, arrows between rooms, circles. Runs anywhere:

    python tests/structure.py [FOLDER]      (default: the kdcli folder of this checkout; --json prints it as data)

Every import counts, also under TYPE_CHECKING and inside functions.
"""

import argparse
import ast
import io
import json
import tokenize
from dataclasses import asdict, dataclass, field
from pathlib import Path

LAYERS = (
    {"cli"}, {"workflows"}, {"training"}, {"methods", "mentors"}, {"models", "data"}, {"recipe"},
    {"tasks", "export", "system"}, {"losses"}, {"errors"},
)  # fmt: skip
"""From the top down: an import goes to a lower layer, or stays in its room (DESIGN section 4)."""
FREE = {"__init__", "__main__"}
"""The package's own two files: its version and public names, and `python -m kdcli`."""


@dataclass
class Room:
    """One folder of the package, or one file at its top."""

    files: int = 0
    lines: int = 0
    code: int = 0  # lines that are neither blank, comment nor docstring


@dataclass
class Structure:
    """What a package looks like."""

    rooms: dict[str, Room]
    edges: list[tuple[str, str]]  # file -> file
    arrows: list[tuple[str, str]]  # room -> room
    upward: list[tuple[str, str]]  # file -> file, against the layers or between rooms of one layer
    circles: list[list[str]]  # files that import each other, around some corner
    facts: dict[str, int] = field(default_factory=dict)


def room_of(file: str) -> str:
    """The room of `training/loop.py` is `training`; a file at the top is a room of its own."""
    return file.partition("/")[0].removesuffix(".py")


def read(folder: Path) -> Structure:
    """The structure of the package in `folder`."""
    files = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    modules = {_module(folder.name, file): file for file in files}
    edges = sorted({(file, to) for file, text in files.items() for to in _imports(text, modules) if to != file})
    rooms: dict[str, Room] = {}
    for file, text in sorted(files.items()):
        room = rooms.setdefault(room_of(file), Room())
        room.files, room.lines, room.code = room.files + 1, room.lines + text.count("\n"), room.code + _code(text)
    arrows = sorted({(room_of(a), room_of(b)) for a, b in edges if room_of(a) != room_of(b)})
    circles = _circles(edges)
    found = Structure(rooms, edges, arrows, [edge for edge in edges if not _goes_down(*edge)], circles)
    found.facts = {
        "files": len(files), "lines": sum(room.lines for room in rooms.values()),
        "code lines": sum(room.code for room in rooms.values()), "imports between files": len(edges),
        "arrows between rooms": len(arrows), "upward imports": len(found.upward), "circles": len(circles),
    }  # fmt: skip
    return found


def _goes_down(a: str, b: str) -> bool:
    above, below = room_of(a), room_of(b)
    if above == below or {above, below} & FREE:
        return True
    level = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    return above in level and below in level and level[above] < level[below]


def _module(package: str, file: str) -> str:
    parts = [package, *file.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(text: str, modules: dict[str, str]) -> set[str]:
    """The files that a file imports: of `from a import b` the module a.b where there is one, else a."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [
                full if (full := f"{node.module}.{alias.name}") in modules else node.module for alias in node.names
            ]
    return {modules[name] for name in names if name in modules}


def _code(text: str) -> int:
    """Lines that hold code."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docs |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def _circles(edges: list[tuple[str, str]]) -> list[list[str]]:
    """Strongly connected groups of two files or more."""
    after: dict[str, set[str]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for one in after.get(todo.pop(), ()):
                if one not in seen:
                    seen.add(one)
                    todo.append(one)
        return seen

    reach = {file: reached(file) for file in after}
    groups = {frozenset(b for b in reach[a] if a in reach.get(b, ())) for a in after}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent.parent / "kdcli"
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="the package's folder")
    parser.add_argument("--json", action="store_true", help="print it as data")
    args = parser.parse_args()
    found = read(args.folder)
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    print(f"{'room':<12} {'files':>5} {'lines':>6} {'code':>6}  imports")
    for name, room in found.rooms.items():
        to = ", ".join(b for a, b in found.arrows if a == name)
        print(f"{name:<12} {room.files:>5} {room.lines:>6} {room.code:>6}  {to}")
    print("\n" + "\n".join(f"{value:>6} {name}" for name, value in found.facts.items()))
    for a, b in found.upward:
        print(f"upward: {a} -> {b}")
    for circle in found.circles:
        print(f"circle: {', '.join(circle)}")


if __name__ == "__main__":
    main()
