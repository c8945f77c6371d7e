"""Streams, graphs and devices: nothing waits for the host, and nothing overtakes."""

import pytest

import nbbn

BUSY = 50_000_000  # clock cycles that a stream is kept busy with, some 0.03 s: who does not wait for it is early


def layers(torch, shape, count, **options):
    """Built layers with the same weights on the GPU."""
    found = [nbbn.BatchNormalization(axis=1, **options) for _ in range(count)]
    for layer in found:
        layer.build(shape)
        layer.to("cuda")
    return found


def statistics(layer):
    return [w.tolist() for w in layer.get_weights()[2:]]


@pytest.mark.parametrize("shape", [(8, 16, 64), (64, 32, 28, 28)], ids=["one launch", "two launches"])
def test_kernels_run_in_the_current_stream(torch, shape):
    """After what fills the input, and before what overwrites it."""
    layer, other = layers(torch, shape, 2)
    values, stream = torch.randn(shape, device="cuda"), torch.cuda.Stream()
    x = torch.zeros_like(values)
    expected = other(values, training=True)
    layer(x)  # compiles
    layer(x, training=True, update_statistics=False)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY)
        x.copy_(values)
        y = layer(x, training=True)
        x.zero_()
    stream.synchronize()
    assert torch.equal(y, expected)
    assert statistics(layer) == statistics(other)


def test_the_host_is_not_kept_waiting(torch):
    """The call returns while the stream is still busy with what came before."""
    shape = (64, 32, 28, 28)
    (layer,) = layers(torch, shape, 1)
    x = torch.randn(shape, device="cuda")
    y, pullback = layer.vjp(x, training=True)
    pullback(y)
    layer(x)
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(20 * BUSY)
    done.record()
    layer(x)
    y, pullback = layer.vjp(x, training=True)
    pullback(y)
    assert not done.query()
    torch.cuda.synchronize()


def test_two_streams_at_once(torch):
    """Each with scratch memory and counters of its own."""
    shape = (32, 48, 28, 28)
    pair, alone = layers(torch, shape, 2), layers(torch, shape, 2)
    inputs = [torch.randn(shape, device="cuda") * (i + 1) for i in range(2)]
    expected = [[alone[i](inputs[i], training=True) for _ in range(30)] for i in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = [[], []]
    for _ in range(30):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i].append(pair[i](inputs[i], training=True))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[i], expected[i], strict=True))
        assert statistics(pair[i]) == statistics(alone[i])


@pytest.mark.parametrize("shape", [(8, 16, 64), (64, 32, 28, 28)], ids=["one launch", "two launches"])
def test_a_captured_training_call_is_one_each_time(torch, shape):
    layer, other = layers(torch, shape, 2, momentum=0.5)
    x, stream = torch.randn(shape, device="cuda"), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and makes what stays for all calls
        layer(x, training=True)
        layer.vjp(x, training=True)[1](x)
    other(x, training=True)
    other(x, training=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, pullback = layer.vjp(x, training=True)
        gradients = pullback(x)
    assert statistics(layer) == statistics(other)  # capturing computes nothing
    for i in range(3):
        x.copy_(torch.randn(shape, device="cuda") * (i + 1))
        graph.replay()
        expected, pullback = other.vjp(x, training=True)
        right = pullback(x)
        assert torch.equal(y, expected)
        for name in ("inputs", "gamma", "beta"):
            assert torch.equal(getattr(gradients, name), getattr(right, name)), name
        assert statistics(layer) == statistics(other)


def test_a_captured_inference_call_sees_new_weights(torch):
    shape = (16, 8, 10, 10)
    (layer,) = layers(torch, shape, 1)
    x, y = torch.randn(shape, device="cuda"), torch.empty(shape, device="cuda")
    layer(x, out=y)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, out=y)
    gamma, *others = layer.get_weights()
    layer.set_weights([gamma * 3, *others])
    graph.replay()
    assert torch.equal(y, layer(x))


def test_two_devices(torch):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs; there are {torch.cuda.device_count()}")
    shape = (32, 16, 28, 28)
    first, second = layers(torch, shape, 2)
    second.to("cuda:1")
    values = torch.randn(shape)
    inputs = [values.to(f"cuda:{i}") for i in range(2)]
    found = [[layer(x, training=True) for _ in range(10)] for layer, x in zip((first, second), inputs, strict=True)]
    assert [ys[-1].device.index for ys in found] == [0, 1]
    assert torch.equal(found[0][-1].cpu(), found[1][-1].cpu())
    assert statistics(first) == statistics(second)
    with pytest.raises(ValueError, match="cuda:1"):
        second(inputs[0])
    with torch.cuda.device(1):  # which device is current decides nothing
        assert torch.equal(first(inputs[0], training=True, update_statistics=False), found[0][-1])


def given_by_the_host(torch, put):
    """What stands beside an input of (64, 32, 20), by kinds of calls: options of a layer, and arguments of a call."""
    mask, lengths = torch.rand(64, 20) > 0.3, torch.randint(0, 21, (64,))
    a, b = torch.rand(64, 1, 1) + 0.5, torch.rand(1, 32, 1)
    momenta = iter([i / 1000 for i in range(1000)])
    return {
        "mask": ({}, {"mask": put(mask)}),
        "weights": ({}, {"mask": put(mask.to(torch.float64))}),
        "lengths": ({}, {"lengths": put(lengths)}),
        "adjustment": ({"adjustment": lambda shape: (put(a), put(b))}, {}),
        "ragged": ({"virtual_batch_size": 24, "ragged": "spread", "virtual_batch_order": "contiguous"}, {}),
        "schedule": ({"momentum": lambda: next(momenta)}, {}),
    }


@pytest.mark.parametrize("where", ["host", "GPU"])
@pytest.mark.parametrize("kind", ["mask", "weights", "lengths", "adjustment", "ragged", "schedule"])
def test_the_host_is_not_kept_waiting_by_what_stands_beside_the_input(torch, kind, where):
    """Once as many numbers of a schedule have been kept as there may be, and memory is pinned."""
    gpu = where == "GPU"
    options, beside = given_by_the_host(torch, lambda t: t.cuda() if gpu else t.numpy())[kind]
    if kind == "adjustment" and gpu:
        pair = options["adjustment"](None)
        options = {"adjustment": lambda shape: pair}
    (layer,) = layers(torch, (64, 32, 20), 1, **options)
    x = torch.randn((64, 32, 20), device="cuda")

    def call():
        y, pullback = layer.vjp(x, training=True, **beside)
        return y, pullback(y)

    for _ in range(40):
        call()
    done = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(40 * BUSY)
    done.record()
    y, gradients = call()
    assert not done.query()
    torch.cuda.synchronize()
    assert y.is_cuda
    assert all(g.is_cuda for g in gradients.adjustment or ())
