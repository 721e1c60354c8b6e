"""Long-context evaluations: pure functions that build prompts and score answers."""

from longllm.evals.passkey import Cell, PasskeyPrompt, Score, passkey_cells, passkey_prompt, passkey_score

__all__ = ["Cell", "PasskeyPrompt", "Score", "passkey_cells", "passkey_prompt", "passkey_score"]
