"""firstlm.Trainer: one phase. What learns, how losses add up, what a checkpoint brings back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from firstlm import SkipPlan
from firstlm.data_order import ShuffledSteps
from firstlm.interrupt import InterruptGuard
from firstlm.layer_drop import FixedPlan, RandomLayerDrop
from firstlm.phases import Phase
from firstlm.rate_control import Multiplier, Ramp, ThresholdFollower
from firstlm.scoring import score
from firstlm.train_config import DistillConfig
from firstlm.trainer import NonFiniteLoss, latest_checkpoint
from firstlm.training import CHECKPOINTING
from tiny_training import COLLATOR, Rows, examples, learnt_state, make_trainer, model_with_adapter

LAYERS = 6


def router_phase(**changes) -> Phase:
    settings = {
        "gate": "straight_through",
        "train_routers": True,
        "target": lambda step: 0.5,
        "multiplier": Multiplier(0.3, 0.7),
        "lambda_norm": 0.01,
    }
    return Phase("routers", **(settings | changes))


def lora_phase(hold: str = "shared", **changes) -> Phase:
    follower = ThresholdFollower(hold, [0.5] * LAYERS, [0], 16, [0.5] * LAYERS)
    settings = {"gate": "hard", "train_adapter": True, "target": lambda step: 0.5}
    return Phase("lora", **(settings | {"follower": follower} | changes))


class Gradients(TrainerCallback):
    """Copies gradients before every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.requires_grad})


def gradients(phase, folder, dtype=torch.float64, **options):
    recorder = Gradients()
    trainer = make_trainer(
        model_with_adapter(dtype), phase, folder, callbacks=[recorder], **options
    )
    trainer.train()
    return recorder.steps, trainer


def same_log(ours, theirs):
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):  # the last line is about speed
        for key in ("loss", "cross_entropy", "skip_rate", "alpha"):
            assert a[key] == pytest.approx(b[key], rel=1e-5), key


# ---- what learns ----


