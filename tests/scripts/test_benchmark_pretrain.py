import dataclasses
import functools
import importlib.util
import json
import sys
import time
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from scripts.benchmark.against import ROW, compare_pairs
from scripts.benchmark.step import MeasuredStep, measure_interleaved, time_calls
from scripts.benchmark.tables import follow_flops
from scripts.benchmark_pretrain import (
    THEIR_MODELS,
    Config,
    build_hf,
    build_ours,
    build_steps,
    main,
)
from tests.helpers.models import crossmae_nano, use_nano_models
from tests.helpers.operations import counted
from tests.helpers.runs import refusal, run
from util.compute.memory import saved_bytes
from util.compute.precision import Precision
from util.compute.recompute import set_memory
from util.masking import TokenCounts, random_split
from util.optim import build_adamw
from util.settings.compute import MEMORY_MODES

benchmark = functools.partial(run, main=main)
refuse = functools.partial(refusal, main=main)
QUICK = ["--quick", "--device", "cpu", "--dtypes", "fp32"]
MEASURED = [
    "round_step_s",
    "first_step_s",
    "median_step_s",
    "ms_per_image",
    "images_per_s",
    "spread_percent",
]
MEASURED += ["utilization_percent", "saved_mb_per_image", "saved_slope_mb_per_image"]
MEASURED += ["encoder_gflops", "decoder_gflops", "total_gflops"]


