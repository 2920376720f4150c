"""Prune a model in Python, as in a notebook: `# %%` begins a cell.

python examples/prune_in_python.py                          a tiny random model, seconds
python examples/prune_in_python.py Qwen/Qwen2.5-0.5B my.txt  a model and a text of your own, a paragraph a line
"""

# %% A model of transformers, its tokenizer, and documents: those to score on, and others to measure on.
import copy
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hfprune

if len(sys.argv) > 2:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    documents = [line for line in Path(sys.argv[2]).read_text(encoding="utf-8").splitlines() if line.strip()]
    length = 256
else:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, vocab_size=300, initializer_range=0.2))
    words = Tokenizer(models.WordLevel({f"word{i}": i for i in range(300)}, unk_token="word0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    documents = [" ".join(f"word{(i * 7 + j * j) % 300}" for j in range(80)) for i in range(96)]
    length = 64
half = len(documents) // 2
texts, heldout = documents[:half], documents[half:]
samples = min(32, half)

# %% One call. The model stays as it is; `hfprune methods` lists the methods.
small = hfprune.prune(model, tokenizer, texts, ratio=0.2, method="hfprune-best", samples=samples, length=length)
before, after = (sum(parameter.numel() for parameter in each.parameters()) for each in (model, small))
print(f"{before:,} parameters became {after:,}")

# %% How far are its predictions from the model's own, on other text?
other = hfprune.sample(model, tokenizer, heldout, samples, length)
print(f"hfprune-best: KL {hfprune.fidelity(small, model, other)['kl']:.4f} nats per token")

# %% The pieces, for another choice at each step.
tokens = hfprune.sample(model, tokenizer, texts, samples, length)
scores = hfprune.score(model, tokens, "entropy")  # {"mlp": [(neurons,) per layer], "attention": [...]}
kept = hfprune.allocate(model, scores, ratio=0.2)  # {"mlp": [(kept,) indices per layer]}
for refit in ("none", "sequential"):
    mine = copy.deepcopy(model)
    if refit != "none":
        hfprune.refit(mine, kept, tokens, refit)
    hfprune.cut(mine, kept)
    print(f"entropy, refit {refit}: KL {hfprune.fidelity(mine, model, other)['kl']:.4f} nats per token")

# %% The result is a model of transformers: save it, load it, train it on.
if len(sys.argv) > 2:
    small.save_pretrained("pruned")
    tokenizer.save_pretrained("pruned")
