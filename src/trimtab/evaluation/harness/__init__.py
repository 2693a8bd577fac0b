"""EleutherAI's lm-evaluation-harness: trimtab as its model, its tasks as tasks of trimtab."""
