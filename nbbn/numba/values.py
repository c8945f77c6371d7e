"""What only values tell: checks in compiled functions. What types tell is in checks.py."""

import math

from nbbn.numba import planning
from nbbn.numba.arrays import helper, refuse
from nbbn.numba.checks import is_absent
from nbbn.numba.planning import jitable

GAMMA, BETA, MEAN, VARIANCE, STDDEV, RENORM_MEAN, RENORM_STDDEV, OUT, RESIDUAL, WEIGHTS, DY = range(11)
EPSILON, MOMENTUM, RENORM_MOMENTUM = range(11, 14)


@jitable
def kept_axis(rank, axis):
    """The axis counted from the left."""
    if axis < -rank or axis >= rank:
        refuse((planning.AXIS, 0, rank, axis))
    return axis + rank if axis < 0 else axis


@helper
def check_row(name, row, channels):
    if is_absent(row):
        return lambda name, row, channels: None

    def check(name, row, channels):
        if row.size != channels:
            refuse((planning.ROW, name, channels, row.size))

    return check


@helper
def check_operand(name, array, x):
    if is_absent(array):
        return lambda name, array, x: None

    def check(name, array, x):
        if array.shape != x.shape:
            refuse((planning.SHAPE_OF, name, 0, 0))

    return check


@jitable
def check_rows(gamma, beta, mean, variance, channels):
    check_row(GAMMA, gamma, channels)
    check_row(BETA, beta, channels)
    check_row(MEAN, mean, channels)
    check_row(VARIANCE, variance, channels)


@jitable
def check_operands(dy, out, residual, weights, x):
    check_operand(DY, dy, x)
    check_operand(OUT, out, x)
    check_operand(RESIDUAL, residual, x)
    check_operand(WEIGHTS, weights, x)


@jitable
def check_momentum(name, value):
    if not 0 <= value <= 1:
        refuse((planning.MOMENTUM, name, 0, 0))


@jitable
def check_finite(name, value):
    if not 0 <= value < math.inf:
        refuse((planning.FINITE, name, 0, 0))


@helper
def groups_of(virtual_batch_size, x, kept):
    """How many groups a batch has."""
    if is_absent(virtual_batch_size):
        return lambda virtual_batch_size, x, kept: 1

    def counted(virtual_batch_size, x, kept):
        if kept == 0:
            refuse((planning.BATCH_AXIS, 0, 0, 0))
        if virtual_batch_size <= 0 or x.shape[0] % virtual_batch_size != 0:
            refuse((planning.DIVISOR, 0, x.shape[0], virtual_batch_size))
        return x.shape[0] // virtual_batch_size

    return counted
