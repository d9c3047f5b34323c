"""What only a GPU shows: varlen attention, bf16, and a run end to end. `make test-gpu`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from neva import api
from neva.data.encode import Encoder
from neva.data.pack import Budget, collate
from neva.data.source import MockSource
from neva.data.tokenizer import load_tokenizer
from neva.models.presets import VLMS
from neva.models.vlm import build
from neva.recipes.demo import TOKENIZER
from tests.oracle import test_cross

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def a_batch():
    """Six mock samples, one of them without an image, in rows of 256 tokens."""
    config = VLMS["llava-tiny"]
    encoder = Encoder(tokenizer=load_tokenizer(TOKENIZER), template="v1", system="", layout=config.layout)
    source = MockSource(samples=6, words=(6, 20), text_only_every=6)
    samples = [encoder.encode(source[i]) for i in range(6)]
    budget = Budget(seq_length=256, rows=2, micro_rows=2)
    return collate([samples[:3], samples[3:]], budget, layout=config.layout, group_names=("mock",), any_tiles=True)


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is expected: 1 for a gradient of zeros."""
    return float((found.float().cpu() - expected).norm() / expected.norm().clamp_min(1e-9))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_losses_and_gradients_equal_the_cpu(dtype, tolerance):
    batch, model = a_batch(), build(VLMS["llava-tiny"], seed=3)
    expected = model(batch).losses
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.to("cuda", dtype)
    losses = model(batch.to("cuda")).losses
    losses.sum().backward()
    assert torch.allclose(losses.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    for name, p in model.named_parameters():
        assert far(p.grad, gradients[name]) < 4 * tolerance, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("name", ["X", "X, grouped as the decoder", "X, rotary keys", "H", "H, tags added"])
def test_cross_attention_equals_the_cpu(name, dtype, tolerance):
    """Runs by varlen kernels in half precision and by a mask of all pairs in fp32, text-only rows among them; nothing to see is exactly 0."""
    config, model = test_cross.CONFIGS[name], test_cross.made(test_cross.CONFIGS[name])
    samples = [test_cross.sample(config, seed, images=images) for seed, images in enumerate((1, 0, 3, 2))]
    batch = test_cross.packed(config, [samples])
    expected = model(batch).losses
    expected.sum().backward()
    gradient = model.decoder.blocks[1].cross.k.weight.grad.clone()
    model.zero_grad()
    model.to("cuda", dtype)
    losses = model(batch.to("cuda")).losses
    losses.sum().backward()
    assert torch.allclose(losses.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    assert far(model.decoder.blocks[1].cross.k.weight.grad, gradient) < 2 * tolerance
    model.zero_grad()
    blind = test_cross.packed(config, [[samples[1]]])
    model(replace(blind, any_tiles=True).to("cuda")).losses.sum().backward()
    assert not model.decoder.blocks[1].cross.k.weight.grad.any()


@pytest.mark.parametrize("extra", [[], ["recompute=block"], ["compile=true"]])
def test_a_run_trains_resumes_and_answers(tmp_path, extra):
    out = tmp_path / "run"
    half = ["pretrain:steps=4", "finetune:steps=8", "log.tensorboard=false", f"out={out}", *extra]
    last = api.train("llava-tiny", half)
    lines = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[4]["loss"]
    loaded = api.load(last)
    assert loaded.device.type == "cuda"
    (row,) = api.generate(loaded, prompt="the red house", max_new_tokens=5)
    assert row["tokens"] <= 5
