""" "Towards Understanding Steering Strength": curves on models, the one-layer GPT, the theory."""
