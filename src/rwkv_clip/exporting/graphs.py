"""Graphs of ONNX: written, run and quantised. The one file that needs onnx, onnxscript and onnxruntime."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError
from .parts import Part, first_line, quiet

OPSET = 18
ONE_FILE = 1_900_000_000  # bytes of weights; a file of protobuf has less than 2 GiB, larger weights lie beside it
WORTH_IT = 128  # the least side of a weight that becomes int8: of low ranks the conversion costs more than it saves
Quantization = Literal["dynamic", "static"]


def import_libraries() -> None:
    """ImportError, with the extra that has them, where a library is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX: {error.name} is not installed; pip install -e '.[onnx]'") from None


def write_graph(program: torch.export.ExportedProgram, part: Part, path: Path) -> None:
    """Write a recorded part. ConfigError where the exporter cannot translate it, or not to standard operators."""
    import onnx

    try:
        with quiet():
            made = torch.onnx.export(
                program,
                opset_version=OPSET,
                input_names=[part.input],
                output_names=[part.output],
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of any kind, as in `record`
        raise ConfigError([f"{part.side} tower: it cannot be written as ONNX ({first_line(error)})"]) from error
    assert made is not None, "dynamo=True gives a program"
    model = made.model_proto
    _fold_transposes(model)
    _name_axes(model, part)
    if foreign := sorted({node.op_type for node in _nodes_of(model) if node.domain not in ("", "ai.onnx")}):
        raise ConfigError([f"{part.side} tower: {', '.join(foreign)} is no standard operator of ONNX"])
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > ONE_FILE
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)


def _nodes_of(model: Any) -> Iterator[Any]:
    yield from model.graph.node
    for function in model.functions:
        yield from function.node


def _fold_transposes(model: Any) -> None:
    """Weights as products read them: quantisation and other runtimes look for a constant there."""
    from onnx import numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    kept, made = [], {}
    for node in model.graph.node:
        weight = weights.get(node.input[0]) if node.op_type == "Transpose" else None
        if weight is None:
            kept.append(node)
            continue
        axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        array = np.ascontiguousarray(numpy_helper.to_array(weight).transpose(axes))
        made[node.output[0]] = numpy_helper.from_array(array, node.output[0])
    used = {name for node in kept for name in node.input} | {output.name for output in model.graph.output}
    left = [tensor for tensor in model.graph.initializer if tensor.name in used] + list(made.values())
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(kept)
    model.graph.initializer.extend(left)


def _name_axes(model: Any, part: Part) -> None:
    """The axes that may have any size under their names, in place of numbered symbols."""
    names = {}
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    for axis, name in part.dynamic.items():
        names[sizes[axis].dim_param] = name
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in names and size.dim_param:
                size.dim_param = names[size.dim_param]
    model.graph.doc_string = f"{part.input} -> {part.output}, not normalised"


def open_graph(path: Path, part: Part, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """A function that runs a file in ONNX Runtime on the CPU: input -> features. threads: None for torch's number."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Tensor:
        (found,) = session.run([part.output], {part.input: inputs.numpy()})
        return torch.from_numpy(found)

    return run


def quantize_graph(source: Path, path: Path, part: Part, way: Quantization, examples: Sequence[Tensor] = ()) -> int:
    """Write a graph with the wide products of `source` in int8; returns how many these are.

    Weights are signed, one scale for each output; activations are unsigned with a scale that is measured at each call
    ("dynamic"), or beforehand from the least and largest values of `examples`, batches of the part's input ("static").
    Standard operators of ONNX: DynamicQuantizeLinear and MatMulInteger, or QuantizeLinear and DequantizeLinear.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.onnx_model import ONNXModel

    graph = ONNXModel(onnx.load(str(source)))
    graph.replace_gemm_with_matmul()
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.model.graph.initializer}
    wide = []
    for number, node in enumerate(graph.model.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        if node.op_type == "MatMul" and min(weights.get(node.input[1], (0,))) >= WORTH_IT:
            wide.append(node.name)
    _part_from_sums(graph.model.graph, set(wide), {name: shape[-1] for name, shape in weights.items() if shape})
    plain = path.with_name(f"{path.name}.plain")
    large = source.with_name(f"{source.name}.data").exists()
    shared: dict[str, Any] = {
        "nodes_to_quantize": wide,
        "per_channel": True,
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": large,
    }
    try:
        target = plain if wide else path  # without a name the quantiser takes every product
        onnx.save(graph.model, str(target), save_as_external_data=large, location=f"{target.name}.data")
        with quiet(), _silent():
            if way == "dynamic" and wide:
                quantization.quantize_dynamic(plain, path, extra_options={"MatMulConstBOnly": True}, **shared)
            elif wide:
                quantization.quantize_static(
                    plain,
                    path,
                    _read_examples(part, examples),
                    activation_type=quantization.QuantType.QUInt8,
                    extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
                    **shared,
                )
        _drop_unused(path, large)
    finally:
        for file in (plain, plain.with_name(f"{plain.name}.data")):
            file.unlink(missing_ok=True)
    return len(wide)


def _part_from_sums(graph: Any, wide: set[str], widths: dict[str, int]) -> None:
    """A reshaping, to the shape that it has, of products that are added to what is no constant: ONNX Runtime would make
    one step of product and sum, in float32, before it looks for products in int8."""
    import onnx

    constants = {tensor.name for tensor in graph.initializer}
    added = {
        name for node in graph.node if node.op_type == "Add" and not constants & set(node.input) for name in node.input
    }
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.name in wide and node.output[0] in added:
            whole, shape = node.output[0], f"{node.output[0]}_shape"
            node.output[0] = f"{whole}_product"
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, widths[node.input[1]]]), shape))
            nodes.append(onnx.helper.make_node("Reshape", [node.output[0], shape], [whole], f"{node.name}_reshape"))
    del graph.node[:]
    graph.node.extend(nodes)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without ONNX Runtime's warnings about the graphs that its quantiser makes on the way."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # errors
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # its default; what it was cannot be asked


def _drop_unused(path: Path, large: bool) -> None:
    """Without the float weights that the quantiser leaves beside those in int8."""
    import onnx

    model = onnx.load(str(path))
    used = {name for node in model.graph.node for name in node.input} | {output.name for output in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, str(path), save_as_external_data=large, location=f"{path.name}.data" if large else None)


def _read_examples(part: Part, examples: Sequence[Tensor]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(examples)

        def get_next(self) -> dict[str, np.ndarray] | None:
            inputs = next(self.left, None)
            return None if inputs is None else {part.input: inputs.numpy()}

    return Reader()
