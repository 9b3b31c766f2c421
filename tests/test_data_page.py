"""The layouts on docs/data.md are read as the page says."""

import io
import logging
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tifffile
from scipy.io import savemat

from tests.helpers.data import STILL, all_labels, encoded, write_parquet, write_tar
from util.data.datasets import open_train_val
from util.data.report import report_images
from util.errors import InputError
from util.settings.data import DataSettings

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
LAYOUT = re.compile(r"```text\n(.+?)\n```\n\n```bash\n(.+?)\n```\n\n```text\n(.+?)\n```", re.DOTALL)
LAYOUTS = LAYOUT.findall(PAGE)
FIELDS = {field.name for field in fields(DataSettings)}
KINDS = {"num_samples": int, "val_fraction": float, "channels": int}


def content_of(name):
    if name.endswith(".cls"):
        return str(int(name.split(".")[0]) % 2).encode()
    if name.endswith((".npy", ".npz", ".tif")):
        return array_file(name)
    return encoded(1) if re.search(r"\.(jpe?g|png)$", name, re.IGNORECASE) else b""


def array_file(name):
    file, pixels = io.BytesIO(), np.zeros((5, 8, 8), np.uint16)
    if name.endswith(".tif"):
        tifffile.imwrite(file, pixels, photometric="minisblack")
    else:
        (np.save if name.endswith(".npy") else np.savez)(file, pixels)
    return file.getvalue()


def write(line):
    """Write the files that a line of a layout names."""
    table = re.match(r"(\S+\.csv): (.*)", line)
    if table:
        Path(table[1]).write_text("\n".join(table[2].split(" / ")))
        return
    folder, *names = line.split()
    if folder.endswith(".tar:"):
        archive = Path(folder.removesuffix(":"))
        archive.parent.mkdir(parents=True, exist_ok=True)
        write_tar(archive, {name: content_of(name) for name in names})
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        if name.endswith(".parquet"):
            write_parquet(Path(folder), [1, 2, 3], split=name.split("-")[0])
        else:
            Path(folder, name).write_bytes(content_of(name))


def settings_of(command):
    _, _, *words = shlex.split(command.replace("\\\n", ""))
    flags = {}
    for word in words:
        if word.startswith("--"):
            values = flags.setdefault(word.removeprefix("--"), [])
        else:
            values.append(word)
    flags = {name: values for name, values in flags.items() if name in FIELDS}
    ranges = {"value_range": list(map(float, flags.pop("value_range", ()))) or None}
    flags = {name: KINDS.get(name, str)(value) for name, (value,) in flags.items()}
    return DataSettings(**flags, **ranges)


def test_every_layout_of_the_page_is_found():
    assert len(LAYOUTS) == PAGE.count("```bash") == 19


@pytest.mark.parametrize(("layout", "command", "printed"), LAYOUTS)
def test_a_layout_is_read_as_the_page_says(tmp_path, monkeypatch, caplog, layout, command, printed):
    monkeypatch.chdir(tmp_path)
    for line in layout.splitlines():
        write(line)
    settings = settings_of(command)
    options = {"seed": 0, "holds_out": "main_pretrain.py" in command}
    if printed.startswith("error: "):
        with pytest.raises(InputError) as error:
            open_train_val(settings, STILL, STILL, **options)
        assert str(error.value) == printed.removeprefix("error: ")
        return
    sets = open_train_val(settings, STILL, STILL, **options)
    with caplog.at_level(logging.INFO, logger="util.data.report"):
        caplog.clear()
        report_images(*sets)
    assert "\n".join(record.message for record in caplog.records) == printed


def write_published_lists():
    """Write the lists of labels of three datasets in their own formats, and their images."""
    pets, tiny, cars = (Path(name) for name in ("pets", "tiny", "cars"))
    for split, number in (("trainval", 1), ("test", 2)):
        names = [f"Maine_Coon_{number}", f"american_bulldog_{number}"]
        for name in names:
            write(f"pets/images/ {name}.jpg")
        (pets / "annotations").mkdir(exist_ok=True)
        (pets / "annotations" / f"{split}.txt").write_text(
            "".join(f"{name} {label} 1 1\n" for label, name in enumerate(names, start=1))
        )
    for wnid in ("n01443537", "n01629819"):
        write(f"tiny/train/{wnid}/images/ {wnid}_0.JPEG {wnid}_1.JPEG")
    write("tiny/val/images/ val_0.JPEG val_1.JPEG")
    (tiny / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn01629819\t0\t32\t44\t62\nval_1.JPEG\tn01443537\t52\t55\t57\t59\n"
    )
    (cars / "devkit").mkdir(parents=True)
    savemat(
        cars / "devkit" / "cars_meta.mat", {"class_names": np.array(["AM Hummer", "Audi"], object)}
    )
    for split, folder in (("train_annos", "cars_train"), ("test_annos_withlabels", "cars_test")):
        rows = [(1, 2, "00001.jpg"), (5, 1, "00002.jpg")]
        kinds = [("bbox_x1", "u1"), ("class", "u1"), ("fname", object)]
        savemat(cars / "devkit" / f"cars_{split}.mat", {"annotations": np.array(rows, kinds)})
        write(f"cars/{folder}/ 00001.jpg 00002.jpg")
    Path("chest").mkdir()
    Path("chest/wide.csv").write_text("path,Edema,Mass\n1.png,0,1\n2.png,1,1\n3.png,0,0\n")


def test_published_lists_become_tables_as_the_page_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_published_lists()
    (code,) = re.findall(r"```python\n(.+?)\n```", PAGE, re.DOTALL)
    exec(code, {})
    assert (
        Path("chest/labels.csv").read_text() == "path,label\n1.png,Mass\n2.png,Edema|Mass\n3.png,"
    )
    classes = [
        ("american_bulldog", "Maine_Coon"),
        ("n01443537", "n01629819"),
        ("AM Hummer", "Audi"),
    ]
    labels = [([1, 0], [1, 0]), ([0, 0, 1, 1], [1, 0]), ([1, 0], [1, 0])]
    commands = re.findall(r"^- `(python main_finetune.+)`$", PAGE, re.MULTILINE)
    for command, names, expected in zip(commands, classes, labels, strict=True):
        sets = open_train_val(settings_of(command), STILL, STILL, seed=0)
        assert [images.classes for images in sets] == [names, names]
        assert tuple(all_labels(images) for images in sets) == expected
