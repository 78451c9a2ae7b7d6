"""Print the figure of the method that opens the README, as SVG.

    python tools/draw_method.py > docs/method.svg

The figure has its own background, so it looks the same on a light and on a dark page. Coordinates are in pixels from
the upper left corner. T: frames, N: patches of a frame, D: tower width, S: side width, K: classes, L: tower blocks.
"""

import sys
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1000, 640
BLOCK_X, BLOCK_NAMES = (324, 452, 620), ("1", "2", "L")  # the blocks that are drawn
INK, PALE_INK, PAPER, RULE = "#1f2328", "#59636e", "#ffffff", "#d1d9e0"


class Colors(NamedTuple):
    """Colours of one kind of part: the box, its outline, and the area around all boxes of the kind."""

    box: str
    line: str
    area: str


FROZEN = Colors("#cfe3f7", "#2f6fab", "#f0f6fc")
TRAINED = Colors("#ffd9ad", "#b8620a", "#fff6ea")
PLAIN = Colors(PAPER, PALE_INK, PAPER)


class Box(NamedTuple):
    """A rounded box with lines of text in its middle; the first line is bold."""

    x: int
    y: int
    width: int
    height: int
    colors: Colors
    lines: tuple[str, ...]

    @property
    def right(self) -> int:
        return self.x + self.width

    @property
    def bottom(self) -> int:
        return self.y + self.height

    @property
    def center(self) -> int:
        return self.x + self.width // 2

    @property
    def middle(self) -> int:
        return self.y + self.height // 2

    def draw(self) -> list[str]:
        """The box and its text as SVG elements."""
        shape = rectangle(self.x, self.y, self.width, self.height, self.colors.box, self.colors.line, radius=6)
        first = self.middle - 8 * (len(self.lines) - 1) + 4
        texts = [
            text(self.center, first + 16 * number, line, size=12 if number else 13, bold=number == 0)
            for number, line in enumerate(self.lines)
        ]
        return [shape, *texts]


