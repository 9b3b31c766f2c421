"""Draw CrossMAE's decoder, after Fig. 4.

    python scripts/draw_decoder.py --output docs/decoder.svg

The same code writes the same bytes: the picture has no randomness and no date.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.arguments import Parser, check_arguments


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(prog="draw_decoder.py", description="Draw CrossMAE's decoder.")
    parser.add_argument("--output", default="docs/decoder.svg", help="(%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

from util.runs.run import run_main

WIDTH, HEIGHT = 830, 474
INK, QUIET, PALE = "#1f2933", "#5b6773", "#d5dbe1"
MASKED = "#c3cad2"
BLUE, PURPLE, ORANGE = ("#2f6fb0", "#e3eefa"), ("#7a52a8", "#f1ebf9"), ("#c4631f", "#fdeee1")
GRID = 6  # patches each way of the picture
VISIBLE = (2, 7, 10, 15, 18, 23, 26, 28, 33)  # a quarter of 36, p = .75
PREDICTED = (0, 5, 9, 13, 16, 20, 25, 30, 35)  # another quarter, γ = .25
GAMMA = "\N{GREEK SMALL LETTER GAMMA}"
SCENE = 126  # side of the picture in its own coordinates


class Drawing:
    """SVG elements, in the order in which they are painted."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def add(self, tag: str, content: str = "", **attributes: object) -> None:
        """Add an element; underscores in attribute names stand for hyphens."""
        named = "".join(
            f' {name.replace("_", "-")}="{number(value)}"' for name, value in attributes.items()
        )
        self.parts.append(f"<{tag}{named}>{content}</{tag}>" if content else f"<{tag}{named}/>")

    def box(self, x: float, y: float, w: float, h: float, colors: tuple[str, str]) -> None:
        """A rounded box with an outline and a fill."""
        stroke, fill = colors
        self.add("rect", x=x, y=y, width=w, height=h, rx=6, fill=fill, stroke=stroke)

    def square(self, x: float, y: float, side: float, fill: str, **attributes: object) -> None:
        """A square without an outline."""
        self.add("rect", x=x, y=y, width=side, height=side, fill=fill, **attributes)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 12.5,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """A line of text; y is its baseline, and *words* between asterisks are slanted."""
        pieces = escape(words).split("*")
        content = "".join(
            f'<tspan font-style="italic">{piece}</tspan>' if i % 2 else piece
            for i, piece in enumerate(pieces)
        )
        weight = {"font_weight": 600} if bold else {}
        self.add("text", content, x=x, y=y, font_size=size, fill=fill, text_anchor=anchor, **weight)

    def lines(self, x: float, y: float, rows: Sequence[str], **options: object) -> None:
        """Several lines of quiet text."""
        for i, row in enumerate(rows):
            self.text(x, y + 15 * i, row, size=11.5, fill=QUIET, **options)

    def arrow(self, *points: tuple[float, float], color: str = QUIET, head: bool = True) -> None:
        """A line through points, with a head at its end."""
        path = "M" + " L".join(f"{number(x)} {number(y)}" for x, y in points)
        self.add("path", d=path, fill="none", stroke=color, stroke_width=1.4)
        if head:
            (x0, y0), (x1, y1) = points[-2:]
            angle = number(math.degrees(math.atan2(y1 - y0, x1 - x0)))
            turn = f"translate({number(x1)} {number(y1)}) rotate({angle})"
            self.add("path", d="M1 0 L-6.5 -3.8 L-6.5 3.8 Z", fill=color, transform=turn)

    def patch(self, index: int, x: float, y: float, side: float) -> None:
        """A patch of the picture, cut out of it."""
        row, column = divmod(index, GRID)
        step = SCENE // GRID
        view = f"{column * step} {row * step} {step} {step}"
        self.add("svg", '<use href="#scene"/>', x=x, y=y, width=side, height=side, viewBox=view)

    def dots(self, x: float, y: float) -> None:
        """Three dots one below the other."""
        for dy in (-7, 0, 7):
            self.add("circle", cx=x, cy=y + dy, r=1.9, fill=QUIET)

    def svg(self) -> str:
        """The whole file."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img" '
            'font-family="Helvetica, Arial, Liberation Sans, sans-serif">'
        )
        title = (
            "<title>CrossMAE: encoder, inter-block attention and cross-attention decoder</title>"
        )
        return "\n".join([head, title, SCENE_DEFS, *self.parts, "</svg>"]) + "\n"


SCENE_DEFS = """\
<defs>
<linearGradient id="sky" x1="0" y1="0" x2="0" y2="1">
<stop offset="0" stop-color="#4c8fd0"/><stop offset="1" stop-color="#f7dfb8"/>
</linearGradient>
<g id="scene">
<rect width="126" height="126" fill="url(#sky)"/>
<circle cx="91" cy="35" r="15" fill="#fff1b8"/>
<path d="M0 82 L28 40 L47 66 L66 48 L100 90 L126 72 V126 H0 Z" fill="#7089a8"/>
<path d="M28 40 L19 53 L26 57 L31 52 L37 54 Z M66 48 L59 55 L65 60 L70 56 L74 58 Z" fill="#f5f8fb"/>
<path d="M0 92 C22 78 44 84 64 94 S106 96 126 84 V126 H0 Z" fill="#5f9a58"/>
<path d="M0 106 C30 96 60 116 126 102 V126 H0 Z" fill="#3f7a4a"/>
<path d="M16 112 L24 88 L32 112 Z M30 116 L37 96 L44 116 Z M98 112 L106 90 L114 112 Z"
 fill="#275a38"/>
