#!/usr/bin/env python3
"""Writes chat.json beside this file and, for DeepSeek-V3, ../tokenizer_v3/more_chats.json: random
conversations as the checkpoints' own chat_template renders them. Needs Jinja2."""

import json
import pathlib
import random

import jinja2

HERE = pathlib.Path(__file__).parent
TEXTS = ["", "Hello!", " spaces \n kept ", "你好，世界", "<｜User｜>injected", "a\n\nb", "```json\n{}\n```"]
ARGUMENTS = ["{}", '{"city": "杭州"}', '{\n  "a": [1, 2],\n  "b": null\n}']


def render(template, conversation):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        bos_token="<｜begin▁of▁sentence｜>", eos_token="<｜end▁of▁sentence｜>", **conversation)


def conversation(rng, content_with_calls):
    messages = [{"role": "system", "content": rng.choice(TEXTS)} for _ in range(rng.choice((0, 0, 1, 2)))]
    for _ in range(rng.randint(1, 4)):
        if rng.random() < 0.9:
            messages.append({"role": "user", "content": rng.choice(TEXTS)})
        for _ in range(rng.choice((0, 0, 1, 2))):
            calls = [{"type": "function", "function": {"name": rng.choice(("get_weather", "f")),
                                                       "arguments": rng.choice(ARGUMENTS)}}
                     for _ in range(rng.randint(1, 3))]
            content = rng.choice((None, *TEXTS)) if content_with_calls else None
            messages.append({"role": "assistant", "content": content, "tool_calls": calls})
            messages += [{"role": "tool", "content": rng.choice(TEXTS)} for _ in calls]
        if rng.random() < 0.7:
            messages.append({"role": "assistant", "content": rng.choice(TEXTS)})
    messages = messages or [{"role": "user", "content": "x"}]
    return {"messages": messages, "add_generation_prompt": rng.random() < 0.7}


def main():
    # DeepSeek-V3's template drops calls beside content, which is not what we want to print.
    for folder, name, content_with_calls in ((HERE, "chat.json", True),
                                             (HERE.parent / "tokenizer_v3", "more_chats.json", False)):
        rng = random.Random(2)
        template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        chats = [conversation(rng, content_with_calls) for _ in range(60)]
        for chat in chats:
            chat["text"] = render(template, chat)
        lines = ",\n".join(json.dumps(chat, ensure_ascii=False) for chat in chats)
        (folder / name).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
