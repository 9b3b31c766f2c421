"""Patches and tokens by index."""

import pytest
import torch

from util.patches import (
    RawImages,
    denormalize_patches,
    gather_patches,
    gather_tokens,
    normalize,
    patch_moments,
    patchify,
    scatter_patches,
    unpatchify,
)

SHAPES = [(1, 8, 8, 4), (3, 8, 12, 4), (4, 6, 3, 3), (2, 5, 4, 1)]  # C, H, W, p
shapes = pytest.mark.parametrize("shape", SHAPES)


def draw(shape, count=None):
    """Images and, for each, `count` different patch indices."""
    C, H, W, p = shape
    num_patches = H // p * (W // p)
    ids = torch.rand(2, num_patches).argsort(dim=1)[:, :count]
    return torch.randn(2, C, H, W), ids


@shapes
def test_patches_are_row_major_with_channels_last(shape):
    C, H, W, p = shape
    images, _ = draw(shape)
    patches = patchify(images, p)
    expected = [
        [
            [image[c, row + i, column + j] for i in range(p) for j in range(p) for c in range(C)]
            for row in range(0, H, p)
            for column in range(0, W, p)
        ]
        for image in images
    ]
    assert torch.equal(patches, torch.tensor(expected))


@shapes
def test_unpatchify_undoes_patchify_and_back(shape):
    _, H, W, p = shape
    images, _ = draw(shape)
    grid_size = (H // p, W // p)
    patches = patchify(images, p)
    assert torch.equal(unpatchify(patches, p, grid_size), images)
    assert torch.equal(patchify(unpatchify(patches, p, grid_size), p), patches)


@shapes
def test_the_order_of_channels_in_memory_changes_no_patch(shape):
    images, ids = draw(shape, count=2)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(patchify(last, shape[-1]), patchify(images, shape[-1]))
    gathered = (gather_patches(x, ids, shape[-1]) for x in (last, images))
    assert torch.equal(*gathered)


@shapes
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_patches_of_raw_images_are_those_of_normalized_ones_to_the_bit(shape, memory_format):
    C, H, W, p = shape
    pixels = torch.randint(0, 256, (2, C, H, W), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=memory_format)
    mean, std = torch.rand(C), 0.1 + torch.rand(C)
    raw = RawImages(pixels, mean, std)
    images = normalize(pixels, mean.view(-1, 1, 1), std.view(-1, 1, 1))
    assert raw.shape == images.shape and len(raw) == len(images)
    _, ids = draw(shape, count=2)
    assert torch.equal(gather_patches(raw, ids, p), gather_patches(images, ids, p))


@shapes
def test_gather_picks_from_patchify(shape):
    p = shape[-1]
    images, ids = draw(shape, count=2)
    expected = patchify(images, p).take_along_dim(ids.unsqueeze(-1), dim=1)
    assert torch.equal(gather_patches(images, ids, p), expected)


@shapes
def test_memory_format_does_not_matter(shape):
    p = shape[-1]
    images, ids = draw(shape, count=2)
    channels_last = images.to(memory_format=torch.channels_last)
    patches = gather_patches(images, ids, p)
    assert torch.equal(patchify(channels_last, p), patchify(images, p))
    assert torch.equal(gather_patches(channels_last, ids, p), patches)
    assert torch.equal(
        scatter_patches(channels_last * 0, patches, ids, p),
        scatter_patches(images * 0, patches, ids, p),
    )


@shapes
def test_scatter_undoes_gather(shape):
    p = shape[-1]
    images, ids = draw(shape)
    canvas = torch.zeros_like(images)
    got = scatter_patches(canvas, gather_patches(images, ids, p), ids, p)
    assert torch.equal(got, images)
    assert not canvas.any()


def test_scatter_replaces_nothing_but_the_chosen_patches():
    images, ids = draw((3, 8, 12, 4), count=2)
    patches = torch.randn(2, 2, 48, dtype=torch.float64)
    got = scatter_patches(images, patches, ids, 4)
    assert got.dtype == images.dtype
    expected = patchify(images, 4)
    for b in range(2):
        expected[b, ids[b]] = patches[b].float()
    assert torch.equal(patchify(got, 4), expected)


def test_gradients_reach_only_the_gathered_patches():
    images, ids = draw((3, 8, 12, 4), count=2)
    images.requires_grad_()
    gather_patches(images, ids, 4).sum().backward()
    expected = torch.zeros(2, 6, 48).scatter(1, ids.unsqueeze(-1).expand(-1, -1, 48), 1.0)
    assert torch.equal(patchify(images.grad, 4), expected)


def test_tokens_are_picked_from_each_images_own_or_from_a_shared_table():
    ids = torch.tensor([[2, 0], [1, 1]])
    tokens = torch.randn(2, 3, 4)
    assert torch.equal(
        gather_tokens(tokens, ids), torch.stack((tokens[0, ids[0]], tokens[1, ids[1]]))
    )
    table = tokens[:1]
    assert torch.equal(gather_tokens(table, ids), torch.stack((table[0, ids[0]], table[0, ids[1]])))


def test_moments_are_those_of_each_patch():
    patches = 3 + 2 * torch.randn(2, 5, 48, dtype=torch.float64)
    mean, std = patch_moments(patches)
    assert mean.shape == std.shape == (2, 5, 1)
    torch.testing.assert_close(mean[1, 4], patches[1, 4].mean(dim=0, keepdim=True))
    variance = (patches[1, 4] - mean[1, 4]).square().sum() / 47
    torch.testing.assert_close(std[1, 4, 0], (variance + 1e-6).sqrt())


def test_a_flat_patch_normalizes_to_zero():
    mean, std = patch_moments(torch.full((1, 1, 48), 0.5))
    assert mean.item() == 0.5
    assert std.item() == pytest.approx(1e-3)


def test_channels_get_their_own_mean_and_deviation_back():
    images, mean, std = torch.rand(2, 3, 8, 12), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    patches = patchify((images - shift) / scale, 4)
    torch.testing.assert_close(denormalize_patches(patches, mean, std), patchify(images, 4))
