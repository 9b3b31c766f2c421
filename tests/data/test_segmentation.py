"""Images with masks: finding and reading them, joint augmentation, batches, and their order."""

import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from util.data import segmentation
from util.data.batch import Normalization
from util.data.joint_transforms import CROP_TRIES, JointAugmentation, WholeImage, scaled_size
from util.data.masks import UNLABELED, LabelRule, list_pairs, read_class_names, read_mask
from util.data.sampler import IterationSampler
from util.data.segmentation import (
    SegmentationImages,
    check_masks,
    label_rule,
    open_classes,
    open_segmentation,
)
from util.errors import InputError
from util.seeding import fold_seed
from util.settings.segmentation import ADE20K_NAMES, SegmentationSettings

CPU = torch.device("cpu")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
NORMALIZATION = Normalization(MEAN, STD)


def write_mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


def write_pair(root, name, values=None, *, split="train", suffix=".png"):
    """Write an image whose gray value is 40 times the class, and its mask."""
    values = np.asarray(values if values is not None else class_blocks(), np.uint8)
    path = root / "images" / split / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    gray = np.where(values == 255, 250, 40 * values.astype(int)).astype(np.uint8)
    Image.fromarray(gray).convert("RGB").save(path)
    return path, write_mask(root / "annotations" / split / f"{name}.png", values)


def class_blocks(height=24, width=32, num_classes=5, side=8):
    """Labels (height, width) of squares, not all of which have the same class."""
    row, column = np.ogrid[:height, :width]
    return (row // side + 2 * (column // side)) % num_classes


def opened(root, transform=None, *, num_classes=5, replace_broken=True, split="train", **options):
    rule = LabelRule(num_classes, 255, reduce_zero_label=False)
    return SegmentationImages(
        list_pairs(root, split),
        rule,
        transform or WholeImage(),
        NORMALIZATION,
        **{"seed": 0, "replace_broken": replace_broken, **options},
    )


def one_sentence(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


# Pairs


def test_pairs_have_the_same_name_in_both_folders(tmp_path):
    for name in ("b", "a", "town/c", "town/east/a"):
        write_pair(tmp_path, name)
    write_pair(tmp_path, "d.1", suffix=".jpg")
    (tmp_path / "images" / "train" / ".hidden.png").touch()
    (tmp_path / "images" / "train" / "notes.txt").touch()
    pairs = list_pairs(tmp_path, "train")
    assert [pair.name for pair in pairs] == ["a", "b", "d.1", "town/c", "town/east/a"]
    for pair in pairs:
        assert pair.image.relative_to(tmp_path / "images" / "train").with_suffix("") == (
            pair.mask.relative_to(tmp_path / "annotations" / "train").with_suffix("")
        )
        assert pair.image.is_file() and pair.mask.is_file()


def test_an_image_without_a_mask_is_refused(tmp_path):
    write_pair(tmp_path, "a")
    for name in "bc":
        write_pair(tmp_path, name)[1].unlink()
    with pytest.raises(InputError, match=r"2 images without mask: .*b\.png and 1 more") as caught:
        list_pairs(tmp_path, "train")
    assert str(tmp_path / "annotations" / "train") in one_sentence(caught)


def test_a_mask_without_an_image_is_refused(tmp_path):
    write_pair(tmp_path, "a")
    write_pair(tmp_path, "b")[0].unlink()
    with pytest.raises(InputError, match=r"1 mask without image: .*train/b\.png;"):
        list_pairs(tmp_path, "train")


def test_the_same_name_in_another_folder_is_no_partner(tmp_path):
    image, _ = write_pair(tmp_path, "a")
    (image.parent / "town").mkdir()
    image.rename(image.parent / "town" / "a.png")
    with pytest.raises(InputError, match="without mask"):
        list_pairs(tmp_path, "train")


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_missing_or_empty_folder_is_refused(tmp_path, kind):
    for path in write_pair(tmp_path, "a"):
        if path.is_relative_to(tmp_path / kind):
            path.unlink()
    with pytest.raises(InputError, match=f"no images found in .*{kind}/train"):
        list_pairs(tmp_path, "train")
    (tmp_path / kind / "train").rmdir()
    with pytest.raises(InputError, match=f"{kind}/train does not exist") as caught:
        list_pairs(tmp_path, "train")
    one_sentence(caught)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_two_files_of_the_same_name_are_refused(tmp_path, kind):
    for path in write_pair(tmp_path, "a"):
        if path.is_relative_to(tmp_path / kind):
            path.with_suffix(".bmp").write_bytes(path.read_bytes())
    with pytest.raises(InputError, match=r"a.bmp and .*a.png have the same name"):
        list_pairs(tmp_path, "train")


# Names of the classes


def names_in(tmp_path, text, *, name="classes.txt", ignore_index=255):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_class_names(path, ignore_index)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("wall\nfloor\n", ["wall", "floor"]),
        ("  wall \n\n  traffic light\n\n", ["wall", "traffic light"]),
        ("0 wall\n1 traffic light\n", ["wall", "traffic light"]),
        ("1\tfloor\n0\twall\n", ["wall", "floor"]),  # by index, not by line
        ("0 wall\n1 floor\n255 void (ignore)\n", ["wall", "floor"]),
        ("Straße\nfloor", ["Straße", "floor"]),
    ],
)
def test_names_with_and_without_index(tmp_path, text, names):
    assert names_in(tmp_path, text) == names


