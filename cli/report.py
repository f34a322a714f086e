"""What a chat tells about itself: the first screen, `/show`, `/context`, `/stats`.

Conversations in, text out.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellama.cli.conversation import Unseen
from edgellama.cli.reply import rate
from edgellama.cli.settings import NAMES, line_about
from edgellama.cli.spelling import beginning, megabytes, millions, plural
from edgellama.cli.templates import Asked, source_of
from edgellama.errors import EdgeLlamaError
from edgellama.overflow import REPLY_SHARE

if TYPE_CHECKING:
    from edgellama.cli.conversation import Conversation
    from edgellama.model import Model
    from edgellama.overflow import Fitted

HALF_FULL, NEARLY_FULL = 0.5, 0.8  # of the context; below half of it, nothing is left out
MOST_LISTED = 40  # messages


def first_screen(model: "Model", asked: Asked | None) -> str:
    """Which model, run how, in a few lines."""
    lines = [
        _labelled("model", _model(model)),
        _labelled("device", _device(model)),
        _labelled(
            "context", f"{model.info.context} tokens of the model's {model.info.model_context}"
        ),
        _labelled("template", source_of(asked, model)),
    ]
    if (now := resident_bytes()) is not None:
        lines.append(_labelled("memory", f"{megabytes(now)} in use now"))
    if model.info.template is None and asked is None:
        lines.append("This is a base model: it continues the text that you both write. Enter alone")
        lines.append("lets it go on, /clear begins another text.")
    return "\n".join(lines)


def _labelled(label: str, text: str) -> str:
    return f"{label:<9} {text}"


def _model(model: "Model") -> str:
    info = model.info
    kinds = max(info.types, key=lambda kind: (kind not in ("F32", "F16"), info.types[kind]))
    size = f"{millions(info.parameters)} parameters"
    bits = f"mostly {kinds}, {info.bits_per_weight:.1f} bits each"
    return f"{info.path.name}, {size}, {bits}, {megabytes(info.file_bytes)}"


def _device(model: "Model") -> str:
    device = model.device
    name, runtime, count = device.get("device"), device.get("runtime"), device.get("threads")
    parts = [f"{runtime} runtime"] if name == runtime else [str(name), f"{runtime} runtime"]
    parts += [plural(count, "thread")] if count else []
    reasons = [str(device["reason"])] if device.get("reason") else []
    reasons += ["--device cuda for an NVIDIA GPU"] if name != "cuda" else []
    return ", ".join(parts) + (f" ({'; '.join(reasons)})" if reasons else "")


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        import resource  # there is none on Windows, nor that file

        return pages * resource.getpagesize()
    return None


# --- the context ----------------------------------------------------------------------------------


def settings_lines(conversation: "Conversation") -> str:
    return "\n".join(line_about(conversation.settings, name) for name in NAMES)


def show(conversation: "Conversation") -> str:
    """Everything that is set and in use."""
    changed = conversation.settings.document()
    lines = [first_screen(conversation.model, conversation.asked)]
    if conversation.system is not None:
        lines.append(_labelled("system", beginning(conversation.system, 60)))
    lines.append(_labelled("settings", "all as usual" if not changed else ""))
    lines += [f"  {line_about(conversation.settings, name)}" for name in changed]
    template = conversation.asked.jinja if conversation.asked else conversation.model.info.template
    if template is not None:
        lines += ["The template:", template]
    return "\n".join(lines)


def context(conversation: "Conversation") -> str:
    """How full the context is, by what, what the model does not see any more, and what is next."""
    used, limit = conversation.position(), conversation.model.info.context
    bar = "#" * round(40 * min(1.0, used / limit))
    lines = [f"{used} of {limit} tokens, {used / limit:.0%}  [{bar:<40}]"]
    talk, unseen = conversation.messages(), conversation.unseen()
    gone = conversation.leaves_out()
    dropped = () if isinstance(gone, EdgeLlamaError) else gone.dropped_messages
    listed = range(max(0, len(talk) - MOST_LISTED), len(talk))
    if listed.start:
        lines.append(f"  (the first {plural(listed.start, 'message')} are not listed)")
    for at in listed:
        count = len(conversation.model.tokenizer.encode(talk[at]["content"]))
        mark = _MARKS[at in unseen.messages, at in dropped]
        role, words = talk[at]["role"], beginning(talk[at]["content"])
        lines.append(f"  {role:<9} {count:>6}  {words}{mark}")
    if unseen.messages or unseen.tokens:
        lines.append(f"The last reply was made without {_what(conversation, unseen)}.")
    return "\n".join([*lines, prospect(conversation, gone)])


_MARKS = {  # by whether the last reply was made without it, and whether the next one will be
    (False, False): "",
    (False, True): "   to be left out next",
    (True, True): "   left out",
    (True, False): "   left out of the last reply",
}


def prospect(conversation: "Conversation", gone: "Fitted | EdgeLlamaError") -> str:
    """What the present `overflow` will do to the next message, in words, but for what it did."""
    policy, limit = conversation.settings.overflow, conversation.model.info.context
    what = "words" if conversation.completing else "message"
    if isinstance(gone, EdgeLlamaError):
        return f"The next {what} will be refused: {gone.problem}. /undo and /clear make room."
    if lost := _news(conversation, gone):
        return f"The next {what} will push out {_what(conversation, lost)} (overflow is {policy})."
    reply = min(limit // REPLY_SHARE, conversation.settings.max_tokens or limit)
    shifting = f"From {limit - reply} tokens on, overflow {policy} leaves out"
    if conversation.completing:
        return _END_OF_TEXT if policy == "error" else f"{shifting} the beginning of the text."
    if policy == "error":
        return (
            "Nothing is ever left out (overflow is error): once a message does not fit any more, "
            "it is refused. /undo and /clear make room; so does /set overflow shift."
        )
    system = "and keeps the system message" if policy == "shift" else "the system message first"
    more = "more of " if conversation.unseen().messages else ""
    return f"{shifting} {more}the oldest turns, {system}."


_END_OF_TEXT = (
    "A full context ends the text (overflow is error): /clear begins a new one, /set overflow "
    "shift goes on without the beginning of this one."
)


def _news(conversation: "Conversation", gone: "Fitted") -> Unseen | None:
    """What the next reply will be made without, and the last one was not; None if nothing."""
    unseen = conversation.unseen()
    new = tuple(at for at in gone.dropped_messages if at not in unseen.messages)
    if conversation.completing and gone.dropped_tokens > unseen.tokens:
        return Unseen(tokens=gone.dropped_tokens)
    return Unseen(new) if new else None


def foresight(conversation: "Conversation") -> str:
    """What is to be known before the next message; "" if nothing."""
    share = conversation.position() / conversation.model.info.context
    if share < HALF_FULL:
        return ""
    gone = conversation.leaves_out()
    news = not isinstance(gone, EdgeLlamaError) and _news(conversation, gone) is not None
    return prospect(conversation, gone) if share >= NEARLY_FULL or news else ""


def left_out(conversation: "Conversation", unseen: Unseen) -> str:
    """What a reply was made without."""
    return f"The context was full: the model did not see {_what(conversation, unseen)}."


def _what(conversation: "Conversation", unseen: Unseen) -> str:
    if conversation.completing:
        return f"the first {plural(unseen.tokens, 'token')} of the text"
    which = _messages(conversation.messages(), unseen.messages)
    return f"{which}, {plural(unseen.tokens, 'token')}" if unseen.tokens else which


def _messages(talk: list[dict[str, str]], places: tuple[int, ...]) -> str:
    """Messages that are next to each other, by the words of the first."""
    words = beginning(talk[places[0]]["content"], 32)
    if len(places) == 1:
        return f"the {talk[places[0]]['role']} message {words}"
    return f"the {len(places)} messages from {words} on"


# --- the session ----------------------------------------------------------------------------------


def stats(conversation: "Conversation") -> str:
    """Tokens, rates and memory since the chat began."""
    uses = [reply.usage for reply in conversation.replies if reply.usage is not None]
    prompt = sum(use.prompt_tokens for use in uses)
    cached = sum(use.reused_tokens for use in uses)
    said = sum(use.completion_tokens for use in uses)
    prefill = sum(use.prefill_seconds for use in uses)
    decode = sum(use.decode_seconds for use in uses)
    steps = said - sum(use.completion_tokens > 0 for use in uses)
    waits = [
        r.first_token_seconds for r in conversation.replies if r.first_token_seconds is not None
    ]
    lines = [
        _labelled("replies", str(len(uses))),
        _labelled(
            "read", f"{prompt:,} tokens, {cached:,} of them cached{_at(prompt - cached, prefill)}"
        ),
        _labelled("written", f"{plural(said, 'token')}{_at(steps, decode)}"),
    ]
    if waits:
        mean = sum(waits) / len(waits)
        lines.append(
            _labelled(
                "waiting", f"{mean:.2f} s for a first token on average, {max(waits):.2f} s at most"
            )
        )
    return "\n".join([*lines, *_memory(conversation.model.info.memory)])


def _at(tokens: int, seconds: float) -> str:
    speed = rate(tokens, seconds)
    return f",{speed}" if speed else ""


def _memory(by_purpose: dict[str, Any]) -> list[str]:
    from edgellama.measure import peak_bytes

    parts = [f"{name.replace('_', ' ')} {megabytes(size)}" for name, size in by_purpose.items()]
    now, peak = resident_bytes(), peak_bytes()
    told = [f"{megabytes(now)} now"] if now is not None else []
    told += [f"{megabytes(peak)} at most"] if peak is not None else []
    return [_labelled("memory", "; ".join([", ".join(told), ", ".join(parts)]).strip("; "))]
