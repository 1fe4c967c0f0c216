"""Integer weights in an ONNX graph compute what rounding floats did."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array, to_array

from pipeline.export.qdq import store_integers

GRIDS = {8: 127, 4: 7}


def rounded(name: str, values: np.ndarray, axis: int | None, bits: int) -> tuple[list, list]:
    """The initialisers and nodes with which a tensor `name` becomes `name`_dq, as torch writes them."""
    if axis is None:
        steps, zeros = np.float32(0.05), np.int8(0)
    else:
        others = tuple(i for i in range(values.ndim) if i != axis)
        steps = (np.abs(values).max(others) / GRIDS[bits]).astype(np.float32)
        zeros = np.zeros(len(steps), np.int8)
    constants = [
        helper.make_node("Constant", [], [f"{name}_{kind}"], value=from_array(np.array(array)))
        for kind, array in (("step", steps), ("zero", zeros))
    ]
    named = {} if axis is None else {"axis": axis}
    inputs = [f"{name}_step", f"{name}_zero"]
    nodes = [
        *constants,
        helper.make_node("QuantizeLinear", [name, *inputs], [f"{name}_q"], **named),
        helper.make_node("DequantizeLinear", [f"{name}_q", *inputs], [f"{name}_dq"], **named),
    ]
    return ([] if axis is None else [from_array(values, name)]), nodes


def graph_of(bits: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A convolution and a matrix product whose weights and inputs pass through Q and DQ; and inputs."""
    draw = np.random.default_rng(0)
    conv, linear = draw.normal(size=(6, 3, 3, 3)), draw.normal(size=(5, 7))
    nodes, weights = [], []
    for name, values, axis in (("image", None, None), ("conv", conv, 0), ("rows", None, None), ("linear", linear, 0)):
        held, made = rounded(name, None if values is None else values.astype(np.float32), axis, bits)
        weights, nodes = weights + held, nodes + made
    nodes += [
        helper.make_node("Conv", ["image_dq", "conv_dq"], ["convolved"]),
        helper.make_node("Transpose", ["linear_dq"], ["linear_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows_dq", "linear_t"], ["product"]),
    ]
    kinds, results = {"image": (1, 3, 8, 8), "rows": (2, 4, 7)}, {"convolved": (1, 6, 6, 6), "product": (2, 4, 5)}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in tensors.items()]
        for tensors in (kinds, results)
    )
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model, {name: draw.normal(size=shape).astype(np.float32) for name, shape in kinds.items()}


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize(("bits", "kind", "opset"), [(8, TensorProto.INT8, 18), (4, TensorProto.INT4, 21)])
def test_weights_are_stored_as_integers_and_outputs_stay(bits, kind, opset):
    model, inputs = graph_of(bits)
    before = run(model, inputs)
    assert store_integers(model, bits) == 2
    onnx.checker.check_model(model, full_check=True)
    assert {tensor.data_type for tensor in model.graph.initializer} == {kind}
    assert model.opset_import[0].version == opset
    for found, expected in zip(run(model, inputs), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_product_reads_its_weight_transposed(bits):
    """Programs look for DequantizeLinear right before the product."""
    model, _ = graph_of(bits)
    store_integers(model, bits)
    assert "Transpose" not in {node.op_type for node in model.graph.node}
    (linear,) = [tensor for tensor in model.graph.initializer if tensor.name.startswith("linear")]
    assert tuple(linear.dims) == (7, 5)
    assert np.abs(to_array(linear).astype(int)).max() == GRIDS[bits]


def test_inputs_keep_their_quantisers():
    model, _ = graph_of(8)
    store_integers(model, 8)
    quantised = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(quantised) == ["image", "rows"]
