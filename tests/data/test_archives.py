"""Images in .tar archives: every kind of member, labels, damage."""

import io
import logging
import subprocess
import tarfile

import pytest

from tests.helpers.data import encoded, write_tar
from util.data import archives
from util.data.files import open_files
from util.errors import InputError


def opened(path, split="train", **options):
    return open_files(str(path), split, **options)


def contents(source):
    return {source.filename(i): source[i][0].read() for i in range(len(source))}


def add(tar, name, content=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(content))


def test_links_give_their_image(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "cat/1.png", encoded(1))
        add(tar, "dog/hard.png", type=tarfile.LNKTYPE, linkname="cat/1.png")
        add(tar, "dog/soft.png", type=tarfile.SYMTYPE, linkname="../cat/1.png")
        add(tar, "dog/twice.png", type=tarfile.SYMTYPE, linkname="soft.png")
    source = opened(tmp_path / "a.tar")
    names = ["cat/1.png", "dog/hard.png", "dog/soft.png", "dog/twice.png"]
    assert contents(source) == dict.fromkeys(names, encoded(1))
    assert source.listed.labels == [0, 1, 1, 1]


def test_links_without_a_target_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.png", encoded(1))
        add(tar, "2.png", type=tarfile.SYMTYPE, linkname="/data/2.png")
        add(tar, "3.png", type=tarfile.SYMTYPE, linkname="4.png")
        add(tar, "4.png", type=tarfile.SYMTYPE, linkname="3.png")
    source = opened(tmp_path / "a.tar")
    assert list(contents(source)) == ["1.png"]
    assert source.listed.notes == ["3 links lead to no file in the archive: 2.png, 3.png, 4.png"]


def test_a_sparse_file_is_read_whole(tmp_path):
    with (tmp_path / "1.png").open("wb") as file:
        file.write(encoded(7))
        file.truncate(1 << 20)
    (tmp_path / "2.png").write_bytes(encoded(8))
    command = ["tar", "--sparse", "-C", tmp_path, "-cf", tmp_path / "a.tar", "1.png", "2.png"]
    subprocess.run(command, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1 << 20
    found = contents(opened(tmp_path / "a.tar"))
    assert found["1.png"] == encoded(7).ljust(1 << 20, b"\0")
    assert found["2.png"] == encoded(8)


def test_a_large_member_is_read_in_parts(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "2.png": encoded(2)})
    source = opened(tmp_path / "a.tar")
    expected = contents(source)
    monkeypatch.setattr(archives, "LARGE", 10)
    assert contents(source) == expected
    file, _ = source[0]
    whole = expected["1.png"]
    assert (file.seek(5), file.read(3), file.tell()) == (5, whole[5:8], 8)
    assert (file.seek(-4, io.SEEK_END), file.read()) == (len(whole) - 4, whole[-4:])
    assert (file.seek(len(whole) + 9), file.read(5)) == (len(whole) + 9, b"")
    file.close()
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: data.index(b"2.png") + 520])
    for limit in (10, 1 << 24):
        monkeypatch.setattr(archives, "LARGE", limit)
        assert source[0][0].read() == whole
        with pytest.raises(OSError, match="the archive ends inside the image"):
            source[1]


def test_of_two_members_of_a_name_the_later_counts(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "./1.png", encoded(1))
        add(tar, "1.png", encoded(2))
    assert contents(opened(tmp_path / "a.tar")) == {"1.png": encoded(2)}


def test_archives_within_an_archive_are_classes(tmp_path):
    for name in ("n01", "n02"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}_{i}.png": encoded(i) for i in range(3)})
    members = {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in ("n01", "n02")}
    write_tar(tmp_path / "train.tar", members)
    source = opened(tmp_path / "train.tar")
    assert source.classes == ("n01", "n02")
    assert contents(source) == {
        f"{name}/{name}_{i}.png": encoded(i) for name in ("n01", "n02") for i in range(3)
    }


def test_splits_within_an_archive_are_splits(tmp_path):
    files = {f"data/train/{name}/1.png": encoded(1) for name in ("cat", "dog")}
    files |= {f"data/val/{name}/1.png": encoded(2) for name in ("cat", "dog")}
    write_tar(tmp_path / "a.tar", {**files, "data/._x.png": b"", "data/train/cat/1.txt": b""})
    train, val = opened(tmp_path / "a.tar"), opened(tmp_path / "a.tar", "validation")
    assert set(contents(train).values()) == {encoded(1)}
    assert set(contents(val).values()) == {encoded(2)}
    assert train.listed.others == {".txt": 1}


