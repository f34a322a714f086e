"""What `build_app.py` freezes: the chat window, with its model and its kernels beside it.

edgellama-chat                      the window
edgellama-chat --ask "QUESTION"     one answer on stdout, for trying an app out without a screen
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent  # in a frozen app, where PyInstaller has put what was added
(MODEL,) = (HERE / "model").iterdir()
os.environ["EDGELLAMA_KERNELS"] = str(HERE / "kernels")  # before the first model is loaded


def ask(question: str) -> None:
    """Print one greedy answer; an error is told in words, with status 1."""
    import edgellama

    try:
        with edgellama.load(MODEL) as model:
            messages = [{"role": "user", "content": question}]
            for chunk in model.chat(messages, edgellama.Sampling(temperature=0), max_tokens=200):
                print(chunk.text, end="", flush=True)
            print()
    except edgellama.EdgeLlamaError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(" ".join(sys.argv[2:]))
    else:
        from chat_window import show

        show(str(MODEL))
