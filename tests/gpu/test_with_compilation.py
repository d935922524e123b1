"""torch.compile on CUDA, for which compiled code on a CPU is no substitute (tests/model/test_compiled.py has that).

The file's name puts it last: compilation takes most of the time of these tests.
"""

import pytest

from tests.gpu.test_network import PRECISIONS, STEPS, WIDTHS, moved, train
from tests.model.tiny import make_batch, make_model, rows_of


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", WIDTHS)
def test_compiled_steps_train_alike(width, precision, cuda):
    """With several shapes: one compilation serves them all."""
    losses = []
    for is_compiled in (False, True):
        model = make_model(language_width=width).to(cuda)
        if is_compiled:
            model.compile_hot_paths()
        batches = [make_batch(), rows_of(make_batch(), [0, 3]), rows_of(make_batch(), [1]), make_batch()]
        losses.append([train(model, moved(batch, cuda), precision, 2) for batch in batches])
    for plain, compiled in zip(*losses, strict=True):
        assert compiled == pytest.approx(plain, abs=STEPS[precision])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_every_stage_trains_compiled(stage, precision, cuda, tmp_path):
    pytest.importorskip("pydantic", reason="the parameters of the stages need pydantic")
    from tests.gpu.test_stages import prepare, run_on, steps

    runs = [run_on(cuda, stage, tmp_path, precision=precision, compile=compiled) for compiled in (False, True)]
    plain, compiled = (steps(run, prepare(run)) for run in runs)
    assert compiled == pytest.approx(plain, abs=STEPS[precision])
