"""An adapter that does not train as its script seems to say is told at the first step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    WavLMConfig,
    WavLMModel,
)

import rankwise
from cases import CASES
from conftest import tiny_bert
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError, TrainingError

TOKENS = torch.arange(2, 34).view(4, 8)
LABELS = torch.tensor([0, 1, 2, 0])
WITH_A_AND_B = ["lora", "nnm", "sora", "alora", "salora"]


def adapted(method: str = "lora", base: nn.Module | None = None, **fields: Any) -> Any:
    known = {"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | CASES[method].alone | fields
    return get_peft_model(tiny_bert() if base is None else base, CONFIGS[method](**known)).train()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def steps(model: Any, optimizer: Any, count: int = 1, loss: Callable[[], Tensor] | None = None) -> list[str]:
    """The warnings of that many steps."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(count):
            (loss or (lambda: model(input_ids=TOKENS, labels=LABELS).loss))().backward()
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in told if "adapt" in str(w.message)]


# --- nothing trains ------------------------------------------------------------------------------------------------


def freeze_by_name(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        p.requires_grad = "lora" in name or "classifier" in name


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("held", ["what trains", "everything"])
def test_an_active_adapter_that_is_frozen_is_told_once(method: str, held: str) -> None:
    model = adapted(method)
    freeze_by_name(model)
    parameters = [p for p in model.parameters() if p.requires_grad or held == "everything"]
    told = steps(model, torch.optim.SGD(parameters, lr=0.1), 3)
    assert len(told) == 1
    assert "nothing of the active adapter 'default' trains: none of its parameters requires a gradient" in told[0]
    assert rankwise.status(model).step == 0


def test_an_adapter_loaded_without_is_trainable_is_told(tmp_path: Any) -> None:
    adapted().save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_bert(), str(tmp_path)).train()
    model.base_model.model.classifier.requires_grad_(True)
    (told,) = steps(model, sgd(model))
    assert "is_trainable=True" in told


