"""A straight-line NVLM-D-72B and its processor, as an oracle: written from the published description and config.json; imports nothing of neva.

Everything is per tile and per sequence, without a batch: slow, and easy to check by eye. The dtype is that of the weights.
Letters of the shapes: n tiles, s pixels a side, p patches (without the class token), m patches merged into one token (4), h hidden width,
t tokens, a heads, d width of a head, v vocabulary.
"""

import math
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Config = dict[str, Any]
State = dict[str, Tensor]


def grid(width: int, height: int, *, min_tiles: int, max_tiles: int, tile: int) -> tuple[int, int]:
    """Columns and rows of the tiles that an image of these many pixels is cut into (InternVL's dynamic_preprocess)."""
    ratios = set()
    for count in range(min_tiles, max_tiles + 1):
        for columns in range(1, count + 1):
            for rows in range(1, count + 1):
                if min_tiles <= columns * rows <= max_tiles:
                    ratios.add((columns, rows))
    best, choice = float("inf"), (1, 1)
    # The published rule sorts a set by area only, so inside one area the order is the set's own; min_tiles > 1 can make it matter.
    for columns, rows in sorted(ratios, key=lambda ratio: ratio[0] * ratio[1]):
        difference = abs(width / height - columns / rows)
        if difference < best:
            best, choice = difference, (columns, rows)
        elif difference == best and width * height > 0.5 * tile * tile * columns * rows:
            choice = (columns, rows)
    return choice


def cut(image: Image.Image, *, min_tiles: int, max_tiles: int, tile: int, thumbnail: bool = True) -> list[Image.Image]:
    """The tiles of an RGB image, row by row, each tile × tile, then the whole image at that size if there are several."""
    assert image.mode == "RGB", "bicubic needs RGB: PIL resizes palettes and bitmaps by nearest neighbour"
    columns, rows = grid(*image.size, min_tiles=min_tiles, max_tiles=max_tiles, tile=tile)
    stretched = image.resize((tile * columns, tile * rows), Image.Resampling.BICUBIC)
    tiles = []
    for row in range(rows):
        for column in range(columns):
            tiles.append(stretched.crop((tile * column, tile * row, tile * (column + 1), tile * (row + 1))))
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile, tile), Image.Resampling.BICUBIC))
    return tiles


def prompt(question: str, tiles_per_image: list[int], tokens_per_tile: int) -> str:
    """The text of one turn in which each `<image>` became its tagged placeholders; the counts of tiles include the thumbnail."""
    assert question.count("<image>") == len(tiles_per_image), "one <image> for each image"
    text = f"<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n{question}<|im_end|><|im_start|>assistant\n"
    for tiles in tiles_per_image:
        # The last tile is the thumbnail; an image of one tile is its own thumbnail.
        tags = [f"<tile_{k}>" for k in range(1, tiles)] + ["<tile_global_thumbnail>"]
        slots = "".join(tag + "<|vision_pad|>" * tokens_per_tile for tag in tags)
        text = text.replace("<image>", f"<Image>{slots}</Image>", 1)
    return text


def tiny_config(vocab: int, **changes: Any) -> Config:
    """The released config.json at toy sizes: 4 tokens a tile; a change that is a dict updates that part (`llm_config={...}`)."""
    config: Config = {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 28,
        "max_dynamic_patch": 6,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "chatml",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 56,
            "max_position_embeddings": 32768,
            "mlp_bias": False,
            "model_type": "llama",  # as released; the architecture is Qwen2's
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_scaling": {"factor": 3.0, "type": "dynamic"},  # as released; acts beyond max_position_embeddings only
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "vocab_size": vocab,
        },
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 24,
            "image_size": 28,
            "initializer_factor": 0.1,
            "intermediate_size": 40,
            "layer_norm_eps": 1e-6,
            "model_type": "intern_vit_6b",
            "norm_type": "rms_norm",
            "num_attention_heads": 3,  # the real heads, also where the weights hold zero heads behind them
            "num_channels": 3,
            "num_hidden_layers": 2,
            "patch_size": 7,
            "qk_normalization": True,
            "qkv_bias": False,
        },
    }
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    return config


