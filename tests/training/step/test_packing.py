import pytest

from tests.training.step.test_fused import CUT, OBJECTIVES, assert_same, run_window
from tests.training.toy import ADAPTERS, add_job, gradients_of, toy_config, toy_host


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
