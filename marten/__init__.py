"""Marten's library: the nouns behind train_main.py, predict_main.py and the verbs in scripts/."""

__version__ = "0.1.0"
