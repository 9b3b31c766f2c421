"""The layouts on docs/data.md are read as the page says."""

import logging
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from tests.helpers.data import STILL, encoded, write_parquet, write_tar
from util.data.datasets import open_train_val
from util.data.report import report_images
from util.data.settings import DataSettings
from util.errors import InputError

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
LAYOUT = re.compile(r"```text\n(.+?)\n```\n\n```bash\n(.+?)\n```\n\n```text\n(.+?)\n```", re.DOTALL)
LAYOUTS = LAYOUT.findall(PAGE)
FIELDS = {field.name for field in fields(DataSettings)}


def content_of(name):
    if name.endswith(".cls"):
        return str(int(name.split(".")[0]) % 2).encode()
    return encoded(1) if re.search(r"\.(jpe?g|png)$", name, re.IGNORECASE) else b""


def write(line):
    """Write the files that a line of a layout names."""
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
    flags = {flag.removeprefix("--"): value for flag, value in zip(*[iter(words)] * 2, strict=True)}
    flags = {name: value for name, value in flags.items() if name in FIELDS}
    if "num_samples" in flags:
        flags["num_samples"] = int(flags["num_samples"])
    return DataSettings(**flags)


def test_every_layout_of_the_page_is_found():
    assert len(LAYOUTS) == PAGE.count("```bash") == 14


@pytest.mark.parametrize(("layout", "command", "printed"), LAYOUTS)
def test_a_layout_is_read_as_the_page_says(tmp_path, monkeypatch, caplog, layout, command, printed):
    monkeypatch.chdir(tmp_path)
    for line in layout.splitlines():
        write(line)
    settings = settings_of(command)
    if printed.startswith("error: "):
        with pytest.raises(InputError) as error:
            open_train_val(settings, STILL, STILL, seed=0)
        assert str(error.value) == printed.removeprefix("error: ")
        return
    sets = open_train_val(settings, STILL, STILL, seed=0)
    with caplog.at_level(logging.INFO, logger="util.data.report"):
        caplog.clear()
        report_images(*sets)
    assert "\n".join(record.message for record in caplog.records) == printed
