"""The digits, iNaturalist 2019 and .tar files, and the messages about broken ones."""

import json
import tarfile

import numpy as np
import pytest

from tests.helpers.data import (
    all_labels,
    all_values,
    encoded,
    eval_loader,
    open_train,
    open_val_split,
    values_of,
    write_tar,
)
from util.data.classes import check_classes
from util.errors import InputError


def test_a_tar_truncated_after_opening_breaks_its_last_images(tmp_path):
    path = tmp_path / "images.tar"
    write_tar(path, {f"cat/{i}.png": encoded(i) for i in range(3)})
    reader = open_train("tar", path).reader
    with path.open("r+b") as file:
        file.truncate(reader.members[2].offset + 10)
    assert reader[1][0].read() == encoded(1)
    with pytest.raises(OSError, match="ends inside the image"):
        reader[2]


def test_a_tar_truncated_between_two_images_is_reported(tmp_path, caplog):
    path = tmp_path / "images.tar"
    write_tar(path, {f"cat/{i}.png": encoded(i) for i in range(3)})
    reader = open_train("tar", path).reader
    assert "does not end" not in caplog.text
    with path.open("r+b") as file:
        file.truncate(reader.members[2].offset - tarfile.BLOCKSIZE)
    assert len(open_train("tar", path)) == 2
    assert "images.tar does not end like a tar archive" in caplog.text


def test_tar_read_here_first_and_then_by_workers(tmp_path):
    # Large enough that processes sharing a file position would interfere with each other.
    files = {f"{i:03d}.bmp": encoded(i, "BMP", side=80) for i in range(200)}
    write_tar(tmp_path / "images.tar", files)
    dataset = open_train("", tmp_path / "images.tar")
    assert int(dataset[0, 7].crops.pixels[0][0, 0, 0]) == 7
    batches = list(eval_loader(dataset, num_workers=2))
    assert values_of(batches) == list(range(200))
    assert not any(batch.broken for batch in batches)


def test_every_fifth_digit_is_for_validation():
    train, val_set = open_train("digits", None), open_val_split("digits", None)
    assert (len(train), len(val_set)) == (1437, 360)
    assert train.num_classes == val_set.num_classes == 10
    assert train.classes == val_set.classes == tuple("0123456789")
    image, label = train.reader[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    assert all_labels(val_set)[:4] == [0, 5, 0, 5]  # numbers 0, 5, 10, 15 of the set
    assert all_labels(train)[:8] == [1, 2, 3, 4, 6, 7, 8, 9]
    pixels = np.stack([np.asarray(train.reader[i][0]) for i in range(50)])
    assert pixels.max() == 255
    assert label == 1


def write_inat(folder, split="train", ids=(7, 30, 400), names=("ash", "bee", "cod"), **changes):
    """Write two images per category, listed backwards; `changes` replace parts of the list."""
    categories = [
        {"id": i, "name": name} if name else {"id": i} for i, name in zip(ids, names, strict=True)
    ]
    images, annotations = [], []
    for number in range(2 * len(ids)):
        file = f"train_val2019/Plants/{ids[number // 2]}/{split}_{number}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(encoded(number + 1))
        images.append({"id": number + 100, "file_name": file})
        annotations.append({"image_id": number + 100, "category_id": ids[number // 2]})
    content = {"categories": categories[::-1], "images": images, "annotations": annotations[::-1]}
    (folder / f"{split}2019.json").write_text(json.dumps(content | changes))


def test_inaturalist_2019(tmp_path):
    write_inat(tmp_path)
    write_inat(tmp_path, "val", ids=(7, 400), names=("ash", "cod"))
    dataset, val_set = open_train("inat2019", tmp_path), open_val_split("iNat2019", tmp_path)
    assert all_values(dataset) == [1, 2, 3, 4, 5, 6]
    assert all_labels(dataset) == [0, 0, 1, 1, 2, 2]
    assert (dataset.classes, dataset.num_classes) == (("ash", "bee", "cod"), 3)
    assert dataset.name(5) == str(tmp_path / "train_val2019/Plants/400/train_5.png")
    assert all_labels(val_set) == [0, 0, 1, 1]
    with pytest.raises(InputError, match=r"validation .* training images.* 1 missing \(bee\)"):
        check_classes(dataset, val_set, None)
    (tmp_path / "train_val2019/Plants/7/train_0.png").unlink()
    assert all_values(dataset) == [2, 2, 3, 4, 5, 6]


def test_anonymous_inaturalist_categories_go_by_their_ids(tmp_path):
    write_inat(tmp_path, ids=(9, 10, 2), names=("ash", None, "cod"))
    dataset = open_train("inat2019", tmp_path)
    assert dataset.classes == ("2", "9", "10")
    assert all_labels(dataset) == [1, 1, 2, 2, 0, 0]


ANNOTATION = {"image_id": 100, "category_id": 7}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"annotations": []}, "exactly one annotation for each of its 6 images, but has 0 for 0"),
        ({"annotations": [ANNOTATION]}, "has 1 for 1 images: download it again"),
        ({"annotations": [ANNOTATION] * 2}, "has 2 for 1 images"),
        ({"annotations": [{"image_id": 100, "category_id": 8}]}, "not a list of iNaturalist 2019"),
        ({"annotations": [{"image_id": 100}]}, "(KeyError: 'category_id')"),
        ({"categories": None}, "not a list of iNaturalist 2019: download it again (TypeError"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2}, "repeats an id"),
        ({"images": [], "annotations": []}, "has no images"),
    ],
)
def test_a_malformed_inaturalist_list_is_one_sentence(tmp_path, changes, advice):
    write_inat(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        open_train("inat2019", tmp_path)
    assert advice in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\xfa", b""])
def test_a_file_that_is_not_an_inaturalist_list_is_one_sentence(tmp_path, content):
    (tmp_path / "train2019.json").write_bytes(content)
    with pytest.raises(InputError, match=r"train2019.json is not a list of iNaturalist 2019"):
        open_train("inat2019", tmp_path)
    with pytest.raises(InputError, match=r"val2019.json does not exist: set --data_path"):
        open_val_split("inat2019", tmp_path)
