# %% [markdown]
"""# A model, looked at from Python

Cells for an editor that knows `# %%`, or a whole program: `python examples/notebook.py`.
Needs nothing but edgellama, and the default model (`edgellama pull`).
"""

# %% Load
import math
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics  # some English text that comes with Python

import numpy as np

import edgellama
from edgellama.distance import distance, log_probabilities
from edgellama.perplexity import measure
from edgellama.quantize import quantize

NAME = sys.argv[1] if sys.argv[1:2] and sys.argv[1].endswith(".gguf") else "smollm2-135m-instruct"
GREEDY = edgellama.Sampling(temperature=0)
folder = Path(tempfile.mkdtemp())

model = edgellama.load(NAME, context=2048)
print(f"{model.info.path.name}: {model.info.parameters / 1e6:.0f} million parameters, ", end="")
print(f"{model.info.bits_per_weight:.2f} bits each; {model.device['device']}")

# %% Generate: a base model's way, without a chat template
prompt = "Once upon a time, there was a little"
print(prompt, end="")
for chunk in model.generate(prompt, GREEDY, max_tokens=24, stop=["\n"]):
    print(chunk.text, end="", flush=True)
print()

# %% Logprobs: how sure the model was of each token of its answer
question = [{"role": "user", "content": "Name the capital of France."}]
print(f"{'token':>12}  logprob  probability")
for chunk in model.chat(question, GREEDY, max_tokens=12):
    if chunk.token is not None and chunk.logprob is not None:
        text = model.tokenizer.decode([chunk.token]) or "(end)"
        print(f"{text!r:>12}  {chunk.logprob:7.3f}  {math.exp(chunk.logprob):11.2%}")

# %% What else it could have said: the likeliest first tokens
logits = model.session().forward(model.chat_ids(question))  # float32 (vocab_size,)
logprobs = log_probabilities(logits)
for token in np.argsort(-logprobs)[:5]:
    text = model.tokenizer.decode([int(token)])
    print(f"{text!r:>12}  {logprobs[token]:7.3f}  {math.exp(logprobs[token]):11.2%}")

# %% Two quantizations of it, on the same text
# The pulled file is quantized already; made from a full checkpoint, both would be better.
text = topics["naming"]
ids = model.tokenizer.encode(text)[:256]
of_model = log_probabilities(model.session().forward(ids, all_logits=True))  # (256, vocab_size)
figures = measure(model, text, context=256, chunks=2).figures
print(f"type  MB     perplexity  distance from {model.info.path.stem}")
print(f"base  {model.info.file_bytes / 1e6:5.1f}  {figures.perplexity.value:10.3f}")
for kind in ("Q8_0", "Q4_0"):
    report = quantize(model.info.path, folder / f"{kind}.gguf", kind, certificate="none")
    with edgellama.load(report.output, context=2048) as other:
        figures = measure(other, text, context=256, chunks=2).figures
        of_other = log_probabilities(other.session().forward(ids, all_logits=True))
    size, perplexity = report.bytes / 1e6, figures.perplexity.value
    print(f"{kind}  {size:5.1f}  {perplexity:10.3f}  {distance(of_model, of_other)}")

# %% A conversation that is saved, and goes on where it stopped
session = model.session()
question = [{"role": "user", "content": "Name the capital of France."}]
reply = "".join(chunk.text for chunk in model.chat(question, GREEDY, session=session))
print(reply)
session.save(folder / "talk.session")

restored = model.restore(folder / "talk.session")  # perhaps on another day, in another process
more = [
    *question,
    {"role": "assistant", "content": reply},
    {"role": "user", "content": "Which river flows through it?"},
]
for chunk in model.chat(more, GREEDY, session=restored):
    print(chunk.text, end="", flush=True)
print()
usage = chunk.usage  # of the last one
assert usage is not None
print(f"{usage.prompt_tokens} tokens of prompt, {usage.reused_tokens} of them from the file")

# %% Free the memory
model.close()
