"""Figures of reconstructions: the content of each panel."""

import numpy as np
import pytest
import torch

from util.eval.figures import (
    COLUMNS,
    GAP,
    MOMENTS_NOTE,
    TEXT_HEIGHT,
    draw_figure,
    reconstruction_panels,
)
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


@pytest.mark.parametrize(("height", "width", "factor"), [(8, 12, 11), (64, 64, 2), (224, 224, 1)])
def test_a_figure_has_one_row_per_image_and_small_ones_are_enlarged(height, width, factor):
    panels = [torch.rand(3, 3, height, width) for _ in COLUMNS]
    figure = draw_figure(panels)
    assert figure.dtype == np.uint8
    cell_height, cell_width = height * factor, width * factor
    assert figure.shape == (
        TEXT_HEIGHT + 3 * (cell_height + GAP),
        4 * (cell_width + GAP) - GAP,
        3,
    )
    for column, panel in enumerate(panels):
        for row in range(3):
            top, left = TEXT_HEIGHT + row * (cell_height + GAP), column * (cell_width + GAP)
            cell = figure[top : top + cell_height : factor, left : left + cell_width : factor]
            expected = (panel[row].permute(1, 2, 0) * 255).round().byte().numpy()
            assert np.array_equal(cell, expected)


def test_columns_are_titled_and_a_note_is_below():
    panels = [torch.ones(1, 3, 32, 32) for _ in COLUMNS]
    plain, noted = draw_figure(panels), draw_figure(panels, note=MOMENTS_NOTE)
    for column in range(4):
        title = plain[:TEXT_HEIGHT, column * (128 + GAP) : column * (128 + GAP) + 128]
        assert title.min() < 128  # there is text
        assert (title[:, -2:] > 200).all()  # and it ends within the column
    assert noted.shape[0] == plain.shape[0] + TEXT_HEIGHT
    assert np.array_equal(noted[: plain.shape[0]], plain)
    note = noted[plain.shape[0] :]
    assert note.min() < 128
    assert (note[:, -2:] > 200).all()  # it is not cut off
