"""batch_norm_train, batch_norm_infer and batch_norm_backward in compiled functions.

What types decide is decided here, in Python, when a user's function is compiled: which operands there are, and whether
all arrays are dense. The rest is short text for the compiler, around the kernels.
"""

import math

import numpy as np
from numba import types
from numba.extending import overload
from numba.np import numpy_support

from nbbn.kernels import channel
from nbbn.numba import checks, functions, planning
from nbbn.numba.arrays import arrange, copied, deliver, helper, new_like, place, refuse, settle
from nbbn.numba.checks import check_channels, check_common, check_options, check_renorm, is_absent, statistic
from nbbn.numba.intrinsics import step
from nbbn.numba.rows import params_of, state_of, update
from nbbn.numba.values import (
    EPSILON,
    MOMENTUM,
    RENORM_MEAN,
    RENORM_MOMENTUM,
    RENORM_STDDEV,
    STDDEV,
    check_finite,
    check_momentum,
    check_operands,
    check_row,
    check_rows,
    groups_of,
    kept_axis,
)  # fmt: skip

TRAIN = {one_pass: step("train", one_pass) for one_pass in (True, False)}
BACKWARD = {one_pass: step("backward", one_pass) for one_pass in (True, False)}
INFER = step("infer", False)
ROWS, RSTD, HYPER = channel.SAVED_ROWS, channel.RSTD, channel.HYPER_SIZE

LITERALS = {"prefer_literal": True, "jit_options": planning.NOT_FOR_C}


@overload(functions.batch_norm_train, **LITERALS)
def train(
    x, gamma, beta, moving_mean, moving_variance, axis=-1, epsilon=1e-3, momentum=0.99, out=None, residual=None,
    weights=None, activation=None, bessel_correction=False, renorm=None, renorm_momentum=0.99, rmin=0.0, rmax=math.inf,
    dmax=math.inf, virtual_batch_size=None,
):  # fmt: skip
    relu = check_common(x, axis, out, residual, activation)
    check_channels(x, gamma, beta, moving_mean, moving_variance, written=True)
    check_options(x, weights, virtual_batch_size)
    check_renorm(renorm, moving_mean)
    numbers = {"epsilon": epsilon, "momentum": momentum, "bessel_correction": bessel_correction, "rmin": rmin}
    for name, kind in (numbers | {"rmax": rmax, "dmax": dmax, "renorm_momentum": renorm_momentum}).items():
        checks.check_number(name, kind)
    renormed = None if is_absent(renorm) else True
    run = TRAIN[is_absent(virtual_batch_size)]

    def impl(
        x, gamma, beta, moving_mean, moving_variance, axis=-1, epsilon=1e-3, momentum=0.99, out=None, residual=None,
        weights=None, activation=None, bessel_correction=False, renorm=None, renorm_momentum=0.99, rmin=0.0,
        rmax=math.inf, dmax=math.inf, virtual_batch_size=None,
    ):  # fmt: skip
        kept = kept_axis(x.ndim, axis)
        channels = x.shape[kept]
        check_rows(gamma, beta, moving_mean, moving_variance, channels)
        check_operands(None, out, residual, weights, x)
        check_finite(EPSILON, epsilon)
        check_momentum(MOMENTUM, momentum)
        hyper = np.empty(HYPER)
        hyper[channel.EPSILON], hyper[channel.MOMENTUM], hyper[channel.BATCH_WEIGHT] = epsilon, momentum, 1.0 - momentum
        hyper[channel.BESSEL] = bessel_correction
        if renorm is not None:
            check_row(STDDEV, renorm[0], channels)
            check_row(RENORM_MEAN, renorm[1], channels)
            check_row(RENORM_STDDEV, renorm[2], channels)
            check_momentum(RENORM_MOMENTUM, renorm_momentum)
            if not (rmin <= rmax and dmax >= 0):
                refuse((planning.CLIPS, 0, 0, 0))
            hyper[channel.RENORM_MOMENTUM] = renorm_momentum
            hyper[channel.RMIN], hyper[channel.RMAX], hyper[channel.DMAX] = rmin, rmax, dmax
        groups = groups_of(virtual_batch_size, x, kept)
        first = place(out, x, None, residual, weights)
        saved = np.empty((ROWS, groups * channels))
        if x.size == 0:
            saved[:] = 0
            saved[RSTD] = 1
            return deliver(out, first), saved
        params = params_of(gamma, beta, channels, x)
        state = state_of(moving_mean, moving_variance, renorm, channels, x)
        plan, placed, x1, _, residual1, y1, _, weights1 = arrange(
            False, kept, virtual_batch_size, groups, x, None, residual, first, None, weights
        )
        numbers = (hyper, weights1, None, None, residual1, x1, y1, params, state, state, saved)
        run(plan, placed, (relu, renormed, None, None, *numbers))
        settle(placed, first, y1)
        update(moving_mean, moving_variance, renorm, state)
        return deliver(out, first), saved

    return impl