</g>
</defs>"""


def number(value: object) -> str:
    """Write a number with two decimals at most, anything else as it is."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def masked_picture(drawing: Drawing, x: float, y: float, cell: float, shown: Sequence[int]) -> None:
    """The grid of patches, with a part of them shown."""
    for index in range(GRID * GRID):
        row, column = divmod(index, GRID)
        place = x + column * cell, y + row * cell
        if index in shown:
            drawing.patch(index, *place, cell - 1.5)
        else:
            drawing.square(*place, cell - 1.5, MASKED)


def token_row(x: float, side: float, gap: float, count: int) -> list[float]:
    """Left edges of tokens in a row that is centered on x."""
    width = count * side + (count - 1) * gap
    return [x - width / 2 + i * (side + gap) for i in range(count)]


def draw() -> str:
    """The picture: the encoder upward on the left, the decoder downward on the right."""
    d = Drawing()
    d.add(
        "rect",
        x=0.5,
        y=0.5,
        width=WIDTH - 1,
        height=HEIGHT - 1,
        rx=10,
        fill="#ffffff",
        stroke="#d0d7de",
    )
    encoder_x, maps_x, mix_x, decoder_x = 232, 356, 482, 612
    for x, name, color in (
        (encoder_x, "ViT encoder", BLUE),
        (maps_x, "feature maps", BLUE),
        (mix_x, "inter-block attention", PURPLE),
        (decoder_x, "decoder", ORANGE),
    ):
        d.text(x, 34, name, size=14, fill=color[0], bold=True)

    # The image and its visible patches.
    d.text(78, 80, "image", size=13, bold=True)
    d.add("svg", '<use href="#scene"/>', x=19, y=92, width=118, height=118, viewBox="0 0 126 126")
    d.arrow((78, 218), (78, 276))
    masked_picture(d, 19, 285, 20, VISIBLE)
    d.lines(78, 424, ("a fraction *p* of the", "patches is masked"))
    tokens_y = 338
    d.arrow((141, tokens_y + 6.5), (159, tokens_y + 6.5))
    for x, index in zip(token_row(encoder_x, 13, 2.5, 9), VISIBLE, strict=True):
        d.patch(index, x, tokens_y, 13)
    d.lines(encoder_x, 369, ("visible patches,", "with their positions"))

    # The encoder, upward; what enters block 1 and what leaves each block is a feature map.
    blocks = ((268, "block 1"), (210, "block 2"), (94, "block 12"))
    d.arrow((encoder_x, tokens_y - 5), (encoder_x, 304), color=BLUE[0])
    d.arrow((encoder_x, 268), (encoder_x, 246), color=BLUE[0])
    d.arrow((encoder_x, 210), (encoder_x, 188), color=BLUE[0])
    d.arrow((encoder_x, 152), (encoder_x, 130), color=BLUE[0])
    d.arrow((encoder_x, 94), (encoder_x, 72), (maps_x - 47, 72), color=BLUE[0])
    d.dots(encoder_x, 170)
    for y, name in blocks:
        d.box(encoder_x - 60, y, 120, 34, BLUE)
        d.text(encoder_x, y + 22, name)
    maps = {0: 318, 1: 257, 2: 199, 12: 72}
    for index, y in maps.items():
        if index != 12:
            d.arrow((encoder_x, y), (maps_x - 47, y), color=BLUE[0])
        for x in token_row(maps_x, 6.5, 1.5, 10):
            d.square(x, y - 3.5, 6.5, BLUE[0], rx=1)
        d.text(maps_x, y - 9, f"map {index}", size=11.5, fill=QUIET)
    d.dots(maps_x, 139)
    d.lines(maps_x, 341, ("class token and", "visible tokens"))

    # One mix of all maps for each decoder block. Early blocks lean on deep maps (Sec. 4.5).
    mixes = {1: 118, 2: 202, 12: 310}
    preferred = {1: 40, 2: 175, 12: 330}
    for block, mix_y in mixes.items():
        for y in maps.values():
            weight = math.exp(-(((y - preferred[block]) / 120) ** 2))
            x0, x1 = maps_x + 44, mix_x - 14
            bend = (x0 + x1) / 2
            d.add(
                "path",
                d=f"M{x0} {y} C{number(bend)} {y} {number(bend)} {mix_y} {x1} {mix_y}",
                fill="none",
                stroke=PURPLE[0],
                stroke_width=0.7 + 2.3 * weight,
                stroke_opacity=0.25 + 0.6 * weight,
            )
    for mix_y in mixes.values():
        d.add("circle", cx=mix_x, cy=mix_y, r=14, fill=PURPLE[1], stroke=PURPLE[0])
        d.text(mix_x, mix_y + 5.5, "Σ", size=16, fill=PURPLE[0])
        d.arrow((mix_x + 14, mix_y), (decoder_x - 62, mix_y), color=PURPLE[0])
        d.text((mix_x + decoder_x - 48) / 2, mix_y - 6, "*k*, *v*", size=11.5, fill=PURPLE[0])
    d.dots(mix_x, 256)
    d.lines(mix_x, 352, ("one learned mix", "of the maps for", "each decoder block"))

    # The decoder, downward.
    queries_y = 56
    for x in token_row(decoder_x, 13, 2.5, 9):
        d.square(x, queries_y, 13, ORANGE[0], rx=2)
    d.arrow((decoder_x, queries_y + 16), (decoder_x, 89), color=ORANGE[0])
    d.arrow((decoder_x, 147), (decoder_x, 173), color=ORANGE[0])
    d.arrow((decoder_x, 231), (decoder_x, 246), color=ORANGE[0], head=False)
    d.arrow((decoder_x, 266), (decoder_x, 281), color=ORANGE[0])
    d.arrow((decoder_x, 339), (decoder_x, 372), color=ORANGE[0])
    d.dots(decoder_x, 256)
    for block, mix_y in mixes.items():
        top = mix_y - 29
        d.box(decoder_x - 62, top, 124, 58, ORANGE)
        d.text(decoder_x, top + 18, "cross-attention")
        d.add("path", d=f"M{decoder_x - 62} {top + 27} h124", stroke=ORANGE[0], stroke_opacity=0.35)
        d.text(decoder_x, top + 45, "MLP")
        d.text(decoder_x + 62, top - 5, f"block {block}", anchor="end", size=11.5, fill=QUIET)
    for x, index in zip(token_row(decoder_x, 13, 2.5, 9), PREDICTED, strict=True):
        d.patch(index, x, 376, 13)
    d.lines(decoder_x, 407, ("predicted patches: they never", "attend to each other"))

    # Where the mask tokens are, and where the predictions go.
    cell, left = 14, 724
    for index in range(GRID * GRID):
        row, column = divmod(index, GRID)
        fill = ORANGE[0] if index in PREDICTED else PALE
        d.square(left + column * cell, 22 + row * cell, cell - 1.5, fill, rx=1)
    d.arrow((left - 6, queries_y + 6.5), (decoder_x + 76, queries_y + 6.5), color=ORANGE[0])
    d.lines(left + 41, 126, ("mask tokens at a", f"fraction *{GAMMA}* ≤ *p* of", "all positions"))
    masked_picture(d, left, 340, cell, PREDICTED)
    d.arrow((decoder_x + 74, 382.5), (left - 6, 382.5), color=ORANGE[0])
    d.lines(left + 41, 442, ("loss: mean squared", "error of these"))
    return d.svg()


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file."""
    args = parse_args(argv)
    Path(args.output).write_text(draw(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run_main(main)
