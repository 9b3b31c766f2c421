"""Images held out for validation: which ones they are, where they are, and when none can be."""

import logging
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.data import (
    STILL,
    all_labels,
    all_values,
    encoded,
    write_grays,
    write_parquet,
    write_shards,
    write_tar,
)
from util.data.datasets import open_train_val, open_val
from util.data.held_out import HoldOut
from util.data.report import report_images
from util.errors import InputError
from util.settings.data import DataSettings

USUAL = HoldOut(None)
FEW = "too few to hold some out for validation: --val_fraction F does it anyway"


def names_of(number):
    return [f"{index:06d}.jpg" for index in range(number)]


def chosen_of(hold_out, names):
    return {name for name, is_own in zip(names, hold_out.choose(names), strict=True) if is_own}


def opened(fraction=None, holds_out=True, **places):
    places = {name: str(place) for name, place in places.items()}
    data = DataSettings(val_fraction=fraction, **places)
    return open_train_val(data, STILL, STILL, seed=0, holds_out=holds_out)


@pytest.fixture
def flat(tmp_path):
    write_grays(tmp_path / "flat", range(200))
    return tmp_path / "flat"


# Which images


@pytest.mark.parametrize(
    ("number", "expected"),
    [(9, 0), (10, 1), (79, 7), (80, 8), (400, 8), (100_000, 500)],
)
def test_a_usual_number_is_held_out(number, expected):
    assert len(chosen_of(USUAL, names_of(number))) == expected


def test_a_hundredth_is_held_out_between_these_bounds():
    assert 60 < len(chosen_of(USUAL, names_of(8_000))) < 100


def test_the_names_alone_decide():
    names = names_of(300)
    golden = [19, 40, 43, 55, 127, 192, 239, 275]  # runs that stopped have to find the same ones
    assert chosen_of(USUAL, names) == {names[index] for index in golden}
    shuffled = random.Random(0).sample(names, len(names))
    assert chosen_of(USUAL, shuffled) == chosen_of(USUAL, names)


def test_images_stay_held_out_when_others_are_added():
    for hold_out in (USUAL, HoldOut(0.1)):
        assert chosen_of(hold_out, names_of(2_000)) < chosen_of(hold_out, names_of(6_000))


def test_a_fraction_that_is_given_has_no_bounds():
    assert 9_500 < len(chosen_of(HoldOut(0.1), names_of(100_000))) < 10_500


def test_groups_stay_together_and_their_images_count():
    names = [f"patient {index % 200}" for index in range(20_000)]
    sizes = Counter(name for name, own in zip(names, USUAL.choose(names), strict=True) if own)
    assert set(sizes.values()) == {100}
    assert 1 <= len(sizes) <= 5
    assert not any(USUAL.choose(["patient 1"] * 50 + ["patient 2"] * 50))


# Where the images are


def test_images_of_a_flat_folder_are_held_out_and_read_as_validation_images(flat, caplog):
    train_set, val_set = opened(data_path=flat)
    values, held_out = all_values(train_set), all_values(val_set)
    assert len(held_out) == 8
    assert sorted(values + held_out) == list(range(200))
    with caplog.at_level(logging.INFO, logger="util.data.report"):
        report_images(train_set, val_set)
    assert [record.message for record in caplog.records] == [
        f"192 training images from {flat}",
        "  held out for validation: 8 images (--val_fraction 0 trains on all)",
        f"8 validation images from {flat}",
    ]


def test_the_same_images_are_held_out_of_a_folder_moved_or_packed_into_a_tar(flat, tmp_path):
    expected = all_values(opened(data_path=flat)[1])
    files = {path.name: path.read_bytes() for path in sorted(flat.iterdir())}
    write_tar(tmp_path / "a.tar", files)
    assert all_values(opened(data_path=tmp_path / "a.tar")[1]) == expected
    shutil.move(flat, tmp_path / "moved")
    assert all_values(opened(data_path=tmp_path / "moved")[1]) == expected


