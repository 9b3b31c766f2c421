"""Figures of reconstructions: the content of each panel."""

import numpy as np
import pytest
import torch

from tests.helpers.figures import cells_of, top_of
from tests.helpers.models import crossmae_nano
from tests.helpers.training import CPU, MASKING, MEAN, STD
from util.compute.precision import Precision
from util.eval import figures
from util.eval.figures import (
    GAP,
    GROUP_GAP,
    LABELS,
    MARGIN,
    draw_figure,
    draw_reconstructions,
    images_in_row,
    readable_name,
    reconstruction_panels,
)
from util.eval.reconstructions import blind_prediction, patch_psnr
from util.masking import TokenSplit
from util.patches import patchify

# Two images of 2 x 3 patches of 4 pixels, each with two visible and two predicted patches.
SPLIT = TokenSplit(torch.tensor([[0, 4], [5, 1]]), torch.tensor([[5, 2], [0, 3]]))
NEITHER = torch.tensor([[1, 3], [2, 4]])


@pytest.fixture
def panels():
    images, pixels = torch.rand(2, 3, 8, 12), torch.rand(2, 2, 48)
    found = reconstruction_panels(images, pixels, SPLIT, patch_size=4)
    assert [panel.shape for panel in found] == [images.shape] * 4
    return images, pixels, [patchify(panel, 4) for panel in found]


def rows(patches, ids):
    return torch.stack([patches[i, ids[i]] for i in range(len(ids))])


def test_visible_pixels_are_kept_and_masked_ones_gray(panels):
    images, _, (original, masked, _, _) = panels
    assert torch.equal(original, patchify(images, 4))
    assert torch.equal(rows(masked, SPLIT.visible), rows(original, SPLIT.visible))
    for ids in (SPLIT.predicted, NEITHER):
        assert (rows(masked, ids) == 0.5).all()


def test_a_reconstruction_is_where_it_was_predicted_and_nowhere_else(panels):
    _, pixels, (_, _, reconstruction, _) = panels
    assert torch.equal(rows(reconstruction, SPLIT.predicted), pixels)
    for ids in (SPLIT.visible, NEITHER):
        assert (rows(reconstruction, ids) == 0.5).all()


def test_the_last_panel_joins_predicted_and_visible_patches(panels):
    _, pixels, (original, _, _, joined) = panels
    assert torch.equal(rows(joined, SPLIT.predicted), pixels)
    assert torch.equal(rows(joined, SPLIT.visible), rows(original, SPLIT.visible))
    assert (rows(joined, NEITHER) == 0.5).all()


def test_predictions_are_clipped_and_inputs_unchanged():
    images, pixels = torch.rand(2, 3, 8, 12), 4 * torch.rand(2, 2, 48) - 2
    before = images.clone(), pixels.clone()
    panels = reconstruction_panels(images, pixels, SPLIT, patch_size=4)
    assert all(panel.min() >= 0 and panel.max() <= 1 for panel in panels)
    assert torch.equal(images, before[0])
    assert torch.equal(pixels, before[1])


@pytest.mark.parametrize(
    ("num_images", "num_panels", "size", "expected"),
    [
        (1, 3, (64, 64), 1),
        (2, 3, (64, 64), 1),  # 3 x 2 pictures
        (3, 3, (64, 64), 2),
        (8, 3, (64, 64), 2),  # 6 x 4
        (9, 3, (64, 64), 3),  # 9 x 3, since 6 x 5 is too high
        (8, 5, (64, 64), 2),
        (2, 3, (64, 32), 2),
        (4, 3, (32, 64), 1),
        (3, 1, (640, 10), 3),
    ],
)
def test_a_figure_has_as_many_images_in_a_row_as_make_it_wide(
    num_images, num_panels, size, expected
):
    assert images_in_row(num_images, num_panels, size) == expected


@pytest.mark.parametrize("size", [(8, 12), (64, 64), (224, 224), (60, 20)])
@pytest.mark.parametrize("num_images", [1, 3, 8])
def test_every_picture_is_shown_once_in_its_place(size, num_images):
    panels = [torch.rand(num_images, 3, *size) for _ in LABELS]
    figure = draw_figure(panels, title="a title")
    assert figure.dtype == np.uint8
    cells = cells_of(figure, num_images, len(panels), size)
    for number, panel in enumerate(panels):
        for image, own in enumerate(cells):
            expected = (panel[image].permute(1, 2, 0) * 255).round().byte().numpy()
            assert np.array_equal(own[number], expected)


def text_rows(figure, top):
    """Rows above the pictures that have text in them."""
    return (figure[:top] < 128).any(axis=(1, 2))


def num_lines(rows):
    """Number of separate runs of rows with text."""
    return int((np.diff(rows.astype(int), prepend=0) == 1).sum())


