"""Two processes that train together, started once; what they found is judged here."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter, ParameterList

import loraloom
from benchmarks.kills import ADAPTERS, check_kills
from benchmarks.parallel import difference, resume_elsewhere, settings
from loraloom.distributed import ProcessRanks
from loraloom.training.rounds import RoundRunner
from loraloom.training.step.fused import sum_gradient
from tests.tiny import tiny_model
from tests.training.running import pressing, read_metrics
from tests.training.saved import save_inputs, write_run_file
from tests.training.toy import PAD_ID, add_job, read_result, toy_config, toy_host
from tests.training.world import hold_base, run_ranks

pytestmark = pytest.mark.slow

MODES = ("pairs", "plain", "accumulation", "packing")
"""Of a LoRA, a DoRA, a MixLoRA and a MixDoRA."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The results of runs on one rank and on two, and what two ranks say of each other."""
    directory = save_inputs(tmp_path_factory.mktemp("world"))
    for name, base in (("one", "replicated"), ("two", "replicated"), ("sharded", "fsdp")):
        run = settings(directory, directory / name, MODES, base)
        run["jobs"][2]["train"]["save_steps"] = 1
        write_run_file(directory / f"{name}.yaml", run)
    sizes = {"vocab_size": 300, "max_position_embeddings": 256}
    shutil.copytree(directory / "base", directory / "mixture")  # with the tokenizer
    # of a type that a host tries out when it is attached
    tiny_model("granitemoe", torch.float32, **sizes).save_pretrained(directory / "mixture")
    for name in ("experts-one", "experts-two", "experts-sharded"):
        base = "fsdp" if name == "experts-sharded" else "replicated"
        run = settings(directory, directory / name, MODES, base)
        run["base_model"] = str(directory / "mixture")
        for job in run["jobs"]:
            job["adapter"]["target_modules"] = ["attention", "experts"]
        write_run_file(directory / f"{name}.yaml", run)
    run = settings(directory, directory / "broken", MODES)
    write_run_file(directory / "broken.yaml", run)
    for name in ("half-one", "half-two"):
        run = settings(directory, directory / name, ["plain"] * len(ADAPTERS))
        run |= {"dtype": "float16", "jobs": [run["jobs"][0], run["jobs"][2]]}
        write_run_file(directory / f"{name}.yaml", run)
    loraloom.train(directory / "one.yaml")
    loraloom.train(directory / "experts-one.yaml")
    _overflow(1, directory / "half-one")
    assert run_ranks(2, _work, directory) == [0, 0]
    return directory


def _work(rank: int, directory: Path) -> None:
    (directory / f"rank-{rank}.json").write_text(json.dumps(_talk(rank, directory)))
    hold_base(rank, directory, str(directory / "base"), "fsdp")
    loraloom.train(directory / "two.yaml")
    loraloom.train(directory / "sharded.yaml", between_steps=lambda *_: None)
    loraloom.train(directory / "experts-two.yaml")
    loraloom.train(directory / "experts-sharded.yaml")
    _overflow(rank, directory / "half-two")
    with pytest.raises(KeyboardInterrupt):
        loraloom.train(directory / "broken.yaml", between_steps=pressing(4 if rank == 1 else 99))


def _overflow(rank: int, directory: Path) -> None:
    """Train in float16; the LoRA's second gradient overflows on the second rank alone."""
    scales = []

    def between_steps(engine, _builder):
        states = {name: job.state_dict() for name, job in engine.jobs.items()}
        scales.append({name: state["loss_scale"] for name, state in states.items()})
        if (rank, engine.round) == (1, 1):
            weight = next(iter(engine.jobs["lora"].learner.parameters.values()))
            hook = weight.register_hook(lambda gradient: hook.remove() or gradient * torch.inf)

    loraloom.train(directory.with_suffix(".yaml"), between_steps=between_steps)
    directory.with_name(f"{directory.name}-{rank}.json").write_text(json.dumps(scales))


def _talk(rank: int, directory: Path) -> dict[str, Any]:
    """Try out what ranks do together."""
    ranks = ProcessRanks("gloo")
    parameters = [Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, rank])
    parameters[1].grad = torch.ones(2) if rank == 1 else None
    for adapter in (ParameterList(parameters[:2]), ParameterList(parameters[2:])):
        sum_gradient(ranks, adapter)
    sums = [None if p.grad is None else p.grad.tolist() for p in parameters]
    ranks.keep_at_first(parameters)
    return {
        "gathered": [float(part["x"]) for part in ranks.gather({"x": torch.tensor(rank + 0.5)})],
        "any": [ranks.any(rank == 1), ranks.any(False)],
        "spread": list(ranks.spread([3, 4, 5], lambda item: [item, rank])),
        "sums": sums,
        "left": [p.grad is not None for p in parameters],
        "fault": _failure(ranks, ValueError("broken") if rank == 1 else None),
        "memory": _failure(ranks, torch.OutOfMemoryError("full") if rank == 0 else None),
        "backward": _fail_backward(rank, ranks),
        "detached": _attach_and_detach(directory),
        "both": _failure(ranks, (torch.OutOfMemoryError if rank == 0 else ValueError)("gone")),
    }


