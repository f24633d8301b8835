"""Stands for open-unlearning's src/eval.py."""

from standin import evaluate

evaluate()
