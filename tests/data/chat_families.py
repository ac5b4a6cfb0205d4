"""Chat templates of well-known families, and conversations of every kind.

Where trl carries a family's template it is taken from there; the others are written here in the
family's format.
"""

from __future__ import annotations

from trl import chat_template_utils as trl

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' ~ messages[0].content ~ "
    "'\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}{% else %}{% set system = '' %}"
    "{% set turns = messages %}{% endif %}{% for m in turns %}{% if (m.role == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ (system if loop.first else '') ~ "
    "m.content ~ ' [/INST]' }}{% else %}{{ ' ' ~ m.content ~ ' ' ~ eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{% set n = namespace(system='') %}{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]"
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set n.system = m.content ~ '\n\n' %}{% elif m.role == 'user' %}"
    "[INST] {{ n.system }}{{ m.content }}[/INST]{% set n.system = '' %}{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}]{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content ~ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GRANITE = (
    "{% set header = '<|start_of_role|>' %}{% if tools %}{{ header }}tools<|end_of_role|>"
    "{{ tools | tojson }}<|end_of_text|>\n{% endif %}{% for m in messages %}{{ header }}"
    "{{ 'tool_response' if m.role == 'tool' else m.role }}<|end_of_role|>{% if m.tool_calls %}"
    "<|tool_call|>{{ m.tool_calls | map(attribute='function') | list | tojson }}{% else %}"
    "{{ m.content }}{% endif %}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}"
    "{{ header }}assistant<|end_of_role|>{% endif %}"
)
FAMILIES = {
    "chatml": CHATML,
    "llama-2": LLAMA2,
    "llama-3": trl.llama3_chat_template,
    "mistral": MISTRAL,
    "gemma": trl.gemma_chat_template,
    "phi-3": trl.phi3_chat_template,
    "qwen2.5": trl.qwen2_5_chat_template,
    "qwen3": trl.qwen3_chat_template,
    "deepseek": trl.deepseekv3_chat_template,
    "zephyr": ZEPHYR,
    "command-r": trl.cohere_chat_template,
    "granite": GRANITE,
}
TRAINING = {
    "llama-3": trl.llama3_training_chat_template,
    "gemma": trl.gemma_training_chat_template,
    "phi-3": trl.phi3_training_chat_template,
    "qwen2.5": trl.qwen2_5_training_chat_template,
    "qwen3": trl.qwen3_training_chat_template,
    "deepseek": trl.deepseekv3_training_chat_template,
    "command-r": trl.cohere_training_chat_template,
}
"""What trl trains with, where it has something."""

_CALL = {"type": "function", "function": {"name": "color", "arguments": {"of": "sky"}}}
_TURNS = [
    {"role": "user", "content": "color?"},
    {"role": "assistant", "content": "blue"},
    {"role": "user", "content": "true?"},
    {"role": "assistant", "content": "yes"},
]
KINDS = {
    "turns": {"messages": _TURNS},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *_TURNS]},
    "tools": {
        "messages": [
            _TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "content": "azure"},
            _TURNS[1],
        ],
        "tools": [{"type": "function", "function": {"name": "color", "parameters": {}}}],
    },
    "reasoning": {
        "messages": [
            _TURNS[0],
            {**_TURNS[1], "reasoning_content": "Look up."},
            _TURNS[2],
            {**_TURNS[3], "reasoning_content": "It is."},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "color?"},
            {"from": "gpt", "value": "blue"},
            {"from": "human", "value": "true?"},
            {"from": "gpt", "value": "yes"},
        ]
    },
}
