"""The page at `/`, and what it asks the API for."""

from contextlib import ExitStack

import httpx2
import pytest

from loraloom.serve.http.app import ApiOptions
from loraloom.serve.http.guards import PAGES
from tests.serve.http.in_process import BASE, serving
from tests.serve.http.test_openai import chat


@pytest.fixture(scope="module")
def locked(host, tokenizer):
    """A server that wants a key."""
    with serving(host, tokenizer, options=ApiOptions(api_keys=["secret"])) as (address, _):
        yield address


@pytest.fixture
def visit(browser):
    """Open a page; what the browser complains of is an error."""
    from tests.report.browser import opened

    with ExitStack() as stack:
        yield lambda address: stack.enter_context(opened(browser, address, expected=("400", "401")))


def choose(page, *models):
    page.locator("#models input").first.wait_for()
    for box in page.locator("#models input").all():
        box.set_checked(box.get_attribute("value") in models)


def answered(page, prompt):
    """Ask, and wait for all answers."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.keyboard.press("Control+Enter")
    page.locator("#answers article").first.wait_for()
    page.locator("#stop:disabled").wait_for()
    return page.locator("#answers article")


def test_models_answer_side_by_side_with_coloured_tokens(served, visit, client):
    page = visit(served[0])
    choose(page, BASE, "lora", "mixlora")
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("6")
    answers = answered(page, "one")
    assert answers.locator("h2").all_inner_texts() == [BASE, "lora", "mixlora"]
    texts = [one.text_content() for one in answers.locator(".text").all()]
    messages = [{"role": "user", "content": "one"}]
    expected = [chat(client, name, messages=messages, max_tokens=6) for name in (BASE, "lora")]
    assert texts[:2] == [answer.choices[0].message.content for answer in expected]

    routed = chat(client, "mixlora", messages=messages, max_tokens=6, extra_body={"routing": True})
    (choice,) = routed.choices
    spans = answers.nth(2).locator(".text span")
    answers.nth(2).locator("select").select_option("layer 1")
    first = [entry["routers"][1]["experts"][0] for entry in choice.routing]
    assert [span.get_attribute("class") for span in spans.all()] == [f"x{one}" for one in first]
    assert answers.nth(2).locator("svg rect.load").count() == 2 * 4
    assert [one.locator(".routing").is_visible() for one in answers.all()] == [False, False, True]

    spans.first.focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip").inner_text()
    assert all(f"{weight:.3f}" in tip for weight in choice.routing[1]["routers"][1]["weights"])


def test_a_server_with_keys_is_asked_with_one(locked, visit):
    page = visit(locked)
    page.get_by_text("This server requires an API key.").wait_for()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Tab")
    page.get_by_label("mixlora", exact=True).wait_for()
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("2")
    assert answered(page, "one").locator(".facts.alarm").count() == 0


def test_the_page_alone_needs_no_key(locked):
    for path in PAGES:
        response = httpx2.get(locked + path)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    for path in ("/v1/models", "/playground.html", "/metrics"):
        assert httpx2.get(locked + path).status_code == 401


def test_streams_tell_what_whole_answers_do(client):
    asked = {"extra_body": {"routing": True}}
    (whole,) = chat(client, "mixlora", **asked).choices
    assert len(whole.routing) == 11
    streamed = [
        entry
        for chunk in chat(client, "mixlora", stream=True, **asked)
        for entry in getattr(chunk.choices[0], "routing", [])
    ]
    assert streamed == whole.routing
    texts = client.completions.create(
        model="mixlora", prompt="one", max_tokens=4, temperature=0, **asked
    )
    assert len(texts.choices[0].routing) == 3
    assert set(whole.routing[0]["routers"][0]) == {"router", "num_experts", "experts", "weights"}