def _attach_and_detach(directory: Path) -> list[str]:
    """Name the attributes that a host leaves on a sharded model."""
    model, _ = loraloom.load_base_model(str(directory / "base"), sharded=True)
    before = set(vars(model))
    return sorted(set(vars(loraloom.attach(model).detach())) - before)


def _failure(ranks: ProcessRanks, error: Exception | None) -> str:
    try:
        with ranks.together():
            if error is not None:
                raise error
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def _fail_backward(rank: int, ranks: ProcessRanks) -> list[Any]:
    """Let a backward pass fail on the second rank, where it comes to the first layer."""
    host = toy_host()
    host.ranks = ranks
    job = add_job(host, toy_config("a"))
    weights = list(job.learner.parameters.values())
    if rank == 1:
        weights[0].register_hook(_fail)
    (outcome,) = RoundRunner(host, PAD_ID).run([job.micro_batch()])
    return [str(outcome), sum(weight.grad is not None for weight in weights)]


def _fail(_: torch.Tensor) -> None:
    raise ValueError("broken")


@pytest.fixture(scope="module")
def told(world) -> list[dict[str, Any]]:
    return [json.loads((world / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_ranks_hear_what_each_says(told):
    for own in told:
        assert own["gathered"] == [0.5, 1.5]
        assert own["any"] == [True, False]
        assert own["spread"] == [[3, 0], [4, 1], [5, 0]]
        assert own["sums"] == [[2.0, 1.0], [1.0, 1.0], None]
    assert [own["left"] for own in told] == [[True, True, False], [False] * 3]


def test_a_sharded_model_is_as_it_was_after_a_host_is_detached(told):
    assert [own["detached"] for own in told] == [[], []]


def test_the_parts_that_ranks_read_of_a_base_model_are_the_whole(world):
    held = [json.loads((world / f"{rank}.json").read_text())[0] for rank in range(2)]
    model, _ = loraloom.load_base_model(str(world / "base"), "bfloat16")
    whole = sum(weight.nbytes for weight in model.parameters())
    assert sum(held) == whole
    assert max(held) < 0.6 * whole


def test_what_fails_on_one_rank_fails_on_all(told):
    assert [own["fault"] for own in told] == [
        "RuntimeError: on rank 1: ValueError: broken",
        "ValueError: broken",
    ]
    assert [own["memory"] for own in told] == [
        "OutOfMemoryError: full",
        "OutOfMemoryError: memory ran out on another rank",
    ]
    assert [own["both"] for own in told] == [
        "RuntimeError: on rank 1: ValueError: gone",
        "ValueError: gone",
    ]


def test_a_backward_pass_that_fails_on_one_rank_leaves_no_gradients_on_any(told):
    reasons, left = zip(*(own["backward"] for own in told), strict=True)
    assert left == (0, 0)
    assert "raised RuntimeError: on rank 1: ValueError: broken" in reasons[0]
    assert "raised ValueError: broken" in reasons[1]


@pytest.mark.parametrize("run", ["two", "sharded", "experts-two", "experts-sharded"])
@pytest.mark.parametrize("job", ADAPTERS)
def test_two_ranks_give_the_weights_of_one(world, run, job):
    alone = "experts-one" if run.startswith("experts") else "one"
    assert difference(world / run / job, world / alone / job).is_rounding


@pytest.mark.parametrize("run", ["two", "sharded"])
def test_one_rank_writes_metrics_over_all_rows(world, run):
    for job in ADAPTERS:
        expected, actual = read_metrics(world / "one" / job), read_metrics(world / run / job)
        ignored = {"seconds": 0, "computed_tokens": 0}
        for line, other in zip(actual, expected, strict=True):
            assert line | ignored == pytest.approx(other | ignored, rel=1e-4, abs=1e-7)
    assert read_result(world / run / "lora").environment["ranks"] == 2


def test_an_overflow_on_one_rank_skips_the_jobs_step_on_all(world):
    told = [json.loads((world / f"half-two-{rank}.json").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    *_, before, ended = told[0]
    assert before["lora"] == {"scale": 2.0**15, "sound_steps": 1, "skipped_steps": 1}
    assert before["mixlora"] == {"scale": 2.0**16, "sound_steps": 3, "skipped_steps": 0}
    assert ended == {}
    for job in ("lora", "mixlora"):
        assert difference(world / "half-two" / job, world / "half-one" / job).whole < 0.01


def test_a_run_whose_second_rank_was_interrupted_goes_on_with_one(world, tmp_path):
    directory = tmp_path / "broken"
    shutil.copytree(world / "broken", directory)
    run = settings(world, directory, MODES)
    loraloom.train(write_run_file(tmp_path / "run.yaml", run), resume=True)
    for job in ADAPTERS:
        assert difference(directory / job, world / "one" / job).is_rounding


def test_a_rank_that_is_killed_ends_all_and_the_run_goes_on_with_any_number(tmp_path):
    for differences in resume_elsewhere(save_inputs(tmp_path), [1, 3]).values():
        assert all(one.is_rounding for one in differences)


def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    outcome = check_kills(tmp_path, kills=3, steps=14)
    assert outcome.kills > 0  # a fast process may end before the last kill
    assert outcome.differences == []
