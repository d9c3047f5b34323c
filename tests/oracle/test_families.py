"""Every family against transformers: logits, gradients, cached decoding, greedy text. Our side comes out of the import of the saved folder."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from transformers.models.mixtral import modeling_mixtral

from neva.batch import IGNORE, Batch
from neva.checkpoint.nemo_config import decoder_config as nemo_decoder
from neva.models.attention import Cache
from neva.models.decoder import Decoder
from neva.models.hf_config import decoder_config, decoder_json
from neva.models.moe import Experts, balance_loss
from neva.models.vit import normalise
from tests.families import (
    DECODERS,
    ENCODERS,
    IMAGE_ID,
    VLMS,
    Pair,
    build,
    internvl,
    llama,
    llava,
    mixtral,
    pair,
)
from tests.packed import Item, item, pack, real

torch.set_num_threads(1)


@pytest.fixture(params=[*DECODERS, *VLMS])
def both(request, tmp_path) -> Pair:
    """Each of the families."""
    return pair({**DECODERS, **VLMS}[request.param](), tmp_path)


@torch.no_grad()
def test_logits(both):
    """A packed batch of several rows gives transformers' logits of each sample, and those of each sample alone."""
    parts = both.samples()
    layout = both.ours.config.layout
    batch = pack(layout, [parts[:2], parts[2:], []], 40)
    packed = both.ours(batch, logits_at=real(batch)).logits.split([len(part.tokens) for part in parts])
    for part, ours in zip(parts, packed, strict=True):
        alone = pack(layout, [[part]], len(part.tokens))
        assert (ours - both.ours(alone, logits_at=real(alone)).logits).abs().max() < 1e-5
        assert (ours - both.run_theirs(part).logits[0]).abs().max() < 1e-4


def test_gradients(both):
    """The mean loss over a packed row's label tokens has transformers' gradient for every parameter."""
    parts = both.samples()
    batch = pack(both.ours.config.layout, [parts], 60)
    both.ours(batch).losses.sum().div(batch.label_count).backward()
    total = 0
    for part in parts:
        logits = both.run_theirs(part).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(part.labels)[1:], ignore_index=IGNORE, reduction="sum")
    (total / batch.label_count).backward()
    theirs = both.gradients()
    for name, parameter in both.ours.named_parameters():
        largest = theirs[name].abs().max()
        assert parameter.grad is not None and (parameter.grad - theirs[name]).abs().max() <= 1e-3 * largest + 1e-7, name


@pytest.mark.parametrize("both", [name for name in (*DECODERS, *VLMS) if "dynamic" not in name], indirect=True)
@torch.no_grad()
def test_cached_decoding(both):
    """A packed prefill of ragged requests and steps of [r, 1] give the logits of a whole forward pass of transformers.

    Not so with dynamic scaling, which turns a longer document's earlier keys otherwise: a cache keeps them as they were, as transformers' does.
    """
    config = both.ours.config.decoder
    parts = [item(both.ours.config.layout, text=t, images=n if both.images else 0, seed=t) for t, n in ((16, 1), (8, 0), (12, 2))]
    steps = 5
    whole = [both.run_theirs(part).logits[0] for part in parts]
    starts = [len(part.tokens) - steps for part in parts]
    prompts = [Item(tokens=p.tokens[:n], labels=p.labels[:n], tiles=p.tiles) for p, n in zip(parts, starts, strict=True)]
    size = max(len(part.tokens) for part in parts) + 1
    keys = torch.full((config.layers, len(parts), size, config.kv_heads, config.head), float("nan"))
    cache = Cache(
        keys=keys.nan_to_num(7.0), values=keys.nan_to_num(7.0), slots=torch.zeros(0, dtype=torch.int64),
        lengths=torch.tensor(starts), decoding=False, span=max(starts), ragged=True,
    )  # fmt: skip
    batch = pack(both.ours.config.layout, [prompts], sum(starts) + 3)
    slots = [r * size + i for r, n in enumerate(starts) for i in range(n)] + [len(parts) * size - 1] * 3
    last = torch.tensor(starts).cumsum(0) - 1
    logits = both.ours(batch, logits_at=last, cache=replace(cache, slots=torch.tensor(slots))).logits
    for r, start in enumerate(starts):
        assert (logits[r] - whole[r][start - 1]).abs().max() < 1e-4
    for step in range(steps):
        at = [start + step for start in starts]
        one = decode_batch([part.tokens[i] for part, i in zip(parts, at, strict=True)], at, batch)
        now = replace(
            cache, slots=torch.tensor([r * size + i for r, i in enumerate(at)]), lengths=torch.tensor(at) + 1, decoding=True, span=max(at) + 1
        )
        logits = both.ours(one, logits_at=torch.arange(len(parts)), cache=now).logits
        for r, i in enumerate(at):
            assert (logits[r] - whole[r][i]).abs().max() < 1e-4


