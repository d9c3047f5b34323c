"""Hugging Face config.json and processor files of whole VLMs <-> ours: LLaVA in both layouts, LLaVA-NeXT, NVLM-D."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from neva.models.hf_config import (
    DECODERS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Json,
    decoder_config,
    decoder_json,
    must,
    vision_config,
    vision_json,
)
from neva.models.vit import Feature, VisionConfig
from neva.models.vlm import ImageConfig, VLMConfig

FEATURES: dict[str, Feature] = {"default": "patch", "full": "cls_patch"}
"""transformers' strategy -> ours, for an encoder with a class token; without one only `full` keeps every patch."""
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""Pillow's number of a filter -> its name."""


PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""What a LLaVA-NeXT's config means that lists none, in (height, width)."""


def llava_config(config: Json) -> VLMConfig:
    """Ours from the config.json of a `llava` or `llava_next` model of transformers. ValueError for a mechanism that we do not compute."""
    c = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **config}
    following = config.get("model_type") == "llava_next"
    must(c, {"projector_hidden_act": "gelu", "multimodal_projector_bias": True})
    must(c, {"use_image_newline_parameter": True} if following else {"image_grid_pinpoints": None})
    layer = c["vision_feature_layer"]
    if isinstance(layer, list) and len(layer) == 1:
        (layer,) = layer
    if not isinstance(layer, int):
        said = f"config.json says vision_feature_layer={layer}"
        raise ValueError(f"{said}; one layer can be read, not several joined.")
    vision = vision_config(c["vision_config"], select_layer=layer)
    strategy = c["vision_feature_select_strategy"]
    if not vision.class_token and strategy != "full":
        raise ValueError(f"vision_feature_select_strategy={strategy!r} drops the first patch of an encoder without class token; it must be 'full'.")
    if vision.class_token:
        vision = replace(vision, feature=FEATURES[strategy])
    image = ImageConfig(aspect="anyres", pinpoints=_pinpoints(c.get("image_grid_pinpoints") or PINPOINTS)) if following else ImageConfig()
    decoder = decoder_config(llava_text(c))
    return VLMConfig(decoder=decoder, vision=vision, projector="mlp2x_gelu", image=image)


def llava_text(config: Json) -> dict[str, Any]:
    """The config.json of a LLaVA's decoder by itself, tied where transformers takes it for tied."""
    text = {"model_type": "llama", **config["text_config"]}
    tied = config.get("tie_word_embeddings", False)
    if config["model_type"] == "llava":
        tied = tied or text.get("tie_word_embeddings", False)
    return {**text, "tie_word_embeddings": tied}


def _pinpoints(listed: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(high), int(wide)) for high, wide in listed)


def original_config(config: Json, vision: VisionConfig) -> VLMConfig:
    """Ours from the config.json of LLaVA's own repository, and its encoder's config. ValueError for what we do not compute."""
    if str(config.get("image_aspect_ratio")).startswith("anyres"):
        raise ValueError(_instead_of_next(config))
    must(config, {"mm_use_im_patch_token": False, "mm_patch_merge_type": "flat", "tune_mm_mlp_adapter": False})
    features: dict[str, Feature] = {"patch": "patch", "cls_patch": "cls_patch"}
    feature = features[config.get("mm_vision_select_feature", "patch")]
    kind = {None: "linear"}.get(config.get("mm_projector_type"), config.get("mm_projector_type"))
    aspect = {"pad": "pad", "square": "crop", None: "crop"}.get(config.get("image_aspect_ratio"))
    if aspect is None:
        raise ValueError(f"config.json says image_aspect_ratio={config['image_aspect_ratio']!r}; pad and square can be imported.")
    return VLMConfig(
        decoder=decoder_config(original_text(config)),
        vision=replace(vision, select_layer=config["mm_vision_select_layer"], feature=feature),
        projector=str(kind),
        image=ImageConfig(aspect=aspect),  # type: ignore[arg-type]
        use_im_start_end=config.get("mm_use_im_start_end", False),
    )


ORIGINAL = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2",
}
"""`model_type` that LLaVA's own repository writes -> the family of the decoder."""
ORIGINAL_CLASSES = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaMixtralForCausalLM": "mixtral",
    "LlavaQwenForCausalLM": "qwen2",
}
"""Its class of a model -> the same."""
BESIDE_TEXT = re.compile(r"mm_|image_|tune_|freeze_|use_mm|unfreeze_|tokenizer_")
"""How the fields begin that it writes beside those of the decoder."""