def random_state(config: Config, generator: torch.Generator, padded_heads: int = 0) -> State:
    """Random float32 weights under the keys of nvidia/NVLM-D-72B, with so many zero heads behind the vision encoder's real ones."""
    vision, llm = config["vision_config"], config["llm_config"]

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))

    def vector(size: int, centre: float) -> Tensor:
        return centre + 0.2 * torch.randn(size, generator=generator)

    h, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    state = {
        "vision_model.embeddings.class_embedding": torch.randn(1, 1, h, generator=generator),
        "vision_model.embeddings.position_embedding": torch.randn(1, (vision["image_size"] // patch) ** 2 + 1, h, generator=generator),
        "vision_model.embeddings.patch_embedding.weight": matrix(h, vision["num_channels"], patch, patch),
        "vision_model.embeddings.patch_embedding.bias": vector(h, 0.0),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = {
            "norm1.weight": vector(h, 1.0),
            "attn.qkv.weight": matrix(3 * h, h),
            "attn.q_norm.weight": vector(h, 1.0),
            "attn.k_norm.weight": vector(h, 1.0),
            "attn.proj.weight": matrix(h, h),
            "attn.proj.bias": vector(h, 0.0),
            "ls1": vector(h, 0.5),  # not the 0.1 of a fresh model: every layer shall count
            "norm2.weight": vector(h, 1.0),
            "mlp.fc1.weight": matrix(inner, h),
            "mlp.fc1.bias": vector(inner, 0.0),
            "mlp.fc2.weight": matrix(h, inner),
            "mlp.fc2.bias": vector(h, 0.0),
            "ls2": vector(h, 0.5),
        }
        extra = padded_heads * h // vision["num_attention_heads"]
        q, k, v = layer["attn.qkv.weight"].chunk(3)
        rows, columns, one = torch.zeros(extra, h), torch.zeros(h, extra), torch.zeros(extra)
        layer["attn.qkv.weight"] = torch.cat([q, rows, k, rows, v, rows])
        layer["attn.q_norm.weight"] = torch.cat([layer["attn.q_norm.weight"], one])
        layer["attn.k_norm.weight"] = torch.cat([layer["attn.k_norm.weight"], one])
        layer["attn.proj.weight"] = torch.cat([layer["attn.proj.weight"], columns], dim=1)
        state |= {f"vision_model.encoder.layers.{i}.{name}": weight for name, weight in layer.items()}

    merged, width, ffn = h * round(1 / config["downsample_ratio"]) ** 2, llm["hidden_size"], llm["intermediate_size"]
    state |= {"mlp1.0.weight": vector(merged, 1.0), "mlp1.0.bias": vector(merged, 0.0)}
    state |= {"mlp1.1.weight": matrix(ffn, merged), "mlp1.3.weight": matrix(width, ffn)}

    keys = width // llm["num_attention_heads"] * llm["num_key_value_heads"]
    state["language_model.model.embed_tokens.weight"] = torch.randn(llm["vocab_size"], width, generator=generator)
    for i in range(llm["num_hidden_layers"]):
        layer = {"input_layernorm.weight": vector(width, 1.0)}
        for name, rows in (("q_proj", width), ("k_proj", keys), ("v_proj", keys)):
            layer |= {f"self_attn.{name}.weight": matrix(rows, width), f"self_attn.{name}.bias": vector(rows, 0.0)}
        layer |= {"self_attn.o_proj.weight": matrix(width, width), "post_attention_layernorm.weight": vector(width, 1.0)}
        layer |= {"mlp.gate_proj.weight": matrix(ffn, width), "mlp.up_proj.weight": matrix(ffn, width), "mlp.down_proj.weight": matrix(width, ffn)}
        state |= {f"language_model.model.layers.{i}.{name}": weight for name, weight in layer.items()}
    state["language_model.model.norm.weight"] = vector(width, 1.0)
    state["language_model.lm_head.weight"] = matrix(llm["vocab_size"], width)
    return state


def forward(state: State, config: Config, tokens: list[int], tiles: Tensor | None, image_id: int) -> Tensor:
    """Logits [t, v] of one sequence whose placeholders `image_id` take the features of the normalised tiles [n, 3, s, s], in order."""
    x = state["language_model.model.embed_tokens.weight"][tokens]
    if tiles is not None:
        features = torch.cat([project(state, merge(config, encode(state, config, tile))) for tile in tiles])
        places = [place for place, token in enumerate(tokens) if token == image_id]
        assert len(places) == len(features), f"{len(places)} placeholders for {len(features)} features"
        for place, feature in zip(places, features, strict=True):
            x[place] = feature
    return decode(state, config, x)


def encode(state: State, config: Config, tile: Tensor) -> Tensor:
    """Patch features [p, h] of one tile [3, s, s], row by row, without the class token and without a final norm."""
    vision = config["vision_config"]
    assert vision["norm_type"] == "rms_norm" and vision["qk_normalization"] and not vision["qkv_bias"] and vision["hidden_act"] == "gelu"
    embeddings = "vision_model.embeddings"
    kernel, bias = state[f"{embeddings}.patch_embedding.weight"].flatten(1), state[f"{embeddings}.patch_embedding.bias"]
    side, patch = vision["image_size"], vision["patch_size"]
    patches = []
    for top in range(0, side, patch):
        for left in range(0, side, patch):
            patches.append(kernel @ tile[:, top : top + patch, left : left + patch].flatten() + bias)
    x = torch.stack([state[f"{embeddings}.class_embedding"][0, 0], *patches]) + state[f"{embeddings}.position_embedding"][0]

    h, eps = vision["hidden_size"], vision["layer_norm_eps"]
    d = h // vision["num_attention_heads"]
    hidden_states = [x]
    for i in range(vision["num_hidden_layers"]):
        w = {name: state[f"vision_model.encoder.layers.{i}.{name}"] for name in ("ls1", "ls2")}
        for name in ("norm1", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            w[name] = state[f"vision_model.encoder.layers.{i}.{name}.weight"]
        for name in ("attn.proj", "mlp.fc1", "mlp.fc2"):
            w[name + ".bias"] = state[f"vision_model.encoder.layers.{i}.{name}.bias"]

        q, k, v = (rms_norm(x, w["norm1"], eps) @ w["attn.qkv"].T).chunk(3, dim=-1)
        # All heads are normalised as one vector, and zero heads stand behind the h real entries: the mean is over those h alone.
        q, k = rms_norm(q, w["attn.q_norm"], eps, real=h), rms_norm(k, w["attn.k_norm"], eps, real=h)
        mixed = join(attention(heads(q, d), heads(k, d), heads(v, d), causal=False))
        x = x + w["ls1"] * (mixed @ w["attn.proj"].T + w["attn.proj.bias"])
        inner = gelu(rms_norm(x, w["norm2"], eps) @ w["mlp.fc1"].T + w["mlp.fc1.bias"])
        x = x + w["ls2"] * (inner @ w["mlp.fc2"].T + w["mlp.fc2.bias"])
        hidden_states.append(x)
    return hidden_states[config["select_layer"]][1:]


def merge(config: Config, patches: Tensor) -> Tensor:
    """Pixel shuffle v2 of a square of patches [p, h]: tokens [p / m, m·h], whose channels are the patches (r0c0, r0c1, r1c0, r1c1)."""
    assert config["ps_version"] == "v2"
    side, block = math.isqrt(len(patches)), round(1 / config["downsample_ratio"])
    merged = []
    for row in range(0, side, block):
        for column in range(0, side, block):
            merged.append(torch.cat([patches[(row + r) * side + column + c] for r in range(block) for c in range(block)]))
    return torch.stack(merged)


def project(state: State, x: Tensor) -> Tensor:
    """Embeddings for the language model [p / m, its width] from merged patches [p / m, m·h]."""
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) * state["mlp1.0.weight"] + state["mlp1.0.bias"]
    return gelu(x @ state["mlp1.1.weight"].T) @ state["mlp1.3.weight"].T


def decode(state: State, config: Config, x: Tensor) -> Tensor:
    """Logits [t, v] of the Qwen2 decoder for embeddings [t, its width] at positions 0, 1, ..."""
    llm = config["llm_config"]
    # Dynamic scaling of the rotation starts beyond this length and is not written here.
    assert len(x) <= llm["max_position_embeddings"] and llm["hidden_act"] == "silu" and not llm["tie_word_embeddings"]
    eps, d, groups = llm["rms_norm_eps"], llm["hidden_size"] // llm["num_attention_heads"], llm["num_key_value_heads"]
    for i in range(llm["num_hidden_layers"]):
        names = [
            "input_layernorm",
            "post_attention_layernorm",
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        ]
        w = {name: state[f"language_model.model.layers.{i}.{name}.weight"] for name in names}
        b = {p: state[f"language_model.model.layers.{i}.self_attn.{p}_proj.bias"] for p in "qkv"}

        y = rms_norm(x, w["input_layernorm"], eps)
        q, k, v = (heads(y @ w[f"self_attn.{p}_proj"].T + b[p], d) for p in "qkv")
        q, k = rotate(q, llm["rope_theta"]), rotate(k, llm["rope_theta"])
        # Neighbouring query heads share a key head: k0 k0 k1 k1.
        repeated = [group for group in range(groups) for _ in range(len(q) // groups)]
        x = x + join(attention(q, k[repeated], v[repeated], causal=True)) @ w["self_attn.o_proj"].T
        y = rms_norm(x, w["post_attention_layernorm"], eps)
        gate = y @ w["mlp.gate_proj"].T
        x = x + (gate * torch.sigmoid(gate) * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return rms_norm(x, state["language_model.model.norm.weight"], eps) @ state["language_model.lm_head.weight"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float, real: int | None = None) -> Tensor:
    """x [t, width] over the root of the mean square of its first `real` entries (of all without it), times weight [width]."""
    return x / torch.sqrt((x[:, :real] ** 2).mean(-1, keepdim=True) + eps) * weight


def heads(x: Tensor, d: int) -> Tensor:
    """[t, a·d] as [a, t, d]."""
    return torch.stack(x.split(d, dim=-1))


def join(x: Tensor) -> Tensor:
    """[a, t, d] as [t, a·d]."""
    return torch.cat(list(x), dim=-1)


def rotate(x: Tensor, theta: float) -> Tensor:
    """x [a, t, d] at positions 0, 1, ...: the pairs (i, i + d / 2) are turned by position · theta^(-2i / d)."""
    t, half = x.shape[1], x.shape[2] // 2
    angles = torch.arange(t, dtype=x.dtype)[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention of q, k and v [a, t, d], to [a, t, d]."""
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    if causal:
        t = q.shape[1]
        future = torch.arange(t)[None, :] > torch.arange(t)[:, None]
        scores = scores.masked_fill(future, float("-inf"))
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weights / weights.sum(-1, keepdim=True) @ v


def gelu(x: Tensor) -> Tensor:
    """The exact GELU of every entry."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