def test_only_the_ignored_index_is_no_class(tmp_path):
    text = "0 wall\n1 floor\n254 void\n"
    assert names_in(tmp_path, text, ignore_index=254) == ["wall", "floor"]
    with pytest.raises(InputError, match="number the classes from 0 without gaps"):
        names_in(tmp_path, text)


def test_the_table_of_ade20k(tmp_path):
    text = (
        "Idx\tRatio\tTrain\tVal\tName\n"
        "1\t0.1576\t11664\t1172\twall\n"
        "2\t0.1072\t6046\t612\tbuilding, edifice\n"
        "3\t0.0878\t8265\t796\tswimming pool, swimming bath, natatorium \n"
    )
    assert names_in(tmp_path, text, name=ADE20K_NAMES) == [
        "wall",
        "building, edifice",
        "swimming pool, swimming bath, natatorium",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 wall\n2 floor\n", "has the indices 0, 2"),
        ("1 wall\n2 floor\n", "has the indices 1, 2"),
        ("0 wall\n0 floor\n255 void\n", "indices"),
        ("0 wall\n1 floor\n1 door\n255 void\n", "indices"),
        ("wall\nfloor\nwall\n", "a name twice"),
        ("0 wall\n1 wall\n", "a name twice"),
        ("", "no names"),
        ("\n \n", "no names"),
        ("255 void\n", "no names"),
    ],
)
def test_names_that_are_incomplete_or_ambiguous_are_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        names_in(tmp_path, text)
    assert "classes.txt" in one_sentence(caught)


@pytest.mark.parametrize(
    "text", ["0 wall\nfloor\n", "4 wheels\ncar\n", "# names\n0 wall\n1 door\n"]
)
def test_an_index_on_some_lines_only_is_refused(tmp_path, text):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(InputError, match="has lines with and without an index") as caught:
        read_class_names(tmp_path / "classes.txt", 255)
    one_sentence(caught)


@pytest.mark.parametrize("separator", [": ", ", ", ":", ",", ";", " ; "])
def test_an_index_may_be_followed_by_a_sign(tmp_path, separator):
    (tmp_path / "classes.txt").write_text(f"0{separator}wall\n1{separator}a door\n")
    assert read_class_names(tmp_path / "classes.txt", 255) == ["wall", "a door"]


@pytest.mark.parametrize("text", ["0 wall\n0 floor\n1 door\n", "0 wall\n1 floor\n1 door\n"])
def test_an_index_given_twice_is_refused(tmp_path, text):
    with pytest.raises(InputError, match=r"classes\.txt has"):
        names_in(tmp_path, text)


def test_without_label_zero_the_classes_of_a_file_start_at_one(tmp_path):
    for text in ("0 void\n1 wall\n2 floor\n", "1 wall\n2 floor\n255 void\n"):
        path = tmp_path / "classes.txt"
        path.write_text("\ufeff" + text, encoding="utf-8")  # editors on Windows begin with a mark
        assert read_class_names(path, 255, first=1) == ["wall", "floor"]
    with pytest.raises(InputError, match="from 1 without gaps"):
        path.write_text("0 wall\n2 floor\n")
        read_class_names(path, 255, first=1)


def test_names_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the names of classes in .*none\.txt"):
        read_class_names(tmp_path / "none.txt", 255)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="is not text in UTF-8: save it as such"):
        read_class_names(tmp_path / "classes.txt", 255)


# Masks


def test_labels_are_the_values_of_a_mask(tmp_path):
    values = np.array([[0, 1, 2], [255, 2, 0]])
    labels = LabelRule(3, 255, reduce_zero_label=False)(values, tmp_path)
    assert labels.dtype is torch.int16
    assert labels.tolist() == [[0, 1, 2], [UNLABELED, 2, 0]]


def test_zero_may_stand_for_no_label(tmp_path):
    values = np.array([[0, 1, 2], [255, 3, 0]])
    labels = LabelRule(3, 255, reduce_zero_label=True)(values, tmp_path)
    assert labels.tolist() == [[UNLABELED, 0, 1], [UNLABELED, 2, UNLABELED]]


