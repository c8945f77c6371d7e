"""nbbn/core/formula.py against the kernels, with NumPy in the place of a library that differentiates."""

import numpy as np
import pytest

from nbbn.core import formula
from nbbn.core.options import Options
from nbbn.engine.base import Operands
from nbbn.engine.dispatcher import Dispatcher
from nbbn.kernels.channel import BATCH_MEAN, COUNT, M2, D, R
from tests.oracle.compiled import interpreted_unless

OPTIONS = {
    "plain": {},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.1}},
    "ghost": {"virtual_batch_size": 2},
    "contiguous ghost": {"virtual_batch_size": 2, "virtual_batch_order": "contiguous"},
    "ragged": {"virtual_batch_size": 4, "ragged": "spread"},
    "relu": {"activation": "relu"},
}
SHAPE = 6, 5, 4


def problem(axis, beside, **options):
    rng = np.random.default_rng(3)
    run = Dispatcher(Options(axis=axis, epsilon=1e-3, **options))
    x, residual = rng.normal(2, 3, SHAPE), rng.normal(size=SHAPE)
    weights = (rng.random(SHAPE) < 0.7).astype(float)
    operands = Operands(residual, weights, *rng.normal(size=(2, *SHAPE))) if beside else Operands()
    channels = run.layout(SHAPE, True).channels
    params, state = rng.normal(size=(2, channels)), rng.random((5 if options.get("renorm") else 2, channels)) + 1
    return run, x, params, state, operands


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("axis", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("beside", [False, True])
def test_training(name, axis, beside):
    interpreted_unless(not beside or axis == (2,))
    run, x, params, state, operands = problem(axis, beside, **OPTIONS[name])
    lay = run.layout(SHAPE, True)
    expected, _, saved = run.train(x, params, state, operands)
    y, mean, variance = formula.train(
        np,
        x,
        *params,
        axis,
        1e-3,
        members=lay.members(),
        weights=operands.weights,
        corrections=[saved[row].reshape(lay.groups, lay.channels) for row in (R, D)],
        adjustment=(operands.a, operands.b) if beside else None,
        residual=operands.residual,
        relu=OPTIONS[name].get("activation") == "relu",
    )
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(mean.reshape(-1), saved[BATCH_MEAN], rtol=1e-13)
    np.testing.assert_allclose(variance.reshape(-1), saved[M2] / np.maximum(saved[COUNT], 1), rtol=1e-12)


def test_excluded_nan_has_no_part():
    _, x, params, _, _ = problem((2,), False)
    weights = np.ones(SHAPE)
    weights[2, 3, 1], x[2, 3, 1] = 0, np.nan
    y, _, _ = formula.train(np, x, *params, (2,), 1e-3, weights=weights)
    assert np.isnan(y).sum() == 1


def test_statistics_that_are_shared():
    """With somebody who has the same input, sums are twice as large, and the output is what it is without him."""
    run, x, params, _, _ = problem((1,), False)
    alone = formula.train(np, x, *params, run.axis(3), 1e-3)
    shared = formula.train(np, x, *params, run.axis(3), 1e-3, weights=np.ones(SHAPE), total=lambda own: 2 * own)
    for found, expected in zip(shared, alone, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
