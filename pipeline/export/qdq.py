"""A U-Net's ONNX graph with integer weights, from one that rounds floats.

torch writes the weights of a U-Net with fake quantisers (see `pipeline.models.fake_quant`) as floats that pass through
QuantizeLinear and DequantizeLinear. Here the integers themselves are stored, in int8 or int4, and DequantizeLinear
alone stays; a layer's input still passes through both, which is what programs look for to compute in integers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
# The first opset with int4.
INT4_OPSET = 21


def store_integers(model: ModelProto, bits: int) -> int:
    """Replace the float weights that a graph quantises by integers of 8 or 4 bits, in place, and return their number.

    Those of a matrix product are transposed where the graph would do so. A weight is used once.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = constants_of(model)
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    doomed, stored = set(), 0
    for node in list(graph.node):
        if node.op_type != QUANTISE or node.input[0] not in weights:
            continue
        (dequantise,) = readers[node.output[0]]
        values, axis = integers(weights[node.input[0]], constants[node.input[1]], attribute(node, "axis", 1))
        # The integers are symmetric: the zero point is zero, which is what it is where none is given.
        del dequantise.input[2:]
        following = readers[dequantise.output[0]]
        if len(following) == 1 and following[0].op_type == "Transpose":
            order = attribute(following[0], "perm", list(range(values.ndim))[::-1])
            values, axis = values.transpose(order), list(order).index(axis)
            dequantise.output[0] = following[0].output[0]
            doomed.add(id(following[0]))
        set_axis(dequantise, axis)
        del weights[node.input[0]]
        dequantise.input[0] = f"{node.input[0]}_int{bits}"
        graph.initializer.append(tensor_of(dequantise.input[0], values, bits))
        doomed.add(id(node))
        stored += 1
    keep(graph.node, [node for node in graph.node if id(node) not in doomed])
    remove_unread(graph)
    if bits == 4:
        for opset in model.opset_import:
            if opset.domain in ("", "ai.onnx"):
                opset.version = max(opset.version, INT4_OPSET)
    return stored


def remove_unread(graph: GraphProto) -> None:
    """Remove the constants that no node reads: the floats, and zero points."""
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    nodes = [node for node in graph.node if node.op_type != "Constant" or node.output[0] in read]
    keep(graph.node, nodes)
    keep(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])


def keep(field: Any, items: list[Any]) -> None:
    """Have a repeated field of a graph hold these of its items."""
    del field[:]
    field.extend(items)


def constants_of(model: ModelProto) -> dict[str, np.ndarray]:
    """The values of the graph's Constant nodes and small initialisers, by name."""
    from onnx.numpy_helper import to_array

    graph = model.graph
    nodes = [node for node in graph.node if node.op_type == "Constant"]
    found = {node.output[0]: to_array(node.attribute[0].t) for node in nodes if node.attribute[0].name == "value"}
    return {**found, **{tensor.name: to_array(tensor) for tensor in graph.initializer if len(tensor.dims) <= 1}}


def integers(weight: TensorProto, step: np.ndarray, axis: int) -> tuple[np.ndarray, int]:
    """The integers, int8, of a weight whose values are multiples of its steps along `axis`; and that axis."""
    from onnx.numpy_helper import to_array

    values = to_array(weight)
    shape = [1] * values.ndim
    shape[axis] = -1
    return np.rint(values / (step.reshape(shape) if step.ndim else step)).astype(np.int8), axis


def tensor_of(name: str, values: np.ndarray, bits: int) -> TensorProto:
    """Integers, int8 in memory, as a tensor of a graph."""
    from onnx import TensorProto, helper

    if bits == 8:
        return helper.make_tensor(name, TensorProto.INT8, values.shape, np.ascontiguousarray(values).tobytes(), True)
    flat = values.reshape(-1)
    # Two in a byte, the first in its lower half.
    pairs = np.append(flat, np.zeros(flat.size % 2, np.int8)).astype(np.uint8).reshape(-1, 2) & 0xF
    packed = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
    return helper.make_tensor(name, TensorProto.INT4, values.shape, packed.tobytes(), True)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx.helper import get_attribute_value

    return next((get_attribute_value(item) for item in node.attribute if item.name == name), default)


def set_axis(node: NodeProto, axis: int) -> None:
    from onnx.helper import make_attribute

    kept = [item for item in node.attribute if item.name != "axis"]
    del node.attribute[:]
    node.attribute.extend([*kept, make_attribute("axis", axis)])