def test_held_out_images_of_class_folders_keep_their_classes(tmp_path):
    for name, first in (("cat", 0), ("dog", 100)):
        write_grays(tmp_path / name, range(first, first + 100))
    train_set, val_set = opened(data_path=tmp_path)
    assert train_set.classes == val_set.classes == ("cat", "dog")
    for images, number in ((train_set, 192), (val_set, 8)):
        values = all_values(images)
        assert all_labels(images) == [value // 100 for value in values]
        sizes = Counter(value // 100 for value in values)
        assert images.class_sizes() == sizes
        assert images.listed.num_images == {"cat": sizes[0], "dog": sizes[1]}
        assert len(images) == number


def test_images_of_a_hugging_face_dataset_are_held_out(tmp_path, offline):
    write_parquet(tmp_path / "hf", range(1, 101))
    train_set, val_set = opened(dataset=f"hfds/{tmp_path / 'hf'}", data_path=tmp_path / "cache")
    assert sorted(all_values(train_set) + all_values(val_set)) == list(range(1, 101))
    assert all_labels(val_set) == [value % 3 for value in all_values(val_set)]


def test_a_table_without_splits_has_images_held_out_by_default(flat, tmp_path):
    table = tmp_path / "a.csv"
    table.write_text("path\n" + "\n".join(f"{index:03d}.png" for index in range(200)))
    train_set, val_set = opened(data_csv=table, data_path=flat)
    assert all_values(val_set) == all_values(opened(data_path=flat)[1])
    assert train_set.notes == ["held out for validation: 8 images (--val_fraction 0 trains on all)"]
    assert (train_set.num_held_out, val_set.num_held_out) == (8, 8)


# When there are none


def test_nothing_is_held_out_of_few_images_and_that_is_said(tmp_path):
    write_grays(tmp_path, range(9))
    train_set, val_set = opened(data_path=tmp_path)
    assert (len(train_set), val_set, train_set.notes) == (9, None, [FEW])
    assert len(opened(0.5, data_path=tmp_path)[1]) in range(1, 9)


def test_nothing_is_held_out_without_being_asked_in_other_programs(flat):
    assert opened(holds_out=False, data_path=flat)[1] is None
    train_set, val_set = opened(0.0, data_path=flat)
    assert (len(train_set), val_set, train_set.notes) == (200, None, [])


def test_a_fraction_works_in_every_program_and_in_evaluation(flat):
    train_set, val_set = opened(0.2, holds_out=False, data_path=flat)
    assert sorted(all_values(train_set) + all_values(val_set)) == list(range(200))
    assert train_set.notes == [f"held out by --val_fraction 0.2: {len(val_set)} images"]
    data = DataSettings(data_path=str(flat), val_fraction=0.2)
    assert all_values(open_val(data, STILL, seed=0)) == all_values(val_set)


def test_validation_images_that_are_there_are_taken_whole(tmp_path):
    write_grays(tmp_path / "train", range(100))
    write_grays(tmp_path / "val", range(100, 103))
    train_set, val_set = opened(data_path=tmp_path)
    assert (len(train_set), len(val_set), train_set.notes) == (100, 3, [])
    with pytest.raises(InputError, match=f"already, {tmp_path}/val: leave it out"):
        opened(0.1, data_path=tmp_path)
    with pytest.raises(InputError, match="--val_path gives the validation images: leave"):
        opened(0.1, data_path=tmp_path / "train", val_path=tmp_path / "val")
    assert len(opened(0.0, data_path=tmp_path)[1]) == 3


def test_no_images_of_a_stream_are_held_out(tmp_path):
    write_shards(tmp_path, [20, 20])
    places = {"dataset": "wds/train-{0..1}.tar", "data_path": tmp_path}
    data = DataSettings(num_samples=40, **{name: str(value) for name, value in places.items()})
    assert open_train_val(data, STILL, STILL, seed=0, holds_out=True)[1] is None
    with pytest.raises(InputError, match="is a stream: give validation images by --val_path"):
        open_train_val(replace(data, val_fraction=0.1), STILL, STILL, seed=0)


def test_a_fraction_that_holds_out_none_or_all_is_refused(tmp_path):
    write_grays(tmp_path, range(3))
    for fraction, which in ((0.001, "none"), (0.999, "all")):
        message = f"--val_fraction {fraction} holds out {which} of the 3 images of {tmp_path}: give"
        with pytest.raises(InputError, match=message):
            opened(fraction, data_path=tmp_path)


def test_a_file_that_cannot_be_read_is_named_by_its_own_name(tmp_path):
    write_grays(tmp_path, range(100))
    _, val_set = opened(data_path=tmp_path)
    broken = val_set.name(1)
    Path(broken).write_bytes(encoded(1)[:30])
    assert [name for name, _ in val_set[0, 1].broken] == [broken]
