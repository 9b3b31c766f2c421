"""Answers for paths without images that can be read by index: how to read what they hold."""

import re
import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

from util.data.folders import ARRAY_SUFFIXES, IMAGE_SUFFIXES, is_image, sorted_naturally
from util.errors import counted, first_few

ARCHIVES = (".zip", ".7z", ".rar", ".tgz", ".tbz", ".txz", ".gz", ".bz2", ".xz", ".zst", ".lz4")
HUB_FILES = (".parquet", ".arrow")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
SIDECARS = (".cls", ".json", ".txt")  # beside the images in a webdataset
LOOKED_AT = 20  # members of an archive


def how_to_read_file(file: Path) -> str:
    """Return what to do with a file that is neither a folder nor a .tar archive."""
    name, suffix = shlex.quote(str(file)), file.suffix.lower()
    if suffix in HUB_FILES:
        return f"read its folder with --dataset {shlex.quote(f'hfds/{file.parent}')}"
    if suffix in ARCHIVES:
        is_tar = file.with_suffix("").suffix.lower() == ".tar" or suffix.startswith(".t")
        command = f"tar -xf {name} -C FOLDER" if is_tar else f"7z x {name} -oFOLDER"
        command = f"unzip -q {name} -d FOLDER" if suffix == ".zip" else command
        return f"unpack it once ({command}) and give that folder instead"
    if suffix in TABLES:
        return f"if it lists images and their classes, give it by --data_csv {name}"
    if is_image(file.name, arrays=True):
        return f"it is one image; give its folder, {shlex.quote(str(file.parent))}"
    return "give a folder or a .tar file that contains images"


def how_to_read_folder(folder: str, names: Sequence[str]) -> str:
    """Return what to do with a folder in which no images were found.

    Args:
        names: of its files.
    """
    names = sorted_naturally(names)
    there = f" (there are {first_few(names)})" if names else ""
    arrays = [name for name in names if name.lower().endswith(ARRAY_SUFFIXES)]
    packs = (".tar", *HUB_FILES, *ARCHIVES)
    if arrays and not any(name.lower().endswith(packs) for name in names):
        return (
            f"{first_few(arrays)} {'is an array' if len(arrays) == 1 else 'are arrays'} of NumPy; "
            "if these are images, give the number of their channels by --channels"
        )
    if Path(folder).is_file():
        return f"give a .tar file that contains images{there}"
    archives = [name for name in names if name.lower().endswith(".tar")]
    if archives and _is_shard(Path(folder, archives[0])):
        pattern = shlex.quote(f"wds/{_brace_pattern(archives)}")
        return (
            f"its archives are shards of a webdataset; read them with --dataset {pattern} "
            f"--data_path {shlex.quote(folder)} --num_samples N, where N is the number of images"
        )
    if len(archives) == 1:
        return f"give the archive itself, {shlex.quote(f'{folder}/{archives[0]}')}"
    if archives:
        return (
            f"its {counted(len(archives), '.tar file')} cannot be read together; unpack each into "
            f"a folder of its name (cd {shlex.quote(folder)} && for f in *.tar; do mkdir "
            '"${f%.tar}" && tar -xf "$f" -C "${f%.tar}"; done), or pack all of them into one'
        )
    if any(name.lower().endswith(HUB_FILES) for name in names):
        return f"read its files with --dataset {shlex.quote(f'hfds/{folder}')}"
    packed = [name for name in names if name.lower().endswith(ARCHIVES)]
    if packed:
        return how_to_read_file(Path(folder, packed[0]))
    return f"give a folder of {', '.join(IMAGE_SUFFIXES[:5])} and the like{there}"


def _is_shard(archive: Path) -> bool:
    """Whether an archive has labels or texts beside its images, as webdatasets do."""
    try:
        with tarfile.open(archive) as tar:
            names = [member.name for member, _ in zip(tar, range(LOOKED_AT), strict=False)]
    except (tarfile.TarError, OSError):
        return False
    return any(name.lower().endswith(SIDECARS) for name in names) and any(
        is_image(name, arrays=True) for name in names
    )


def _brace_pattern(names: Sequence[str]) -> str:
    """Return a pattern for shards in natural order: train-{0000..0146}.tar."""
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", name) for name in (names[0], names[-1])]
    if len(names) == 1 or None in parts or parts[0].group(1, 3) != parts[1].group(1, 3):
        return names[0]
    start, first, end = parts[0].groups()
    return f"{start}{{{first}..{parts[1].group(2)}}}{end}"
