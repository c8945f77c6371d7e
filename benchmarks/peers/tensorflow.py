"""TensorFlow on the CPU: its fused kernels, on inputs presented as images, in tf.function. It always allocates."""

import importlib
import os
from typing import Any

import numpy as np

from benchmarks.peers import CannotDo, Contender, plain_only
from benchmarks.problem import EPSILON, MOMENTUM, Problem


def version() -> str:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # it greets on stderr, through the progress bar
    return str(importlib.import_module("tensorflow").__version__)


def prepare(problem: Problem, mode: str) -> dict[str, Contender]:
    plain_only(problem, "TensorFlow's fused kernel")
    if problem.case.dtype == "float64":
        raise CannotDo("TensorFlow's fused kernel does not take float64")
    tf: Any = importlib.import_module("tensorflow")
    tf.get_logger().setLevel("ERROR")  # a function per case is meant
    step = _Step(tf, problem)
    call, read = step.backward() if mode == "backward" else step.forward(mode == "training")
    return {"ordinary": Contender(call, read)}


class _Step:
    def __init__(self, tf: Any, problem: Problem) -> None:
        self.tf, self.problem, case = tf, problem, problem.case
        self.format = "NHWC" if case.channels_last else "NCHW"
        self.shape = (1, -1, 1, case.channels) if case.channels_last else (case.shape[0], case.channels, -1, 1)
        self.x, self.dy = self._image(problem.x), self._image(problem.dy)
        self.residual = None if problem.residual is None else self._image(problem.residual)
        arrays = (problem.gamma, problem.beta, problem.mean, problem.variance)
        self.gamma, self.beta, self.mean, self.variance = (tf.constant(a) for a in arrays)

    def _image(self, array: np.ndarray) -> Any:
        return self.tf.reshape(self.tf.constant(array), self.shape)

    def _array(self, tensor: Any) -> np.ndarray:
        return np.asarray(tensor).reshape(self.problem.case.shape)  # its method numpy() would copy

    def _normalize(self, x: Any, training: bool) -> Any:
        return self.tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=self.gamma,
            offset=self.beta,
            mean=self.mean,
            variance=self.variance,
            epsilon=EPSILON,
            exponential_avg_factor=1 - MOMENTUM if training else 1.0,
            data_format=self.format,
            is_training=training,
        )

    def forward(self, training: bool) -> Any:
        tf, fused = self.tf, self.problem.case.fused

        def run(x: Any, residual: Any) -> Any:
            y, mean, variance, *_ = self._normalize(x, training)
            y = y if residual is None else y + residual
            return tf.nn.relu(y) if fused else y, mean, variance

        def read(results: Any) -> dict[str, Any]:
            found = {"y": self._array(results[0])}
            return found | ({"mean": results[1].numpy(), "variance": results[2].numpy()} if training else {})

        compiled = tf.function(run, autograph=False)
        return lambda: compiled(self.x, self.residual), read

    def backward(self) -> Any:
        tf, fused, gamma = self.tf, self.problem.case.fused, self.gamma
        _, _, _, *saved = self._normalize(self.x, True)
        y = self._image(self.problem.y) if fused else None

        def run(dy: Any, y: Any, x: Any, saved: Any) -> Any:
            g = tf.raw_ops.ReluGrad(gradients=dy, features=y) if fused else dy
            arguments = {f"reserve_space_{i}": s for i, s in enumerate(saved, 1)}
            results = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=g, x=x, scale=gamma, epsilon=EPSILON, data_format=self.format, is_training=True, **arguments
            )
            return g, *results[:3]

        def read(results: Any) -> dict[str, Any]:
            g, dx, dgamma, dbeta = results
            found = {"dx": self._array(dx), "dgamma": dgamma.numpy(), "dbeta": dbeta.numpy()}
            return found | ({} if self.residual is None else {"dresidual": self._array(g)})

        compiled = tf.function(run, autograph=False)
        return lambda: compiled(self.dy, y, self.x, saved), read
