"""Image files of formats that are not read: broken images by name, and no program is started."""

import io
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import EpsImagePlugin, Image

import main_detection
import main_finetune
import main_knn
import main_linprobe
import main_segmentation
from scripts import benchmark_loader, predict, prepare_dataset, visualize_reconstruction
from tests.helpers.data import STILL, encoded, write_tar
from tests.helpers.files import write_coco, write_masked_images
from tests.helpers.foreign import foreign_files, picture, read_files
from tests.helpers.runs import TINY, refusal, run
from tests.helpers.weights import finetuned, stored, vit_nano
from util.data.broken_images import reason_of
from util.data.colors import highest_deep_value
from util.data.decode import read_for_device, read_pixels, read_record, read_rgb
from util.data.folders import IMAGE_SUFFIXES
from util.data.images import IndexedImages
from util.data.masks import MASK_SUFFIXES, read_mask
from util.data.values import open_values, read_values
from util.normalization import PixelFormat

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("nano", "offline")]

FOREIGN = foreign_files()
READ = read_files()
NAMED = re.compile(r"Broken image[^:]*: (?:.*/)?(\S+?) \((.*)\)$", re.M)
QUICK = ["--num_workers", 0, "--amp", "fp32", "--device", "cpu"]
CLASSIFIER = ["--model", "vit_tiny_patch4", "--input_size", 16, "--batch_size", 8, "--epochs", 1]
CLASSIFIER += QUICK


@pytest.fixture(autouse=True)
def ghostscript(tmp_path_factory, monkeypatch):
    """A program `gs` that leaves a file when it is started, which no test may do."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "gs").write_text(f"#!/bin/sh\n: > {folder}/started\necho 10.0\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it has been looked for before
    yield folder / "started"
    assert not (folder / "started").exists(), "Ghostscript was started"


def one_each():
    """Foreign files by name, each with another suffix: (content, part of its reason)."""
    suffixes = [IMAGE_SUFFIXES[n % len(IMAGE_SUFFIXES)] for n in range(len(FOREIGN))]
    names = (f"{n:04d}-{kind}" for n, kind in enumerate(FOREIGN))
    names = (name.replace(" ", "_") for name in names)
    return dict(zip(map("".join, zip(names, suffixes, strict=True)), FOREIGN.values(), strict=True))


def every_suffix():
    """Foreign files by name, each with every suffix."""
    kinds = [(kind, suffix) for kind in FOREIGN for suffix in IMAGE_SUFFIXES]
    return {
        f"{n:04d}-{kind.replace(' ', '_')}{suffix}": FOREIGN[kind]
        for n, (kind, suffix) in enumerate(kinds)
    }


def mixed(foreign):
    """Files by name, with one that is read after every third foreign one."""
    content = {name: data for name, (data, _) in foreign.items()}
    return content | {f"{n:04d}~good.png": encoded(n % 255) for n in range(0, len(foreign), 3)}


def write_folder(folder, files, num_classes=1):
    for n, (name, data) in enumerate(sorted(files.items())):
        path = folder / f"class_{n % num_classes}" / name if num_classes > 1 else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def named(text):
    """The reasons of broken images, by the names of their files, in a run's log."""
    return dict(NAMED.findall(text))


def assert_each_is_named(text, foreign):
    """Assert that a log names every foreign file, and no other, with a fitting reason."""
    found = named(text)
    assert set(found) == set(foreign)
    wrong = {name: found[name] for name, (_, part) in foreign.items() if part not in found[name]}
    assert not wrong


# Readers


