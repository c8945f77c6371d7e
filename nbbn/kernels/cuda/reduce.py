"""The sums of a task: those of its threads' elements, a few at a time, and the tree of the block's."""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np

from nbbn.core import rules
from nbbn.kernels import channel, epilogue, sums
from nbbn.kernels.cuda.blocks import Variant, at, block_functions, input_functions, output_of
from nbbn.kernels.cuda.memory import vector
from nbbn.kernels.cuda.target import cuda, device, index_type


@lru_cache(maxsize=256)
def reduce_functions(v: Variant) -> SimpleNamespace:
    """The sums of a task."""
    rows, width, own, unroll, weighted, adjusted = v.rows, v.width, v.own, v.unroll, v.weights, v.adjustment
    ahead, real, narrow, relu = unroll * width, v.statistic.type, v.sums.type, v.relu or None
    unroll_beside, ahead_beside = v.unroll_beside, v.unroll_beside * width
    elements, fetch_operand, index = vector(v.dtype, width), vector(v.statistic, width).fetch, index_type(v.wide)
    words, word, fetch, decode = elements.words, elements.word, elements.fetch, elements.decode
    raw_size, raw_beside = unroll * words, unroll_beside * words
    block = block_functions(rows, v.short, v.threads, v.wide)
    walk, is_writer, block_sum, block_moments = block.walk, block.is_writer, block.block_sum, block.block_moments
    gradient, inputs = epilogue.functions(device).gradient, input_functions(v, True)
    fetch_inputs, decode_inputs = inputs.fetch, inputs.decode
    of_residual, of_adjustment = inputs.of_residual, inputs.of_adjustment
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
    def take_shift(raw, w, there, x, shift, heaviest, sums):
        """Before these elements are added, make the sums so far those about the heaviest of them, if its weight is more
        than twice that of the shift: so sums cannot lose more than their number's digits.

        there: how many of the `unroll` accesses there are. x: room for one of them.
        """
        found, most = cuda.local.array(own, narrow), cuda.local.array(own, real)
        for s in range(own):
            found[s], most[s] = shift[s], heaviest[s]
        for u in range(unroll):
            if u < there:
                decode(raw, u * words, x)
                for lane in range(width):
                    s, weight = lane if rows else 0, w[u * width + lane]
                    if weight > most[s]:
                        found[s], most[s] = narrow(x[lane]), weight
        for s in range(own):
            if most[s] > 2 * heaviest[s]:
                delta = np.float64(shift[s]) - np.float64(found[s])
                if sums[s, 2] > 0:
                    sums[s, 1] += delta * (2.0 * sums[s, 0] + sums[s, 2] * delta)
                    sums[s, 0] += sums[s, 2] * delta
                shift[s], heaviest[s] = found[s], most[s]

    @device
    def add_moments(x, w, begin, shift, part):
        """Add `width` elements, whose weights are w[begin:], to the sums of their statistics."""
        for lane in range(width):
            s, weight = lane if rows else 0, of_weights(w, begin + lane)
            if weighted:
                weight = narrow(weight)
            total, squares, count, count2 = moment_terms(narrow(x[lane]) - shift[s], weight)
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
        raw, w, values = cuda.local.array(raw_size, word), cuda.local.array(ahead, real), cuda.local.array(width, real)
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
            fetch(at(x, first_r0, k0, first_r1, k1), raw, 0)
            decode(raw, 0, values)
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
                    r1 = index(begin + u * r1_step)
                    if r1 < bounds.r1_end:
                        fetch(at(x, r0, k0, r1, k1), raw, u * words)
                        if weighted:
                            fetch_operand(at(weights, r0, k0, r1, k1), w, u * width)
                        there += 1
                if weighted:
                    take_shift(raw, w, there, values, shift, heaviest, sums)
                for u in range(unroll):
                    if u < there:
                        decode(raw, u * words, values)
                        add_moments(values, w, u * width, shift, part)
                n += there
                for s in range(own):
                    for i in range(4 if weighted else 2):
                        sums[s, i] += np.float64(part[s, i])
                begin = index(begin + r1_step * unroll)
            r0 = index(r0 + r0_step)
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
            ai, bi, ri = of_adjustment(a, i), of_adjustment(b, i), of_residual(residual, lane)
            mean, scale, shift, gamma, beta = output_of(forward, s)
            gi = gradient(g[lane], x[lane], mean, scale, shift, ai, bi, gamma, beta, ri, relu)
            if adjusted:
                ai, bi = narrow(ai), narrow(bi)
            total, centered, plain, offset = gradient_terms(
                narrow(gi), narrow(x[lane]), narrow(mean), ai, bi, of_weights(w, i)
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
        raw, raw_residual = cuda.local.array(raw_beside, word), cuda.local.array(raw_beside, word)
        raw_gradient, w = cuda.local.array(raw_beside, word), cuda.local.array(ahead_beside, real)
        av, bv = cuda.local.array(ahead_beside, real), cuda.local.array(ahead_beside, real)
        g, values, rv = cuda.local.array(width, real), cuda.local.array(width, real), cuda.local.array(width, real)
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
                    r1 = index(begin + u * r1_step)
                    if r1 < bounds.r1_end:
                        fetch(at(dy, r0, k0, r1, k1), raw_gradient, u * words)
                        fetch_inputs(x, residual, a, b, r0, k0, r1, k1, raw, raw_residual, av, bv, u)
                        if weighted:
                            fetch_operand(at(weights, r0, k0, r1, k1), w, u * width)
                for u in range(unroll_beside):
                    if index(begin + u * r1_step) < bounds.r1_end:
                        decode(raw_gradient, u * words, g)
                        decode_inputs(raw, raw_residual, u, values, rv)
                        add_gradient(g, values, rv, w, av, bv, u * width, forward, part)
                for s in range(own):
                    for i in range(gradient_sums):
                        sums[s, i] += np.float64(part[s, i])
                begin = index(begin + r1_step * unroll_beside)
            r0 = index(r0 + r0_step)
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
