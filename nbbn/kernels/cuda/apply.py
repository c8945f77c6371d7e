"""The results of a task."""

from functools import lru_cache
from types import SimpleNamespace

from nbbn.core import rules
from nbbn.kernels import channel, epilogue
from nbbn.kernels.cuda.blocks import Variant, at, block_functions, input_functions, output_of
from nbbn.kernels.cuda.memory import vector
from nbbn.kernels.cuda.target import cuda, device


@lru_cache(maxsize=256)
def apply_functions(v: Variant) -> SimpleNamespace:
    """The results of a task, from the coefficients of the thread's statistics: (5, own) arrays."""
    rows, width, unroll, weighted, frozen, wants_dz = v.rows, v.width, v.unroll_beside, v.weights, v.frozen, v.dz
    ahead, real, relu = unroll * width, v.statistic.type, v.relu or None
    elements = vector(v.dtype, width)
    read, write, read_operand = elements.read, elements.write, vector(v.statistic, width).read
    walk, ends = block_functions(rows, v.short, v.threads).walk, epilogue.functions(device)
    inputs = input_functions(v, v.relu or not v.frozen)
    output, gradient, read_inputs = ends.output, ends.gradient, inputs.read_inputs
    of_residual, of_adjustment, of_weights = inputs.of_residual, inputs.of_adjustment, inputs.of_weights

    @device
    def normalize(x, residual, a, b, y, bounds, forward):
        """Write y of a task."""
        values, rv = cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        av, bv = cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        first_r0, r0_step, first_r1, r1_step, k1 = walk(bounds, width)
        k0 = bounds.k0
        r0 = first_r0
        while r0 < bounds.r0_end:  # range() would divide
            begin = first_r1
            while begin < bounds.r1_end:
                for u in range(unroll):
                    r1 = begin + u * r1_step
                    if r1 < bounds.r1_end:
                        read_inputs(x, residual, a, b, r0, k0, r1, k1, values, rv, av, bv, u * width)
                for u in range(unroll):
                    r1 = begin + u * r1_step
                    if r1 < bounds.r1_end:
                        for lane in range(width):
                            s, i = lane if rows else 0, u * width + lane
                            ai, bi, ri = of_adjustment(av, i), of_adjustment(bv, i), of_residual(rv, i)
                            mean, scale, shift, gamma, beta = output_of(forward, s)
                            values[i] = output(values[i], mean, scale, shift, ai, bi, gamma, beta, ri, relu)
                        write(at(y, r0, k0, r1, k1), values, u * width)
                begin += r1_step * unroll
            r0 += r0_step

    @device
    def input_gradient(dy, x, residual, weights, a, b, dx, dz, bounds, forward, backward):
        """Write dx, and what the activation lets through of dy if it is asked for, of a task."""
        g, values, rv = cuda.local.array(ahead, real), cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        av, bv, w = cuda.local.array(ahead, real), cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        first_r0, r0_step, first_r1, r1_step, k1 = walk(bounds, width)
        k0 = bounds.k0
        r0 = first_r0
        while r0 < bounds.r0_end:  # range() would divide
            begin = first_r1
            while begin < bounds.r1_end:
                for u in range(unroll):
                    r1 = begin + u * r1_step
                    if r1 < bounds.r1_end:
                        read(at(dy, r0, k0, r1, k1), g, u * width)
                        read_inputs(x, residual, a, b, r0, k0, r1, k1, values, rv, av, bv, u * width)
                        if weighted:
                            read_operand(at(weights, r0, k0, r1, k1), w, u * width)
                for u in range(unroll):
                    r1 = begin + u * r1_step
                    if r1 < bounds.r1_end:
                        for lane in range(width):
                            s, i = lane if rows else 0, u * width + lane
                            ai, bi, ri = of_adjustment(av, i), of_adjustment(bv, i), of_residual(rv, i)
                            mean, scale, shift, gamma, beta = output_of(forward, s)
                            g[i] = gradient(g[i], values[i], mean, scale, shift, ai, bi, gamma, beta, ri, relu)
                        if wants_dz:
                            write(at(dz, r0, k0, r1, k1), g, u * width)
                        for lane in range(width):
                            s, i = lane if rows else 0, u * width + lane
                            if frozen:  # whatever x is
                                g[i] = g[i] * backward[channel.DX_SCALE, s]
                            else:
                                mean, scale = backward[channel.DX_MEAN, s], backward[channel.DX_SCALE, s]
                                bias, slope = backward[channel.DX_BIAS, s], backward[channel.DX_SLOPE, s]
                                ai, wi = of_adjustment(av, i), of_weights(w, i)
                                g[i] = rules.input_gradient(g[i], values[i], mean, scale, bias, slope, ai, wi)
                        write(at(dx, r0, k0, r1, k1), g, u * width)
                begin += r1_step * unroll
            r0 += r0_step

    return SimpleNamespace(normalize=normalize, input_gradient=input_gradient)