READERS = {
    "read_rgb": read_rgb,
    "read_pixels": read_pixels,
    "read_record": read_record,
    "read_for_device": read_for_device,
    "read_values": lambda file: read_values(file, PixelFormat(3, (0, 255))),
    "read_values of 5 channels": lambda file: read_values(file, PixelFormat(5)),
    "open_values": open_values,
    "a record of a table": lambda file: read_rgb({"bytes": file.read(), "path": None}),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_format_is_broken_and_named(kind, reader):
    data, part = FOREIGN[kind]
    with pytest.raises(Exception) as caught:
        READERS[reader](io.BytesIO(data))
    assert part in reason_of(caught.value)


@contextmanager
def watched():
    """The programs that are started within, and the files that are opened."""
    events, is_watching = [], True

    def watch(event, args):
        if is_watching and event in ("open", "subprocess.Popen", "os.exec", "os.posix_spawn"):
            events.append((event, str(args[0])))

    sys.addaudithook(watch)  # there is no way to remove it
    try:
        yield events
    finally:
        is_watching = False


@pytest.mark.parametrize("kind", [*FOREIGN, *(name for name, _ in READ)])
def test_reading_starts_no_program_and_opens_no_other_file(kind):
    files = {name: data for (name, _), data in READ.items()}
    data = FOREIGN[kind][0] if kind in FOREIGN else files[kind]
    for warm_up in (READ["PNG", ".png"], b"text", data):  # modules are imported
        with suppress(OSError):
            read_rgb(io.BytesIO(warm_up))
    with watched() as events, suppress(OSError):
        read_rgb(io.BytesIO(data))
    assert not events


@pytest.mark.parametrize("kind", READ)
def test_the_formats_that_are_read_keep_their_pixels(kind):
    pixels = read_pixels(io.BytesIO(READ[kind])).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(pixels, np.asarray(picture()), atol=70)  # GIF has few colors


def test_every_suffix_that_is_listed_has_a_format_that_is_read():
    Image.init()
    formats = {Image.registered_extensions().get(suffix, "AVIF") for suffix in IMAGE_SUFFIXES}
    assert formats - {"AVIF"} == {kind for kind, _ in READ} - {"MPO", "AVIF"}


def test_a_pillow_without_avif_still_reads_the_others(monkeypatch):
    from util.data import decode

    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    decode.formats.cache_clear()
    try:
        for (kind, _), data in READ.items():
            if kind != "AVIF":
                assert read_rgb(io.BytesIO(data)).size == picture().size
    finally:
        decode.formats.cache_clear()


def opened_by_pillow():
    """The foreign files whose header Pillow reads, by their names."""
    found = []
    for kind, (data, _) in FOREIGN.items():
        with suppress(Exception), Image.open(io.BytesIO(data)) as image:
            found += [kind] if image.format != "TGA" else []
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", opened_by_pillow())
def test_an_image_that_a_library_has_opened_is_not_decoded(kind):
    image = Image.open(io.BytesIO(FOREIGN[kind][0]))
    images = IndexedImages([(image, 0)], STILL, seed=0, place="there")
    assert highest_deep_value(images) is None
    for read in (read_rgb, lambda record: open_values(record, PixelFormat(3, (0, 255)))):
        with pytest.raises(OSError, match=f"{image.format}, which is not read"):
            read(Image.open(io.BytesIO(FOREIGN[kind][0])))


@pytest.mark.parametrize("suffix", MASK_SUFFIXES)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_mask_of_another_format_is_broken_and_named(tmp_path, kind, suffix):
    data, part = FOREIGN[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    with pytest.raises(OSError) as caught:
        read_mask(path)
    assert part in reason_of(caught.value)


# Whole runs

BROKEN = ["--max_broken", 0.9]


def as_folder(folder, files):
    return ["--data_path", write_folder(folder / "images", files)]


def as_tar(folder, files):
    folder.mkdir()
    write_tar(folder / "images.tar", files)
    return ["--data_path", folder / "images.tar"]


def as_table(folder, files):
    write_folder(folder / "images", files)
    table = folder / "images.csv"
    table.write_text("".join(["path\n", *(f"{name}\n" for name in files)]))
    return ["--data_csv", table, "--data_path", folder / "images"]


def as_torchvision(folder, files):
    write_folder(folder / "images" / "a", files)
    return ["--dataset", "torch/folder", "--data_path", folder / "images"]


def as_shards(folder, files):
    folder.mkdir()
    write_tar(folder / "train-0.tar", files)
    return ["--dataset", "wds/train-0.tar", "--data_path", folder, "--num_samples", len(files)]


def as_parquet(folder, files, kind="hfds"):
    import datasets

    images = [{"bytes": data, "path": name} for name, data in files.items()]
    features = datasets.Features({"image": datasets.Image()})
    (folder / "set").mkdir(parents=True)
    datasets.Dataset.from_dict({"image": images}, features).to_parquet(
        folder / "set" / "train-0.parquet"
    )
    return ["--dataset", f"{kind}/{folder}/set", "--data_path", folder / "cache"]


def as_stream(folder, files):
    return [*as_parquet(folder, files, "hfids"), "--num_samples", len(files)]


SOURCES = {
    "folder": as_folder,
    "tar": as_tar,
    "table": as_table,
    "torch/folder": as_torchvision,
    "wds": as_shards,
    "hfds": as_parquet,
    "hfids": as_stream,
}


@pytest.mark.parametrize("source", SOURCES)
def test_pretraining_names_each_file_of_another_format(tmp_path, source):
    foreign = one_each()
    argv = [*SOURCES[source](tmp_path / "data", mixed(foreign)), *TINY, "--epochs", 1, *BROKEN]
    run(*argv, "--output_dir", tmp_path / "run")
    if source == "wds":  # whose samples are named without suffix
        foreign = {Path(name).stem: value for name, value in foreign.items()}
    assert_each_is_named((tmp_path / "run" / "log.txt").read_text(), foreign)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "tar"])
