"""What a SyncBatchNormalization is asked beside its calls: options, kernels compiled ahead, plans, configs, files."""

import threading
import warnings

import numpy as np
import pytest

import nbbn
from nbbn.deploy.needed import kernels
from nbbn.engine.cpu.moments import MERGE
from tests.helpers.concurrency import in_threads
from tests.helpers.ranks import Silent, X, bits, each_rank, make, on_ranks, refused, same, threads, works


def test_momentum_may_change():
    def run(group):
        layer = make(group)
        works(group, layer)
        layer.momentum = each_rank(group, [0.25, 1])
        refused(layer, lambda: layer(X[group.rank], training=True), r"momentum \(rank 0: 0.25, rank 1: 1\)")
        layer.momentum = 0.0
        works(group, layer)
        same(layer.moving_mean, X[:2].reshape(-1, 5).mean(0))

    on_ranks(threads(2), run)


def test_forced_choices():
    def run(group):
        layer = make(group)
        nbbn.force(layer, schedule="rows", parallel=False)
        works(group, layer)
        works(group, layer)

    on_ranks(threads(2), run)


STAGES = {"reduce", "finish", "apply", "merge"}
BACKWARD = {"reduce_gradient", "apply_gradient"}


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}, {"renorm": True}], ids=str)
def test_what_is_compiled_ahead(options):
    """The stages, and nothing is sent."""
    layer = make(Silent(), **options)
    for training in (False, True):
        for gradients in (False, True):
            found = kernels(layer, (12, 5), dtype="float64", training=training, gradients=gradients, residual=True)
            names = {kernel[0] for kernel in found}
            if training:
                assert names == STAGES | (BACKWARD if gradients else set())
                assert MERGE in found
            else:
                assert names == ({"infer", "freeze", "frozen_backward"} if gradients else {"infer"})
    assert not layer.built
    assert layer._exchange.calls == 0


@pytest.mark.parametrize(
    ("options", "samples"),
    [({}, 12), ({"virtual_batch_size": 2, "ragged": "spread"}, 7)],  # 7: parts, of which only some are contiguous
    ids=["plain", "ragged"],
)
def test_what_is_compiled_ahead_is_what_runs(options, samples, monkeypatch):
    asked = set()
    layers = [make(group, activation="relu", **options) for group in threads(2)]
    for layer in layers:
        engine = layer._dispatcher.engine(X[0])
        launch, middle = engine._launch, engine._run_middle

        def noted(plan, step, launch=launch):
            asked.add(plan.variant())
            launch(plan, step)

        def noted_middle(name, numbers, adjusted, middle=middle, engine=engine):
            asked.add(engine.middle(name, numbers, adjusted)[0])
            middle(name, numbers, adjusted)

        monkeypatch.setattr(engine, "_launch", noted)
        monkeypatch.setattr(engine, "_run_middle", noted_middle)
    x, residual = X[0][:samples], X[1][:samples]

    def run(layer):
        y, pullback = layer.vjp(x, True, np.ones(samples), residual=residual)
        pullback(y)

    in_threads([lambda la=la: run(la) for la in layers])
    found = kernels(
        make(Silent(), activation="relu", **options),
        (samples, 5),
        dtype="float64",
        training=True,
        gradients=True,
        mask=np.ones(samples),
        residual=True,
    )
    assert set(found) == {*asked, MERGE}


def test_explain_sends_nothing():
    layer = make(Silent())
    assert str(nbbn.explain(layer, X[0], training=True)).startswith("step          reduce")
    assert str(nbbn.explain(layer, X[0])).startswith("step          infer")
    layer.group = None
    assert str(nbbn.explain(layer, X[0], training=True)).startswith("step          train")


def test_a_config_has_no_group():
    layer = make(Silent(), axis=1, name="norm")
    with pytest.warns(UserWarning, match="the config of norm leaves out the group, which cannot be serialized"):
        config = layer.get_config()
    again = nbbn.SyncBatchNormalization.from_config(config)
    assert again.group is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.get_config() == config
    assert again.options == layer.options
    group = Silent()
    assert nbbn.SyncBatchNormalization.from_config({**config, "group": group}).group is group


def test_a_config_of_keras():
    """Whose layer with synchronized=True is this one."""
    config = {"name": "norm", "axis": -1, "momentum": 0.5, "synchronized": True}
    layer = nbbn.SyncBatchNormalization.from_config(config)
    assert layer.synchronized is True
    assert layer.momentum == 0.5
    assert layer.get_config()["synchronized"] is True


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_save_and_load(tmp_path, ending):
    path, loading = tmp_path / f"layer.{ending}", threading.Lock()

    def run(group):
        layer = make(group)
        works(group, layer)
        if group.rank == 0:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                layer.save(path)
            assert any("leaves out the group" in str(w.message) for w in said)
        group.all_gather(np.zeros(1))
        with loading:  # NumPy parses the heads of arrays by `ast`, which in Python 3.11 is for one thread at a time
            again = nbbn.SyncBatchNormalization.load(path, group=group)
        assert bits(again) == bits(layer)
        works(group, again)
        works(group, layer)
        assert bits(again) == bits(layer)

    on_ranks(threads(2), run)
    alone = nbbn.SyncBatchNormalization.load(path)
    assert alone.group is None
    with pytest.raises(ValueError, match=r"has a nbbn\.SyncBatchNormalization: call the load\(\) of that class"):
        nbbn.load(path)