def test_a_frozen_adapter_beside_a_trained_one_is_no_fault() -> None:
    model = adapted(task_type=None)
    model.add_adapter("frozen", rankwise.LoraConfig(r=2, target_modules=["query"], init_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    model.base_model.set_requires_grad("frozen", requires_grad=False)
    assert steps(model, sgd(model), 2) == []


@pytest.mark.parametrize("first", ["another model's", "the head's"])
def test_a_frozen_adapter_beside_a_trained_one_is_no_fault_whichever_optimiser_steps_first(first: str) -> None:
    model, other = adapted(task_type=None), nn.Linear(2, 2)
    model.add_adapter("frozen", rankwise.LoraConfig(r=2, target_modules=["query"], init_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    model.base_model.set_requires_grad("frozen", requires_grad=False)
    own = sgd(model)
    head = model.base_model.model.classifier.requires_grad_(True)
    before = torch.optim.SGD((other if first == "another model's" else head).parameters(), lr=0.1)
    assert steps(model, before, 2) == []
    assert steps(model, own, 2) == []


def test_a_frozen_adapter_is_told_of_when_its_own_model_first_trains() -> None:
    model, other = adapted(), nn.Linear(2, 2)
    freeze_by_name(model)
    assert steps(model, torch.optim.SGD(other.parameters(), lr=0.1), 2) == []
    (told,) = steps(model, sgd(model), 2)
    assert "none of its parameters requires a gradient" in told


@pytest.mark.parametrize("use", ["evaluated", "without gradients", "disabled"])
def test_an_adapter_that_is_not_in_the_training_pass_is_no_fault(use: str) -> None:
    teacher = adapted()
    teacher.requires_grad_(False)
    student = nn.Linear(3, 3)

    def loss() -> Tensor:
        if use == "evaluated":
            teacher.eval()
        if use == "disabled":
            teacher.base_model.disable_adapter_layers()
        with torch.set_grad_enabled(use != "without gradients"):
            wanted = teacher(input_ids=TOKENS).logits
        return (student(torch.ones(4, 3)) - wanted).square().mean()

    assert steps(student, torch.optim.SGD(student.parameters(), lr=0.1), 2, loss) == []


def test_an_adapter_that_no_optimiser_holds_is_told() -> None:
    model = adapted()
    head = [p for name, p in model.named_parameters() if "lora" in name or "classifier" in name]
    (told,) = steps(model, torch.optim.SGD(head, lr=0.1))
    assert "no optimiser that has stepped holds its parameters" in told
    assert steps(model, torch.optim.SGD(head, lr=0.1), 12) == []


def test_an_adapter_is_not_told_of_at_the_first_step_of_an_optimiser_of_another_model() -> None:
    model, other = adapted(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    assert steps(model, optimizer, 9) == []
    (told,) = steps(model, optimizer, 3)
    assert "no optimiser that has stepped holds its parameters" in told


def test_an_optimiser_that_holds_the_adapter_and_never_steps_is_told_after_a_while() -> None:
    model = adapted()
    own = torch.optim.SGD([p for name, p in model.named_parameters() if "rankwise_tensors" in name], lr=0.1)
    head = torch.optim.SGD([p for name, p in model.named_parameters() if "classifier" in name], lr=0.1)
    assert steps(model, head, 9) == []
    assert len(steps(model, head, 3)) == 1
    assert own.state == {}


def test_an_adapter_whose_own_optimiser_steps_later_is_no_fault() -> None:
    model = adapted()
    head = [p for name, p in model.named_parameters() if "classifier" in name]
    own = [p for name, p in model.named_parameters() if "rankwise_tensors" in name]
    one, two = torch.optim.SGD(head, lr=0.1), torch.optim.SGD(own, lr=0.1)
    told = []
    for i in range(12):
        told += steps(model, one)
        if i % 4 == 3:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                two.step()
    assert told == []


def test_an_ordinary_run_is_told_nothing() -> None:
    model = adapted()
    assert steps(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 2) == []


# --- LoRA+ and LoRA-FA ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CASES)
def test_pefts_loraplus_finds_no_b_and_is_told(method: str) -> None:
    model = adapted(method)
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=16)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)  # warm-up: every rate begins at 0
    told = [t for t in steps(model, optimizer, 2) if "LoRA+" in t]
    assert len(told) == 1
    assert "pass rankwise.loraplus_groups(model, …) to the optimiser" in told[0]


def test_an_empty_group_without_a_rate_of_its_own_is_no_fault() -> None:
    """A Trainer makes one for what does not decay, which may be nothing."""
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": trained, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    assert steps(model, torch.optim.AdamW(groups, lr=1e-3)) == []


def test_loraplus_is_pefts_on_pefts_lora() -> None:
    """The same start and data: the same weights after five steps, to rounding."""
    ours = adapted(lora_alpha=8).double().eval()
    theirs: Any = get_peft_model(
        tiny_bert(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    theirs = theirs.double().eval()
    twins = {}
    for name, p in ours.named_parameters():
        if "rankwise_tensors" in name:
            twin = theirs.get_parameter(name.replace("rankwise_tensors.default.", "lora_") + ".default.weight")
            twin.data = p.detach().clone()
            twins[name] = twin
    for model in (ours, theirs):  # PEFT trains biases of a head as B; here only the adapter is compared
        model.base_model.model.classifier.requires_grad_(False)
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 16}
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)
    optimizer = torch.optim.AdamW(rankwise.loraplus_groups(ours, lr=1e-3, ratio=16), weight_decay=0.0)
    assert steps(ours, optimizer, 5) == []
    steps(theirs, reference, 5)
    for name, twin in twins.items():
        torch.testing.assert_close(ours.get_parameter(name), twin, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", WITH_A_AND_B)
def test_loraplus_moves_b_by_its_ratio_and_everything_once(method: str) -> None:
    model = adapted(method, init_weights=False)
    groups = rankwise.loraplus_groups(model, lr=1e-3, ratio=16)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in groups[1]["params"]} == {"B"}
    assert (groups[0]["lr"], groups[1]["lr"]) == (1e-3, 16e-3)

    slow = copy.deepcopy(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for each, ratio in ((slow, 1.0), (model, 16.0)):
        steps(each, torch.optim.SGD(rankwise.loraplus_groups(each, lr=0.1, ratio=ratio)))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            moved, slowly = p - before[name], slow.get_parameter(name) - before[name]
            torch.testing.assert_close(moved, 16 * slowly, rtol=1e-3, atol=1e-5)
            assert moved.any()


def test_loraplus_under_a_trainer_keeps_its_ratio(tmp_path: Any) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(rankwise.loraplus_groups(model, lr=1e-3, ratio=16))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, warmup_steps=2, report_to="none", disable_tqdm=True, use_cpu=True
    )
    data = Dataset.from_dict({"input_ids": TOKENS.tolist(), "labels": LABELS.tolist()})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*adapter")
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()  # type: ignore[arg-type]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-3, 16e-3]
    assert rankwise.status(model).rules_run == 4


def test_pefts_riemannian_optimiser_says_itself_that_it_finds_nothing() -> None:
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        create_riemannian_optimizer(adapted(), torch.optim.SGD, lr=1e-3)


def test_loraplus_refuses_what_has_no_a_and_b() -> None:
    for method in CASES.keys() - set(WITH_A_AND_B):
        with pytest.raises(ArgumentError, match=f"with the A and B of LoRA; found 'default: {method}'"):
            rankwise.loraplus_groups(adapted(method), lr=1e-3, ratio=16)
    with pytest.raises(ArgumentError, match="`ratio` must be a number"):
        rankwise.loraplus_groups(adapted(), lr=1e-3, ratio=0)
    with pytest.raises(ArgumentError, match="`adapter` must be a rankwise adapter of the model"):
        rankwise.loraplus_groups(adapted(), lr=1e-3, ratio=16, adapter="other")


def test_pefts_lora_fa_is_refused() -> None:
    model = adapted()
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-3)
    with pytest.raises(TrainingError, match=r"LoRA-FA optimiser .* whose names end in \"\.A\""):
        steps(model, optimizer)


def test_a_frozen_a_trains_b_alone_as_lora_fa_does() -> None:
    model = adapted(init_weights=False)
    for name, p in model.named_parameters():
        if name.endswith(".A"):
            p.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "rankwise_tensors" in name}
    steps(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    moved = {name.rsplit(".", 1)[-1] for name, was in before.items() if (model.get_parameter(name) != was).any()}
    assert moved == {"B"}


# --- layers that the model passes by -------------------------------------------------------------------------------


class Attention(nn.Module):
    """A block of torch's own: its attention multiplies by the weight of `out_proj` itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("method", CASES)
def test_the_out_proj_of_torchs_attention_is_told(method: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    case = {"score_batch": lambda model: -float(model(x).square().mean())} if method == "alora" else {}
    model = adapted(method, Attention(), target_modules="all-linear", task_type=None, **case)
    told = steps(
        model,
        sgd(model),
        2,
        lambda: model(x).square().mean(),
    )
    assert told == [
        "the model reads the weights of 1 adapted layers and does not run them, so that their updates neither act nor "
        "train (leave them out with exclude_modules): block.self_attn.out_proj"
    ]


def test_an_adapter_whose_every_layer_is_passed_by_is_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    model = get_peft_model(Net(), rankwise.LoraConfig(r=2, target_modules=["out_proj"], modules_to_save=["head"]))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 8)
    (told,) = steps(model, sgd(model), 2, lambda: model(x).square().mean())
    assert told.startswith("the model reads the weights of 1 adapted layers and does not run them")
    assert "out_proj" in told


def test_the_time_steps_of_mamba_are_told() -> None:
    config = MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = adapted("lora", MambaForCausalLM(config), target_modules=["in_proj", "x_proj", "dt_proj"], task_type=None)
    loss = lambda: model(input_ids=TOKENS, labels=TOKENS).loss  # noqa: E731
    (told,) = steps(model, sgd(model), 1, loss)
    assert told.endswith("exclude_modules): backbone.layers.0.mixer.dt_proj")


def test_the_attention_of_wavlm_is_told() -> None:
    shape = {"conv_dim": (8,), "conv_kernel": (10,), "conv_stride": (5,), "num_conv_pos_embeddings": 4}
    config = WavLMConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **shape)
    config.num_conv_pos_embedding_groups, config.num_feat_extract_layers, config.apply_spec_augment = 2, 1, False
    model = adapted("lora", WavLMModel(config), target_modules=["q_proj", "out_proj", "output_dense"], task_type=None)
    sound = torch.randn(2, 400)
    loss = lambda: model(sound).last_hidden_state.square().mean()  # noqa: E731
    (told,) = steps(model, sgd(model), 1, loss)
    assert "the weights of 2 adapted layers" in told
    assert told.endswith("q_proj, encoder.layers.0.attention.out_proj")


def test_a_layer_that_is_run_and_whose_weight_is_also_read_is_no_fault() -> None:
    """T5 reads the dtype of `wo.weight` before it runs `wo`."""
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    base = T5ForConditionalGeneration(T5Config(vocab_size=50, **shape))
    model = adapted("lora", base, target_modules=["wo"], task_type=None)
    loss = lambda: model(input_ids=TOKENS, labels=TOKENS).loss  # noqa: E731
    assert steps(model, sgd(model), 2, loss) == []


def test_a_layer_that_a_batch_does_not_reach_is_no_fault() -> None:
    """An expert that gets no tokens is neither run nor read."""
    experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model: Any = get_peft_model(experts, rankwise.LoraConfig(r=2, target_modules=["0", "1"])).train()
    loss = lambda: model.base_model.model[0](torch.ones(2, 4)).square().mean()  # noqa: E731
    assert steps(model, sgd(model), 2, loss) == []