def rectangle(x: int, y: int, width: int, height: int, fill: str, line: str, radius: int = 12) -> str:
    """A rounded rectangle."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" '
        f'stroke="{line}" stroke-width="1.5"/>'
    )


def text(
    x: int, y: int, words: str, size: int = 12, bold: bool = False, color: str = INK, anchor: str = "middle"
) -> str:
    """One line of text whose baseline is at y."""
    weight = ' font-weight="bold"' if bold else ""
    style = f'font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}'
    return f'<text x="{x}" y="{y}" {style}>{escape(words)}</text>'


def arrow(*points: tuple[int, int], color: str = INK, dashed: bool = False) -> str:
    """A line through the points, with a head at the last one."""
    path = "M" + " L".join(f"{x} {y}" for x, y in points)
    dashes = ' stroke-dasharray="6 5"' if dashed else ""
    style = f'fill="none" stroke="{color}" stroke-width="1.6"{dashes}'
    return f'<path d="{path}" {style} marker-end="url(#{color.lstrip("#")})"/>'


def arrow_head(color: str) -> str:
    """The marker that `arrow` refers to."""
    return (
        f'<marker id="{color.lstrip("#")}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{color}"/></marker>'
    )


def lock(x: int, y: int) -> list[str]:
    """A padlock, 14 pixels wide, with its upper left corner at (x, y)."""
    return [
        f'<path d="M{x + 3} {y + 8} v-3 a4 4 0 0 1 8 0 v3" fill="none" stroke="{FROZEN.line}" stroke-width="2"/>',
        f'<rect x="{x}" y="{y + 8}" width="14" height="10" rx="2" fill="{FROZEN.line}"/>',
    ]


def frames(x: int, y: int) -> list[str]:
    """Four frames one behind the other, in which a ball moves."""
    parts = []
    for number in range(4):
        left, top = x + 14 * number, y + 14 * number
        parts.append(rectangle(left, top, 64, 48, "#eef1f4", PALE_INK, radius=3))
        parts.append(f'<circle cx="{left + 13 + 12 * number}" cy="{top + 33 - 5 * number}" r="7" fill="{PALE_INK}"/>')
    return parts


def tower_and_side_network() -> list[str]:
    """The upper part: the frozen tower, and below it the side network that reads its tokens."""
    upper, lower = 76, 226
    embedding = Box(180, upper, 112, 48, FROZEN, ("patch", "embedding"))
    blocks = [Box(x, upper, 96, 48, FROZEN, (f"block {name}",)) for x, name in zip(BLOCK_X, BLOCK_NAMES, strict=True)]
    stem = Box(180, lower, 112, 48, TRAINED, ("stem", "Conv3d"))
    readers = [
        Box(x, lower, 96, 48, TRAINED, ("side block", name)) for x, name in zip(BLOCK_X, BLOCK_NAMES, strict=True)
    ]
    mean = Box(740, lower, 100, 48, PLAIN, ("mean", "over T and N"))
    head = Box(868, lower, 76, 48, TRAINED, ("head", "S to K"))

    parts = [
        rectangle(164, 32, 562, 108, FROZEN.area, FROZEN.line),
        *lock(178, 42),
        text(202, 57, "Frozen CLIP tower: sees each frame alone, never trained", 14, True, anchor="start"),
        rectangle(164, 210, 796, 112, TRAINED.area, TRAINED.line),
        text(178, 311, "Side network and head: all that is trained", 14, True, anchor="start"),
        *frames(28, 112),
        text(81, 226, "clip of T frames", 13, True),
    ]
    corner, start = 146, 162  # the line from the clip turns up to the tower and down to the side network
    parts += [
        arrow((138, start), (corner, start), (corner, embedding.middle), (embedding.x, embedding.middle)),
        arrow((corner, start), (corner, stem.middle), (stem.x, stem.middle)),
    ]
    for row in ([embedding, *blocks], [stem, *readers, mean, head]):
        for box in row:
            parts += box.draw()
        for left, right in zip(row, row[1:], strict=False):
            if right.x - left.right < 60:
                parts.append(arrow((left.right, left.middle), (right.x, right.middle)))
            else:  # blocks are left out here
                middle = (left.right + right.x) // 2
                parts += [
                    arrow((left.right, left.middle), (middle - 12, left.middle)),
                    text(middle, left.middle + 1, "...", 16, True),
                    arrow((middle + 12, left.middle), (right.x, right.middle)),
                ]
    for block, reader in zip(blocks, readers, strict=True):
        parts.append(arrow((block.center, block.bottom), (block.center, reader.y), color=FROZEN.line))
    notes = (
        (blocks[1].center + 10, ("tokens of each frame:", "1 class + N patches")),
        (blocks[2].center + 10, ("forward only: no gradient,", "only these tokens are kept")),
    )
    for x, lines in notes:
        parts += [
            text(x, 168 + 16 * number, words, color=FROZEN.line, anchor="start") for number, words in enumerate(lines)
        ]
    turn = lower + 48 + 18
    parts += [
        arrow((head.center, turn), (stem.center, turn), color=TRAINED.line, dashed=True),
        text(head.right, turn + 19, "gradient: side network and head only", color=TRAINED.line, anchor="end"),
        arrow((head.center, head.y), (head.center, 200)),
        text(head.center, 192, "class scores", 13, True),
    ]
    return parts


def side_block() -> list[str]:
    """The lower part: what happens in one side block."""
    upper, lower = 388, 476
    project = Box(184, upper, 108, 48, TRAINED, ("project", "D to S"))
    shift = Box(528, upper, 186, 48, PLAIN, ("shift class token", "half from t+1, half from t-1"))
    fuse = Box(184, lower, 108, 80, PLAIN, ("fuse", "0.5 x + 0.5 z"))
    convolution = Box(344, lower, 124, 80, TRAINED, ("temporal conv", "each patch,", "over 3 frames"))
    attention = Box(
        528, lower, 186, 80, TRAINED, ("attention", "in each frame", "query: patches", "key, value: patches + class")
    )
    mlp = Box(774, lower, 92, 80, TRAINED, ("MLP", "S to 4S to S"))
    middle, bypass, end = fuse.middle, lower + 100, 916

    parts = [
        rectangle(24, 340, 952, 278, PAPER, RULE),
        text(40, 366, "Inside a side block", 14, True, anchor="start"),
        *legend(700, 354),
        text(
            40,
            600,
            "T: frames, N: patches of a frame, D: tower width, S: side width, K: classes. Norms are not drawn.",
            color=PALE_INK,
            anchor="start",
        ),
    ]
    for box in (project, shift, fuse, convolution, attention, mlp):
        parts += box.draw()
    parts += [
        text(92, project.middle - 4, "tokens of", color=FROZEN.line),
        text(92, project.middle + 12, "a tower block", color=FROZEN.line),
        arrow((140, project.middle), (project.x, project.middle), color=FROZEN.line),
        text(92, middle - 4, "x of the side"),
        text(92, middle + 12, "block before"),
        arrow((140, middle), (fuse.x, middle)),
        arrow((project.center, project.bottom), (project.center, fuse.y)),
        text(project.center + 10, project.bottom + 25, "patch tokens z", anchor="start"),
        arrow((project.right, project.middle), (shift.x, shift.middle)),
        text((project.right + shift.x) // 2, project.middle - 8, "class token of each frame"),
        arrow((shift.center, shift.bottom), (shift.center, attention.y)),
        arrow((fuse.right, middle), (convolution.x, middle)),
    ]
    for box, following in ((convolution, attention.x), (attention, mlp.x), (mlp, end)):
        branch, plus = box.x - 26, box.right + 22  # the input also goes around the box, and is added after it
        parts += [
            arrow((branch, middle), (branch, bypass), (plus, bypass), (plus, middle + 8)),
            arrow((box.right, middle), (plus - 8, middle)),
            f'<circle cx="{plus}" cy="{middle}" r="8" fill="{PAPER}" stroke="{INK}" stroke-width="1.6"/>',
            text(plus, middle + 5, "+", 15, True),
            arrow((plus + 8, middle), (following, middle)),
        ]
    parts += [text(944, middle - 4, "next"), text(944, middle + 12, "block")]
    return parts


def legend(x: int, y: int) -> list[str]:
    """What the three colours mean."""
    parts = []
    for colors, words, width in ((FROZEN, "frozen", 84), (TRAINED, "trained", 90), (PLAIN, "no weights", 0)):
        parts.append(rectangle(x, y, 18, 14, colors.box, colors.line, radius=3))
        parts.append(text(x + 26, y + 11, words, anchor="start"))
        x += width
    return parts


def figure() -> str:
    """The whole file."""
    title = "Side4Video: a frozen image tower, and a trained side network that reads the tokens of its blocks"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f"<title>{title}</title>",
        "<defs>",
        *map(arrow_head, (INK, FROZEN.line, TRAINED.line)),
        "</defs>",
        rectangle(1, 1, WIDTH - 2, HEIGHT - 2, PAPER, RULE),
        *tower_and_side_network(),
        *side_block(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(figure())
