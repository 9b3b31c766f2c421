"""A flag has one name in all programs, and names of earlier versions still work."""

import pytest

import main_finetune
import main_knn
from scripts import (
    analyse_attention,
    analyse_decoder_blocks,
    analyse_features,
    analyse_inter_block,
    benchmark_loader,
    benchmark_pretrain,
    export_encoder,
    predict,
    predict_detection,
    predict_segmentation,
)

PICTURES = ["--images", "photos", "--output_dir", "out"]
DATA = ["--data_path", "photos", "--output_dir", "out"]
WITH_CHECKPOINT = {
    main_knn: [],
    analyse_attention: DATA,
    analyse_decoder_blocks: DATA,
    analyse_features: DATA,
    analyse_inter_block: DATA,
    export_encoder: ["--format", "hf", "--output", "out"],
    predict: ["--images", "photos", "--output", "out.csv"],
    predict_detection: PICTURES,
    predict_segmentation: PICTURES,
}


@pytest.mark.parametrize("program", WITH_CHECKPOINT, ids=lambda module: module.__name__)
def test_programs_that_train_nothing_take_a_checkpoint(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("--checkpoint", "--finetune"):
        args = program.parse_args([flag, "a.pth", *WITH_CHECKPOINT[program]])
        assert args.checkpoint == "a.pth"


def test_an_evaluation_takes_a_checkpoint_too():
    assert main_finetune.parse_args(["--eval", "--checkpoint", "a.pth"]).finetune == "a.pth"


@pytest.mark.parametrize("program", [main_knn, predict, analyse_features])
@pytest.mark.parametrize("flag", ["--crop_pct", "--crop_share"])
def test_the_crop_of_evaluation_has_one_name(program, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", "a.pth", *WITH_CHECKPOINT[program], flag, "0.9"]
    assert program.parse_args(argv).crop_pct == 0.9


def test_benchmarks_have_rounds():
    assert benchmark_pretrain.parse_args(["--rounds", "2"]).rounds == 2
    for flag in ("--rounds", "--repeats"):
        assert benchmark_loader.parse_args(["--data_path", "photos", flag, "2"]).rounds == 2