def decode_batch(tokens: list[int], positions: list[int], like: Batch) -> Batch:
    """One token for each of r requests."""
    column = torch.tensor(tokens)[:, None]
    return replace(
        like, tokens=column, labels=torch.full_like(column, IGNORE), positions=torch.tensor(positions)[:, None], segments=torch.ones_like(column),
        cu_seqlens=torch.arange(len(tokens) + 1, dtype=torch.int32), max_len=1, labelled=column[:0, 0], groups=torch.zeros_like(column),
        tiles=like.tiles[:0], inline=like.inline[:0], slots=like.slots[:0], sees=torch.zeros(len(tokens), 1, 2, dtype=torch.int64), any_tiles=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_encoders(name, tmp_path):
    """Every hidden state of an encoder is transformers' `hidden_states`, its tensors go round bit for bit."""
    from neva.checkpoint.hf import Options, plan, read_source
    from neva.models.vit import ViT

    theirs = build(ENCODERS[name](), tmp_path)
    tiles = torch.randint(0, 256, (5, 3, theirs.config.image_size if isinstance(theirs.config.image_size, int) else 28, 28), dtype=torch.uint8)
    tiles = tiles if tiles.shape[2] == 28 else torch.randint(0, 256, (5, 3, tiles.shape[2], tiles.shape[2]), dtype=torch.uint8)
    for layer in (-4, -3, -2, -1, 0, 1, 2, 3):
        chosen = plan([read_source(tmp_path)], Options(overrides=(f"select_layer={layer}",)))
        ours = ViT(chosen.vision)
        ours.load_state_dict({n.removeprefix("vision."): chosen.read(n) for n in chosen.tensors}, strict=True)
        hidden = theirs(normalise(tiles, ours.config.mean, ours.config.std), output_hidden_states=True).hidden_states[layer]
        expected = hidden[:, 1:] if ours.config.class_token else hidden
        assert (ours(tiles) - expected).abs().max() < 1e-4


@torch.no_grad()
def test_padded_heads_are_no_heads(tmp_path):
    """NVLM's InternViT with heads of zeros added gives the features of the one without."""
    from neva.models.vit import ViT

    theirs = build(internvl(), tmp_path)
    config = replace(load_encoder(tmp_path).config, select_layer=-1)
    plain, padded = ViT(config), ViT(replace(config, heads=5, head_width=config.head))
    state = load_encoder(tmp_path, "select_layer=-1").state_dict()
    plain.load_state_dict(state)
    wide = padded.state_dict()
    for name, tensor in state.items():
        space = torch.zeros_like(wide[name])
        space[tuple(slice(0, n) for n in tensor.shape)] = tensor
        wide[name] = space
    padded.load_state_dict(wide)
    tiles = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8)
    assert (plain(tiles) - padded(tiles)).abs().max() < 1e-5
    assert (plain(tiles) - theirs(normalise(tiles, config.mean, config.std), output_hidden_states=True).hidden_states[-1][:, 1:]).abs().max() < 1e-4


def load_encoder(folder, *overrides: str):
    """Our encoder of a folder."""
    from neva.checkpoint.hf import Options, plan, read_source
    from neva.models.vit import ViT

    chosen = plan([read_source(folder)], Options(overrides=overrides))
    ours = ViT(chosen.vision)
    ours.load_state_dict({n.removeprefix("vision."): chosen.read(n) for n in chosen.tensors}, strict=True)
    return ours.eval()


def test_loss_of_padded_rows(tmp_path):
    """One sample a row, padded on the right: the mean loss of both libraries is equal."""
    both = pair(llava(), tmp_path)
    layout, length = both.ours.config.layout, 30
    parts = [item(layout, text=t, images=1, seed=t) for t in (7, 20, 12)]
    batch = pack(layout, [[part] for part in parts], length)
    ids = torch.tensor([[IMAGE_ID if t < 0 else t for t in part.tokens] + [0] * (length - len(part.tokens)) for part in parts])
    labels = torch.tensor([part.labels + [IGNORE] * (length - len(part.labels)) for part in parts])
    theirs = both.theirs(input_ids=ids, pixel_values=both.pixels(batch.tiles), attention_mask=(batch.segments > 0).long(), labels=labels).loss
    assert (both.ours(batch).losses.sum() / batch.label_count - theirs).abs() < 1e-5


