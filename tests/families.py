"""Tiny random transformers models of every family, saved as folders, for tests of import, export and of the model itself."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor

from neva.batch import IMAGE
from neva.checkpoint.hf import Options, Plan, plan, read_source
from neva.models.vit import VisionConfig, normalise
from neva.models.vlm import VLM, VLMConfig
from tests.packed import Item, item

VOCAB, IMAGE_ID = 70, 69
TEXT = {"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 60, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SEEN = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def llama(**changes) -> tf.LlamaConfig:
    return tf.LlamaConfig(**{**TEXT, **changes})


def mixtral(**changes) -> tf.MixtralConfig:
    return tf.MixtralConfig(**{**TEXT, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None, **changes})


def nemotron(**changes) -> tf.NemotronConfig:
    return tf.NemotronConfig(**{**TEXT, "head_dim": 12, "partial_rotary_factor": 0.5, **changes})


def clip(**changes) -> tf.CLIPVisionConfig:
    return tf.CLIPVisionConfig(**{**SEEN, **changes})


def siglip(**changes) -> tf.SiglipVisionConfig:
    return tf.SiglipVisionConfig(**{**SEEN, "image_size": 31, **changes})


def internvl(**changes) -> tf.InternVLVisionConfig:
    sizes = {"image_size": [28, 28], "patch_size": [14, 14], "norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False}
    return tf.InternVLVisionConfig(**{**SEEN, **sizes, **changes})


def llava(text=None, vision=None, layer: int = -2, strategy: str = "default") -> tf.LlavaConfig:
    text, vision = text or llama(), vision or clip()
    tokens = 4 + (strategy == "full" and isinstance(vision, tf.CLIPVisionConfig))
    return tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_ID, image_seq_length=tokens, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, tie_word_embeddings=text.tie_word_embeddings,
    )  # fmt: skip


DECODERS = {
    "llama grouped": lambda: llama(),
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama head_dim": lambda: llama(head_dim=20),
    "llama biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=4, rms_norm_eps=1e-3),
    "llama3 scaling": lambda: llama(rope_parameters=LLAMA3),
    "llama linear scaling": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}),
    "llama dynamic scaling": lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, max_position_embeddings=12),
    "yi": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 5e6}, num_attention_heads=6, num_key_value_heads=2),
    "mistral window": lambda: tf.MistralConfig(**{**TEXT, "sliding_window": 5}),
    "mistral": lambda: tf.MistralConfig(**{**TEXT, "sliding_window": None, "head_dim": 16}),
    "mixtral": lambda: mixtral(),
    "mixtral window": lambda: mixtral(sliding_window=6, num_local_experts=3, num_experts_per_tok=1),
    "nemotron": lambda: nemotron(),
    "nemotron biases": lambda: nemotron(attention_bias=True, mlp_bias=True, num_key_value_heads=4),
    "qwen2": lambda: tf.Qwen2Config(**TEXT),
    "qwen2 tied": lambda: tf.Qwen2Config(**{**TEXT, "tie_word_embeddings": True, "vocab_size": 73}),
}
VLMS = {
    "llava": lambda: llava(),
    "llava full": lambda: llava(strategy="full"),
    "llava last layer": lambda: llava(layer=-1),
    "llava first layer": lambda: llava(layer=1, strategy="full"),
    "llava third last layer": lambda: llava(layer=-3),
    "llava qwen2 siglip": lambda: llava(tf.Qwen2Config(**{**TEXT, "tie_word_embeddings": True}), siglip(), strategy="full"),
    "llava mistral": lambda: llava(tf.MistralConfig(**{**TEXT, "sliding_window": 7})),
    "llava mixtral siglip": lambda: llava(mixtral(), siglip(), strategy="full", layer=-1),
    "llava nemotron": lambda: llava(nemotron()),
}
ENCODERS = {
    "clip": lambda: clip(),
    "siglip": lambda: siglip(),
    "internvit 6b kind": lambda: internvl(),
    "internvit 300m kind": lambda: internvl(norm_type="layer_norm", use_qk_norm=False, attention_bias=True),
}


def build(config: tf.PreTrainedConfig, folder: Path, *, scale: float = 1.0) -> torch.nn.Module:
    """A model of this config with every weight shaken up, saved to the folder."""
    kinds = {tf.LlavaConfig: tf.LlavaForConditionalGeneration, tf.CLIPVisionConfig: tf.CLIPVisionModel, tf.SiglipVisionConfig: tf.SiglipVisionModel}
    kind = kinds.get(type(config))
    model = (
        kind(config) if kind else tf.AutoModelForCausalLM.from_config(config) if hasattr(config, "vocab_size") else tf.AutoModel.from_config(config)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            deviation = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            centre = float(parameter.ndim == 1 and not isinstance(config, tf.NemotronConfig))
            parameter.copy_(torch.empty_like(parameter).normal_(centre, scale * deviation, generator=generator))
    model.eval().save_pretrained(folder)
    return model


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder."""
    state = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """The same weights in both libraries."""

    ours: VLM
    theirs: torch.nn.Module
    plan: Plan
    folder: Path

    @property
    def images(self) -> bool:
        """Does the model see?"""
        return self.ours.config.vision is not None

    def samples(self) -> list[Item]:
        """Samples of unlike lengths, with zero to two images where the model takes any."""
        images = (1, 0, 2) if self.images else (0, 0, 0)
        return [item(self.ours.config.layout, text=t, images=n, seed=s) for s, (t, n) in enumerate(zip((9, 1, 24), images, strict=True))]

    def run_theirs(self, sample: Item, **extra):
        """transformers' forward of one sample."""
        ids = torch.tensor([[IMAGE_ID if token == IMAGE else token for token in sample.tokens]])
        if sample.tiles:
            extra["pixel_values"] = self.pixels(torch.stack(sample.tiles))
        return self.theirs(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)

    def pixels(self, tiles: Tensor) -> Tensor:
        """Tiles as transformers wants them."""
        vision = self.ours.config.vision
        assert isinstance(vision, VisionConfig)
        return normalise(tiles, vision.mean, vision.std)

    def gradients(self) -> dict[str, Tensor]:
        """transformers' gradients under our names: saved as if they were weights, and imported."""
        holder = copy.deepcopy(self.theirs)
        with torch.no_grad():
            for target, source in zip(holder.parameters(), self.theirs.parameters(), strict=True):
                target.copy_(torch.zeros_like(target) if source.grad is None else source.grad)
        holder.save_pretrained(self.folder / "gradients")
        chosen = plan([read_source(self.folder / "gradients")], Options())
        return {name: chosen.read(name) for name in chosen.tensors}


def load(chosen: Plan) -> VLM:
    """Our model with a plan's tensors."""
    assert isinstance(chosen.model, VLMConfig)
    model = VLM(chosen.model)
    model.load_state_dict({name: chosen.read(name) for name in chosen.tensors}, strict=True)
    return model.eval()


def pair(config: tf.PreTrainedConfig, folder: Path) -> Pair:
    """A model of transformers, and ours of the folder that it was saved to."""
    theirs = build(config, folder)
    chosen = plan([read_source(folder)], Options())
    return Pair(ours=load(chosen), theirs=theirs, plan=chosen, folder=folder)
