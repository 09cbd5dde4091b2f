"""TRL's trainers add the tokens of a chat template: their rows of the embedding are trained beside the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

import rankwise
from cases import CASES, Case
from conftest import tiny_llama
from rankwise.adapters.configs import CONFIGS
from rankwise.errors import ArgumentError

ROWS = pytest.mark.parametrize(("name", "case"), CASES.items(), ids=list(CASES))
TEMPLATE = "{% for m in messages %}{{ '<|turn|> ' + m['content'] + ' </s> ' }}{% endfor %}"
NEW = {"embed_tokens": [96, 97]}


def tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = ["<pad>", "</s>", "<unk>", "a", "cat", "sat", "dog", "ran"]
    whole = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
    made.add_tokens(list(words))
    return made


@pytest.fixture
def template(tmp_path: Path) -> str:
    """A folder with a tokenizer whose chat template has a token of its own."""
    chat = tokenizer("<|turn|>")
    chat.chat_template = TEMPLATE
    chat.save_pretrained(str(tmp_path / "chat"))
    return str(tmp_path / "chat")


def arguments(kind: Any, folder: Path, template: str) -> Any:
    return kind(
        str(folder / "run"),
        max_steps=12,
        learning_rate=5e-3,
        report_to="none",
        max_length=16,
        disable_tqdm=True,
        bf16=False,
        chat_template_path=template,
    )


def turns(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": text}]


def rows_of(model: nn.Module) -> torch.Tensor:
    """The rows that are trained, as they are now."""
    return next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)


@ROWS
def test_sft_trains_the_rows_of_new_tokens_beside_the_adapter(
    name: str, case: Case, tmp_path: Path, template: str
) -> None:
    config = CONFIGS[name](**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | case.fields)
    trainer = SFTTrainer(
        tiny_llama(),
        args=arguments(SFTConfig, tmp_path, template),
        train_dataset=Dataset.from_dict({"messages": [turns("sat"), turns("ran")] * 16}),
        processing_class=tokenizer(),
        peft_config=config,
    )
    model: Any = trainer.model
    assert (config.trainable_token_indices["embed_tokens"][0], config.modules_to_save) == (8, ["lm_head"])
    before = rows_of(model).detach().clone()
    trainer.train()
    told = rankwise.status(model)
    assert (told.step, told.rules_run, told.steps_skipped) == (12, 12, 0)
    moved = (rows_of(model) - before).norm(dim=1)
    assert moved[0] > 0, "the row of the token that the template uses"
    assert set(told.ranks) == {n for n in told.ranks if "_proj" in n}

    trainer.save_model(str(tmp_path / "saved"))
    base: Any = tiny_llama()
    base.resize_token_embeddings(64)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "saved")).eval()
    base = loaded.get_base_model()
    base.load_state_dict(model.get_base_model().state_dict(), strict=False)  # the new rows start at random
    tokens = torch.tensor([[8, 3, 4, 1, 8, 5]])
    assert torch.equal(rows_of(loaded), rows_of(model))
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-6)


def test_reward_trainer_adds_new_tokens(tmp_path: Path, template: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=64, num_labels=1, pad_token_id=0, **shape))
    fields: dict[str, Any] = {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    pairs = {"chosen": [turns("sat")] * 16, "rejected": [turns("ran")] * 16}
    trainer = RewardTrainer(
        model,
        args=arguments(RewardConfig, tmp_path, template),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(),
        peft_config=rankwise.SoraConfig(r=4, **fields),
    )
    trainer.train()
    assert rankwise.status(trainer.model).rules_run == 12


@pytest.mark.parametrize("indices", [NEW, NEW["embed_tokens"]], ids=["mapping", "list"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_saved_loaded_and_merged_as_by_peft(indices: Any, tied: bool, tmp_path: Path) -> None:
    def llama() -> Any:
        torch.manual_seed(2)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, tie_word_embeddings=tied, **shape)).eval()

    tokens = torch.tensor([[5, 96, 7, 97]])
    outputs = {}
    for kind in (rankwise.LoraConfig, peft.LoraConfig):
        config = kind(r=2, target_modules=["q_proj"], trainable_token_indices=indices, task_type="CAUSAL_LM")
        model: Any = get_peft_model(llama(), config).eval()
        rows = rows_of(model)
        rows.data = torch.linspace(-1, 1, rows.numel()).view_as(rows)
        folder = tmp_path / kind.__module__
        model.save_pretrained(str(folder))
        loaded: Any = PeftModel.from_pretrained(llama(), str(folder)).eval()
        outputs[kind] = model(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, outputs[kind], rtol=0, atol=0)
        torch.testing.assert_close(loaded.merge_and_unload()(tokens).logits, outputs[kind], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[rankwise.LoraConfig], outputs[peft.LoraConfig], rtol=0, atol=0)


@pytest.mark.parametrize("indices", [NEW, NEW["embed_tokens"]], ids=["mapping", "list"])
def test_rows_of_an_adapted_embedding_are_refused(indices: Any) -> None:
    """PEFT looks such rows up in the base weight, past the update."""
    model = tiny_llama()
    fields = {"target_modules": ["embed_tokens", "q_proj"], "trainable_token_indices": indices}
    with pytest.raises(ArgumentError, match="must name embeddings that target_modules does not name, too"):
        get_peft_model(model, rankwise.LoraConfig(r=2, **fields))
    assert not any("rankwise" in name for name, _ in model.named_modules())
