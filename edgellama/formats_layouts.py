"""How each prompt format of the LLaMA family lays out a conversation, in texts and tokens.

Knows nothing about tokenizers or which names and stops the formats have: `formats_named.py` does.
Sources are named at each layout; where released code differs from the text a model was trained on,
the latter is taken.
"""

from collections.abc import Iterator
from dataclasses import replace

from edgellama.formats import APART, BOS, EOS, Piece, Talk, Token

ASSISTANT_OF_A_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
ASSISTANT_OF_A_USER = ASSISTANT_OF_A_HUMAN.replace("human", "user")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

INST, END_INST = Token("[INST]"), Token("[/INST]")
STEP = Token("<step>")
HEADER, END_HEADER = Token("<|start_header_id|>"), Token("<|end_header_id|>")
END_TURN, BEGIN_TEXT = Token("<|eot_id|>"), Token("<|begin_of_text|>")
IM_START, IM_END = Token("<|im_start|>"), Token("<|im_end|>")
PROMPTER, ANSWERER = Token("<|prompter|>"), Token("<|assistant|>")
SYSTEM_ROLE = Token("<|system|>")


def llama2(talk: Talk) -> Iterator[Piece]:
    """meta-llama/llama, llama/generation.py: each pair is encoded by itself, with its own BOS."""
    system = f"<<SYS>>\n{talk.system}\n<</SYS>>\n\n" if talk.system is not None else ""
    for user, answer in talk.pairs:
        yield from (BOS, f"[INST] {(system + user).strip()} [/INST]")
        if answer is not None:
            yield from (f" {answer.strip()} ", EOS)
        system = ""


def llama3(talk: Talk) -> Iterator[Piece]:
    """meta-llama/llama3, llama/tokenizer.py: ChatFormat."""
    return _headed(talk, talk.system.strip() if talk.system is not None else None)


def llama31(talk: Talk) -> Iterator[Piece]:
    """The templates of Llama 3.1 and 3.2, without tools: there always is a system message."""
    dates = f"Cutting Knowledge Date: December 2023\nToday Date: {talk.date}\n\n"
    return _headed(talk, dates + (talk.system or "").strip())


def _headed(talk: Talk, system: str | None) -> Iterator[Piece]:
    """Messages behind headers, as Llama 3 has them; tool results have the role ipython."""
    messages = [("system", system)] if system is not None else []
    messages += [(role, text.strip()) for role, text in talk.turns]
    yield BEGIN_TEXT
    for role, text in messages:
        name = "ipython" if role == "tool" else role
        yield from (HEADER, name, END_HEADER, "\n\n" + text, END_TURN)
    yield from (HEADER, "assistant", END_HEADER, "\n\n")


def codellama_70b(talk: Talk) -> Iterator[Piece]:
    """meta-llama/codellama, llama/generation.py: header and body are encoded separately."""
    yield BOS
    for role, text in [("system", talk.system or ""), *talk.turns]:
        yield from (f" Source: {role}", APART, f"\n\n {text.strip()}", STEP)
    yield from (" Source: assistant\nDestination: user", APART, "\n\n ")


def codellama_70b_hf(talk: Talk) -> Iterator[Piece]:
    """The template of the Hugging Face upload; its ids differ from Meta's by single spaces."""
    first = [("system", talk.system)] if talk.system is not None else []
    yield BOS
    space = ""
    for role, text in [*first, *talk.turns]:
        yield from (f"{space}Source: {role}\n\n {text.strip()} ", STEP)
        space = " "
    yield f"{space}Source: assistant\nDestination: user\n\n "


def alpaca(talk: Talk) -> Iterator[Piece]:
    """tatsu-lab/stanford_alpaca, train.py; a message may carry an `input` beside its content."""
    task, more = "that describes a task", ""
    if talk.context:
        task += ", paired with an input that provides further context"
        more = f"### Input:\n{talk.context}\n\n"
    yield (
        f"Below is an instruction {task}. Write a response that appropriately completes the "
        f"request.\n\n### Instruction:\n{talk.turns[0][1]}\n\n{more}### Response:"
    )


def _vicuna_v0(talk: Talk, header: str, before: str, after: str) -> Iterator[Piece]:
    yield _system(talk, ASSISTANT_OF_A_HUMAN) + header
    for user, answer in talk.pairs:
        yield f"{before}Human: {user}{after}{before}Assistant:"
        if answer is not None:
            yield f" {answer}{after}"


def vicuna_v0_train(talk: Talk) -> Iterator[Piece]:
    """lm-sys/FastChat, fastchat/train/train.py of version 0.1: the text it was trained on."""
    return _vicuna_v0(talk, "\n\n", "### ", "\n")


