"""Every option in a few small cases, which the faces for JAX and Keras are both given, and nbbn's own layer."""

import numpy as np

RNG = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return (RNG.normal(size=shape) * 2 + 3).astype(dtype)


CLIPS = {"rmax": 1.5, "rmin": 0.5, "dmax": 0.4}
MASK = np.array([True, False, True, True, True, True, False, True])
# (shape, options, operands)
CASES = {
    "dense": ((8, 5), {}, {}),
    "one dimension": ((6,), {"axis": 0}, {}),
    "channels last": ((4, 3, 6, 5), {}, {}),
    "channels first": ((4, 5, 6, 7), {"axis": 1}, {}),
    "five dimensions": ((2, 5, 3, 2, 2), {"axis": -4}, {}),
    "two axes": ((4, 3, 6, 2), {"axis": (1, 3)}, {}),
    "two axes with all options": (
        (4, 3, 6, 2),
        {"axis": (1, -1), "renorm": True, "virtual_batch_size": 2, "activation": "relu", "debias": True},
        {"residual": normal(4, 3, 6, 2) - 3, "mask": np.array([True, False, True, True])},
    ),
    "two axes, mask of elements": ((4, 3, 6, 2), {"axis": (1, 3)}, {"mask": RNG.random((4, 1, 6, 1))}),
    "two axes, lengths": ((4, 3, 6, 2), {"axis": (1, 3)}, {"lengths": np.array([6, 2, 0, 3])}),
    "axes of five runs": ((2, 3, 4, 3, 2), {"axis": (0, 2, 4)}, {}),
    "many alternating axes": ((2, 3, 2, 3, 2, 3), {"axis": (0, 2, 4)}, {}),
    "momentum": ((8, 5), {"momentum": 0.5, "epsilon": 0.1}, {}),
    "equal weights": ((8, 5), {"momentum": None}, {}),
    "equal weights and renorm": ((8, 5), {"momentum": None, "renorm": True, "skip_nonfinite": True}, {}),
    "debias": ((8, 5), {"debias": True, "momentum": 0.9}, {}),
    "Bessel": ((8, 5), {"bessel_correction": True}, {}),
    "skip": ((8, 5), {"skip_nonfinite": True}, {}),
    "relu": ((8, 5), {"activation": "relu"}, {}),
    "residual": ((8, 5), {}, {"residual": normal(8, 5)}),
    "residual and relu": ((4, 6, 7), {"axis": 1, "activation": "relu"}, {"residual": normal(4, 6, 7) - 3}),
    "mask": ((8, 5), {}, {"mask": MASK}),
    "mask of steps": ((4, 6, 5), {}, {"mask": RNG.random((4, 6)) < 0.6}),
    "mask of samples, channels first": ((8, 3, 6), {"axis": 1}, {"mask": MASK}),
    "mask of pixels, channels first": ((4, 3, 6, 5), {"axis": 1}, {"mask": RNG.random((4, 6, 5)) < 0.6}),
    "mask of elements": ((4, 6, 5), {}, {"mask": RNG.random((4, 6, 5)) < 0.6}),
    "weights and Bessel": ((8, 5), {"bessel_correction": True}, {"mask": RNG.random(8).astype(np.float32)}),
    "lengths": ((4, 6, 5), {}, {"lengths": np.array([6, 2, 0, 3])}),
    "lengths, channels first": ((4, 5, 6), {"axis": 1}, {"lengths": np.array([6, 2, 0, 3])}),
    "renorm": ((8, 5), {"renorm": True}, {}),
    "renorm, clipped": ((8, 5), {"renorm": True, "renorm_clipping": CLIPS, "renorm_momentum": 0.8}, {}),
    "renorm, debiased, relu": ((8, 5), {"renorm": True, "debias": True, "activation": "relu"}, {}),
    "renorm and mask": ((8, 5), {"renorm": True, "renorm_clipping": {"rmax": 2.0}}, {"mask": MASK}),
    "ghost": ((8, 5), {"virtual_batch_size": 4}, {}),
    "ghost, channels first": ((8, 3, 6), {"virtual_batch_size": 2, "axis": 1}, {}),
    "ghost, contiguous": ((8, 5), {"virtual_batch_size": 4, "virtual_batch_order": "contiguous"}, {}),
    "ghost, ragged": ((8, 5), {"virtual_batch_size": 3, "ragged": "spread"}, {}),
    "ghost, the last one smaller": ((8, 5), {"virtual_batch_size": 3, "ragged": "last"}, {"mask": MASK}),
    "ghost and renorm": ((8, 5), {"virtual_batch_size": 4, "renorm": True}, {}),
    "ghost, residual, relu": ((8, 5), {"virtual_batch_size": 4, "activation": "relu"}, {"residual": normal(8, 5) - 3}),
    "large, channels last": ((16, 16, 16, 64), {"activation": "relu"}, {}),
    "large, channels first": ((16, 64, 16, 16), {"axis": 1}, {}),
    "large, masked": ((16, 16, 16, 64), {}, {"mask": RNG.random((16, 16, 16)) < 0.6}),
}
