"""Hostile and broken input: command lines, weight files and images."""

import argparse
import copy
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import struct
import sys
import tarfile
import time
import traceback
import zipfile
import zlib
from collections import OrderedDict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import main_finetune
import main_knn
import main_linprobe
import main_pretrain
from scripts import export_encoder, prepare_dataset, visualize_reconstruction
from scripts.export import to_hugging_face
from tests.helpers.files import RunsCode, write_classes, write_images
from tests.helpers.models import crossmae_nano, use_nano_models
from tests.helpers.processes import ROOT, command, finish, start
from tests.helpers.runs import TINY, logging_restored, refusal, run
from util.arguments import Parser
from util.data.broken_images import reason_of
from util.data.decode import read_pixels, read_rgb
from util.data.transforms import pretrain_transform
from util.runs.checkpoint import list_checkpoints
from util.runs.epoch_log import read_log
from util.runs.run import run_main

pytestmark = pytest.mark.faults


# Command lines

NUMBERS = ["-1", "0", "-0.0", "0.5", "1.5", "nan", "inf", "-inf", "1e308", "1e-308", "0x10", "²"]
NUMBERS += [str(10**6), str(10**12), str(2**64), "9" * 400, "9" * 5000, "3", "99999"]
WORDS = ["", "x", "x" * 300, "a/" * 3000, "ünï", "a\nb", "-", "--", "missing/x", "0,0"]
WORDS += ["-1,2", "1,,2", "none", "auto", "all", "cuda:99", "cpu:-1", "meta", "hfds/", "torch/x"]
WORDS += ["wds/x", "FILE", "FILE/x", "EMPTY", "EMPTY/x", "IMAGES", "/dev/null", "/dev/zero"]
TRAINING = ["--data_path", "IMAGES", "--output_dir", "run", "--input_size", "16", "--epochs", "2"]
TRAINING += ["--num_workers", "0", "--amp", "fp32", "--batch_size", "8"]
CLASSIFIER = [*TRAINING, "--model", "vit_tiny_patch4"]
KNN = [*TRAINING[:4], *TRAINING[8:], "--finetune", "ENCODER"]
# Main, a valid command line, and the number of invalid ones derived from it.
PROGRAMS = {
    "pretrain": (main_pretrain.main, [*TRAINING, "--model", "crossmae_vit_tiny_patch4"], 60),
    "finetune": (main_finetune.main, CLASSIFIER, 60),
    "linprobe": (main_linprobe.main, CLASSIFIER, 30),
    "knn": (main_knn.main, KNN, 30),
    "export": (
        export_encoder.main,
        ["--checkpoint", "ENCODER", "--format", "hf", "--output", "run"],
        10,
    ),
    "visualize": (
        visualize_reconstruction.main,
        ["--checkpoint", "PRETRAINED", "--images", "IMAGES", "--output", "run.png"],
        10,
    ),
    "prepare": (
        prepare_dataset.main,
        ["--data_path", "IMAGES", "--output_dir", "run", "--num_workers", "0"],
        10,
    ),
}
# The parser accepts these; they fail later.
FITTING = {
    "pretrain": [
        "--decoder_depth 1000000",
        "--decoder_embed_dim 1000000000",
        "--decoder_num_heads 7",
        "--input_size 1000000",
        "--input_size 18",
        "--input_size 4 1000000000",
        "--mask_ratio 0.9999999999999999",
        "--pred_ratio 1e-300",
        "--feature_maps 0,99",
        "--feature_maps 0",
        "--mask_sampling grid --input_size 12",
        "--warmup_epochs 1e308",
        "--effective_batch_size 12",
        "--repeated_aug 3",
        "--resume FILE",
        "--resume EMPTY",
        "--output_dir FILE",
        "--log_dir FILE",
        "--data_path EMPTY",
        "--val_path FILE",
        "--decode gpu",
    ],
    "finetune": [
        "--input_size 1000000",
        "--input_size 18",
        "--finetune FILE",
        "--finetune EMPTY",
        "--auto_augment x",
        "--num_classes 1000000000",
        "--smoothing 1",
        "--eval",
    ],
    "linprobe": ["--input_size 1000000", "--finetune IMAGES"],
    "knn": ["--input_size 1000000", "--finetune FILE", "--output_dir FILE", "--num_classes 2"],
    "export": ["--output FILE", "--output missing/x", "--format mae", "--format onnx"],
    "visualize": ["--images FILE", "--images EMPTY", "--mask_ratio 0.99"],
    "prepare": ["--output_dir FILE", "--data_path EMPTY", "--output_dir missing/x"],
}


