"""Annotation files: what is read, what is left out and named, and what is refused."""

import copy
import json
import logging

import numpy as np
import pytest
from faster_coco_eval.core import mask as rle
from pycocotools.coco import COCO

from tests.helpers.files import write_coco, write_json
from util.data.coco import read_coco
from util.errors import InputError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco")) / "annotations" / "instances_train.json"


@pytest.fixture
def content(path):
    return json.loads(path.read_text())


def read(path, *, masks=True, max_broken=0.0):
    return read_coco(path, masks=masks, max_broken=max_broken)


def refusal(path, **options):
    with pytest.raises(InputError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# Good files


def test_labels_follow_the_ids_of_categories(path, content):
    file = read(path)
    assert file.classes == ("box", "disc") and file.category_ids == (3, 7)
    assert [image.name for image in file.images] == [f"{n:03d}.png" for n in range(6)]
    assert [image.size for image in file.images] == [(48, 64), (64, 48)] * 3
    listed = [(i.id, {1: 3, 2: 7}[o.label], *o.box) for i in file.images for o in i.objects]
    expected = [(a["image_id"], a["category_id"], *a["bbox"]) for a in content["annotations"]]
    assert listed == expected
    assert [o.is_crowd for image in file.images for o in image.objects].count(True) == 1
    assert file.images[-1].objects == []


def compressed(entry, height, width):
    """The entry with its crowd's run lengths as a string."""
    counts = rle.frPyObjects(entry["segmentation"], height, width)["counts"]
    text = counts if isinstance(counts, str) else counts.decode()
    return entry | {"segmentation": {"size": [height, width], "counts": text}}


@pytest.mark.parametrize("lengths", ["list", "string"])
def test_masks_equal_those_of_pycocotools(path, content, tmp_path, lengths):
    entries = content["annotations"]
    half = copy.deepcopy(entries[0])
    half["segmentation"].append([0.5, 0.5, 9, 1, 4.2, 12])  # an object of two parts
    half["segmentation"].append([50, 30, 90.5, 30, 90, 70])  # partly outside
    entries.append(half | {"id": 100})
    if lengths == "string":
        entries = [compressed(e, 48, 64) if e["iscrowd"] else e for e in entries]
    entries.sort(key=lambda entry: entry["image_id"])
    path = write_json(tmp_path / "a.json", {**content, "annotations": entries})
    own = [(o, i.size) for i in read(path).images for o in i.objects]
    theirs = COCO(path)
    for (found, size), entry in zip(own, entries, strict=True):
        mask = rle.decode(found.mask(size))
        assert np.array_equal(mask, theirs.annToMask(entry))
        assert mask.shape == size and mask.any()


def test_without_masks_objects_are_the_same_but_have_no_segmentation(path):
    both = zip(read(path, masks=False).images, read(path).images, strict=True)
    for image, whole in both:
        for own, theirs in zip(image.objects, whole.objects, strict=True):
            assert own == theirs._replace(segmentation=None)
            assert theirs.segmentation is not None


def test_without_masks_the_truth_has_none_and_a_missing_area_is_that_of_the_box(content, tmp_path):
    del content["annotations"][1]["area"]
    file = read(write_json(tmp_path / "a.json", content), masks=False)
    entries = file.ground_truth(file.images[:1])["annotations"]
    assert not any("segmentation" in entry for entry in entries)
    _, _, width, height = content["annotations"][1]["bbox"]
    areas = [entry["area"] for entry in entries]
    assert areas[1] == width * height
    assert [areas[0], areas[2]] == [content["annotations"][n]["area"] for n in (0, 2)]


def test_a_byte_order_mark_is_skipped(path, tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read(tmp_path / "a.json").images) == 6


def test_a_missing_box_is_that_of_the_mask(path, content, tmp_path):
    del content["annotations"][0]["bbox"], content["annotations"][2]["bbox"]
    file = read(write_json(tmp_path / "a.json", content))
    original = read(path)
    for number in (0, 2):
        (own, theirs) = (f.images[0].objects[number] for f in (file, original))
        assert own.box == theirs.box


def test_the_truth_for_evaluation_has_ids_from_1(path, content):
    file = read(path)
    truth = file.ground_truth(file.images[1:4])
    assert [entry["id"] for entry in truth["annotations"]] == list(range(1, 7))
    assert [entry["id"] for entry in truth["images"]] == [11, 12, 13]
    assert truth["categories"] == [{"id": 3, "name": "box"}, {"id": 7, "name": "disc"}]
    theirs = [e for e in content["annotations"] if 11 <= e["image_id"] <= 13]
    for own, entry in zip(truth["annotations"], theirs, strict=True):
        for key in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            assert own[key] == entry[key], key


def test_a_missing_area_is_that_of_the_mask(content, tmp_path):
    for entry in content["annotations"]:
        del entry["area"]
    file = read(write_json(tmp_path / "a.json", content))
    truth = file.ground_truth(file.images[:1])
    areas = [entry["area"] for entry in truth["annotations"]]
    assert areas[0] == content["annotations"][0]["bbox"][2] ** 2
    assert areas[2] == 6 * 64


# Broken annotations


def polygon(*numbers):
    return {"segmentation": [list(numbers)]}


def run_lengths(counts, size=(48, 64)):
    return {"segmentation": {"size": list(size), "counts": counts}}


INSIDE = (5, 5, 20, 5, 20, 20)
FORMAT = "it is not in COCO's format"
HUGE = 10**399  # no float
NONE = object()  # a key that is missing
BROKEN = {
    "a polygon of two points": (polygon(5, 5, 20, 20), "a polygon has 2 points, not 3 or more"),
    "an odd number of coordinates": (polygon(*INSIDE, 3), "is not a list of x, y, x, y"),
    "a coordinate that is not a number": (polygon(*INSIDE, 3, float("nan")), "is not a list of x"),
    "an infinite coordinate": (polygon(*INSIDE, 3, float("inf")), "is not a list of x"),
    "a coordinate of 400 digits": (polygon(*INSIDE, 3, HUGE), FORMAT),
    "a polygon without area": (polygon(*[10, 10] * 3), "its mask has no pixel"),
    "a polygon between pixels": (
        polygon(10.1, 10.1, 10.3, 10.1, 10.3, 10.3),
        "its mask has no pixel",
    ),
    "a polygon far to the right": (polygon(5, 5, 64 * 2.6, 5, 20, 20), "reaches far outside"),
    "a polygon far above": (polygon(5, -48 * 1.6, 20, 5, 20, 20), "reaches far outside"),
    "a text in a polygon": (polygon(*INSIDE, 3, "x"), "could not convert"),
    "points in lists": (polygon([5, 5], [20, 5], [20, 20]), "is not a list of x, y"),
    "a polygon outside": (polygon(70, 5, 90, 5, 90, 20), "outside the image of 64 x 48 px"),
    "a second polygon of one point": (
        {"segmentation": [[*INSIDE], [1, 2]]},
        "a polygon has 1 point, not 3 or more",
    ),
    "no polygons": ({"segmentation": []}, "it has no segmentation"),
    "no segmentation": ({"segmentation": NONE}, "it has no segmentation"),
    "run lengths of another size": (
        run_lengths([0, 64 * 48], (64, 48)),
        "its run lengths are of 48 x 64 px, the image has 64 x 48",
    ),
    "run lengths of no pixel": (run_lengths([48 * 64]), "its mask has no pixel"),
    "run lengths that are too few": (run_lengths([0, 100]), "run lengths"),
    "run lengths below 0": (run_lengths([-5, 48 * 64 + 5]), "run lengths"),
    "run lengths of no kind": (run_lengths(None), "run lengths"),
    "no run lengths": ({"segmentation": {"size": [48, 64]}}, "it has no counts"),
    "a text that is not run lengths": (run_lengths("!"), "run lengths"),
    "run lengths of too few pixels": (run_lengths("05"), "run lengths"),
    "a box outside": ({"bbox": [64, 3, 10, 10]}, "lies outside the image"),
    "a box left of the image": ({"bbox": [-20, 3, 20, 10]}, "lies outside the image"),
    "a box without height": ({"bbox": [3, 3, 10, 0]}, "its bbox is 10 x 0 px"),
    "a box of negative width": ({"bbox": [3, 3, -1, 5]}, "its bbox is -1 x 5 px"),
    "a box of three numbers": ({"bbox": [3, 3, 10]}, "not left, top, width and height"),
    "a box with NaN": ({"bbox": [3, 3, 10, float("nan")]}, "not left, top, width and height"),
    "a box that is a number": ({"bbox": 3}, FORMAT),
    "a box of 400 digits": ({"bbox": [3, 3, 10, HUGE]}, FORMAT),
    "an unknown category": ({"category_id": 4}, "its category 4 is not listed"),
    "no category": ({"category_id": NONE}, "it has no category_id"),
    "a list as category": ({"category_id": [3]}, FORMAT),
    "an unknown image": ({"image_id": 999}, "of image 999, which is not listed"),
    "no image": ({"image_id": NONE}, "it has no image_id"),
    "a text as area": ({"area": "large"}, "could not convert"),
    "an area of 400 digits": ({"area": HUGE}, FORMAT),
    "an endless crowd": ({"iscrowd": float("inf")}, FORMAT),
    "a list as crowd": ({"iscrowd": [1]}, FORMAT),
}


def with_broken(content, change):
    """The content with its first annotation changed, under the id 77."""
    first = {**content["annotations"][0], **change, "id": 77}
    first = {key: value for key, value in first.items() if value is not NONE}
    return {**content, "annotations": [first, *content["annotations"][1:]]}


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_annotation_is_named_and_left_out_or_refused(
    tmp_path, content, caplog, change, reason
):
    path = write_json(tmp_path / "a.json", with_broken(content, change))
    message = refusal(path, max_broken=0.05)
    assert message.startswith(f"1 of 11 annotations in {path} are broken, above the limit of 5.00%")
    assert "annotation 77 (" in message and reason in message
    with caplog.at_level(logging.WARNING):
        file = read(path, max_broken=0.1)
    (record,) = caplog.records
    assert f"annotation 77 ({reason}" in record.message or reason in record.message
    assert [len(image.objects) for image in file.images] == [2, 2, 2, 2, 2, 0]


def test_a_polygon_may_reach_two_sides_from_the_center(tmp_path, content):
    change = polygon(64 * 2.5, 5, 20, 5, 20, 20)
    file = read(write_json(tmp_path / "a.json", with_broken(content, change)))
    assert len(file.images[0].objects) == 3


@pytest.mark.parametrize("entry", ["text", 7, None, [1]])
def test_an_annotation_that_is_not_a_dictionary_is_broken(tmp_path, content, entry):
    content["annotations"][0] = entry
    path = write_json(tmp_path / "a.json", content)
    assert f"annotation {entry} ({FORMAT})" in refusal(path)
    assert len(read(path, max_broken=0.1).images[0].objects) == 2


def test_only_boxes_matter_without_masks(tmp_path, content):
    for entry in content["annotations"]:
        entry["segmentation"] = []
    path = write_json(tmp_path / "a.json", content)
    assert len(read(path, masks=False).images[0].objects) == 3
    expected = f"{path} has no segmentations: predict boxes only, with --no_masks"
    assert refusal(path, max_broken=1) == expected
    del content["annotations"][0]["bbox"]
    path = write_json(tmp_path / "a.json", content)
    assert "annotation 0 (it has no bbox)" in refusal(path, masks=False)


def test_at_most_twenty_broken_annotations_are_listed(tmp_path, content):
    content["annotations"] = [{"id": number} for number in range(25)]
    message = refusal(write_json(tmp_path / "a.json", content), masks=False, max_broken=0.5)
    assert "25 of 25 annotations" in message and message.endswith(", and 5 more")
    assert "annotation 19 (" in message and "annotation 20 (" not in message


# Files that are refused


def changed(key, number, **values):
    """A change of one entry of a list."""

    def change(content):
        content[key][number] |= values

    return change


REFUSED = {
    "no images": (lambda c: c["images"].clear(), "has no images: choose another file"),
    "no categories": (lambda c: c["categories"].clear(), "has no categories"),
    "a missing list": (lambda c: c.pop("annotations"), "it lacks a list of annotations"),
    "no list": (lambda c: c.update(images={"1": {}}), "it lacks a list of images"),
    "an image without height": (lambda c: c["images"][0].pop("height"), "an image needs id"),
    "an image that is a name": (lambda c: c["images"].append("a.png"), "an image needs id"),
    "a category without name": (lambda c: c["categories"][0].pop("name"), "a category id and name"),
    "a height that is not a number": (changed("images", 0, height="tall"), "an image needs id"),
    "an endless height": (changed("images", 0, height=float("inf")), "an image needs id"),
    "a height of 0": (changed("images", 0, height=0), "height"),
    "a file name that is a number": (changed("images", 0, file_name=5), "file_name"),
    "ids of two kinds": (changed("categories", 0, id="7"), "a category id and name"),
    "images of one id": (changed("images", 0, id=11), "has images with the same id"),
    "categories of one id": (changed("categories", 0, id=3), "has categories with the same id"),
    "categories of one name": (changed("categories", 0, name="box"), "two categories named box"),
    "a list as name": (changed("categories", 0, name=["disc"]), "a category id and name"),
}


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_file_in_another_format_is_refused(tmp_path, content, change, reason):
    change(content)
    path = write_json(tmp_path / "a.json", content)
    message = refusal(path, max_broken=1)
    assert str(path) in message and reason in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "lacks a list of"),
    ],
    ids=["cut off", "another encoding", "nested deeply", "a list"],
)
def test_a_file_that_is_not_json_is_refused(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text)
    assert reason in refusal(tmp_path / "a.json")


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot read the annotations in" in refusal(tmp_path / "none.json")
