"""Losses, metrics and gradients against trl's own code on the same logits, in float32."""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from loraloom.data.tokens import NO_LOSS
from loraloom.host.host import Host
from loraloom.training.job import Job
from loraloom.training.step.batch import MicroBatchLoss
from tests.tiny import METHODS, parameter_grads
from tests.training.step.test_fused import run_window
from tests.training.toy import PAD_ID, add_job, padded, toy_config, toy_host, toy_pairs, toy_set

pytest.importorskip("trl")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def dpo_trainer():
    from trl import DPOTrainer

    return DPOTrainer


@pytest.fixture(scope="module")
def cpo_trainer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.cpo import CPOTrainer
    return CPOTrainer


def pair_job(objective: dict, method: str = "lora") -> tuple[Host, Job]:
    host = toy_host(torch.float32)
    config = toy_config("a", METHODS[method], objective=objective, batch_size=6, micro_batch_size=2)
    return host, add_job(host, config, toy_set(6, make=toy_pairs), random=True)


def logits_of(host: Host, job: Job, name: str | None) -> tuple[Tensor, Tensor]:
    """Logits and labels of the job's step: the chosen answers, then the rejected."""
    pairs = job.window.examples
    rows = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    input_ids, mask, labels = padded(rows)
    host.eval()
    return host(input_ids, mask, adapters=[name] * len(rows)).logits, labels


def log_probs_of(logits: Tensor, labels: Tensor) -> Tensor:
    """log p of each label in its place, 0 elsewhere."""
    log_p = logits[:, :-1].log_softmax(-1).gather(2, labels[:, 1:].clamp_min(0)[..., None])[..., 0]
    return log_p * (labels[:, 1:] != NO_LOSS)


# Trainers are made without their constructors, with what their losses read.
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"),
    gather=lambda values: values,
    gather_for_metrics=lambda values: values,
)


def trl_dpo(trainer_class, host: Host, job: Job, objective: dict) -> tuple[Tensor, dict]:
    logits, labels = logits_of(host, job, "a")
    log_probs = log_probs_of(logits, labels)
    with torch.no_grad():
        references = log_probs_of(*logits_of(host, job, None)).sum(1).chunk(2)
    empty = torch.zeros_like(log_probs)

    def model(**_):
        return SimpleNamespace(
            log_probs=log_probs, entropy=empty, mean_logits=empty, is_top1=empty.bool()
        )

    trainer = object.__new__(trainer_class)
    model.training = True
    vars(trainer).update(
        model=model,
        accelerator=ACCELERATOR,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[objective.get("loss_type", "sigmoid")],
        loss_weights=[1.0],
        beta=objective.get("beta", 0.1),
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": labels.clamp_min(0),
        "attention_mask": torch.ones_like(labels),
        "completion_mask": (labels != NO_LOSS).long(),
        "ref_chosen_logps": references[0],
        "ref_rejected_logps": references[1],
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


def assert_equals(ours: MicroBatchLoss, job: Job, loss: Tensor, metrics: dict) -> None:
    """Compare loss, metrics of the same name, and gradients."""
    torch.testing.assert_close(ours.loss, loss.item(), **TOLERANCE)
    assert ours.metrics
    for name, value in ours.metrics.items():
        torch.testing.assert_close(value, float(metrics[name]), msg=name, **TOLERANCE)
    gradients = parameter_grads(job.adapter)
    loss.backward()
    expected = parameter_grads(job.adapter)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, **TOLERANCE)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(
    "objective",
    [{"name": "dpo"}, {"name": "dpo", "loss_type": "ipo", "beta": 0.3}],
    ids=["sigmoid", "ipo"],
)
def test_dpo_is_that_of_trl(dpo_trainer, objective, method):
    host, job = pair_job(objective, method)
    assert_equals(run_window(host, [job])["a"], job, *trl_dpo(dpo_trainer, host, job, objective))


def trl_cpo(trainer_class, host: Host, job: Job, objective: dict) -> tuple[Tensor, dict]:
    logits, labels = logits_of(host, job, "a")
    trainer = object.__new__(trainer_class)
    vars(trainer).update(
        accelerator=ACCELERATOR,
        alpha=0.0,
        aux_loss_enabled=False,
        beta=objective.get("beta", 0.1),
        cpo_alpha=objective.get("cpo_alpha", 1.0),
        is_encoder_decoder=False,
        label_smoothing=objective.get("label_smoothing", 0.0),
        loss_type=objective.get("loss_type", "sigmoid"),
    )
    trainer.concatenated_inputs = lambda *_, **__: {
        "concatenated_input_ids": labels,
        "concatenated_attention_mask": labels,
        "concatenated_labels": labels,
    }
    trainer.pad_token_id = PAD_ID
    chosen = labels[: len(labels) // 2]
    return trainer.get_batch_loss_metrics(
        lambda *_, **__: SimpleNamespace(logits=logits), {"chosen_labels": chosen}
    )


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "cpo"},
        {"name": "cpo", "loss_type": "hinge", "beta": 0.4},
        {"name": "cpo", "label_smoothing": 0.2, "cpo_alpha": 0.5, "beta": 0.5},
    ],
    ids=["sigmoid", "hinge", "smoothed"],
)
def test_cpo_is_that_of_trl(cpo_trainer, objective):
    host, job = pair_job(objective)
    ours = run_window(host, [job])["a"]
    loss, metrics = trl_cpo(cpo_trainer, host, job, objective)
    assert_equals(ours, job, loss, metrics)
