"""Writes the table of docs/models.md from what it runs: `make models`.

For each family a tiny random model is made with transformers, imported, compared, trained for a step, exported and compared again, and its
tensors are held against the source's, bit for bit.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file

from neva import api
from neva.checkpoint import gate, index
from neva.checkpoint.hf import Options, Plan, plan, read_source
from neva.models.decoder import DecoderConfig
from neva.models.vlm import VLM, VLMConfig, build
from tests import families
from tests.nemo import write
from tests.oracle import test_nvlm
from tests.packed import item, pack

PAGE = Path(__file__).with_name("models.md")
BEGIN, END = "<!-- made by make_models.py -->", "<!-- end -->"
TOKENIZER = Path(api.__file__).parent / "recipes" / "tokenizer" / "tokenizer.json"

ROWS: dict[str, tuple[str, Callable]] = {
    "Llama-2, Vicuna": ("decoder", families.DECODERS["llama grouped"]),
    "Llama-3, 3.1 (scaled rotary positions)": ("decoder", families.DECODERS["llama3 scaling"]),
    "Llama, linear scaling": ("decoder", families.DECODERS["llama linear scaling"]),
    "Llama, dynamic scaling": ("decoder", families.DECODERS["llama dynamic scaling"]),
    "Yi": ("decoder", families.DECODERS["yi"]),
    "Mistral, sliding window": ("decoder", families.DECODERS["mistral window"]),
    "Mistral": ("decoder", families.DECODERS["mistral"]),
    "Mixtral": ("decoder", families.DECODERS["mixtral"]),
    "Nemotron-4, Minitron": ("decoder", families.DECODERS["nemotron"]),
    "Qwen2, Qwen2.5": ("decoder", families.DECODERS["qwen2"]),
    "Qwen2, tied": ("decoder", families.DECODERS["qwen2 tied"]),
    "CLIP": ("encoder", families.ENCODERS["clip"]),
    "SigLIP": ("encoder", families.ENCODERS["siglip"]),
    "InternViT-6B's kind": ("encoder", families.ENCODERS["internvit 6b kind"]),
    "InternViT-300M's kind": ("encoder", families.ENCODERS["internvit 300m kind"]),
    "DINOv2 (transformers' code)": ("encoder", lambda: tf.Dinov2Config(**{**families.SEEN, "mlp_ratio": 2})),
    "LLaVA-1.5": ("VLM", families.VLMS["llava"]),
    "LLaVA on Qwen2 and SigLIP": ("VLM", families.VLMS["llava qwen2 siglip"]),
    "LLaVA on Mistral": ("VLM", families.VLMS["llava mistral"]),
    "LLaVA on Mixtral and SigLIP": ("VLM", families.VLMS["llava mixtral siglip"]),
    "LLaVA on Nemotron": ("VLM", families.VLMS["llava nemotron"]),
}
WRITTEN: dict[str, Callable[[Path], object]] = {"LLaVA-NeXT (1.6)": test_nvlm.following, "NVLM-D, its encoder, projector and decoder": test_nvlm.nvlm}
"""VLMs whose folder is written by a test's own function."""


def row(name: str, kind: str, make: Callable, folder: Path) -> str:
    """One line of the table, measured."""
    _write(kind, make(), folder)
    return measured(name, kind, folder)


