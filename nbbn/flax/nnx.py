"""Batch normalization as a module of flax.nnx."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from nbbn.flax.options import mask_for, options_of
from nbbn.jax import batch_norm, initial_state


class BatchNorm(nnx.BatchNorm):
    """flax.nnx.BatchNorm with nbbn's kernels and options.

    The further arguments are options of nbbn.jax.batch_norm(); **arguments are Flax's. `use_fast_variance` changes
    nothing: statistics are always exact. Those of an `axis_name` count every value the same. What renorm and debiased
    averages have beside `mean` and `var` are further variables of the kind nnx.BatchStat.
    """

    def __init__(
        self,
        num_features: int,
        *,
        renorm: bool = False,
        renorm_clipping: Mapping[str, Any] | None = None,
        renorm_momentum: float = 0.99,
        virtual_batch_size: int | None = None,
        ragged: str = "error",
        virtual_batch_order: str = "interleaved",
        bessel_correction: bool = False,
        activation: str | None = None,
        debias: bool = False,
        skip_nonfinite: bool = False,
        ffi: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(num_features, **arguments)
        clipping = tuple(sorted(renorm_clipping.items())) if isinstance(renorm_clipping, Mapping) else renorm_clipping
        self.renorm, self.renorm_clipping, self.renorm_momentum = renorm, clipping, renorm_momentum
        self.virtual_batch_size, self.ragged, self.virtual_batch_order = virtual_batch_size, ragged, virtual_batch_order
        self.bessel_correction, self.activation, self.debias = bessel_correction, activation, debias
        self.skip_nonfinite, self.ffi = skip_nonfinite, ffi
        first = initial_state(num_features, renorm=renorm, momentum=self.momentum, debias=debias)
        self.statistics = tuple(first)
        for name in self.statistics:
            if name not in ("mean", "var"):
                setattr(self, name, nnx.BatchStat(first[name]))

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
        """The normalized input; in training the statistics move.

        Args:
            mask: broadcasts against the input; one that does not is as in nbbn.jax.batch_norm(), as are lengths,
                residual and adjustment.
            renorm_clipping: in the place of the module's, for bounds that change while a program runs.
        """
        inference = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="use_running_average must be given to BatchNorm or to its call; received None in both places",
        )
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        variables = {name: getattr(self, name) for name in self.statistics}
        # As Flax promotes them, together with the statistics, which keep their own dtype here.
        x, _, _, scale, bias = self.promote_dtype((x, self.mean[...], self.var[...], scale, bias), dtype=self.dtype)
        clipping = self.renorm_clipping if renorm_clipping is None else renorm_clipping
        y, new_state = batch_norm(
            x,
            scale,
            bias,
            {name: variable[...] for name, variable in variables.items()},
            training=not inference,
            mask=mask_for(x, mask),
            lengths=lengths,
            residual=residual,
            adjustment=adjustment,
            axis_name=self.axis_name,
            renorm_clipping=dict(clipping) if isinstance(clipping, tuple) else clipping,
            **options_of(self),
        )
        if not inference:
            for name, variable in variables.items():
                variable[...] = jax.lax.stop_gradient(new_state[name])
        return y
