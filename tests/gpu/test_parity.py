"""The layer on a GPU against torch.nn.functional.batch_norm on the same GPU: the same arithmetic, other kernels."""

import pytest

import nbbn

MOMENTUM, EPSILON = 0.9, 1e-3
# Half a unit in the last place of what is stored, twice where something is added before the rounding; float32 results
# have a few roundings of float32 behind them, and float64 ones PyTorch's sums over up to 4e6 values.
UNITS = {"float32": 2e-6, "float16": 2**-10, "bfloat16": 2**-7, "float64": 1e-12}
# Of PyTorch's own sums in float32: half a unit for each value at worst, most of which cancel.
LOSS_PER_VALUE = 0.01 * 2**-23
# name: shape, axis; planes and rows, one launch and two, chunks, channels that are no multiple of anything
SHAPES = {
    "images nchw": ((32, 64, 28, 28), 1),
    "images nhwc": ((32, 28, 28, 64), -1),
    "odd nchw": ((7, 13, 5, 9), 1),
    "odd nhwc": ((7, 5, 9, 13), -1),
    "one channel": ((1, 1, 1 << 22), 1),
    "few channels": ((64, 256, 256, 3), -1),
    "dense": ((4096, 512), -1),
    "small": ((32, 64), -1),
    "100,000 channels": ((4, 100_000), -1),
    "100,000 planes": ((2, 100_000, 3), 1),
}
EVERY_SHAPE = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
EVERY_DTYPE = pytest.mark.parametrize("dtype", UNITS)


class Pair:
    """A layer, and the tensors with which PyTorch computes the same."""

    def __init__(self, torch, shape, axis, dtype, spread=1.0, shift=0.5):
        self.torch, self.axis, self.rank = torch, axis, len(shape)
        self.dtype = getattr(torch, dtype)
        self.stored = torch.float64 if dtype == "float64" else torch.float32
        channels = shape[axis]
        self.x = self._random(shape, spread, shift)
        self.dy = self._random(shape)
        self.weights = [torch.rand(channels, dtype=self.stored, device="cuda") + 0.5 for _ in range(4)]
        self.layer = nbbn.BatchNormalization(axis, MOMENTUM, EPSILON, dtype=dtype, bessel_correction=True)
        self.layer.build(shape)
        self.layer.set_weights([w.cpu().numpy() for w in self.weights])
        self.layer.to("cuda")

    def _random(self, shape, spread=1.0, shift=0.0):
        values = self.torch.randn(shape, dtype=self.stored, device="cuda")
        return values.mul_(spread).add_(shift).to(self.dtype)

    def pytorch(self, dtype, training):
        """y, the running statistics, and the gradients of x, gamma and beta, computed in `dtype` from the same values.
        Statistics are never narrower than float32."""
        torch = self.torch
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        x, dy = (t.to(dtype).movedim(self.axis, 1) for t in (self.x, self.dy))
        gamma, beta, mean, variance = (w.to(wide).clone() for w in self.weights)
        leaves = [t.detach().requires_grad_() for t in (x, gamma, beta)]
        y = torch.nn.functional.batch_norm(leaves[0], mean, variance, *leaves[1:], training, 1 - MOMENTUM, EPSILON)
        dx, dgamma, dbeta = torch.autograd.grad(y, leaves, dy)
        return [y.detach().movedim(1, self.axis), mean, variance, dx.movedim(1, self.axis), dgamma, dbeta]

    def own(self, training):
        """The same by the layer."""
        y, pullback = self.layer.vjp(self.x, training=training)
        gradients = pullback(self.dy)
        _, _, mean, variance = (self.torch.tensor(w, device="cuda") for w in self.layer.get_weights())
        assert (y.dtype, y.device, type(y)) == (self.x.dtype, self.x.device, self.torch.Tensor)
        return [y, mean, variance, gradients.inputs, gradients.gamma, gradients.beta]

    @property
    def per_channel(self):
        return self.x.numel() // self.weights[0].numel()

    def check(self, found, expected, units, loss=0.0):
        """Elements to `units` of their own size and that of the terms; sums over m values to that of root of m terms
        rounded to float32, or float64 for float64. loss: of the statistics in `expected`, which elements share."""
        fine = loss + 8 * UNITS["float64" if self.stored is self.torch.float64 else "float32"]
        sums = fine * self.per_channel**0.5
        names = ("y", "mean", "variance", "dx", "dgamma", "dbeta")
        bounds = (units + loss, fine, fine, units + loss, sums, sums)
        for name, f, e, bound in zip(names, found, expected, bounds, strict=True):
            assert f.shape == e.shape, name
            scale = e.double().abs() + 4  # gamma * x_hat and beta, before they are added
            worst = float(((f.double() - e.double()).abs() / scale).max())
            assert worst <= bound, f"{name}: {worst:.3g} > {bound:.3g}"


