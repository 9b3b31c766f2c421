"""Compare the reconstructions of several checkpoints on the same masks (Fig. 2, Table 13).

    python scripts/compare_reconstructions.py --checkpoints A B C --images DIR|FILES --output F.png
    python scripts/compare_reconstructions.py --checkpoints A B C --table --data_path D \\
        --images DIR|FILES --output F.png

Each image is shown as the original, with its visible patches only, and as each checkpoint's result:
the visible patches and the predictions for all others. F.json has PSNR and SSIM of the drawn images
or, with --table, of all images in --data_path.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.analysis.flags import CHECKPOINT_HELP, ImageSettings, add_image_args, add_mask_args
from scripts.analysis.pictures import check_picture_path
from util.arguments import Parser, check_arguments, take
from util.errors import InputError, counted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", required=True, nargs="+", help=CHECKPOINT_HELP)
    add_mask_args(parser)
    parser.add_argument("--output", type=Path, required=True, help="such as figure.png")
    parser.add_argument(
        "--table",
        action="store_true",
        help="measure the images in --data_path, not only those that are drawn (off)",
    )
    add_image_args(parser)
    args = parser.parse_args(argv)
    settings = take(ImageSettings, args)
    check_picture_path(args.output)
    if args.table and not (settings.data_path or settings.dataset):
        raise InputError("--table needs images to measure: give --data_path")
    label_checkpoints(args.checkpoints)  # refuses one that is named twice
    return args


def label_checkpoints(paths: Sequence[str]) -> list[str]:
    """Short names of checkpoints: their folders', or their own if these are the same.

    Raises:
        InputError: a checkpoint is named twice.
    """
    folders = [Path(path).resolve().parent.name for path in paths]
    for names in (folders, [Path(path).stem for path in paths]):
        if len(set(names)) == len(names):
            return names
    if len(set(paths)) < len(paths):
        raise InputError("--checkpoints names a file twice: leave one out")
    return list(paths)


if __name__ == "__main__":
    check_arguments(parse_args)  # before the imports below, which take seconds

import torch
from torch import Tensor

from scripts.analysis.inputs import (
    MEMORY_ADVICE,
    AnalysisImages,
    Subject,
    open_images,
    start_analysis,
)
from scripts.analysis.outputs import log_table, save_picture
from util.data.batch import denormalize
from util.eval.figures import LABELS, draw_figure, masked_share, reconstruction_panels
from util.eval.reconstructions import MOMENTS_NOTE, predicted_pixels, reconstruction_scores
from util.masking import TokenSplit
from util.runs.files import write_json
from util.runs.run import run_main, versions

SSIM_SIDE = 11  # pixels of its window

_logger = logging.getLogger(__name__)


def check_comparable(subjects: Sequence[Subject], paths: Sequence[str]) -> None:
    """Check that all checkpoints can have the same masks.

    Raises:
        InputError: image size, channels, patch size or masking differ.
    """
    first = subjects[0]
    for other, path in zip(subjects[1:], paths[1:], strict=True):
        sizes = [(*s.model.encoder.img_size, s.model.encoder.patch_size) for s in (first, other)]
        if sizes[0] != sizes[1]:
            (h, w, p), (h2, w2, p2) = sizes
            raise InputError(
                f"{path} is for {h2} x {w2} px with patches of {p2}, {paths[0]} for {h} x {w} with "
                f"patches of {p}: compare checkpoints of one size"
            )
        if first.pixels.num_channels != other.pixels.num_channels:
            channels, others = (s.pixels.num_channels for s in (first, other))
            raise InputError(
                f"{path} is for images of {counted(others, 'channel')}, {paths[0]} for {channels}: "
                "compare checkpoints for the same images"
            )
        if first.masking != other.masking:
            raise InputError(
                f"{path} and {paths[0]} were trained with different masks: set --mask_ratio, or "
                "compare checkpoints with the same --mask_sampling"
            )


def measure(subject: Subject, images: AnalysisImages) -> dict[str, float]:
    """Mean PSNR and SSIM of a checkpoint's reconstructions."""
    sums = torch.zeros(2, dtype=torch.float64)
    for batch, split in subject.batches(images):
        scores = reconstruction_scores(subject.model, batch, split, subject.colors)
        sums += torch.stack([score.sum() for score in scores]).cpu().double()
    psnr, ssim = (sums / images.num_measured).tolist()
    return {"psnr": psnr, "ssim": ssim}


