"""Fill a folder with a given number of JPEGs from a tar or folder, repeated by hard links.

python scripts/gpu/images.py images.tar FOLDER 22528
"""

import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

ENDINGS = (".jpg", ".jpeg")


def read_jpegs(data: Path) -> Iterator[bytes]:
    """Yield the content of every JPEG in a folder or tar."""
    if data.is_dir():
        paths = (path for path in sorted(data.rglob("*")) if path.suffix.lower() in ENDINGS)
        yield from (path.read_bytes() for path in paths)
        return
    with tarfile.open(data) as tar:
        for member in tar:
            if member.isfile() and member.name.lower().endswith(ENDINGS):
                yield tar.extractfile(member).read()


def main() -> None:
    """Write the files and print their number."""
    data, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    if not data.exists():
        sys.exit(f"error: {data} does not exist: set DATA to a tar or folder of JPEGs")
    files = []
    for number, content in enumerate(read_jpegs(data)):
        if number == count:
            break
        files.append(folder / f"{number:06d}.jpg")
        files[-1].write_bytes(content)
    if not files:
        sys.exit(f"error: no JPEGs found in {data}: set DATA to a tar or folder of JPEGs")
    for number in range(len(files), count):
        os.link(files[number % len(files)], folder / f"{number:06d}.jpg")
    print(f"{count} files, {len(files)} of them distinct")


if __name__ == "__main__":
    main()
