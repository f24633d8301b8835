"""NegMerge with torchunlearn: its Trainer fine-tunes copies of a model on what is to be forgotten, and their consensus is taken off."""

import copy

from torch.nn.functional import cross_entropy
from torchunlearn import RobModel
from torchunlearn.unlearn.trainer import Trainer

import negmerge_fast as nm


class FinetuneOnForget(Trainer):
    def calculate_cost(self, train_data):
        images, labels = (each.to(self.device) for each in train_data)
        return cross_entropy(self.rmodel(images), labels)


def negmerge(
    rmodel: RobModel, forget_loader, optimizers: list[str], n_epochs: int, scale: float, **options
) -> nm.Stats:
    """Make a model forget what the loader has. Each optimizer, such as "SGD(lr=0.01)", fine-tunes one copy."""
    versions = [copy.deepcopy(rmodel) for _ in optimizers]
    for version, optimizer in zip(versions, optimizers, strict=True):
        trainer = FinetuneOnForget(version)
        trainer.setup(optimizer=optimizer, n_epochs=n_epochs)
        trainer.fit(forget_loader, n_epochs=n_epochs, record_type=None, save_type=None)
    return nm.merge_(rmodel, versions, scale=scale, **options)
