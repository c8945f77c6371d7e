"""Batch normalization as a module of flax.linen."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.linen import dtypes

from nbbn.core.layout import resolve_axis
from nbbn.flax.options import called, mask_for, options_of
from nbbn.jax import batch_norm, initial_state


class BatchNorm(nn.BatchNorm):
    """flax.linen.BatchNorm with nbbn's kernels and options.

    The first fields are Flax's. `use_fast_variance` and `force_float32_reductions` change nothing but, as there, the
    dtype of the statistics: they are always exact. Statistics of an `axis_name` count every value the same. The others
    are options of nbbn.jax.batch_norm(). Their further statistics are further variables of "batch_stats".
    """

    renorm: bool = False
    renorm_clipping: Mapping[str, Any] | None = None
    renorm_momentum: float = 0.99
    virtual_batch_size: int | None = None
    ragged: str = "error"
    virtual_batch_order: str = "interleaved"
    bessel_correction: bool = False
    activation: str | None = None
    debias: bool = False
    skip_nonfinite: bool = False
    ffi: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.renorm_clipping, Mapping):  # which makes the module hashable, as a static argument has to be
            object.__setattr__(self, "renorm_clipping", FrozenDict(self.renorm_clipping))
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        lengths: Any = None,
        residual: Any = None,
        adjustment: Any = None,
        renorm_clipping: Mapping[str, Any] | None = None,
    ) -> jax.Array:
        """The normalized input; in training, unless the module is being initialized, the statistics move.

        Args:
            mask: broadcasts against the input; one that does not is as in nbbn.jax.batch_norm(), as are lengths,
                residual and adjustment.
            renorm_clipping: in the place of the field, for bounds that change while a program runs.
        """
        inference = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        x = jnp.asarray(x)
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        features = [x.shape[i] for i in resolve_axis(axes, x.ndim)]
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        first = initial_state(
            tuple(features), renorm=self.renorm, momentum=self.momentum, debias=self.debias, dtype=dtype
        )
        state = {n: self.variable("batch_stats", n, lambda value: value, value) for n, value in first.items()}
        scale = self.param("scale", self.scale_init, features, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        result = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        clips = self.renorm_clipping if renorm_clipping is None else renorm_clipping
        options = options_of(self) | {"renorm_clipping": clips}
        y, new_state = batch_norm(
            x.astype(jnp.promote_types(x.dtype, result)),
            scale,
            bias,
            {name: variable.value for name, variable in state.items()},
            training=not inference,
            mask=mask_for(x, mask),
            lengths=lengths,
            residual=residual,
            adjustment=adjustment,
            axis_name=None if self.is_initializing() else self.axis_name,
            **(called(options) if self.is_initializing() else options),
        )
        if not (inference or self.is_initializing()):
            for name, variable in state.items():
                variable.value = new_state[name]
        return y.astype(result)
