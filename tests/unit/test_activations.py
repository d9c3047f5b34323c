"""Bytes that backward keeps: the counts from a config against the tensors that autograd saves, and
the estimate of a whole step against the memory that it really takes."""

from dataclasses import replace

import psutil
import pytest
import torch

from docs import make_gpus
from neva import api, plan
from neva.job import TrainConfig
from neva.models import activations
from neva.models.activations import How
from neva.models.vlm import VLM, VLMConfig, build, part_of
from neva.parallel import machine
from neva.parallel import mesh as ranks
from neva.recipes.resolve import resolve
from neva.training.stage import prepare, train_step
from tests.unit.test_cost import CONFIGS, PLAIN, TRAINED, batch_of


def saved_bytes(model: VLM, batch) -> int:
    """Bytes of the tensors that autograd keeps of a forward, each storage once, without
    parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch)
    return sum(kept.values())


def prepared(config: VLMConfig, trained: frozenset[str], dtype: torch.dtype):
    model = build(config)
    parts = trained & {part_of(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    batch, work = batch_of(config)
    return model.to(dtype), batch, work, parts


MORE = {
    "InternViT": replace(
        PLAIN,
        vision=replace(PLAIN.vision, norm="rmsnorm", qk_norm=True, layer_scale=True, pre_norm=False, activation="gelu", qkv_bias=False),
        projector="norm_ffn_gelu",
    ),
    "Nemotron": replace(PLAIN, decoder=replace(PLAIN.decoder, norm="layernorm1p", mlp="squared_relu", rotary_fraction=0.5)),
    "GEGLU": replace(PLAIN, decoder=replace(PLAIN.decoder, mlp="geglu")),
}


@pytest.mark.parametrize("trained", [name for name in TRAINED if name != "none"])
@pytest.mark.parametrize("name", CONFIGS | MORE)
def test_saved(name: str, trained: str) -> None:
    """What is left out are indices and other small tensors, of which tiny models have a larger
    share."""
    config = (CONFIGS | MORE)[name]
    model, batch, work, parts = prepared(config, TRAINED[trained], torch.float32)
    counted = activations.saved(config, work, How(trained=parts, size=4, cuda=False)).total
    found = saved_bytes(model, batch)
    assert counted == pytest.approx(found, rel=0.04, abs=1024) and bool(found) == bool(parts)


@pytest.mark.parametrize("trained", ["all", "projector"])
def test_saved_in_bf16(trained: str) -> None:
    model, batch, work, parts = prepared(PLAIN, TRAINED[trained], torch.bfloat16)
    counted = activations.saved(PLAIN, work, How(trained=parts, size=2, cuda=False)).total
    assert counted == pytest.approx(saved_bytes(model, batch), rel=0.04)


def test_recompute_keeps_each_blocks_input_and_one_block() -> None:
    _, work = batch_of(PLAIN)
    kept = How(trained=TRAINED["all"], size=4, cuda=False)
    again = replace(kept, recompute=True)
    whole, less = (activations.saved(PLAIN, work, how) for how in (kept, again))
    layers, width, tokens = PLAIN.decoder.layers, PLAIN.decoder.width, sum(work.documents)
    angles = 2 * tokens * PLAIN.decoder.rotary_width * 4
    assert less.decoder == layers * tokens * width * 4 + (whole.decoder - angles) // layers + angles
    assert (less.vision, less.projector, less.head) == (whole.vision, whole.projector, whole.head)


def peak(config: TrainConfig) -> int:
    """Bytes at the highest point of a step: what lasts, and the allocator's own record of the
    rest."""
    device = ranks.start()
    stage = prepare(config, mesh=ranks.make(config.parallel, device), device=device, say=lambda text: None)
    try:
        steps = iter(stage.loader)
        train_step(stage, next(steps))  # which makes Adam's moments
        batches = next(steps)
        lasting: list[torch.Tensor] = [p.to_local() for p in stage.model.parameters()]  # type: ignore[attr-defined]
        for state in stage.optimizer.state.values():
            lasting += [getattr(value, "to_local", lambda value=value: value)() for value in state.values()]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
            train_step(stage, batches)
        assert record.profiler is not None and record.profiler.kineto_results is not None
        found = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = top = 0
        for event in sorted(found, key=lambda event: event.start_ns()):
            now += event.nbytes()
            top = max(top, now)
        return top + sum(tensor.untyped_storage().nbytes() for tensor in lasting)
    finally:
        stage.loader.close()
        ranks.stop()


SMALL = {
    "data.workers": 0,
    "log.tensorboard": False,
    "precision": "fp32",
    "batch.rows": 1,
    "batch.micro_rows": 1,
    "batch.seq_length": 1024,
    "data.sources.0.mock.words": (100, 400),
    "model.decoder": {"width": 256, "layers": 4, "heads": 8, "kv_heads": 4, "ffn": 688},
    "model.vision": {"width": 128, "ffn": 512, "image": 84},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trainable": ("projector.*",), "batch.seq_length": 512, "data.sources.0.mock.words": (50, 150)},
        {"recompute": "block", "model.decoder.width": 384},
    ],
    ids=["decoder", "projector", "recompute"],
)
def test_the_estimate_of_a_step_is_its_peak_at_most(changes: dict) -> None:
    """Of one rank, which keeps parameters gathered. It takes every token as learnt and all peaks as
    one, so that it is above what is measured, and by no more than a third."""
    (config,) = resolve(api.recipe("llava-tiny/finetune", SMALL | changes))
    measured = peak(config)
    estimated = plan.memory(config, ranks=1, precision="fp32", cuda=False).total
    assert measured <= estimated <= 1.35 * measured


def test_a_stage_that_does_not_fit_is_told_the_change_with_which_it_does() -> None:
    stages = tuple(replace(stage, precision="bf16") for stage in api.recipe("llava15-7b"))
    one = plan.table(stages, ranks=1, machine=machine.asked(80.0)).splitlines()
    eight = plan.table(stages, ranks=8, machine=machine.asked(80.0)).splitlines()
    assert one[-2:][0] == "  pretrain: fits" and one[-1].endswith("; it does on 2 ranks")
    assert eight[-2:] == ["  pretrain: fits", "  finetune: fits"] and max(map(len, eight)) <= 80
    plain = tuple(replace(stage, recompute="none", batch=replace(stage.batch, micro_rows=4)) for stage in stages[1:])
    (*_, verdict) = plan.table(plain, ranks=8, machine=machine.asked(18.5)).splitlines()
    assert "does NOT fit" in verdict and verdict.endswith("it does with recompute=block batch.micro_rows=1")
    shared = machine.Machine(kind="cpu", name="CPU", memory=130 * 2**30, count=2)
    told = [plan.table(stages[:1], ranks=n, machine=shared).splitlines()[-1] for n in (2, 16)]
    assert told[0] == "  pretrain: fits" and "does NOT fit" in told[1]  # two share it, 16 do not


def test_the_page_of_gpus_is_up_to_date() -> None:
    assert make_gpus.PAGE.read_text(encoding="utf-8") == make_gpus.page(), "run `make keys`"


def test_the_device_found_is_this_machine() -> None:
    found = machine.found()
    assert found.memory > 2**28 and found.count >= 1 and found.name
    if found.kind == "cpu":
        assert found.memory <= psutil.virtual_memory().total
        assert str(found).endswith("GiB)") and "core" in str(found)
