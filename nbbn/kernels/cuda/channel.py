"""The middle stage on a GPU: a thread has one channel, in all groups."""

from nbbn.core import rules
from nbbn.kernels import channel
from nbbn.kernels.cuda.target import device

_stage = channel.functions(device)
add_group, update, save = _stage.add_group, _stage.update, _stage.save
freeze, output_coefficients = _stage.freeze, _stage.output_coefficients
add_parameter_gradients, statistic_gradient = _stage.add_parameter_gradients, _stage.input_coefficients


@device
def add_chunks(s, partial):
    """Add up the sums of all chunks of a statistic, in their order, in the place of the first chunk's."""
    for chunk in range(1, partial.shape[0]):
        for row in range(partial.shape[1]):
            partial[0, row, s] += partial[chunk, row, s]


@device
def train(c, params, state, hyper, a, renorm, cumulative, new_state, saved, coefficients):
    """From moments to the new state, what the gradient needs, and the coefficients of the output."""
    present, mean, variance, channels = 0.0, 0.0, 0.0, params.shape[1]
    for s in range(c, saved.shape[1], channels):
        present, mean, variance = add_group(s, saved, hyper[channel.BESSEL], present, mean, variance)
    r, d = update(c, present, mean, variance, state, hyper, renorm, cumulative, new_state)
    for s in range(c, saved.shape[1], channels):
        own = rules.biased_variance(saved[channel.COUNT, s], saved[channel.M2, s])
        save(s, c, rules.reciprocal_stddev(own, hyper[channel.EPSILON]), r, d, params, saved)
        output_coefficients(s, s, saved, a, coefficients)


@device
def parameter_gradients(c, sums, saved, adjusted, dparams):
    """Write the gradients of gamma and beta."""
    dgamma, dbeta = 0.0, 0.0
    for s in range(c, saved.shape[1], dparams.shape[1]):
        dgamma, dbeta = add_parameter_gradients(s, sums, saved, adjusted, dgamma, dbeta)
    dparams[channel.GAMMA, c] = dgamma
    dparams[channel.BETA, c] = dbeta


@device
def input_coefficients(c, channels, sums, saved, coefficients):
    """Write mean, scale, bias and slope of dx."""
    for s in range(c, saved.shape[1], channels):
        statistic_gradient(s, sums, saved, coefficients)
