"""Chats with tiny models, without a terminal: begun, and told what a person would type."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tiny import tiny_config, write_tiny

import edgellama
from edgellama import Model
from edgellama.cli.chat import Chat
from edgellama.cli.conversation import Conversation
from edgellama.cli.reply import Wording
from edgellama.cli.settings import Settings
from edgellama.cli.terminal import Terminal

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
CONTEXT = 256
Begin = Callable[..., Chat]
SMOLLM2 = (  # as the files of SmolLM2-Instruct carry it
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
TALK = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi there."},
    {"role": "user", "content": "What is 2+2?"},
]


def opened(path: Path, template: str | None = TEMPLATE) -> Model:
    config = tiny_config(context_length=CONTEXT)
    metadata = {"tokenizer.chat_template": template}
    return edgellama.load(write_tiny(path, config, metadata=metadata), runtime="reference")


def begun(
    model: Model,
    *,
    seed: int | None = None,
    temperature: float = 0.0,
    max_tokens: int | None = 5,
    overflow: str = "error",
    system: str | None = None,
) -> Chat:
    sampling = {"temperature": temperature, "seed": seed}
    settings = Settings.of(Wording(max_tokens, None, sampling), overflow)
    return Chat(Conversation(Terminal(), model, settings, system))


def told(chat: Chat, typed: str) -> str:
    """What a chat says on stderr to one thing that was typed; it must not end by it."""
    with redirect_stderr(io.StringIO()) as err, redirect_stdout(io.StringIO()):
        assert chat.take(typed)
    return err.getvalue()


def contents(chat: Chat) -> list[str]:
    return [message["content"] for message in chat.conversation.messages()]