@pytest.mark.parametrize("options", [[], ["--channels", 3, "--value_range", 0, 255]])
def test_pretraining_names_each_file_of_another_format_under_any_suffix(tmp_path, source, options):
    foreign = every_suffix()
    argv = [*SOURCES[source](tmp_path / "data", mixed(foreign)), *TINY, "--epochs", 1, *BROKEN]
    argv += ["--val_fraction", 0]
    if options:
        options = [*options, "--mean", 0.5, 0.5, 0.5, "--std", 0.3, 0.3, 0.3]
    run(*argv, *options, "--output_dir", tmp_path / "run")
    assert_each_is_named((tmp_path / "run" / "log.txt").read_text(), foreign)


@pytest.mark.parametrize("source", ["folder", "tar", "hfds"])
def test_pretraining_reads_the_other_formats_under_any_suffix(tmp_path, source):
    files = {f"{kind}{s}{t}": READ[kind, s] for kind, s in READ for t in IMAGE_SUFFIXES}
    argv = [*SOURCES[source](tmp_path / "data", files), *TINY, "--epochs", 1, "--max_broken", 0]
    run(*argv, "--val_fraction", 0, "--output_dir", tmp_path / "run")
    assert not named((tmp_path / "run" / "log.txt").read_text())


@pytest.mark.slow
def test_loader_processes_start_no_program_either(tmp_path):
    foreign = one_each()
    argv = [*as_folder(tmp_path / "data", mixed(foreign)), *TINY, "--epochs", 1, *BROKEN]
    run(*argv, "--num_workers", 2, "--output_dir", tmp_path / "run")
    assert_each_is_named((tmp_path / "run" / "log.txt").read_text(), foreign)


def test_more_of_them_than_the_limit_end_the_run(tmp_path, capsys):
    argv = [*as_folder(tmp_path / "data", mixed(one_each())), *TINY]
    sentence = refusal(capsys, *argv, "--output_dir", tmp_path / "run")
    assert "cannot be read, above the limit" in sentence
    assert "which is not read" in sentence


def annotated(folder, foreign):
    """Class folders of training and validation images, each with the foreign files."""
    for split in ("train", "val"):
        write_folder(folder / split, mixed(foreign), num_classes=3)
    return ["--data_path", folder]


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_other_mains_name_each_file_of_another_format(tmp_path, main, pretrained):
    foreign = one_each()
    argv = [*annotated(tmp_path / "data", foreign), *CLASSIFIER, "--finetune", pretrained, *BROKEN]
    run(*argv, "--output_dir", tmp_path / "run", main=main.main)
    assert_each_is_named((tmp_path / "run" / "log.txt").read_text(), foreign)


def test_neighbors_name_each_file_of_another_format(tmp_path, pretrained, capsys):
    foreign = one_each()
    argv = [*annotated(tmp_path / "data", foreign), "--finetune", pretrained, *BROKEN, *QUICK]
    run(*argv, "--k", 2, main=main_knn.main)
    captured = capsys.readouterr()
    assert_each_is_named(captured.out + captured.err, foreign)


def test_prepared_images_leave_out_each_file_of_another_format(tmp_path, capsys):
    foreign = one_each()
    for form in ("jpeg", "raw"):
        argv = [*annotated(tmp_path / form, foreign), "--output_dir", tmp_path / f"{form}-out"]
        argv += ["--format", form, "--short_side", 16, "--num_workers", 0, *BROKEN]
        run(*argv, main=prepare_dataset.main)
        out = capsys.readouterr().out
        left_out = dict(re.findall(r"left out: \S*/(\S+) \((.*)\)", out))
        assert set(left_out) == set(foreign)
        assert all(part in left_out[name] for name, (_, part) in foreign.items())


def test_predictions_name_each_file_of_another_format(tmp_path, capsys):
    foreign = one_each()
    classes = ["a", "b", "c"]
    content = finetuned(vit_nano(pool="avg", num_classes=3), classes=classes)
    checkpoint = stored(tmp_path / "classifier.pth", {**content, "crop_pct": 0.8})
    images = write_folder(tmp_path / "images", mixed(foreign))
    argv = ["--checkpoint", checkpoint, "--images", images, "--output", tmp_path / "table.csv"]
    run(*argv, *QUICK, main=predict.main)
    assert_each_is_named(capsys.readouterr().out, foreign)


