"""Several questions answered at once by one model, with asyncio; who takes too long is cancelled.

    python examples/async_chat.py [MODEL]

The model serves all replies, one step at a time, in worker threads: the event loop stays free.
"""

import asyncio
import sys
from collections.abc import Callable, Sequence

import edgellama

QUESTIONS = (
    "Name the capital of France.",
    "Why is the sky blue? Answer in one sentence.",
    "Write a very long story about the sea.",
    "Name three primary colours.",
)
GREEDY = edgellama.Sampling(temperature=0)
PATIENCE = 2.0  # seconds


async def answer(
    model: edgellama.Model, question: str, show: Callable[[str], None] = lambda text: None
) -> str:
    """One reply; `show` gets its text as it comes."""
    messages, reply = [{"role": "user", "content": question}], ""
    # however the block is left, by return, error or cancellation: the model's work has ended then
    async with model.achat(messages, GREEDY) as chunks:
        async for chunk in chunks:
            reply += chunk.text
            show(chunk.text)
    return reply


async def answer_all(model: edgellama.Model, questions: Sequence[str]) -> list[str]:
    return await asyncio.gather(*(answer(model, question) for question in questions))


async def answer_in_time(
    model: edgellama.Model, question: str, seconds: float, show: Callable[[str], None]
) -> str | None:
    """One reply, or None if it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            return await answer(model, question, show)
    except TimeoutError:
        return None


class Lines:
    """Prints pieces of a text in lines that begin with a number, so that several can mix."""

    def __init__(self, number: int) -> None:
        self.number, self.line = number, ""

    def add(self, text: str) -> None:
        self.line += text.replace("\n", " ")
        if len(self.line) > 70 and self.line[-1] in " .,":
            self.end()

    def end(self, text: str = "") -> None:
        if self.line.strip() or text:
            print(f"{self.number} | {self.line.strip()}{text}", flush=True)
        self.line = ""


async def show_one(model: edgellama.Model, number: int, question: str) -> None:
    lines = Lines(number)
    reply = await answer_in_time(model, question, PATIENCE, lines.add)
    lines.end(" [cancelled]" if reply is None else "")


async def main(path: str) -> None:
    model = await asyncio.to_thread(edgellama.load, path, context=2048)  # loading blocks too
    with model:
        await asyncio.gather(*(show_one(model, n, text) for n, text in enumerate(QUESTIONS)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"))
