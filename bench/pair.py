"""What the measurements share: one LLaVA of fixed size and random weights in transformers and in neva, and facts of the machine.

The sizes are a CLIP of 4 layers x 128 at 112 px / 14 and a Llama of 6 x 256 with a vocabulary of 32,000. transformers draws the
weights and writes a checkpoint; both sides load that folder, neva through its own converter. Libraries are imported where they
are used, so that a process whose memory is measured holds only its own side's.
"""

import json
import platform
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

TEXT = {
    "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    "initializer_range": 1 / 16,  # 1 / sqrt(width): with the usual 0.02 a greedy answer repeats a few tokens
}  # fmt: skip
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
IMAGE_ID = 31_999
"""transformers' id of an image feature; no text holds it."""
IMAGE_TOKENS = 64


def write(folder: Path) -> None:
    """Draw the weights and write them as a Hugging Face checkpoint."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=LlamaConfig(**TEXT), image_token_index=IMAGE_ID,
        image_seq_length=IMAGE_TOKENS, vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)


def load_peer(folder: Path) -> torch.nn.Module:
    """transformers' model in fp32 with its SDPA attention."""
    from transformers import LlavaForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def load_ours(folder: Path) -> tuple[object, dict[str, Tensor]]:
    """Our `VLMConfig` and the weights under our names; of the vision tower the layers up to the selected one."""
    from neva.checkpoint.hf import Options, plan, read_source

    chosen = plan([read_source(folder)], Options())
    return chosen.model, {name: chosen.read(name) for name in chosen.tensors}


def machine() -> dict[str, object]:
    """Where and with what a measurement ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "name": "machine",
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def emit(row: dict[str, object]) -> None:
    """One JSON line on stdout."""
    print(json.dumps(row), flush=True)
