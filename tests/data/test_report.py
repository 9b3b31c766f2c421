"""What a start says about its images, and that all processes read the same."""

import json
import socket

import pytest
from PIL import Image

from tests.helpers.data import STILL, encoded, open_train, open_val_split, write_shards, write_tar
from tests.helpers.files import write_classes, write_images
from tests.helpers.processes import NANO_MAIN, command, finish, start
from tests.helpers.runs import TINY, run
from util.data.datasets import open_train_val
from util.data.report import Found, describe, lines_of, report_images
from util.settings.data import DataSettings


def block_of(images, role="training"):
    return lines_of(role, describe(images))


def write(folder, **counts):
    for name, count in counts.items():
        write_images(folder / name, count, size=8)
    return folder


def test_the_block_names_folders_classes_and_what_was_passed_over(tmp_path):
    write(tmp_path, **{"train/cat": 3, "train/dog": 1, "val/cat": 1, "val/dog": 1, "test": 1})
    train = tmp_path / "train"
    (train / ".DS_Store").write_bytes(b"")
    for name in ("a.txt", "b.txt", "c.csv", "README"):
        (train / "cat" / name).write_bytes(b"")
    (train / "__MACOSX").mkdir()
    (train / "dog" / "all").symlink_to(train)
    assert block_of(open_train("", tmp_path)) == [
        f"4 training images from {train}: cat 3, dog 1",
        "  classes: 2, from cat to dog; smallest dog (1), largest cat (3)",
        "  passed over hidden: .DS_Store 1, __MACOSX 1; other files: .txt 2, .csv 1, no suffix 1; "
        "links that lead back: dog/all",
        "  not read: test",
    ]
    assert block_of(open_val_split("", tmp_path), "validation") == [
        f"2 validation images from {tmp_path}/val: cat 1, dog 1",
        "  classes: 2, from cat to dog, 1 image each",
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_further_pages_of_tiff_files_are_counted(tmp_path, packed):
    pages = [Image.new("L", (8, 8), value) for value in range(3)]
    for name, count in (("a.tif", 1), ("b.tif", 3), ("c.TIFF", 2), ("d.png", 1)):
        place = tmp_path / "data" / name
        place.parent.mkdir(exist_ok=True)
        further = {"save_all": True, "append_images": pages[1:count]} if count > 1 else {}
        pages[0].save(place, **further)
    source = tmp_path / "data"
    if packed:
        source = tmp_path / "data.tar"
        write_tar(source, {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()})
    line = (
        "  2 TIFF files have further pages, which are not read (--channels N reads N as channels)"
    )
    assert block_of(open_train("", source))[-1] == line


@pytest.mark.parametrize(
    ("counts", "share"),
    [
        ((6, 1), "86%"),
        ((3, 1), None),  # one and a half times the even share, and no more
        ((2, *[1] * 19), "9.5%"),
    ],
)
def test_the_share_of_the_commonest_class_is_told_where_it_is_large(tmp_path, counts, share):
    write(tmp_path, **{f"class_{number}": count for number, count in enumerate(counts)})
    lines = block_of(open_train("", tmp_path))[2:]
    expected = f"  the commonest class, class_0, has {share} of the images"
    assert lines == ([expected] if share else [])


def test_ten_folders_are_listed_and_then_counted(tmp_path):
    write(tmp_path, **{f"class_{number}": 1 for number in range(13)})
    (first, _) = block_of(open_train("", tmp_path))
    assert first.endswith("class_8 1, class_9 1, and 3 more folders")


def test_a_folder_without_folders_is_one_line(tmp_path):
    write_images(tmp_path, 2)
    assert block_of(open_train("", tmp_path)) == [f"2 training images from {tmp_path}"]


def test_archives_streams_and_other_sources_say_where_they_are_from(tmp_path):
    write_tar(tmp_path / "a.tar", {"cat/1.png": encoded(1), "dog/1.png": encoded(2)})
    assert block_of(open_train("", tmp_path / "a.tar")) == [
        f"2 training images from {tmp_path}/a.tar: cat 1, dog 1",
        "  classes: 2, from cat to dog, 1 image each",
    ]
    assert block_of(open_train("digits", None))[0] == "1437 training images from digits (train)"
    assert block_of(open_val_split("digits", None), "validation")[1] == (
        "  classes: 10, from 0 to 9; smallest 2 (26), largest 3 (48)"
    )
    write_shards(tmp_path, [2, 2])
    stream = open_train("wds/train-{0..1}.tar", tmp_path, num_samples=4)
    assert block_of(stream) == ["4 training images from wds/train-{0..1}.tar (2 shards)"]


def test_args_json_has_what_the_block_says(tmp_path):
    write_classes(tmp_path / "data")
    argv = ["--data_path", tmp_path / "data", *TINY, "--epochs", "1"]
    run(*argv, "--output_dir", tmp_path / "run")
    data = DataSettings(data_path=str(tmp_path / "data"))
    expected = report_images(*open_train_val(data, STILL, STILL, seed=0))
    found = json.loads((tmp_path / "run" / "args.json").read_text())["data"]
    assert found == json.loads(json.dumps(expected))
    assert found["training"]["folders"] == {"apple": 12, "bear": 12, "cup": 13}
    assert found["validation"]["from"] == str(tmp_path / "data" / "val")


# Several processes


def run_two(folder, paths):
    """Run main_pretrain.py in two processes, each with its own --data_path, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    argv = [*TINY, "--epochs", "1", "--output_dir", folder]
    processes = [
        start(
            command(NANO_MAIN, "pretrain", *argv, "--data_path", path),
            **{**place, **sizes, "RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number, path in enumerate(paths)
    ]
    return [finish(process) for process in processes]


@pytest.mark.slow  # the libraries are imported four times
def test_processes_with_different_files_end_with_the_difference(tmp_path):
    paths = [write(tmp_path / name, cat=4, dog=5) for name in ("one", "other")]
    assert {code for code, _, _ in run_two(tmp_path / "run", paths)} == {0}  # elsewhere, the same
    (paths[1] / "cat" / "000.png").unlink()
    results = run_two(tmp_path / "refused", paths)
    assert {code for code, _, _ in results} == {2}
    messages = [line for _, _, err in results for line in err.splitlines() if "error:" in line]
    (message,) = {message.partition("error: ")[2] for message in messages}
    assert message == (
        f"process 1 on {socket.gethostname()} finds other training images than process 0: 8 "
        "instead of 9, without cat/000.png; give all processes the same files"
    )
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda cat: (cat / "000.png").unlink(), "8 instead of 9, without cat/000.png"),
        (lambda cat: (cat.with_name("dog") / "9.png").touch(), "10 instead of 9, with dog/9.png"),
        (
            lambda cat: (cat / "000.png").rename(cat / "999.png"),
            "their names differ, without cat/000.png, with cat/999.png",
        ),
        (
            lambda cat: cat.rename(cat.with_name("cow")),
            "their names differ, without cat/000.png, with cow/000.png",
        ),
    ],
)
def test_every_difference_between_processes_is_told(tmp_path, change, difference):
    one, other = (write(tmp_path / name, cat=4, dog=5) for name in ("one", "other"))
    expected = Found.of(open_train("", one))
    assert Found.of(open_train("", other)).difference_from(expected) is None
    change(other / "cat")
    assert Found.of(open_train("", other)).difference_from(expected) == difference


def test_classes_of_another_order_are_a_difference():
    one, other = (Found(2, ["1.png", "2.png"], classes) for classes in (["a", "b"], ["b", "a"]))
    assert other.difference_from(one) == "its classes are b, a, not a, b"