def vicuna_v0_serve(talk: Talk) -> Iterator[Piece]:
    """What the first releases of FastChat really sent."""
    return _vicuna_v0(talk, "", "###", "")


def vicuna_v0_fastchat(talk: Talk) -> Iterator[Piece]:
    """FastChat's later separators."""
    return _vicuna_v0(talk, "\n", "### ", "\n")


def vicuna(talk: Talk) -> Iterator[Piece]:
    """lm-sys/FastChat, fastchat/conversation.py: vicuna_v1.1. Spaces, no newlines."""
    yield _system(talk, ASSISTANT_OF_A_USER) + " "
    for user, answer in talk.pairs:
        yield f"USER: {user} ASSISTANT:"
        if answer is not None:
            yield from (f" {answer}", EOS)


def koala(talk: Talk) -> Iterator[Piece]:
    """young-geng/EasyLM, docs/koala.md."""
    yield "BEGINNING OF CONVERSATION: "
    for user, answer in talk.pairs:
        yield f"USER: {user} GPT:"
        if answer is not None:
            yield from (f" {answer}", EOS)


def wizardlm_7b(talk: Talk) -> Iterator[Piece]:
    """nlpxucan/WizardLM, README: the bare instruction."""
    yield f"{talk.turns[0][1]}\n\n### Response:"


def openassistant(talk: Talk) -> Iterator[Piece]:
    """LAION-AI/Open-Assistant, model/MESSAGE_AND_TOKEN_FORMAT.md."""
    if talk.system is not None:
        yield from (SYSTEM_ROLE, talk.system, EOS)
    for user, answer in talk.pairs:
        yield from (PROMPTER, user, EOS, ANSWERER)
        if answer is not None:
            yield from (answer, EOS)


def belle(talk: Talk) -> Iterator[Piece]:
    """LianjiaTech/BELLE, train/src/sample_generator.py: an answer is encoded by itself."""
    for user, answer in talk.pairs:
        yield f"Human: \n{user}\n\nAssistant: \n"
        if answer is not None:
            yield from (APART, answer, EOS)


def colossal(talk: Talk) -> Iterator[Piece]:
    """hpcaitech/ColossalAI, colossal_llama/dataset/conversation.py: BOS and EOS around texts."""
    yield _system(talk, ASSISTANT_OF_A_HUMAN) + "\n\n"
    for user, answer in talk.pairs:
        yield from ("Human: ", BOS, user, EOS, "Assistant: ", BOS)
        if answer is not None:
            yield from (answer, EOS)


def zephyr(talk: Talk) -> Iterator[Piece]:
    """The template of Zephyr-7B-beta and TinyLlama-Chat: roles are plain text."""
    first = [("system", talk.system)] if talk.system is not None else []
    newline = ""
    for role, text in [*first, *talk.turns]:
        yield from (f"{newline}<|{role}|>\n{text}", EOS)
        newline = "\n"
    yield "\n<|assistant|>\n"


def chatml(talk: Talk) -> Iterator[Piece]:
    """OpenAI's ChatML as LLaMA fine-tunes use it; no system message of its own."""
    first = [("system", talk.system)] if talk.system is not None else []
    for role, text in [*first, *talk.turns]:
        yield from (IM_START, f"{role}\n{text}", IM_END, "\n")
    yield from (IM_START, "assistant\n")


def smollm2(talk: Talk) -> Iterator[Piece]:
    """The template of SmolLM2-Instruct: without a system message it writes its own."""
    return chatml(replace(talk, system=_system(talk, SMOLLM2_SYSTEM)))


def mistral(talk: Talk) -> Iterator[Piece]:
    """mistral-common, v1 (7B-Instruct v0.1 and v0.2): an answer is encoded by itself."""
    yield BOS
    system = _paragraph(talk)
    for user, answer in talk.pairs:
        yield f"[INST] {system}{user} [/INST]"
        if answer is not None:
            yield from (APART, answer, EOS)
        system = ""


def mistral_v3(talk: Talk) -> Iterator[Piece]:
    """mistral-common, v3 (7B-Instruct v0.3): tags are tokens, the system text goes last."""
    yield BOS
    for user, answer in talk.pairs:
        yield from (INST, user if answer is not None else _paragraph(talk) + user, END_INST)
        if answer is not None:
            yield from (answer, EOS)


def mistral_hf(talk: Talk) -> Iterator[Piece]:
    """The template that Hugging Face's uploads of v0.1 and v0.2 had in 2023, without a space."""
    return (piece for piece in mistral(talk) if piece is not APART)


def _system(talk: Talk, default: str) -> str:
    return default if talk.system is None else talk.system


def _paragraph(talk: Talk) -> str:
    return "" if talk.system is None else f"{talk.system}\n\n"