def tables(text):
    """Parse Markdown tables into lists of rows, each a dict by title."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        if lines:
            titles, rule, *rows = ([c.strip() for c in line.split("|")[1:-1]] for line in lines)
            assert set(rule) == {"---"}
            found.append([dict(zip(titles, row, strict=True)) for row in rows])
    return found


# Measurements


class Mlp(torch.nn.Module):
    """MLP 8 -> 16 -> 4; `recomputed` saves its input and the outputs of `cached` operations."""

    def __init__(self, recomputed, cached=()):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        self.recomputed = recomputed
        self.contexts = functools.partial(create_selective_checkpoint_contexts, list(cached))

    def inside(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

    def forward(self, x):
        if self.recomputed:
            how = {"preserve_rng_state": False, "context_fn": self.contexts}
            return checkpoint(self.inside, x, use_reentrant=False, **how).sum()
        return self.inside(x).sum()


INPUT, HIDDEN = 10 * 8 * 4, 10 * 16 * 4  # bytes of ten float32 rows


@pytest.mark.parametrize(("recomputed", "expected"), [(False, INPUT + 2 * HIDDEN), (True, INPUT)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_saved_bytes_are_input_and_both_sides_of_the_gelu(recomputed, expected, requires_grad):
    model, x = Mlp(recomputed), torch.randn(10, 8, requires_grad=requires_grad)
    assert saved_bytes(lambda: model(x), model.parameters()) == expected


def test_what_selective_checkpointing_caches_is_saved_too():
    model, x = Mlp(True, cached=[torch.ops.aten.addmm.default]), torch.randn(10, 8)
    expected = INPUT + HIDDEN + 10 * 4 * 4  # both layers' outputs
    assert saved_bytes(lambda: model(x), model.parameters()) == expected


def test_tensors_passed_to_checkpointing_in_a_list_are_saved_too():
    x = torch.randn(10, 8, requires_grad=True)

    def run():
        parts = [x.exp(), x + 1]  # the sum is not an input
        return checkpoint(lambda both: both[0] * both[1], parts, use_reentrant=False).sum()

    assert saved_bytes(run, [x]) >= 2 * INPUT


def test_copies_of_weights_in_bf16_are_saved_too():
    model, x = Mlp(False), torch.randn(10, 8)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_bytes(lambda: model(x), model.parameters())
    # The first weight is not: x needs no gradient.
    assert saved == (INPUT + 2 * HIDDEN) // 2 + 16 * 4 * 2


def test_a_storage_counts_once_and_whole():
    x = torch.randn(100, requires_grad=True)
    y = x.exp()  # saved by exp and by the square of its slice
    assert saved_bytes(lambda: x.exp().square().sum(), [x]) == 400
    assert saved_bytes(lambda: y.detach()[:10].requires_grad_().square().sum(), []) == 400


def test_onednn_tensors_count():
    x = torch.randn(10, 8).to_mkldnn().requires_grad_()
    assert x.is_mkldnn
    assert saved_bytes(lambda: torch.relu(x), []) == INPUT


def measured(model, images, **options):
    optimizer = build_adamw(model, weight_decay=0.0, betas=(0.9, 0.95))
    precision = Precision(options.pop("amp", "fp32"), images.device)
    step = MeasuredStep(model, optimizer, precision, images, **options)
    step.prepare(warmup=1)
    return step


def test_the_slope_leaves_out_what_does_not_grow_with_the_batch():
    step = measured(Mlp(False), torch.randn(10, 8), amp="bf16")
    per_row = 2 * (8 + 2 * 16)
    assert step.saved_slope == per_row
    assert step.saved == 10 * per_row + 16 * 4 * 2  # the copy of a weight


class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = crossmae_nano()

    def forward(self, images):
        return self.model(images, random_split(torch.rand(len(images), 16), TokenCounts(16, 4, 8)))


def test_less_memory_means_fewer_saved_bytes_also_with_a_shared_model():
    model, images = Loss(), torch.randn(2, 3, 16, 16)
    parts = model.model.blocks, model.model.mixer
    turns = [functools.partial(set_memory, *parts, memory) for memory in MEMORY_MODES]
    steps = [measured(model, images, before_turn=turn) for turn in turns]
    for step in steps:
        step.take_turn(1)
    saved = [step.saved for step in steps]
    assert saved == sorted(saved, reverse=True)
    assert saved[-1] < saved[0] / 2
    assert all(step.saved_slope > 0 for step in steps)


def test_a_step_trains():
    model, images = Mlp(False), torch.randn(10, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = MeasuredStep(model, optimizer, Precision("fp32", torch.device("cpu")), images)
    before = model(images).item()
    step.take_turn(2)
    assert model(images).item() < before
    assert model.fc1.weight.grad is None
    assert len(step.seconds) == 1


class Greedy(torch.nn.Module):
    """Model that allocates too much memory for batches of `limit` images or more."""

    def __init__(self, limit):
        super().__init__()
        self.fc, self.limit = torch.nn.Linear(8, 1), limit

    def forward(self, x):
        if len(x) >= self.limit:
            torch.empty(2**55)
        return self.fc(x).mean()


@pytest.mark.faults
def test_running_out_of_memory_ends_a_row_and_a_larger_batch_only_its_slope():
    images = torch.randn(4, 8)
    failed, good = measured(Greedy(4), images), measured(Greedy(8), images)
    failed.take_turn(1)
    good.take_turn(1)
    assert failed.out_of_memory and not failed.seconds
    assert not good.out_of_memory and good.saved > 0 and good.saved_slope is None


@pytest.mark.faults
def test_another_error_is_not_mistaken_for_out_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        measured(Greedy(9), torch.randn(4, 7))


def test_calls_are_timed_one_by_one():
    calls = []
    assert len(time_calls(lambda: calls.append(0), 3, torch.device("cpu"))) == 3
    assert len(calls) == 3


def test_rows_are_interleaved(monkeypatch):
    turns = []

    class Recorded(MeasuredStep):
        def take_turn(self, steps):
            turns.append((self, steps))

    def small_matmul(device, dtype):
        a = torch.ones(4, 4, dtype=dtype)
        return lambda: a @ a, 2 * 4**3

    monkeypatch.setattr("scripts.benchmark.step.build_matmul", small_matmul)
    cpu, model = torch.device("cpu"), Mlp(False)
    optimizer = build_adamw(model, weight_decay=0.0, betas=(0.9, 0.95))
    first, second = (
        Recorded(model, optimizer, Precision(amp, cpu), torch.randn(2, 8))
        for amp in ("fp32", "bf16")
    )
    found = measure_interleaved([first, second], cpu, warmup=0, rounds=3, num_steps=5)
    for done, rates in enumerate(found, start=1):
        assert turns == ([(first, 5), (second, 5)] * 3)[:done]
        assert rates.keys() == {"fp32", "bf16"}
    assert done == 6


def test_a_model_compiles_once_and_in_its_first_step():
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")

    def compile_slowly(*graph):
        time.sleep(0.2)
        return backend(*graph)

    model = Mlp(False)
    model.compile(dynamic=False, backend=compile_slowly)
    optimizer = build_adamw(model, weight_decay=0.0, betas=(0.9, 0.95))
    precision = Precision("fp32", torch.device("cpu"), attention_backend="math")
    images = torch.randn(10, 8)
    step = MeasuredStep(model, optimizer, precision, images, compiled=True)
    step.prepare(warmup=2)
    step.take_turn(2)
    assert backend.frame_count == 1
    assert step.first > 0.2 > step.seconds[0]
    assert step.saved > 0 and step.saved_slope is None


def test_models_are_built_on_the_device(monkeypatch):
    devices = []

    def build(config):
        devices.append(torch.empty(()).device)
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr("scripts.benchmark_pretrain.build_ours", build)
    meta = torch.device("meta")
    build_steps([GIANT], meta, backend="auto", compiled=None)
    assert devices == [meta]


def test_time_follows_flops_is_relative_to_the_first_row_of_a_kind():
    kind = {"model": "m", "dtype": "bf16", "input_size": 16, "out_of_memory": False}
    rows = [
        {**kind, "memory": memory, "label": "", "ms_per_image": ms, "total_gflops": flops}
        for memory, ms, flops in [("high", 10, 4), ("high", 6, 2), ("low", 20, 4)]
    ]
    rows.insert(1, {**rows[0], "out_of_memory": True, "ms_per_image": None})
    found = [(row["time"], row["flops"], row["deviation"]) for row in follow_flops(rows)]
    assert found == [(1, 1, 0), (0.6, 0.5, pytest.approx(20)), (1, 1, 0)]


# The script


@pytest.mark.slow
def test_quick_from_end_to_end(tmp_path, monkeypatch, capsys):
    use_nano_models(monkeypatch)
    path = tmp_path / "numbers.json"
    memory = ["--memory", "high", "low"]
    benchmark(*QUICK, "--table", "4", *memory, "--json", path)
    rows, follows = tables(capsys.readouterr().out)
    assert [(row["model"], row["(ratio, blocks)"], row["memory"]) for row in rows] == [
        ("mae_vit_tiny_patch4", "(0.75, 8)", "high"),
        ("mae_vit_tiny_patch4", "(0.75, 8)", "low"),
        ("crossmae_vit_tiny_patch4", "(0.75, 12)", "high"),
        ("crossmae_vit_tiny_patch4", "(0.75, 12)", "low"),
        ("crossmae_vit_tiny_patch4", "(0.25, 12)", "high"),
        ("crossmae_vit_tiny_patch4", "(0.25, 12)", "low"),
    ]
    assert [row["deviation %"] for row in follows[:4]] == ["0.000"] * 4
    numbers = json.loads(path.read_text())
    assert numbers["machine"].keys() >= {"cpu", "gpu", "cores", "threads", "torch", "cuda"}
    assert numbers["machine"].keys() >= {"commit", "command", "date", "clock"}
    assert numbers["matmul_gflops_per_s"]["fp32"] > 0
    for row, line in zip(numbers["rows"], rows, strict=True):
        assert all(row[key] for key in MEASURED), row
        assert row["peak_memory_mb"] is None and line["peak MiB"] == "n/a"
        assert row["ms_per_image"] == pytest.approx(float(line["ms/image"]), rel=1e-3)
        assert row["saved_mb_per_image"] >= row["saved_slope_mb_per_image"] > 0
        assert len(row["round_step_s"]) == 2
    high, low = numbers["rows"][-2:]
    assert low["saved_slope_mb_per_image"] < high["saved_slope_mb_per_image"]


@pytest.mark.faults
@pytest.mark.parametrize(("done", "turns"), [(1, [1]), (7, [3, 2, 2])])
def test_a_benchmark_that_is_stopped_keeps_the_turns_it_has_measured(
    done, turns, tmp_path, monkeypatch
):
    use_nano_models(monkeypatch)
    path = tmp_path / "numbers.json"
    path.write_text("{}")
    take_turn, taken = MeasuredStep.take_turn, []

    def stop_or_measure(step, steps):
        if len(taken) == done:
            raise KeyboardInterrupt
        take_turn(step, steps)
        taken.append(step)

    monkeypatch.setattr(MeasuredStep, "take_turn", stop_or_measure)
    with pytest.raises(KeyboardInterrupt):
        benchmark(*QUICK, "--table", 4, "--rounds", 4, "--json", path)
    numbers = json.loads(path.read_text())
    assert [len(row["round_step_s"]) for row in numbers["rows"]] == turns
    assert len(numbers["time_follows_flops"]) == len(turns)
    assert all(row[key] is not None for row in numbers["rows"] for key in MEASURED)
    earlier = [file.read_text() for file in tmp_path.iterdir() if file != path]
    assert earlier == ["{}"]  # the earlier start's file is kept, this one's are replaced


@pytest.mark.parametrize("name", ["softmax", "exp", "layer_norm"])
def test_what_was_counted_is_freed(name):
    functions = {"softmax": lambda x: x.softmax(-1), "exp": torch.exp}
    function = functions.get(name, lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]))
    x = torch.randn(10, 10, requires_grad=True)
    results = []

    def forward():
        result = function(x * 1)
        results.append(weakref.ref(result))
        return result.sum()

    saved_bytes(forward, [x])
    assert results[0]() is None


def test_batch_sizes_are_rows(tmp_path, monkeypatch, capsys):
    use_nano_models(monkeypatch)
    benchmark(*QUICK, "--batch_size", 1, 3, "--rounds", 1)
    rows, _ = tables(capsys.readouterr().out)
    assert [row["batch"] for row in rows] == ["1", "3"]


@pytest.mark.slow
def test_a_profile_lists_what_each_row_computes(tmp_path, monkeypatch):
    use_nano_models(monkeypatch)
    path, profile = tmp_path / "numbers.json", tmp_path / "kernels.txt"
    profile.write_text("what was there before\n")
    benchmark(*QUICK, "--table", 4, "--rounds", 1, "--json", path, "--profile", profile)
    text = profile.read_text()
    assert text.startswith("what was there before\nmae_vit_tiny_patch4 (0.75, 8), 16 px, 2 images")
    for row in json.loads(path.read_text())["rows"]:
        assert f"{row['model']} {row['label']}, 16 px" in text
        kernels = row["kernels"]
        assert len(kernels) == 25
        assert [k["ms"] for k in kernels] == sorted((k["ms"] for k in kernels), reverse=True)
        assert "aten::addmm" in {kernel["name"] for kernel in kernels}
        assert all(kernel["calls"] > 0 for kernel in kernels)
    tables_of_rows = text.split("\n\n")[:3]
    assert [len(table.splitlines()) for table in tables_of_rows] == [43, 42, 42]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "num_rows"), [(["--table", 5], 7), (["--table", 18], 3), (["--figure", 7], 13)]
)
def test_every_table_of_the_paper_has_its_rows(flags, num_rows, tmp_path, monkeypatch, capsys):
    use_nano_models(monkeypatch)
    path = tmp_path / "numbers.json"
    benchmark(*QUICK, *flags, "--json", path, "--rounds", 1)
    rows, _ = tables(capsys.readouterr().out)
    assert len(rows) == num_rows
    if flags == ["--table", 5]:
        parts = [row["variant"] for row in json.loads(path.read_text())["rows"]]
        assert parts[1:4] == ['{"decoder_self_attention": true}', '{"feature_maps": "last"}', "{}"]
    if flags == ["--table", 18]:
        assert [row["batch"] for row in rows] == ["2", "1", "2"]


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_the_mae_of_transformers_is_a_row(capsys):
    grid = ["--models", "hf_vitmae_tiny", "mae_vit_tiny_patch16", "--input_sizes", 32]
    benchmark(*QUICK, *grid, "--decoder_depths", 1, "--memory", "low", "--rounds", 1)
    (theirs, ours), _ = tables(capsys.readouterr().out)
    assert theirs["model"] == "hf_vitmae_tiny"
    assert (theirs["memory"], ours["memory"]) == ("high", "low")
    assert theirs["total"] == ours["total"]


GIANT = Config("mae_vit_giant_patch14", None, 8, 224, "fp32", "high", 2, 0.75)


@pytest.mark.parametrize("name", ["mae_vit_giant_patch14", "crossmae_vit_giant_patch14"])
def test_flops_of_vit_g_are_what_pytorch_counts(name):
    config = dataclasses.replace(GIANT, model=name)
    with torch.device("meta"):
        model = build_ours(config)
    assert counted(model, config.count_tokens())[1] == config.count_flops()


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="needs transformers")
def test_the_vit_g_of_transformers_has_the_size_of_ours():
    with torch.device("meta"):
        ours = build_ours(GIANT)
        theirs = build_hf(dataclasses.replace(GIANT, model="hf_vitmae_giant"))
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (ours, theirs))
    assert theirs == ours


@pytest.mark.slow
def test_a_plot_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    use_nano_models(monkeypatch)
    benchmark(*QUICK, "--table", 4, "--plot", tmp_path / "figure.png", "--rounds", 1)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


NO_SUCH = "/does/not/exist"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--table", 4, "--models", "mae_vit_base_patch16"], "without --models"),
        (["--table", 4, "--figure", 7], "--table and --figure"),
        (["--table", 3], "invalid choice"),
        (["--models", "vit"], "invalid choice"),
        (["--pred_ratios", 0.8], "only masked patches"),
        (["--input_sizes", 18], "is not a multiple of"),
        (["--json", f"{NO_SUCH}/a.json"], "does not exist: create it"),
        (["--device", "meta"], "--device meta"),
        (["--compile", "--decoder_depths", *range(1, 18)], "at most 16 rows"),
        (["--against", NO_SUCH], "program not found"),
        (["--table", 4, "--against", __file__], "cannot be combined with"),
        (["--profile", "a.txt", "--against", __file__], "cannot be combined with"),
        (["--profile", f"{NO_SUCH}/a.txt"], "does not exist: create it"),
        (["--against_dtype", "fp16"], "needs --against"),
        (["--quick", "--against", __file__], "needs --models"),
        (["--models", "mae_vit_base_patch16", "--against", __file__], "needs --models from"),
    ],
)
def test_refusals(capsys, flags, words):
    assert words in refuse(capsys, "--quick", *flags)


@pytest.mark.parametrize(
    ("package", "flags"),
    [("matplotlib", ["--plot", "a.png"]), ("transformers", ["--models", "hf_vitmae_base"])],
)
def test_a_missing_package_is_named(package, flags, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert f"pip install {package}" in refuse(capsys, *QUICK, *flags)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_row_on_a_gpu_has_its_own_peak_memory(tmp_path):
    path = tmp_path / "numbers.json"
    grid = ["--models", "crossmae_vit_base_patch16", "--memory", "high", "low"]
    grid += ["--batch_size", 64, "--dtypes", "bf16"]
    run("--quick", "--device", "cuda", "--input_sizes", 224, *grid, "--json", path, main=main)
    high, low = json.loads(path.read_text())["rows"]
    assert (
        high["peak_memory_mb"] > low["peak_memory_mb"] > 3 * 4 * 112
    )  # weights and AdamW's moments
    grown = high["peak_memory_mb"] - low["peak_memory_mb"]
    saved = high["saved_mb_per_image"] - low["saved_mb_per_image"]
    assert grown < 64 * saved * 1.2
    assert 0 < high["utilization_percent"] < 100


# Against a reference program

TINY = ["--models", "crossmae_vit_tiny_patch16", "--input_sizes", "32", "--decoder_depths", "1"]
GOOD = """
import argparse, json
parser = argparse.ArgumentParser()
for flag in "model device dtype".split():
    parser.add_argument("--" + flag, required=True)