def original_text(config: Json) -> dict[str, Any]:
    """The config.json of the decoder in a LLaVA of the original repository.

    ValueError where `model_type` or the class names a decoder that we do not compute.
    """
    model_type = str(config.get("model_type"))
    family = ORIGINAL.get(model_type, model_type)
    named = config.get("architectures") or []
    classes = [str(name) for name in named if str(name).startswith("Llava")]
    if classes and model_type == "llava":  # what its first versions wrote whatever the decoder was
        family = ORIGINAL_CLASSES.get(classes[0], classes[0])
    if family not in DECODERS:
        raise ValueError(
            f"config.json says model_type={model_type!r}, architectures={named}: a LLaVA of that "
            f"decoder is not supported yet; there are {', '.join(ORIGINAL)}."
        )
    if classes and ORIGINAL_CLASSES.get(classes[0], family) != family:
        raise ValueError(
            f"config.json says model_type={model_type!r}, but architectures={named}: they name "
            f"decoders of different families, whose windows and biases differ. Correct one of them."
        )
    plain = {name: value for name, value in config.items() if not BESIDE_TEXT.match(name)}
    return {**plain, "model_type": family, "architectures": [DECODERS[family].architecture]}


NEXT_PUBLISHED = {
    ("llama", 4096): "llava-v1.6-vicuna-7b-hf",
    ("llama", 5120): "llava-v1.6-vicuna-13b-hf",
    ("llama", 7168): "llava-v1.6-34b-hf",
    ("mistral", 4096): "llava-v1.6-mistral-7b-hf",
}
"""Family and width of the decoder of a published LLaVA-NeXT -> its name at llava-hf."""


def _instead_of_next(config: Json) -> str:
    """What to import in place of a LLaVA-NeXT in LLaVA's own layout, which is not read."""
    text = original_text(config)
    name = NEXT_PUBLISHED.get((text["model_type"], text.get("hidden_size", 0)), "llava-v1.6-…-hf")
    said = f"config.json says image_aspect_ratio={config['image_aspect_ratio']!r}: this is LLaVA-NeXT (1.6) in LLaVA's own layout, which is not read"
    fix = f"import the same model in transformers' layout, hf:llava-hf/{name}"
    tuned = "one that you tuned: convert it with convert_llava_next_weights_to_hf.py of transformers 4"
    return f"{said}; {fix}; {tuned}."


def named_side(name: str) -> int:
    """Pixels a side that the name of a published encoder tells; 0 where it tells none.

    named_side("openai/clip-vit-large-patch14-336") == 336
    """
    match = re.search(r"patch\d+-(\d{2,4})$|-(\d{2,4})px(?:-|$)", name)
    if match:
        return int(match[1] or match[2])
    return 224 if re.search(r"clip-vit-.*patch\d+$", name) else 0


ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
"""Class of an NVLM-D's decoder -> its family; the `model_type` beside it says `llama` whatever it is."""
NVLM_TAG, NVLM_AROUND = "<tile_global_thumbnail>", ("<Image>", "</Image>")
"""What NVLM-D's code writes beside images: no config.json says so."""


def nvlm_config(config: Json, *, qkv_rows: int = 0) -> VLMConfig:
    """Ours from the config.json of an `NVLM_D` (nvidia/NVLM-D-72B). ValueError for a mechanism that we do not compute.

    Prompts are tokenised as its published code does, tags with the text before them; in training they were tokenised apart (image.tag_tokens).
    """
    must(config, {"downsample_ratio": 0.5, "use_backbone_lora": 0, "use_llm_lora": 0, "use_thumbnail": True})
    seen = {**config["vision_config"], "image_size": config.get("force_image_size") or config["vision_config"]["image_size"]}
    stored_side(config)  # for its errors
    dynamic = config.get("dynamic_image_size", True)
    fewest, most = (config.get("min_dynamic_patch", 1), config.get("max_dynamic_patch", 6)) if dynamic else (1, 1)
    image = ImageConfig(
        aspect="tiles", min_tiles=fewest, max_tiles=most, thumbnail="last", tags="1d",
        thumbnail_tag=NVLM_TAG, tag_tokens="joined",
        prefix=NVLM_AROUND[0], suffix=NVLM_AROUND[1],
    )  # fmt: skip
    return VLMConfig(
        decoder=decoder_config(nvlm_text(config)), vision=vision_config(seen, select_layer=config.get("select_layer", -1), qkv_rows=qkv_rows),
        projector="norm_ffn_gelu", pixel_shuffle=config.get("ps_version", "v2"), image=image,
    )  # fmt: skip


def stored_side(config: Json) -> int:
    """Pixels a side that an NVLM-D's stored position embeddings are of; `force_image_size` resizes
    them. ValueError for a size that is none."""
    return vision_config(config["vision_config"]).image


def nvlm_text(config: Json) -> dict[str, Any]:
    """The config.json of an NVLM-D's decoder by itself."""
    text = config["llm_config"]
    (architecture,) = text.get("architectures") or ["Qwen2ForCausalLM"]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"config.json says llm_config.architectures={architecture!r}; there are {', '.join(ARCHITECTURES)}.")
    return {**text, "model_type": ARCHITECTURES[architecture]}


