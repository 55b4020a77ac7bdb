"""Small networks with the inputs and outputs of YuNet and SFace, whose answers are known.

The detector sees a face wherever one cell of its grid is of pure red, green or blue: red on the
grid of 8 px, green on that of 16 px, blue on that of 32 px. The face has its middle in the middle
of the cell, is four cells wide and five high, and has its landmarks in `LANDMARKS` cells from the
cell's upper left corner. The recognizer sees the mean colours of the four quarters of a face.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

STRIDES = {8: "red", 16: "green", 32: "blue"}
WIDE, HIGH = 4, 5
LANDMARKS = ((-0.5, -0.5), (1.5, -0.5), (0.5, 0.5), (-0.25, 1.5), (1.25, 1.5))
_OUTPUTS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
_BGR = {"blue": 0, "green": 1, "red": 2}


def detector() -> bytes:
    """An .onnx file in the place of YuNet's."""
    nodes: list[NodeProto] = []
    weights: list[TensorProto] = []
    for stride, colour in STRIDES.items():
        nodes.append(
            helper.make_node(
                "AveragePool",
                ["input"],
                [f"cells_{stride}"],
                kernel_shape=[stride, stride],
                strides=[stride, stride],
            )
        )
        pure = np.full((1, 3, 1, 1), -1 / 255, np.float32)
        pure[0, _BGR[colour]] = 1 / 255
        box = [0.5, 0.5, math.log(WIDE), math.log(HIGH)]
        points = [number for point in LANDMARKS for number in point]
        for name, kernel, constant in (
            ("cls", pure, [0.0]),
            ("obj", pure, [0.0]),
            ("bbox", np.zeros((4, 3, 1, 1), np.float32), box),
            ("kps", np.zeros((10, 3, 1, 1), np.float32), points),
        ):
            _output(f"{name}_{stride}", f"cells_{stride}", kernel, constant, nodes, weights)
    outputs = [
        helper.make_tensor_value_info(
            f"{name}_{stride}", TensorProto.FLOAT, [1, (640 // stride) ** 2, width]
        )
        for name, width in _OUTPUTS.items()
        for stride in STRIDES
    ]
    entry = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, 640, 640])
    return _file(helper.make_graph(nodes, "detector", [entry], outputs, weights))


def recognizer(width: int = 128) -> bytes:
    """An .onnx file in the place of SFace's."""
    mixed = np.random.default_rng(1).normal(size=(12, width)).astype(np.float32)
    nodes = [
        helper.make_node(
            "AveragePool", ["data"], ["quarters"], kernel_shape=[56, 56], strides=[56, 56]
        ),
        helper.make_node("Flatten", ["quarters"], ["colours"]),
        helper.make_node("MatMul", ["colours", "mixed"], ["fc1"]),
    ]
    entry = helper.make_tensor_value_info("data", TensorProto.FLOAT, [1, 3, 112, 112])
    result = helper.make_tensor_value_info("fc1", TensorProto.FLOAT, [1, width])
    weights = [numpy_helper.from_array(mixed, "mixed")]
    return _file(helper.make_graph(nodes, "recognizer", [entry], [result], weights))


def _output(
    name: str,
    cells: str,
    kernel: NDArray[np.float32],
    constant: list[float],
    nodes: list[NodeProto],
    weights: list[TensorProto],
) -> None:
    """One number or more for each cell: [1, cells, numbers]."""
    values = {
        f"{name}_kernel": kernel,
        f"{name}_constant": np.array(constant, np.float32),
        f"{name}_shape": np.array([0, len(constant), -1], np.int64),
    }
    weights += [numpy_helper.from_array(array, key) for key, array in values.items()]
    nodes += [
        helper.make_node("Conv", [cells, f"{name}_kernel", f"{name}_constant"], [f"{name}_map"]),
        helper.make_node("Reshape", [f"{name}_map", f"{name}_shape"], [f"{name}_flat"]),
        helper.make_node("Transpose", [f"{name}_flat"], [name], perm=[0, 2, 1]),
    ]


def _file(graph: object) -> bytes:
    opset = [helper.make_opsetid("", 11)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
