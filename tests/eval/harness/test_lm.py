"""Answers of HostLM: those of lm-eval's own class for transformers models."""

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, ConfigError, DataError
from loraloom.eval.harness import HostLM, load_tasks
from loraloom.eval.harness.lm import Answers
from tests.eval.harness.toy import TASKS, instances
from tests.eval.scoring import scoring_host
from tests.tiny import METHODS

PAIRS = [
    ("Question: What color is the sky?\nAnswer:", " blue"),
    ("Question: What color is the sky?\nAnswer:", " a deep green"),
    ("Question: What color is the sky?\nAnswer: ", "yes"),
    ("The sky is", " blue"),
    ("The sky is", " blue"),
    ("The sk", "y is blue"),
    ("", "The sky"),
    ("", "The sky is blue"),
]
TEXTS = ["The sky is blue.", "yes", "Please choose the correct answer to the question. " * 20, ""]
UNTIL = {"until": ["e", "\n\n"], "max_gen_toks": 12}


def shared_lms(host, tokenizer, adapters):
    """A model of each adapter, as `evaluate_adapters` makes them."""
    answers = Answers(host, tokenizer, adapters)
    return {name: HostLM(host, tokenizer, name, answers=answers) for name in adapters}


def log_likelihoods(lm, pairs=PAIRS):
    return lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)


def rolling(lm, texts=TEXTS):
    return lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in texts]))


def completions(lm, prompts=("The sky", "Question: yes or no? Answer:", "one"), settings=UNTIL):
    asked = [(prompt, dict(settings)) for prompt in prompts]
    return lm.generate_until(instances("generate_until", asked), disable_tqdm=True)


def hf_lm(host, tokenizer, logits_cache=False):
    """lm-eval's own class on the base model.

    Its cache is wrong for a text that is cut at two places, as one of PAIRS is: for the shorter
    continuation it takes the first of the longer one's logits.
    """
    return HFLM(pretrained=host.model, tokenizer=tokenizer, batch_size=3, logits_cache=logits_cache)


def assert_same_scores(ours, theirs, tolerance=1e-4):
    for (value, greedy), (other, other_greedy) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(other, abs=tolerance)
        assert greedy == other_greedy


def test_everything_is_as_in_lm_evals_own_class(host, tiny_tokenizer):
    theirs = hf_lm(host, tiny_tokenizer)
    ours = HostLM(host, tiny_tokenizer)
    assert_same_scores(log_likelihoods(ours), log_likelihoods(theirs))
    assert rolling(ours) == pytest.approx(rolling(theirs), abs=1e-3)
    assert completions(ours) == completions(theirs)


@pytest.mark.parametrize(
    ("name", "num_fewshot"), [(name, 2 if name == "toy_choice" else 0) for name in TASKS]
)
def test_results_of_tasks_are_those_of_lm_eval(host, tiny_tokenizer, toy_tasks, name, num_fewshot):
    how = {"task_manager": TaskManager(include_defaults=False), "bootstrap_iters": 0}
    how["num_fewshot"] = num_fewshot or None
    theirs, ours = (
        lm_eval.simple_evaluate(model=lm, tasks=load_tasks([name], toy_tasks), **how)
        for lm in (hf_lm(host, tiny_tokenizer, logits_cache=True), HostLM(host, tiny_tokenizer))
    )
    numbers = {k: v for k, v in theirs["results"][name].items() if isinstance(v, float | int)}
    for key, value in numbers.items():
        assert ours["results"][name][key] == pytest.approx(value, rel=1e-3)
    for one, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        assert one["arguments"] == other["arguments"]
        if TASKS[name]["output_type"] == "multiple_choice":
            assert_same_scores(one["filtered_resps"], other["filtered_resps"])
            assert one["acc"] == other["acc"]
        if TASKS[name]["output_type"] == "generate_until":
            assert one["filtered_resps"] == other["filtered_resps"]


def test_several_adapters_in_one_pass_are_as_one_at_a_time(tiny_tokenizer):
    host = scoring_host()
    names = [None, *METHODS]
    together = shared_lms(host, tiny_tokenizer, names)
    for name in names:
        alone = HostLM(host, tiny_tokenizer, name)
        assert_same_scores(log_likelihoods(together[name]), log_likelihoods(alone), 1e-8)
        assert rolling(together[name]) == pytest.approx(rolling(alone), abs=1e-6)
        assert completions(together[name]) == completions(alone)
    values = {name: log_likelihoods(lm)[0][0] for name, lm in together.items()}
    assert len(set(values.values())) == len(names)


def test_draws_of_an_adapter_do_not_depend_on_the_others(host, tiny_tokenizer):
    drawn = {**UNTIL, "do_sample": True, "temperature": 1.0}
    together = shared_lms(host, tiny_tokenizer, [None, "lora", "mixlora"])
    alone = completions(HostLM(host, tiny_tokenizer, "lora"), settings=drawn)
    assert completions(together["lora"], settings=drawn) == alone
    assert len(set(completions(together[None], ["one"] * 4, drawn))) > 1


def test_chat_templates_are_as_in_lm_evals_own_class(host, tiny_tokenizer):
    user = {"role": "user", "content": "one"}
    with pytest.raises(ConfigError, match="apply_chat_template needs a tokenizer with a chat"):
        HostLM(host, tiny_tokenizer).apply_chat_template([user])
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<bos>{{ m.role }}: {{ m.content }}<bos>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    ours, theirs = HostLM(host, tiny_tokenizer), hf_lm(host, tiny_tokenizer)
    messages = [{"role": "system", "content": "be"}, user]
    for with_prompt in (True, False):
        text = ours.apply_chat_template(messages, add_generation_prompt=with_prompt)
        assert text == theirs.apply_chat_template(messages, add_generation_prompt=with_prompt)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours._completion("one", UNTIL, 0)[1].stop == ("e", "\n\n", "<bos>")  # of a turn


def test_an_adapter_is_asked_as_its_training_data_asked(host, tiny_tokenizer, monkeypatch):
    form = PromptForm(format="instruction", template="plain")
    monkeypatch.setattr(host.adapters["lora"], "prompt", form)
    lm = HostLM(host, tiny_tokenizer, "lora")
    assert lm.apply_chat_template([{"role": "user", "content": "one"}]) == "one\n"


def test_a_template_in_an_adapters_files_is_no_file_of_this_machine(
    host, tiny_tokenizer, monkeypatch, tmp_path
):
    (tmp_path / "template").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<bos>\n{% endfor %}"
    )
    form = PromptForm(format="chat", chat_template=str(tmp_path / "template"))
    monkeypatch.setattr(host.adapters["lora"], "prompt", form)
    lm = HostLM(host, tiny_tokenizer, "lora")
    text = lm.apply_chat_template([{"role": "user", "content": "one"}])
    assert (text, lm._ends) == (form.chat_template, ())


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda h, t: HostLM(h, t, "nobody"), AdapterError, "got 'nobody'"),
        (
            lambda h, t: log_likelihoods(HostLM(h, t), [("a", "yes " * 300)]),
            DataError,
            "1 to 256 tok",
        ),
        (lambda h, t: completions(HostLM(h, t), settings={"max_gen_toks": 256}), DataError, "room"),
    ],
)
def test_what_can_not_be_is_an_error(host, tiny_tokenizer, ask, error, message):
    with pytest.raises(error, match=message):
        log_likelihoods(ask(host, tiny_tokenizer))