@torch.no_grad()
def draw(
    subject: Subject, images: AnalysisImages, show_channels: Sequence[int] | None = None
) -> list[Tensor]:
    """Panels of `reconstruction_panels` for a checkpoint."""
    batch, split = subject.shown(images)
    model = subject.model
    pred = model.predict(batch, split)
    pixels = predicted_pixels(model, pred, batch, split, subject.colors)
    originals = denormalize(batch, *subject.colors)
    rendering = subject.display(images.shown, show_channels).of(originals)
    originals, pixels = rendering.images(originals), rendering.patches(pixels)
    panels = reconstruction_panels(originals, pixels, split, model.encoder.patch_size)
    return [panel.cpu() for panel in panels]


def title_of(subjects: dict[str, Subject], split: TokenSplit) -> str:
    """Say what is masked, and which columns have the originals' patch moments."""
    normalized = [name for name, subject in subjects.items() if subject.model.norm_pix_loss]
    if not normalized:
        return masked_share(split)
    where = "" if len(normalized) == len(subjects) else f" in {', '.join(normalized)}"
    return f"{masked_share(split)}; {MOMENTS_NOTE}{where}"


def main(argv: Sequence[str] | None = None) -> None:
    """Compare checkpoints."""
    args = parse_args(argv)
    settings = take(ImageSettings, args)
    names = label_checkpoints(args.checkpoints)
    device = start_analysis(args)

    options = {"device": device, "seed": args.seed, "mask_ratio": args.mask_ratio}
    subjects = {
        name: Subject.load(path, **options)
        for name, path in zip(names, args.checkpoints, strict=True)
    }
    check_comparable(list(subjects.values()), args.checkpoints)
    if min(next(iter(subjects.values())).model.encoder.img_size) < SSIM_SIDE:
        raise InputError(f"SSIM needs images of at least {SSIM_SIDE} px: use other checkpoints")
    opened = {
        name: open_images(settings, subject.transform, seed=args.seed, device=device)
        for name, subject in subjects.items()
    }
    panels = [draw(x, opened[name], settings.show_channels) for name, x in subjects.items()]
    columns = [*panels[0][:2], *(own[3] for own in panels)]
    first, images = subjects[names[0]], opened[names[0]]
    title = title_of(subjects, first.shown(images)[1])
    if note := first.display(images.shown, settings.show_channels).note:
        title += f"; {note}"
    save_picture(draw_figure(columns, [*LABELS[:2], *names], title=title), args.output)

    results = {}
    for (name, subject), path in zip(subjects.items(), args.checkpoints, strict=True):
        images = opened[name] if args.table else opened[name].only_shown()
        moments = "original" if subject.model.norm_pix_loss else "predicted"
        found = measure(subject, images)
        results[name] = {"checkpoint": path, "patch_moments": moments, **found}
    _logger.info(
        "PSNR of the masked patches and SSIM of the image, mean of %s",
        counted(images.num_measured, "image"),
    )
    header = ["", "PSNR, dB", "SSIM", "patch mean and deviation"]
    log_table(header, [[n, r["psnr"], r["ssim"], r["patch_moments"]] for n, r in results.items()])
    if len({result["patch_moments"] for result in results.values()}) > 1:
        _logger.warning("not comparable: some were given the patches' mean and deviation")
    arguments = {**vars(args), "output": str(args.output)}
    report = {"num_images": images.num_measured, "checkpoints": results}
    path = args.output.with_suffix(".json")
    write_json(path, {"args": arguments, "versions": versions(), **report})
    _logger.info("wrote %s and %s", args.output, path)


if __name__ == "__main__":
    run_main(main, memory_advice=MEMORY_ADVICE)