@EVERY_DTYPE
@EVERY_SHAPE
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_agrees_with_pytorch(torch, shape, axis, dtype, training):
    """With PyTorch in float64, which tells who is right, and in the same dtype, whose errors come on top."""
    pair = Pair(torch, shape, axis, dtype)
    found = pair.own(training)
    pair.check(found, pair.pytorch(torch.float64, training), UNITS[dtype])
    loss = 0.0 if dtype == "float64" else LOSS_PER_VALUE * pair.per_channel
    pair.check(found, pair.pytorch(pair.dtype, training), 4 * UNITS[dtype], loss)


@pytest.mark.parametrize("shape", [(1024, 8, 64), (64, 8, 1024)], ids=["rows", "planes"])
def test_a_large_mean_costs_no_digits(torch, shape):
    """|mean| / std = 1e4 in float32: the variance must be right to 1e-5, where a mean of squares has no digit left."""
    axis = 1 if shape[0] == 64 else -1
    pair = Pair(torch, shape, axis, "float32", shift=1e4)
    pair.layer(pair.x, training=True)
    reduced = [i for i in range(3) if i != axis % 3]
    expected = pair.x.double().var(reduced, correction=1)
    found = (torch.tensor(pair.layer.get_weights()[3], device="cuda").double() - MOMENTUM * pair.weights[3]) / 0.1
    # The moving variance is rounded to float32, and is ten times the share that the batch has in it.
    torch.testing.assert_close(found, expected, rtol=1e-5 + 20 * 2**-24, atol=0)


@EVERY_DTYPE
def test_channels_last_memory_of_an_nchw_tensor(torch, dtype):
    """Read as it lies; the result has the same memory format."""
    pair = Pair(torch, (16, 24, 14, 14), 1, dtype)
    plain = pair.layer(pair.x)
    pair.x = pair.x.contiguous(memory_format=torch.channels_last)
    last = pair.layer(pair.x)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, plain, rtol=0, atol=0)
    pair.check(pair.own(True), pair.pytorch(torch.float64, True), UNITS[dtype])


def test_slices_and_transposes_are_read_in_place(torch):
    pair = Pair(torch, (16, 24, 14, 14), 1, "float32")
    for view in (pair.x[:, :, 2:-3, 1:-1], pair.x[::2], pair.x.transpose(2, 3), pair.x[:1].expand(4, -1, -1, -1)):
        torch.testing.assert_close(pair.layer(view), pair.layer(view.contiguous()), rtol=0, atol=0)


@EVERY_DTYPE
def test_the_same_input_gives_the_same_bits(torch, dtype):
    pair = Pair(torch, (64, 96, 31, 17), 1, dtype)
    first, *others = ([t.clone() for t in pair.own(False)] for _ in range(10))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    y, *more = (pair.layer(pair.x, training=True, update_statistics=False) for _ in range(10))
    assert all(torch.equal(y, other) for other in more)


def test_nan_and_infinity_stay_in_their_channel(torch):
    pair = Pair(torch, (8, 16, 9, 9), 1, "float32")
    clean = pair.layer(pair.x, training=True, update_statistics=False)
    pair.x[3, 5, 2, 2], pair.x[1, 7, 0, 0] = float("nan"), float("inf")
    y = pair.layer(pair.x, training=True, update_statistics=False)
    poisoned = (~y.isfinite()).any(dim=(0, 2, 3)).nonzero().flatten().tolist()
    assert poisoned == [5, 7]
    others = [c for c in range(16) if c not in poisoned]
    assert torch.equal(y[:, others], clean[:, others])
