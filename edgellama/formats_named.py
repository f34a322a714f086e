"""The prompt formats of the LLaMA family by name, with what ends a turn in each.

Knows nothing about how they look (`formats_layouts.py`) or how ids are made (`formats.py`).
"""

from dataclasses import replace
from datetime import datetime
from typing import Protocol

from edgellama import formats_layouts as layouts
from edgellama.chat import ChatTemplate
from edgellama.errors import ParameterError, did_you_mean, shown
from edgellama.formats import ChatFormat

LLAMA31_DATE = "26 Jul 2024"
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


class SpecialTexts(Protocol):
    """The part of a tokenizer that Jinja text needs."""

    @property
    def bos_text(self) -> str: ...
    @property
    def eos_text(self) -> str: ...


def _heading(text: str) -> tuple[str, ...]:
    """A heading of the next turn, and the line breaks before it."""
    return (text, f"\n{text}", f"\n\n{text}")


def _today() -> str:
    now = datetime.now()
    return f"{now.day:02} {MONTHS[now.month - 1]} {now.year}"


WITHOUT_SYSTEM = ("user", "assistant")
ANY_ORDER = ("system", "user", "assistant", "tool")
INST_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
LLAMA3 = ChatFormat(
    "llama-3",
    layouts.llama3,
    end_tokens=("<|eot_id|>", "<|end_of_text|>"),
    tokens=("<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>"),
    roles=ANY_ORDER,
    alternating=False,
    bos=False,  # the layout writes its own
)
LLAMA31 = replace(
    LLAMA3,
    name="llama-3.1",
    layout=layouts.llama31,
    end_tokens=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    clock=lambda: LLAMA31_DATE,
)
VICUNA_V0 = ChatFormat("vicuna-v0", layouts.vicuna_v0_train, stops=_heading("### Human:"))
VICUNA = ChatFormat("vicuna-v1.1", layouts.vicuna, stops=(" USER:", "\nUSER:", "USER:"))
CODELLAMA_70B = ChatFormat(
    "codellama-70b", layouts.codellama_70b, end_tokens=("<step>",), alternating=False
)
LLAMA2 = ChatFormat("llama-2", layouts.llama2, tags=INST_TAGS)
CHATML = ChatFormat(
    "chatml",
    layouts.chatml,
    end_tokens=("<|im_end|>",),
    tokens=("<|im_start|>",),
    roles=ANY_ORDER,
    alternating=False,
    bos=False,
)
MISTRAL = ChatFormat("mistral", layouts.mistral, tags=("[INST]", "[/INST]"))

FORMATS = {
    form.name: form
    for form in (
        LLAMA2,
        replace(LLAMA2, name="codellama"),
        LLAMA3,
        LLAMA31,
        replace(LLAMA31, name="llama-3.2", clock=_today),
        CODELLAMA_70B,
        replace(CODELLAMA_70B, name="codellama-70b-hf", layout=layouts.codellama_70b_hf),
        ChatFormat(
            "alpaca",
            layouts.alpaca,
            stops=_heading("### Instruction:"),
            roles=WITHOUT_SYSTEM,
            single=True,
        ),
        VICUNA_V0,
        replace(
            VICUNA_V0,
            name="vicuna-v0-serve",
            layout=layouts.vicuna_v0_serve,
            stops=("###Human:", "### Human:"),
        ),
        replace(VICUNA_V0, name="vicuna-v0-fastchat", layout=layouts.vicuna_v0_fastchat),
        VICUNA,
        ChatFormat("koala", layouts.koala, stops=VICUNA.stops, roles=WITHOUT_SYSTEM),
        replace(VICUNA, name="wizardlm"),
        ChatFormat(
            "wizardlm-7b",
            layouts.wizardlm_7b,
            stops=_heading("### Response:"),
            roles=WITHOUT_SYSTEM,
            single=True,
        ),
        ChatFormat(
            "openassistant",
            layouts.openassistant,
            end_tokens=("<|prompter|>",),
            tokens=("<|assistant|>", "<|system|>"),
        ),
        ChatFormat("belle", layouts.belle, stops=("\nHuman:",), roles=WITHOUT_SYSTEM, bos=False),
        ChatFormat("colossal", layouts.colossal, stops=("\nHuman:",), bos=False),
        ChatFormat("zephyr", layouts.zephyr, alternating=False),
        CHATML,
        replace(CHATML, name="smollm2", layout=layouts.smollm2),
        MISTRAL,
        replace(MISTRAL, name="mistral-hf", layout=layouts.mistral_hf),
        ChatFormat("mistral-v3", layouts.mistral_v3, tokens=("[INST]", "[/INST]")),
    )
}


def format_named(name: str, *, date: str | None = None) -> ChatFormat:
    """A format by its name; ParameterError for others.

    `date` is what the formats of Llama 3.1 and 3.2 call today, such as "05 Mar 2025"; without it
    the former says "26 Jul 2024", as its template does, and the latter asks the clock.
    """
    form = FORMATS.get(name) if isinstance(name, str) else None
    if form is None:
        raise ParameterError(
            f"template = {shown(name)} is no Jinja text and no format's name; the formats are "
            + ", ".join(FORMATS),
            field="template",
            value=name,
            allowed=", ".join(FORMATS),
            hint=did_you_mean(name, FORMATS),
        )
    if date is None:
        return form
    fixed = date
    return replace(form, clock=lambda: fixed)


def chosen_template(
    template: str | ChatTemplate | ChatFormat, tokenizer: SpecialTexts
) -> ChatTemplate | ChatFormat:
    """What `template` stands for: a format's name, Jinja text, or what it is already."""
    if isinstance(template, ChatTemplate | ChatFormat):
        return template
    if isinstance(template, str) and any(mark in template for mark in ("{{", "{%")):
        return ChatTemplate(template, bos=tokenizer.bos_text, eos=tokenizer.eos_text)
    return format_named(template)