def test_hidden_members_are_counted(tmp_path):
    files = {"cat/1.png": encoded(1), "cat/._1.png": b"", "__MACOSX/cat/1.png": b""}
    write_tar(tmp_path / "a.tar", files)
    source = opened(tmp_path / "a.tar")
    assert len(source) == 1
    assert source.listed.hidden == {"._1.png": 1, "__MACOSX": 1}


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (["0", "2\n", "1"], [0, 2, 1], None),
        (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
    ],
)
def test_label_files_beside_the_images_are_read(tmp_path, labels, expected, classes):
    files = {}
    for number, label in enumerate(labels):
        files |= {f"{number}.png": encoded(number), f"{number}.cls": label.encode()}
    write_tar(tmp_path / "val.tar", files)
    source = opened(tmp_path / "val.tar", "validation", search_split=False)
    assert [source[i][1] for i in range(3)] == expected
    assert source.classes == classes
    assert source.unlabeled is None
    assert not source.listed.others


def test_an_archive_without_all_label_files_has_no_labels(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1), "1.cls": b"0", "2.png": encoded(2)})
    source = opened(tmp_path / "a.tar")
    assert "have no .cls file (2.png): write the class" in source.unlabeled
    assert source.listed.others == {".cls": 1}


def test_masks_in_labeled_samples_are_not_images(tmp_path):
    files = {"a.0.PNG": encoded(1), "a.0.CLS": b"1", "a.0.seg.png": encoded(2)}
    files |= {"b.png": encoded(3), "b.cls": b"0", "b.mask.png": encoded(4)}
    write_tar(tmp_path / "val.tar", files)
    source = opened(tmp_path / "val.tar", "validation", search_split=False)
    assert contents(source) == {"a.0.PNG": encoded(1), "b.png": encoded(3)}
    assert source.labels == [1, 0]
    (note,) = source.listed.notes
    assert note.startswith("2 images are not read")


def test_no_file_is_written_beside_an_archive(tmp_path):
    write_tar(tmp_path / "a.tar", {"1.png": encoded(1)})
    opened(tmp_path / "a.tar")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_damage_in_the_middle_is_told(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(4)})
    offset = opened(tmp_path / "a.tar").members[2].offset
    with (tmp_path / "a.tar").open("r+b") as file:
        file.seek(offset - tarfile.BLOCKSIZE)
        file.write(b"x" * tarfile.BLOCKSIZE)
    assert list(contents(opened(tmp_path / "a.tar"))) == ["0.png", "1.png"]
    assert "a.tar has data after its end, which is not read" in caplog.text


def test_a_whole_archive_is_read_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write_tar(tmp_path / "a.tar", {f"{i}.png": encoded(i) for i in range(4)})
    assert len(opened(tmp_path / "a.tar")) == 4
    assert not caplog.text


def test_a_path_within_an_archive_is_not_advised_without_unpacking(tmp_path):
    files = {f"{split}/1.png": encoded(1) for split in ("train", "val")}
    write_tar(tmp_path / "all.tar", files)
    with pytest.raises(InputError, match="unpack it for that"):
        opened(tmp_path / "all.tar", "validation", search_split=False)


def test_a_folder_of_one_archive_is_answered_with_its_path(tmp_path):
    write_tar(tmp_path / "data.tar", {"1.png": encoded(1)})
    with pytest.raises(InputError, match=f"give the archive itself, {tmp_path}/data.tar"):
        opened(tmp_path)


@pytest.mark.parametrize("shards", [True, False])
def test_a_folder_of_archives_is_answered_with_what_reads_it(tmp_path, shards):
    for number in range(12):
        files = {f"{i}.png": encoded(i) for i in range(2)}
        files |= {f"{i}.cls": b"0" for i in range(2)} if shards else {}
        write_tar(tmp_path / f"part-{number:03d}.tar", files)
    with pytest.raises(InputError) as error:
        opened(tmp_path)
    if shards:
        command = f"--dataset 'wds/part-{{000..011}}.tar' --data_path {tmp_path} --num_samples N"
        assert command in str(error.value)
    else:
        assert "12 .tar files cannot be read together" in str(error.value)
