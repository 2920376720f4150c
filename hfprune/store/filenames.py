"""Names of the files in an artifact's folder, shared by the stages that write them and those that read them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

MANIFEST = "manifest.json"
REFUSED = "manifest.refused.json"  # the manifest of a damaged artifact
RESUME = ".resume"  # a folder: the next attempt continues from what a killed one wrote here

DOCUMENTS = "documents.jsonl"  # download: a text's or a task's, one JSON object per line
FEWSHOT = "fewshot.jsonl"  # download: few-shot examples of a task, if it has any
SCORES = "scores.safetensors"  # score: see `units.save_scores`
ORDER = "order.json"  # order: see `order.save_order`
WIDTHS = "widths.json"  # search: see `searched.save_widths`
SUMS = "sums.safetensors"  # shard: float64 per layer and part, the sums that one criterion reads
PRUNING = "pruning.json"  # prune: what was cut from which model, and how it reloaded
CARD = "README.md"  # prune, recover: the model card
REFERENCE = "reference.safetensors"  # reference: tokens, hidden, head of the dense model
RECOVERY = "recovery.json"  # recover: how it was trained, and how it reloaded
LOSSES = "losses.jsonl"  # recover: step, loss, learning_rate, grad_norm, seconds, tokens so far; one line a step
ADAPTER = "adapter"  # recover: a folder, if the config asks for it
RESULTS = "results.json"  # evaluate, measure: name -> value, stderr, n
SAMPLES = "samples.jsonl"  # evaluate-task, measure: doc_id and the values of each metric, one line per document
PROFILE = "profile.csv"  # measure: see `fidelity.Profile`

# Files of a checkpoint beside weights and config.json: they are downloaded with it and copied unchanged. The names are
# exact, not matched by a word in them: an access token or a licence key may lie in the same folder.
TOKENIZER = (
    "tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tokenizer.model.v[0-9]*", "tiktoken.model",
    "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
TEXTS = ("generation_config.json", "chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja")
LICENCES = (  # in any case, "-" for "_", and with an ending of `PROSE`
    "LICENSE", "LICENCE", "MODEL_LICENSE", "LICENSE_MODEL", "LICENSE_APACHE", "LICENSE_MIT", "LICENSE_AGREEMENT",
    "NOTICE", "NOTICES", "THIRD_PARTY_NOTICES", "COPYING", "COPYRIGHT", "USE_POLICY", "ACCEPTABLE_USE_POLICY",
)  # fmt: skip
PROSE = ("", "txt", "md", "rst", "html", "pdf")
HISTORY = (PRUNING, RECOVERY)  # of a checkpoint that hfprune has pruned or trained before

LICENCE = ("license", "license_name", "license_link")  # keys of a model's details and of the hub's model cards


def is_one_of(patterns: Iterable[str], name: str) -> bool:
    """Whether a file's path below the checkpoint's folder matches one of these patterns."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def is_licence(name: str) -> bool:
    """Whether a file is, by its name, a licence, a notice or a policy of use."""
    stem, _, ending = name.partition(".")
    return stem.upper().replace("-", "_") in LICENCES and ending.lower() in PROSE


def is_companion(name: str) -> bool:
    """Whether a file is always copied along with a checkpoint's weights, unchanged."""
    return is_one_of(TOKENIZER + TEXTS, name) or is_licence(name)


def is_shared(name: str) -> bool:
    """Whether a file of a checkpoint made here may leave the store."""
    weights = ("*.safetensors", "*.safetensors.index.json", "config.json", "modeling_per_layer.py")
    adapter = (f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json", f"{ADAPTER}/{CARD}")
    return is_companion(name) or is_one_of((*weights, *adapter, *HISTORY, LOSSES, CARD), name)
