"use strict";

// Asks the server's own API, once for each chosen model, and shows the answers side by side.

const COLORS = 8; // classes x0 to x7
const byId = (id) => document.getElementById(id);
let running = null; // what ends the answers that are being made

// ---- the API

function headers() {
  const key = byId("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function fetchOk(path, options) {
  const response = await fetch(path, { ...options, headers: headers() });
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    const message = body?.error?.message ?? `the server returned status ${response.status}`;
    throw Object.assign(new Error(message), { status: response.status });
  }
  return response;
}

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function requestOf(model) {
  const isChat = byId("mode").value === "chat";
  const prompt = byId("prompt").value;
  const seed = byId("seed").value;
  return {
    path: isChat ? "v1/chat/completions" : "v1/completions",
    body: {
      model,
      ...(isChat ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
      max_tokens: Number(byId("max-tokens").value),
      temperature: Number(byId("temperature").value),
      ...(seed !== "" && { seed: Number(seed) }),
      stream: true,
      stream_options: { include_usage: true },
      routing: true,
    },
  };
}

function ask(model, signal) {
  const { path, body } = requestOf(model);
  return fetchOk(path, { method: "POST", body: JSON.stringify(body), signal });
}

// ---- models

async function loadModels() {
  const chosen = new Set(chosenModels());
  try {
    const { data } = await (await fetchOk("v1/models")).json();
    showModels(data, chosen);
    byId("status").replaceChildren();
  } catch (error) {
    if (error.status === 401) byId("key-field").hidden = false;
    tell(error.status === 401 ? "This server requires an API key." : error.message, true);
  }
}

function showModels(models, chosen) {
  // the server's order changes with use
  models.sort((a, b) => (a.parent !== null) - (b.parent !== null) || a.id.localeCompare(b.id));
  const base = models.find((model) => model.parent === null);
  byId("base").textContent = base ? `on ${base.id}` : "";
  byId("models").replaceChildren(
    ...models.map((model, place) => {
      const box = Object.assign(document.createElement("input"), {
        type: "checkbox",
        value: model.id,
        checked: chosen.size ? chosen.has(model.id) : place < 3,
      });
      const label = document.createElement("label");
      label.append(box, model.id);
      return label;
    }),
  );
}

const chosenModels = () =>
  [...document.querySelectorAll("#models input:checked")].map((box) => box.value);

function tell(text, isAlarm = false) {
  byId("status").textContent = text;
  byId("status").className = isAlarm ? "alarm" : "";
}

// ---- answers

class Answer {
  constructor(model) {
    this.model = model;
    this.node = byId("answer").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.node.querySelector(selector);
    this.find("h2").textContent = model;
    this.text = "";
    this.tokens = []; // those whose experts are known
    this.loads = new Map(); // router -> load by expert
    this.isDue = false;
    this.find("select").addEventListener("change", () => this.draw());
    this.find("svg").addEventListener("click", (event) => this.choose(event.target));
  }

  async run(signal) {
    const start = performance.now();
    const events = serverEvents(await ask(this.model, signal));
    for await (const { choices, usage } of events) {
      for (const choice of choices) this.add(choice);
      if (usage) this.tellFacts(usage, (performance.now() - start) / 1000);
      this.drawSoon();
    }
  }

  add(choice) {
    this.text += choice.delta?.content ?? choice.text ?? "";
    this.end = choice.finish_reason ?? this.end;
    for (const token of choice.routing ?? []) {
      this.tokens.push(token);
      for (const one of token.routers) this.addLoad(one);
    }
  }

  addLoad({ router, num_experts: size, experts, weights }) {
    if (!this.loads.has(router)) {
      this.loads.set(router, new Array(size).fill(0));
      this.find("select").append(new Option(router));
      this.find(".routing").hidden = false;
    }
    const isChoice = experts.length < size; // else all take part, by their weights
    experts.forEach((expert, place) => {
      this.loads.get(router)[expert] += isChoice ? 1 / experts.length : weights[place];
    });
  }

  tellFacts(usage, seconds) {
    const rate = (usage.completion_tokens / seconds).toFixed(1);
    const end = this.end === "length" ? ", cut short" : "";
    this.find(".facts").textContent =
      `${usage.completion_tokens} tokens in ${seconds.toFixed(1)} s (${rate} a second)${end}`;
  }

  fail(error) {
    this.find(".facts").className = "facts alarm";
    this.find(".facts").textContent =
      error.name === "AbortError" ? "stopped" : error.message;
  }

  drawSoon() {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.draw();
    });
  }

  draw() {
    this.drawText();
    if (this.loads.size) {
      this.drawLegend();
      this.drawLoads();
    }
  }

  drawText() {
    const router = this.find("select").selectedIndex;
    const place = [...this.find(".text").children].indexOf(document.activeElement);
    let known = 0;
    const spans = this.tokens.map((token, index) => {
      const span = document.createElement("span");
      span.textContent = token.text;
      span.className = `x${token.routers[router].experts[0] % COLORS}`;
      span.tabIndex = index === Math.max(place, 0) ? 0 : -1;
      span.token = { text: token.text, ...token.routers[router] };
      known += token.text.length;
      return span;
    });
    this.find(".text").replaceChildren(...spans, this.text.slice(known));
    spans[place]?.focus();
  }

  drawLegend() {
    const load = this.loads.get(this.find("select").value);
    const total = load.reduce((sum, one) => sum + one, 0);
    this.find(".legend").replaceChildren(
      ...load.map((one, expert) => {
        const item = document.createElement("li");
        item.className = `x${expert % COLORS}`;
        item.textContent = `${expert}: ${percent(one / total)}`;
        return item;
      }),
    );
  }

  drawLoads() {
    const margin = 64, width = 320, row = 14;
    const size = Math.max(...[...this.loads.values()].map((load) => load.length));
    const cell = (width - margin) / size;
    const svg = this.find("svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${row * (this.loads.size + 1)}`);
    svg.setAttribute("aria-label", this.describeLoads());
    const parts = Array.from({ length: size }, (_, expert) =>
      shape("text", { x: margin + cell * (expert + 0.5), y: 10, "text-anchor": "middle" }, expert),
    );
    [...this.loads].forEach(([router, load], index) => {
      const y = row * (index + 1);
      const total = load.reduce((sum, one) => sum + one, 0);
      const name = router.replace(/^layer (\d+) .*\.(\w+)$/, "$1 $2");
      parts.push(shape("text", { x: 0, y: y + 11, "data-router": router }, name));
      load.forEach((one, expert) => {
        const place = { x: margin + cell * expert, y, width: cell - 1, height: row - 1 };
        const look = { class: "load", "fill-opacity": (0.04 + 0.96 * one / Math.max(...load)).toFixed(3) };
        const rect = shape("rect", { ...place, ...look, "data-router": router });
        rect.append(shape("title", {}, `${router}, expert ${expert}: ${percent(one / total)}`));
        parts.push(rect);
      });
      if (router === this.find("select").value) {
        parts.push(shape("rect", { x: margin - 1, y: y - 0.5, width: width - margin, height: row, class: "chosen" }));
      }
    });
    svg.replaceChildren(...parts);
  }

  describeLoads() {
    return [...this.loads]
      .map(([router, load]) => `${router}: mostly expert ${load.indexOf(Math.max(...load))}`)
      .join("; ");
  }

  choose(target) {
    const router = target.dataset.router;
    if (!router) return;
    this.find("select").value = router;
    this.draw();
  }
}

