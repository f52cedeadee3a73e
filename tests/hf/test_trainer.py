"""transformers' own Trainer and peft's adapters with each kind of model."""

from __future__ import annotations

import importlib.util
from dataclasses import fields

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
)

from fast_transformers.hf import FastTransformerForCausalLM, FastTransformerForMaskedLM
from tests.hf.test_models import seq2seq, small

LENGTH, ROWS = 8, 16
OPTIONS = {"feature_map": "favor:n_dims=16,redraw=3", "dropout": 0.0}
MODELS = {
    "CAUSAL_LM": (AutoModelForCausalLM, lambda: small(FastTransformerForCausalLM, **OPTIONS)),
    "FEATURE_EXTRACTION": (
        AutoModelForMaskedLM,
        lambda: small(FastTransformerForMaskedLM, attention="linear", causal=False, **OPTIONS),
    ),
    "SEQ_2_SEQ_LM": (AutoModelForSeq2SeqLM, lambda: seq2seq(**OPTIONS)),
}
every_model = pytest.mark.parametrize("task", MODELS)


def rows():
    """Sequences of which each repeats one token; the last of some is padding."""
    tokens = torch.arange(ROWS)[:, None].expand(-1, LENGTH) + 2
    mask = torch.ones_like(tokens)
    mask[::2, -1] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    return [
        {"input_ids": x, "attention_mask": m, "labels": y}
        for x, m, y in zip(tokens, mask, labels, strict=True)
    ]


# newer releases of transformers have another name for gradient checkpointing
NAMES = {f"{name}_checkpointing" for name in ("activation", "gradient")}
CHECKPOINTING = min(NAMES & {field.name for field in fields(TrainingArguments)})


def trainer(model, folder, *, checkpointing, **options):
    options = {
        CHECKPOINTING: checkpointing,
        "learning_rate": 3e-3,
        "max_steps": 12,
        "per_device_train_batch_size": 8,
        **options,
    }
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(str(folder), save_strategy="no", **quiet, **options)
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows())


def weights(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


@every_model
def test_trainer(task, tmp_path, capsys):
    """Learns, with gradient checkpointing the same, and is loaded as what was saved."""
    auto, make = MODELS[task]
    trained = []
    for checkpointing in (False, True):
        ours = trainer(make(), tmp_path / "run", checkpointing=checkpointing)
        before = ours.evaluate()["eval_loss"]
        ours.train()
        assert ours.evaluate()["eval_loss"] < 0.7 * before
        trained.append(ours.model)
    torch.testing.assert_close(*map(weights, trained))
    ours.save_model(str(tmp_path / "model"))
    loaded = auto.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(trained[1])
    saved = weights(trained[1])
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(x, saved[name]) for name, x in loaded.state_dict().items())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
@every_model
def test_adapters_are_trained(task, tmp_path, capsys):
    """LoRA: nothing else changes, and the adapters are saved, loaded and merged."""
    import peft

    make = MODELS[task][1]
    config = peft.LoraConfig(
        task_type=task, r=4, target_modules=["query_projection", "value_projection", "linear1"]
    )
    adapted = peft.get_peft_model(make(), config)
    before = weights(adapted)
    trainer(adapted, tmp_path / "run", learning_rate=1e-2, checkpointing=True).train()
    changed = [name for name, x in weights(adapted).items() if not torch.equal(x, before[name])]
    assert changed
    learned = [name for name in changed if "feature_map" not in name]  # features are redrawn
    assert learned
    assert all("lora" in name for name in learned)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    inputs = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    expected = adapted(**inputs).loss
    again = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    copy_features(adapted, again)
    torch.testing.assert_close(again(**inputs).loss, expected)
    torch.testing.assert_close(again.merge_and_unload()(**inputs).loss, expected)


def copy_features(one, other):
    """Random features belong to the base model, which an adapter does not save."""
    found = {name: x for name, x in one.state_dict().items() if "feature_map" in name}
    assert other.load_state_dict(found, strict=False).unexpected_keys == []
