"""What users of nbbn.jax see when something is wrong."""

import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import nbbn
from nbbn.jax import batch_norm, initial_state, policy

pytestmark = pytest.mark.frameworks

X = np.random.default_rng(5).normal(3, 2, (8, 4)).astype(np.float32)
STATE = initial_state(4)
ONES = np.ones(4, np.float32)


def call(x=X, scale=ONES, bias=ONES, state=STATE, **options):
    return batch_norm(x, scale, bias, state, **{"training": True} | options)


WRONG = {
    "x is a list": ({"x": [1.0]}, TypeError, "x must be an array of JAX or NumPy; received list"),
    "x has integers": ({"x": np.ones((3, 4), int)}, TypeError, "x must be an array of float16.*received dtype int64"),
    "x is a scalar": ({"x": np.float32(1)}, ValueError, r"x must have at least one dimension; .* shape \(\)"),
    "scale's shape": ({"scale": np.ones(3)}, ValueError, r"scale must have shape \(4,\); received \(3,\)"),
    "bias has integers": (
        {"bias": np.ones(4, int)},
        TypeError,
        "bias must be an array of floats; received dtype int32",
    ),
    "no state": ({"state": None}, ValueError, r"state must be a dict with the keys \['mean', 'var'\].*NoneType"),
    "state of renorm": (
        {"renorm": True},
        ValueError,
        r"'renorm_stddev'\] for these options; received \['mean', 'var'\]",
    ),
    "state's shape": ({"state": STATE | {"var": np.ones(3)}}, ValueError, r"state\['var'\] must have shape \(4,\)"),
    "axis": ({"axis": 2}, ValueError, "axis must be between -2 and 1 for an input of rank 2; received 2"),
    "momentum": ({"momentum": 1.5}, ValueError, "momentum must be .*; received 1.5"),
    "momentum is no scalar": ({"momentum": jnp.ones(3)}, ValueError, r"momentum must be a scalar; .* shape \(3,\)"),
    "epsilon": ({"epsilon": -1.0}, ValueError, "epsilon must be .*; received -1.0"),
    "training": ({"training": "yes"}, TypeError, "training must be True or False; received 'yes'"),
    "ffi": ({"ffi": None}, TypeError, "ffi must be True or False; received None"),
    "activation": ({"activation": "gelu"}, ValueError, "activation must be 'relu', 'linear' or None; received 'gelu'"),
    "bounds": ({"renorm_clipping": {"rmax": 2.0}}, ValueError, "renorm_clipping needs renorm=True; received .*2.0"),
    "clip": ({"renorm_clipping": {"rmax": 2.0, "rmaxx": 1}}, ValueError, r"accepts the keys .* received \['rmaxx'\]"),
    "residual": (
        {"residual": np.ones((8, 3))},
        ValueError,
        r"residual must have the input's shape \(8, 4\); .*\(8, 3\)",
    ),
    "mask": (
        {"mask": np.ones(7)},
        ValueError,
        r"mask must broadcast against .* dimensions \(8,\).* received shape \(7,\)",
    ),
    "mask is negative": ({"mask": -np.ones(8)}, ValueError, "mask must be finite and not negative; received from -1.0"),
    "two masks": (
        {"mask": np.ones(8), "lengths": np.ones(8, int)},
        ValueError,
        "mask and lengths both say what counts",
    ),
    "lengths": ({"lengths": np.ones(8, int)}, ValueError, "lengths need an input with samples in dimension 0"),
    "adjustment": ({"adjustment": (1.0,)}, ValueError, r"adjustment must be, or give, a pair .*; received tuple"),
    "adjustment's shape": (
        {"adjustment": (ONES, np.ones(3))},
        ValueError,
        r"adjustment's bias must broadcast .*\(3,\)",
    ),
    "ghost": ({"virtual_batch_size": 3}, ValueError, "virtual_batch_size=3 must divide the batch .* of 8 samples"),
    "ghost of features": (
        {"virtual_batch_size": 4, "axis": 0},
        ValueError,
        "axis must not include the batch dimension",
    ),
    "scale is a text": ({"scale": "one"}, TypeError, "scale must be an array of real numbers; received 'one'"),
    "state has a text": (
        {"state": STATE | {"mean": "zero"}},
        TypeError,
        r"state\['mean'\] must be an array of real numbers; received 'zero'",
    ),
    "residual is a text": ({"residual": "x"}, TypeError, "residual must be an array of real numbers; received 'x'"),
    "residual is complex": (
        {"residual": X * 1j},
        TypeError,
        "residual must be an array of real numbers; received dtype complex64",
    ),
    "adjustment is complex": (
        {"adjustment": (1.0, 1j)},
        TypeError,
        "adjustment's bias must be an array of real numbers; received dtype complex64",
    ),
    "unknown axis name": ({"axis_name": "i"}, NameError, "unbound axis name: i"),
}


@pytest.mark.parametrize("ffi", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name, ffi):
    arguments, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call(**{"ffi": ffi} | arguments)


def test_lengths_of_steps():
    x = np.ones((4, 3, 2), np.float32)
    state = initial_state(2)
    for kind in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match=r"lengths must be integers; received .*float"):
            batch_norm(x, None, None, state, training=True, lengths=kind(np.ones(4)))
        with pytest.raises(ValueError, match=r"lengths must have shape \(4,\), one for each sample; received \(3,\)"):
            batch_norm(x, None, None, state, training=True, lengths=kind(np.ones(3, int)))
    with pytest.raises(ValueError, match=r"lengths must be from 0 to 3, .*; received values from 1 to 4"):
        batch_norm(x, None, None, state, training=True, lengths=np.array([1, 2, 3, 4]))


