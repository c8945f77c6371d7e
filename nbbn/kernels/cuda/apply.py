"""The results of a task."""

from functools import lru_cache
from types import SimpleNamespace

from nbbn.core import rules
from nbbn.kernels import channel, epilogue
from nbbn.kernels.cuda.blocks import Variant, at, block_functions, input_functions, output_of
from nbbn.kernels.cuda.memory import vector
from nbbn.kernels.cuda.target import cuda, device, index_type


@lru_cache(maxsize=256)
def apply_functions(v: Variant) -> SimpleNamespace:
    """The results of a task, from the coefficients of the thread's statistics: (5, own) arrays."""
    rows, width, unroll, weighted, frozen, wants_dz = v.rows, v.width, v.unroll_beside, v.weights, v.frozen, v.dz
    ahead, real, relu, index = unroll * width, v.statistic.type, v.relu or None, index_type(v.wide)
    elements, walk = vector(v.dtype, width), block_functions(rows, v.short, v.threads, v.wide).walk
    words, word, fetch, decode, write = elements.words, elements.word, elements.fetch, elements.decode, elements.write
    fetch_operand = vector(v.statistic, width).fetch
    inputs, ends = input_functions(v, v.relu or not v.frozen), epilogue.functions(device)
    output, gradient, fetch_inputs, decode_inputs = ends.output, ends.gradient, inputs.fetch, inputs.decode
    of_residual, of_adjustment, of_weights = inputs.of_residual, inputs.of_adjustment, inputs.of_weights
    raw_size = unroll * words

    @device
    def normalize(x, residual, a, b, y, bounds, forward):
        """Write y of a task."""
        raw, raw_residual = cuda.local.array(raw_size, word), cuda.local.array(raw_size, word)
        av, bv = cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        values, rv = cuda.local.array(width, real), cuda.local.array(width, real)
        first_r0, r0_step, first_r1, r1_step, k1 = walk(bounds, width)
        k0 = bounds.k0
        r0 = first_r0
        while r0 < bounds.r0_end:  # range() would divide
            begin = first_r1
            while begin < bounds.r1_end:
                for u in range(unroll):
                    r1 = index(begin + u * r1_step)
                    if r1 < bounds.r1_end:
                        fetch_inputs(x, residual, a, b, r0, k0, r1, k1, raw, raw_residual, av, bv, u)
                for u in range(unroll):
                    r1 = index(begin + u * r1_step)
                    if r1 < bounds.r1_end:
                        decode_inputs(raw, raw_residual, u, values, rv)
                        for lane in range(width):
                            s, i = lane if rows else 0, u * width + lane
                            ai, bi, ri = of_adjustment(av, i), of_adjustment(bv, i), of_residual(rv, lane)
                            mean, scale, shift, gamma, beta = output_of(forward, s)
                            values[lane] = output(values[lane], mean, scale, shift, ai, bi, gamma, beta, ri, relu)
                        write(at(y, r0, k0, r1, k1), values)
                begin = index(begin + r1_step * unroll)
            r0 = index(r0 + r0_step)

    @device
    def input_gradient(dy, x, residual, weights, a, b, dx, dz, bounds, forward, backward):
        """Write dx, and what the activation lets through of dy if it is asked for, of a task."""
        raw, raw_residual = cuda.local.array(raw_size, word), cuda.local.array(raw_size, word)
        raw_gradient, g = cuda.local.array(raw_size, word), cuda.local.array(width, real)
        av, bv, w = cuda.local.array(ahead, real), cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        values, rv = cuda.local.array(width, real), cuda.local.array(width, real)
        first_r0, r0_step, first_r1, r1_step, k1 = walk(bounds, width)
        k0 = bounds.k0
        r0 = first_r0
        while r0 < bounds.r0_end:  # range() would divide
            begin = first_r1
            while begin < bounds.r1_end:
                for u in range(unroll):
                    r1 = index(begin + u * r1_step)
                    if r1 < bounds.r1_end:
                        fetch(at(dy, r0, k0, r1, k1), raw_gradient, u * words)
                        fetch_inputs(x, residual, a, b, r0, k0, r1, k1, raw, raw_residual, av, bv, u)
                        if weighted:
                            fetch_operand(at(weights, r0, k0, r1, k1), w, u * width)
                for u in range(unroll):
                    r1 = index(begin + u * r1_step)
                    if r1 < bounds.r1_end:
                        decode(raw_gradient, u * words, g)
                        decode_inputs(raw, raw_residual, u, values, rv)
                        for lane in range(width):
                            s, i = lane if rows else 0, u * width + lane
                            ai, bi, ri = of_adjustment(av, i), of_adjustment(bv, i), of_residual(rv, lane)
                            mean, scale, shift, gamma, beta = output_of(forward, s)
                            g[lane] = gradient(g[lane], values[lane], mean, scale, shift, ai, bi, gamma, beta, ri, relu)
                        if wants_dz:
                            write(at(dz, r0, k0, r1, k1), g)
                        for lane in range(width):
                            s, i = lane if rows else 0, u * width + lane
                            if frozen:  # whatever x is
                                g[lane] = g[lane] * backward[channel.DX_SCALE, s]
                            else:
                                mean, scale = backward[channel.DX_MEAN, s], backward[channel.DX_SCALE, s]
                                bias, slope = backward[channel.DX_BIAS, s], backward[channel.DX_SLOPE, s]
                                ai, wi = of_adjustment(av, i), of_weights(w, i)
                                g[lane] = rules.input_gradient(g[lane], values[lane], mean, scale, bias, slope, ai, wi)
                        write(at(dx, r0, k0, r1, k1), g)
                begin = index(begin + r1_step * unroll)
            r0 = index(r0 + r0_step)

    return SimpleNamespace(normalize=normalize, input_gradient=input_gradient)
