"""The sums of a task: those of its threads' elements, a few at a time, and the tree of the block's."""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel, epilogue, sums
from nbbn.kernels.cuda.blocks import Variant, at, block_functions, input_functions, output_of
from nbbn.kernels.cuda.memory import vector
from nbbn.kernels.cuda.target import cuda, device


@lru_cache(maxsize=256)
def reduce_functions(v: Variant) -> SimpleNamespace:
    """The sums of a task."""
    rows, width, own, unroll, weighted, adjusted = v.rows, v.width, v.own, v.unroll, v.weights, v.adjustment
    ahead, real, narrow, relu = unroll * width, v.statistic.type, v.sums.type, v.relu or None
    unroll_beside, ahead_beside = v.unroll_beside, v.unroll_beside * width
    read, read_operand = vector(v.dtype, width).read, vector(v.statistic, width).read
    block = block_functions(rows, v.short, v.threads)
    walk, is_writer, block_sum, block_moments = block.walk, block.is_writer, block.block_sum, block.block_moments
    gradient, inputs = epilogue.functions(device).gradient, input_functions(v, True)
    read_inputs, of_residual, of_adjustment = inputs.read_inputs, inputs.of_residual, inputs.of_adjustment
    of_weights, gradient_sums = inputs.of_weights, channel.GRADIENT_ROWS[adjusted]
    terms = sums.functions(device)
    moment_terms, gradient_terms = terms.moment_terms, terms.gradient_terms

    @device
    def write(s, values, count, bounds, k1, first, partial):
        """What the block has found for the s-th statistic of a thread."""
        if is_writer() and k1 < bounds.k1_end:
            for i in range(count):
                partial[bounds.chunk, i, first + s] = values[i]

    @device
    def take_shift(x, w, there, shift, heaviest, sums):
        """Before these elements are added, make the sums so far those about the heaviest of them, if its weight is more
        than twice that of the shift: so sums cannot lose more than their number's digits.

        there: how many of the `unroll` accesses there are.
        """
        for s in range(own):
            value, most = shift[s], heaviest[s]
            for u in range(unroll):
                if u < there:
                    for lane in range(1 if rows else width):
                        i = u * width + (s if rows else lane)
                        if w[i] > most:
                            value, most = narrow(x[i]), w[i]
            if most > 2 * heaviest[s]:
                delta = np.float64(shift[s]) - np.float64(value)
                if sums[s, 2] > 0:
                    sums[s, 1] += delta * (2.0 * sums[s, 0] + sums[s, 2] * delta)
                    sums[s, 0] += sums[s, 2] * delta
                shift[s], heaviest[s] = value, most

    @device
    def add_moments(x, w, begin, shift, part):
        """Add `width` elements, x[begin:], to the sums of their statistics."""
        for lane in range(width):
            s, i = lane if rows else 0, begin + lane
            weight = of_weights(w, i)
            if weighted:
                weight = narrow(weight)
            total, squares, count, count2 = moment_terms(narrow(x[i]) - shift[s], weight)
            part[s, 0] += total
            part[s, 1] += squares
            if weighted:
                part[s, 2] += count
                part[s, 3] += count2

    @device
    def sum_moments(x, weights, bounds, first, partial):
        """Write the moments of the block's elements.

        Each thread has a shift of its own, so that `narrow` sums keep their digits; moments of threads are combined.
        """
        values, w = cuda.local.array(ahead, real), cuda.local.array(ahead, real)
        shift, heaviest = cuda.local.array(own, narrow), cuda.local.array(own, real)
        part, sums = cuda.local.array((own, 4), narrow), cuda.local.array((own, 4), np.float64)
        found = cuda.local.array(4, np.float64)
        first_r0, r0_step, first_r1, r1_step, k1 = walk(bounds, width)
        k0, n = bounds.k0, 0
        for s in range(own):
            shift[s], heaviest[s] = 0, 0
            for i in range(4):
                sums[s, i] = 0
        if not weighted and first_r0 < bounds.r0_end and first_r1 < bounds.r1_end:
            read(at(x, first_r0, k0, first_r1, k1), values, 0)
            for s in range(own):
                shift[s] = narrow(values[s])
        r0 = first_r0
        while r0 < bounds.r0_end:  # range() would divide
            begin = first_r1
            while begin < bounds.r1_end:
                for s in range(own):
                    for i in range(4):
                        part[s, i] = 0
                there = 0
                for u in range(unroll):
                    r1 = begin + u * r1_step
                    if r1 < bounds.r1_end:
                        read(at(x, r0, k0, r1, k1), values, u * width)
                        if weighted:
                            read_operand(at(weights, r0, k0, r1, k1), w, u * width)
                        there += 1
                if weighted:
                    take_shift(values, w, there, shift, heaviest, sums)
                for u in range(unroll):
                    if u < there:
                        add_moments(values, w, u * width, shift, part)
                n += there
                for s in range(own):
                    for i in range(4 if weighted else 2):
                        sums[s, i] += np.float64(part[s, i])
                begin += r1_step * unroll
            r0 += r0_step
        for s in range(own):
            count = sums[s, 2] if weighted else np.float64(n * (1 if rows else width))
            mean, m2 = rules.shifted_moments(count, np.float64(shift[s]), sums[s, 0], sums[s, 1])
            found[channel.COUNT], found[channel.BATCH_MEAN], found[channel.M2] = count, mean, m2
            found[channel.SQUARES] = sums[s, 3] if weighted else count
            block_moments(found, 4)
            write(s, found, 4, bounds, k1, first, partial)

    @device
    def add_gradient(g, x, residual, w, a, b, begin, forward, part):
        for lane in range(width):
            s, i = lane if rows else 0, begin + lane
            ai, bi, ri = of_adjustment(a, i), of_adjustment(b, i), of_residual(residual, i)
            mean, scale, shift, gamma, beta = output_of(forward, s)
            gi = gradient(g[i], x[i], mean, scale, shift, ai, bi, gamma, beta, ri, relu)
            if adjusted:
                ai, bi = narrow(ai), narrow(bi)
            total, centered, plain, offset = gradient_terms(
                narrow(gi), narrow(x[i]), narrow(mean), ai, bi, of_weights(w, i)
            )
            part[s, 0] += total
            part[s, 1] += centered
            if adjusted:
                part[s, 2] += plain
                part[s, 3] += offset

    @device
    def sum_gradient(dy, x, residual, weights, a, b, bounds, first, saved_mean, forward, partial):
        """Write the block's sum dy * a and sum dy * a * (x - mean); with a and b also sum dy and sum dy * b.

        dy counts as far as the activation lets it through; forward: the coefficients of the output.
        """
        g, values, rv = (
            cuda.local.array(ahead_beside, real),
            cuda.local.array(ahead_beside, real),
            cuda.local.array(ahead_beside, real),
        )
        av, bv, w = (
            cuda.local.array(ahead_beside, real),
            cuda.local.array(ahead_beside, real),
            cuda.local.array(ahead_beside, real),
        )
        part, sums = cuda.local.array((own, 4), narrow), cuda.local.array((own, 4), np.float64)
        first_r0, r0_step, first_r1, r1_step, k1 = walk(bounds, width)
        k0 = bounds.k0
        for s in range(own):
            for i in range(4):
                sums[s, i] = 0
        r0 = first_r0
        while r0 < bounds.r0_end:  # range() would divide
            begin = first_r1
            while begin < bounds.r1_end:
                for s in range(own):
                    for i in range(4):
                        part[s, i] = 0
                for u in range(unroll_beside):
                    r1 = begin + u * r1_step
                    if r1 < bounds.r1_end:
                        read(at(dy, r0, k0, r1, k1), g, u * width)
                        read_inputs(x, residual, a, b, r0, k0, r1, k1, values, rv, av, bv, u * width)
                        if weighted:
                            read_operand(at(weights, r0, k0, r1, k1), w, u * width)
                for u in range(unroll_beside):
                    if begin + u * r1_step < bounds.r1_end:
                        add_gradient(g, values, rv, w, av, bv, u * width, forward, part)
                for s in range(own):
                    for i in range(gradient_sums):
                        sums[s, i] += np.float64(part[s, i])
                begin += r1_step * unroll_beside
            r0 += r0_step
        if k1 < bounds.k1_end:
            for s in range(own):  # the products are with the rounded mean
                sums[s, 1] += sums[s, 0] * (np.float64(narrow(forward[channel.Y_MEAN, s])) - saved_mean[first + s])
        found = cuda.local.array(4, np.float64)
        for s in range(own):
            for i in range(gradient_sums):
                found[i] = sums[s, i]
            block_sum(found, gradient_sums)
            write(s, found, gradient_sums, bounds, k1, first, partial)

    return SimpleNamespace(sum_moments=sum_moments, sum_gradient=sum_gradient)
