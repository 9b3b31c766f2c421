"""Webdatasets: which files belong together, which of them is the image, and labels."""

import pytest
import webdataset

from tests.helpers.data import (
    encoded,
    flat,
    labels_of,
    open_shards,
    train_loader,
    values_of,
    write_shards,
    write_tar,
)
from util.data import shards
from util.data.classes import check_classes
from util.data.shards import ShardSample, group_files
from util.errors import InputError


def grouped(*names):
    """Keys and suffixes of the samples that files of these names make."""
    samples = group_files((name, b"") for name in names)
    return [(sample.key, *sample.files) for sample in samples]


def stream_of(tmp_path, files, num_samples=2):
    write_tar(tmp_path / "train-0.tar", files)
    return open_shards(tmp_path, num_samples, "train-0.tar")


def first_epoch(stream):
    return flat(train_loader(stream).steps(0))


# Samples


@pytest.mark.parametrize(
    ("names", "samples"),
    [
        (["0.jpg", "0.cls", "1.jpg", "1.cls"], [("0", "jpg", "cls"), ("1", "jpg", "cls")]),
        (["cat.0.jpg", "cat.1.jpg", "dog.0.jpg"], [("cat.0", "jpg"), ("cat.1", "jpg")]),
        (["cat.0.cls", "cat.0.jpg", "cat.1.jpg"], [("cat.0", "cls", "jpg"), ("cat.1", "jpg")]),
        (["1.json", "1.jpg", "1.seg.png"], [("1", "json", "jpg", "seg.png")]),
        (["a.0.jpg", "a.0.seg.png", "a.1.jpg"], [("a.0", "jpg", "seg.png"), ("a.1", "jpg")]),
        (["a.0.b.jpg", "a.0.c.jpg", "a.1.b.jpg"], [("a.0.b", "jpg"), ("a.0.c", "jpg")]),
        (["1.depth.png", "1.jpg", "2.jpg"], [("1", "depth.png", "jpg"), ("2", "jpg")]),
        (["1.input.jpg", "1.cls"], [("1", "input.jpg", "cls")]),
        (["1.input.jpg"], [("1.input", "jpg")]),
        (["v1.2/a/1.jpg", "v1.2/a/2.jpg"], [("v1.2/a/1", "jpg"), ("v1.2/a/2", "jpg")]),
        (["a/1.JPG", "b/1.Cls"], [("a/1", "jpg"), ("b/1", "cls")]),
        (["1.jpg", "1.cls", "1.jpg"], [("1", "jpg", "cls"), ("1", "jpg")]),
        (["README", "a/.1.jpg", "2.jpg"], [("2", "jpg")]),
    ],
)
def test_files_that_belong_together_make_a_sample(names, samples):
    assert grouped(*names)[: len(samples)] == samples


def test_only_a_few_files_are_held_to_find_what_they_have_in_common():
    def files():
        for number in range(1000):
            yield f"cat.{number}.jpg", b""
            read.append(number)

    read = []
    samples = group_files(files())
    assert next(samples).key == "cat.0"
    assert len(read) <= shards.MAX_BEFORE_PLAIN + 1
    assert [sample.key for sample in samples] == [f"cat.{number}" for number in range(1, 1000)]


def test_usual_shards_are_grouped_as_webdataset_does(tmp_path):
    write_shards(tmp_path, [40])
    url = f"{tmp_path}/train-0.tar"
    theirs = list(webdataset.tarfile_samples([{"url": url}]))
    ours = list(shards.read_shard(url, webdataset.reraise_exception))
    assert len(ours) == 40
    for sample, other in zip(ours, theirs, strict=True):
        assert sample.files == {k: v for k, v in other.items() if not k.startswith("__")}
        assert sample.key == other["__key__"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["seg.png", "jpg"], "jpg"),
        (["seg.png", "png"], "png"),
        (["png", "jpg"], "jpg"),
        (["json", "input.jpeg"], "input.jpeg"),
        (["depth.png", "rgb.jpg"], "rgb.jpg"),
        (["a.b.jpg", "c.png"], "c.png"),
        (["tiff", "txt"], "tiff"),
        (["json", "jpg.txt"], None),
    ],
)
def test_the_plain_image_comes_before_further_ones(names, chosen):
    sample = ShardSample("1", {name: name.encode() for name in names})
    assert sample.image == (chosen and chosen.encode())