def image_config(processor: Json, file: str = "preprocessor_config.json") -> tuple[ImageConfig, dict[str, Any]]:
    """From a preprocessor_config.json: how an image is brought to size, and the encoder's fields image, mean and std.

    ValueError for a step that we do not do.
    """
    p = processor.get("image_processor", processor)
    must(p, {"do_normalize": True, "do_rescale": True, "do_resize": True}, file)
    if abs(p.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        raise ValueError(f"{file} says rescale_factor={p['rescale_factor']}; only 1/255 can be imported.")
    size, crop = p.get("size"), p.get("crop_size", {})
    kind = str(p.get("image_processor_type", p.get("feature_extractor_type", "CLIP")))
    if isinstance(size, int):  # the shortest edge for processors that crop, a square for others
        size = {"shortest_edge": size} if p.get("do_center_crop", "CLIP" in kind or "Llava" in kind) else {"height": size, "width": size}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    size = {name: value for name, value in size.items() if value is not None} if isinstance(size, Mapping) else {}
    padded, cropped = p.get("do_pad"), p.get("do_center_crop", "shortest_edge" in size)
    side = size.get("shortest_edge", size.get("height"))
    # Of a padded square all edges are the shortest.
    legal = {"shortest_edge": side} if cropped or (padded and "shortest_edge" in size) else {"height": side, "width": side}
    if not side or size != legal:
        said = f"{file} says size={p.get('size')!r}{', and then a crop' if cropped else ''}"
        raise ValueError(f"{said}; a square (equal height and width), or shortest_edge and then a crop to it, can be imported.")
    kept = side
    if cropped and crop:
        kept = crop.get("height")
        if crop.get("width") != kept or not (isinstance(kept, int) and 0 < kept <= side):
            raise ValueError(f"{file} resizes to {side} and crops to {dict(crop)}; a square of at most {side} can be imported.")
    if p.get("resample", 3) not in RESAMPLE:
        filters = ", ".join(f"{number} ({name})" for number, name in RESAMPLE.items())
        raise ValueError(f"{file} says resample={p['resample']!r}; {filters} can be imported.")
    aspect = "pad" if padded else "crop" if cropped else "square"
    views: dict[str, Any] = {}
    if kind.startswith("LlavaNext") or p.get("image_grid_pinpoints"):
        aspect = "anyres"
        views = {"pinpoints": _pinpoints(p.get("image_grid_pinpoints") or PINPOINTS)}
    if aspect != "crop" and kept != side:
        raise ValueError(f"{file} resizes to {side} and crops to {dict(crop)}; only equal sizes can be imported.")
    share = kept / side
    found = {"image": kept, "mean": tuple(p["image_mean"]) if "image_mean" in p else None, "std": tuple(p["image_std"]) if "image_std" in p else None}
    resample: Any = RESAMPLE[p.get("resample", 3)]
    pixels = {name: value for name, value in found.items() if value}
    return ImageConfig(aspect=aspect, resample=resample, crop_share=share, **views), pixels  # type: ignore[arg-type]


# Writing.


def llava_json(config: VLMConfig, *, image_token: int, pad_token: int | None, source: Json | None = None) -> dict[str, Any]:
    """A config.json for transformers' LLaVA or LLaVA-NeXT. ValueError naming each field that the format cannot hold."""
    _check_held("transformers' llava", config, LLAVA_HOLDS)
    vision, following = config.vision, config.image.aspect == "anyres"
    assert vision is not None, "a model of text is a decoder"
    strategy = next(name for name, feature in FEATURES.items() if feature == vision.feature) if vision.class_token else "full"
    source = source or {}
    text = {"model_type": "llama", **source["text_config"]} if source else None
    written = {
        **({"architectures": [NEXT if following else LLAVA], "projector_hidden_act": "gelu"} | dict(source)),
        "model_type": "llava_next" if following else "llava",
        "text_config": decoder_json(config.decoder, text),
        "vision_config": vision_json(vision, source.get("vision_config")),
        "vision_feature_layer": vision.select_layer,
        "vision_feature_select_strategy": strategy,
        "image_token_index": image_token,
        "image_seq_length": vision.tokens,
        "tie_word_embeddings": config.decoder.tied,
    }
    if following:
        written["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in config.image.pinpoints]
    if pad_token is not None:
        written["pad_token_id"] = pad_token
    return written


def nvlm_json(config: VLMConfig, *, source: Json | None = None) -> dict[str, Any]:
    """A config.json for NVLM-D, as nvidia/NVLM-D-72B has it and vLLM reads it. ValueError naming each field that the format cannot hold."""
    _check_held("NVLM_D", config, NVLM_HOLDS)
    image, vision, source = config.image, config.vision, source or {}
    assert vision is not None, "a model of text is a decoder"
    text = decoder_json(config.decoder, nvlm_text(source) if source else None)
    known = {family: architecture for architecture, family in ARCHITECTURES.items()}
    if text["model_type"] not in known:
        raise ValueError(f"NVLM_D cannot hold a decoder of the family {text['model_type']}; it has {', '.join(known)}")
    text |= {"architectures": [known[text["model_type"]]], "model_type": source.get("llm_config", {}).get("model_type", text["model_type"])}
    return {
        **({"architectures": ["NVLM_D"], "model_type": "NVLM_D", "downsample_ratio": 0.5, "template": "chatml"} | dict(source)),
        "llm_config": text,
        "vision_config": vision_json(vision, {**source.get("vision_config", {}), "model_type": "intern_vit_6b"}),
        "force_image_size": vision.image,
        "ps_version": config.pixel_shuffle,
        "select_layer": vision.select_layer,
        "dynamic_image_size": image.max_tiles > 1,
        "use_thumbnail": True,
        "min_dynamic_patch": image.min_tiles,
        "max_dynamic_patch": image.max_tiles,
    }


def _check_held(format: str, config: VLMConfig, holds: Mapping[str, tuple[object, ...]]) -> None:
    def value(name: str) -> object:
        found: Any = config
        for part in name.split("."):
            found = getattr(found, part)
        return found

    cannot = [f"{name}={value(name)!r}" for name, legal in holds.items() if value(name) not in legal]
    if cannot:
        has = ", ".join(f"{name}={' or '.join(map(repr, holds[name]))}" for name in holds if value(name) not in holds[name])
        raise ValueError(
            f"{format} cannot hold {', '.join(cannot)}; it has {has}. Parts can be exported by themselves: --part decoder, --part vision."
        )


LLAVA, NEXT = "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration"
LLAVA_HOLDS: dict[str, tuple[object, ...]] = {
    "inline": ("all",), "decoder.cross_layers": ((),), "projector": ("mlp2x_gelu",), "pixel_shuffle": ("none",), "use_im_start_end": (False,),
    "image.aspect": ("square", "pad", "crop", "anyres"), "image.tags": ("none",),
}  # fmt: skip
"""Field of a VLM -> the values that transformers' LLaVA and LLaVA-NeXT can hold."""
NVLM_HOLDS: dict[str, tuple[object, ...]] = {
    "inline": ("all",), "decoder.cross_layers": ((),), "projector": ("norm_ffn_gelu",), "pixel_shuffle": ("v1", "v2"), "use_im_start_end": (False,),
    "image.aspect": ("tiles",), "image.thumbnail": ("last",), "image.tags": ("1d",), "image.thumbnail_tag": (NVLM_TAG,),
    "image.resample": ("bicubic",), "image.prefix": (NVLM_AROUND[0],), "image.suffix": (NVLM_AROUND[1],), "image.process": ("",),
    "vision.mean": (IMAGENET_MEAN,), "vision.std": (IMAGENET_STD,),
}  # fmt: skip
"""The same of NVLM-D."""


def processor_class(aspect: str) -> str:
    """transformers' processor of a LLaVA whose images are brought to size so."""
    return "LlavaNextProcessor" if aspect == "anyres" else "LlavaProcessor"


def processor_json(image: ImageConfig, vision: VisionConfig) -> dict[str, Any]:
    """A preprocessor_config.json that brings images to size as we do. ValueError where no processor of transformers does."""
    if image.process:
        raise ValueError(f"preprocessor_config.json cannot hold image.process={image.process!r}: users of the export must run it themselves")
    side, number = vision.image, next(number for number, name in RESAMPLE.items() if name == image.resample)
    common = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": list(vision.mean),
        "image_std": list(vision.std), "resample": number, "rescale_factor": 1 / 255,
    }  # fmt: skip
    if image.aspect == "square":
        return {**common, "image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}}
    if image.aspect == "tiles":
        patches = {"crop_to_patches": True, "min_patches": image.min_tiles, "max_patches": image.max_tiles}
        return {**common, **patches, "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": side, "width": side}}
    cut = {"height": side, "width": side}
    short = round(side / image.crop_share)
    sized = {**common, "crop_size": cut, "do_center_crop": True, "size": {"shortest_edge": short}}
    if image.aspect == "crop":
        return {**sized, "image_processor_type": "CLIPImageProcessor"}
    if image.aspect == "anyres":
        pinpoints = {"image_grid_pinpoints": [list(pinpoint) for pinpoint in image.pinpoints]}
        return {**sized, **pinpoints, "image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
    return {**sized, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
