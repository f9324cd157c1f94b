"""Looking at models: batched answers, token norms, permutations."""
