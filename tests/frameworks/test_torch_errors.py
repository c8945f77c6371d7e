"""What nbbn.torch's modules and function refuse, and what may be changed once a module is made."""

import copy

import pytest
import torch
from torch.testing import assert_close

import nbbn.torch

pytestmark = pytest.mark.frameworks

X = torch.randn(6, 4)


def alone_outside(x):
    """A training call of a process that is not in the group."""
    return nbbn.torch.SyncBatchNorm(4, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER)(x)


ERRORS = [
    (ValueError, "Expected more than 1 value per channel", lambda m: m(torch.randn(1, 4))),
    (ValueError, r"num_features=4 in dimension 1; received shape \(3, 5\)", lambda m: m(torch.randn(3, 5))),
    (ValueError, "expected 2D or 3D input", lambda m: m(torch.randn(3, 4, 2, 2))),
    (TypeError, "input must be a tensor of float16.*int32", lambda m: m(torch.zeros(3, 4, dtype=torch.int32))),
    (TypeError, "input must be a tensor.*list", lambda m: m([[1.0]])),
    (
        ValueError,
        r"residual must have the input's shape \(6, 4\); received \(3, 5\)",
        lambda m: m(X, torch.randn(3, 5)),
    ),
    (TypeError, "residual must be a tensor; received float", lambda m: m(X, 1.0)),
    (ValueError, r"residual must be on the input's device", lambda m: m(X, X.to("meta"))),
    (ValueError, r"mask must have .* received shape \(5,\)", lambda m: m(X, mask=torch.ones(5))),
    (ValueError, "mask must be finite .* not negative", lambda m: m(X, mask=-torch.ones(6))),
    (TypeError, "mask must be a tensor", lambda m: m(X, mask=True)),
    (TypeError, "momentum must be a finite number.*'a'", lambda m: nbbn.torch.BatchNorm1d(4, momentum="a")),
    (ValueError, "activation must be 'relu'.*'gelu'", lambda m: nbbn.torch.BatchNorm1d(4, activation="gelu")),
    (TypeError, "axis must be an int", lambda m: nbbn.torch.BatchNorm1d(4, axis=(1, 2))),
    (ValueError, "renorm_clipping needs renorm", lambda m: nbbn.torch.BatchNorm1d(4, renorm_clipping={"rmax": 2})),
    (
        ValueError,
        "track_running_stats=False",
        lambda m: nbbn.torch.BatchNorm1d(4, renorm=True, track_running_stats=False),
    ),
    *(
        (
            TypeError,
            f"{name} must be True or False; received 'no'",
            lambda m, name=name: nbbn.torch.BatchNorm1d(4, **{name: "no"}),
        )
        for name in ("affine", "track_running_stats", "bias")
    ),
    (
        ValueError,
        "virtual_batch_size=5 must divide .* 6 samples",
        lambda m: nbbn.torch.BatchNorm1d(4, virtual_batch_size=5)(X),
    ),
    (ValueError, "running_mean and running_var must be", lambda m: nbbn.torch.functional.batch_norm(X, None, None)),
    (
        ValueError,
        "come together",
        lambda m: nbbn.torch.functional.batch_norm(X, m.running_mean, None, training=True),
    ),
    (
        ValueError,
        r"weight must have shape \(4,\).*received \(3,\)",
        lambda m: nbbn.torch.functional.batch_norm(X, None, None, torch.ones(3), training=True),
    ),
    (
        TypeError,
        r"dtype torch.float64 for an input of torch.float64; received .*running_var of torch.float32",
        lambda m: nbbn.torch.functional.batch_norm(X.double(), m.running_mean, m.running_var, training=True),
    ),
    (ValueError, "process_group .* that this process is in; received -100", lambda m: alone_outside(X)),
    (TypeError, "received weight of torch.float32", lambda m: nbbn.torch.SyncBatchNorm(4)(X.double())),
]


@pytest.mark.parametrize(("kind", "message", "call"), ERRORS)
def test_errors(kind, message, call):
    module = nbbn.torch.BatchNorm1d(4)
    module(X)
    before = copy.deepcopy(module.state_dict())
    for _ in range(2):
        with pytest.raises(kind, match=message):
            call(module)
    assert_close(module.state_dict(), before)


def test_what_may_be_changed_later():
    """Numbers and the adjustment; not what a module was made for."""
    module, x = nbbn.torch.BatchNorm1d(4), torch.randn(6, 4)
    y = module(x)
    module.adjustment = lambda shape: (2.0, 1.0)
    assert_close(module(x), 2 * y + 1)
    with pytest.raises(AttributeError, match="activation of a BatchNorm1d is fixed, None"):
        module.activation = "relu"
    renorm = nbbn.torch.BatchNorm1d(4, renorm=True, renorm_clipping={"rmax": 1.0, "rmin": 1.0, "dmax": 0.0})
    assert_close(renorm(x), y)
    renorm.renorm_clipping = {"rmax": 2.0, "rmin": 2.0, "dmax": 0.0}
    assert_close(renorm(x), 2 * y)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("renorm_clipping", {"dmin": 1.0}, "accepts the keys .*dmin"),
        ("renorm_clipping", "x", "must be a dict .* received 'x'"),
        ("renorm_momentum", None, "renorm_momentum must be a finite number .* received None"),
        ("momentum", "a", "momentum must be a finite number .* received 'a'"),
    ],
)
def test_what_is_changed_later_is_checked(name, value, message):
    module = nbbn.torch.BatchNorm1d(4, renorm=True)
    before = getattr(module, name)
    with pytest.raises((TypeError, ValueError), match=message):
        setattr(module, name, value)
    assert getattr(module, name) == before


def test_bounds_without_renorm():
    module = nbbn.torch.BatchNorm1d(4)
    with pytest.raises(ValueError, match="renorm_clipping needs renorm=True"):
        module.renorm_clipping = {"rmax": 2.0}
    with pytest.raises(ValueError, match="renorm_clipping needs renorm=True"):
        nbbn.torch.functional.batch_norm(X, None, None, training=True, renorm_clipping={"rmax": 2.0})
    renorm = nbbn.torch.BatchNorm1d(4, renorm=True, renorm_clipping={})
    renorm.renorm_clipping["dmin"] = 1.0
    with pytest.raises(ValueError, match=r"accepts the keys .*dmin"):
        renorm(X)
