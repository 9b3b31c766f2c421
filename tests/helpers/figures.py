"""Pictures in a figure of reconstructions, found by their places."""

from util.eval.figures import GAP, GROUP_GAP, MARGIN, SMALLEST_CELL, images_in_row

SIZE = (16, 16)  # of the images that nano models read


def grid_shape(num_images, num_panels, size=SIZE):
    """Rows of a figure, images in a row, and height and width of a picture in it."""
    factor = -(-SMALLEST_CELL // size[1])
    in_row = images_in_row(num_images, num_panels, size)
    return -(-num_images // in_row), in_row, size[0] * factor, size[1] * factor


def width_of(num_images, num_panels, size=SIZE):
    """Width of a figure, in pixels."""
    _, in_row, _, width = grid_shape(num_images, num_panels, size)
    return in_row * (num_panels * (width + GAP) - GAP + GROUP_GAP) - GROUP_GAP + 2 * MARGIN


def top_of(figure, num_images, num_panels, size=SIZE):
    """Height of the text above the pictures, with the margin."""
    num_rows, _, height, _ = grid_shape(num_images, num_panels, size)
    return figure.shape[0] - MARGIN - num_rows * (height + GAP) + GAP


def cells_of(figure, num_images, num_panels, size=SIZE):
    """All pictures at the images' own size: [image][panel] -> int (height, width, 3).

    A picture that is not enlarged evenly, or anything else beside the text, is an error.
    """
    assert figure.shape[1] == width_of(num_images, num_panels, size)
    _, in_row, height, width = grid_shape(num_images, num_panels, size)
    top = top_of(figure, num_images, num_panels, size)
    factor, rest, found = height // size[0], figure.copy(), []
    for image in range(num_images):
        row, group = divmod(image, in_row)
        y = top + row * (height + GAP)
        found.append([])
        for panel in range(num_panels):
            x = MARGIN + group * (num_panels * (width + GAP) - GAP + GROUP_GAP)
            x += panel * (width + GAP)
            large = figure[y : y + height, x : x + width]
            small = large[::factor, ::factor]
            assert (large == small.repeat(factor, axis=0).repeat(factor, axis=1)).all()
            found[-1].append(small.astype(int))
            rest[y : y + height, x : x + width] = 255
    assert (rest[top:] == 255).all()
    return found
