"""What options may be, and what they tell the stage between reduce and apply."""

import math

import numpy as np
import pytest

import nbbn
from nbbn import Dispatcher, Options
from nbbn.core.options import Numbers
from nbbn.engine.cpu.engine import CpuEngine
from nbbn.kernels import channel

F32 = np.dtype(np.float32)


# --- what the channel stage is told -------------------------------------------------------------------


class Listener(CpuEngine):
    """Is told to run steps, and runs none."""

    def train(self, batch, params, state, hyper, new_state):
        self.hyper = hyper
        return batch.result(), state, None

    def infer(self, batch, params, state, hyper):
        self.hyper = hyper
        return batch.result()

    def freeze(self, params, state, hyper):
        self.hyper = hyper


def listening(**options):
    """A Dispatcher, and what its steps of these ranks and dtypes are told."""
    run = Dispatcher(Options(**options))
    listener = Listener(run.options, run.force)
    run.use(listener)

    def told(rank=2, dtype=F32, step="train", **choices):
        x, channels = np.zeros((4,) * rank, dtype), 4 ** len(run.axis(rank))
        params, state = np.zeros((2, channels), F32), np.zeros((5 if run.options.renorm else 2, channels), F32)
        if step == "freeze":
            run.freeze(params, state)
        else:
            getattr(run, step)(x, params, state, **choices)
        return listener.hyper

    return told


CLIPS = [channel.RMIN, channel.RMAX, channel.DMAX]
READ = [channel.MOMENTUM, channel.RENORM_MOMENTUM, *CLIPS]


def test_hyper():
    hyper = listening(momentum=0.25, epsilon=0.5, renorm=True, renorm_momentum=0.75)()
    assert hyper.dtype == np.float64
    assert hyper[[channel.EPSILON, channel.MOMENTUM, channel.RENORM_MOMENTUM]].tolist() == [0.5, 0.25, 0.75]
    assert hyper[CLIPS].tolist() == [0, math.inf, math.inf]


@pytest.mark.parametrize("step", ["infer", "freeze"])
def test_what_inference_is_told_asks_for_no_clips(step):
    """Callables need not have an answer outside training; nor is one of training told another's."""
    told = listening(epsilon=0.5, renorm=True, renorm_clipping={"rmax": lambda: pytest.fail("was asked")})
    assert told(step=step)[channel.EPSILON] == 0.5


@pytest.mark.parametrize("rmax", [2.0, lambda: 2.0], ids=["constant", "callable"])
def test_numbers_of_a_step(rmax):
    """Given by the caller, who may have asked the options already; they do not stay."""
    told = listening(renorm=True, renorm_clipping={"rmax": rmax})
    for _ in range(2):
        assert told(numbers=Numbers(0.5, 0.75, 0.25, 8.0, 1.0))[READ].tolist() == [0.5, 0.75, 0.25, 8, 1]
        assert told()[READ].tolist() == [0.99, 0.99, 0, 2, math.inf]


def test_each_rank_and_dtype_is_told_its_own():
    """Bessel's correction depends on them."""
    told = listening()
    ranks = [(4, F32), (2, F32), (4, np.dtype(np.float64)), (4, F32)]
    assert [told(*rank)[channel.BESSEL] for rank in ranks] == [1, 0, 0, 1]


def test_clip_values_are_read_at_each_step():
    now = {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}
    told = listening(renorm=True, renorm_clipping={k: (lambda k=k: now[k]) for k in now})
    assert told()[CLIPS].tolist() == [1, 1, 0]
    now.update(rmax=3.0, rmin=0.5, dmax=5.0)
    assert told()[CLIPS].tolist() == [0.5, 3, 5]


def test_a_schedule_of_clip_values_changes_the_steps():
    """At 1, 1, 0 renorm is plain batch normalization; one reading per step."""
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, size=(16, 3)).astype(F32)
    readings = iter([1.0, 4.0, 4.0])
    layer = nbbn.BatchNormalization(
        renorm=True, renorm_clipping={"rmax": lambda: next(readings), "rmin": 1.0, "dmax": 0.0}
    )
    plain = nbbn.BatchNormalization()(x, training=True)
    np.testing.assert_allclose(layer(x, training=True), plain, rtol=1e-6, atol=1e-6)
    assert np.abs(layer(x, training=True) - plain).max() > 0.5
    layer(x)  # inference does not read them
    layer(x, training=True)
    with pytest.raises(StopIteration):
        next(readings)


