import pytest

from loraloom.training.step.batch import lay_out
from tests.training.step.test_fused import CUT, OBJECTIVES, assert_same, run_window
from tests.training.toy import ADAPTERS, add_job, gradients_of, toy_config, toy_host, toy_set


def first_step(configs, sets=None):
    """Run the first step of jobs together."""
    host = toy_host()
    jobs = [add_job(host, config, (sets or {}).get(config.name), random=True) for config in configs]
    return run_window(host, jobs), {job.name: gradients_of(job) for job in jobs}


@pytest.mark.parametrize(("method", "objective"), CUT)
def test_packed_rows_give_the_losses_and_gradients_of_rows_of_their_own(method, objective):
    results = []
    for packing in (False, True):
        settings = {"batch_size": 12, "micro_batch_size": 6, "packing": packing, "max_length": 30}
        settings["objective"] = OBJECTIVES.get(objective, {"name": "sft"})
        losses, gradients = first_step([toy_config("a", ADAPTERS[method], **settings)])
        results.append((losses["a"], gradients["a"]))
    (plain, plain_gradients), (packed, packed_gradients) = results
    assert packed.computed_tokens < plain.computed_tokens
    for name in ("loss", "aux_loss", "router_load_cv", "router_entropy", "metrics"):
        assert getattr(packed, name) == pytest.approx(getattr(plain, name))
    assert_same(packed_gradients, plain_gradients, 1e-6)


def test_jobs_that_pack_and_jobs_that_do_not_share_a_forward():
    configs = [
        toy_config("packed", ADAPTERS["mixlora"], batch_size=9, packing=True, max_length=20),
        toy_config("plain", ADAPTERS["dora"], seed=1, batch_size=3),
        toy_config("short", ADAPTERS["lora"], seed=2, batch_size=7, packing=True, max_length=12),
    ]
    losses, gradients = first_step(configs)
    for config in configs:
        train = config.train.model_copy(update={"packing": False})
        alone_losses, alone_gradients = first_step([config.model_copy(update={"train": train})])
        assert losses[config.name].loss == pytest.approx(alone_losses[config.name].loss, rel=1e-6)
        assert_same(gradients[config.name], alone_gradients[config.name], 1e-6)


def test_no_row_is_longer_than_its_job_allows():
    configs = [
        toy_config("short", batch_size=16, packing=True, max_length=10),
        toy_config("long", batch_size=16, packing=True, max_length=60),
    ]
    host, sets = toy_host(), (toy_set(16), toy_set(16, longest=40))
    jobs = [add_job(host, *pair) for pair in zip(configs, sets, strict=True)]
    parts = [job.micro_batch() for job in jobs]
    for part, rows, longest in zip(parts, lay_out(parts).rows, (10, 60), strict=True):
        lengths = [sum(len(part.examples[place].input_ids) for place in row) for row in rows]
        assert max(lengths) <= longest