def _write(kind: str, config: tf.PreTrainedConfig, folder: Path) -> None:
    """A tiny random model in `folder/hf`."""
    if kind == "VLM":
        config.text_config.vocab_size = 390
    families.build(config, folder / "hf")
    if kind == "VLM":
        _tokenizer(folder / "hf")
    if config.model_type == "dinov2":
        settings = {"size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "hf" / "preprocessor_config.json").write_text(json.dumps(settings))


def measured(name: str, kind: str, folder: Path) -> str:
    """The line of the model in `folder/hf`."""
    source = read_source(folder / "hf")
    chosen = plan([source], Options())
    found = gate.compare([source], chosen.model, chosen.vision, chosen.read)
    parity = max(d.largest for d in found)
    api.import_checkpoint([folder / "hf"], folder / "neva", say=lambda text: None)
    trained = _trains(families.load(chosen) if chosen.model is not None else _around(chosen))
    api.export_checkpoint(folder / "neva", folder / "out", say=lambda text: None)
    before, after = (_tensors(folder / part) for part in ("hf", "out"))
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return f"| {name} | {kind} | {trained} | yes | {'bit for bit' if same else 'DIFFERS'} | {parity:.1e} |"


def nemo_row(name: str, make: Callable, folder: Path, *, core: bool) -> str:
    """A language model as NeMo writes it, cut over two tensor ranks: its logits against transformers'."""
    both = families.pair(make(), folder / "hf")
    archive = write(folder / "model.nemo", dict(both.ours.named_parameters()), both.ours.config.decoder, core=core, tp=2)
    api.import_checkpoint([archive], folder / "neva", say=lambda text: None)
    source = read_source(folder / "hf")
    found = gate.compare([source], both.plan.model, None, lambda n: index.read(folder / "neva" / "weights", n))
    model = VLM(both.plan.model)
    model.load_state_dict({n: index.read(folder / "neva" / "weights", n) for n, _ in model.named_parameters()}, strict=True)
    return f"| {name} | .nemo | {_trains(model)} | yes | as transformers | {max(d.largest for d in found):.1e} |"


def _around(chosen: Plan) -> VLM:
    """An imported encoder in a model with a small fresh decoder."""
    decoder = DecoderConfig(vocab=64, width=32, layers=1, heads=2, kv_heads=2, ffn=48)
    model = build(VLMConfig(decoder=decoder, vision=chosen.vision, projector="linear"))
    missing, unexpected = model.load_state_dict({name: chosen.read(name) for name in chosen.tensors}, strict=False)
    assert not unexpected and not any(name.startswith("vision.") for name in missing)
    return model


def _trains(model: VLM) -> str:
    """Does the loss of one batch fall in four steps, every parameter trained?"""
    model.train()
    layout = model.config.layout
    batch = pack(layout, [[item(layout, text=9, images=int(layout.images), seed=n) for n in range(2)]], 48)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        out = model(batch)
        loss = out.losses.sum() / batch.label_count
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return "yes" if losses[-1] < losses[0] else "NO"


def _tokenizer(folder: Path) -> None:
    made = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_file(str(TOKENIZER)), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    made.add_tokens(["<image>"], special_tokens=True)
    made.save_pretrained(folder)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def main() -> None:
    torch.set_num_threads(1)
    tf.utils.logging.set_verbosity_error()
    tf.utils.logging.disable_progress_bar()
    lines = ["| family | what | trains | import | export | largest difference |", "|---|---|---|---|---|---|"]
    for name, (kind, make) in ROWS.items():
        with tempfile.TemporaryDirectory() as scratch:
            lines.append(row(name, kind, make, Path(scratch)))
    for name, write_folder in WRITTEN.items():
        with tempfile.TemporaryDirectory() as scratch:
            write_folder(Path(scratch) / "hf")
            lines.append(measured(name, "VLM", Path(scratch)))
    for name, make in (("Llama", families.llama), ("Mixtral", families.mixtral), ("Nemotron", families.nemotron)):
        with tempfile.TemporaryDirectory() as scratch:
            config = replace_sizes(make())
            lines.append(nemo_row(name, lambda config=config: config, Path(scratch), core=True))
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    table = "\n".join([BEGIN, f"Measured with torch {torch.__version__}, transformers {tf.__version__}, in fp32.", "", *lines, END])
    PAGE.write_text(before + table + rest.split(END)[1], encoding="utf-8")
    print("\n".join(lines))


def replace_sizes(config: tf.PreTrainedConfig) -> tf.PreTrainedConfig:
    """Sizes that two tensor ranks can share."""
    config.vocab_size = 72
    if hasattr(config, "num_local_experts"):
        config.num_local_experts = 4
    return config


if __name__ == "__main__":
    main()
