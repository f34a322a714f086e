"""`edgellama run`: one prompt, one answer; stdout gets the text and nothing else."""

import sys

from edgellama.cli.reply import Running, Wording, finish, load_model, show_reply
from edgellama.cli.templates import asked_template, source_of, template_of
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.errors import ParameterError

LONGEST_PROMPT = 16 << 20  # bytes; far beyond any context, and `yes |` never ends


def run_prompt(
    terminal: Terminal,
    name: str,
    prompt: str | None,
    *,
    raw: bool,
    system: str | None,
    template: str | None,
    how: Running,
    wording: Wording,
) -> None:
    asked = asked_template(template)
    if asked is not None and raw:
        raise ParameterError("--template and --raw contradict each other")
    text = _checked(_from_stdin(terminal) if prompt in (None, "-") else prompt or "")
    params, cancel = wording.params(), CancelToken()
    with load_model(terminal, name, how) as model:
        chat = not raw and (asked is not None or model.info.template is not None)
        if system is not None and not chat:
            raise ParameterError("--system needs the chat template, which is not in use here")
        source = source_of(asked, model) if chat else None
        if chat:
            terminal.note(f"The chat template in use is {source}; --raw leaves it out.")
        elif not raw:
            terminal.note("The file has no chat template: the model continues the text.")
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        limits = wording.limits(cancel)
        reply = show_reply(
            terminal,
            lambda: (
                model.chat(messages, params, template=template_of(asked, model), **limits)
                if chat
                else model.generate(text, params, **limits)
            ),
            cancel,
        )
        about = {"model": str(model.info.path), "device": model.device, "chat": chat}
    finish(terminal, reply, about | {"template_source": source})


def _from_stdin(terminal: Terminal) -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise ParameterError("there is no prompt: none was given, and stdin is closed")
    if sys.stdin.isatty():
        terminal.note("Type the prompt; Ctrl-D on an empty line ends it.")
    data = sys.stdin.buffer.read(LONGEST_PROMPT + 1)
    if len(data) > LONGEST_PROMPT:
        raise ParameterError(f"the prompt on stdin is longer than {LONGEST_PROMPT} bytes")
    try:
        return data.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ParameterError(f"the prompt on stdin is not UTF-8: {error}") from error


def _checked(prompt: str) -> str:
    if not prompt:
        raise ParameterError("the prompt is empty", hint="Give it as an argument or on stdin")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ParameterError("the prompt is not valid text in this terminal's encoding")
    return prompt