def test_a_bfloat16_adapter_learns_by_steps_that_bfloat16_would_round_away(tmp_path):
    """Against AdamW in float64 on the gradients of the same run."""
    model = model_with_adapter(torch.bfloat16)
    adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}
    expected = {n: torch.nn.Parameter(p.detach().double()) for n, p in adapter.items()}
    recorder = Gradients()
    trainer = make_trainer(
        model, lora_phase(), tmp_path, steps=12, learning_rate=1e-5, callbacks=[recorder]
    )
    trainer.train()
    args = trainer.args
    reference = torch.optim.AdamW(
        expected.values(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    for gradients_of in recorder.steps:
        for n, p in expected.items():
            p.grad = gradients_of[n].double()
        reference.step()
    learnt = dict(
        zip(adapter, (p for g in trainer.optimizer.param_groups for p in g["params"]), strict=True)
    )
    for n, p in adapter.items():
        torch.testing.assert_close(learnt[n].double(), expected[n], rtol=1e-5, atol=1e-8)
        assert torch.equal(p, learnt[n].bfloat16()), n


def test_phase_1_moves_routers_only_and_phase_2_the_adapter_only(tmp_path):
    for phase, moves, stays in (
        (router_phase(), "router", "lora_"),
        (lora_phase(), "lora_", "router"),
    ):
        model = model_with_adapter()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        make_trainer(model, phase, tmp_path / phase.name).train()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            protected = ".layers.0.router" in name
            assert moved == (moves in name and not protected), name
        assert any(stays in name for name in before)


def test_an_adapter_phase_without_an_adapter_says_what_to_do(tmp_path):
    from tiny_models import routed_model

    with pytest.raises(ValueError, match="add_adapter"):
        make_trainer(routed_model("llama"), lora_phase(), tmp_path)


def test_a_hard_gate_cannot_train_routers():
    with pytest.raises(ValueError, match="soft or straight_through"):
        router_phase(gate="hard")


def test_hard_gated_rows_are_not_computed_on_one_process(tmp_path):
    model = model_with_adapter()
    trainer = make_trainer(model, lora_phase("none"), tmp_path, steps=1)
    with model.count_layer_calls() as calls:
        trainer.train()
    kept = 1 - trainer.state.log_history[0]["skip_rate"]
    assert calls.prefill.sum().item() == round(kept * LAYERS * 8) < LAYERS * 8


def test_adapters_of_layers_that_no_row_kept_get_zero_gradients(tmp_path):
    keep = torch.tensor([True, True, False, True, True, True])
    phase = lora_phase(plans=FixedPlan(keep))
    steps, trainer = gradients(phase, tmp_path, steps=2)
    for name, gradient in steps[0].items():
        assert bool(gradient.any()) == (".layers.2." not in name), name
    assert all(p.grad is None or p.requires_grad for p in trainer.model.parameters())


# ---- the loss ----


def test_the_loss_of_a_step_is_the_formula(tmp_path):
    """CE per answer token + alpha * kept share per sequence + lambda * squared norm of weights."""
    model = model_with_adapter()
    rows = examples(8)
    batch = COLLATOR(rows)
    with torch.no_grad():
        out = model(**batch, use_cache=False, gate="straight_through")
    kept_share = out.keep_mask.double().mean()  # straight-through gates have hard values
    norm = sum(layer.router.weight.double().square().sum() for layer in model.decoder_layers[1:])
    expected = out.loss + 0.3 * kept_share + 0.01 * norm
    trainer = make_trainer(model, router_phase(), tmp_path, steps=1, rows=rows)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert log["cross_entropy"] == pytest.approx(out.loss.item(), rel=1e-7)
    assert log["kept_share"] == pytest.approx(kept_share.item(), rel=1e-6)
    assert log["skip_rate"] == pytest.approx(1 - out.keep_mask.double().mean().item())


PHASES = {
    "routers": router_phase,
    "soft routers and adapter": lambda: router_phase(gate="soft", train_adapter=True),
    "lora": lora_phase,
    "warm-up": lambda: lora_phase(plans=RandomLayerDrop(Ramp(0.2, 0.5, 1.0, 3), LAYERS, [0])),
    "distilled": lambda: lora_phase(distill=DistillConfig(weight=0.5, temperature=2.0)),
}


@pytest.mark.parametrize("name", PHASES)
def test_gradients_of_1x8_and_8x1_agree(name, tmp_path):
    options = {"steps": 2, "sequence_average": 0.5}
    whole, one = gradients(PHASES[name](), tmp_path / "1x8", batch_size=8, **options)
    parts, other = gradients(
        PHASES[name](), tmp_path / "8x1", batch_size=1, accumulation=8, **options
    )
    for step, (a, b) in enumerate(zip(whole, parts, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(
                a[key], b[key], rtol=1e-5, atol=1e-7, msg=f"{key}, step {step}"
            )
    same_log(one.state.log_history, other.state.log_history)


@pytest.mark.parametrize("name", ["soft routers and adapter", "lora"])
def test_recomputed_activations_give_the_same_gradients(name, tmp_path):
    plain, one = gradients(PHASES[name](), tmp_path / "a", steps=1)
    again, two = gradients(PHASES[name](), tmp_path / "b", steps=1, **{CHECKPOINTING: True})
    for a, b in zip(plain, again, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-12, msg=key)
    counts = []
    for trainer in (one, two):
        with trainer.model.count_layer_calls() as calls:
            trainer.train()
        counts.append(calls.prefill.sum().item())
    assert counts[1] > 1.5 * counts[0]  # layers did run twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_gives_the_gradients_of_full_precision_within_its_rounding(dtype, tmp_path):
    """Straight-through decisions are hard, so soft gates are compared: no decision can flip."""
    phase = {"gate": "soft", "train_adapter": True}
    full, _ = gradients(router_phase(**phase), tmp_path / "f32", torch.float32, steps=1)
    low, _ = gradients(router_phase(**phase), tmp_path / "bf16", dtype, steps=1, bf16=True)
    split, _ = gradients(
        router_phase(**phase),
        tmp_path / "8x1",
        dtype,
        steps=1,
        bf16=True,
        batch_size=1,
        accumulation=8,
    )
    for other in (low, split):
        dot = sum((full[0][k] * other[0][k]).sum() for k in full[0])
        a = sum(full[0][k].square().sum() for k in full[0]).sqrt()
        b = sum(other[0][k].square().sum() for k in full[0]).sqrt()
        assert dot / (a * b) > 0.98
        assert 0.9 < b / a < 1.1


def test_two_processes_of_4_agree_with_one_of_8(tmp_path):
    """torchrun, gloo: gradients, alpha, thresholds and logged figures of three steps."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    script = Path(__file__).parent / "two_processes.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name in ("routers", "lora"):
        two = torch.load(tmp_path / f"{name}.pt")
        phase = router_phase() if name == "routers" else lora_phase()
        one, trainer = gradients(phase, tmp_path / name, batch_size=8)
        for a, b in zip(one, two["gradients"], strict=True):
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-7, msg=key)
        assert phase.multiplier.alpha == pytest.approx(two["alpha"], rel=1e-9)
        thresholds = trainer.model.router_config.thresholds
        assert thresholds == pytest.approx(two["thresholds"], rel=1e-6)
        same_log(trainer.state.log_history, two["log"])


def test_distillation_from_the_base_leaves_trainable_flags_alone(tmp_path):
    phase = router_phase(distill=DistillConfig(weight=1.0, teacher="base"))
    model = model_with_adapter()
    make_trainer(model, phase, tmp_path).train()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


# ---- controllers ----


def test_alpha_and_thresholds_move_once_per_optimizer_step_by_the_global_rate(tmp_path):
    phase = router_phase()
    trainer = make_trainer(model_with_adapter(), phase, tmp_path, batch_size=2, accumulation=4)
    trainer.train()
    alpha = 0.3
    for record in trainer.state.log_history[:3]:
        assert record["alpha"] == pytest.approx(alpha)
        alpha += 0.7 * (0.5 - record["skip_rate"])
    assert phase.multiplier.alpha == pytest.approx(alpha)


def test_the_asked_rate_is_held_while_lora_trains(tmp_path):
    """Routers read states that LoRA changes (here fast), and plans drift; thresholds follow."""
    missed = {}
    for hold in ("none", "shared", "per_layer"):
        phase = lora_phase(hold)
        phase.follower.window = 32
        phase.follower.keep_share = [1.0] + [0.4] * 5  # of 6 layers: a rate of 0.5
        trainer = make_trainer(
            model_with_adapter(), phase, tmp_path / hold,
            steps=40, learning_rate=3e-2, rows=examples(64),
        )  # fmt: skip
        trainer.train()
        rates = [r["skip_rate"] for r in trainer.state.log_history[20:40]]
        missed[hold] = abs(sum(rates) / len(rates) - 0.5)
    assert missed["none"] > 0.12
    assert missed["shared"] < 0.06 and missed["per_layer"] < 0.06


# ---- data order, signals, bad numbers ----


def test_the_data_order_covers_every_example_once_per_pass():
    order = list(ShuffledSteps(7, 20, seed=3))
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and len(order) == 20
    assert order == list(ShuffledSteps(7, 20, seed=3)) != list(ShuffledSteps(7, 20, seed=4))


def test_examples_of_like_length_share_a_step_whatever_the_batch_layout():
    lengths = torch.randint(5, 100, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(ShuffledSteps(64, 128, 1, lengths, per_step=8))
    assert sorted(order) == sorted(2 * list(range(64)))
    steps = [order[i : i + 8] for i in range(0, 128, 8)]
    spread = [max(lengths[i] for i in s) - min(lengths[i] for i in s) for s in steps]
    assert sum(spread) / len(spread) < 20
    means = [sum(lengths[i] for i in s) for s in steps]
    assert means != sorted(means)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_later_phase_goes_on_in_the_order_of_the_run(grouped):
    lengths = list(range(50, 0, -1)) if grouped else None
    whole = list(ShuffledSteps(50, 200, 1, lengths, per_step=4))
    for start, steps in ((0, 3), (3, 20), (23, 27)):
        part = ShuffledSteps(50, 4 * steps, 1, lengths, per_step=4, start=4 * start)
        assert list(part) == whole[4 * start : 4 * (start + steps)]


def test_a_loss_that_is_not_finite_stops_with_step_batch_and_examples(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    model.lm_head.weight[3, 0] = float("nan")

    trainer = make_trainer(
        model_with_adapter(), lora_phase(), tmp_path, batch_size=4, accumulation=2,
        callbacks=[Poison()],
    )  # fmt: skip
    order = list(trainer._order)[8:12]
    with pytest.raises(NonFiniteLoss) as error:
        trainer.train()
    assert "step 2 of phase 'lora', batch 1 of 2" in str(error.value)
    assert all(f"'example-{i}'" in str(error.value) for i in order)


def test_a_gradient_that_is_not_finite_stops_too(tmp_path):
    class Poison(TrainerCallback):
        def __init__(self, model):
            parameter = next(p for n, p in model.named_parameters() if "lora_A" in n)
            parameter.register_hook(lambda gradient: gradient * float("inf"))

    model = model_with_adapter()
    trainer = make_trainer(model, lora_phase(), tmp_path)
    Poison(model)
    with pytest.raises(NonFiniteLoss, match="gradient is not finite in step 1"):
        trainer.train()


# ---- checkpoints ----


def test_a_checkpoint_holds_routers_adapter_and_optimizer_but_never_the_base(tmp_path):
    trainer = make_trainer(model_with_adapter(), lora_phase(), tmp_path, save_every=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"router.safetensors", "router_config.json", "firstlm_state.json"} <= names
    assert {"adapter/adapter_model.safetensors", "optimizer.pt", "scheduler.pt"} <= names
    assert not [n for n in names if n.startswith(("model", "pytorch_model", "training_args"))]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def interrupted_at(step: int) -> tuple[InterruptGuard, TrainerCallback]:
    guard = InterruptGuard()

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                guard.request()

    return guard, Interrupt()


def all_phases(name: str) -> Phase:
    return {
        "routers": lambda: router_phase(
            follower=ThresholdFollower("shared", [0.5] * LAYERS, [0], 16)
        ),
        "lora": lora_phase,
        "warmup": PHASES["warm-up"],
    }[name]()


@pytest.mark.parametrize("name", ["routers", "lora", "warmup"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_interrupt_and_resume_gives_the_weights_of_an_uninterrupted_run_to_the_bit(
    name, dtype, tmp_path
):
    """With dropout (RNG state), across passes over the data, with moving alpha and thresholds."""
    options = {"steps": 7, "batch_size": 2, "accumulation": 2, "rows": examples(10)}
    whole, phase = model_with_adapter(dtype, dropout=0.3), all_phases(name)
    make_trainer(whole, phase, tmp_path / "whole", **options).train()

    guard, callback = interrupted_at(4)
    first = model_with_adapter(dtype, dropout=0.3)
    trainer = make_trainer(
        first, all_phases(name), tmp_path / "cut", guard=guard, callbacks=[callback], **options
    )
    trainer.train()
    assert trainer.state.global_step == 4
    checkpoint = latest_checkpoint(tmp_path / "cut")
    assert checkpoint.name == "checkpoint-4"

    second, resumed = model_with_adapter(dtype, dropout=0.3), all_phases(name)
    with torch.no_grad():  # everything must come from the checkpoint
        for n, p in second.named_parameters():
            if "router" in n or "lora_" in n:
                p.add_(1.0)
    torch.manual_seed(999)
    make_trainer(second, resumed, tmp_path / "cut", **options).train(
        resume_from_checkpoint=str(checkpoint)
    )
    a, b = learnt_state(whole), learnt_state(second)
    for key in a:
        assert torch.equal(a[key], b[key]), key
    assert whole.router_config.thresholds == second.router_config.thresholds
    assert json.dumps(phase.state_dict()) == json.dumps(resumed.state_dict())


def test_a_signal_to_one_process_stops_them_all(tmp_path, monkeypatch):
    """Else the main process would publish the phase, cut short, as finished."""
    trainer = make_trainer(model_with_adapter(), PHASES["warm-up"](), tmp_path)
    nothing = {"steered_rate": 0.0}
    trainer.stats = SimpleNamespace(gather=lambda _: None, close=lambda *_: nothing)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.tensor([int(own), 15]))
    assert trainer.after_optimizer_step()
    assert trainer.guard.signal_number == 15


def test_half_a_checkpoint_is_never_taken_for_a_whole_one(tmp_path):
    trainer = make_trainer(model_with_adapter(), lora_phase(), tmp_path, steps=4, save_every=2)
    trainer.train()
    for name in ("checkpoint-9", ".checkpoint-10.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "router.safetensors").write_bytes(b"cut short")
    assert latest_checkpoint(tmp_path).name == "checkpoint-4"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_old_checkpoints_are_removed(tmp_path):
    trainer = make_trainer(
        model_with_adapter(), lora_phase(), tmp_path, steps=5, save_every=1, save_total_limit=2
    )
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]


def test_resuming_another_phase_is_refused(tmp_path):
    make_trainer(model_with_adapter(), lora_phase(), tmp_path, steps=1, save_every=1).train()
    trainer = make_trainer(model_with_adapter(), router_phase(), tmp_path / "b")
    with pytest.raises(ValueError, match="phase 'lora', not 'routers'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_held_out_rows_are_measured_and_steer_nothing(tmp_path):
    held_out = examples(7, seed=5)
    logs = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": held_out}):
        trainer = make_trainer(model_with_adapter(), router_phase(), tmp_path, **options)
        trainer.train()
        logs.append((learnt_state(trainer.model), trainer.state.log_history))
    (plain, log), (measured, log_with) = logs
    assert all(torch.equal(plain[name], measured[name]) for name in plain)
    same_log(log, [line for line in log_with if "eval_loss" not in line])
    expected = score(trainer.model, held_out, COLLATOR)
    last = [line for line in log_with if "eval_loss" in line][-1]
    assert last["eval_loss"] == last["eval_cross_entropy"] == pytest.approx(expected.cross_entropy)
    assert last["eval_skip_rate"] == pytest.approx(expected.skip_rate)
    named = trainer.evaluate({"a": held_out, "b": examples(3)})
    assert named["eval_a_loss"] == pytest.approx(expected.cross_entropy)
    assert {"eval_b_skip_rate", "eval_b_plans"} <= named.keys()


@pytest.mark.parametrize(
    "options",
    [
        {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1000},
        {"compute_metrics": lambda prediction: {}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_cannot_work_are_refused_at_once(options, tmp_path):
    options = options | {"eval_dataset": examples(4)}
    with pytest.raises(ValueError, match=f"{next(iter(options))} is not supported"):
        make_trainer(model_with_adapter(), lora_phase(), tmp_path, **options)


def test_predict_says_what_to_use(tmp_path):
    trainer = make_trainer(model_with_adapter(), lora_phase(), tmp_path)
    with pytest.raises(ValueError, match="evaluate"):
        trainer.predict(examples(4))


def test_max_steps_is_needed(tmp_path):
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(model_with_adapter(), lora_phase(), tmp_path, steps=-1)


# ---- layer drop ----


def test_layer_drop_depends_on_seed_step_and_sequence_alone():
    drop = RandomLayerDrop(lambda step: 0.4, 10, [0, 9], seed=5)
    lengths = torch.tensor([7, 3, 5, 5])
    together = drop(3, [0, 1, 2, 3], lengths)
    apart = torch.cat([drop(3, [i], lengths[:1]) for i in range(4)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, drop(4, [0, 1, 2, 3], lengths))


def test_layer_drop_keeps_its_rate_protects_and_prefers_heavy_weights():
    weights = [1.0] * 10
    weights[4] = 20.0
    drop = RandomLayerDrop(lambda step: 0.23, 10, [0, 9], weights, spread=1.0, seed=1)
    masks = torch.cat([drop(s, range(8), torch.ones(8)) for s in range(150)])
    dropped = 1 - masks.double().mean(0)
    assert dropped.mean().item() == pytest.approx(0.23, abs=0.01)
    assert dropped[0] == dropped[9] == 0
    assert dropped[4] > 2.5 * dropped[5]
    SkipPlan.from_mask(masks[0])


def test_rows_have_names():
    assert Rows(examples(2)).ids == ["example-0", "example-1"]