class TrainsError(Exception):
    """Raised when a command line is accepted."""


def trains(*_, **__):
    raise TrainsError


def content_of_a_checkpoint():
    return {
        "format": "crossmae-pretrain",
        "version": 1,
        "model_name": "crossmae_vit_tiny_patch4",
        "model_options": {"img_size": [16, 16], "decoder_depth": 2},
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "mask_ratio": 0.75,
        "mask_sampling": "random",
        "model": crossmae_nano(img_size=16).state_dict(),
    }


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Paths that replace the capital words of command lines; nothing is trained or prepared."""
    use_nano_models(monkeypatch)
    for main in (main_pretrain, main_finetune, main_linprobe):
        monkeypatch.setattr(main, "train_one_epoch", trains)
    monkeypatch.setattr(main_knn, "extract_features", trains)
    monkeypatch.setattr(prepare_dataset, "prepare", trains)
    monkeypatch.setattr(to_hugging_face, "write_folder", trains)
    monkeypatch.setattr(visualize_reconstruction, "draw_reconstructions", trains)
    paths = {name: tmp_path / "in" / name for name in ("IMAGES", "FILE", "EMPTY")}
    write_classes(paths["IMAGES"])
    paths["FILE"].write_text("mine")
    paths["EMPTY"].mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("ENCODER", "PRETRAINED"):
        paths[name] = tmp_path / "in" / f"{name}.pth"
        torch.save(content_of_a_checkpoint(), paths[name])
    return paths


def placed(words, places):
    for name, path in places.items():
        words = [word.replace(name, str(path)) for word in words]
    return words


def options_of(main, argv):
    """Names of a parser's options, without --compile, which takes long."""
    found = []

    def parse_args(parser, *args):
        found.extend(vars(super(Parser, parser).parse_args(*args)))
        raise TrainsError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainsError):
        patch.setattr(Parser, "parse_args", parse_args)
        run(*argv, main=main)
    return [f"--{name}" for name in found if name != "compile"]


def bad_words(rng, options):
    """A few options with values that are most likely invalid."""
    words = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        option = rng.choice(options)
        values = [
            rng.choice(rng.choice([NUMBERS, WORDS])) for _ in range(rng.choice([1] * 9 + [3]))
        ]
        words += rng.choice([[option[:-1], *values], [option]] + [[option, *values]] * 12)
    return words