for flag in "img_size batch_size decoder_depth steps warmup".split():
    parser.add_argument("--" + flag, type=int, required=True)
for flag in "mask_ratio pred_ratio".split():
    parser.add_argument("--" + flag, type=float, required=True)
args = parser.parse_args()
print("a word before")
print(json.dumps({
    **vars(args), "median_step_s": 1000.0, "median_step_cpu_s": 2000.0, "images_per_s": 1.0,
    "saved_activation_mb_per_image": 4 + 8 / args.batch_size, "peak_memory_mb": None,
}))
"""


def test_against_a_reference_program(tmp_path, capsys):
    program, path = tmp_path / "theirs.py", tmp_path / "numbers.json"
    program.write_text(GOOD)
    options = ["--memory", "high", "low", "--json", path, "--rounds", 1]
    benchmark(*QUICK, *TINY, *options, "--against", program)
    (high, low) = tables(capsys.readouterr().out)[0]
    assert (high["memory"], low["memory"]) == ("high", "low")
    for line, row in zip((high, low), json.loads(path.read_text())["against"], strict=True):
        ours, theirs = row["pairs"][0].values()
        assert ours["memory"] == row["memory"]
        given = {"model": "tiny", "img_size": 32, "batch_size": 2, "decoder_depth": 1}
        given |= {"mask_ratio": 0.75, "pred_ratio": 0.25, "dtype": "fp32"}
        assert theirs.items() >= given.items()
        # CPU time; 4 MiB per image and 8 MiB for any batch.
        assert row["time_ratio"] == pytest.approx(2000 / ours["median_step_s"])
        assert float(line["times faster"]) == pytest.approx(row["time_ratio"], rel=1e-3)
        assert row["saved_ratio"] == pytest.approx(ours["saved_mb_per_image"] / 8)
        assert row["saved_slope_ratio"] == pytest.approx(ours["saved_slope_mb_per_image"] / 4)
        assert line["peak"] == "n/a"


def test_a_reference_program_may_compute_in_another_dtype(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.benchmark_pretrain.run_ours", lambda *_: [OURS])
    program, path = tmp_path / "theirs.py", tmp_path / "numbers.json"
    program.write_text(GOOD)
    flags = ["--memory", "high", "--against", program, "--against_dtype", "fp16"]
    benchmark(*QUICK, *TINY, *flags, "--rounds", 1, "--json", path)
    (line,) = tables(capsys.readouterr().out)[0]
    assert (line["dtype"], line["their dtype"]) == ("fp32", "fp16")
    (row,) = json.loads(path.read_text())["against"]
    assert row["their_dtype"] == row["pairs"][0]["theirs"]["dtype"] == "fp16"


@pytest.mark.faults
def test_a_comparison_that_is_stopped_keeps_the_rounds_it_has_measured(tmp_path, monkeypatch):
    starts = []

    def run_ours(*_):
        starts.append(0)
        if len(starts) == 3:
            raise KeyboardInterrupt
        return [OURS]

    monkeypatch.setattr("scripts.benchmark_pretrain.run_ours", run_ours)
    program, path = tmp_path / "theirs.py", tmp_path / "numbers.json"
    program.write_text(GOOD)
    with pytest.raises(KeyboardInterrupt):
        benchmark(
            *QUICK, *TINY, "--memory", "high", "--against", program, "--json", path, "--rounds", 4
        )
    numbers = json.loads(path.read_text())
    assert (numbers["rounds_done"], numbers["rounds"]) == (2, 4)
    (row,) = numbers["against"]
    assert len(row["pairs"]) == 2 and row["time_ratio"] > 0 and row["saved_slope_ratio"] is None


OURS = {"median_step_s": 1.0, "saved_mb_per_image": 3.0, "saved_slope_mb_per_image": 2.0}
OURS |= {"peak_memory_mb": None, "model": "m", "label": "", "input_size": 32}
OURS |= {"dtype": "fp32", "memory": "high", "batch_size": 2}


def test_pairs_are_compared_by_their_medians():
    theirs = {"saved_activation_mb_per_image": 6.0, "peak_memory_mb": 50}
    pairs = [
        ({**OURS, "median_step_s": ours, "peak_memory_mb": 10}, {**theirs, "s": seconds})
        for ours, seconds in [(1.0, 2.0), (2.0, 6.0), (1.0, 10.0)]
    ]
    found = compare_pairs(pairs, seconds="s", saved_twice=5.0)
    assert [found[f"time_ratio{end}"] for end in ("", "_min", "_max")] == [3, 2, 10]
    ratios = [found[name] for name in ("saved_ratio", "saved_slope_ratio", "peak_ratio")]
    assert ratios == [0.5, 0.5, 0.2]


def test_values_missing_in_our_row_are_not_compared():
    missing = {name: value if name in ROW else None for name, value in OURS.items()}
    theirs = {"saved_activation_mb_per_image": 6.0, "peak_memory_mb": 50, "s": 1.0}
    found = compare_pairs([(missing, theirs)], seconds="s", saved_twice=5.0)
    assert all(found[name] is None for name in found.keys() - {"pairs", *ROW})


def test_twice_the_batch_may_not_fit_for_a_program(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.benchmark_pretrain.run_ours", lambda *_: [OURS])
    path = tmp_path / "theirs.py"
    path.write_text(GOOD.replace("print(json", "assert args.batch_size < 4\nprint(json"))
    benchmark(*QUICK, *TINY, "--rounds", 1, "--memory", "high", "--against", path)
    (line,) = tables(capsys.readouterr().out)[0]
    assert line["of one more image"] == "n/a" and float(line["saved bytes"]) == 3 / 8


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("print('no JSON')", "did not print a line of JSON"),
        ("print('{}')", "did not print a line of JSON"),
        (GOOD.replace("4 + 8 / args.batch_size", "'4'"), "did not print a line of JSON"),
        ("raise SystemExit('out of luck')", "exited with code 1: out of luck"),
        ("raise SystemExit(3)", "exited with code 3"),
    ],
)
@pytest.mark.faults
def test_a_program_without_results_is_refused(program, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("scripts.benchmark_pretrain.run_ours", lambda *_: [OURS])
    path = tmp_path / "theirs.py"
    path.write_text(program)
    assert words in refuse(capsys, *QUICK, *TINY, "--against", path)


def test_models_to_compare_have_the_reference_programs_names():
    assert list(THEIR_MODELS.values()) == ["tiny", "small", "base", "large", "huge"]