@pytest.mark.parametrize("chosen", [1, 2, 3])
def test_the_balance_loss_is_transformers_layer_by_layer(chosen, tmp_path):
    """Loss and gradients are those of transformers' function, called for each layer of each row.

    Rows hold two samples, one, and none. The padding behind them, whose router says anything, is
    masked.
    """
    weight = 0.7
    both = pair(mixtral(num_experts_per_tok=chosen, router_aux_loss_coef=weight), tmp_path)
    parts = both.samples()
    rows = [parts[:2], parts[2:], []]
    aux = both.ours.train()(pack(both.ours.config.layout, rows, 40)).aux
    aux.backward()
    theirs = sum(_their_balance(both, row, length=40) for row in rows[:2])
    theirs = weight * theirs / len(rows)  # a row without a sample has no imbalance
    assert aux.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    expected = both.gradients()
    for name, parameter in both.ours.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        largest = expected[name].abs().max()
        assert (found - expected[name]).abs().max() <= 1e-3 * largest + 1e-7, name
        assert "router" not in name or largest > 1e-3


def _their_balance(both: Pair, row: list[Item], *, length: int) -> torch.Tensor:
    """transformers' loss of each layer, over one row's samples and padding; the mean of these."""
    routers = [block.mlp.gate for block in both.theirs.model.layers]
    logits: list[list[torch.Tensor]] = [[] for _ in routers]
    hooks = []
    for router, kept in zip(routers, logits, strict=True):
        note = partial(_note_logits, kept)
        hooks.append(router.register_forward_hook(note))
    for sample in row:
        both.run_theirs(sample)
    for hook in hooks:
        hook.remove()
    losses = []
    for kept in logits:
        real = torch.cat(kept)
        padding = torch.randn(length - len(real), real.shape[1])
        mask = torch.tensor([[1] * len(real) + [0] * len(padding)])
        experts = {"num_experts": real.shape[1], "top_k": routers[0].top_k}
        gate = (torch.cat((real, padding)),)
        loss = modeling_mixtral.load_balancing_loss_func(gate, **experts, attention_mask=mask)
        losses.append(loss)
    return torch.stack(losses).mean()


def _note_logits(kept: list[torch.Tensor], router, given, out) -> None:
    kept.append(out[0])


