"""A layer's inference as an ONNX model, and a layer from a BatchNormalization node of one."""

import os
from typing import Any

import numpy as np

from nbbn.exchange.layers import along_axes, choose, make_layer, shapes_of
from nbbn.layer.layer import BatchNormalization

_OPSET, _IR = 15, 8  # the first in which statistics have a dtype of their own, and the format that came with it
_INPUTS = ("gamma", "beta", "moving_mean", "moving_variance")  # of the node, after x


def to_onnx(layer: BatchNormalization, *, residual: bool = False, folded: bool = False) -> Any:
    """An onnx.ModelProto that does the layer's inference, with its activation, from "x" to "y". Only the feature
    dimensions have a fixed size.

    A layer with axis=1 becomes a BatchNormalization node. ONNX has no other axis, and its epsilon is float32: other
    layers, and those of float64, become (x - mean) * scale + beta. What is of 16 bits is computed in float32, as in the
    layer.

    Args:
        residual: a second input, "residual", is added before the activation.
        folded: x * scale + shift, for any layer. Where the mean is much larger than the deviation the two nearly
            cancel: see fold() of the layer.
    Raises: TypeError, ValueError if it is no built layer; ModuleNotFoundError without onnx.
    """
    from onnx import helper, numpy_helper

    shapes = shapes_of(layer, "to_onnx()")
    inside, outside = (helper.np_dtype_to_tensor_dtype(d) for d in (shapes.dtype, layer.options.dtype or shapes.dtype))
    names = ["x", "residual"] if residual else ["x"]
    nodes: list[Any] = []
    constants: list[Any] = []
    last = {n: n for n in names}

    def then(operation: str, *inputs: str, of: str = "x", **attributes: Any) -> None:
        """One more node, which takes what has become of an input so far."""
        nodes.append(helper.make_node(operation, [last[of], *inputs], [f"{operation}_{len(nodes)}"], **attributes))
        last[of] = nodes[-1].output[0]

    for name in names if inside != outside else ():
        then("Cast", of=name, to=inside)
    for operation, arrays, attributes in _normalization(layer, folded):
        constants += [numpy_helper.from_array(a, n) for n, a in arrays.items()]
        then(operation, *arrays, **attributes)
    if residual:
        then("Add", last["residual"])
    if layer.activation == "relu":
        then("Relu")
    if inside != outside:
        then("Cast", to=outside)
    nodes[-1].output[0] = "y"
    sizes = [shapes.features.get(i, f"size_{i}") for i in range(shapes.rank)]
    inputs, outputs = ([helper.make_tensor_value_info(n, outside, sizes) for n in ns] for ns in (names, ["y"]))
    graph = helper.make_graph(nodes, layer.name, inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)


def _normalization(layer: BatchNormalization, folded: bool) -> list[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    """The operations, in their order: name, constants, attributes."""
    state, shape = layer.get_state(), along_axes(layer, "to_onnx()")
    scale, shift = (a.reshape(shape) for a in layer.fold(state["moving_mean"].dtype))
    if folded:
        return [("Mul", {"scale": scale}, {}), ("Add", {"shift": shift}, {})]
    state = {"gamma": np.ones_like(scale), "beta": np.zeros_like(scale)} | state
    if layer.options.resolved_axis() in ((1,), (1 - len(shape),)) and scale.dtype == np.float32:
        momentum = {} if layer.momentum is None or callable(layer.momentum) else {"momentum": layer.momentum}
        return [("BatchNormalization", {n: state[n].ravel() for n in _INPUTS}, {"epsilon": layer.epsilon, **momentum})]
    mean, beta = (state[n].reshape(shape) for n in ("moving_mean", "beta"))
    return [("Sub", {"mean": mean}, {}), ("Mul", {"scale": scale}, {}), ("Add", {"beta": beta}, {})]


def from_onnx(model: Any, name: str | None = None, *, ndim: int | None = None, **options: Any) -> BatchNormalization:
    """A layer from a BatchNormalization node, whose weights are constants of the model.

    Args:
        model: an onnx.ModelProto, or the path of a file.
        name: of the node, or of its output where it has none; None is the only one.
        ndim: the rank of the inputs, where the model does not say their shape.
        options: of BatchNormalization. By default axis=1, the node's momentum and epsilon, and bessel_correction=False.
    Raises: ValueError if there is no such node, or for options that do not fit; ModuleNotFoundError without onnx.
    """
    import onnx
    from onnx import numpy_helper

    if isinstance(model, str | os.PathLike):
        model = onnx.load(model)
    nodes = {n.name or n.output[0]: n for n in model.graph.node if n.op_type == "BatchNormalization"}
    node = nodes[choose(nodes, name, "this model")]
    constants = {c.name: c for c in model.graph.initializer}
    absent = [n for n in node.input[1:] if n not in constants]
    if absent:
        raise ValueError(f"the weights of the node must be constants of the model; {', '.join(absent)} are not")
    arrays = {n: numpy_helper.to_array(constants[c]) for n, c in zip(_INPUTS, node.input[1:], strict=True)}
    # Attributes are float32: this is the number that was meant, 0.001 and not 0.0010000000474974513.
    attributes = {a.name: float(str(np.float32(a.f))) for a in node.attribute if a.name in ("epsilon", "momentum")}
    own = {"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "bessel_correction": False} | attributes
    told = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.value_info)}
    known = {n: len(t.shape.dim) for n, t in told.items() if t.HasField("shape")}
    casts, source = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}, node.input[0]
    while source not in known and source in casts:
        source = casts.pop(source)
    return make_layer(arrays, own | options, known.get(source) if ndim is None else ndim)
