"""A conversation with a model: what was said, the settings, and one session that remembers it.

With a chat template it is made of messages; without one, of a text that both write in turn. Knows
nothing about keyboards or commands.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edgellama.cli.continuation import fitted_text
from edgellama.cli.prefill import ReadAhead
from edgellama.cli.reply import Reply, show_reply
from edgellama.cli.settings import Settings
from edgellama.cli.templates import Asked, source_of, template_of
from edgellama.cli.terminal import Terminal
from edgellama.control import CancelToken
from edgellama.errors import ContextOverflow, EdgeLlamaError, ParameterError
from edgellama.sampling import LARGEST_SEED, Sampling

if TYPE_CHECKING:
    from edgellama.model import Model
    from edgellama.overflow import Fitted

TOO_MUCH = "Shorten it, /set overflow shift to drop earlier messages, or take a larger --context"
TOO_LONG = "The last message alone is too long: shorten it, or take a larger --context"
NEXT = {"role": "user", "content": "..."}  # stands for the message that is still to come


@dataclass(frozen=True)
class Exchange:
    """A message and the reply to it."""

    message: str
    reply: Reply
    prompt: tuple[int, ...] = ()  # what the model had read before the reply; () if not known
    attempt: int = 0  # how often the reply was asked for again
    system: str | None = None  # the system message at that time


@dataclass(frozen=True)
class Unseen:
    """What a reply was made without, because the context was full."""

    messages: tuple[int, ...] = ()  # their places in the conversation, counted from 0
    tokens: int = 0  # with no template these alone: the beginning of the text


class Conversation:
    def __init__(
        self,
        terminal: Terminal,
        model: "Model",
        settings: Settings,
        system: str | None = None,
        asked: Asked | None = None,
        markdown: bool = False,
    ) -> None:
        self.markdown = markdown  # whether replies are set as such
        self.terminal, self.model, self.settings = terminal, model, settings
        self.asked, self.template = asked, template_of(asked, model)
        self.session = model.session()
        self.exchanges: list[Exchange] = []
        self.replies: list[Reply] = []  # all there ever were
        self.system: str | None = None
        if system is not None:
            self.instruct(system)

    @property
    def completing(self) -> bool:
        """Whether the model continues a text, because nothing tells messages apart."""
        return self.model.info.template is None and self.template is None

    @property
    def can_go_on(self) -> bool:
        """Whether there is a text to go on with, even without another word."""
        return self.completing and bool(self.exchanges)

    # --- what was said ----------------------------------------------------------------------------

    def messages(self, *more: dict[str, str]) -> list[dict[str, str]]:
        talk = [{"role": "system", "content": self.system}] if self.system is not None else []
        for exchange in self.exchanges:
            talk.append({"role": "user", "content": exchange.message})
            talk.append({"role": "assistant", "content": exchange.reply.text})
        return [*talk, *more]

    def text(self) -> str:
        return "".join(message["content"] for message in self.messages())

    def instruct(self, system: str | None) -> None:
        """Another system message, or none. Raises ParameterError where the template has none."""
        if system is not None and self.completing:
            raise ParameterError(
                "a system message needs a chat template, which is not in use here",
                field="system",
                hint="--template names one",
            )
        before, self.system = self.system, system
        try:
            if system is not None:
                talk = [*self.messages()[:1], NEXT]
                self.model.chat_ids(talk, template=self.template)
        except BaseException:
            self.system = before
            raise

    def clear(self) -> None:
        self.exchanges.clear()
        self.session.truncate(0)

    def undo(self) -> Exchange | None:
        return self.exchanges.pop() if self.exchanges else None

    # --- replies ----------------------------------------------------------------------------------

    def answer(self, message: str, attempt: int = 0) -> Reply:
        """Show the model's reply. Both are kept, unless it was stopped before its first word."""
        reply = (
            self._completion(message, attempt) if self.completing else self._chat(message, attempt)
        )
        self.replies.append(reply)
        if reply.text or not reply.interrupted:
            known = reply.usage.prompt_tokens if reply.usage is not None else 0
            prompt = self.session.ids[:known]
            self.exchanges.append(Exchange(message, reply, prompt, attempt, self.system))
        return reply

    def again(self) -> Reply:
        """Another reply to the last message; the old one stays if this one does not come about."""
        last, before = self.exchanges.pop(), len(self.exchanges)
        try:
            return self.answer(last.message, last.attempt + 1)
        finally:
            if len(self.exchanges) == before:
                self.exchanges.append(last)

    def _chat(self, message: str, attempt: int) -> Reply:
        talk = self.messages({"role": "user", "content": message})
        cancel, model = CancelToken(), self.model
        ahead = ReadAhead(self.session, lambda: self.fitted(talk).ids, cancel)
        reply = show_reply(
            self.terminal,
            lambda: model.chat(
                talk,
                self._params(attempt),
                template=self.template,
                overflow=self.settings.overflow,
                session=self.session,
                **self.settings.limits(cancel),
            ),
            cancel,
            before=ahead,
            markdown=self.markdown,
        )
        return ahead.counted(reply)

    def _completion(self, message: str, attempt: int) -> Reply:
        fitting = self.fitted(self.messages({"role": "user", "content": message}))
        cancel = CancelToken()
        ahead = ReadAhead(self.session, lambda: fitting.ids, cancel)
        reply = show_reply(
            self.terminal,
            lambda: self.session.generate(
                fitting.ids,
                self._params(attempt),
                same_text=True,
                dropped=fitting.dropped_tokens,
                **self.settings.limits(cancel),
            ),
            cancel,
            before=ahead,
        )
        return ahead.counted(reply)

    def _params(self, attempt: int) -> Sampling:
        """The settings, with another seed for each attempt: the same one repeats the reply."""
        sampling = self.settings.sampling
        if sampling.seed is None or not attempt:
            return sampling
        return replace(sampling, seed=(sampling.seed + attempt) % (LARGEST_SEED + 1))

    # --- the context ------------------------------------------------------------------------------

    def fitted(self, messages: list[dict[str, str]]) -> "Fitted":
        """Of messages, the last of them new, what the model is to read. Raises ContextOverflow."""
        settings = self.settings
        if self.completing:
            return fitted_text(
                self.model.tokenizer,
                "".join(message["content"] for message in messages[:-1]),
                messages[-1]["content"],
                overflow=settings.overflow,
                context=self.model.info.context,
                max_tokens=settings.max_tokens,
            )
        try:
            return self.model.fitted(
                messages,
                template=self.template,
                overflow=settings.overflow,
                max_tokens=settings.max_tokens,
            )
        except ContextOverflow as error:
            hint = TOO_MUCH if settings.overflow == "error" else TOO_LONG
            raise ContextOverflow(error.need, error.have, hint) from error

    def position(self) -> int:
        """Tokens of the context that the conversation takes now."""
        if not self.exchanges:
            return 0
        last = self.exchanges[-1]
        if last.reply.position and last.system == self.system:
            return last.reply.position
        try:
            return len(self.model.chat_ids(self.messages(), template=self.template))
        except EdgeLlamaError:  # a base model, or a template that wants a question at the end
            return len(self.model.tokenizer.encode(self.text()))

    def unseen(self) -> Unseen:
        """What the last reply was made without; the places are those of the messages now."""
        last = self.exchanges[-1] if self.exchanges else None
        if last is None or last.reply.usage is None:
            return Unseen()
        then, now = int(last.system is not None), int(self.system is not None)
        dropped = last.reply.usage.dropped_messages
        places = tuple(at - then + now for at in dropped if at >= then)
        if then and 0 in dropped and self.system == last.system:
            places = (0, *places)
        return Unseen(places, last.reply.usage.dropped_tokens)

    def leaves_out(self) -> "Fitted | EdgeLlamaError":
        """What the next message will bring: which messages are left out, or why it is refused."""
        try:
            return self.fitted(self.messages(NEXT))
        except EdgeLlamaError as error:
            return error

    def document(self) -> dict[str, Any]:
        return {
            "model": str(self.model.info.path),
            "device": self.model.device,
            "template_source": source_of(self.asked, self.model),
            "messages": self.messages(),
            "replies": [reply.document() for reply in self.replies],
        }