def paths_in(folder):
    return {path: path.is_file() and path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize("name", PROGRAMS)
def test_wrong_command_lines_end_in_one_sentence_and_write_nothing(name, tmp_path, places, capsys):
    main, argv, wanted = PROGRAMS[name]
    argv = placed(argv, places)
    options = options_of(main, argv)
    with pytest.raises(TrainsError):  # unchanged, it works
        run(*argv, main=main)
    rng = random.Random(name)
    lines = [line.split() for line in FITTING[name]]
    refused, before, accepted = 0, paths_in(tmp_path / "in"), set()
    shutil.rmtree(tmp_path / "cwd")
    while refused < wanted + len(FITTING[name]):
        (tmp_path / "cwd").mkdir()
        os.chdir(tmp_path / "cwd")
        must_be_refused = bool(lines)
        words = placed(lines.pop() if lines else bad_words(rng, options), places)
        try:
            sentence = refusal(capsys, *argv, *words, main=main)
        except TrainsError:
            assert not must_be_refused, words
            accepted |= paths_in(tmp_path / "in").keys() - before.keys()  # such as --log_dir IMAGES
        except BaseException as error:
            raise AssertionError(f"{name} {[word[:60] for word in words]}") from error
        else:
            refused += 1
            assert len(sentence) > 10, words
            assert not any((tmp_path / "cwd").iterdir()), words
        shutil.rmtree(tmp_path / "cwd")
        now = paths_in(tmp_path / "in")
        assert {path: now[path] for path in now if path not in accepted} == before, words


@pytest.mark.parametrize(
    "words",
    [
        ["main_pretrain.py", "--decoder_depth", 10**6, "--dataset", "digits"],
        ["main_pretrain.py", "--num_workers", 10**6],
        ["main_finetune.py", "--data_path", ""],
        ["main_knn.py", "--finetune", "x" * 300],
    ],
    ids=lambda words: words[1],
)
def test_wrong_command_lines_end_a_process_with_one_sentence(tmp_path, words):
    code, out, err = finish(start(command(*words, "--output_dir", tmp_path / "run")))
    assert code == 2
    assert err.startswith(f"{words[0]}: error: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in out
    assert not (tmp_path / "run").exists()


# Weight files


class Call:
    """Object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def tensor_of(size, stride, offset=0):
    """Tensor over the bytes of four numbers, with any claimed shape."""
    storage = torch.ones(4).storage()
    arguments = (storage, offset, size, stride, False, OrderedDict())
    return Call(torch._utils._rebuild_tensor_v2, *arguments)


def nested(depth, make, content=1):
    for _ in range(depth):
        content = make(content)
    return content


def laughs():
    """Thirty lists, each contained ten times in the next ("billion laughs")."""
    return nested(30, lambda content: [content] * 10)


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def archive(pickled, compression=zipfile.ZIP_STORED, change=lambda file: None, **records):
    """File like torch.save's around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as file:
        records = {"data.pkl": pickled, "byteorder": b"little", **records, "version": b"3\n"}
        for name, content in records.items():
            file.writestr(f"archive/{name}", content)
        change(file)
    return buffer.getvalue()


def overlap(file):
    """Make the archive's directory list a thousand records at the position of one."""
    for number in range(1000):
        twin = copy.copy(file.getinfo("archive/data/0"))
        twin.filename = f"archive/data/{number + 1}"
        file.filelist.append(twin)


def lie(file):
    """Make the archive's directory claim records of two gigabytes."""
    for record in file.filelist:
        record.file_size = record.compress_size = 2**31 - 1


def legacy(pickled):
    """File in torch.save's old format around a pickle."""
    first = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    return b"".join([*(pickle.dumps(x, 2) for x in first), pickled, pickle.dumps([], 2)])


def tarred(pickled):
    """File in torch.save's oldest format."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        parts = {"storages": pickle.dumps(0, 2), "tensors": pickle.dumps(0, 2), "pickle": pickled}
        for name, content in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def opcodes(module, name, argument):
    """Pickle that calls a module's function by its name."""
    word = argument.encode()
    call = b"c%b\n%b\n" % (module.encode(), name.encode())
    return b"\x80\x02" + call + b"X" + struct.pack("<I", len(word)) + word + b"\x85R."


def safetensors_file(header, num_bytes=64, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(num_bytes)


def entry(shape, offsets, dtype="F32"):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


CALLS = [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec")]
CALLS += [("builtins", "getattr"), ("builtins", "__import__"), ("__builtin__", "eval")]
CALLS += [
    ("subprocess", "getoutput"),
    ("runpy", "run_path"),
    ("torch", "load"),
    ("shutil", "rmtree"),
]
CALLS += [("torch.hub", "load"), ("torch.serialization", "os.system"), ("argparse", "_os.system")]
CALLS += [("torch._utils", "_import_dotted_name"), ("collections", "OrderedDict.fromkeys")]
CALLS += [("torch.storage", "_load_from_bytes"), ("numpy.core.multiarray", "_reconstruct")]


def attacks(marker):
    """Files by name, each harmful in one way, which every reader must refuse."""
    good = content_of_a_checkpoint()
    evil = RunsCode(marker)
    command = f"__import__('os').mkdir({str(marker)!r})"
    files = {}
    contents = {
        "code in the weights": {**good, "model": evil},
        "code deep inside": {**good, "extra": nested(50, lambda x: [{"x": (x,)}], evil)},
        "code in the arguments": {**good, "args": argparse.Namespace(x=evil)},
        "code in a key": {**good, "extra": {("x", Call(os.mkdir, str(marker))): 1}},
        "code in a class": {**good, "extra": Call(getattr, "x", "__class__")},
    }
    for name, content in contents.items():
        files[f"{name}, zip.pth"] = saved(content)
        files[f"{name}, legacy.pth"] = saved(content, _use_new_zipfile_serialization=False)
        pickled = pickle.dumps({"x": evil}, 2)
        files[f"{name}, tar.pth"] = tarred(pickled)
    for module, name in CALLS:
        pickled = opcodes(module, name, command if name == "eval" else f"mkdir '{marker}'")
        for make in (archive, legacy):
            files[f"{module}.{name}, {make.__name__}.pth"] = make(pickled)
    files["protocol 4.pth"] = archive(pickle.dumps({"x": evil}, 4))

    state = good["model"]
    bad_tensors = {
        "stride 0": tensor_of((1, 2**40), (0, 0)),
        "stride 0 of 8 GB": tensor_of((1, 2**31), (0, 0)),
        "beyond the storage": tensor_of((2**33,), (1,)),
        "offset beyond the storage": tensor_of((2,), (1,), 2**40),
        "negative offset": tensor_of((2,), (1,), -8),
        "negative size": tensor_of((-4,), (1,)),
        "negative stride": tensor_of((2,), (-1,)),
        "overflowing size": tensor_of((2**62, 2**62), (0, 0)),
        "a size of text": tensor_of(("a",), (1,)),
        "sparse": torch.sparse_coo_tensor([[0]], [1.0], (2**40,)),
        "meta": torch.empty(2**40, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "bytes out of a number": Call(bytearray, 2**33),
        "laughs": laughs(),
    }
    for name, tensor in bad_tensors.items():
        content = {**good, "model": {**state, "encoder.cls_token": tensor}}
        files[f"{name}, zip.pth"] = saved(content)
        if name not in ("meta", "sparse"):
            files[f"{name}, legacy.pth"] = saved(content, _use_new_zipfile_serialization=False)
    lying = saved({"x": torch.ones(4)}).replace(b"K\x04t", b"K\xfft")
    files["a storage larger than its record.pth"] = lying
    deep = b"\x80\x02}X\x01\0\0\0a" + b"]" * 100_000 + b"a" * 99_999 + b"s."
    key = b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s."
    for make in (archive, legacy):
        files[f"a list in a list in a list, {make.__name__}.pth"] = make(deep)
        files[f"a tuple in a tuple in a tuple, {make.__name__}.pth"] = make(key)
    files["very many lists.pth"] = archive(b"\x80\x02](" + b"]" * 2**24 + b"e.")

    good_pickle = pickle.dumps({"model": {}}, 2)
    zeros = dict.fromkeys((f"data/{number}" for number in range(8)), bytes(2**27))
    files["compressed.pth"] = archive(good_pickle, zipfile.ZIP_DEFLATED, **zeros)
    files["compressed pickle.pth"] = archive(good_pickle + zeros["data/0"], zipfile.ZIP_BZIP2)
    files["many records.pth"] = archive(b"", change=overlap, **{"data/0": b""})
    megabyte = {"data/0": bytes(2**20)}
    files["overlapping records.pth"] = archive(good_pickle, change=overlap, **megabyte)
    files["lying directory.pth"] = archive(good_pickle, change=lie, **megabyte)
    files["a directory elsewhere.pth"] = archive(good_pickle).replace(b"PK\1\2", b"PK\1\3")

    safe = {
        "a header of exabytes": safetensors_file(entry([4], [0, 16]), length=2**63),
        "a header of gigabytes": safetensors_file(entry([4], [0, 16]), length=2**33),
        "a header without end": safetensors_file(b"{" + b" " * 2**20),
        "a deep header": safetensors_file(b'{"w":' + b"[" * 100_000),
        "offsets outside": safetensors_file(entry([16], [64, 128])),
        "offsets backwards": safetensors_file(entry([4], [16, 0])),
        "a shape too large": safetensors_file(entry([2**40], [0, 64])),
        "an overflowing shape": safetensors_file(entry([2**40, 2**40], [0, 64])),
        "a negative shape": safetensors_file(entry([-16], [0, 64])),
        "an unknown type": safetensors_file(entry([16], [0, 64], "F33")),
        "overlapping tensors": safetensors_file(
            {**entry([16], [0, 64]), "v": entry([16], [0, 64])["w"]}
        ),
        "a block far away": safetensors.torch.save(
            {
                "patch_embed.proj.weight": torch.ones(4),
                "blocks.1000000000.norm1.weight": torch.ones(4),
            }
        ),
    }
    files |= {f"{name}.safetensors": content for name, content in safe.items()}
    files["a block far away.pth"] = saved(
        {**good, "model": {**state, "encoder.blocks.9999999999.norm1.bias": torch.ones(32)}}
    )
    files["a decoder block far away.pth"] = saved(
        {"patch_embed.proj.weight": torch.ones(32, 3, 4, 4), "decoder_blocks.9999999999.x": 1}
    )
    return files


def readers(path, folder):
    """Every way to read a weights file, by name: main and command line."""
    out = ["--output_dir", folder / "out"]
    train = [*TINY, "--data_path", folder / "IMAGES"]
    probe = [*train[6:], "--epochs", 1, "--finetune", path, *out]
    export = ["--checkpoint", path, "--output", folder / "out", "--format"]
    auto = folder / "auto"
    shutil.rmtree(auto, ignore_errors=True)
    auto.mkdir()
    if not str(path).endswith(".safetensors"):
        (auto / "checkpoint-e0001-s000000.pth").symlink_to(path)
    named = {
        "--resume PATH": (main_pretrain.main, [*train, *out, "--resume", path]),
        "--resume auto": (main_pretrain.main, [*train, "--output_dir", auto]),
        "finetune": (main_finetune.main, probe),
        "finetune --eval": (main_finetune.main, [*probe, "--eval"]),
        "linprobe": (main_linprobe.main, probe),
        "knn": (main_knn.main, [*KNN[4:8], "--data_path", folder / "IMAGES", *probe[-4:]]),
        "export hf": (export_encoder.main, [*export, "hf"]),
        "export safetensors": (
            export_encoder.main,
            [*export[:3], folder / "out.safetensors", "--format", "safetensors"],
        ),
        "visualize": (
            visualize_reconstruction.main,
            ["--checkpoint", path, "--images", folder / "IMAGES", "--output", folder / "out.png"],
        ),
    }
    if path.suffix == ".safetensors":
        del named["--resume auto"]
    return named


def peak_memory():
    """Peak memory of this process in MiB; getrusage's starts with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def report_of_child(function, folder, *words):
    """Run a function of this file in a separate process, which may crash; return its result."""
    source = (
        "import json, sys, pathlib, test_faults_inputs as tests\n"
        "function, folder, *words = sys.argv[1:]\n"
        "print(json.dumps(getattr(tests, function)(pathlib.Path(folder), *words)))"
    )
    words = [sys.executable, "-W", "ignore", "-c", source, function, str(folder), *words]
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    code, out, err = finish(start(words, PYTHONPATH=paths))
    assert code == 0, out[-1000:] + err[-3000:]
    return json.loads(out.splitlines()[-1])


def read_all(folder, *only):
    """Read every file in a folder in these ways, or all; report how each ended. For a child."""
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)  # protects the machine
    torch.set_num_threads(1)
    report = {"memory before": peak_memory(), "ends": []}
    with pytest.MonkeyPatch.context() as patch:
        use_nano_models(patch)
        for path in sorted((folder / "files").iterdir()):
            for reader, (main, argv) in readers(path, folder).items():
                if only and reader not in only:
                    continue
                err, before, began = io.StringIO(), peak_memory(), time.monotonic()
                code = 0
                with redirect_stderr(err), redirect_stdout(io.StringIO()), logging_restored():
                    try:
                        run_main(lambda main=main, argv=argv: main([str(word) for word in argv]))
                    except SystemExit as ended:
                        code = ended.code
                    except BaseException:
                        code = traceback.format_exc()
                end = {"file": path.name, "reader": reader, "code": code, "stderr": err.getvalue()}
                end["memory"] = peak_memory() - before
                end["seconds"] = time.monotonic() - began
                report["ends"].append(end)
                for name in ("out", "out.safetensors", "out.png"):
                    path_out = folder / name
                    if path_out.is_dir():
                        shutil.rmtree(path_out)
                    path_out.unlink(missing_ok=True)
    report["memory after"] = peak_memory()
    return report


def report_of(folder, files, *only):
    """Result of `read_all` in a separate process, which may crash."""
    write_classes(folder / "IMAGES")
    (folder / "files").mkdir()
    for name, content in files.items():
        (folder / "files" / name).write_bytes(content)
    report = report_of_child("read_all", folder, *only)
    for end in report["ends"]:
        assert end["code"] in (0, 1, 2), end
        assert end["stderr"].count("\n") == (end["code"] > 0), end
    growth = report["memory after"] - report["memory before"]
    assert growth < 1024, max(report["ends"], key=lambda end: end["memory"])
    assert report["memory after"] < 1536
    return report["ends"]


def test_hostile_weight_files_are_refused_by_every_reader(tmp_path):
    files = attacks(tmp_path / "marker")
    ends = report_of(tmp_path, files)
    assert {end["file"] for end in ends} == files.keys()
    assert [end for end in ends if end["code"] != 2] == []
    assert not (tmp_path / "marker").exists()


def test_the_file_they_are_made_from_is_read(tmp_path):
    ends = report_of(tmp_path, {"good.pth": saved(content_of_a_checkpoint())})
    reads = {end["reader"] for end in ends if end["code"] == 0}
    assert reads == {"finetune", "linprobe", "knn", "export hf", "export safetensors", "visualize"}


def values_in(content, place=()):
    """Paths of a checkpoint's values, of only two values per large collection."""
    yield place
    if isinstance(content, dict):
        for key in list(content)[:: max(1, len(content) // 14)]:
            yield from values_in(content[key], (*place, key))
    elif isinstance(content, list) and content:
        yield from values_in(content[0], (*place, 0))


WRONG = [None, "x", -1, 10**9, 10**30, 1.5, float("nan"), [], {}, [[1]], {"x": 1}, torch.ones(2)]
WRONG += [torch.ones(2, 3, 4, 5), b"x", True]


def changed(content, place, value):
    content = copy.deepcopy(content)
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    parent[place[-1]] = value
    return content


def deceits(content, rng, count):
    """Checkpoints with one value replaced by one of another type, by name."""
    places = [place for place in values_in(content) if place]
    files = {}
    while len(files) < count:
        place, value = rng.choice(places), rng.choice(WRONG)
        name = f"{'.'.join(map(str, place))} = {value!r}".replace("/", "_").replace("\n", " ")
        files[f"{name[:120]}.pth"] = saved(changed(content, place, value))
    return files


def test_checkpoints_with_absurd_settings_are_refused(tmp_path):
    content = content_of_a_checkpoint()
    absurd = {
        "decoder_depth": [10**9, 999, -1, 0, "2", 2.0, None, [2]],
        "img_size": [10**6, [10**6, 10**6], [16, 10**9], [-16, -16], 0, [16], "16"],
        "decoder_embed_dim": [10**9, 2**14, -4, 0, "32"],
        "decoder_num_heads": [10**9, 0, -2],
        "in_chans": [10**9, 0, -3],
        "feature_maps": [[10**9], [0] * 9, "some", 3],
        "unknown": [1],
    }
    files = {
        f"{name} {value}.pth": saved(changed(content, ("model_options", name), value))
        for name, values in absurd.items()
        for value in values
    }
    ends = report_of(tmp_path, files, "visualize", "export hf")
    read = [end["file"] for end in ends if end["reader"] == "visualize" and end["code"] != 2]
    assert read == []


def test_checkpoints_with_a_wrong_value_anywhere_end_without_a_traceback(tmp_path):
    files = deceits(content_of_a_checkpoint(), random.Random(0), 60)
    report_of(tmp_path, files, "visualize", "finetune", "export hf")


def test_runs_with_a_wrong_value_anywhere_end_without_a_traceback(tmp_path, monkeypatch):
    use_nano_models(monkeypatch)
    write_classes(tmp_path / "IMAGES")
    argv = [*TINY, "--data_path", tmp_path / "IMAGES", "--output_dir", tmp_path / "run"]
    run(*argv, "--save_every", 1)
    content = torch.load(list_checkpoints(tmp_path / "run")[0], weights_only=True)
    content = {key: value for key, value in content.items() if key not in ("args", "versions")}
    files = deceits(content, random.Random(0), 80)
    ends = report_of(tmp_path / "all", {**files, "good.pth": saved(content)}, "--resume PATH")
    (good,) = (end for end in ends if end["file"] == "good.pth")
    assert good["code"] == 0, good
    assert sum(end["code"] == 2 for end in ends) > 40


# Images


def test_a_run_survives_broken_images_and_logs_each_once(tmp_path, capsys, monkeypatch):
    use_nano_models(monkeypatch)
    folder = write_images(tmp_path / "images", 100)
    files = sorted(folder.iterdir())
    names = [b"empty.png", b"\xff cut.png", b"text.jpg", b"large.png", b"huge.jpg"]
    contents = [b"", files[0].read_bytes()[:300], b"no image", png(100_000, 100_000)]
    contents.append(jpeg(20_000, 20_000))
    for path, name, content in zip(files[::20], names, contents, strict=True):
        path.with_name(path.stem + os.fsdecode(name)).write_bytes(content)
        path.unlink()
    argv = [*TINY, "--data_path", folder, "--val_fraction", 0, "--num_workers", 2, "--output_dir"]
    sentence = refusal(capsys, *argv, tmp_path / "refused")
    assert "of 100 images" in sentence
    assert "--max_broken" in sentence

    run(*argv, tmp_path / "run", "--max_broken", 0.1)
    out = capsys.readouterr().out
    log = read_log(tmp_path / "run")
    assert [line["broken_images"] for line in log] == [5, 5]
    warnings = [line for line in out.splitlines() if "Broken image, replaced" in line]
    assert len(warnings) == 5
    for name in names:
        shown = os.fsdecode(name).encode(errors="backslashreplace").decode()
        assert sum(shown in line for line in warnings) == 1
    assert "400000000 pixels" in out
    assert out.count("resize it") == 2


def png(width, height):
    """PNG without pixels, with any claimed size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
    parts = [b"\x89PNG\r\n\x1a\n", struct.pack(">I", 13), header]
    return b"".join([*parts, struct.pack(">I", zlib.crc32(header)), end])


def jpeg(width, height):
    """Small JPEG whose header claims another size."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    start_of_frame = data.index(b"\xff\xc0")
    data[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def large_png(side):
    """Complete gray PNG of this size, written row by row."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    rows = [packer.compress(bytes((side + 1) * 500)) for _ in range(side // 500)]
    pixels = b"IDAT" + b"".join(rows) + packer.flush()
    chunks = [header, pixels, b"IEND"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def read_images(folder):
    """Read every file in a folder in every way; report errors and memory. For a child."""
    before = peak_memory()
    on_device = pretrain_transform((8, 8), [0.5] * 3, [0.5] * 3, decode="gpu").read
    reasons = {
        path.name: [reason_for_which(read, path) for read in (read_rgb, read_pixels, on_device)]
        for path in sorted(folder.iterdir())
    }
    return {"reasons": reasons, "memory": peak_memory() - before}


def reason_for_which(read, path):
    """Return the error with which a function refuses an image."""
    with pytest.raises(Exception) as caught:
        read(path.open("rb"))
    return reason_of(caught.value)


def test_images_too_large_are_refused_before_they_are_decoded(tmp_path):
    contents = {
        "whole.png": large_png(20_000),
        "header.png": png(100_000, 100_000),
        "header.jpg": jpeg(65_500, 65_500),
        "smaller.jpg": jpeg(20_000, 20_000),
        "narrow.jpg": jpeg(3_000, 65_500),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    report = report_of_child("read_images", tmp_path)
    assert report["reasons"].keys() == contents.keys()
    for name, reasons in report["reasons"].items():
        assert len(reasons) == 3, name
        assert all("pixels: resize it" in reason for reason in reasons), reasons
    assert report["memory"] < 100