@pytest.mark.parametrize("value", [np.float32(2.5), np.array(2.5), np.int64(2), 2])
def test_clip_values_of_other_number_types(value):
    hyper = listening(renorm=True, renorm_clipping={"rmax": value, "dmax": lambda: value})()
    assert hyper[channel.RMAX] == hyper[channel.DMAX] == float(value)


BESSEL = [
    ({}, (8, 5, 4, 3), F32, True),
    ({"axis": 1}, (8, 3, 5, 4), F32, True),
    ({"axis": 2}, (8, 3, 5, 4), F32, False),
    ({}, (8, 5, 4, 2, 3), F32, True),
    ({}, (8, 3), F32, False),
    ({}, (8, 5, 3), F32, False),
    ({}, (8, 5, 4, 3), np.dtype(np.float64), False),
    ({}, (8, 5, 4, 3), np.dtype(np.float16), True),
    ({"axis": (3,)}, (8, 5, 4, 3), F32, True),
    ({"axis": (1, 3)}, (8, 5, 4, 3), F32, False),
    ({"renorm": True}, (8, 5, 4, 3), F32, False),
    ({"virtual_batch_size": 2}, (8, 5, 4, 3), F32, False),
    ({"fused": False}, (8, 5, 4, 3), F32, False),
    ({"fused": np.False_}, (8, 5, 4, 3), F32, False),
    ({"bessel_correction": False}, (8, 5, 4, 3), F32, False),
    ({"bessel_correction": True}, (8, 3), F32, True),
    ({"bessel_correction": np.True_, "fused": False}, (8, 3), F32, True),
]


@pytest.mark.parametrize(("options", "shape", "dtype", "expected"), BESSEL)
def test_bessel(options, shape, dtype, expected):
    assert bool(listening(**options)(len(shape), dtype)[channel.BESSEL]) == expected


NUMBERS = [0, 1, 0.5, np.float32(0.5), np.float64(0.5), np.array(0.5), np.int64(1)]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_epsilon_of_every_number_type(value, training):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(F32)
    y, pullback = nbbn.BatchNormalization(epsilon=value).vjp(x, training=training)
    mean, variance = (x.mean(0), x.var(0)) if training else (0, 1)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + float(value)), rtol=1e-5, atol=1e-6)
    assert np.isfinite(pullback(y).inputs).all()


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_momentum_of_every_number_type(value):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(F32)
    layer = nbbn.BatchNormalization(momentum=value, renorm=True, renorm_momentum=value)
    layer(x, training=True)
    for found in (layer.moving_mean, layer.renorm_mean):
        np.testing.assert_allclose(found, x.mean(0, np.float64) * (1 - float(value)), rtol=1e-6)


# --- options that are not possible ----------------------------------------------------------------------