@pytest.mark.parametrize("ignore_index", [0, 1, 3, 65535, -1])
def test_any_value_may_be_ignored(tmp_path, ignore_index):
    values = np.array([[0, 1, 2, ignore_index]])
    labels = LabelRule(3, ignore_index, reduce_zero_label=False)(values, tmp_path)
    assert labels.tolist() == [[UNLABELED if v == ignore_index else v for v in values[0].tolist()]]


@pytest.mark.parametrize(
    ("reduce_zero_label", "label", "classes"), [(False, 3, "0 to 2"), (True, 4, "1 to 3")]
)
def test_labels_without_a_class_are_refused(tmp_path, reduce_zero_label, label, classes):
    rule = LabelRule(3, 255, reduce_zero_label)
    rule(np.array([[label - 1]]), tmp_path)
    with pytest.raises(InputError, match=f"has label {label}, but the classes are {classes}"):
        rule(np.array([[1, label]]), tmp_path)
    with pytest.raises(InputError, match="has label -1"):
        rule(np.array([[1, -1]]), tmp_path)
    with pytest.raises(InputError, match=r"town/a\.png has label 254") as caught:
        rule(np.array([[1, 254]]), "town/a.png")
    assert "255 for pixels that do not count" in one_sentence(caught)


def palette_image(values):
    image = Image.fromarray(np.asarray(values, np.uint8)).copy()
    image.putpalette([i * 7 % 256 for i in range(768)])  # also makes the mode P
    return image


VALUES = [[0, 1, 2, 255], [4, 3, 2, 0]]


