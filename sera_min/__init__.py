"""SeRA (arXiv:2410.09362) in plain PyTorch: read logprobs, losses, select, bootstrap, then ../train.py."""
