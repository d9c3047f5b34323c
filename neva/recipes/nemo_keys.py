"""What every key of a NeMo 1.0 `neva_config.yaml` means here: where it goes and how it is read, or why it goes nowhere.

`KEYS` is the whole table; `*` stands for any text. A reader gives our value of theirs. It raises `Unsupported` for what we know and do
not do, which becomes a line, and ValueError for what is no value of its key, which ends the conversion.
"""

from collections.abc import Callable
from typing import Any

from neva.checkpoint.nemo_config import PROJECTORS, amount, flag, number, size, square, whole
from neva.checkpoint.nemo_config import TEMPLATES as FORMATS
from neva.data.templates import TEMPLATES


class Unsupported(Exception):
    """A value that neva knows and does not do; the message says what holds in its place."""


def text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{value!r} is no text")
    return str(value)


def _only(*fine: Any) -> Callable[[Any], Any]:
    """Reads what neva does anyway."""

    def read(value: Any) -> Any:
        if value not in fine:
            raise Unsupported("")
        return value

    return read


def _one_of(words: dict[str, Any], instead: str) -> Callable[[Any], Any]:
    """Reads a word that has an equal here."""

    def read(value: Any) -> Any:
        if str(value) not in words:
            raise Unsupported(f"there are {', '.join(words)}; {instead}")
        return words[str(value)]

    return read


def _share(value: Any) -> float:
    if not 0 <= number(value) < 1:
        raise ValueError(f"{value!r} is no share of the steps, 0 or more and less than 1")
    return number(value)


def _count(value: Any) -> int:
    return whole(value, 1)


def _layer(value: Any) -> int:
    return whole(value, -1000)


def _steps(value: Any) -> int:
    if whole(value, -1) < 1:
        raise Unsupported("a stage has a number of steps; set steps")
    return whole(value)


def _end(value: Any) -> int:
    return whole(value, -1)


def _clip(value: Any) -> float:
    return max(0.0, number(value))  # NeMo does not clip by 0 or less, nor does neva by 0


def _kept(value: Any) -> int:
    """Lightning's -1 is our 0, all; its 0, none, is nothing here."""
    if whole(value, -1) == 0:
        raise Unsupported("a stage's last step is always saved; checkpoint.every=0 saves no other")
    return max(0, whole(value, -1))


def _class_token(value: Any) -> bool:
    if whole(value) > 1:
        raise Unsupported("an encoder has one class token or none")
    return bool(whole(value))


def _projector(value: Any) -> str:
    if str(value) not in PROJECTORS:
        raise ValueError(f"{value!r} is not built; there are {', '.join(PROJECTORS)}")
    return str(value)


def _template(value: Any) -> str:
    name = FORMATS.get(str(value), str(value))
    if name not in TEMPLATES:
        raise Unsupported("no chat format of neva has this name; set data.template to one of `neva templates`, or to a file of Jinja")
    return name


def _folder(value: Any) -> str:
    if text(value).endswith(".tar"):
        raise Unsupported("images are read from a folder; unpack the archive and set data.image_folder")
    return text(value)


def _paths(value: Any) -> list[str]:
    if value == []:
        raise ValueError("the list is empty; it names the data files")
    return [text(one) for one in (value if isinstance(value, list) else [value])]


def _weights(value: Any) -> list[float]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is no list of weights")
    return [amount(one) for one in value]


