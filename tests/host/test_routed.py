import pytest
import torch
from peft import ArrowConfig, create_arrow_model
from pydantic import ValidationError
from tokenizers.processors import TemplateProcessing
from torch.autograd import gradcheck

import loraloom
from loraloom import LoraConfig, Prompt, PromptForm, RoutedConfig, SamplingConfig, fit_router
from loraloom.adapters.routed.method import Expert
from loraloom.adapters.segment import SegmentTokens
from loraloom.data.tokens import Example
from loraloom.errors import AdapterError, DataError, FormatError
from loraloom.generation.generate import generate
from loraloom.generation.prompts import encode_for_choice
from loraloom.generation.router import prompt_ids
from loraloom.generation.scoring import label_log_probs
from loraloom.host import host as host_module
from loraloom.host.choice import prompt_states
from tests.conftest import build_tokenizer
from tests.generation.saved import write_rows
from tests.tiny import (
    ALL_METHODS,
    METHODS,
    changed,
    padded_mask,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

LORAS = {"law": LoraConfig(rank=3, alpha=6), "math": LoraConfig(rank=3, alpha=3)}
RANKS = LORAS | {"chem": LoraConfig(rank=5, alpha=20, rank_stabilized=True)}
NAMES = dict(zip(RANKS, RANKS, strict=True))


def routed(configs=RANKS, router="token", dtype=torch.float64, **settings):
    host = tiny_host("llama", configs, dtype)
    experts = {name: name for name in configs}
    host.add("auto", RoutedConfig(experts=experts, router=router, **settings), seed=3)
    return host


def fitted(configs=RANKS, dtype=torch.float64, **settings):
    """A router that tells prompts by their first token."""
    host = routed(configs, "prompt", dtype, **settings)
    prompts = {name: prompts_of(number) for number, name in enumerate(configs)}
    return host, fit_router(host, build_tokenizer(), "auto", prompts)


def prompts_of(number, count=12):
    return [[10 + number, *row.tolist()] for row in tiny_ids(count, 4, seed=number) % 7 + 20]


def test_arrow_is_pefts(tmp_path):
    host = tiny_host("llama", LORAS | {"chem": LORAS["law"]}, torch.float32)
    for name in NAMES:
        for one in host.adapters[name].projections():
            one.lora_A.data[0, 0] *= 9  # PEFT's power iteration needs a direction that stands out
        host.save(name, tmp_path / name)
    host.add("auto", RoutedConfig(experts=NAMES, router="arrow", top_k=2, temperature=0.7))
    config = ArrowConfig(top_k=2, router_temperature=0.7)
    paths = [str(tmp_path / name) for name in NAMES]
    model = create_arrow_model(tiny_model(dtype=torch.float32), paths, config).eval()
    ids = tiny_ids(2)
    with torch.no_grad():
        out = host(ids, adapters=["auto"] * 2)
        assert relative_error(out.logits, model(ids).logits) < 1e-5
    assert len(out.routing["auto"]) == 2 * 7


@pytest.mark.parametrize("experts", [RANKS, {"a": ALL_METHODS["moslora"], "b": LORAS["law"]}])
def test_a_router_of_tokens_weighs_what_experts_add(experts):
    host, x = routed(experts, top_k=2, temperature=0.5), torch.randn(5, 32).double()
    for one in host.adapters["auto"].projections():
        if one.name not in ("q_proj", "up_proj"):
            continue
        z = one.between(x @ one.compute_A(x.dtype).T, x, SegmentTokens(0)) @ one.compute_B(x.dtype)
        for row, added in zip(x, z, strict=True):
            logits = one.router @ row / 0.5
            chosen = logits.topk(2).indices
            weights = logits[chosen].softmax(0)
            expected = torch.zeros_like(added)
            for weight, number in zip(weights, chosen.tolist(), strict=True):
                name = list(experts)[number]
                alone = next(p for p in host.adapters[name].projections() if p.key == one.key)
                alone_z = alone.between(
                    row[None] @ alone.compute_A(x.dtype).T, row[None], SegmentTokens(0)
                )
                expected += weight * (alone_z @ alone.compute_B(x.dtype))[0]
            torch.testing.assert_close(added, expected)
        A, B = one.compute_A(x.dtype).detach(), one.compute_B(x.dtype).detach()

        def added_by(router, one=one, A=A, B=B):
            one._parameters.pop("router", None)
            one.__dict__["router"] = router
            return one.between(x @ A.T, x, SegmentTokens(0)) @ B

        assert gradcheck(added_by, one.router.detach().clone().requires_grad_())


def test_only_routers_learn_in_the_same_steps_as_others():
    host, ids = routed(), tiny_ids(2)
    before = {name: t.clone() for name, t in host.adapters["auto"].tensors().items()}
    host(ids, adapters=["auto", "law"], training=True).logits.square().mean().backward()
    trained = {n for n, p in host.adapters["auto"].named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 7
    assert all(name.endswith("router") for name in trained)
    assert {name for name in before if not name.startswith("experts.")} == {
        f"{one.key}.experts.{e}.router"
        for one in host.adapters["auto"].projections()
        for e in range(3)
    }
    for router, name in (("prompt", "auto"), ("arrow", "auto"), ("token", "auto/law")):
        with pytest.raises(AdapterError, match=f"'{name}' is not trained"):
            routed(router=router)(ids, adapters=[name] * 2, training=True)


@pytest.mark.parametrize("layers", [0, 1])
def test_a_prompt_gets_the_expert_that_its_router_chooses(layers):
    mixed = RANKS | {"mix": METHODS["mixlora"], "dora": METHODS["dora"]}
    host, fit = fitted(mixed, num_layers_read=layers)
    assert fit.accuracy == 1
    assert fit.chosen["law"] == {"law": 2}
    prompts = [prompts_of(number)[0] for number in (4, 0, 3)]
    choices = host.choose(prompts, ["auto", ("auto", 0.5), None])
    assert [one.adapter for one in choices] == ["auto/dora", ("auto/law", 0.5), None]
    assert max(choices[0].probabilities, key=choices[0].probabilities.get) == "dora"
    # the formula, from the base model's states
    head = host.adapters["auto"].prompt_router
    with torch.no_grad():
        states = host.model(torch.tensor([prompts[0]]), output_hidden_states=True).hidden_states
        scores = states[layers][0] @ head.router.T + head.offsets
        expected = (10 * scores.exp().mean(0).log()).softmax(0)
        actual = torch.tensor(list(choices[0].probabilities.values())).double()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
        # in one batch, padded, decoded on
        ids = torch.tensor([[*prompts[0], 0, 0], [*prompts[1], 30, 31]])
        out = host(ids, padded_mask([5, 7]), adapters=["auto", "auto"])
        torch.testing.assert_close(out.logits[:1, :5], host(ids[:1, :5], adapters=["dora"]).logits)
        both = torch.tensor(prompts[:2])
        session = host.prefill(both, None, ["auto", "auto"])
        host.decode(session, torch.tensor([30, 31]))
        plain = host.prefill(both, None, ["dora", "law"])
        host.decode(plain, torch.tensor([30, 31]))
        torch.testing.assert_close(session.logits, plain.logits)
        generated = host.generate(
            both, adapters=["auto", "auto"], max_new_tokens=3, do_sample=False
        )
        named = host.generate(both, adapters=["dora", "law"], max_new_tokens=3, do_sample=False)
        assert generated.tolist() == named.tolist()
        # what is scored is no part of the prompt
        rows = torch.cat([both, torch.full((2, 9), 11)], 1)
        asked = host.as_model("auto")(rows, labels=rows.where(rows == 11, -100))
        assert host.choose(rows.tolist(), ["auto"] * 2)[0].adapter == "auto/math"
        torch.testing.assert_close(asked.logits, host(rows, adapters=["dora", "law"]).logits)
        cache = host(both, adapters=["auto", "auto"], use_cache=True).past_key_values
        with pytest.raises(AdapterError, match="without a cache"):
            host(both[:, :1], adapters=["auto", "auto"], cache=cache)


def test_generate_chooses_by_the_tokens_that_transformers_reads(monkeypatch):
    host, _ = fitted()
    ids = torch.tensor([[0, 0, *prompts_of(1)[0]], [10, 0, *prompts_of(2)[0]]])
    read = []
    choose = host_module.choose
    monkeypatch.setattr(
        host_module, "choose", lambda host, *rows: read.append(rows[0]) or choose(host, *rows)
    )
    host.generate(ids, adapters=["auto"] * 2, max_new_tokens=2, do_sample=False, num_beams=2)
    prompts = [prompts_of(1)[0], [10, *prompts_of(2)[0]]]
    assert read == [[prompts[0], prompts[0], prompts[1], prompts[1]]]


def test_a_layer_may_have_no_projections(tmp_path):
    attention = {name: changed(lora, target_modules="attention") for name, lora in LORAS.items()}
    host = tiny_host("qwen3_next", attention, torch.float32)
    assert not [p for p in host.adapter("law").projections() if p.key.startswith("layers.0.")]
    host.add("auto", RoutedConfig(experts={"law": "law", "math": "math"}))
    host.save("auto", tmp_path / "auto")
    host.load("again", tmp_path / "auto")


def test_a_single_expert_needs_no_fit():
    host = routed({"law": LORAS["law"]}, "prompt")
    assert host.choose([[5]], ["auto"])[0].adapter == "auto/law"
    assert host.choose([[5]], [[["law", 0.7]]])[0].adapter == "law:0.7"


@pytest.mark.parametrize("family", ["gemma", "gemma3", "mistral3", "mixtral", "lfm2"])
def test_states_of_prompts_are_the_base_models(family):
    host, ids = tiny_host(family, {}, torch.float32), tiny_ids(2, 5)
    with torch.no_grad():
        expected = host.model(input_ids=ids, output_hidden_states=True).hidden_states
    for layers in (0, 1):
        ((places, states, owners),) = prompt_states(host, ids.tolist(), layers)
        torch.testing.assert_close(states.view(2, 5, -1), expected[layers][places])
        assert owners.tolist() == [0] * 5 + [1] * 5


def test_several_experts_of_a_prompt_are_a_sum():
    host, _ = fitted(top_k=3, temperature=1e5)
    ids = torch.tensor([prompts_of(1)[0]])
    (choice,) = host.choose(ids.tolist(), ["auto"])
    assert choice.adapter.startswith("auto/math:0.34+")  # all weigh 1
    with torch.no_grad():
        out = host(ids, adapters=["auto"])
        named = host(ids, adapters=[choice.adapter.replace("auto/", "")])
    torch.testing.assert_close(out.logits, named.logits)


@pytest.mark.parametrize("router", ["prompt", "arrow", "token"])
def test_files_hold_all_of_it(tmp_path, router):
    host = fitted()[0] if router == "prompt" else routed(router=router)
    host.adapters["law"].prompt = PromptForm(format="text")
    ids = torch.tensor([prompts_of(2)[0]])
    host.save("auto", tmp_path / "auto")
    host.save("auto/chem", tmp_path / "chem")
    other = tiny_host("llama", {})
    other.load("auto", tmp_path / "auto")
    other.load("chem", tmp_path / "chem")
    with torch.no_grad():
        expected = host(ids, adapters=["auto"]).logits
        assert torch.equal(other(ids, adapters=["auto"]).logits, expected)
        chem = host(ids, adapters=["chem"]).logits
        assert torch.equal(other(ids, adapters=["chem"]).logits, chem)
    assert other.adapters["auto"].tensors().keys() == host.adapters["auto"].tensors().keys()
    # of files, as well as of adapters on the host
    other.add(
        "two", RoutedConfig(experts={"a": str(tmp_path / "chem"), "b": "chem"}, router="arrow")
    )
    with torch.no_grad():
        torch.testing.assert_close(other(ids, adapters=["two"]).logits, chem)


def test_a_further_expert_leaves_the_others_bit_by_bit():
    host, _ = fitted(LORAS)
    host.add("chem", RANKS["chem"])
    before = {name: t.clone() for name, t in host.adapters["auto"].tensors().items()}
    host.add_experts("auto", {"chem": "chem"}, name="auto3")
    prompts = {name: prompts_of(number) for number, name in enumerate(NAMES)}
    with pytest.raises(AdapterError, match="must be fitted first to all"):
        host.choose([prompts["law"][0]], ["auto3"])
    with pytest.raises(DataError, match=r"\(chem\), got law"):
        fit_router(host, build_tokenizer(), "auto3", prompts, only=["law"])
    fit = fit_router(host, build_tokenizer(), "auto3", prompts, only=["chem"])
    with pytest.raises(DataError, match=r"\(none\), got none"):
        fit_router(host, build_tokenizer(), "auto3", prompts, only=[])
    after = host.adapters["auto3"].tensors()
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert len(after) > len(before)
    assert fit.accuracy == 1
    assert fit.accuracies == dict.fromkeys(NAMES, 1.0)
    assert fit.before.accuracies == dict.fromkeys(LORAS, 1.0)  # of the experts that it had
    with pytest.raises(AdapterError, match="expert 'chem' exists already"):
        host.add_experts("auto3", {"chem": "chem"}, name="auto4")
    chosen = host.choose([of[0] for of in prompts.values()], ["auto3"] * 3)
    assert [one.adapter for one in chosen] == [f"auto3/{name}" for name in NAMES]


def test_a_further_experts_fit_counts_the_prompts_that_it_takes_from_the_others():
    host, fit = fitted(LORAS)
    assert fit.before is None
    host.add("chem", RANKS["chem"])
    host.add_experts("auto", {"chem": "chem"}, name="auto3")
    # half of the law's prompts have the new expert's word too
    law = [[10, *[12] * 4 * (row % 2), *prompt[1:]] for row, prompt in enumerate(prompts_of(0, 30))]
    prompts = {"law": law, "math": prompts_of(1), "chem": prompts_of(2, 90)}
    fit = fit_router(host, build_tokenizer(), "auto3", prompts, only=["chem"])
    assert fit.before.accuracies == {"law": 1, "math": 1}
    assert fit.accuracies == {"law": 1, "math": 0, "chem": 1}
    assert fit.chosen["math"] == {"chem": 2}
    assert fit.accuracy == 24 / 26


@pytest.mark.parametrize("router", ["token", "arrow"])
def test_a_further_expert_leaves_the_others_weights_and_their_number(router):
    host = routed(LORAS, router)
    host.add("chem", RANKS["chem"])
    host.add_experts("auto", {"chem": "chem"}, name="three")
    assert host.adapters["three"].config.top_k == 2  # as many as before
    before, after = (host.adapters[name].tensors() for name in ("auto", "three"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_new_expert_of_a_router_by_token_trains_its_row_alone():
    host = routed(LORAS, dtype=torch.float32)
    host.add("chem", RANKS["chem"])
    job = host.add_experts("auto", {"chem": "chem"}, name="three")
    before = {name: tensor.clone() for name, tensor in job.tensors().items()}
    optimizer = loraloom.OptimizerConfig(lr_ratios={r"experts\.[01]\.router": 0})
    client = loraloom.TrainingClient(host, build_tokenizer(), "three", optimizer=optimizer)
    ids = tuple(tiny_ids(1)[0].tolist())
    client.forward_backward([Example(ids, ids)])
    client.optim_step()
    client.close()
    learnt = {name for name, tensor in job.tensors().items() if not tensor.equal(before[name])}
    assert learnt
    assert all(name.endswith("experts.2.router") for name in learnt)


def test_new_experts_begin_apart():
    fresh = {name: Expert(adapter=LORAS["law"]) for name in ("a", "b")}
    host = routed(LORAS)
    host.add("new", RoutedConfig(experts=fresh, router="token", train_experts=True))
    a, b = (host.adapter(f"new/{name}").tensors() for name in fresh)
    assert not any(torch.equal(a[name], b[name]) for name in a if name.endswith("lora_A"))


def test_a_router_that_has_diverged_says_so():
    host, _ = fitted(num_layers_read=1)
    host.adapters["auto"].prompt_router.router.data[0] = torch.nan
    with pytest.raises(AdapterError, match="logits of its router must be finite"):
        host.choose([prompts_of(0)[0]], ["auto"])


def test_experts_go_with_their_adapter():
    host, _ = fitted()
    with torch.no_grad():
        host(tiny_ids(1), adapters=["auto/law+auto/math"])
    with pytest.raises(AdapterError, match="part of another adapter"):
        host.remove("auto/law")
    host.remove("auto")
    with pytest.raises(AdapterError, match="got 'auto/law'"):
        host(tiny_ids(1), adapters=["auto/law"])
    assert not host._registry._sums


QUESTION = {"role": "user", "content": "who is it?"}
LATER = [{"role": "assistant", "content": "x " * 600}, {"role": "user", "content": "and?"}]
SYSTEM, EMPTY = {"role": "system", "content": "one two"}, {"content": ""}
TOOL = {"type": "function", "function": {"name": "look"}}
ASKED = {  # in rows of a format, and of a router
    "instruction": (
        {"instruction": "is it", "input": "the sky", "output": "yes"},
        {"content": "is it", "fields": {"input": "the sky"}},
    ),
    "chat": ({"messages": [SYSTEM, QUESTION, *LATER]}, {"content": (SYSTEM, QUESTION)}),
    "text": ({"text": "the court"}, {"content": "the court"}),
    "preference": ({"prompt": "is it", "chosen": "yes", "rejected": "no"}, {"content": "is it"}),
    "preference of turns": (
        {"chosen": [QUESTION, *LATER, LATER[0]], "rejected": [QUESTION, *LATER, QUESTION]},
        {"content": (QUESTION, *LATER)},
    ),
    "preference after turns": (
        {"prompt": [QUESTION], "chosen": None, "rejected": LATER[:1]},
        {"content": (QUESTION,)},
    ),
    "preference of equals": (
        {"chosen": [QUESTION, LATER[0]], "rejected": [QUESTION, LATER[0]]},
        {"content": (QUESTION,)},
    ),
    "instruction alone": (
        {"instruction": "is it", "input": "the sky"},
        {"content": "is it", "fields": {"input": "the sky"}},
    ),
    "chat with tools": (
        {"messages": [QUESTION], "system": "one two", "tools": [TOOL]},
        {"content": (SYSTEM, QUESTION), "tools": [TOOL]},
    ),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("forms", [("task", "chat"), ("chat", "chat"), (None, None)])
def test_a_source_is_read_as_prompts_are_when_the_router_chooses(
    tiny_tokenizer, tmp_path, asked, forms
):
    bos = (tiny_tokenizer.bos_token, tiny_tokenizer.bos_token_id)
    process = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tiny_tokenizer.backend_tokenizer.post_processor = process
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tiny_tokenizer.chat_template = "{{ tools }}" + turns
    host = tiny_host("llama", LORAS, torch.float32, vocab_size=300)
    for name, form in zip(LORAS, forms, strict=True):
        host.adapters[name].prompt = form and PromptForm(format=form)
    host.add("auto", RoutedConfig(experts={"law": "law", "math": "math"}))
    (row, expected), empty = ASKED[asked], {"text": None, "messages": [QUESTION, LATER[0] | EMPTY]}
    rows = [row, row | {key: empty[key] for key in row.keys() & empty}, row]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    source = {"dataset": path, "format": asked.split()[0]}
    prompt = encode_for_choice(host, tiny_tokenizer, Prompt(adapter="auto", **expected))
    num_rows = 3 - any(key in row for key in empty)  # as in training
    assert prompt_ids(host, tiny_tokenizer, source, "auto", None) == [prompt] * num_rows
    if asked == "chat" and forms[0] != forms[1]:  # an expert's own system message comes later
        host.adapter("auto/math").prompt = PromptForm(format="chat", system=SYSTEM["content"])
        prompt = encode_for_choice(host, tiny_tokenizer, Prompt((QUESTION,), "auto"))
        assert prompt_ids(host, tiny_tokenizer, source, "auto", 1) == [prompt]


def test_prompts_are_judged_as_plain_texts_and_answered_in_the_chosen_form(
    tiny_tokenizer, tmp_path
):
    sizes = {"vocab_size": 300, "max_position_embeddings": 128}
    host = tiny_host("llama", LORAS, torch.float32, **sizes)
    host.adapters["law"].prompt = PromptForm(format="text")
    host.adapters["math"].prompt = PromptForm(format="instruction", template="plain")
    host.add("auto", RoutedConfig(experts={"law": "law", "math": "math"}))
    texts = {"law": ["the court", "a court is"], "math": ["one two", "two one one"]}
    # instructions in the form of one of them don't tell it
    rows = [{"instruction": text, "output": "x"} for text in texts["math"] * 4]
    math = {"dataset": write_rows(tmp_path / "math.jsonl", *rows), "format": "instruction"}
    fit_router(host, tiny_tokenizer, "auto", {"law": texts["law"] * 4, "math": math})
    prompts = ["the court is", ({"role": "user", "content": "two one"},)]
    answers = []
    for names in (("auto", "auto"), ("law", "math")):
        asked = [Prompt(one, of) for one, of in zip(prompts, names, strict=True)]
        answers.append(generate(host, tiny_tokenizer, asked, SamplingConfig(max_new_tokens=6)))
    assert answers[0] == answers[1]
    ids = encode_for_choice(host, tiny_tokenizer, Prompt("the", "auto", fields={"input": "court"}))
    assert ids == encode_for_choice(host, tiny_tokenizer, Prompt("the\ncourt", "auto"))
    text = Example((5, 6, 7), (5, 6, 7))  # a text has no prompt: all of it is read
    names = ("auto", host.choose([text.input_ids], ["auto"])[0].adapter)
    assert torch.equal(*(label_log_probs(host, [(name, text)])[0] for name in names))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": {}}, "at least 1 item"),
        ({"experts": {"a/b": "x"}}, "safe file name"),
        ({"experts": NAMES, "top_k": 4}, r"top_k must be in \[1, 3 experts\], got 4"),
        ({"experts": NAMES, "rank": 8}, "rank is a setting of the experts, got 8"),
        ({"experts": NAMES, "target_modules": "ffn"}, "target_modules are those of the experts"),
        ({"experts": NAMES, "train_experts": True}, "train_experts must be false"),
        ({"experts": NAMES, "num_layers_read": 1, "router": "arrow"}, "requires router: prompt"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        RoutedConfig(**settings)


@pytest.mark.parametrize(
    ("names", "router", "message"),
    [
        (["dora", "law"], "arrow", "got weight_decomposition; router: prompt accepts others"),
        (["part", "law"], "token", "got some not on layers.0.mlp.gate_proj"),
        (["mixlora", "law"], "token", "supports adapters without routers"),
        (["whole", "law"], "prompt", "expert 'whole' must be without modules_to_save"),
    ],
)
def test_experts_that_cant_be_routed_are_refused(names, router, message):
    whole = changed(LORAS["law"], modules_to_save=["lm_head"])
    part = changed(LORAS["law"], target_modules="attention")
    host = tiny_host("llama", RANKS | METHODS | {"whole": whole, "part": part})
    with pytest.raises(AdapterError, match=message):
        host.add("auto", RoutedConfig(experts={name: name for name in names}, router=router))


def route_to(name):
    return lambda host: host.add("two", RoutedConfig(experts={"a": name}))


def fit_to(prompts, name="auto"):
    return lambda host: fit_router(host, build_tokenizer(), name, prompts)


def ask(name, *mask):
    return lambda host: host(tiny_ids(1, 1), *mask, adapters=[name])


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (route_to("auto"), AdapterError, "expert a must not be routed itself"),
        (route_to("law/final"), FormatError, "law/final"),  # no part of one that has none
        (route_to("auto/x"), AdapterError, r"one of its experts \(law, math, chem\)"),
        (ask("auto/x"), AdapterError, r"one of its experts \(law, math, chem\)"),
        (ask("law/x"), AdapterError, r"one of its experts \(none\)"),
        (ask("auto", torch.ones(1, 3)), AdapterError, "in one forward, without a cache"),
        (lambda host: host.choose([[5]], ["auto"]), AdapterError, "must be fitted first"),
        (lambda host: host.choose([[97]], ["auto"]), DataError, "tokens from 0 to 96"),
        (lambda host: host.add("b", host.adapters["auto"].config), AdapterError, "settings alone"),
        (fit_to({"law": "arc_easy"}), DataError, "got the text 'arc_easy'"),
        (fit_to({}, "law"), AdapterError, "requires router: prompt"),
        (fit_to({}), DataError, r"two or more for each expert .*, got 0 for law"),
    ],
)
def test_what_cant_be_done_with_a_router_says_why(use, error, message):
    host = tiny_host("llama", RANKS)
    host.add("auto", RoutedConfig(experts=NAMES))
    with pytest.raises(error, match=message):
        use(host)