def test_segmentation_names_images_and_masks_of_another_format(tmp_path):
    data = write_masked_images(tmp_path / "data", num_train=3 * len(FOREIGN), num_val=3)
    expected = {}
    for n, (content, part) in enumerate(FOREIGN.values()):
        image, mask = f"{3 * n:03d}.png", f"{3 * n + 1:03d}.png"
        (data / "images" / "train" / image).write_bytes(content)
        (data / "annotations" / "train" / mask).write_bytes(content)
        expected |= {image: part, mask: part}
    argv = ["--data_path", data, "--classes", data / "classes.txt", "--model", "vit_tiny_patch4"]
    argv += ["--crop_size", 16, "--batch_size", 8, "--max_iters", 20, "--eval_every", 20, *QUICK]
    run(*argv, *BROKEN, "--output_dir", tmp_path / "run", main=main_segmentation.main)
    found = named((tmp_path / "run" / "log.txt").read_text())
    assert set(found) == set(expected)
    assert all(part in found[name] for name, part in expected.items())


@pytest.mark.slow
def test_detection_names_images_of_another_format(tmp_path):
    data = write_coco(tmp_path / "data", num_train=2 * len(FOREIGN))
    expected = {}
    for n, (content, part) in enumerate(FOREIGN.values()):
        (data / "train" / f"{2 * n:03d}.png").write_bytes(content)
        expected[f"{2 * n:03d}.png"] = part
    argv = ["--data_path", data, "--model", "vit_tiny_patch4", "--input_size", 32]
    argv += ["--window_size", 3, "--global_blocks", 1, "--fpn_dim", 16, "--box_convs", 1]
    argv += ["--roi_batch", 8, "--batch_size", 4, "--max_iters", 21, "--eval_every", 21, *QUICK]
    run(*argv, *BROKEN, "--output_dir", tmp_path / "run", main=main_detection.main)
    found = named((tmp_path / "run" / "log.txt").read_text())
    assert set(found) == set(expected)
    assert all(part in found[name] for name, part in expected.items())


@pytest.mark.parametrize("kind", ["EPS", "EPS with a preview", "PSD", "ICO"])
def test_scripts_name_a_file_of_another_format(tmp_path, capsys, pretrained, kind):
    data, part = FOREIGN[kind]
    images = write_folder(tmp_path / "images", {"a.jpg": data, "b.jpg": data})
    argv = ["--checkpoint", pretrained, "--images", images, "--output", tmp_path / "a.png"]
    sentence = refusal(capsys, *argv, "--device", "cpu", main=visualize_reconstruction.main)
    assert f"{part}, which is not read" in sentence


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_benchmark_names_a_file_that_the_reference_does_not_read(tmp_path, capsys, num_workers):
    images = write_folder(tmp_path / "images", {f"{n:03d}.png": encoded(n) for n in range(65)})
    (images / ("064.png" if num_workers else "000.png")).write_bytes(FOREIGN["EPS"][0])
    argv = ["--data_path", images, "--num_workers", num_workers, "--batch_size", 4]
    sentence = refusal(capsys, *argv, "--input_size", 16, main=benchmark_loader.main)
    assert sentence.startswith(f"{images}/0")
    assert "cannot be read (not an image of a known format)" in sentence


# Files that a TIFF names


def ome_tiff(path, other, counts):
    """Write a page of a TIFF whose first channel is in another file."""
    places = "".join(
        f'<TiffData FirstC="{c}" {counts}><UUID FileName="{name}">urn:uuid:'
        f"{1 - c}0000000-0000-0000-0000-000000000000</UUID></TiffData>"
        for c, name in enumerate((other, path.name))
    )
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:00000000-0000-0000-0000-000000000000"><Image ID="Image:0"><Pixels '
        'ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="8" SizeY="8" SizeC="2" SizeZ="1" '
        f'SizeT="1">{places}</Pixels></Image></OME>'
    )
    tifffile.imwrite(path, np.full((8, 8), 7, np.uint8), description=xml, metadata=None)


@pytest.mark.parametrize("other", ["other.tif", "../outside.tif", "missing", "{root}/outside.tif"])
@pytest.mark.parametrize("counts", ['IFD="0" PlaneCount="1"', ""])
@pytest.mark.parametrize("channels", [1, 2])
def test_files_that_a_tiff_names_are_not_opened(tmp_path, other, channels, counts):
    folder = tmp_path / "images"
    folder.mkdir()
    other = other.format(root=tmp_path)
    if other != "missing":  # a pipe of this name would be waited for
        tifffile.imwrite(folder / other, np.zeros((8, 8), np.uint8))
    ome_tiff(folder / "a.tif", other, counts)
    with (folder / "a.tif").open("rb") as file, watched() as events:
        try:
            values = read_values(file, PixelFormat(channels))
        except OSError as error:
            assert channels == 2
            assert "it has 1 channel" in str(error)
        else:
            assert values.unique().tolist() == [7]
    assert not [name for _, name in events if str(tmp_path) in os.path.realpath(name)]
