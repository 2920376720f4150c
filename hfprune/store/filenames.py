"""What the files in an artifact's folder are called: the contract between the stages that write and those that read."""

MANIFEST = "manifest.json"
REFUSED = "manifest.refused.json"  # the manifest of an artifact that was found damaged
RESUME = ".resume"  # a folder: what a killed attempt leaves here, the next attempt finds

DOCUMENTS = "documents.jsonl"  # download: a text's or a task's, one JSON object per line
FEWSHOT = "fewshot.jsonl"  # download: a task's examples, where it is asked with some
SCORES = "scores.safetensors"  # score: see `structures.save_scores`
SUMS = "sums.safetensors"  # shard: float64 per layer and part, what one criterion reads
PRUNING = "pruning.json"  # prune: what was cut, from what, and how it reloaded
CARD = "README.md"  # prune, recover: the model card
REFERENCE = "reference.safetensors"  # reference: tokens, hidden, head of the dense model
RECOVERY = "recovery.json"  # recover: how it was trained, and how it reloaded
LOSSES = "losses.jsonl"  # recover: step, loss, learning_rate, grad_norm, seconds, tokens so far; one line a step
ADAPTER = "adapter"  # recover: a folder, where it is asked for
RESULTS = "results.json"  # evaluate, measure: name -> value, stderr, n
SAMPLES = "samples.jsonl"  # evaluate-task, measure: doc_id and the values of each metric, one line per document
PROFILE = "profile.csv"  # measure: see `fidelity.Profile`

# What a checkpoint's folder holds beside weights and config.json: downloaded with it, carried over as it is.
COMPANIONS = (
    "generation_config.json", "chat_template*", "*token*", "vocab.*", "merges.txt", "*.model", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip

LICENCE = ("license", "license_name", "license_link")  # in a model's details, as in the hub's model cards