@pytest.mark.parametrize(
    ("image", "suffix"),
    [
        (Image.fromarray(np.array(VALUES, np.uint8)), ".png"),
        (palette_image(VALUES), ".png"),
        (Image.fromarray(np.array(VALUES, np.uint16)), ".png"),
        (Image.fromarray(np.array(VALUES, np.int32)), ".tif"),
        (Image.fromarray(np.array(VALUES, np.uint8)), ".tif"),
        (Image.fromarray(np.array(VALUES, np.uint16)), ".tiff"),
        (palette_image(VALUES), ".bmp"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_masks_of_every_kind_hold_the_same_indices(tmp_path, image, suffix):
    path = tmp_path / f"mask{suffix}"
    image.save(path)
    values = read_mask(path)
    assert values.dtype == np.int64
    assert values.tolist() == VALUES


def test_masks_of_one_or_sixteen_bits(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    assert read_mask(tmp_path / "bit.png").tolist() == [[1, 0]]
    Image.fromarray(np.array([[1000, 65535]], np.uint16)).save(tmp_path / "large.png")
    assert read_mask(tmp_path / "large.png").tolist() == [[1000, 65535]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_masks_with_colors_are_refused(tmp_path, mode):
    Image.new(mode, (4, 3)).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match=f"has mode {mode} instead of class indices"):
        read_mask(tmp_path / "mask.png")


def test_a_mask_that_is_turned_by_exif_fits_its_image(tmp_path):
    image, mask = write_pair(tmp_path, "a")
    upright = read_mask(mask)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    for path in (image, mask):
        with Image.open(path) as opened_image:
            turned = opened_image.copy()
        turned.save(path, exif=exif)
    sample = opened(tmp_path)[0, 0]
    assert not sample.broken
    image, labels = sample.content
    assert labels.tolist() == np.rot90(upright, -1).tolist()
    assert torch.equal(image[0], 40 * labels.byte())


# Broken pairs


def three_pairs(tmp_path):
    return [write_pair(tmp_path, name, np.full((6, 8), n)) for n, name in enumerate("abc")]


def test_a_long_image_that_would_be_resized_to_gigabytes_counts_as_broken(tmp_path):
    write_pair(tmp_path, "a", np.zeros((1, 4000)))
    write_pair(tmp_path, "b", np.zeros((8, 8)))
    sample = opened(tmp_path, WholeImage(512))[0, 0]
    ((_, reason),) = sample.broken
    assert reason.startswith("4000 x 1 px would become 2048000 x 512 px by --short_side 512")
    assert not opened(tmp_path, WholeImage())[0, 0].broken


def test_a_mask_of_another_size_counts_as_broken(tmp_path):
    pairs = three_pairs(tmp_path)
    write_mask(pairs[1][1], np.ones((8, 6)))
    sample = opened(tmp_path)[0, 1]
    assert sample.content[1].unique().tolist() == [2]  # the next pair
    ((name, reason),) = sample.broken
    assert name == str(pairs[1][0])
    assert "its mask has 6 x 8 px, the image 8 x 6 px" in reason

    left_out = opened(tmp_path, replace_broken=False)[0, 1]
    assert left_out.content is None
    assert left_out.broken == sample.broken


@pytest.mark.parametrize("kind", [0, 1])
def test_damaged_files_are_replaced_in_training_only(tmp_path, kind):
    pairs = three_pairs(tmp_path)
    path = pairs[2][kind]
    path.write_bytes(path.read_bytes()[:40])
    train, val = opened(tmp_path), opened(tmp_path, replace_broken=False)
    batch = train.collate(train.__getitems__([(0, 2), (0, 1)]))
    assert batch.num_images == 2
    assert batch.labels[:, 0, 0].tolist() == [0, 1]  # the first follows the last
    assert [name for name, _ in batch.broken] == [str(pairs[2][0])]
    batch = val.collate(val.__getitems__([(0, 2)]))
    assert batch.num_images == 0
    assert [name for name, _ in batch.broken] == [str(pairs[2][0])]


def test_a_damaged_mask_is_told_from_a_damaged_image(tmp_path):
    _, mask = write_pair(tmp_path, "a")
    mask.write_bytes(b"")
    ((name, reason),) = opened(tmp_path, replace_broken=False)[0, 0].broken
    assert "mask" in f"{name} {reason}".replace(str(tmp_path), "")


def test_too_many_broken_pairs_end_a_run(tmp_path):
    for image, _ in three_pairs(tmp_path):
        image.write_bytes(b"")
    images = opened(tmp_path)
    with pytest.raises(InputError, match="3 images in a row cannot be read"):
        images[0, 0]
    (error,) = images.__getitems__([(0, 0)])
    assert isinstance(error, InputError)
    assert images.collate([error]) is error


def test_a_label_without_a_class_is_not_a_broken_file(tmp_path):
    write_pair(tmp_path, "a", np.full((6, 8), 7))
    for replace_broken in (True, False):
        with pytest.raises(InputError, match=r"a\.png has label 7"):
            opened(tmp_path, replace_broken=replace_broken)[0, 0]


# Joint augmentation

COLORS = {UNLABELED: [round(255 * m) for m in MEAN]} | {n: [40 * n] * 3 for n in range(5)}


def pair_of_blocks(height=48, width=64, side=16):
    labels = torch.from_numpy(class_blocks(height, width, side=side)).short()
    return (40 * labels).byte().expand(3, -1, -1).clone(), labels


def augmentation(size=(32, 32), **options):
    return JointAugmentation(size, MEAN, **{"photometric": False, **options})


@pytest.mark.parametrize("photometric", [True, False])
def test_the_seed_decides_everything(photometric):
    transform, pair = augmentation(photometric=photometric), pair_of_blocks()
    first = transform(*pair, "augment", 0, 1, 2)
    torch.manual_seed(7)
    random.seed(7)
    state, python_state = torch.get_rng_state(), random.getstate()
    second = transform(*pair, "augment", 0, 1, 2)
    assert all(map(torch.equal, first, second))
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    others = [transform(*pair, "augment", 0, 1, n)[0] for n in range(3, 8)]
    assert not any(torch.equal(other, first[0]) for other in others)


def test_inputs_stay_as_they_are():
    image, labels = pair_of_blocks()
    copies = image.clone(), labels.clone()
    augmentation(photometric=True)(image, labels, 0)
    assert torch.equal(image, copies[0]) and torch.equal(labels, copies[1])


@pytest.mark.parametrize("short_side", [None, 30, 100])
@pytest.mark.parametrize("size", [(32, 32), (24, 80), (200, 16)])
def test_image_and_labels_stay_aligned(size, short_side):
    transform, pair = augmentation(size, short_side=short_side), pair_of_blocks()
    seen = set()
    for seed in range(20):
        image, labels = transform(*pair, seed)
        assert image.shape == (3, *size) and labels.shape == size
        assert image.dtype is torch.uint8 and labels.dtype is torch.int16
        assert type(image) is type(labels) is torch.Tensor
        values = labels.float()[None]
        inside = (-F.max_pool2d(-values, 9, 1) == F.max_pool2d(values, 9, 1))[0]
        pixels, classes = image[:, 4:-4, 4:-4].int(), labels[4:-4, 4:-4]
        for label, color in COLORS.items():
            found = pixels[:, inside & (classes == label)]  # away from the classes' borders
            assert (found - torch.tensor(color)[:, None]).abs().le(1).all()
        seen |= set(labels.unique().tolist())
    assert {0, 1, 2, 3, 4} <= seen


def test_scaled_labels_are_never_mixed():
    labels = (
        torch.tensor([[0, 4], [4, 0]]).repeat_interleave(16, 0).repeat_interleave(16, 1).short()
    )
    image = (40 * labels).byte().expand(3, -1, -1)
    for seed in range(20):
        assert set(augmentation()(image, labels, seed)[1].unique().tolist()) <= {UNLABELED, 0, 4}


def test_the_whole_image_at_its_size_is_only_flipped():
    image, labels = pair_of_blocks()
    transform = augmentation((48, 64), scale=(1, 1))
    flipped = []
    for seed in range(30):
        got = transform(image, labels, seed)
        flipped.append(not torch.equal(got[1], labels))
        expected = (image.flip(2), labels.flip(1)) if flipped[-1] else (image, labels)
        assert all(map(torch.equal, got, expected))
    assert 5 < sum(flipped) < 25


@pytest.mark.parametrize(("hflip", "vflip"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_image_and_labels_are_flipped_along_the_sides_given(hflip, vflip):
    image, labels = pair_of_blocks()
    image[:, 0] = 255
    transform = augmentation((48, 64), scale=(1, 1), hflip=hflip, vflip=vflip)
    got = transform(image, labels, 0)
    dims = [-1] * hflip + [-2] * vflip
    assert all(map(torch.equal, got, (image.flip(dims), labels.flip(dims))))


def test_what_lies_outside_the_image_is_unlabeled_and_mean():
    image, labels = pair_of_blocks()
    got, got_labels = augmentation((60, 100), scale=(1, 1))(image, labels, 3)
    outside = got_labels == UNLABELED
    assert outside.sum() == 60 * 100 - 48 * 64
    fill = torch.tensor(COLORS[UNLABELED])
    assert (got[:, outside] == fill[:, None]).all()
    assert NORMALIZATION(got[None])[0][:, outside].abs().max() < 0.01


def test_unlabeled_pixels_stay_unlabeled():
    image, _ = pair_of_blocks()
    labels = torch.full((48, 64), UNLABELED, dtype=torch.int16)
    assert (augmentation()(image, labels, 0)[1] == UNLABELED).all()


def test_colors_vary_in_the_image_only():
    pair, changed = pair_of_blocks(), 0
    for seed in range(10):
        plain = augmentation()(*pair, seed)
        varied = augmentation(photometric=True)(*pair, seed)
        assert torch.equal(varied[1], plain[1])
        assert varied[0].shape == plain[0].shape and varied[0].dtype is torch.uint8
        changed += not torch.equal(varied[0], plain[0])
    assert changed >= 7


class Drawn:
    """A generator that draws these numbers, and 0 from then on."""

    def __init__(self, *numbers):
        self.numbers, self.count = list(numbers), 0

    def randint(self, low, high):
        number = self.numbers[self.count] if self.count < len(self.numbers) else 0
        self.count += 1
        assert low <= number <= high
        return number


def two_halves(width=40):
    labels = torch.zeros(8, width, dtype=torch.int16)
    labels[:, width // 2 :] = 1
    return labels


def drawn_box(labels, *lefts):
    rng = Drawn(*(n for left in lefts for n in (0, left)))
    return augmentation((8, 8)).draw_box(rng, labels, (8, 8)), rng.count // 2


@pytest.mark.parametrize(
    ("lefts", "box", "tries"),
    [
        ((16,), (0, 16), 1),  # half of each class
        ((0, 16), (0, 16), 2),  # only one class
        ((14, 13, 16), (0, 16), 3),  # 75% and more
        ((15,), (0, 15), 1),  # 5 of 8 columns
        ((32, 19, 18, 17), (0, 17), 4),
    ],
)
def test_a_crop_of_mostly_one_class_is_drawn_again(lefts, box, tries):
    assert drawn_box(two_halves(), *lefts) == (box, tries)


def test_the_last_try_stands():
    assert drawn_box(torch.zeros(8, 40, dtype=torch.int16), *range(20)) == ((0, 9), CROP_TRIES)
    unlabeled = torch.full((8, 40), UNLABELED, dtype=torch.int16)
    assert drawn_box(unlabeled, *range(20)) == ((0, 9), CROP_TRIES)


def test_unlabeled_pixels_do_not_count_as_a_class():
    labels = two_halves()
    labels[1:] = UNLABELED
    assert drawn_box(labels, 16) == ((0, 16), 1)
    labels = torch.zeros(8, 40, dtype=torch.int16)
    labels[:, 20:] = UNLABELED
    assert drawn_box(labels, 16, 15) == ((0, 0), CROP_TRIES)


def test_crops_have_several_classes_more_often_than_by_chance():
    labels = two_halves(64)
    tried = augmentation((8, 8))
    mixed, drawn = 0, 200
    for seed in range(drawn):
        _, left = tried.draw_box(random.Random(fold_seed("crop", seed)), labels, tried.size)
        mixed += 0.25 < (labels[:, left : left + 8] == 1).float().mean() < 0.75
    chance = 3 / 57
    assert mixed / drawn > 4 * chance


def test_crops_come_from_everywhere():
    labels = torch.arange(12).repeat(10, 1).short()
    tried = augmentation((8, 8))
    boxes = {tried.draw_box(random.Random(seed), labels, tried.size) for seed in range(200)}
    assert boxes == {(top, left) for top in range(3) for left in range(5)}


@pytest.mark.parametrize(
    ("size", "short_side", "factor", "expected"),
    [
        ((48, 64), None, 1, [48, 64]),
        ((48, 64), None, 0.5, [24, 32]),
        ((512, 683), 512, 1, [512, 683]),
        ((683, 1000), 512, 1, [512, 750]),
        ((1000, 500), 512, 2, [2048, 1024]),
        ((2, 1000), None, 0.1, [1, 100]),
    ],
)
def test_sizes_are_scaled_with_their_aspect(size, short_side, factor, expected):
    assert scaled_size(size, short_side, factor) == expected


@pytest.mark.parametrize("short_side", [None, 24, 96])
def test_a_whole_image_is_resized_and_its_labels_are_not(short_side):
    image, labels = pair_of_blocks()
    got, got_labels = WholeImage(short_side)(image, labels, 0)
    assert got_labels is labels
    scale = (short_side or 48) / 48
    assert got.shape == (3, 48 * scale, 64 * scale) and got.dtype is torch.uint8


# Dataset and batches


def test_an_image_depends_on_seed_epoch_and_index_only(tmp_path):
    for name in "abc":
        write_pair(tmp_path, name)
    transform = augmentation((16, 16), photometric=True)
    first, second = (opened(tmp_path, transform) for _ in range(2))
    for images in (first, second):
        assert len(images) == 3
    order = [(0, 0), (0, 1), (1, 0), (5, 2)]
    expected = {key: first[key] for key in order}
    for key in reversed(order):
        found = second[key]
        assert torch.equal(found.content[0], expected[key].content[0])
        assert torch.equal(found.content[1], expected[key].content[1])
    assert not torch.equal(expected[0, 0].content[0], expected[1, 0].content[0])
    assert not torch.equal(
        opened(tmp_path, transform, seed=1)[0, 0].content[0], first[0, 0].content[0]
    )


def test_a_batch_is_normalized_on_its_device(tmp_path):
    values = class_blocks()
    values[0, :4] = 255
    write_pair(tmp_path, "a", values)
    images = opened(tmp_path, replace_broken=False)
    batch = images.collate(images.__getitems__([(0, 0)]))
    assert batch.num_images == 1
    assert batch.images.dtype is torch.uint8 and batch.labels.dtype is torch.int16
    pixels, labels = batch.to(CPU)
    assert pixels.dtype is torch.float32 and labels.dtype is torch.int64
    assert labels.tolist() == [np.where(values == 255, UNLABELED, values).tolist()]
    expected = (batch.images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
        3, 1, 1
    )
    torch.testing.assert_close(pixels, expected)


def test_images_are_told_apart_by_their_names(tmp_path):
    for root, names in (("one", "ab"), ("two", "ab"), ("three", "ac")):
        for name in names:
            write_pair(tmp_path / root, name)
    one, two, three = (opened(tmp_path / root).identity() for root in ("one", "two", "three"))
    assert one == two != three
    assert one["number of training images"] == 2


def test_the_file_that_stands_in_for_a_broken_one_is_known(tmp_path):
    for name in "abc":
        write_pair(tmp_path, name)
    images = opened(tmp_path)
    (tmp_path / "images" / "train" / "b.png").write_bytes(b"")
    names = [images.name_at((0, index)).rpartition("/")[2] for index in range(3)]
    assert names == ["a.png", "c.png", "c.png"]


# Whole datasets


def test_a_dataset_opens_with_its_own_names(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for split in ("train", "val"):
        for name in "abc" if split == "train" else "d":
            write_pair(tmp_path, name, split=split)
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\nf\n")
    settings = SegmentationSettings(str(tmp_path))
    data = open_segmentation(settings, crop_size=(16, 16), mean=MEAN, std=STD, seed=0)
    assert data.classes == tuple("abcdef")
    assert (len(data.train), len(data.val)) == (3, 1)
    assert data.train[0, 0].content[0].shape == (3, 16, 16)
    assert data.val[0, 0].content[0].shape == (3, 24, 32)
    assert "3 masks looked at: 5 of 6 classes, without f; 0.0% of the pixels" in caplog.text


def test_ade20k_opens_as_published(tmp_path):
    for split in ("training", "validation"):
        write_pair(tmp_path, "ADE_00000001", split=split)
    table = "".join(f"{n}\t0.1\t1\t1\tclass {n}, other name\n" for n in range(1, 151))
    (tmp_path / ADE20K_NAMES).write_text(f"Idx\tRatio\tTrain\tVal\tName\n{table}")
    settings = SegmentationSettings(str(tmp_path), dataset="ade20k")
    data = open_segmentation(settings, crop_size=(16, 16), mean=MEAN, std=STD, seed=0)
    assert len(data.classes) == 150
    assert data.classes[0] == "class 1, other name"
    image, labels = data.val[0, 0].content
    assert image.shape == (3, 512, 683)
    values = class_blocks()
    assert labels.tolist() == np.where(values == 0, UNLABELED, values - 1).tolist()


def test_ade20k_without_its_table_has_numbers(tmp_path):
    classes = open_classes(SegmentationSettings(str(tmp_path), dataset="ade20k"))
    assert (len(classes), classes[0], classes[-1]) == (150, "class 1", "class 150")


def test_validation_images_are_optional(tmp_path):
    write_pair(tmp_path, "a")
    settings = SegmentationSettings(str(tmp_path), nb_classes=5)
    data = open_segmentation(settings, crop_size=(16, 16), mean=MEAN, std=STD, seed=0)
    assert data.val is None


@pytest.mark.parametrize(
    ("given", "trained", "message"),
    [
        ({}, None, "the number of classes is unknown"),
        ({"nb_classes": 3}, "ab", "the checkpoint has 2 classes, but --nb_classes is 3"),
        ({"names": "a\nb\n", "nb_classes": 3}, None, "names 2 classes, but --nb_classes is 3"),
        ({"names": "a\nb\n", "dataset": "ade20k"}, None, "2 classes, but ade20k has 150"),
        ({"names": "a\nc\n"}, "ab", "class 1 is c, not b"),
        ({"names": "a\nb\n"}, "abc", "2 instead of 3"),
        ({"names": "a\n"}, None, "from 2 to 32767 classes are supported, not 1"),
        ({"nb_classes": 1}, None, "from 2 to 32767 classes are supported, not 1"),
        ({"nb_classes": 10**12}, None, "not 32768"),
    ],
)
def test_contradictory_classes_are_refused(tmp_path, given, trained, message):
    given = dict(given)
    if "names" in given:
        path = tmp_path / "names.txt"
        path.write_text(given.pop("names"))
        given["classes"] = str(path)
    with pytest.raises(InputError, match=message) as caught:
        open_classes(SegmentationSettings(str(tmp_path), **given), trained)
    one_sentence(caught)


def test_classes_come_from_the_flag_before_the_folder_before_the_checkpoint(tmp_path):
    settings = SegmentationSettings(str(tmp_path))
    assert open_classes(settings, ["a", "b"]) == ("a", "b")
    assert open_classes(SegmentationSettings(str(tmp_path), nb_classes=2)) == ("class 0", "class 1")
    (tmp_path / "classes.txt").write_text("c\nd\n")
    assert open_classes(settings) == ("c", "d")
    (tmp_path / "other.txt").write_text("e\nf\n")
    settings = SegmentationSettings(
        str(tmp_path), classes=str(tmp_path / "other.txt"), nb_classes=2
    )
    assert open_classes(settings) == open_classes(settings, ["e", "f"]) == ("e", "f")


def test_settings_override_the_layout():
    settings = SegmentationSettings("x", dataset="ade20k", reduce_zero_label=False, short_side=64)
    assert (settings.layout.reduce_zero_label, settings.layout.short_side) == (False, 64)
    assert label_rule(settings, ["a"] * 150) == LabelRule(150, 255, False)
    with pytest.raises(InputError, match="smaller factor first"):
        SegmentationSettings("x", scale=(2.0, 0.5))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, r"1 of 3 classes \(a\), 0% of the pixels do not count"),
        (255, r"0 of 3 classes \(none\), 100% of the pixels do not count"),
    ],
)
def test_masks_without_classes_to_tell_apart_are_refused(tmp_path, value, message):
    for name in "ab":
        write_pair(tmp_path, name, np.full((6, 8), value))
    with pytest.raises(InputError, match=message) as caught:
        check_masks(opened(tmp_path, num_classes=3), "abc")
    assert "numbered from 0 on, and --ignore_index 255" in one_sentence(caught)


def test_a_look_at_masks_finds_labels_and_colors(tmp_path):
    _, mask = write_pair(tmp_path, "a", np.full((6, 8), 3))
    with pytest.raises(InputError, match=r"a\.png has label 3"):
        check_masks(opened(tmp_path, num_classes=3), "abc")
    Image.new("RGB", (8, 6)).save(mask)
    with pytest.raises(InputError, match="has mode RGB"):
        check_masks(opened(tmp_path, num_classes=3), "abc")


def test_a_look_at_masks_leaves_broken_ones_to_training(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    values = np.array([[0, 1], [1, 255]])
    _, mask = write_pair(tmp_path, "a", values)
    write_pair(tmp_path, "b", values)
    mask.write_bytes(b"")
    check_masks(opened(tmp_path, num_classes=3), ["road", "sky", "car"])
    assert "2 of 3 classes, without car; 25.0% of the pixels do not count" in caplog.text


def test_only_a_few_masks_are_looked_at(tmp_path, monkeypatch):
    for number in range(10):
        write_pair(tmp_path, f"{number}", [[0, 1]])
    read = []
    monkeypatch.setattr(segmentation, "CHECKED_MASKS", 3)
    monkeypatch.setattr(
        segmentation, "read_mask", lambda path: read.append(path.stem) or read_mask(path)
    )
    check_masks(opened(tmp_path, num_classes=2), "ab")
    assert read == ["0", "3", "6"]


# Order of the images

SPLITS = [(24, 1, 1), (12, 2, 1), (4, 6, 1), (8, 1, 3), (4, 2, 3), (1, 3, 8)]  # of 24 images
SIZES = [1, 5, 24, 25, 100]


def sampler(num_samples, split=(24, 1, 1), *, rank=0, steps_per_epoch=5, seed=3):
    batch_size, accum_iter, world_size = split
    return IterationSampler(
        num_samples,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        accum_iter=accum_iter,
        rank=rank,
        world_size=world_size,
        seed=seed,
    )


def batches_of(source, epoch=0, step=0):
    source.set_position(epoch, step)
    batches = list(source)
    assert len(batches) == len(source)
    return batches


def joined(batches):
    return [item for batch in batches for item in batch]


@pytest.mark.parametrize("num_samples", SIZES)
def test_every_pass_has_each_image_once(num_samples):
    source = sampler(num_samples)
    items = [item for epoch in range(6) for item in joined(batches_of(source, epoch))]
    assert len(items) == 6 * 5 * 24
    passes = [items[n : n + num_samples] for n in range(0, len(items), num_samples)]
    for number, found in enumerate(passes):
        assert {p for p, _ in found} == {number}
        images = [image for _, image in found]
        if len(images) == num_samples:
            assert sorted(images) == list(range(num_samples))
        else:
            assert len(set(images)) == len(images)


def test_passes_and_seeds_have_orders_of_their_own():
    items = joined(batches_of(sampler(24)))
    orders = [[image for _, image in items[n : n + 24]] for n in range(0, len(items), 24)]
    assert len({tuple(order) for order in orders}) == 5
    assert joined(batches_of(sampler(24, seed=4))) != items


@pytest.mark.parametrize("num_samples", SIZES)
@pytest.mark.parametrize("split", SPLITS)
def test_steps_are_full_and_the_same_whatever_the_split(num_samples, split):
    batch_size, accum_iter, world_size = split
    ranks = [sampler(num_samples, split, rank=rank) for rank in range(world_size)]
    whole = batches_of(sampler(num_samples), epoch=2)
    per_rank = [batches_of(rank, epoch=2) for rank in ranks]
    assert {rank.effective_batch_size for rank in ranks} == {24}
    for batches in per_rank:
        assert len(batches) == 5 * accum_iter
        assert {len(batch) for batch in batches} == {batch_size}
    for step in range(5):
        assert ranks[0].images_in_step(step) == 24
        assert ranks[0].micro_batches_in_step(step) == accum_iter
        own = slice(step * accum_iter, (step + 1) * accum_iter)
        items = [item for batches in per_rank for item in joined(batches[own])]
        assert sorted(items) == sorted(whole[step])


@pytest.mark.parametrize("num_samples", SIZES)
def test_a_restart_at_any_step_gives_the_rest(num_samples):
    split = (4, 2, 3)
    for rank in range(3):
        full = [batches_of(sampler(num_samples, split, rank=rank), epoch) for epoch in range(3)]
        for epoch in range(3):
            for step in range(6):
                again = sampler(num_samples, split, rank=rank)
                assert batches_of(again, epoch, step) == full[epoch][2 * step :]


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(1, 20), (4, 5), (20, 1)])
def test_the_images_do_not_depend_on_the_evaluations(steps_per_epoch, epochs):
    source = sampler(37, steps_per_epoch=steps_per_epoch)
    found = [batch for epoch in range(epochs) for batch in batches_of(source, epoch)]
    assert found == batches_of(sampler(37, steps_per_epoch=20))


def test_positions_outside_the_epoch_are_refused():
    source = sampler(10)
    for step in (-1, 6):
        with pytest.raises(ValueError, match="epoch's 5"):
            source.set_position(0, step)
    for step in (-1, 5):
        with pytest.raises(ValueError, match="epoch's 5"):
            source.images_in_step(step)


def test_the_order_neither_uses_nor_changes_global_random_state():
    expected = batches_of(sampler(50))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert batches_of(sampler(50)) == expected
    assert torch.equal(torch.get_rng_state(), state)
