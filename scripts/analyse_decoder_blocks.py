"""Split reconstructions into what each decoder block adds (Fig. 5a-b, App. D).

    python scripts/analyse_decoder_blocks.py --checkpoint C --data_path D --output_dir O

O/decoder_blocks.json and O/decoder_blocks.png have each block's share of the reconstruction, its
energy by spatial frequency, and the PSNR after it; O/decoder_blocks_pictures.png shows the parts of
a few images and their running sums. It needs matplotlib.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.flags import ImageSettings, analysis_parser
from util.arguments import check_arguments, take
from util.errors import counted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    args = analysis_parser(__doc__).parse_args(argv)
    take(ImageSettings, args)
    return args


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from scripts.analysis.inputs import MEMORY_ADVICE, Subject, open_images, start_analysis
from scripts.analysis.outputs import log_table, open_output, write_report
from util.data.batch import denormalize
from util.eval.decoder_blocks import BlockShares, block_levels, level_pixels, measure_blocks
from util.eval.display import Display, Rendering
from util.eval.figures import GRAY, reconstruction_panels
from util.eval.plots import SEQUENTIAL, new_figure, picture_grid, show_picture
from util.eval.reconstructions import MOMENTS_NOTE
from util.masking import TokenSplit
from util.runs.run import run_main

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INPUT = "positions and mask token"  # level 0
STRONGEST = 0.99  # quantile of a level's pixels that is drawn black or white

_logger = logging.getLogger(__name__)


def log_results(found: BlockShares) -> list[dict[str, object]]:
    """Log the table of levels; return its rows, with energies, as plain values."""
    columns = {
        "share": found.share,
        "low_share": found.low_share,
        "high_share": found.high_share,
        "detail": found.detail,
        "psnr": found.psnr,
    }
    rows: list[dict[str, object]] = [
        {"block": level, **{name: own[level].item() for name, own in columns.items()}}
        for level in range(len(found.psnr))
    ]
    _logger.info(
        "share of the reconstruction: of all frequencies, of the coarse and of the fine half; the "
        "fine half's part of the block's own energy; PSNR of the sum up to the block"
    )
    names = [INPUT, *(f"block {level}" for level in range(1, len(rows)))]
    header = ["", "share", "coarse", "fine", "own fine", "PSNR, dB"]
    log_table(
        header, [[name, *list(row.values())[1:]] for name, row in zip(names, rows, strict=True)]
    )
    for row, total, energy in zip(rows, found.share.cumsum(0), found.energy, strict=True):
        row |= {"cumulative_share": total.item(), "energy": energy.tolist()}
    return rows


def plot(found: BlockShares) -> "Figure":
    """Spectra of the levels, their shares, and PSNR of the running sums."""
    from matplotlib import colormaps

    figure = new_figure(9, 2.8)
    spectra, shares, quality = figure.subplots(1, 3)
    levels = range(len(found.psnr))
    cycles = torch.arange(found.energy.shape[1]) / 2
    for level in levels:
        color = colormaps[SEQUENTIAL](level / max(1, levels[-1]))
        label = level if level in (0, levels[-1] // 2, levels[-1]) else None
        spectra.semilogy(cycles, found.energy[level], color=color, label=label)
    spectra.set(xlabel="cycles per patch", ylabel="energy")
    spectra.legend(title="block", fontsize=7, title_fontsize=7)
    for name, own, color in (
        ("coarse half", found.low_share, "#0072B2"),
        ("fine half", found.high_share, "#D55E00"),
    ):
        shares.plot(levels, own, "o-", color=color, label=name, markersize=4)
    shares.axhline(0, color="black", linewidth=0.8)
    shares.set(xlabel="decoder block (0: its input)", ylabel="share of the reconstruction")
    shares.set_ylim(top=1.45 * shares.get_ylim()[1])  # room for the legend
    shares.legend(title="frequencies", loc="upper right", fontsize=7, title_fontsize=7)
    quality.plot(levels, found.psnr, "o-", color="black", markersize=4)
    quality.set(xlabel="decoder block (0: its input)", ylabel="PSNR of the sum so far, dB")
    return figure


@torch.no_grad()
def draw_stack(
    subject: Subject, images: Tensor, split: TokenSplit, display: Display | None = None
) -> "Figure":
    """Draw the image stack: for each image a row of levels and one of their running sums.

    Args:
        display: None for 8-bit RGB.
    """
    display = display or Display()
    model = subject.model
    levels = block_levels(model, images, split)
    levels, offset = level_pixels(model, levels, images, split, subject.colors)
    strength = levels[1:].abs().flatten(2).transpose(0, 1).flatten(1)  # (B, J*P*p*p*C)
    strength = strength.sort(dim=1).values[:, int(STRONGEST * (strength.shape[1] - 1))]
    gain = GRAY / strength.clamp(min=1e-6).view(-1, 1, 1)
    originals = denormalize(images, *subject.colors).clamp(0, 1)
    rendering, as_they_are = display.of(originals), replace(display, stretch=False).of(originals)

    def panels(patches: Tensor, rendering: Rendering = rendering) -> list[Tensor]:
        pictures, pixels = rendering.images(originals), rendering.patches(patches)
        found = reconstruction_panels(pictures, pixels, split, model.encoder.patch_size)
        return [panel.permute(0, 2, 3, 1).cpu() for panel in found]

    alone = [panels(GRAY + gain * level, as_they_are)[2] for level in levels]
    sums = [panels(offset + x)[3] for x in levels.cumsum(dim=0)]
    original, masked = (panel.clamp(0, 1) for panel in panels(offset)[:2])
    num_columns = 1 + len(levels)
    figure, all_axes = picture_grid(2 * len(images), num_columns, images.shape[2:])
    for image in range(len(images)):
        for row, cells in enumerate(([original, *alone], [masked, *sums])):
            for column, (axes, cell) in enumerate(
                zip(all_axes[2 * image + row], cells, strict=True)
            ):
                title = "" if image or row else "image" if not column else f"block {column - 1}"
                title = "input" if title == "block 0" else title
                show_picture(axes, cell[image].clamp(0, 1).numpy(), title)
    notes = ["Upper rows: each part alone, its contrast raised. Lower rows: their sum so far."]
    notes += [f"With {MOMENTS_NOTE}."] * model.norm_pix_loss
    notes += [f"{display.note.capitalize()}."] * bool(display.note)
    figure.supxlabel("\n".join(notes), fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and draw the parts of reconstructions."""
    args = parse_args(argv)
    settings = take(ImageSettings, args)
    device = start_analysis(args)

    subject = Subject.load(
        args.checkpoint, device=device, seed=args.seed, mask_ratio=args.mask_ratio
    )
    images = open_images(settings, subject.transform, seed=args.seed, device=device)
    output = open_output(args.output_dir)
    display = subject.display(images.shown, settings.show_channels)
    pictures = draw_stack(subject, *subject.shown(images), display)
    _logger.info("measuring %s", counted(images.num_measured, "image"))
    found = measure_blocks(subject.model, subject.batches(images), subject.colors)
    report = {"num_images": images.num_measured, "blocks": log_results(found)}
    figures = {"plot": plot(found), "pictures": pictures}
    write_report(output, "decoder_blocks", vars(args), report, **figures)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