def test_labels_are_above_the_pictures_of_every_image_in_the_first_row():
    panels = [torch.ones(8, 3, 128, 128) for _ in LABELS]
    figure = draw_figure(panels)
    top = top_of(figure, 8, 3, (128, 128))
    for group in range(2):
        for column in range(3):
            left = MARGIN + group * (3 * (128 + GAP) - GAP + GROUP_GAP) + column * (128 + GAP)
            label = figure[:top, left : left + 128]
            assert label.min() < 128  # there is text
            assert (label[:, -2:] > 200).all()  # and it ends within the column


def test_text_grows_with_the_figure():
    figures = {side: draw_figure([torch.ones(8, 3, side, side)] * 3) for side in (128, 448)}
    heights = {
        side: text_rows(figure, top_of(figure, 8, 3, (side, side))).sum()
        for side, figure in figures.items()
    }
    assert heights[448] == pytest.approx(3.5 * heights[128], rel=0.25)


@pytest.mark.parametrize("num_images", [1, 8])
def test_a_title_is_whole_in_as_many_lines_as_it_takes(num_images):
    panels = [torch.ones(num_images, 3, 128, 128) for _ in LABELS]
    title = " ".join(["word"] * 60)
    plain, titled = draw_figure(panels), draw_figure(panels, title=title)
    tops = [top_of(figure, num_images, 3, (128, 128)) for figure in (plain, titled)]
    assert num_lines(text_rows(titled, tops[1])) > num_lines(text_rows(plain, tops[0])) + 1
    assert (titled[:, -MARGIN:] == 255).all()
    assert np.array_equal(titled[tops[1] :], plain[tops[0] :])


def test_long_labels_are_smaller_and_show_their_ends():
    panels = [torch.ones(4, 3, 448, 448) for _ in range(3)]
    labels = ["a", "b", "model-" * 8 + "75"]
    figure = draw_figure(panels, labels)
    assert (figure[:, -MARGIN:] == 255).all()
    assert np.array_equal(figure, draw_figure(panels, ["a", "b", "model-" * 8 + "75"]))
    others = [draw_figure(panels, ["a", "b", end]) for end in ("model-" * 8 + "25", "c")]
    assert all((figure != other).any() for other in others)
    narrow = [panel[:, :, :128, :128] for panel in panels]
    cut = draw_figure(narrow, ["a", "b", "x" * 99 + "75"])
    assert (cut[:, -MARGIN:] == 255).all()
    assert np.array_equal(cut, draw_figure(narrow, ["a", "b", "x" * 88 + "75"]))


@pytest.mark.parametrize(
    ("name", "epoch", "expected"),
    [
        ("crossmae_vit_tiny_patch16", 20, "CrossMAE ViT-tiny/16, epoch 20"),
        ("mae_vit_huge_patch14", None, "MAE ViT-huge/14"),
        ("mae_vit_base_patch16", 0, "MAE ViT-base/16, untrained"),
        ("own_vit_nano", 1, "own ViT-nano, epoch 1"),
    ],
)
def test_models_are_named_as_people_write_them(name, epoch, expected):
    assert readable_name(name, epoch) == expected


def title_of(monkeypatch, **options):
    """The title of a figure of two images by an untrained model, and the words of its numbers."""
    titles = []
    monkeypatch.setattr(figures, "draw_figure", lambda panels, *, title: titles.append(title))
    model = crossmae_nano(**options)
    images, split = torch.randn(2, 3, 16, 16), MASKING[0.25].full_split(torch.rand(2, 16))
    colors = {"mean": MEAN, "std": STD}
    precision = Precision("fp32", CPU)
    draw_reconstructions(model, images, split, **colors, precision=precision, name="NANO, epoch 3")
    blind = blind_prediction(model, images, split)
    with torch.no_grad():
        pred = model.predict(images, split)
    both = [patch_psnr(model, p, images, split, (MEAN, STD)).mean() for p in (pred, blind)]
    return titles[0], *(f"{quality:.1f} dB" for quality in both)


def test_a_title_says_what_is_masked_and_how_good_the_result_is(monkeypatch):
    title, quality, blind = title_of(monkeypatch, norm_pix_loss=False)
    assert title == (
        f"NANO, epoch 3: 75% of the patches are masked, their PSNR is {quality} "
        f"(one flat color: {blind})"
    )


def test_a_title_says_what_comes_from_the_original(monkeypatch):
    title, quality, blind = title_of(monkeypatch, norm_pix_loss=True)
    assert title == (
        f"NANO, epoch 3: 75% of the patches are masked, their PSNR is {quality} with each patch's "
        f"mean and deviation from the original (flat patches: {blind})"
    )