def _betas(value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{value!r} is no pair of numbers")
    return [_share(one) for one in value]


_precision = _one_of({"bf16": "bf16", "bf16-mixed": "bf16", "32": "fp32", "32-true": "fp32"}, "precision stays auto")
_feature = _one_of({"patch": "patch", "cls_patch": "cls_patch"}, "model.vision.feature stays patch")
_recompute = _one_of({"full": "block"}, "fused attention keeps nothing that `selective` would compute again; recompute stays none")
_shuffle = _one_of({"cyclic": True, "single": False}, "data.shuffle stays true")
_optimiser = _one_of(
    dict.fromkeys(("fused_adam", "adamw", "distributed_fused_adam", "megatron_fused_adam", "mcore_distributed_optim", "adam"), "adamw"),
    "AdamW is the optimiser of every stage",
)
_schedule = _one_of(
    {
        "CosineAnnealing": "cosine",
        "WarmupAnnealing": "linear",
        "PolynomialDecayAnnealing": "linear",
        "WarmupPolicy": "constant",
        "WarmupHoldPolicy": "constant",
    },
    "optim.schedule stays cosine",
)

Rule = tuple[str, str] | tuple[str, str, Callable[[Any], Any]]
KEYS: dict[str, Rule] = {
    "defaults": ("no", "neva reads this one file; let Hydra compose the whole: python neva_pretrain.py … --cfg job --resolve"),
    "hydra.*": ("none", "belongs to Hydra"),
    "run.*": ("none", "belongs to NeMo's Launcher; --nproc or torchrun start a run"),
    "name": ("to", "out", text),
    "restore_from_path": ("to", "init.model", text),
    "trainer.max_steps": ("to", "steps", _steps),
    "trainer.precision": ("to", "precision", _precision),
    "trainer.gradient_clip_val": ("to", "optim.clip", _clip),
    "trainer.val_check_interval": ("none", "set evaluate.every together with evaluate.source"),
    "trainer.log_every_n_steps": ("to", "log.every", whole),
    "trainer.accumulate_grad_batches": ("none", "micro-batches follow from batch.rows, batch.micro_rows and the number of ranks"),
    "trainer.devices": ("none", "the launcher says how many processes run: --nproc, torchrun"),
    "trainer.num_nodes": ("none", "the launcher says how many nodes run"),
    "trainer.accelerator": ("none", "a GPU is used where there is one"),
    "trainer.limit_val_batches": ("none", "an evaluation asks every question of evaluate.source"),
    "trainer.limit_test_batches": ("none", "an evaluation asks every question of evaluate.source"),
    "trainer.max_epochs": ("none", "a stage has steps; the data begins again by itself"),
    "trainer.*": ("none", "belongs to PyTorch Lightning, which neva does not use"),
    "exp_manager.explicit_log_dir": ("to", "out", text),
    "exp_manager.exp_dir": ("to", "out", text),
    "exp_manager.name": ("to", "out", text),
    "exp_manager.create_tensorboard_logger": ("to", "log.tensorboard", flag),
    "exp_manager.create_wandb_logger": ("no", "there is TensorBoard and metrics.jsonl"),
    "exp_manager.wandb_logger_kwargs.*": ("no", "there is TensorBoard and metrics.jsonl"),
    "exp_manager.create_checkpoint_callback": ("none", "a stage always ends in a checkpoint"),
    "exp_manager.resume_if_exists": ("none", "neva train … --resume auto"),
    "exp_manager.resume_ignore_no_checkpoint": ("none", "--resume auto starts fresh where there is no checkpoint"),
    "exp_manager.checkpoint_callback_params.save_top_k": ("to", "checkpoint.keep_last", _kept),
    "exp_manager.checkpoint_callback_params.every_n_train_steps": ("to", "checkpoint.every", whole),
    "exp_manager.*": ("none", "belongs to NeMo's experiment manager; a run's folder, resuming and logs need no settings here"),
    "model.precision": ("to", "precision", _precision),
    "model.micro_batch_size": ("none", "packed rows: batch.micro_rows rows of batch.seq_length tokens, 1 unless set"),
    "model.global_batch_size": ("to", "batch.rows = samples x 800 tokens / seq_length; set it by your own samples' mean length", _count),
    "model.tensor_model_parallel_size": ("no", "all ranks form one fully sharded group; tensor parallelism is not built yet"),
    "model.pipeline_model_parallel_size": ("no", "all ranks form one fully sharded group; pipelines are not built yet"),
    "model.virtual_pipeline_model_parallel_size": ("no", "pipelines are not built yet"),
    "model.context_parallel_size": ("no", "context parallelism is not built yet"),
    "model.expert_model_parallel_size": ("no", "expert parallelism is not built yet"),
    "model.sequence_parallel": ("no", "comes with tensor parallelism, which is not built yet"),
    "model.restore_from_path": ("to", "init.model", text),
    "model.mm_cfg.llm.from_pretrained": ("to", "init.decoder", text),
    "model.mm_cfg.llm.freeze": ("to", "trainable", flag),
    "model.mm_cfg.llm.model_type": ("to", "data.template", _template),
    "model.mm_cfg.vision_encoder.from_pretrained": ("to", "init.vision", text),
    "model.mm_cfg.vision_encoder.from_hf": ("none", "init.vision takes Hugging Face folders, hf:org/name and .nemo files alike", flag),
    "model.mm_cfg.vision_encoder.patch_dim": ("to", "model.vision.patch", size),
    "model.mm_cfg.vision_encoder.crop_size": ("to", "model.vision.image", square),
    "model.mm_cfg.vision_encoder.hidden_size": ("to", "model.vision.width", size),
    "model.mm_cfg.vision_encoder.vision_select_layer": ("to", "model.vision.select_layer", _layer),
    "model.mm_cfg.vision_encoder.vision_select_feature": ("to", "model.vision.feature", _feature),
    "model.mm_cfg.vision_encoder.class_token_length": ("to", "model.vision.class_token", _class_token),
    "model.mm_cfg.vision_encoder.freeze": ("to", "trainable", flag),
    "model.mm_cfg.pretrain_mm_mlp_adapter": ("to", "init.projector", text),
    "model.mm_cfg.mm_mlp_adapter_type": ("to", "model.projector, model.pixel_shuffle", _projector),
    "model.mm_cfg.use_im_start_end": ("to", "model.use_im_start_end", flag),
    "model.mm_cfg.use_lita": ("no", "LITA's time tokens are not built"),
    "model.mm_cfg.lita.*": ("no", "LITA's time tokens are not built"),
    "model.mcore_gpt": ("none", "there is one decoder; import reads both key styles"),
    "model.encoder_seq_length": ("to", "batch.seq_length, and model.decoder.max_positions where max_position_embeddings is not given", size),
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
    "model.do_layer_norm_weight_decay": ("none", "weight decay is applied to matrices alone", _only(False)),
    "model.attention_type": ("none", "attention is always multi-head", _only("multihead")),
    "model.multi_query_attention": ("none", "num_query_groups says how many key-value heads there are; true is refused"),
    "model.qkv_bias": ("to", "model.decoder.qkv_bias"),
    "model.bias": ("to", "model.decoder.qkv_bias, out_bias, mlp_bias"),
    "model.activation": ("to", "model.decoder.mlp"),
    "model.openai_gelu": ("to", "model.decoder.mlp"),
    "model.bias_activation_fusion": ("to", "model.decoder.mlp (Megatron's fusion of bias and GELU is the tanh approximation)"),
    "model.bias_gelu_fusion": ("none", "kernels are fused by torch.compile: compile=true"),
    "model.window_size": ("to", "model.decoder.window"),
    "model.num_moe_experts": ("to", "model.decoder.experts"),
    "model.moe_router_topk": ("to", "model.decoder.active_experts"),
    "model.moe_aux_loss_coeff": (
        "to",
        "model.decoder.balance, times layers / active_experts (Megatron adds up over layers)",
    ),
    "model.moe_router_load_balancing_type": (
        "none",
        "aux_loss is what moe_aux_loss_coeff weighs, none makes model.decoder.balance 0; with experts others are refused",
    ),
    "model.moe_grouped_gemm": ("none", "names a kernel"),
    "model.moe_token_dispatcher_type": ("none", "every rank computes all experts of its tokens"),
    "model.moe_*": ("no", "the router is Mixtral's: softmax over all experts, the likeliest k, their weights adding up to 1"),
    "model.share_embeddings_and_output_weights": ("to", "model.decoder.tied"),
    "model.headscale": ("none", "no family of neva scales heads; true is refused"),
    "model.transformer_block_type": ("none", "pre_ln is what every decoder here is; others are refused"),
    "model.init_method_std": ("none", "fresh weights follow stated rules; a decoder comes from init.decoder"),
    "model.use_scaled_init_method": ("none", "fresh weights follow stated rules; a decoder comes from init.decoder"),
    "model.override_vocab_size": ("to", "model.decoder.vocab"),
    "model.padded_vocab_size": ("to", "model.decoder.vocab"),
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
    "model.normalize_attention_scores": ("none", "always so; false is refused"),
    "model.use_flash_attention": ("none", "always on where the device has it: varlen attention on CUDA"),
    "model.megatron_amp_O2": ("none", "always so in bf16: fp32 master weights, frozen parts stored in bf16"),
    "model.native_amp_init_scale": ("no", "fp16 training is not built; bf16 needs no loss scale"),
    "model.native_amp_growth_interval": ("no", "fp16 training is not built; bf16 needs no loss scale"),
    "model.hysteresis": ("no", "fp16 training is not built; bf16 needs no loss scale"),
    "model.fp32_residual_connection": ("none", "the residual stream has the compute dtype", _only(False)),
    "model.fp16_lm_cross_entropy": ("none", "the loss is in fp32"),
    "model.grad_allreduce_chunk_size_mb": ("none", "FSDP2 reduces by block"),
    "model.grad_div_ar_fusion": ("none", "gradients are summed; the loss is divided by the global count of label tokens"),
    "model.gradient_accumulation_fusion": ("none", "names a kernel"),
    "model.gradient_as_bucket_view": ("none", "belongs to DDP; parameters are sharded here"),
    "model.sync_batch_comm": ("none", "belongs to Megatron's pipelines"),
    "model.overlap_p2p_comm": ("none", "belongs to Megatron's pipelines"),
    "model.batch_p2p_comm": ("none", "belongs to Megatron's pipelines"),
    "model.async_grad_allreduce": ("none", "FSDP2 reduces by block"),
    "model.megatron_legacy": ("none", "import reads both key styles"),
    "model.dist_ckpt_format": ("none", "checkpoints have one format; import reads NeMo's"),
    "model.activations_checkpoint_granularity": ("to", "recompute", _recompute),
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
    "model.seed": ("to", "seed", whole),
    "model.resume_from_checkpoint": ("none", "neva train … --resume PATH"),
    "model.use_cpu_initialization": ("none", "fresh weights are always drawn on the CPU, equal under any layout"),
    "model.onnx_safe": ("none", "nothing is exported to ONNX"),
    "model.apex_transformer_log_level": ("none", "neva does not use Apex"),
    "model.gc_interval": ("none", "belongs to NeMo's loop"),
    "model.nsys_profile.*": ("no", "use nsys or torch.profiler around the command"),
    "model.tokenizer.model": ("to", "data.tokenizer", text),
    "model.tokenizer.type": ("to", "data.tokenizer", text),
    "model.tokenizer.library": ("none", "the kind of a tokenizer is seen from its file; huggingface is called by tokenizer.type", text),
    "model.tokenizer.additional_special_tokens": ("none", "image features have ids of their own, outside the vocabulary"),
    "model.tokenizer.vocab_file": ("none", "a tokenizer is one file or folder: data.tokenizer", _only()),
    "model.tokenizer.merge_file": ("none", "a tokenizer is one file or folder: data.tokenizer", _only()),
    "model.tokenizer.*": ("none", "a tokenizer is one file or folder: data.tokenizer"),
    "model.data.packed_sequence": ("none", "rows are always packed; data.source names the file that NeMo's packing starts from", _only(False)),
    "model.data.num_workers": ("to", "data.workers", whole),
    "model.data.dataloader_type": ("to", "data.shuffle", _shuffle),
    "model.data.data_path": ("to", "data.source, or data.sources where there are several", _paths),
    "model.data.concat_sampling_probabilities": ("to", "the weights of data.sources", _weights),
    "model.data.lazy_preprocess": ("none", "images are always read when they are needed"),
    "model.data.is_multimodal": ("none", "samples with and without images mix", _only(True)),
    "model.data.media_type": ("none", "neva reads images; video is not built", _only("image")),
    "model.data.sep_image_conv_front": ("no", "an image stands at the front of its turn, as in LLaVA-1.5"),
    "model.data.conv_template": ("to", "data.template", _template),
    "model.data.crop_size": ("to", "model.vision.image", square),
    "model.data.image_token_len": ("none", "follows from image size, patch size and pixel shuffle"),
    "model.data.image_folder": ("to", "data.image_folder", _folder),
    "model.data.image_aspect_ratio": ("to", "model.image.aspect", text),
    "model.data.video_folder": ("no", "video is not built"),
    "model.data.num_frames": ("no", "video is not built"),
    "model.data.splice_single_frame": ("no", "video is not built"),
    "model.data.sep_token_between_frames": ("no", "video is not built"),
    "model.data.add_extra_token": ("none", "labels are shifted within each document"),
    "model.optim.name": ("none", "AdamW, fused, is the optimiser of every stage", _optimiser),
    "model.optim.lr": ("to", "optim.lr", amount),
    "model.optim.weight_decay": ("to", "optim.weight_decay", amount),
    "model.optim.betas": ("to", "optim.betas", _betas),
    "model.optim.eps": ("to", "optim.eps", amount),
    "model.optim.sched.name": ("to", "optim.schedule", _schedule),
    "model.optim.sched.warmup_steps": ("to", "optim.warmup", whole),
    "model.optim.sched.warmup_ratio": ("to", "optim.warmup", _share),
    "model.optim.sched.min_lr": ("to", "optim.min_lr", amount),
    "model.optim.sched.constant_steps": ("none", "the rate falls to its least at the last step of the stage", _only(0)),
    "model.optim.sched.max_steps": ("none", "the schedule runs over the stage's steps", _end),
    "model.optim.sched.power": ("none", "optim.schedule=linear falls along a straight line", _only(1)),
    "model.optim.sched.cycle": ("none", "the rate falls once", _only(False)),
    "model.optim.sched.monitor": ("none", "belongs to PyTorch Lightning"),
    "model.optim.sched.reduce_on_plateau": ("none", "belongs to PyTorch Lightning", _only(False)),
    "model.optim.sched.*": ("no", "the rate warms up, then follows optim.schedule to the last step of the stage"),
    "model.optim.*": ("none", "belongs to Apex's or Megatron's optimiser"),
    "model.peft.*": ("no", "LoRA is not built yet"),
}  # fmt: skip
