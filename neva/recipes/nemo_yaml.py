"""A NeMo 1.0 `neva_config.yaml` -> a stage of ours, with one line for every key: where it went, or why it did not.

`KEYS` is the whole table; `*` stands for any text. A key that it does not list is said to be unknown, never dropped in silence.
"""

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from neva import config as tree
from neva.checkpoint.nemo_config import TEMPLATES, decoder_config, vlm_config
from neva.data.templates import TEMPLATES as FORMATS
from neva.job import NAMED, TrainConfig
from neva.models.vlm import VLMConfig


@dataclass(frozen=True, kw_only=True)
class Line:
    """What became of a key."""

    key: str
    value: Any
    kind: str
    """`to` (mapped), `none` (has no meaning here), `no` (not supported), `unknown`."""
    text: str
    """Where it went, or why it did not."""


def _bool(value: Any) -> str:
    return str(bool(value)).lower()


def _precision(value: Any) -> str:
    return {"bf16": "bf16", "bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}.get(str(value), "auto")


Rule = tuple[str, str] | tuple[str, str, Callable[[Any], Any]]
KEYS: dict[str, Rule] = {
    "name": ("to", "out", lambda v: f"runs/{v}"),
    "restore_from_path": ("to", "init.model"),
    "trainer.max_steps": ("to", "steps"),
    "trainer.precision": ("to", "precision", _precision),
    "trainer.gradient_clip_val": ("to", "optim.clip"),
    "trainer.val_check_interval": ("none", "set evaluate.every together with evaluate.source"),
    "trainer.log_every_n_steps": ("to", "log.every"),
    "trainer.accumulate_grad_batches": ("none", "micro-batches follow from batch.rows, batch.micro_rows and the number of ranks"),
    "trainer.devices": ("none", "the launcher says how many processes run: --nproc, torchrun"),
    "trainer.num_nodes": ("none", "the launcher says how many nodes run"),
    "trainer.accelerator": ("none", "a GPU is used where there is one"),
    "trainer.limit_val_batches": ("none", "an evaluation asks every question of evaluate.source"),
    "trainer.limit_test_batches": ("none", "an evaluation asks every question of evaluate.source"),
    "trainer.max_epochs": ("none", "a stage has steps; the data begins again by itself"),
    "trainer.*": ("none", "belongs to PyTorch Lightning, which neva does not use"),
    "exp_manager.explicit_log_dir": ("to", "out"),
    "exp_manager.exp_dir": ("none", "out names the run's folder"),
    "exp_manager.create_tensorboard_logger": ("to", "log.tensorboard", _bool),
    "exp_manager.create_wandb_logger": ("no", "there is TensorBoard and metrics.jsonl"),
    "exp_manager.wandb_logger_kwargs.*": ("no", "there is TensorBoard and metrics.jsonl"),
    "exp_manager.resume_if_exists": ("none", "neva train … --resume auto"),
    "exp_manager.resume_ignore_no_checkpoint": ("none", "--resume auto starts fresh where there is no checkpoint"),
    "exp_manager.checkpoint_callback_params.save_top_k": ("to", "checkpoint.keep_last"),
    "exp_manager.checkpoint_callback_params.every_n_train_steps": ("to", "checkpoint.every"),
    "exp_manager.*": ("none", "belongs to NeMo's experiment manager; a run's folder, resuming and logs need no settings here"),
    "model.precision": ("to", "precision", _precision),
    "model.micro_batch_size": ("none", "packed rows: batch.micro_rows rows of batch.seq_length tokens, 1 unless set"),
    "model.global_batch_size": ("to", "batch.rows = samples x 800 tokens / seq_length; set it by your own samples' mean length"),
    "model.tensor_model_parallel_size": ("no", "all ranks form one fully sharded group; tensor parallelism is not built yet"),
    "model.pipeline_model_parallel_size": ("no", "all ranks form one fully sharded group; pipelines are not built yet"),
    "model.virtual_pipeline_model_parallel_size": ("no", "pipelines are not built yet"),
    "model.context_parallel_size": ("no", "context parallelism is not built yet"),
    "model.expert_model_parallel_size": ("no", "expert parallelism is not built yet"),
    "model.sequence_parallel": ("no", "comes with tensor parallelism, which is not built yet"),
    "model.restore_from_path": ("to", "init.model"),
    "model.mm_cfg.llm.from_pretrained": ("to", "init.decoder"),
    "model.mm_cfg.llm.freeze": ("to", "trainable"),
    "model.mm_cfg.llm.model_type": ("to", "data.template"),
    "model.mm_cfg.vision_encoder.from_pretrained": ("to", "init.vision"),
    "model.mm_cfg.vision_encoder.from_hf": ("none", "init.vision takes Hugging Face folders, hf:org/name and .nemo files alike"),
    "model.mm_cfg.vision_encoder.patch_dim": ("to", "model.vision.patch"),
    "model.mm_cfg.vision_encoder.crop_size": ("to", "model.vision.image"),
    "model.mm_cfg.vision_encoder.hidden_size": ("to", "model.vision.width"),
    "model.mm_cfg.vision_encoder.vision_select_layer": ("to", "model.vision.select_layer"),
    "model.mm_cfg.vision_encoder.vision_select_feature": ("to", "model.vision.feature"),
    "model.mm_cfg.vision_encoder.class_token_length": ("to", "model.vision.class_token"),
    "model.mm_cfg.vision_encoder.freeze": ("to", "trainable"),
    "model.mm_cfg.pretrain_mm_mlp_adapter": ("to", "init.projector"),
    "model.mm_cfg.mm_mlp_adapter_type": ("to", "model.projector, model.pixel_shuffle"),
    "model.mm_cfg.use_im_start_end": ("to", "model.use_im_start_end", _bool),
    "model.mm_cfg.use_lita": ("no", "LITA's time tokens are not built"),
    "model.mm_cfg.lita.*": ("no", "LITA's time tokens are not built"),
    "model.mcore_gpt": ("none", "there is one decoder; import reads both key styles"),
    "model.encoder_seq_length": ("to", "batch.seq_length, model.decoder.max_positions"),
    "model.max_position_embeddings": ("to", "model.decoder.max_positions"),
    "model.position_embedding_type": ("to", "model.decoder.positions"),
    "model.rotary_percentage": ("to", "model.decoder.rotary_fraction"),
    "model.rotary_base": ("to", "model.decoder.rope_theta"),
    "model.seq_len_interpolation_factor": ("to", "model.decoder.rope_scaling (linear)"),
    "model.num_layers": ("to", "model.decoder.layers"),
    "model.hidden_size": ("to", "model.decoder.width"),
    "model.ffn_hidden_size": ("to", "model.decoder.ffn"),
    "model.num_attention_heads": ("to", "model.decoder.heads"),
    "model.num_query_groups": ("to", "model.decoder.kv_heads"),
    "model.kv_channels": ("to", "model.decoder.head_width"),
    "model.hidden_dropout": ("to", "model.decoder.hidden_dropout, model.decoder.embedding_dropout"),
    "model.attention_dropout": ("to", "model.decoder.attention_dropout"),
    "model.ffn_dropout": ("to", "model.decoder.ffn_dropout"),
    "model.normalization": ("to", "model.decoder.norm"),
    "model.layernorm_epsilon": ("to", "model.decoder.eps"),
    "model.do_layer_norm_weight_decay": ("none", "weight decay is applied to matrices alone"),
    "model.attention_type": ("none", "attention is always multi-head, with fewer key-value heads where the config says so"),
    "model.bias": ("to", "model.decoder.qkv_bias, out_bias, mlp_bias"),
    "model.activation": ("to", "model.decoder.mlp"),
    "model.openai_gelu": ("to", "model.decoder.mlp"),
    "model.bias_activation_fusion": ("to", "model.decoder.mlp (Megatron's fusion of bias and GELU is the tanh approximation)"),
    "model.bias_gelu_fusion": ("none", "kernels are fused by torch.compile: compile=true"),
    "model.window_size": ("to", "model.decoder.window"),
    "model.num_moe_experts": ("to", "model.decoder.experts"),
    "model.moe_router_topk": ("to", "model.decoder.active_experts"),
    "model.moe_aux_loss_coeff": ("to", "model.decoder.balance"),
    "model.moe_*": ("none", "the router is Mixtral's: softmax over all experts, the likeliest k, their weights adding up to 1"),
    "model.share_embeddings_and_output_weights": ("to", "model.decoder.tied"),
    "model.headscale": ("no", "no family of neva scales heads"),
    "model.transformer_block_type": ("to", "pre_ln is what every decoder here is; others are refused"),
    "model.init_method_std": ("none", "fresh weights follow stated rules; a decoder comes from init.decoder"),
    "model.use_scaled_init_method": ("none", "fresh weights follow stated rules; a decoder comes from init.decoder"),
    "model.make_vocab_size_divisible_by": ("none", "the embedding has the rows of the checkpoint"),
    "model.pre_process": ("none", "pipeline stages are cut by neva, not by config"),
    "model.post_process": ("none", "pipeline stages are cut by neva, not by config"),
    "model.persist_layer_norm": ("none", "names a kernel; the value is the same"),
    "model.apply_query_key_layer_scaling": ("none", "cancels out in exact arithmetic; softmax is in fp32 here"),
    "model.attention_softmax_in_fp32": ("none", "always so"),
    "model.masked_softmax_fusion": ("none", "names a kernel; attention over packed rows has its own"),
    "model.bias_dropout_add_fusion": ("none", "names a kernel; compile=true fuses"),
    "model.get_attention_mask_from_fusion": ("none", "names a kernel; masks come from document bounds"),
    "model.apply_rope_fusion": ("none", "names a kernel; compile=true fuses"),
    "model.normalize_attention_scores": ("none", "always so"),
    "model.use_flash_attention": ("none", "always on where the device has it: varlen attention on CUDA"),
    "model.megatron_amp_O2": ("none", "always so in bf16: fp32 master weights, frozen parts stored in bf16"),
    "model.native_amp_init_scale": ("no", "fp16 training is not built; bf16 needs no loss scale"),
    "model.native_amp_growth_interval": ("no", "fp16 training is not built; bf16 needs no loss scale"),
    "model.hysteresis": ("no", "fp16 training is not built; bf16 needs no loss scale"),
    "model.fp32_residual_connection": ("none", "the residual stream has the compute dtype"),
    "model.fp16_lm_cross_entropy": ("none", "the loss is in fp32"),
    "model.grad_allreduce_chunk_size_mb": ("none", "FSDP2 reduces by block"),
    "model.grad_div_ar_fusion": ("none", "gradients are summed; the loss is divided by the global count of label tokens"),
    "model.gradient_accumulation_fusion": ("none", "names a kernel"),
    "model.gradient_as_bucket_view": ("none", "belongs to DDP; parameters are sharded here"),
    "model.sync_batch_comm": ("none", "belongs to Megatron's pipelines"),
    "model.activations_checkpoint_granularity": ("to", "recompute"),
    "model.activations_checkpoint_method": ("none", "recompute=block does every block"),
    "model.activations_checkpoint_num_layers": ("none", "recompute=block does every block"),
    "model.num_micro_batches_with_partial_activation_checkpoints": ("none", "recompute=block does every block"),
    "model.activations_checkpoint_layers_per_pipeline": ("none", "recompute=block does every block"),
    "model.transformer_engine": ("none", "neva needs no Transformer Engine"),
    "model.fp8": ("no", "fp8 training is not built yet"),
    "model.fp8_*": ("no", "fp8 training is not built yet"),
    "model.use_emha": ("none", "names a kernel"),
    "model.reduce_amax": ("no", "fp8 training is not built yet"),
    "model.ub_tp_comm_overlap*": ("none", "belongs to Megatron's tensor parallelism"),
    "model.seed": ("to", "seed"),
    "model.resume_from_checkpoint": ("none", "neva train … --resume PATH"),
    "model.use_cpu_initialization": ("none", "fresh weights are always drawn on the CPU, equal under any layout"),
    "model.onnx_safe": ("none", "nothing is exported to ONNX"),
    "model.apex_transformer_log_level": ("none", "neva does not use Apex"),
    "model.gc_interval": ("none", "belongs to NeMo's loop"),
    "model.nsys_profile.*": ("no", "use nsys or torch.profiler around the command"),
    "model.tokenizer.model": ("to", "data.tokenizer"),
    "model.tokenizer.type": ("to", "data.tokenizer"),
    "model.tokenizer.library": ("none", "the kind of a tokenizer is seen from its file"),
    "model.tokenizer.additional_special_tokens": ("none", "image features have ids of their own, outside the vocabulary"),
    "model.tokenizer.*": ("none", "a tokenizer is one file or folder: data.tokenizer"),
    "model.data.packed_sequence": ("none", "rows are always packed"),
    "model.data.num_workers": ("to", "data.workers"),
    "model.data.dataloader_type": ("none", "one global order, a function of the seed; it begins again after each epoch"),
    "model.data.data_path": ("to", "data.source"),
    "model.data.lazy_preprocess": ("none", "images are always read when they are needed"),
    "model.data.is_multimodal": ("none", "samples with and without images mix"),
    "model.data.media_type": ("none", "neva reads images; video is not built"),
    "model.data.sep_image_conv_front": ("no", "an image stands at the front of its turn, as in LLaVA-1.5"),
    "model.data.conv_template": ("to", "data.template"),
    "model.data.crop_size": ("to", "model.vision.image (from mm_cfg.vision_encoder.crop_size where they differ)"),
    "model.data.image_token_len": ("none", "follows from image size, patch size and pixel shuffle"),
    "model.data.image_folder": ("to", "data.image_folder"),
    "model.data.image_aspect_ratio": ("to", "model.image.aspect"),
    "model.data.video_folder": ("no", "video is not built"),
    "model.data.num_frames": ("no", "video is not built"),
    "model.data.splice_single_frame": ("no", "video is not built"),
    "model.data.sep_token_between_frames": ("no", "video is not built"),
    "model.data.add_extra_token": ("none", "labels are shifted within each document"),
    "model.optim.name": ("to", "AdamW, fused, is the optimiser of every stage"),
    "model.optim.lr": ("to", "optim.lr"),
    "model.optim.weight_decay": ("to", "optim.weight_decay"),
    "model.optim.betas": ("to", "optim.betas", lambda v: f"[{v[0]}, {v[1]}]"),
    "model.optim.eps": ("to", "optim.eps"),
    "model.optim.sched.name": ("to", "optim.schedule"),
    "model.optim.sched.warmup_steps": ("to", "optim.warmup"),
    "model.optim.sched.warmup_ratio": ("to", "optim.warmup"),
    "model.optim.sched.min_lr": ("to", "optim.min_lr"),
    "model.optim.sched.constant_steps": ("no", "the rate falls to its least at the last step of the stage"),
    "model.optim.sched.*": ("none", "the schedule runs over the stage's steps"),
    "model.optim.*": ("none", "belongs to Apex's or Megatron's optimiser"),
    "model.peft.*": ("no", "LoRA is not built yet"),
}  # fmt: skip
_PLAIN = re.compile(r"[a-z_]+(\.[a-z_]+)*")
"""A place that is one key of ours, to which the value goes as it is."""


def convert(path: Path) -> tuple[TrainConfig, list[Line]]:
    """The stage that a NeMo config means, and a line for each of its keys. ValueError for a file that is none."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(loaded, dict) or "mm_cfg" not in (loaded.get("model") or {}):
        raise ValueError(f"{path} is no neva_config.yaml of NeMo 1.0: it has no model.mm_cfg")
    data = {key: _resolved(value, loaded) for key, value in _leaves(loaded)}
    lines = [_line(key, value) for key, value in data.items()]
    try:
        return _stage(_nested(data), lines, data), lines
    except KeyError as error:
        raise ValueError(f"{path} lacks {error}") from None


def _line(key: str, value: Any) -> Line:
    rule = KEYS.get(key) or next((rule for pattern, rule in KEYS.items() if "*" in pattern and fnmatch.fnmatchcase(key, pattern)), None)
    if rule is None:
        return Line(key=key, value=value, kind="unknown", text="not known to neva, and not carried over")
    return Line(key=key, value=value, kind=rule[0], text=rule[1])


def _stage(nested: Mapping[str, Any], lines: list[Line], data: Mapping[str, Any]) -> TrainConfig:
    m = nested["model"]
    mm = m["mm_cfg"]
    model = vlm_config({**m, "mm_cfg": {**mm, "use_im_start_end": False}}, decoder_config(m))
    frozen, frozen_vision = mm.get("llm", {}).get("freeze", False), mm.get("vision_encoder", {}).get("freeze", True)
    trainable = ["projector.*", *(() if frozen else ("decoder.*", "head.*")), *(() if frozen_vision else ("vision.*",))]
    settings = [f"trainable=[{', '.join(trainable)}]", f"batch.seq_length={m['encoder_seq_length']}"]
    if m.get("global_batch_size"):
        settings.append(f"batch.rows={max(1, round(m['global_batch_size'] * 800 / m['encoder_seq_length']))}")
    if m.get("activations_checkpoint_granularity"):
        settings.append("recompute=block")
    kind = m.get("data", {}).get("conv_template") or mm.get("llm", {}).get("model_type") or ""
    settings += [f"data.template={TEMPLATES.get(kind, kind)}"] if TEMPLATES.get(kind, kind) in FORMATS else []
    schedule = {"CosineAnnealing": "cosine", "WarmupAnnealing": "linear", "constant": "constant"}.get(m.get("optim", {}).get("sched", {}).get("name"))
    settings += [f"optim.schedule={schedule}"] if schedule else []
    for line in lines:
        rule = KEYS.get(line.key)
        if rule is None or rule[0] != "to" or not _PLAIN.fullmatch(rule[1]) or rule[1].startswith("model.") or line.value in (None, ""):
            continue
        if rule[1] in ("trainable", "recompute", "data.template", "optim.schedule") or "${" in str(line.value):
            continue
        value = rule[2](line.value) if len(rule) > 2 else line.value
        settings.append(f"{rule[1]}={value}")
    if mm.get("use_im_start_end"):
        settings.append("model.use_im_start_end=true")
    (stage,) = tree.override((TrainConfig(name="pretrain" if frozen else "finetune", model=model),), settings, named=NAMED)
    assert isinstance(stage.model, VLMConfig)
    return stage


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, node


def _resolved(value: Any, root: Mapping[str, Any]) -> Any:
    """`${a.b}` replaced by what the file says there; other references stay as they are."""
    match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
    if match is None:
        return value
    node: Any = root
    for name in match[1].split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return value if node is None else node


def _nested(data: Mapping[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in data.items():
        *path, last = key.split(".")
        node = root
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    return root