const percent = (share) => `${(100 * share).toFixed(0)} %`;

function shape(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

async function askAll() {
  const models = chosenModels();
  if (!models.length) return tell("Choose a model.", true);
  stop();
  const own = (running = new AbortController());
  byId("stop").disabled = false;
  tell("Answering …");
  const answers = models.map((model) => new Answer(model));
  byId("answers").replaceChildren(...answers.map((answer) => answer.node));
  await Promise.all(answers.map((answer) => answer.run(own.signal).catch((e) => answer.fail(e))));
  if (running !== own) return;
  running = null;
  byId("stop").disabled = true;
  tell("");
}

function stop() {
  running?.abort();
}

// ---- a token's experts, where the pointer or the focus is

function showTip(event) {
  const span = event.target.closest?.(".text span");
  const tip = byId("tip");
  tip.hidden = !span;
  if (!span) return;
  const { text, router, experts, weights } = span.token;
  const lines = experts.map((expert, place) => `expert ${expert}: ${weights[place].toFixed(3)}`);
  tip.textContent = [`${JSON.stringify(text)} in ${router}`, ...lines].join("\n");
  const box = span.getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(box.left, room))}px`;
  const below = box.bottom + 6;
  const isLow = below + tip.offsetHeight > window.innerHeight;
  tip.style.top = `${isLow ? box.top - tip.offsetHeight - 6 : below}px`;
}

function moveFocus(event) {
  const span = event.target.closest?.(".text span");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const next = step && span && (step > 0 ? span.nextElementSibling : span.previousElementSibling);
  if (!next) return;
  span.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  event.preventDefault();
}

// ---- the page

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  askAll();
});
byId("stop").addEventListener("click", stop);
byId("reload").addEventListener("click", loadModels);
byId("key").addEventListener("change", loadModels);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  moveFocus(event);
});
for (const kind of ["pointerover", "focusin"]) document.addEventListener(kind, showTip);
document.addEventListener("focusout", () => (byId("tip").hidden = true));
loadModels();
