"""Static quantization of an ONNX file to int8 after training, and what it costs and saves.

Weights become int8 by output channel, with 7 bits so that sums do not saturate on CPUs without VNNI; activations uint8
with the range (minimum, maximum) that they have on images of the training split. Preprocessing stays in float32.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from kd.tools.export.formats import quiet_logging, session

NUM_CALIBRATION = 512  # images


def quantize(file: Path, out: Path, inputs: Tensor) -> None:
    """Write the int8 form of an ONNX file; `inputs` are what it takes, of the training split."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter(inputs.split(32))

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    fused = out.with_suffix(".fused")  # batch norm folded into the convolutions
    with quiet_logging():  # the quantizer speaks on the root logger
        quant_pre_process(str(file), str(fused), skip_symbolic_shape=True)
        prepares = [  # the exporter notes where each node comes from
            node.name
            for node in onnx.load(fused).graph.node
            if any("Preprocess" in entry.value for entry in node.metadata_props if entry.key == "namespace")
        ]
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "quant_format": QuantFormat.QDQ}
        more = {"per_channel": True, "reduce_range": True, "nodes_to_exclude": prepares}
        quantize_static(str(fused), str(out), Reader(), **types, **more)
    fused.unlink()


def compare(files: dict[str, Path], batches, prepare) -> dict[str, dict]:
    """Accuracy in percent, bytes, and milliseconds for one image (median of 100, files in turn) of ONNX files; of all
    but the first also for how many images they name its class. `prepare` makes what they take of the batches' images.
    """
    sessions = {name: session(file) for name, file in files.items()}
    predicted, labels, times = {name: [] for name in files}, [], {name: [] for name in files}
    for images, batch_labels in batches:
        inputs = prepare(images)
        labels.append(batch_labels)
        for name, run in sessions.items():
            predicted[name].append(run(inputs).argmax(1))
    labels, predicted = torch.cat(labels), {name: torch.cat(parts) for name, parts in predicted.items()}
    for _ in range(110):  # in turn, so that whatever else the machine does meets all alike
        for name, run in sessions.items():
            start = time.perf_counter()
            run(inputs[:1])
            times[name].append(1000 * (time.perf_counter() - start))
    first = next(iter(files))
    return {
        name: {
            "accuracy": 100 * (predicted[name] == labels).double().mean().item(),
            **({"same_class": int((predicted[name] == predicted[first]).sum())} if name != first else {}),
            "bytes": file.stat().st_size,
            "latency_ms": statistics.median(times[name][10:]),
        }
        for name, file in files.items()
    }