def test_the_dtype_of_a_state():
    with pytest.raises(TypeError, match="dtype must be one of floats; received int32"):
        initial_state(4, dtype=np.int32)


def test_training_is_no_value_of_a_program():
    with pytest.raises(TypeError, match="training must be True or False, known while a program is traced"):
        jax.jit(lambda training: call(training=training))(True)


def test_forward_mode_is_refused():
    """By JAX, with a message that says so; in inference it is XLA's own."""
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: call(x)[0], (X,), (X,))


def test_an_empty_batch_changes_nothing():
    y, state = jax.jit(partial(batch_norm, training=True))(X[:0], ONES, ONES, STATE)
    assert y.shape == (0, 4)
    assert all(np.array_equal(state[name], STATE[name]) for name in STATE)
    dx, dscale = jax.grad(lambda x, s: batch_norm(x, s, ONES, STATE, training=True)[0].sum(), (0, 1))(X[:0], ONES)
    assert dx.shape == (0, 4)
    assert not np.any(dscale)


def test_nan_stays_in_its_channel():
    x = X.copy()
    x[3, 1] = np.nan
    y, _ = jax.jit(partial(batch_norm, training=True))(x, ONES, ONES, STATE)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(np.delete(y, 1, axis=1)).all()
    kept = call(x, skip_nonfinite=True)[1]
    assert kept["mean"][1] == STATE["mean"][1]


def test_a_handler_that_fails_is_an_error_of_the_program(monkeypatch):
    """Not the end of the process: here no pool can be had when the program runs."""
    x = np.ones((64, 64, 64), np.float32)
    state = initial_state(64)
    if nbbn.explain(nbbn.BatchNormalization(), x, training=True).schedule.parallel is False:
        pytest.skip("one thread: no step is parallel, and so none asks when it runs")
    run = jax.jit(partial(batch_norm, training=True))
    first, _ = jax.block_until_ready(run(x, None, None, state))

    def fail():
        raise MemoryError("there is none")

    with monkeypatch.context() as patch:
        patch.setattr(policy, "parallel_region", lambda elements: fail())
        # JAX raises the one where it waits for a program, the other where it runs it at once.
        with pytest.raises(
            (jax.errors.JaxRuntimeError, ValueError), match="a step of batch normalization could not be run"
        ):
            jax.block_until_ready(run(x, None, None, state))
    np.testing.assert_array_equal(run(x, None, None, state)[0], first)


FRESH = """
import sys, time
import jax, numpy as np
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from nbbn.jax import batch_norm, initial_state
x = np.random.default_rng(0).normal(3, 2, (8, 4)).astype(np.float32)
run = jax.jit(lambda x: batch_norm(x, None, None, initial_state(4), training=True))
y, state = run(x)
np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=0, atol=1e-5)
print(float(state["mean"][0]).hex())
"""


def test_programs_of_jaxs_cache(tmp_path):
    """Another process runs the program that this one has compiled: no address of a kernel is in it."""
    runs = [
        subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout != ""
    assert list(tmp_path.iterdir()) != []


def test_a_shape_that_is_not_known():
    """Inference takes it; kernels do not."""
    (x,) = export.symbolic_args_specs([X], "batch, 4")
    assert export.export(jax.jit(partial(call, training=False)))(x).in_avals[0].shape[1] == 4
    with pytest.raises(ValueError, match=r"x must have a known shape in training; received \(batch, 4\)"):
        export.export(jax.jit(call))(x)


def test_inference_is_exported():
    """It has no call of a kernel, which JAX would not take."""
    run = jax.jit(lambda x: batch_norm(x, ONES, ONES, STATE, training=False)[0])
    loaded = export.deserialize(export.export(run)(jax.typeof(jnp.asarray(X))).serialize())
    np.testing.assert_array_equal(loaded.call(X), run(X))
    with pytest.raises(ValueError, match="custom calls whose targets have no compatibility guarantees"):
        export.export(jax.jit(call))(jax.typeof(jnp.asarray(X)))


def test_importing_nbbn_loads_no_jax():
    code = "import sys, nbbn; assert not [m for m in sys.modules if m.split('.')[0] in ('jax', 'jaxlib', 'flax')]"
    subprocess.run([sys.executable, "-c", code], check=True)


IN_THREADS = """
import threading
import jax, numba, numpy as np
from numba import njit, prange
from nbbn.jax import batch_norm, initial_state
from nbbn.runtime import start_pool

assert start_pool() == "workqueue"
x = np.random.default_rng(0).normal(3, 2, (128, 32, 32, 64)).astype(np.float32)  # enough for workqueue to be worth it
run = jax.jit(jax.value_and_grad(lambda x: (batch_norm(x, None, None, initial_state(64), training=True)[0] ** 2).sum()))
expected = run(x)[1]
found = []
threads = [threading.Thread(target=lambda: found.append(run(x)[1])) for _ in range(4)]
[t.start() for t in threads]

@njit(parallel=True)
def total(x):
    found = 0.0
    for i in prange(x.size):
        found += x[i]
    return found

flat = np.ones(1 << 20)
for _ in range(20):
    assert total(flat) == flat.size
[t.join() for t in threads]
for dx in found:
    np.testing.assert_array_equal(dx, expected)
print("done", len(found))
"""


def test_threads_and_the_layer_that_bears_none():
    """numba's workqueue aborts a process in which two threads run parallel kernels: here a program in four of them, and
    somebody else's kernel beside."""
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue"}
    done = subprocess.run(
        [sys.executable, "-c", IN_THREADS], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 4\n"