ERRORS = [
    ({"axis": 1.5}, TypeError, ("axis", "1.5")),
    ({"axis": "channels"}, TypeError, ("axis", "channels")),
    ({"axis": True}, TypeError, ("axis", "True")),
    ({"axis": None}, TypeError, ("axis", "None")),
    ({"axis": (0, 1.0)}, TypeError, ("axis", "1.0")),
    ({"axis": {1}}, TypeError, ("axis", "{1}")),
    ({"axis": []}, ValueError, ("axis", "[]")),
    ({"momentum": "high"}, TypeError, ("momentum", "high")),
    ({"momentum": True}, TypeError, ("momentum", "True")),
    ({"momentum": 1j}, TypeError, ("momentum", "1j")),
    ({"momentum": [0.9]}, TypeError, ("momentum", "[0.9]")),
    ({"momentum": np.array([0.9])}, TypeError, ("momentum", "[0.9]")),
    ({"momentum": -0.1}, ValueError, ("momentum", "-0.1")),
    ({"momentum": 1.1}, ValueError, ("momentum", "1.1")),
    ({"momentum": math.nan}, ValueError, ("momentum", "nan")),
    ({"renorm_momentum": None}, TypeError, ("renorm_momentum", "None")),
    ({"renorm_momentum": 2}, ValueError, ("renorm_momentum", "2")),
    ({"epsilon": None}, TypeError, ("epsilon", "None")),
    ({"epsilon": "small"}, TypeError, ("epsilon", "small")),
    ({"epsilon": -1e-3}, ValueError, ("epsilon", "-0.001")),
    ({"epsilon": math.inf}, ValueError, ("epsilon", "inf")),
    ({"epsilon": math.nan}, ValueError, ("epsilon", "nan")),
    ({"fused": "yes"}, TypeError, ("fused", "yes")),
    ({"fused": 2}, TypeError, ("fused", "2")),
    ({"bessel_correction": "yes"}, TypeError, ("bessel_correction", "yes")),
    ({"renorm": True, "bessel_correction": True}, ValueError, ("bessel_correction", "True", "renorm")),
    ({"virtual_batch_size": 2.0}, TypeError, ("virtual_batch_size", "2.0")),
    ({"virtual_batch_size": True}, TypeError, ("virtual_batch_size", "True")),
    ({"virtual_batch_size": 0}, ValueError, ("virtual_batch_size", "0")),
    ({"virtual_batch_size": -2}, ValueError, ("virtual_batch_size", "-2")),
    ({"adjustment": 3}, TypeError, ("adjustment", "3")),
    ({"adjustment": abs, "virtual_batch_size": 2}, ValueError, ("adjustment", "virtual_batch_size", "2")),
    ({"renorm": True, "renorm_clipping": [3]}, TypeError, ("renorm_clipping", "[3]")),
    ({"renorm": True, "renorm_clipping": {"r_max": 3}}, ValueError, ("renorm_clipping", "r_max", "rmax")),
    ({"renorm": True, "renorm_clipping": {1: 3}}, ValueError, ("renorm_clipping", "1", "rmax")),
    ({"renorm": True, "renorm_clipping": {"rmax": "3"}}, TypeError, ("renorm_clipping", "rmax", "'3'")),
    ({"renorm": True, "renorm_clipping": {"rmax": True}}, TypeError, ("renorm_clipping", "rmax", "True")),
    ({"renorm": True, "renorm_clipping": {"rmax": 0.5, "rmin": 2}}, ValueError, ("rmin", "rmax", "0.5", "2")),
    ({"renorm": True, "renorm_clipping": {"dmax": -1}}, ValueError, ("dmax", "-1")),
    ({"renorm": True, "renorm_clipping": {"dmax": math.nan}}, ValueError, ("dmax", "nan")),
    ({"renorm": True, "renorm_clipping": {"rmax": math.nan}}, ValueError, ("rmax", "nan")),
    ({"fused": True, "renorm": True}, ValueError, ("fused", "renorm")),
    ({"fused": True, "virtual_batch_size": 2}, ValueError, ("fused", "virtual_batch_size=2")),
    ({"fused": True, "adjustment": abs}, ValueError, ("fused", "adjustment")),
    ({"fused": True, "axis": (1, 2)}, ValueError, ("fused", "axis", "[1, 2]")),
    ({"fused": True, "axis": 0}, ValueError, ("fused", "axis", "0")),
    ({"fused": True, "dtype": np.dtype(np.float64)}, ValueError, ("fused", "float64")),
]


@pytest.mark.parametrize(("options", "error", "fragments"), ERRORS, ids=[str(e[0])[:60] for e in ERRORS])
def test_options_errors(options, error, fragments):
    with pytest.raises(error) as caught:
        Options(**options)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} is not in the message: {caught.value}"


def test_version_1_takes_fused_for_a_wish():
    Options(fused=True, renorm=True, strict_fused=False)


def test_options_cannot_change():
    options = Options()
    with pytest.raises(AttributeError):
        options.axis = 3


DTYPES = ["float8", "f4,f4", "f4,(", {}, [], 5, object(), np.array([1, 2]), np.int32, "complex64", "S4", ("f4", 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: repr(d).split(" at ")[0])
def test_dtypes_that_are_not_possible(dtype):
    with pytest.raises(TypeError, match="dtype must be one of float16, bfloat16, float32, float64; received"):
        nbbn.BatchNormalization(dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float32", "float32"), (np.float64, "float64"), (float, "float64"), (">f4", "float32"), ("bfloat16", "bfloat16")],
)
def test_dtypes_that_are_possible(dtype, name):
    layer = nbbn.BatchNormalization(dtype=dtype)
    assert layer.dtype == name
    y = layer(np.ones((4, 3), np.float64))
    assert y.dtype.name == name
    assert y.dtype.isnative