def test_images_with_dots_in_their_names_are_all_read(tmp_path):
    for shard, numbers in enumerate((range(1, 9), range(9, 15))):
        files = {f"{'cat' if n % 2 else 'dog'}.{n}.png": encoded(n) for n in sorted(numbers)}
        write_tar(tmp_path / f"train-{shard}.tar", files)
    values = values_of(first_epoch(open_shards(tmp_path, 14)))
    assert sorted(values) == list(range(1, 15))


def test_broken_images_with_dots_in_their_names_are_named(tmp_path):
    files = {"cat.1.png": encoded(1), "cat.2.png": b"broken", "cat.3.png": encoded(3)}
    batches = first_epoch(stream_of(tmp_path, files))
    names = {name for batch in batches for name, _ in batch.broken}
    assert names <= {f"{tmp_path}/train-0.tar/cat.2"}
    assert set(values_of(batches)) == {1, 3}


# Labels


@pytest.mark.parametrize("form", ["{}", "{}.0", " {}\n"])
def test_indices_are_labels(tmp_path, form):
    files = {}
    for number in (1, 2):
        files |= {
            f"x.{number}.png": encoded(number),
            f"x.{number}.cls": form.format(number).encode(),
        }
    stream = stream_of(tmp_path, files)
    batches = first_epoch(stream)
    assert labels_of(batches) == values_of(batches)
    assert check_classes(stream, None, 3) == 3


@pytest.mark.parametrize(
    ("beside", "reason"),
    [
        ({}, "1 in SHARD has png but no cls: write the index of each image's class"),
        ({"json": b"{}"}, "1 in SHARD has png, json but no cls: write the index"),
        ({"cls": b"cat"}, "in SHARD, labels are words (cat): write the index"),
        ({"cls": b"0.5"}, "in SHARD, 0.5 cannot be the index of a class: write the index"),
        ({"cls": b"-1"}, "in SHARD, 2 of 2 are missing (empty, -1 or null): write the index"),
        ({"cls": b"\xff"}, "in SHARD, labels are words"),
    ],
)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_shards_without_labels_are_refused_only_by_who_needs_them(
    tmp_path, beside, reason, num_classes
):
    files = {}
    for number in (1, 2):
        files[f"{number}.png"] = encoded(number)
        files |= {f"{number}.{suffix}": data for suffix, data in beside.items()}
    stream = stream_of(tmp_path, files)
    with pytest.raises(InputError, match="the training images have no labels") as error:
        check_classes(stream, None, num_classes)
    assert reason.replace("SHARD", f"{tmp_path}/train-0.tar") in str(error.value)
    assert "num_classes" not in str(error.value)
    batches = first_epoch(stream)
    assert set(values_of(batches)) == {1, 2}
    assert all(batch.labels is None for batch in batches)


def test_three_of_the_words_are_shown(tmp_path):
    files = {}
    for number, word in enumerate(["owl", "cat", "dog", "emu", "cat"]):
        files |= {f"{number}.png": encoded(number), f"{number}.cls": word.encode()}
    with pytest.raises(InputError, match=r"words \(cat, dog, emu, \.\.\.\)"):
        check_classes(stream_of(tmp_path, files), None, 4)


def test_only_the_first_samples_are_looked_at_for_labels(tmp_path):
    files = {}
    for number in range(shards.PEEKED + 1):
        files |= {f"{number}.png": encoded(number), f"{number}.cls": b"0"}
    files[f"{shards.PEEKED}.cls"] = b"cat"
    assert stream_of(tmp_path, files).unlabeled is None


def test_a_shard_that_cannot_be_looked_at_is_left_to_the_run(tmp_path):
    assert open_shards(tmp_path, 2, "train-0.tar").unlabeled is None
    (tmp_path / "train-0.tar").write_bytes(b"no archive" * 100)
    assert open_shards(tmp_path, 2, "train-0.tar").unlabeled is None


def test_the_shards_are_counted_and_named(tmp_path):
    write_shards(tmp_path, [2, 2])
    stream = open_shards(tmp_path, 4)
    assert stream.place == "wds/train-{0..1}.tar (2 shards)"
    assert stream.file_names() == ["train-0.tar", "train-1.tar"]
