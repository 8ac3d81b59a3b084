"""Other programs that serve PyTorch networks, each as its quickstart has it, and each with our engine inside."""
