"""ONNX Runtime's CPU provider: the operator BatchNormalization, whose channel axis is 1 by definition.

preallocated binds inputs and outputs to memory.
"""

import importlib
from typing import Any

import numpy as np

from benchmarks.peers import CannotDo, Contender, plain_only
from benchmarks.problem import EPSILON, MOMENTUM, Problem
from benchmarks.threads import asked


def version() -> str:
    importlib.import_module("onnx")
    return str(importlib.import_module("onnxruntime").__version__)


def prepare(problem: Problem, mode: str) -> dict[str, Contender]:
    plain_only(problem, "ONNX Runtime")
    if mode == "backward":
        raise CannotDo("the operator has no gradient in ONNX Runtime's inference package")
    if problem.case.kept != (1,):
        raise CannotDo("ONNX's BatchNormalization has its channels at axis 1")
    runtime: Any = importlib.import_module("onnxruntime")
    names, session = _session(runtime, problem, mode == "training")
    inputs = {"x": problem.x, "gamma": problem.gamma, "beta": problem.beta}
    inputs |= {"mean": problem.mean, "variance": problem.variance}
    if problem.residual is not None:
        inputs["residual"] = problem.residual

    def read(results: Any) -> dict[str, Any]:
        return dict(zip(["y", "mean", "biased_variance"], results, strict=False))

    return {
        "ordinary": Contender(lambda: session.run(names, inputs), read),
        "preallocated": Contender(_bound(runtime, session, names, inputs, problem), read),
    }


def _session(runtime: Any, problem: Problem, training: bool) -> tuple[list[str], Any]:
    """The names of the results, and a session for the operator and what is fused with it."""
    helper: Any = importlib.import_module("onnx.helper")
    case = problem.case
    element, statistic = (helper.np_dtype_to_tensor_dtype(d) for d in (problem.dtype, problem.statistic))

    def value(name: str, large: bool) -> Any:
        shape = case.shape if large else (case.channels,)
        return helper.make_tensor_value_info(name, element if large else statistic, shape)

    parameters = ["gamma", "beta", "mean", "variance"]
    updated = ["new_mean", "new_variance"] if training else []
    results, nodes = ["y", *updated], []
    z = "z" if case.fused else "y"
    attributes = {"epsilon": EPSILON, "momentum": MOMENTUM, "training_mode": int(training)}
    nodes.append(helper.make_node("BatchNormalization", ["x", *parameters], [z, *updated], **attributes))
    if case.fused == "residual":
        nodes.append(helper.make_node("Add", ["z", "residual"], ["sum"]))
    if case.fused:
        nodes.append(helper.make_node("Relu", ["sum" if case.fused == "residual" else "z"], ["y"]))
    inputs = [value("x", True), *(value(n, False) for n in parameters)]
    inputs += [value("residual", True)] if case.fused == "residual" else []
    graph = helper.make_graph(nodes, "batch_norm", inputs, [value(n, n == "y") for n in results])
    # The operator has had this form since opset 15; the runtime reads older IR versions only.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = asked()
    serialized, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    try:
        return results, runtime.InferenceSession(serialized, options, providers=providers)
    except Exception as error:  # the runtime's own exceptions have no public base
        raise CannotDo(f"ONNX Runtime: {str(error).strip().splitlines()[0]}") from None


def _bound(runtime: Any, session: Any, names: list[str], inputs: dict[str, np.ndarray], problem: Problem) -> Any:
    binding = session.io_binding()
    outputs = [np.empty_like(problem.x), np.empty_like(problem.mean), np.empty_like(problem.variance)]
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in zip(names, outputs, strict=False):
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    results = outputs[: len(names)]

    def call() -> list[np.ndarray]:
        session.run_with_iobinding(binding)
        return results

    return call
