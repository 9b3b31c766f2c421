"""What every analysis of a checkpoint promises: refusals, and results that are never lost."""

from functools import partial

import pytest

from scripts import (
    analyse_attention,
    analyse_decoder_blocks,
    analyse_features,
    analyse_inter_block,
)
from tests.helpers import analyses
from tests.helpers.analyses import (
    WRONG_FOLDER,
    WRONG_INPUT,
    WRONG_MASKS,
    WRONG_PICTURES,
    flags_of,
    refuse,
    save_model,
)

SCRIPTS = {
    "attention": analyse_attention.main,
    "decoder_blocks": analyse_decoder_blocks.main,
    "features": analyse_features.main,
    "inter_block": analyse_inter_block.main,
}
UNLABELED = [case for case in WRONG_INPUT if case[0] == {"--data_path": "DAMAGED"}]
NOT_OF = {"features": UNLABELED + WRONG_MASKS, "inter_block": WRONG_PICTURES}
WRONG = [
    pytest.param(name, *case, id=f"{name} {flags_of(case[0])}")
    for name in SCRIPTS
    for case in WRONG_INPUT + WRONG_MASKS + WRONG_PICTURES + WRONG_FOLDER
    if case not in NOT_OF.get(name, ())
]
pytestmark = [pytest.mark.usefixtures("nano"), pytest.mark.xdist_group("analyses")]
every_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("checkpoint") / "crossmae.pth")


@pytest.fixture
def argv(tmp_path, checkpoint, images):
    places = {"--checkpoint": checkpoint, "--output_dir": tmp_path / "out"}
    return {**places, "--data_path": images, "--num_images": 2}


@pytest.mark.parametrize(("name", "changes", "reason"), WRONG)
def test_wrong_input_is_refused_in_one_sentence(tmp_path, argv, capsys, name, changes, reason):
    assert reason in refuse(tmp_path, capsys, SCRIPTS[name], argv, changes)


@every_script
def test_without_matplotlib_nothing_is_measured(monkeypatch, capsys, argv, name):
    analyses.assert_needs_matplotlib(monkeypatch, capsys, SCRIPTS[name], argv)


@every_script
def test_earlier_results_are_kept(tmp_path, argv, images, name):
    argv |= {"--output_dir": tmp_path, "--images": images / "val" / "apple" / "000.png"}
    report = tmp_path / f"{name}.json"
    draw = partial(analyses.analyse, SCRIPTS[name], report, *analyses.flat(argv), save=True)
    draw("--seed", 0)
    analyses.assert_earlier_kept(tmp_path, lambda: draw("--seed", 1))
