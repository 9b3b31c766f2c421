"""The evaluation of a detector, and pictures of what it finds."""

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle

from engine_detection import draw_detections, evaluate, found_objects, true_objects
from tests.helpers.files import write_coco
from util.compute.precision import Precision
from util.data.broken_images import BrokenImages
from util.data.detection import open_validation
from util.data.loaders import build_eval_loader
from util.errors import InputError
from util.eval.coco_ap import as_results, scale_to_image
from util.eval.overlays import DrawnObject, class_colors, draw_objects, side_by_side
from util.settings.detection import DetectionSettings

CPU = torch.device("cpu")


class Oracle(torch.nn.Module):
    """Finds the objects of every image, in pixels of the input."""

    def __init__(self, images):
        super().__init__()
        self.images, self.next = images, 0

    def forward(self, pixels, sizes):
        return [self.found(size) for size in sizes]

    def found(self, size):
        image = self.images.images[self.next]
        self.next = (self.next + 1) % len(self.images)
        objects = [own for own in image.objects if not own.is_crowd]
        boxes = torch.tensor([own.box for own in objects]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        scale = torch.tensor([size[1] / image.size[1], size[0] / image.size[0]]).repeat(2)
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, 28)] * 2, indexing="ij")
        shapes = {1: torch.ones(28, 28), 2: (1.5 - (x**2 + y**2).sqrt()).clamp(0, 1)}
        return {
            "boxes": boxes * scale,
            "labels": torch.tensor([own.label for own in objects], dtype=torch.long),
            "scores": torch.full((len(objects),), 0.9),
            "masks": torch.stack([shapes[own.label] for own in objects] or [x[:0]]).reshape(
                -1, 1, 28, 28
            ),
        }


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = write_coco(tmp_path_factory.mktemp("coco"), num_val=5)
    settings = DetectionSettings(data_path=str(folder))
    return open_validation(settings, side=100, masks=True, mean=[0.5] * 3, std=[0.5] * 3)


def evaluated(images, model, broken=None):
    loader = build_eval_loader(images, batch_size=2, num_workers=0, device=CPU)
    broken = broken or BrokenImages(len(images), 0.0)
    return evaluate(model, loader, images, precision=Precision("fp32", CPU), broken=broken)


def test_a_model_that_knows_the_objects_is_perfect(images):
    scores, results = evaluated(images, Oracle(images))
    stats = scores.stats()
    assert stats["val_box_ap"] == stats["val_box_ar"] == 100
    assert stats["val_mask_ap50"] == 100 and stats["val_mask_ap"] > 60
    assert [result["image_id"] for result in results] == sorted(r["image_id"] for r in results)
    assert stats["val_images"] == 5


def test_an_unreadable_image_is_left_out_of_the_score(images, monkeypatch):
    read = type(images).read

    def fails(self, index):
        if index == 3:
            raise OSError("broken")
        return read(self, index)

    monkeypatch.setattr(type(images), "read", fails)
    scores, results = evaluated(images, Oracle(images), BrokenImages(len(images), 0.5))
    assert scores.num_images == 4
    assert 13 not in {result["image_id"] for result in results}
    with pytest.raises(InputError, match="above the limit"):
        evaluated(images, Oracle(images))


# Pictures


def encoded(mask):
    """COCO's run lengths of a mask."""
    return rle.encode(np.asfortranarray(mask))


def test_objects_have_colors_and_names_of_their_own():
    image = np.zeros((60, 80, 3), np.uint8)
    mask = np.zeros((60, 80), np.uint8)
    mask[30:50, 10:30] = 1
    objects = [
        DrawnObject("a", (10, 30, 30, 50), encoded(mask)),
        DrawnObject("b", (40, 30, 70, 55)),
    ]
    drawn = draw_objects(image, objects)
    first, second = class_colors(2)
    assert drawn.shape == image.shape and not image.any()
    assert drawn[40, 20].tolist() == (0.6 * first).round().tolist()
    assert drawn[50, 30].tolist() == first.tolist() and drawn[55, 55].tolist() == second.tolist()
    assert not drawn[40, 55].any()  # inside of a box without mask
    assert DrawnObject("cat", (0, 0, 1, 1), score=0.876).text == "cat 88%"


def test_the_first_object_is_on_top():
    mask = encoded(np.ones((20, 20), np.uint8))
    objects = [DrawnObject(n, (0, 0, 19, 19), mask) for n in "ab"]
    assert draw_objects(np.zeros((20, 20, 3), np.uint8), objects)[15, 15].tolist() == (
        (0.6 * class_colors(1)[0]).round().tolist()
    )


@pytest.mark.parametrize("left", [0, 40, 75])
def test_a_name_at_the_right_edge_is_moved_into_the_picture(left):
    image, color = np.zeros((40, 80, 3), np.uint8), class_colors(1)[0]
    drawn = draw_objects(image, [DrawnObject("lighthouse", (left, 25, left + 4, 35))])
    (columns,) = np.nonzero((drawn[:22] == color).all(axis=-1).any(axis=0))
    width = columns.max() - columns.min()  # of the name's background
    assert width > 35
    assert columns.min() == (left if left == 0 else pytest.approx(79 - width, abs=1))


@pytest.mark.parametrize("count", [0, 1, 30])
def test_truth_and_predictions_stand_side_by_side(count):
    image = np.full((50, 70, 3), 90, np.uint8)
    objects = [DrawnObject(str(n), (n, n, n + 20, n + 20)) for n in range(count)]
    figure = side_by_side([(image, objects, []), (image, [], objects)])
    assert figure.dtype == np.uint8 and figure.shape[1] >= 140 and figure.shape[0] >= 100


def test_pictures_show_certain_objects_only(images):
    model = Oracle(images)
    image = images.images[0]
    true = true_objects(image, images.file.classes, masks=True)
    assert [own.text for own in true] == ["box", "disc", "disc (crowd)"]
    assert rle.decode(true[0].mask).shape == image.size
    assert true_objects(image, images.file.classes, masks=False)[0].mask is None
    found = scale_to_image(model.found(image.size), image.size, image.size)
    found["scores"][1] = 0.3
    results = as_results(found, image.size, image.id, images.file.category_ids)
    names = {3: "box", 7: "disc"}
    (only,) = found_objects(results, names)
    assert only.text == "box 90%" and only.box == true[0].box
    overlap = rle.iou([only.mask], [true[0].mask], [0]).item()
    assert overlap > 0.9
    both = found_objects(results, names, min_score=0.2)
    assert [own.text for own in both] == ["box 90%", "disc 30%"]
    for result in results:
        del result["segmentation"]
    assert found_objects(results, names)[0].mask is None
    model.next = 0
    figure = draw_detections(model, images, precision=Precision("fp32", CPU), count=3)
    assert figure.dtype == np.uint8 and figure.shape[1] >= 2 * 48
