"""The code that a checkpoint carries for transformers, in training: losses, trainers, saving.

transformers' own Trainer shuffles groups and shards; what it computes and what it saves is held to
the reference, and a group that was parted is refused.
"""

import numpy as np
import pytest
import torch
import transformers
from test_remote_code import (
    KINDS,
    assert_conforms,
    load,
    own_cache,  # noqa: F401
    raw_config,
    reference,
    whole,
    write,
)
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments
from true_float64 import true_float64

import bridge
from bridge.checkpoints.reading import open_checkpoint
from bridge.config import FAMILIES, tensor_shapes
from bridge.contract import SFT, Batch
from bridge.decoding.inputs import default_positions
from bridge.errors import BridgeError
from bridge_conformance.cases import ModelCase
from bridge_conformance.tolerance import allowance, error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_labels_give_the_references_loss_and_gradients(family, checkpointed, kind, tmp_path):
    """Whole rows as transformers' Trainer has them: what is fed, shifted, is the target, and the
    last token of a row is no input (clause 7.2), though the mask has a one there."""
    case = ModelCase(raw_config(family, kind), 5)
    rng = np.random.default_rng(5)
    tokens = rng.integers(2, 13, (5, 8))
    first, last = rng.integers(0, 3, 5), rng.integers(4, 8, 5)
    there = (np.arange(8) >= first[:, None]) & (np.arange(8) <= last[:, None])
    before = np.arange(8) > first[:, None]  # nothing says a row's first token
    groups = np.array([1, 0, 1, 1, 0])
    with true_float64():
        model = load(write(tmp_path / "it", case)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(
            torch.from_numpy(tokens),
            attention_mask=torch.from_numpy(there).long(),
            labels=torch.from_numpy(np.where(there & before, tokens, -100)),
            groups=torch.from_numpy(groups),
            widths=torch.tensor([3, 2, 3, 3, 2]),
            use_cache=False,
        ).loss
        loss.backward()
    after = np.roll(there, -1, axis=1)
    after[:, -1] = False
    batch = Batch(
        tokens=tokens,
        groups=groups,
        active=there & after,
        targets=np.roll(tokens, -1, axis=1),
        target_mask=there & after,
    )
    names = tuple(tensor_shapes(case.config))
    exact, own = (
        reference(case, T).loss_and_grads(batch, SFT(), names) for T in ("float64", "float32")
    )
    want, rough = (np.array(said[0]["loss"]) for said in (exact, own))
    assert error(np.array(loss.item()), want) <= allowance(want, rough, "float64")
    got = {name: weight.grad.numpy() for name, weight in model.named_parameters()}
    got, want, rough = (
        np.concatenate([grads[name].ravel() for name in names]) for grads in (got, exact[1], own[1])
    )
    assert error(got, want) <= allowance(want, rough, "float64")


def group_of(rng, width):
    """A group as a dataset has it: rows of one prompt, whose tokens are no targets."""
    prompt = rng.integers(2, 13, 3).tolist()
    rows = [prompt + rng.integers(2, 13, n).tolist() for n in rng.integers(1, 6, width)]
    return {"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]}


def losses_of(case, examples):
    """The reference's loss of a batch of whole groups, in float64 and in float32."""
    rows = [row for example in examples for row in example["input_ids"]]
    longest = max(map(len, rows))
    tokens = np.array([row + [0] * (longest - len(row)) for row in rows])
    lengths = np.array([len(row) for row in rows])[:, None]
    fed = np.arange(longest) < lengths - 1  # the last is a target alone
    groups = np.repeat(np.arange(len(examples)), [len(e["input_ids"]) for e in examples])
    batch = Batch(tokens, groups, fed, np.roll(tokens, -1, 1), fed & (np.arange(longest) >= 2))
    return [
        np.array(reference(case, T).loss_and_grads(batch, SFT(), ("model.norm.weight",))[0]["loss"])
        for T in ("float64", "float32")
    ]


class Noted(Trainer):
    """Notes the loss of each step, which is logged rounded."""

    losses: list[float]

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def trainer(model, out, rows, collator=None, batch=2, lr=0.0):
    settings = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        num_train_epochs=2,
        learning_rate=lr,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return Noted(model, settings, train_dataset=rows, data_collator=collator)


def test_a_trainer_may_shuffle_whole_groups(tmp_path):
    """Its loss at every step is the reference's of the groups that it drew; what it saves converts
    to what `bridge` writes."""
    case, rng = (
        ModelCase(raw_config(architectures=["LlamaForCausalLM"]), 8),
        np.random.default_rng(8),
    )
    path = write(tmp_path / "it", case)
    groups, drawn = [group_of(rng, width) for width in (4, 1, 3, 2, 4)], []
    with true_float64():
        model = load(path)

        def collate(examples):
            drawn.append(examples)
            return model.collate_groups(examples)

        said = trainer(model, tmp_path / "out", groups, collate)
        said.train()
    assert len(drawn) == 6 and drawn[:3] != [groups[:2], groups[2:4], groups[4:]]
    for loss, examples in zip(said.losses, drawn, strict=True):
        exact, own = losses_of(case, examples)
        assert error(np.array(loss), exact) <= allowance(exact, own, "float64")

    model = load(path, torch.float32)
    said = trainer(model, tmp_path / "out", groups, model.collate_groups, lr=0.1)
    said.train()
    said.save_model(str(tmp_path / "saved"))
    bridge.convert(tmp_path / "saved", tmp_path / "back", to="torch")
    opened, state = open_checkpoint(tmp_path / "back"), model.state_dict()
    assert opened.config == case.config
    assert opened.raw_config["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in opened.raw_config
    for name, before in case.tensors("float32").items():
        assert np.array_equal(opened.tensors[name], state[name].numpy())
        assert not np.array_equal(opened.tensors[name], before), name


def test_a_group_that_is_parted_is_refused(tmp_path):
    """A dataset of rows, which the trainer shuffles; and shards of a batch, as DataParallel has
    them. Whole groups in any order are none of it."""
    model = load(write(tmp_path / "it", ModelCase(raw_config(), 8)), torch.float32)
    tokens = [[2, 3, n] for n in range(4, 12)]
    rows = [{"input_ids": t, "labels": t, "groups": i // 4} for i, t in enumerate(tokens)]
    with pytest.raises(ValueError, match=r"give also widths \[B\]"):
        trainer(model, tmp_path / "out", rows, batch=4).train()
    wide = [{**row, "widths": 4} for row in rows]
    with pytest.raises(ValueError, match=r"of a group of 4 rows [123] came; a shuffle"):
        trainer(model, tmp_path / "out", wide, batch=4).train()
    trainer(model, tmp_path / "out", wide, batch=8).train()

    batch = model.collate_groups([group_of(np.random.default_rng(0), 4)])
    shard = {name: value[:2] for name, value in batch.items()}
    for mode in (model.train, model.eval):
        mode()
        with pytest.raises(ValueError, match="of a group of 4 rows 2 came"):
            model(**shard)
        with pytest.raises(ValueError, match=r"widths is \[2\], not one number a row: \[4\]"):
            model(**{**batch, "widths": batch["widths"][:2]})
        shard.pop("labels", None)  # whatever rows are read for
        for part in (shard, batch):
            with pytest.raises(ValueError, match=r"give also widths \[B\]"):
                model(part["input_ids"], part["attention_mask"], groups=part["groups"])
    with pytest.raises(ValueError, match=r"give also widths \[B\]"):
        evaluation(model, tmp_path / "out", 2).predict([without_labels(row) for row in rows])
    with pytest.raises(ValueError, match="of a group of 4 rows 2 came"):
        evaluation(model, tmp_path / "out", 2).predict([without_labels(row) for row in wide])
    alone = {name: value for name, value in shard.items() if name not in ("groups", "widths")}
    model.train()(**alone)


def without_labels(example):
    return {name: value for name, value in example.items() if name != "labels"}


def evaluation(model, out, batch, **options):
    settings = TrainingArguments(
        output_dir=str(out),
        per_device_eval_batch_size=batch,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(model, settings, **options)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_trainer_evaluates_all_rows_where_its_batch_divides_the_groups(batch, tmp_path):
    """With labels and without, what it gives is the reference's of whole groups. Else transformers
    keeps, of the last batch, as many rows as there are groups in it, as the code's head says."""
    case, rng = ModelCase(raw_config(), 11), np.random.default_rng(11)
    groups = [group_of(rng, 4) for _ in range(3)]
    rows = [row for group in groups for row in group["input_ids"]]
    seen = []
    with true_float64():
        model = load(write(tmp_path / "it", case))
        it = evaluation(
            model,
            tmp_path / "out",
            batch,
            data_collator=model.collate_groups,
            compute_metrics=lambda said: seen.append(said) or {},
        )
        loss = it.evaluate(groups)["eval_loss"]
        said = it.predict([without_labels(group) for group in groups]).predictions
    kept = 9 if batch == 2 else 12
    [metrics] = seen
    assert len(metrics.predictions) == len(metrics.label_ids) == len(said) == kept
    drawn = [groups[i : i + batch] for i in range(0, 3, batch)]
    exact, own = np.average([losses_of(case, each) for each in drawn], 0, [len(d) for d in drawn])
    assert error(np.array(loss), exact) <= allowance(exact, own, "float64")
    T, lengths = max(map(len, rows)), np.array([len(row) for row in rows])[:, None]
    tokens = np.array([row + [0] * (T - len(row)) for row in rows])
    for got, fed_to in ((metrics.predictions, lengths - 1), (said, lengths)):
        fed = np.arange(T) < fed_to
        arguments = (tokens, np.repeat(np.arange(3), 4), fed, default_positions(fed))
        cells = fed & (np.arange(12) < kept)[:, None]
        assert_conforms(got[cells[:kept]], case, arguments, cells)


def test_the_layers_without_the_head_are_told_of_groups_too(tmp_path):
    """Some trainers compute the head themselves."""
    with true_float64(), torch.no_grad():
        model = load(write(tmp_path / "it", ModelCase(raw_config(), 9)))
        tokens = torch.tensor([[3, 4, 5], [6, 7, 8], [3, 4, 9]])
        groups = {**whole(torch.tensor([0, 1, 0])), "active": torch.ones(3, 3)}
        assert torch.equal(model.lm_head(model.model(tokens)[0]), model(tokens).logits)
        together = model.lm_head(model.model(input_ids=tokens, **groups)[0])
        assert torch.equal(together, model(tokens, **groups).logits)
        assert not torch.equal(together, model(tokens).logits)
        with pytest.raises(ValueError, match="say with active"):
            model.model(tokens, **whole(groups["groups"]))
        del groups["widths"]
        for mode in (model.train, model.eval):
            with pytest.raises(ValueError, match="give also widths"):
                mode().model(tokens, **groups)


def test_who_loads_a_class_by_name_gets_the_blocks(tmp_path):
    """Trainers that are given a path take the class that `architectures` names, where transformers
    has it. What saved the host alone is told so."""
    case = ModelCase(raw_config(architectures=["LlamaForCausalLM"]), 10)
    bridge.convert(
        write(tmp_path / "it", case, code=False), tmp_path / "hf", "torch", remote_code=True
    )
    [name] = AutoConfig.from_pretrained(tmp_path / "hf").architectures
    chosen = getattr(transformers, name, AutoModelForCausalLM)
    model = chosen.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(model).__name__ == name == "BridgeLlamaForCausalLM"
    bridge.convert(tmp_path / "hf", tmp_path / "back", "torch")
    assert open_checkpoint(tmp_path / "back").raw_config == case.raw

    host = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=False)
    host.save_pretrained(tmp_path / "host")
    with pytest.raises(BridgeError, match=r"has no blocks, though .* trust_remote_code=True"):
        bridge.convert(tmp_path / "host", tmp_path / "refused", "torch")
    assert not (tmp_path / "refused").exists()
