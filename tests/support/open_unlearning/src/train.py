"""Stands for open-unlearning's src/train.py."""

from standin import train

train()