@pytest.mark.parametrize(("layers", "chosen"), [(1, 1), (4, 2), (3, 3)])
def test_megatrons_balance_coefficient_gives_megatrons_loss(layers, chosen):
    """NeMo's coefficient, converted, weighs as it does in Megatron-LM.

    There each layer adds its `switch_load_balancing_loss_func`.
    """
    coefficient, experts, tokens = 0.02, 6, 50
    config = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_layers": layers,
        "num_moe_experts": experts,
        "moe_router_topk": chosen,
        "moe_aux_loss_coeff": coefficient,
        "max_position_embeddings": 64,
        "activation": "fast-swiglu",
        "bias": False,
        "normalization": "rmsnorm",
        "position_embedding_type": "rope",
    }
    decoder = Decoder(nemo_decoder(config))
    segments = torch.ones(1, tokens, dtype=torch.int64)
    ours = torch.zeros(())
    theirs = torch.zeros(())
    for block in decoder.blocks:
        probabilities = torch.rand(tokens, experts).mul(3).softmax(-1)
        picked = probabilities.topk(chosen).indices
        ours = ours + block.mlp.balance * balance_loss(probabilities, picked, segments)
        counts = torch.bincount(picked.flatten(), minlength=experts)
        scale = experts * coefficient / (tokens * tokens * chosen)
        theirs = theirs + (probabilities.sum(0) * counts).sum() * scale
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_balance_coefficient_of_config_json_comes_back(tmp_path):
    """Import and export keep the number in config.json, also where neva writes a new file."""
    for number, coefficient in enumerate((0.02, 0.001, 0.0, 0.37)):
        source = mixtral(router_aux_loss_coef=coefficient, num_hidden_layers=1 + number).to_dict()
        ours = decoder_config(source)
        assert ours.balance == coefficient
        assert decoder_json(ours, source)["router_aux_loss_coef"] == coefficient
        assert decoder_json(ours)["router_aux_loss_coef"] == coefficient
        changed = decoder_json(replace(ours, balance=0.5), source)
        assert changed == {**source, "router_aux_loss_coef": 0.5}
    dense = decoder_json(replace(decoder_config(llama().to_dict()), balance=0.5))
    assert dense["model_type"] == "llama"  # without experts there is nothing to weigh


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "ffn"), [(16, 24), (12, 20), (10, 21), (7, 8)])
def test_experts_of_any_size_are_plain_matrix_products(width, ffn, dtype):
    """Outputs and gradients are those of a loop over experts; one expert gets no row."""
    torch.manual_seed(0)
    experts = Experts(width, ffn, "swiglu", experts=4).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    rows = torch.randn(9, width, dtype=dtype, requires_grad=True)
    counts, upstream = torch.tensor([3, 0, 5, 1]), torch.randn(9, width)
    plain = []
    parts = rows.float().split(counts.tolist())
    for part, gate, up, down in zip(parts, *(p.float() for p in experts.parameters()), strict=True):
        plain.append((torch.nn.functional.silu(part @ gate.T) * (part @ up.T)) @ down.T)
    wanted = torch.cat(plain)
    leaves = (rows, *experts.parameters())
    expected = torch.autograd.grad(wanted, leaves, upstream)
    found = experts(rows, counts)
    gradients = torch.autograd.grad(found, leaves, upstream.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip((found, *gradients), (wanted, *expected), strict=True):
        assert ours.shape == theirs.shape
        assert (ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max()


def _gpt2(tmp_path) -> tuple[torch.nn.Module, dict, dict]:
    config = tf.GPT2Config(vocab_size=70, n_positions=40, n_embd=48, n_layer=2, n_head=4, activation_function="gelu_new")
    theirs = build(config, tmp_path)
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = {"decoder.embed.weight": state["wte.weight"], "decoder.positions": state["wpe.weight"],
            "head.norm.weight": state["ln_f.weight"], "head.norm.bias": state["ln_f.bias"]}  # fmt: skip
    for i in range(2):
        block = f"decoder.blocks.{i}."
        for p in ("weight", "bias"):
            q, k, v = (x.t() for x in state[f"h.{i}.attn.c_attn.{p}"].chunk(3, dim=-1))
            ours |= {f"{block}attention.q.{p}": q, f"{block}attention.k.{p}": k, f"{block}attention.v.{p}": v}
            pieces = {"attention.out": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
            ours |= {f"{block}{to}.{p}": state[f"h.{i}.{of}.{p}"].t() for to, of in pieces.items()}
            ours |= {f"{block}attention_norm.{p}": state[f"h.{i}.ln_1.{p}"], f"{block}mlp_norm.{p}": state[f"h.{i}.ln_2.{p}"]}
    fields = {"positions": "learned", "max_positions": 40, "mlp": "gelu_tanh", "tied": True}
    return theirs, ours, fields


def _gpt_neox(tmp_path) -> tuple[torch.nn.Module, dict, dict]:
    config = tf.GPTNeoXConfig(
        vocab_size=70, hidden_size=48, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=40,
        rotary_pct=0.5, use_parallel_residual=False, hidden_act="gelu", tie_word_embeddings=False,
    )  # fmt: skip
    theirs = build(config, tmp_path)
    state = {name.removeprefix("gpt_neox."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    ours = {"decoder.embed.weight": state["embed_in.weight"], "head.norm.weight": state["final_layer_norm.weight"],
            "head.norm.bias": state["final_layer_norm.bias"], "head.weight": state["embed_out.weight"]}  # fmt: skip
    for i in range(2):
        block = f"decoder.blocks.{i}."
        for p in ("weight", "bias"):
            mixed = state[f"layers.{i}.attention.query_key_value.{p}"].unflatten(0, (4, 3, 12))  # by head: q, k, v
            ours |= {f"{block}attention.{name}.{p}": mixed[:, n].flatten(0, 1) for n, name in enumerate("qkv")}
            pieces = {"attention.out": "attention.dense", "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h",
                      "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}  # fmt: skip
            ours |= {f"{block}{to}.{p}": state[f"layers.{i}.{of}.{p}"] for to, of in pieces.items()}
    return theirs, ours, {"rotary_fraction": 0.5, "max_positions": 40, "mlp": "gelu"}


@pytest.mark.parametrize("make", [_gpt2, _gpt_neox])
@torch.no_grad()
def test_gpt_kind(make, tmp_path):
    """NVGPT's mechanisms, of which transformers has no model by that name: learned positions, LayerNorm, GELU, biases, rotary halves."""
    from neva.models.decoder import DecoderConfig
    from neva.models.vlm import VLM, VLMConfig

    theirs, state, fields = make(tmp_path)
    sizes = {"vocab": 70, "width": 48, "layers": 2, "heads": 4, "kv_heads": 4, "ffn": state["decoder.blocks.0.mlp.up.weight"].shape[0]}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    ours = VLM(VLMConfig(decoder=DecoderConfig(**sizes, **biases, **fields, norm="layernorm"), vision=None, projector="none")).eval()
    ours.load_state_dict(state, strict=True)
    parts = [item(ours.config.layout, text=t, images=0, seed=t) for t in (9, 3, 30)]
    batch = pack(ours.config.layout, [parts], 50)
    logits = ours(batch, logits_at=real(batch)).logits.split([len(part.tokens) for part in parts])
    for part, one in zip(parts, logits, strict=True):
        assert (one - theirs(input_ids=torch.tensor([part.tokens])).logits[0]).abs().max() < 1e-4