@overload(functions.batch_norm_infer, **LITERALS)
def infer(
    x, gamma, beta, moving_mean, moving_variance, axis=-1, epsilon=1e-3, out=None, residual=None, activation=None
):
    relu = check_common(x, axis, out, residual, activation)
    check_channels(x, gamma, beta, moving_mean, moving_variance, written=False)
    checks.check_number("epsilon", epsilon)

    def impl(
        x, gamma, beta, moving_mean, moving_variance, axis=-1, epsilon=1e-3, out=None, residual=None, activation=None
    ):
        kept = kept_axis(x.ndim, axis)
        channels = x.shape[kept]
        check_rows(gamma, beta, moving_mean, moving_variance, channels)
        check_operands(None, out, residual, None, x)
        check_finite(EPSILON, epsilon)
        hyper = np.zeros(HYPER)
        hyper[channel.EPSILON] = epsilon
        first = place(out, x, None, residual, None)
        if x.size == 0:
            return deliver(out, first)
        params = params_of(gamma, beta, channels, x)
        state = state_of(moving_mean, moving_variance, None, channels, x)
        plan, placed, x1, _, residual1, y1, _, _ = arrange(True, kept, None, 1, x, None, residual, first, None, None)
        INFER(plan, placed, (relu, hyper, residual1, x1, y1, params, state))
        settle(placed, first, y1)
        return deliver(out, first)

    return impl


@overload(functions.batch_norm_backward, **LITERALS)
def backward(dy, x, saved, axis=-1, out=None, residual=None, weights=None, activation=None, virtual_batch_size=None):
    relu = check_common(x, axis, out, residual, activation)
    checks.check_array("dy", dy, x.dtype, x.ndim)
    checks.check_array("saved", saved, types.float64, 2)
    check_options(x, weights, virtual_batch_size)
    wants_dz, has_residual, dtype = relu and not is_absent(residual), not is_absent(residual), statistic(x)
    dtype = numpy_support.as_dtype(dtype)
    run = BACKWARD[is_absent(virtual_batch_size)]

    @helper
    def new_dz(dy):
        return (lambda dy: new_like(dy)) if wants_dz else (lambda dy: None)

    @helper
    def results(dx, dparams, dz, dy):
        if not has_residual:
            return lambda dx, dparams, dz, dy: (dx, dparams[0], dparams[1])
        if wants_dz:
            return lambda dx, dparams, dz, dy: (dx, dparams[0], dparams[1], dz)
        return lambda dx, dparams, dz, dy: (dx, dparams[0], dparams[1], dy)

    def impl(dy, x, saved, axis=-1, out=None, residual=None, weights=None, activation=None, virtual_batch_size=None):
        kept = kept_axis(x.ndim, axis)
        channels = x.shape[kept]
        check_operands(dy, out, residual, weights, x)
        groups = groups_of(virtual_batch_size, x, kept)
        if saved.shape != (ROWS, groups * channels):
            refuse((planning.SAVED, 0, ROWS, groups * channels))
        first, dz = place(out, x, dy, residual, weights), new_dz(x)
        dparams = np.empty((2, channels), dtype)
        if x.size == 0:
            dparams[:] = 0
            return results(deliver(out, first), dparams, dz, dy)
        plan, placed, x1, dy1, residual1, dx1, dz1, weights1 = arrange(
            False, kept, virtual_batch_size, groups, x, dy, residual, first, dz, weights
        )
        given = (relu, weights1, None, None, dz1, residual1, x1, dy1, dx1, copied(saved), dparams)
        run(plan, placed, given)
        settle(placed, first, dx1)
        settle(placed, dz, dz1)
        return results(deliver(out, first), dparams, dz, dy)

    return impl
